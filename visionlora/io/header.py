"""A safetensors file taken apart by hand: every declared size is checked before anything is allocated."""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.io.strict import is_whole, parse_object, wrong

MAX_HEADER = 1 << 20  # bytes; safetensors itself would take 100 MB, which costs 38 s and 557 MB to parse
MAX_TENSORS = 20_000
MAX_DIMS = 6
MAX_KEY = 512
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,  # BatchNorm's step counter in files of other libraries
}

_KEY = re.compile(
    r"base_model\.model(\.[A-Za-z0-9_-]+)+"
    r"|visionlora\.([A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)?/[A-Za-z0-9_]+/[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*"
)


@dataclass(frozen=True)
class Slot:
    """One declared tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Header:
    """What a file declares: tensors in the order of their bytes, and text."""

    slots: dict[str, Slot]
    metadata: dict[str, str]


def is_key(key: str) -> bool:
    """Tell whether the text may name a tensor in an adapter file."""
    return len(key) <= MAX_KEY and _KEY.fullmatch(key) is not None


def open_inside(path: Path) -> BinaryIO:
    """Open a regular file that really lies in its folder, or in the blobs beside a Hugging Face snapshot.

    Raises AdapterFileError for a link out of the folder, a pipe, a device, a foreign hard link.
    """
    # not Path.resolve: it raises RuntimeError for a link to itself on Python 3.10 to 3.12
    folder, real = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    if real.parent != folder and not _is_cache_blob(real, folder):
        raise AdapterFileError(f"a link to {real}, outside its folder; copy the file itself here")
    # O_NONBLOCK: opening a pipe that nobody writes to would wait for ever. Windows has neither flag.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(real, flags), "rb")
    except OSError as e:
        raise AdapterFileError(f"cannot be opened: {e.strerror}") from None
    status = os.fstat(file.fileno())
    problem = None if stat.S_ISREG(status.st_mode) else "not a regular file"
    if problem is None and os.name != "nt" and status.st_nlink > 1 and status.st_uid != os.geteuid():
        problem = "a hard link to a file of another user; copy it"
    if problem:
        file.close()
        raise AdapterFileError(problem)
    return file


_OTHERS = {
    b"PK": "a zip archive, as torch.save writes",
    b"\x80": "a pickle, which is never read",
    b"version ": "a pointer of Git LFS (git lfs pull fetches the file)",
    b"<": "a web page",
}
"""How files begin that are taken for adapters. None of these is a length that a header may have."""


def read_header(file: BinaryIO) -> Header:
    """Return what an open file declares. Raises AdapterFileError where it contradicts itself or its size."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if size < 10:
        raise AdapterFileError(f"{size} bytes are no safetensors file; the file is truncated or not an adapter")
    if not 2 <= length <= MAX_HEADER:
        if taken_for := next((what for start, what in _OTHERS.items() if head.startswith(start)), None):
            raise AdapterFileError(f"{taken_for}, no safetensors file")
        raise wrong("header length", f"2 to {MAX_HEADER} bytes", length)
    if 8 + length > size:
        raise AdapterFileError(f"header length: {length} bytes declared, the file has {size - 8}; it is truncated")
    text = file.read(length)
    if not text.startswith(b"{"):
        raise wrong("header", "a JSON object that begins with '{'", text[:20])
    entries = parse_object(text, "header")
    metadata = _metadata(entries.pop("__metadata__", {}))
    if len(entries) > MAX_TENSORS:
        raise wrong("header", f"at most {MAX_TENSORS} tensors", len(entries))
    return Header(_slots(entries, size - 8 - length), metadata)


def read_tensors(file: BinaryIO, header: Header) -> dict[str, Tensor]:
    """Return the tensors that follow a header just read, as they are stored."""
    tensors = {}
    for key, slot in header.slots.items():
        buffer = bytearray(slot.nbytes)
        if file.readinto(buffer) != slot.nbytes:  # type: ignore[attr-defined]
            raise AdapterFileError(f"{key}: the file ended early; it was changed while being read")
        tensors[key] = torch.frombuffer(buffer, dtype=slot.dtype).reshape(slot.shape)
    return tensors


def _is_cache_blob(real: Path, folder: Path) -> bool:
    # Hugging Face keeps <repo>/snapshots/<revision>/file -> ../../blobs/<hash>
    return any(owner.name == "snapshots" and real.parent == owner.parent / "blobs" for owner in folder.parents)


def _metadata(found: Any) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise wrong("__metadata__", "an object of texts", found)
    return found


def _slots(entries: dict[str, Any], space: int) -> dict[str, Slot]:
    placed = [(*_offsets(key, entry), key, _slot(key, entry)) for key, entry in entries.items()]
    end = 0
    slots = {}
    for start, stop, key, slot in sorted(placed, key=lambda place: place[:2]):
        if start != end:
            raise wrong(f"{key}.data_offsets", f"to begin at {end}, where the tensor before ends", start)
        if stop - start != slot.nbytes:
            raise wrong(f"{key}.data_offsets", f"{slot.nbytes} bytes for shape {slot.shape}", stop - start)
        slots[key], end = slot, stop
    if end != space:
        raise AdapterFileError(f"the header declares {end} bytes of tensors, the file holds {space}; it is damaged")
    return slots


def _slot(key: str, entry: dict[str, Any]) -> Slot:
    if entry["dtype"] not in DTYPES:
        raise wrong(f"{key}.dtype", f"one of {', '.join(DTYPES)}", entry["dtype"])
    shape, counter = entry["shape"], key.endswith(".num_batches_tracked")
    if (entry["dtype"] == "I64") != counter:
        raise wrong(f"{key}.dtype", "I64 for a step counter and for nothing else", entry["dtype"])
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(is_whole(n) and 0 < n < 1 << 48 for n in shape):
        raise wrong(f"{key}.shape", f"a list of at most {MAX_DIMS} sizes of at least 1", shape)
    return Slot(DTYPES[entry["dtype"]], tuple(shape))


def _offsets(key: str, entry: Any) -> tuple[int, int]:
    if not is_key(key):
        raise wrong(
            "a tensor name", "base_model.model.<layer>.<tensor> or visionlora.<layer>/<attribute>/<tensor>", key
        )
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise wrong(key, "an object with dtype, shape and data_offsets", entry)
    offsets = entry["data_offsets"]
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(is_whole(n) and n >= 0 for n in offsets):
        raise wrong(f"{key}.data_offsets", "two positions", offsets)
    if not isinstance(entry["dtype"], str):
        raise wrong(f"{key}.dtype", "a text", entry["dtype"])
    return offsets[0], offsets[1]
