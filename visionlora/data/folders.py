"""Finding labelled images: folder trees and CSV files, listed without opening an image."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from typing import Literal

from visionlora.config import did_you_mean
from visionlora.data.find import missing, walk
from visionlora.data.images import EXTENSIONS
from visionlora.errors import DataError

__all__ = ["LAYOUTS", "Layout", "Sample", "Scan", "read_csv", "read_tree", "scan_tree"]

Layout = Literal["auto", "class", "split/class", "domain/class", "domain/split/class"]
LAYOUTS: tuple[Layout, ...] = ("auto", "class", "split/class", "domain/class", "domain/split/class")
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


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
    folders, problems = walk(root)
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
    scan = scan_csv(path)
    if scan.problems:
        raise DataError(_some(scan.problems))
    return scan.samples


def scan_csv(path: str | PathLike[str]) -> Scan:
    """Return the rows of a CSV that stand for images, and the faults of the others. Raises DataError: no such table."""
    path = Path(path)
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected a CSV file; give a folder of images as root")
    if not path.is_file():
        raise DataError(missing(path))
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restval="")
            _check_columns(path, list(rows.fieldnames or []))
            samples, problems = [], []
            for row in rows:
                try:
                    samples.append(_row(path, rows.line_num, row))
                except DataError as e:
                    problems.append(str(e))
    except (UnicodeDecodeError, csv.Error) as e:
        raise DataError(f"{path}: not a CSV in UTF-8 ({e})") from None
    if not samples and not problems:
        raise DataError(f"{path}: no rows below the header")
    twice = [name for name, count in Counter(sample.path for sample in samples).items() if count > 1]
    if twice:
        problems.append(f"{path}: listed more than once: {_some(twice)}")
    return Scan(samples, [], problems)


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
            found = get_close_matches(needed, [c for c in columns if c], n=1)
            near = f'; rename "{found[0]}" to {needed}' if found else ""
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
