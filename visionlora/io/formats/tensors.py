"""Tensors of files that other libraries wrote, read as data alone under whatever names they have."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from visionlora.errors import AdapterFileError
from visionlora.io.header import DTYPES, MAX_DIMS, MAX_KEY, MAX_TENSORS, open_inside
from visionlora.io.strict import parse_object, short, wrong

MAX_HEADER = 16 << 20  # bytes; kohya's training tools keep the tags of a whole data set in the metadata
NESTED = ("state_dict", "model_state_dict", "model", "lora_state_dict", "lora")
"""Entries under which training scripts keep the tensors of a .pt file."""

_FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
_COUNTS = {"I64": torch.int64, "I32": torch.int32}  # step counters; alpha in some files
_MALFORMED = (
    *(pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError),
    *(AssertionError, OverflowError, zipfile.BadZipFile),
)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raises AdapterFileError naming the file."""
    try:
        with open_inside(path) as file:
            content = _header(file)[0] + file.read()
        entries = safetensors.deserialize(content)  # type: ignore[no-untyped-call]  # checks offsets, sizes and types
        if len(entries) > MAX_TENSORS:
            raise wrong("header", f"at most {MAX_TENSORS} tensors", len(entries))
        tensors = {name: _tensor(name, entry) for name, entry in entries}
        _check_finite(tensors)
    except safetensors.SafetensorError as e:
        raise AdapterFileError(f"{path}: no sound safetensors file ({e}); it is truncated or damaged") from None
    except AdapterFileError as e:
        raise AdapterFileError(f"{path}: {e}") from None
    return tensors


def read_names(path: Path) -> tuple[list[str], dict[str, Any]]:
    """Return the names of the tensors and the metadata of a safetensors file, without reading its numbers."""
    try:
        with open_inside(path) as file:
            entries = _header(file)[1]
    except AdapterFileError as e:
        raise AdapterFileError(f"{path}: {e}") from None
    metadata = entries.pop("__metadata__", None)
    return list(entries), metadata if isinstance(metadata, dict) else {}


def read_torch(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .pt file that holds nothing but tensors by name. Raises AdapterFileError.

    torch's unpickler for weights reads it, which runs no code of the file.
    """
    try:
        with open_inside(path) as file:
            size = os.fstat(file.fileno()).st_size
            _check_archive(file, size)
            file.seek(0)
            found = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {name: _plain(name, tensor, size) for name, tensor in _by_name(found).items()}
        _check_finite(tensors)
    except AdapterFileError as e:
        raise AdapterFileError(f"{path}: {e}") from None
    except _MALFORMED as e:
        reason = " ".join(str(e).split())[:200]
        raise AdapterFileError(
            f"{path}: expected a file of plain tensors, and torch.load(weights_only=True) refuses it ({reason}); "
            "save only the tensors: torch.save(loralib.lora_state_dict(model), path)"
        ) from None
    return tensors


def _header(file: BinaryIO) -> tuple[bytes, dict[str, Any]]:
    """Return the first bytes of a file, to the end of its header, and what the header says."""
    size, start = os.fstat(file.fileno()).st_size, file.read(8)
    length = int.from_bytes(start, "little")
    if size < 10 or not 2 <= length <= min(MAX_HEADER, size - 8):
        raise AdapterFileError(
            f"a header of {length} bytes in a file of {size}; it is truncated, or no safetensors file"
        )
    text = file.read(length)
    return start + text, parse_object(text, "header")


def _tensor(name: str, entry: dict[str, Any]) -> Tensor:
    dtype, shape = {**_FLOATS, **_COUNTS}.get(entry["dtype"]), entry["shape"]
    if dtype is None:
        raise wrong(f"{short(name)}.dtype", f"one of {', '.join(_FLOATS)}", entry["dtype"])
    if len(name) > MAX_KEY or len(shape) > MAX_DIMS or 0 in shape:
        raise wrong(f"{short(name)}.shape", f"at most {MAX_DIMS} sizes of at least 1", shape)
    return torch.frombuffer(bytearray(entry["data"]), dtype=dtype).reshape(shape)


def _check_archive(file: BinaryIO, size: int) -> None:
    if not zipfile.is_zipfile(file):
        raise AdapterFileError("not the archive that torch.save writes since version 1.6; load and save it again there")
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or len(entries) > 2 * MAX_TENSORS or sum(entry.file_size for entry in entries) > size:
        raise AdapterFileError("a compressed or overlapping archive, which torch.save never writes")


def _by_name(found: object) -> dict[Any, Any]:
    for key in NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or len(found) > MAX_TENSORS:
        raise wrong("content", f"a dict of 1 to {MAX_TENSORS} tensors by name", type(found).__name__)
    return found


def _plain(name: object, tensor: object, size: int) -> Tensor:
    if not isinstance(name, str) or len(name) > MAX_KEY:
        raise wrong("a key", "text", name)
    if not isinstance(tensor, Tensor) or type(tensor) not in (Tensor, torch.nn.Parameter):
        raise wrong(short(name), "a tensor", type(tensor).__name__)
    tensor = tensor.detach()
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _FLOATS.values():
        raise wrong(short(name), f"a dense tensor of {', '.join(_FLOATS)}", f"{tensor.layout}, {tensor.dtype}")
    # a view may claim more elements than the file holds
    if not 0 < tensor.numel() * tensor.itemsize <= size or tensor.ndim > MAX_DIMS:
        raise wrong(f"{short(name)}.shape", f"sizes that fit in the {size} bytes of the file", tuple(tensor.shape))
    return tensor.contiguous()


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum()) if tensor.is_floating_point() else 0
        if bad:
            raise AdapterFileError(
                f"{short(name)}: {bad} of {tensor.numel()} values are NaN or infinite; the training run was broken"
            )
