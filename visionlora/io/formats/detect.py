"""Tell by its content which library wrote an adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from visionlora.errors import AdapterFileError
from visionlora.io.formats.lycoris_read import looks_like_lycoris
from visionlora.io.formats.tensors import read_names
from visionlora.io.keys import PEFT
from visionlora.io.read import PEFT_CONFIG, WEIGHTS
from visionlora.io.record import RECORD
from visionlora.io.strict import short

Format = Literal["visionlora", "peft", "kohya", "loralib"]
FORMATS: tuple[Format, ...] = get_args(Format)

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


def detect(source: Path) -> Format:
    """Return the format of a folder or a file. Raises AdapterFileError where it is none we read."""
    if source.suffix in _PICKLES and not source.is_dir():
        return "loralib"
    path = source / WEIGHTS if source.is_dir() else source
    if not os.path.lexists(path):
        raise AdapterFileError(f"{path}: expected an adapter, found nothing there{_pickle_beside(source)}")
    names, metadata = read_names(path)
    if RECORD in metadata:
        return "visionlora"
    if any(name.startswith(PEFT) for name in names):
        if not (path.parent / PEFT_CONFIG).exists():
            raise AdapterFileError(f"{path} is PEFT's, and {PEFT_CONFIG}, which holds its scale, is not beside it")
        return "peft"
    if looks_like_lycoris(names):
        return "kohya"
    raise AdapterFileError(
        f"{path}: its tensors ({', '.join(map(short, names[:3])) or 'none'}) are neither ours nor PEFT's, kohya's or "
        "LyCORIS's"
    )


def _pickle_beside(source: Path) -> str:
    found = sorted(p.name for p in source.glob("*") if p.suffix in _PICKLES) if source.is_dir() else []
    return f"; {found[0]} beside it is read where it is loralib's: give its own path" if found else ""
