"""Adapters in the files of other libraries: PEFT, kohya's tools and LyCORIS, loralib."""

from __future__ import annotations

from visionlora.io.formats.change import Imported, LayerChange
from visionlora.io.formats.compare import difference
from visionlora.io.formats.detect import FORMATS, Format, detect
from visionlora.io.formats.loralib import read_loralib
from visionlora.io.formats.lycoris_read import read_lycoris
from visionlora.io.formats.lycoris_write import lycoris_tensors
from visionlora.io.formats.peft_read import read_peft
from visionlora.io.formats.peft_write import peft_tensors
from visionlora.io.formats.put_on import put_on
from visionlora.io.formats.written import Written

__all__ = [
    "FORMATS",
    "Format",
    "Imported",
    "LayerChange",
    "Written",
    "detect",
    "difference",
    "lycoris_tensors",
    "peft_tensors",
    "put_on",
    "read_loralib",
    "read_lycoris",
    "read_peft",
]
