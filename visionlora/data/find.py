"""Finding image files below a folder, or those that a path or glob stands for."""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from visionlora.config import did_you_mean
from visionlora.data.images import EXTENSIONS
from visionlora.errors import DataError

__all__ = ["Folder", "find_images", "missing", "walk"]

logger = logging.getLogger(__name__)

JUNK = ("__MACOSX", "__pycache__", "@eaDir", "lost+found")


class Folder(NamedTuple):
    """One folder below a root."""

    parts: tuple[str, ...]
    """Its path from the root."""
    images: list[str]
    """Names of the image files in it, sorted."""
    leaf: bool
    """Whether it has no sub-folders."""


def walk(root: Path) -> tuple[list[Folder], list[str]]:
    """Return every folder from the root down, sorted, and the faults met: links that loop, folders closed to us.

    Names that begin with a dot are left out, and so are files whose ending is not an image's.
    """
    problems: list[str] = []
    return list(_walk(root, (), frozenset(), problems)), problems


def find_images(source: str | PathLike[str]) -> list[str]:
    """Return the images that a file, folder or glob stands for, sorted. Raises DataError if there are none."""
    path = Path(source)
    if not str(source):
        raise DataError("nothing to predict: expected a file, folder or glob, got an empty text")
    if path.is_dir():
        found = _below(path)
    elif path.exists():
        found = [str(source)]
    elif glob.has_magic(str(source)):
        found = sorted(name for name in glob.glob(str(source), recursive=True) if Path(name).is_file())  # noqa: PTH207
    else:
        raise DataError(missing(path))
    if not found:
        raise DataError(f"{source}: no image found (looked for {' '.join(EXTENSIONS)})")
    return found


def missing(path: str | PathLike[str]) -> str:
    """Return the message for a path that does not exist, with the nearest name beside it."""
    path = Path(path)
    parent, name = path.parent, path.name
    while not parent.is_dir() and parent != parent.parent:
        parent, name = parent.parent, parent.name
    beside = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")] if parent.is_dir() else []
    return f"{path} does not exist{did_you_mean(name, beside)}"


def _below(folder: Path) -> list[str]:
    folders, problems = walk(folder)
    if problems:
        raise DataError("; ".join(problems[:5]))
    return sorted(str(Path(folder, *found.parts, name)) for found in folders for name in found.images)


def _walk(
    folder: Path, parts: tuple[str, ...], above: frozenset[tuple[int, int]], problems: list[str]
) -> Iterator[Folder]:
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
    yield Folder(parts, images, not below)
    for name in below:
        yield from _walk(folder / name, (*parts, name), above | {here}, problems)


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself stays in the list: an image that cannot be read, to be reported as one
        return False
