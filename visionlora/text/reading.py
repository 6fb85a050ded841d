"""Reading text: tables, JSON lines, plain text and saved data sets, as rows that know where they stand."""

from __future__ import annotations

import csv
import glob
import io
import json
import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from visionlora.data.find import JUNK, missing
from visionlora.data.folders import SPLITS
from visionlora.errors import DataError
from visionlora.text import saved

__all__ = ["Documents", "Row", "read_rows", "rows_of"]

logger = logging.getLogger(__name__)

Documents = Literal["line", "paragraph", "file"]
SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".txt")
SPLIT_NAMES = {**SPLITS, "dev": "val"}


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table, one JSON object or one document."""

    cells: Mapping[str, Any]
    place: str
    """Where it stands, for messages: the file and the line."""
    split: str | None = None
    """"train", "val" or "test" where the file's name says so."""
    domain: str | None = None
    """The folder the file lies in, below the root."""


def read_rows(
    source: str | PathLike[str],
    *,
    subset: str | None = None,
    header: Sequence[str] | None = None,
    documents: Documents = "line",
) -> list[Row]:
    """Return the rows of a file, a glob, a folder, or a data set by its name on the Hugging Face hub.

    Files: .csv, .tsv, .jsonl, .json (a list of objects, or SQuAD's), .parquet, and .txt with one document a line, a
    paragraph or a file. In a folder a file's name or folder tells its split (train.csv, dialog.dev.jsonl, test/a.txt)
    and another folder its domain; a .txt file that is one document takes the folder it lies in as its label. A folder
    written by save_to_disk is read too. header names the columns of tables that have no header line.
    Raises DataError naming the file and the line.
    """
    path, name = Path(source), str(source)
    if path.is_dir() and saved.is_saved(path):
        rows = _of_parts(saved.from_disk(path), name)
    elif path.is_dir():
        rows = [row for file in _files(path) for row in _of_folder(path, file, header, documents)]
    elif path.is_file():
        rows = [*_of_file(path, header, documents)]
    elif glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(name, recursive=True))  # noqa: PTH207
        rows = [row for file in found if file.is_file() for row in _of_folder(file.parent, file, header, documents)]
    elif saved.may_be_a_name(name):
        rows = _of_parts(saved.from_hub(name, subset), name)
    else:
        raise DataError(missing(path))
    if not rows:
        raise DataError(f"{name}: no rows in it (looked for {' '.join(SUFFIXES)})")
    return rows


def rows_of(items: Any, name: str = "rows") -> list[Row]:
    """Return the rows of a list of dicts, a table with to_dict("records"), a Dataset, or a dict of these by split."""
    if isinstance(items, Mapping):
        return _of_parts({str(split): saved.plain(part) for split, part in items.items()}, name)
    return [Row(cells, f"{name}, number {at}") for at, cells in enumerate(saved.plain(items), 1)]


def split_of(words: Iterable[str]) -> str | None:
    """Return the split that one of some names means: train-00000-of-00002 is training, dialog.dev validation."""
    for word in words:
        for part in re.split(r"[._\- ]", word.lower()):
            if part in SPLIT_NAMES:
                return SPLIT_NAMES[part]
    return None


def _of_parts(parts: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> list[Row]:
    several = set(parts) != {""}
    rows = []
    for part, cells in parts.items():
        split = split_of([part]) if several else None
        if several and split is None:
            raise DataError(f"{name}: its part {part!r} is none of {', '.join(SPLIT_NAMES)}; name a part or a file")
        where = f"{name}, {part}" if several else name
        rows += [Row(cell, f"{where} number {at}", split) for at, cell in enumerate(cells, 1)]
    return rows


def _files(root: Path) -> list[Path]:
    below = (path.relative_to(root) for path in root.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    seen = [p for p in below if not any(part.startswith(".") or part in JUNK for part in p.parts)]
    tables = [path for path in seen if path.suffix.lower() != ".txt"]
    if tables and len(tables) < len(seen):
        logger.info("%s: %d .txt files beside tables are not read", root, len(seen) - len(tables))
    return [root / path for path in sorted(tables or seen)]


def _of_folder(root: Path, file: Path, header: Sequence[str] | None, documents: Documents) -> Iterator[Row]:
    """Yield the rows of a file below a root, whose folders name split, domain and label."""
    folders = file.relative_to(root).parts[:-1]
    split = next((SPLIT_NAMES[f.lower()] for f in folders if f.lower() in SPLIT_NAMES), None) or split_of([file.stem])
    others = [folder for folder in folders if folder.lower() not in SPLIT_NAMES]
    label = others.pop() if others and documents == "file" and file.suffix.lower() == ".txt" else None
    domain = "/".join(others) or None
    for row in _of_file(file, header, documents):
        cells = {**row.cells, "label": label} if label is not None else row.cells
        yield Row(cells, row.place, split, domain)


def _of_file(path: Path, header: Sequence[str] | None, documents: Documents) -> Iterator[Row]:
    kind = path.suffix.lower()
    if kind == ".parquet":
        yield from rows_of(saved.from_parquet(path), str(path))
        return
    if kind not in SUFFIXES:
        raise DataError(f"{path}: expected a file of {' '.join(SUFFIXES)}")
    text = read_text(path)
    if kind == ".json":
        yield from (Row(cells, f"{path}, number {at}") for at, cells in enumerate(_objects(path, text), 1))
        return
    if kind == ".txt":
        found: Iterable[tuple[int, Mapping[str, Any]]] = _documents(text, documents)
    elif kind in (".csv", ".tsv"):
        found = _table(path, text, "," if kind == ".csv" else "\t", header)
    else:
        found = _lines(path, text)
    for line, cells in found:
        yield Row(cells, f"{path}, line {line}")


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file with newlines as \\n. Raises DataError naming the first line that is not."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = content.count(b"\n", 0, e.start) + 1
        cure = f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name} > utf8-{path.name}"
        raise DataError(f"{path}, line {line}: byte 0x{content[e.start]:02x} is not UTF-8; {cure}") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _documents(text: str, documents: Documents) -> Iterator[tuple[int, dict[str, str]]]:
    if documents == "file":
        yield 1, {"text": text}
        return
    line = 1
    for piece in re.split(r"(\n)" if documents == "line" else r"(\n(?:[ \t]*\n)+)", text):
        if piece.strip():
            yield line, {"text": piece.strip("\n")}
        line += piece.count("\n")


def _lines(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028, legal inside JSON
        if line.strip():
            found = _json(line, f"{path}, line {number}")
            if not isinstance(found, dict):
                raise DataError(f"{path}, line {number}: expected an object {{...}}, got {type(found).__name__}")
            yield number, found


def _objects(path: Path, text: str) -> Iterator[dict[str, Any]]:
    found = _json(text, str(path))
    if isinstance(found, dict) and isinstance(found.get("data"), list):
        found = found["data"]
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise DataError(f"{path}: expected a list of objects, or SQuAD's data; one object a line belongs in .jsonl")
    for entry in found:
        if "paragraphs" in entry:
            yield from _squad(entry)
        else:
            yield entry


def _squad(article: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for paragraph in article["paragraphs"]:
        for asked in paragraph.get("qas", ()):
            yield {"title": article.get("title", ""), "context": paragraph["context"], "answers": [], **asked}


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        raise DataError(f"{where}: not JSON ({e})") from None


def _table(path: Path, text: str, delimiter: str, header: Sequence[str] | None) -> Iterator[tuple[int, dict[str, str]]]:
    with _long_fields():
        try:
            rows = [*_cells(text, delimiter, csv.QUOTE_MINIMAL)]
        except csv.Error as e:
            if delimiter == ",":
                line = len([*_until_error(text, delimiter)]) + 1
                raise DataError(f"{path}: not a sound CSV near row {line}: {e}") from None
            rows = [*_cells(text, delimiter, csv.QUOTE_NONE)]  # quotes that are part of the text, as in GLUE's files
    columns = list(header) if header is not None else [name.strip() for name in rows[0][1]] if rows else []
    if len(set(columns)) < len(columns) or not all(columns):
        raise DataError(f"{path}: the header needs different names, got {', '.join(map(repr, columns))}")
    for line, cells in rows if header is not None else rows[1:]:
        if len(cells) != len(columns):
            raise DataError(f"{path}, line {line}: {len(cells)} cells, the header has {len(columns)}: {columns}")
        yield line, dict(zip(columns, cells, strict=True))


def _cells(text: str, delimiter: str, quoting: Literal[0, 3]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
    line = 1
    for cells in reader:
        if cells:
            yield line, cells
        line = reader.line_num + 1


def _until_error(text: str, delimiter: str) -> Iterator[int]:
    try:
        for line, _ in _cells(text, delimiter, csv.QUOTE_MINIMAL):
            yield line
    except csv.Error:
        return


@contextmanager
def _long_fields() -> Iterator[None]:
    """Lift csv's limit of 131,072 characters a cell; it is a setting of the whole process."""
    before = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(before)
