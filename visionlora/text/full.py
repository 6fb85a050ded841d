"""A model trained in full, on disk: a folder of plain transformers that says what it is."""

from __future__ import annotations

import json
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from visionlora.atomic import write_atomic
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.io.base import describe_base
from visionlora.io.record import SCHEMA, versions
from visionlora.io.strict import Rule, check, is_finite, is_whole, parse_object

__all__ = ["MIRROR", "WEIGHTS", "read_full", "save_full"]

WEIGHTS, CONFIG, MIRROR = "model.safetensors", "config.json", "visionlora.json"
FORMAT_VERSION = 1

_SHARED: dict[str, Any] = dict(SCHEMA)  # type: ignore[arg-type]
_SCHEMA = {name: _SHARED[name] for name in ("base", "classes", "data", "metrics", "versions", "created")} | {
    "format_version": Rule(f"{FORMAT_VERSION}, which this version reads", lambda v: is_whole(v) and v == FORMAT_VERSION)
}


def save_full(
    net: nn.Module,
    directory: str | Path,
    *,
    base: dict[str, Any] | None = None,
    classes: list[str] | None = None,
    data: dict[str, Any] | None = None,
    metrics: dict[str, float] | None = None,
) -> Path:
    """Write a model without adapters to a directory that from_pretrained reads, with visionlora.json beside it.

    The arguments are those of visionlora.io.save_adapter. The files are written aside and then moved in, the weights
    last.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "base": describe_base(net, base),
        "classes": classes,
        "data": data,
        "metrics": {key: value if is_finite(value) else None for key, value in (metrics or {}).items()},
        "versions": versions(),
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    record = json.loads(json.dumps(record))  # tuples become lists, as a reader will see them
    try:
        check(record, _SCHEMA, "record")
    except AdapterFileError as e:
        raise ConfigError(f"the model cannot be saved: {e}") from None
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".saving-") as aside:
        net.save_pretrained(aside, max_shard_size="1TB")  # type: ignore[operator]
        for path in sorted(Path(aside).iterdir(), key=lambda p: p.name == WEIGHTS):
            path.replace(folder / path.name)
    write_atomic(folder / MIRROR, json.dumps(record, indent=2) + "\n")
    return folder


def read_full(directory: str | Path) -> dict[str, Any]:
    """Return the record of a directory that save_full wrote. Raises AdapterFileError."""
    path = Path(directory) / MIRROR
    try:
        record = parse_object(path.read_bytes(), "record")
        check(record, _SCHEMA, "record")
    except (OSError, AdapterFileError) as e:
        raise AdapterFileError(f"{path}: {e}") from None
    return record
