"""Adapters whose layers have names of an older transformers: version 5 renamed those of many models."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from visionlora.adapt import activate, attach_plan
from visionlora.core.attach import own_modules
from visionlora.errors import BaseMismatchError, ConfigError, TargetError
from visionlora.io import read_adapter
from visionlora.io.record import plain_config
from visionlora.plan import Plan
from visionlora.registry import adapter_names, check_new_name
from visionlora.targets import head_layers
from visionlora.text.extras import need

__all__ = ["load_older_adapter"]


def load_older_adapter(
    model: nn.Module, directory: str | Path, *, name: str | None = None, trainable: bool = False
) -> str:
    """Change the model in place: attach an adapter made for an older transformers, return its name.

    Its layers get the names that transformers itself gives to the weights of that time; the base cannot be compared.
    It becomes active if it is the model's only adapter. Raises BaseMismatchError, the model untouched, where a layer
    has no place in the model even so.
    """
    file = read_adapter(directory)
    name = check_new_name(model, file.record["name"] if name is None else name)
    recorded = file.record["plan"]
    names = _new_names(model, (*recorded["layers"], *recorded["values"]))
    heads = head_layers(model)
    plan: dict[str, Any] = {
        "config": plain_config(
            {**recorded["config"], "target_modules": [names[n] for n in recorded["layers"]] or "none"}
        ),
        "layers": {names[n]: entry for n, entry in recorded["layers"].items()},
        "values": {
            names[n]: dict.fromkeys(roles, "head") if names[n] in heads else roles
            for n, roles in recorded["values"].items()
        },
    }
    tensors = {f"{names[n]}/{rest}": t for key, t in file.tensors.items() for n, _, rest in [key.partition("/")]}
    try:
        attach_plan(model, Plan.from_record(model, plan), tensors, name=name, trainable=trainable)
    except TargetError as e:
        raise BaseMismatchError(f"{file.path}: {e}") from None
    if adapter_names(model) == [name]:
        activate(model, name)
    return name


def _new_names(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Return {name in the file: name in the model}."""
    need("transformers")
    try:  # not public: how from_pretrained reads weights of an older version
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:
        raise ConfigError(
            "this version of transformers does not tell how layers were renamed; install transformers 5.3 or later"
        ) from None
    rules = [rule for rule in get_model_conversion_mapping(model) if isinstance(rule, WeightRenaming)]
    modules, state = own_modules(model), model.state_dict()
    found = {}
    for layer in layers:
        key = (
            layer
            if layer in modules
            else rename_source_key(f"{layer}.weight", rules, [], model.base_model_prefix, state)[0].removesuffix(
                ".weight"
            )
        )
        if key not in modules:
            raise BaseMismatchError(f"{type(model).__name__} has no layer {layer!r}, under a newer name neither")
        found[layer] = key
    return found
