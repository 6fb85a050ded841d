"""Finding labelled images: folder trees and CSV files, listed without opening an image."""

from __future__ import annotations

import csv
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

from visionlora.config import did_you_mean
from visionlora.data.images import EXTENSIONS
from visionlora.errors import DataError

__all__ = ["LAYOUTS", "Layout", "Sample", "Scan", "list_images", "missing", "read_csv", "read_tree", "scan_tree"]

logger = logging.getLogger(__name__)

Layout = Literal["auto", "class", "split/class", "domain/class", "domain/split/class"]
LAYOUTS: tuple[Layout, ...] = ("auto", "class", "split/class", "domain/class", "domain/split/class")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
JUNK = ("__MACOSX", "__pycache__", "@eaDir", "lost+found")


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled image. The label is the class name, so that no list of classes can renumber it."""

    path: str
    label: str
    domain: str | None = None
    split: str | None = None
    """"train", "val" or "test"; None where the data set does not say."""


@dataclass(frozen=True)
class Scan:
    """What a folder tree holds: its samples, and its faults in words."""

    samples: list[Sample]
    empty: list[str]
    """Class folders without an image, relative to the root."""
    problems: list[str]
    """Faults that forbid reading the tree (empty class folders are judged by the reader)."""


def read_tree(
    root: str | PathLike[str], *, layout: Layout = "auto", classes: Sequence[str] | None = None
) -> list[Sample]:
    """Return the labelled images of a folder tree, sorted by path.

    Trees: class/image, split/class/image (train, val, test), domain/class/image, domain/split/class/image; "auto"
    tells them apart. A named layout also takes images from sub-folders of a class. Folders whose name begins with a
    dot are left out. Raises DataError: no images, two layouts at once, symbolic links that loop, a class folder
    without images (allowed if the class stands in classes).
    """
    scan = scan_tree(root, layout=layout)
    empty = [folder for folder in scan.empty if Path(folder).name not in (classes or ())]
    problems = scan.problems + [f"{Path(root) / folder}: a class folder without images" for folder in empty]
    if problems:
        hint = "; delete it or name the class in classes" if empty else ""
        raise DataError(_some(problems) + hint)
    return scan.samples


def scan_tree(root: str | PathLike[str], *, layout: Layout = "auto") -> Scan:
    """Return the samples of a folder tree together with its faults. Raises DataError if there is no such folder."""
    if layout not in LAYOUTS:
        raise DataError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}{did_you_mean(layout, [*LAYOUTS])}")
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} is a file; give a CSV as csv" if root.is_file() else missing(root))
    folders, problems = _folders(root)
    names = [parts for parts, images, _ in folders if images]
    if not names:
        return Scan([], [], [*problems, f"{root}: no image in it (looked for {' '.join(EXTENSIONS)})"])
    found, problem = _layout_of(root, names) if layout == "auto" else (layout, _too_shallow(root, names, layout))
    if problem:
        return Scan([], [], [*problems, problem])
    keys = found.split("/")
    samples = [_sample(root, parts, name, keys) for parts, images, _ in folders for name in images]
    empty = ["/".join(parts) for parts, images, leaf in folders if leaf and not images and 0 < len(parts) <= len(keys)]
    return Scan(samples, empty, [*problems, *_unknown_splits(root, samples)])


def read_csv(path: str | PathLike[str]) -> list[Sample]:
    """Return the rows of a CSV with the columns path,label[,domain][,split]; paths are relative to the CSV.

    Raises DataError naming the line: no such column or file, an empty cell, an unknown split, a path given twice.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(missing(path))
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restval="")
            _check_columns(path, list(rows.fieldnames or []))
            samples = [_row(path, rows.line_num, row) for row in rows]
    except (UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path}: not a CSV in UTF-8 ({e})") from None
    if not samples:
        raise DataError(f"{path}: no rows below the header")
    twice = [name for name, count in Counter(sample.path for sample in samples).items() if count > 1]
    if twice:
        raise DataError(f"{path}: listed more than once: {_some(twice)}")
    return samples


def list_images(folder: str | PathLike[str]) -> list[str]:
    """Return the image files in a folder and its sub-folders, sorted. Raises DataError for links that loop."""
    folders, problems = _folders(Path(folder))
    if problems:
        raise DataError(_some(problems))
    return [str(Path(folder, *parts, name)) for parts, images, _ in folders for name in images]


def missing(path: str | PathLike[str]) -> str:
    """Return the message for a path that does not exist, with the nearest name beside it."""
    path = Path(path)
    parent, name = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    beside = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")] if parent.is_dir() else []
    return f"{path} does not exist{did_you_mean(name, beside)}"


_Folder = tuple[tuple[str, ...], list[str], bool]


def _folders(root: Path) -> tuple[list[_Folder], list[str]]:
    """Return (parts below root, image names, has no sub-folder) of every folder, and the faults met."""
    problems: list[str] = []
    return list(_walk(root, (), frozenset(), problems)), problems


def _walk(
    folder: Path, parts: tuple[str, ...], above: frozenset[tuple[int, int]], problems: list[str]
) -> Iterator[_Folder]:
    try:
        stat = folder.stat()
        with os.scandir(folder) as found:
            entries = {e.name: _is_dir(e) for e in found if not e.name.startswith(".") and e.name not in JUNK}
    except OSError as e:
        problems.append(f"{folder}: {e.strerror}")
        return
    here = (stat.st_dev, stat.st_ino)
    if here in above:
        problems.append(f"{folder}: a symbolic link to a folder that contains it; remove the link")
        return
    below = sorted(name for name, is_dir in entries.items() if is_dir)
    images = sorted(name for name, is_dir in entries.items() if not is_dir and name.lower().endswith(EXTENSIONS))
    if len(images) + len(below) < len(entries):
        logger.info("%s: %d files are not images by their name", folder, len(entries) - len(images) - len(below))
    yield parts, images, not below
    for name in below:
        yield from _walk(folder / name, (*parts, name), above | {here}, problems)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself stays in the list: an image that cannot be read, to be reported as one
        return False


def _layout_of(root: Path, names: list[tuple[str, ...]]) -> tuple[str, str]:
    """Return the layout that fits folders holding images, or the reason why none does."""
    by_depth = {len(parts): "/".join(parts) for parts in names}
    if 0 in by_depth:
        return "", f"{root}: images lie in it directly; expected {root}/<class>/<image>"
    if len(by_depth) > 1:
        shallow, deep = by_depth[min(by_depth)], by_depth[max(by_depth)]
        return "", f"{root}: images at two depths, in {shallow}/ and in {deep}/; move them or name the layout"
    (depth,) = by_depth
    first, second = {parts[0] in SPLITS for parts in names}, {parts[min(1, depth - 1)] in SPLITS for parts in names}
    if depth == 1:
        direct = f"{root}: images lie directly in {by_depth[1]}/; expected {root}/{by_depth[1]}/<class>/<image>"
        return "class", direct if first == {True} else ""
    if depth == 2:
        mixed = f"{root}: some folders are splits ({', '.join(SPLITS)}) and some are not; name the layout"
        return ("split/class" if first == {True} else "domain/class"), mixed if len(first) > 1 else ""
    if depth == 3 and second == {True}:
        return "domain/split/class", ""
    return "", f"{root}: no layout known for {by_depth[depth]}/<image>; expected one of {', '.join(LAYOUTS[1:])}"


def _too_shallow(root: Path, names: list[tuple[str, ...]], layout: str) -> str:
    short = ["/".join(parts) or "." for parts in names if len(parts) < len(layout.split("/"))]
    return f"{root}: the layout {layout} does not fit images in {_some(short)}" if short else ""


def _sample(root: Path, parts: tuple[str, ...], name: str, keys: list[str]) -> Sample:
    at = dict(zip(keys, parts, strict=False))
    split = at.get("split")
    return Sample(str(Path(root, *parts, name)), at["class"], at.get("domain"), split and SPLITS.get(split, split))


def _unknown_splits(root: Path, samples: list[Sample]) -> list[str]:
    unknown = sorted({sample.split for sample in samples if sample.split} - set(SPLITS.values()))
    return [f"{root}: {name!r} is no split, expected one of {', '.join(SPLITS)}" for name in unknown]


def _check_columns(path: Path, columns: list[str]) -> None:
    for needed in ("path", "label"):
        if needed not in columns:
            near = did_you_mean(needed, columns)
            raise DataError(f"{path}: expected the columns path,label[,domain][,split], got {','.join(columns)}{near}")


def _row(path: Path, line: int, row: dict[str, str]) -> Sample:
    cells = {key: (row.get(key) or "").strip() for key in ("path", "label", "domain", "split")}
    for key in ("path", "label"):
        if not cells[key]:
            raise DataError(f"{path}, line {line}: the {key} is empty")
    split = cells["split"].lower()
    if split and split not in SPLITS:
        raise DataError(
            f"{path}, line {line}: split {split!r} must be train, val or test{did_you_mean(split, [*SPLITS])}"
        )
    image = path.parent / cells["path"]
    if not image.exists():
        raise DataError(f"{path}, line {line}: {missing(image)}")
    return Sample(str(image), cells["label"], cells["domain"] or None, SPLITS.get(split))


def _some(items: Iterable[str], most: int = 5) -> str:
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return "; ".join(items[:most]) + rest
