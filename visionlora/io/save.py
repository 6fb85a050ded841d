"""Write an adapter to a directory: every file whole or not at all, the weights file complete by itself."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from visionlora.atomic import atomic_path
from visionlora.core.delta import Value
from visionlora.core.digest import tensor_digest
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.io.base import describe_base
from visionlora.io.card import GENERATED, card
from visionlora.io.header import MAX_HEADER, is_key
from visionlora.io.keys import as_stored, file_keys
from visionlora.io.peft_mirror import peft_config
from visionlora.io.plain import as_plain
from visionlora.io.read import CARD, MIRROR, PEFT_CONFIG, WEIGHTS
from visionlora.io.record import FORMAT_VERSION, TEXT, check_agreement, check_record, to_metadata, versions
from visionlora.io.strict import is_finite
from visionlora.plan import Plan
from visionlora.registry import adapted_layers, adapter_plan, adapter_state


def save_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str = "default",
    base: dict[str, Any] | None = None,
    classes: list[str] | None = None,
    data: dict[str, Any] | None = None,
    metrics: dict[str, Any] | None = None,
) -> Path:
    """Write one adapter to a directory, which is made where needed, and return its path.

    `base` tells how the base was built, {"name": timm's name, "tag": ..., "args": ...}; what timm recorded on the model
    is the default. `data` is timm's data config (input_size, mean, std, interpolation, crop_pct), for texts any plain
    data with a task_type. A number that is not finite is stored in `metrics` as null. An adapter already there is
    replaced; if anything fails it stays as it was.
    Raises ConfigError for tensors that are not finite and values that the record cannot hold, OSError for a disk that
    is full or read-only.
    """
    if Path(directory).is_file():
        raise ConfigError(f"{directory} is a file; give the directory that the adapter is to be written to")
    plan, state = as_plain(adapter_plan(model, name), adapter_state(model, name))
    tensors = _stored(plan, state)
    try:
        record = _record(model, name, plan, tensors, base, classes, data, metrics)
        check_record(record)
        check_agreement(record, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
        weights = _serialised(tensors, record)
    except (AdapterFileError, ValueError) as e:
        raise ConfigError(f"the adapter {name!r} cannot be saved: {e}") from None
    mirror, reasons = peft_config(model, plan, record["base"]["name"])
    parameters = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith("/start"))
    _write(Path(directory), weights, mirror, record, card(record, parameters, len(weights), reasons), reasons)
    return Path(directory)


def _stored(plan: Plan, state: dict[str, Tensor]) -> dict[str, Tensor]:
    keys = file_keys(plan, list(state))
    dims = {site.name: len(site.geometry.kernel) for site in plan.sites}
    stored = {
        keys[key]: as_stored(keys[key], tensor, dims.get(key.partition("/")[0], 0)) for key, tensor in state.items()
    }
    for key, tensor in stored.items():
        if not is_key(key):
            raise ConfigError(f"the adapter cannot be saved: {key!r} is no name for a tensor; rename the module")
        if bad := int((~tensor.isfinite()).sum()):  # no reader takes such a file
            raise ConfigError(
                f"the adapter cannot be saved: {bad:,} of {tensor.numel():,} values of {key} are not finite, as after "
                "a diverged training; lower the learning rate. What was saved before is untouched"
            )
    return stored


def _record(
    model: nn.Module,
    name: str,
    plan: Plan,
    tensors: dict[str, Tensor],
    base: dict[str, Any] | None,
    classes: list[str] | None,
    data: dict[str, Any] | None,
    metrics: dict[str, Any] | None,
) -> dict[str, Any]:
    described = describe_base(model, base)
    if _head_start_is_lost(model, name, plan):
        described["head_fingerprint"] = None
    record = {
        "format_version": FORMAT_VERSION,
        "name": name,
        "base": described,
        "plan": plan.to_record(),
        "classes": list(classes) if classes is not None else None,
        "data": data if data is None or TEXT in data else {"crop_mode": "center", **data},
        "metrics": {key: _plain_metric(value) for key, value in (metrics or {}).items()},
        "versions": versions(),
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "tensors": {key: tensor_digest(key, tensor).hex() for key, tensor in tensors.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(record))  # tuples become lists, as a reader will see them
    return plain


def _head_start_is_lost(model: nn.Module, name: str, plan: Plan) -> bool:
    """Tell whether the adapter came from a file onto a base with another head: this base's head is not its start."""
    layers = adapted_layers(model)
    changes = (layers[layer].adapters[name][a] for layer, roles in plan.values.items() for a in roles)  # type: ignore[index]
    return any(isinstance(change, Value) and not change.anchored for change in changes)


def _plain_metric(value: object) -> object:
    if isinstance(value, Tensor):
        value = value.item()
    return None if isinstance(value, float) and not is_finite(value) else value


def _serialised(tensors: dict[str, Tensor], record: dict[str, Any]) -> bytes:
    weights = safetensors.torch.save(tensors, to_metadata(record))
    length = int.from_bytes(weights[:8], "little")
    if length > MAX_HEADER:
        raise AdapterFileError(f"its record has {length} bytes, a reader takes {MAX_HEADER}; adapt fewer layers")
    return weights


def _write(
    folder: Path, weights: bytes, peft: dict[str, Any] | None, record: dict[str, Any], text: str, reasons: list[str]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = None if peft is None else _json(peft)
    seen_by_peft = {"sha256": None if config is None else hashlib.sha256(config).hexdigest(), "reasons": reasons}
    # the stack closes in reverse: everything is on the disk under temporary names before the first file is replaced
    contents = {MIRROR: _json({**record, "peft": seen_by_peft}), PEFT_CONFIG: config, WEIGHTS: weights}
    if _is_ours(folder / CARD):
        contents = {CARD: text.encode(), **contents}
    with ExitStack() as stack:
        for file, content in contents.items():
            if content is not None:
                temporary = stack.enter_context(atomic_path(folder / file, need=len(content)))
                temporary.write_bytes(content)
        if not _same(folder / PEFT_CONFIG, config):
            # a kill between two files must not leave new weights beside an old alpha, which PEFT would not notice
            (folder / PEFT_CONFIG).unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    return not path.exists() or GENERATED in path.read_text(encoding="utf-8", errors="replace")


def _same(path: Path, content: bytes | None) -> bool:
    return content is not None and path.exists() and path.read_bytes() == content


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()
