"""What one adapter consists of on one model: layers with their ranks and scales, and the tensors it owns in full."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig, did_you_mean
from visionlora.core.attach import Adapted, Branched, Materialised, own_class, own_modules
from visionlora.core.delta import Change, Delta, Parts, Value
from visionlora.core.geometry import Geometry, bare_geometry, geometry_of
from visionlora.core.norms import FrozenNorm, batch_norms, is_norm, norm_values
from visionlora.core.quantised import dequantised, is_quantised, is_readable
from visionlora.core.relu import PackedReLU, packable
from visionlora.errors import TargetError
from visionlora.targets import Site, head_layers, owner_reads_weight, select
from visionlora.variants import VARIANTS

Role = Literal["head", "norm", "bias", "saved"]
Changes = dict[str, dict[str, Change]]
"""Layer name -> attribute -> change."""

_SMALL_HEAD = 1 << 16  # elements; a head this small keeps its start in the adapter, so that strength needs no base head


@dataclass(frozen=True)
class Plan:
    """The structure of an adapter, without its numbers."""

    config: LoraConfig
    sites: tuple[Site, ...]
    values: dict[str, dict[str, Role]]
    """Layer name -> attribute -> why the adapter owns this tensor."""

    def to_record(self) -> dict[str, Any]:
        """Return plain data that from_record reads back on the same kind of model."""
        layers = {
            s.name: {
                "attribute": s.attribute,
                "rank": s.rank,
                "scale": s.scale,
                "parts": {k: list(v) for k, v in s.parts.items()},
            }
            for s in self.sites
        }
        return {
            "config": self.config.to_dict(),
            "layers": layers,
            "values": {n: dict(v) for n, v in self.values.items()},
        }

    @classmethod
    def from_record(cls, model: nn.Module, record: dict[str, Any]) -> Plan:
        """Return the plan a record describes. Raises TargetError for a layer or tensor the model does not have."""
        config = LoraConfig.from_dict(record["config"])
        layers = own_modules(model)
        for name in (*(_owner(n, entry) for n, entry in record["layers"].items()), *record["values"]):
            if name not in layers:
                near = did_you_mean(name, list(layers))
                raise TargetError(f"{own_class(model).__name__} has no layer {name!r}{near}")
        sites = tuple(_recorded_site(n, layers[_owner(n, entry)], entry) for n, entry in record["layers"].items())
        for name, attributes in record["values"].items():
            for attribute in attributes:
                if base_tensor(layers[name], attribute) is None:
                    raise TargetError(f"layer {name!r} of {own_class(model).__name__} has no {attribute!r}")
        return cls(config, sites, {n: dict(v) for n, v in record["values"].items()})


def make_plan(model: nn.Module, config: LoraConfig) -> Plan:
    """Return what the config means on this model."""
    scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
    if scripted:
        raise TargetError(
            f"{scripted[0] or 'the model'} is compiled by torch.jit and cannot change; adapt, then compile"
        )
    sites = tuple(select(model, config))
    targeted = {site.layer for site in sites if site.attribute == "weight"}
    values = _saved(model, config)
    for name in _head(model, config):
        values[name] = dict.fromkeys(_own(model.get_submodule(name)), "head")
    taken = {(site.layer, site.attribute) for site in sites}
    values = {
        name: {a: role for a, role in attributes.items() if (name, a) not in taken}
        for name, attributes in values.items()
        if name not in targeted
    }
    for name, layer in own_modules(model).items():
        attributes = dict.fromkeys(norm_values(layer, config.norm), "norm") if is_norm(layer) else {}
        if config.bias == "all" or (config.bias == "lora_only" and name in targeted):
            attributes |= {"bias": "bias"} if layer._parameters.get("bias") is not None else {}
        if attributes:
            values[name] = {**attributes, **values.get(name, {})}  # type: ignore[dict-item]
    _check_norm(model, config)
    plan = Plan(config, sites, values)
    if not sites and not values:
        raise TargetError("this config trains nothing: no layer, no head, no normalisation; set target_modules or norm")
    return plan


def build(model: nn.Module, plan: Plan) -> Changes:
    """Return fresh changes for every planned tensor, and an empty entry for a layer that is only held still.

    A BatchNorm keeps its statistics, a frozen convolution need not keep its input, a quantised layer not its numbers,
    nor a ReLU its output where A is frozen.
    """
    still = (*batch_norms(model), *_frozen_convs(model), *quantised_layers(model), *_relus(model, plan))
    changes: Changes = {name: {} for name in still}
    for site in plan.sites:
        weight = base_tensor(model.get_submodule(site.layer), site.attribute)
        assert weight is not None
        weight = dequantised(weight) if is_quantised(weight) else weight.detach()
        changes.setdefault(site.layer, {})[site.attribute] = build_delta(
            site, site.geometry.canonical(weight), plan.config
        )
    for name, attributes in plan.values.items():
        layer = model.get_submodule(name)
        for attribute, role in attributes.items():
            changes.setdefault(name, {})[attribute] = _value(layer, attribute, role)
    return changes


def mixin_of(model: nn.Module, name: str) -> type[Adapted]:
    """Return how a layer can be adapted."""
    owner_name, _, leaf = name.rpartition(".")
    layer, owner = model.get_submodule(name), model.get_submodule(owner_name)
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return FrozenNorm
    if packable(layer):
        return PackedReLU
    geometry = geometry_of(layer)
    return Branched if geometry is not None and geometry.known and not owner_reads_weight(owner, leaf) else Materialised


def quantised_layers(model: nn.Module) -> list[str]:
    """Return the Linear layers whose weight is stored in fewer bits and can be read."""
    return [name for name, layer in own_modules(model).items() if is_readable(layer)]


def base_tensor(layer: nn.Module, attribute: str) -> Tensor | None:
    """Return the stored tensor of a layer, adapted or not."""
    found = layer._parameters.get(attribute)
    return layer._buffers.get(attribute) if found is None else found


def build_delta(site: Site, weight: Tensor, config: LoraConfig) -> Delta:
    """Return a fresh change of a weight seen as (out, in, *kernel)."""
    geometry, variant = site.geometry, VARIANTS[config.variant]
    if not site.parts:
        return variant(geometry, weight, site.rank, site.scale, config)
    rows = {part: (a, geometry.rows(b - a)) for part, (a, b) in site.parts.items()}
    return Parts(
        geometry,
        {p: (a, variant(geo, weight[a : a + geo.out], site.rank, site.scale, config)) for p, (a, geo) in rows.items()},
    )


def _frozen_convs(model: nn.Module) -> list[str]:
    convs = [name for name, layer in own_modules(model).items() if isinstance(layer, nn.modules.conv._ConvNd)]
    return [name for name in convs if mixin_of(model, name) is Branched]


def _relus(model: nn.Module, plan: Plan) -> list[str]:
    if VARIANTS[plan.config.variant].keeps_input:  # the layers behind a ReLU keep its output anyway
        return []
    return [name for name, layer in own_modules(model).items() if packable(layer)]


def _value(layer: nn.Module, attribute: str, role: Role) -> Value:
    base = base_tensor(layer, attribute)
    assert base is not None
    small_head = role == "head" and base.numel() <= _SMALL_HEAD
    value = base.detach().float() if role == "head" and base.is_floating_point() and base.itemsize < 4 else base
    trainable = attribute in layer._parameters
    start = value if small_head else None
    return Value(value, trainable=trainable, start=start, additive=trainable and role != "head")


def _recorded_site(name: str, layer: nn.Module, entry: dict[str, Any]) -> Site:
    geometry = geometry_of(layer) if entry["attribute"] == "weight" else _bare(layer, entry["attribute"])
    if geometry is None:
        raise TargetError(f"{name!r} of a {own_class(layer).__name__} is no weight we can adapt")
    parts = {part: (int(rows[0]), int(rows[1])) for part, rows in entry["parts"].items()}
    if any(not 0 <= a < b <= geometry.out for a, b in parts.values()):
        raise TargetError(f"the parts {parts} of layer {name!r} lie outside its {geometry.out} rows")
    return Site(name, geometry, int(entry["rank"]), float(entry["scale"]), parts)


def _owner(name: str, entry: dict[str, Any]) -> str:
    return name if entry["attribute"] == "weight" else name.rpartition(".")[0]


def _bare(layer: nn.Module, attribute: str) -> Geometry | None:
    parameter = layer._parameters.get(attribute)
    return None if parameter is None else bare_geometry(parameter)


def _own(layer: nn.Module) -> list[str]:
    return [attribute for attribute, parameter in layer._parameters.items() if parameter is not None]


def _head(model: nn.Module, config: LoraConfig) -> list[str]:
    return [] if config.modules_to_save == "none" else head_layers(model)


def _saved(model: nn.Module, config: LoraConfig) -> dict[str, dict[str, Role]]:
    if isinstance(config.modules_to_save, str):
        return {}
    values: dict[str, dict[str, Role]] = {}
    modules = own_modules(model)
    names = [n for n in modules if n]
    parameters = [f"{n}.{a}".removeprefix(".") for n, m in modules.items() for a in _own(m)]
    for entry in config.modules_to_save:
        hits = [n for n in names if n == entry or n.endswith(f".{entry}")]
        for name in _leaves(modules, hits):
            values[name] = dict.fromkeys(_own(model.get_submodule(name)), "saved")
        bare = [] if hits else [n for n in parameters if n == entry or n.endswith(f".{entry}")]
        for path in bare:
            owner, _, attribute = path.rpartition(".")
            values.setdefault(owner, {})[attribute] = "saved"
        if not hits and not bare:
            near = did_you_mean(entry, names + parameters)
            raise TargetError(f'modules_to_save: no module or parameter matches "{entry}"{near}')
    return values


def _leaves(modules: dict[str, nn.Module], owners: Iterable[str]) -> list[str]:
    return [n for owner in owners for n, m in modules.items() if f"{n}.".startswith(f"{owner}.") and _own(m)]


def _check_norm(model: nn.Module, config: LoraConfig) -> None:
    if config.norm == "stats" and not batch_norms(model):
        raise TargetError(
            f'norm="stats" re-estimates BatchNorm statistics and {own_class(model).__name__} has no BatchNorm; '
            'use norm="frozen", or norm="affine" to train scale and shift of its other norms'
        )
