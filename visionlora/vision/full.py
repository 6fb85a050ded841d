"""A model trained in full, on disk: a plain timm checkpoint that says what it is."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import nn

from visionlora.atomic import atomic_path
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.io.base import describe_base
from visionlora.io.read import FULL
from visionlora.io.record import SCHEMA, versions
from visionlora.io.strict import Rule, check, is_finite, is_whole, parse_object
from visionlora.merging import base_state_dict

WEIGHTS, MIRROR = FULL, "visionlora.json"
RECORD = "visionlora_model"
"""Name in the metadata of the weights file."""
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
    """Write a model without adapters to a directory: model.safetensors, which timm reads, and visionlora.json.

    The arguments are those of visionlora.io.save_adapter. Each file is written whole or stays as it was.
    """
    record = {
        "format_version": FORMAT_VERSION,
        "base": describe_base(net, base),
        "classes": classes,
        "data": {"crop_mode": "center", **data} if data is not None else None,
        "metrics": {key: value if is_finite(value) else None for key, value in (metrics or {}).items()},
        "versions": versions(),
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    record = json.loads(json.dumps(record))  # tuples become lists, as a reader will see them
    try:
        check(record, _SCHEMA, "record")
    except AdapterFileError as e:
        raise ConfigError(f"the model cannot be saved: {e}") from None
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in base_state_dict(net).items()}
    weights = safetensors.torch.save(tensors, {"format": "pt", RECORD: json.dumps(record)})
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for file, content in ((MIRROR, (json.dumps(record, indent=2) + "\n").encode()), (WEIGHTS, weights)):
            stack.enter_context(atomic_path(folder / file, need=len(content))).write_bytes(content)
    return folder


def read_full(directory: str | Path) -> dict[str, Any]:
    """Return the record of a directory that save_full wrote. Raises AdapterFileError."""
    path = Path(directory) / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(RECORD)
        if text is None:
            raise AdapterFileError("no record of visionlora in it; give it to timm as a checkpoint")
        record = parse_object(text.encode(), "record")
        check(record, _SCHEMA, "record")
    except (SafetensorError, OSError, AdapterFileError) as e:
        raise AdapterFileError(f"{path}: {e}") from None
    return record
