"""Adapter files: written whole or not at all, read as data alone."""

from __future__ import annotations

from visionlora.io.load import load_adapter
from visionlora.io.read import AdapterFile, read_adapter
from visionlora.io.save import save_adapter

__all__ = ["AdapterFile", "load_adapter", "read_adapter", "save_adapter"]
