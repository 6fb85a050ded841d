"""What a model remembers of its adapters, and how to ask it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from visionlora.config import check_adapter_name, did_you_mean
from visionlora.core.attach import Adapted, own_modules, whole
from visionlora.core.delta import Delta
from visionlora.errors import StateError
from visionlora.plan import Plan

_RESERVED = frozenset(dir(nn.ModuleDict())) | {"base"}


@dataclass
class Registry:
    """What a model remembers of its adapters: kept on the model, so that deepcopy and pickle carry it along."""

    grads: dict[str, bool]
    """requires_grad of every base parameter before the first adapter."""
    plans: dict[str, Plan] = field(default_factory=dict)
    trainable: dict[str, bool] = field(default_factory=dict)
    active: dict[str, float] = field(default_factory=dict)
    merged: list[Any] | None = None
    """What unmerge puts back; None while nothing is merged."""
    original: dict[str, Any] = field(default_factory=dict)
    """Type and fingerprints of the base before a run cast it (`io.base.remember_base`); empty where nobody told."""
    routed: bool = False
    """A batch is being routed: nothing may change before its with block ends."""


def registry_of(model: nn.Module) -> Registry:
    """Return the model's adapter registry. Raises StateError: there is none, it is merged, a batch is being routed."""
    registry: Registry | None = model.__dict__.get("_visionlora")
    if registry is None:
        inside = [n for n, m in model.named_modules() if "_visionlora" in m.__dict__]
        hint = f"; pass the model inside it: .{inside[0]}" if inside else "; call apply_lora or load_adapter first"
        raise StateError(f"{type(model).__name__} has no adapters{hint}")
    if registry.merged is not None:
        raise StateError("the adapters are merged into the weights; call unmerge first")
    if registry.routed:
        raise StateError("a batch is being routed; leave the with block of route first")
    return registry


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of the attached adapters."""
    registry: Registry | None = model.__dict__.get("_visionlora")
    return list(registry.plans) if registry else []


def active_adapters(model: nn.Module) -> dict[str, float]:
    """Return the strength of every active adapter by name."""
    if not isinstance(model, nn.Module):
        raise StateError(f"expected a model, got {model!r} (load_adapter returns the name, not the model)")
    return dict(registry_of(model).active)


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """Return the layers that carry adapters, by name: the one definition of what an adapter parameter is."""
    return {name: layer for name, layer in own_modules(model).items() if isinstance(layer, Adapted)}


def adapter_parameters(model: nn.Module, name: str) -> dict[str, dict[str, nn.Parameter]]:
    """Return the parameters of an adapter by group ("A", "B", "m", "head", "saved", "norm", "bias") and full name."""
    plan = registry_of(model).plans[check_known_name(model, name)]
    groups: dict[str, dict[str, nn.Parameter]] = {}
    for layer_name, layer in adapted_layers(model).items():
        for attribute, change in _changes(layer, name):
            for tensor_name, parameter in change.named_parameters():
                leaf = tensor_name.rpartition(".")[2]
                group = leaf if isinstance(change, Delta) else plan.values[layer_name][attribute]
                full = f"{layer_name}.adapters.{name}.{attribute}.{tensor_name}".removeprefix(".")
                groups.setdefault(group, {})[full] = parameter
    return groups


def adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return all that makes an adapter differ from the base, as {"layer/attribute/tensor": tensor}.

    On a model sharded by FSDP2 the tensors are gathered, and every process must make the call.
    """
    _check_whole(model, name)
    return {
        f"{layer_name}/{attribute}/{tensor_name}": whole(tensor.detach())
        for layer_name, layer in adapted_layers(model).items()
        for attribute, change in _changes(layer, name)
        for tensor_name, tensor in change.state_dict().items()
    }


def adapter_plan(model: nn.Module, name: str) -> Plan:
    """Return the structure of an adapter."""
    return registry_of(model).plans[check_known_name(model, name)]


def check_known_name(model: nn.Module, name: str) -> str:
    """Return the name of an attached adapter."""
    known = list(registry_of(model).plans)
    if name not in known:
        raise StateError(
            f"no adapter {name!r} on this model{did_you_mean(str(name), known)}; it has {', '.join(known)}"
        )
    return name


def check_new_name(model: nn.Module, name: str) -> str:
    """Return a name that is well formed and free."""
    if check_adapter_name(name) in _RESERVED:
        raise StateError(f"the adapter name {name!r} is reserved; choose another")
    registry: Registry | None = model.__dict__.get("_visionlora")
    if registry is not None:
        registry_of(model)
    if registry is not None and name in registry.plans:
        raise StateError(f"an adapter {name!r} is already attached; remove it first or choose another name")
    return name


def _changes(layer: Adapted, name: str) -> list[tuple[str, Any]]:
    return list(layer.adapters[name].items()) if name in layer.adapters else []  # type: ignore[operator]


def _check_whole(model: nn.Module, name: str) -> None:
    layers, plan = adapted_layers(model), adapter_plan(model, name)
    wanted = dict.fromkeys((*(site.layer for site in plan.sites), *plan.values))
    gone = [layer for layer in wanted if layer not in layers or name not in layers[layer].adapters]
    if gone:
        raise StateError(
            f"{len(gone)} adapted layers are gone ({', '.join(gone[:3])}): the model was fused or rebuilt after the "
            "adapter was put on; call merge first, then fuse"
        )
