"""Put an adapter from a file on a model: all of it or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionlora.adapt import activate, attach_plan
from visionlora.core.attach import cuda_devices
from visionlora.core.delta import Value
from visionlora.errors import AdapterFileError, BaseMismatchError, TargetError
from visionlora.io.base import check_base, tell_quantised
from visionlora.io.read import AdapterFile, read_adapter
from visionlora.io.record import plain_config
from visionlora.merging import head_fingerprint
from visionlora.plan import Plan, base_tensor, build_delta
from visionlora.registry import adapted_layers, adapter_names, check_new_name
from visionlora.targets import Site, head_layers


def load_adapter(
    model: nn.Module,
    directory: str | Path,
    *,
    name: str | None = None,
    trainable: bool = False,
    allow_other_base: bool = False,
    allow_other_classes: bool = False,
    with_head: bool = True,
) -> str:
    """Change the model in place: attach the adapter of a directory and return its name, by default the recorded one.

    It becomes active if it is the model's only adapter. `with_head=False` leaves the adapter's classifier head aside
    and keeps the model's own. Raises, the model untouched: AdapterFileError for a file that is not sound,
    BaseMismatchError for an adapter of another base or with other classes, StateError for a name that is taken.
    """
    file = read_adapter(directory)
    name = check_new_name(model, file.record["name"] if name is None else name)
    try:
        if not allow_other_base:
            check_base(model, file.record["base"])
        plan_record, tensors = _wanted(model, file, with_head)
        plan = Plan.from_record(model, plan_record)
        _check_fit(model, plan, file)
        if with_head:
            _check_head(model, plan, file, allow_other_base, allow_other_classes)
        with torch.random.fork_rng(devices=cuda_devices(model)):  # fresh changes draw numbers that are overwritten
            attach_plan(model, plan, tensors, name=name, trainable=trainable)
    except (BaseMismatchError, TargetError) as e:
        raise BaseMismatchError(f"{file.path}: {e}") from None
    except AdapterFileError as e:
        raise AdapterFileError(f"{file.path}: {e}") from None
    if head_fingerprint(model) != file.record["base"]["head_fingerprint"]:
        _unanchor(model, name, plan)
    if adapter_names(model) == [name]:
        activate(model, name)
    tell_quantised(model, file.record["base"])
    return name


def _wanted(model: nn.Module, file: AdapterFile, with_head: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the plan and the tensors to attach."""
    recorded, heads = file.record["plan"], set(head_layers(model))
    values = {
        layer: {a: "head" if role == "saved" and layer in heads else role for a, role in roles.items()}
        for layer, roles in recorded["values"].items()
    }
    owned = {layer for layer, roles in values.items() if "head" in roles.values()}
    if with_head and owned - heads:
        raise BaseMismatchError(
            f"the adapter brings the classifier head {', '.join(sorted(owned - heads))}; {type(model).__name__} has "
            f"{', '.join(sorted(heads)) or 'none'}. Build it with {_count(file)} classes, or pass with_head=False"
        )
    dropped = set() if with_head else owned | heads
    plan = {
        "config": plain_config(recorded["config"]),
        "layers": {layer: entry for layer, entry in recorded["layers"].items() if layer not in dropped},
        "values": {layer: roles for layer, roles in values.items() if layer not in dropped},
    }
    return plan, {key: t for key, t in file.tensors.items() if key.partition("/")[0] not in dropped}


def _check_fit(model: nn.Module, plan: Plan, file: AdapterFile) -> None:
    """Raise BaseMismatchError where a tensor does not fit its layer, before anything is allocated for it."""
    for site in plan.sites:
        for key, shape in _site_shapes(site, plan).items():
            _check_shape(key, shape, file)
    for layer, roles in plan.values.items():
        for attribute, role in roles.items():
            base = base_tensor(model.get_submodule(layer), attribute)
            assert base is not None
            key = f"{layer}/{attribute}/value"
            rows = file.tensors[key].shape[:1] if role == "head" else base.shape[:1]
            _check_shape(key, (*rows, *base.shape[1:]), file)


def _site_shapes(site: Site, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a change's tensors, from the variant itself built without memory."""
    delta = build_delta(site, torch.empty(site.geometry.shape, device="meta"), plan.config)
    return {f"{site.layer}/{site.attribute}/{key}": tuple(t.shape) for key, t in delta.state_dict().items()}


def _check_shape(key: str, expected: tuple[int, ...], file: AdapterFile) -> None:
    found = tuple(file.tensors[key].shape) if key in file.tensors else "none"
    if found != expected:
        raise BaseMismatchError(
            f"{key}: this model needs the shape {expected}, the file has {found}; it is another model"
        )


def _check_head(model: nn.Module, plan: Plan, file: AdapterFile, other_base: bool, other_classes: bool) -> None:
    owned = [layer for layer, roles in plan.values.items() if roles.get("weight") == "head"]
    recorded = file.record["base"]["head_fingerprint"]
    if not owned and not other_base and recorded not in (None, head_fingerprint(model)):
        raise BaseMismatchError(
            "the adapter has no classifier head of its own and was trained with another head than this model's; load "
            "the head first, or pass with_head=False to use it with this one"
        )
    for layer in owned if not other_classes else ():
        rows, base = file.tensors[f"{layer}/weight/value"].shape[0], base_tensor(model.get_submodule(layer), "weight")
        if base is not None and base.shape[0] != rows:
            raise BaseMismatchError(
                f"the adapter knows {rows} classes{_listed(file.record['classes'])}, the head {layer!r} of this model "
                f"{base.shape[0]}. Build the model with num_classes={rows}, pass allow_other_classes=True to get the "
                "outputs of the adapter while it is active, or with_head=False to keep the head of the model"
            )


def _count(file: AdapterFile) -> int | str:
    heads = [layer for layer, roles in file.record["plan"]["values"].items() if roles.get("weight") == "head"]
    return file.tensors[f"{heads[-1]}/weight/value"].shape[0] if heads else "the same"


def _listed(names: list[str] | None) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:10])}" + (f" and {len(names) - 10} more)" if len(names) > 10 else ")")


def _unanchor(model: nn.Module, name: str, plan: Plan) -> None:
    layers = adapted_layers(model)
    for layer, roles in plan.values.items():
        for attribute in (a for a, role in roles.items() if role == "head"):
            change = layers[layer].adapters[name][attribute]  # type: ignore[index]
            if isinstance(change, Value) and change.start is None:
                change.anchored = False
