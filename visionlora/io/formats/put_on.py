"""From what another library's file says of a model's layers to one of our adapters on it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn

from visionlora.adapt import activate, attach_plan
from visionlora.config import Bias, LoraConfig
from visionlora.core.geometry import Geometry
from visionlora.errors import AdapterFileError
from visionlora.io.formats.change import DENSE, Imported, LayerChange
from visionlora.io.formats.factors import Factors, decompose, factors_of, is_smaller, product, row_norm
from visionlora.io.formats.layer import base_weight, delta_of, dense_of, layer_geometry, own_value
from visionlora.io.formats.lokr import common_factor, promoted
from visionlora.io.strict import wrong
from visionlora.plan import Plan, Role
from visionlora.targets import Site, head_layers


def put_on(model: nn.Module, found: Imported, *, name: str = "default", rank: int | None = None) -> dict[str, Factors]:
    """Change the model in place: attach and activate what was read; return what had to be decomposed, by layer.

    An adapter has one variant. Layers of several become LoRA or DoRA, exactly; only a change that no variant holds
    needs `rank`, the largest that its nearest factors may have. Raises AdapterFileError, the model untouched.
    """
    geometries = {layer: layer_geometry(model, layer) for layer in found.layers}
    _check_values(model, found)
    with torch.random.fork_rng(devices=[]):  # fresh changes draw numbers that are overwritten
        settled, extra, decomposed = _settled(model, found.layers, geometries, rank)
        roles = _roles(model, found)
        config = _config(settled, extra, any("bias" in own.values() for own in roles.values()))
        settled = {n: settled[n] for n, _ in model.named_modules() if n in settled}
        sites = [Site(n, geometries[n], c.rank, c.scale, parts=c.parts) for n, c in settled.items()]
        tensors = {f"{n}/weight/{key}": t for n, c in settled.items() for key, t in c.tensors.items()}
        tensors |= {f"{n}/{a}/value": t for n, own in found.values.items() for a, t in own.items()}
        plan = Plan(config, tuple(sites), roles)
        attach_plan(model, plan, tensors, name=name)
    activate(model, name)
    return decomposed


def _check_values(model: nn.Module, found: Imported) -> None:
    for layer, own in found.values.items():
        for attribute, value in own.items():
            base = own_value(model, layer, attribute)
            if base.shape != value.shape:
                hint = "; build it with --num_classes" if layer in head_layers(model) else ""
                raise wrong(
                    f"{layer}.{attribute}", f"the shape {tuple(base.shape)} of this model{hint}", tuple(value.shape)
                )
    if not found.layers and not found.values:
        raise AdapterFileError("the file changes nothing")


def _settled(
    model: nn.Module, layers: dict[str, LayerChange], geometries: dict[str, Geometry], rank: int | None
) -> tuple[dict[str, LayerChange], int, dict[str, Factors]]:
    """Return the layers in one variant, LoKr's factor, and what was decomposed for it."""
    variants = {c.variant if "m" not in c.tensors else "dora" for c in layers.values()}
    pure = len(variants) == 1 and all(c.variant in variants for c in layers.values())
    if pure and variants == {"lokr"}:
        factor = common_factor(layers, geometries)
        if factor is not None:
            return {n: promoted(c, geometries[n]) for n, c in layers.items()}, factor, {}
    elif pure and DENSE not in variants:
        return layers, -1, {}
    factors = {n: _factors(n, c, geometries[n], base_weight(model, n), rank) for n, c in layers.items()}
    if "dora" in variants:
        factors = {n: _with_length(f, geometries[n], base_weight(model, n)) for n, f in factors.items()}
    settled = {n: _from_factors(f) for n, f in factors.items()}
    return settled, -1, {n: f for n, f in factors.items() if f.norm}


def _factors(name: str, change: LayerChange, geometry: Geometry, weight: Tensor, rank: int | None) -> Factors:
    if change.variant not in (DENSE, "lokr"):
        return replace(factors_of(delta_of(change, geometry, weight), weight), m=change.tensors.get("m"))
    found = decompose(geometry, dense_of(change, geometry, weight), rank if change.variant == DENSE else None)
    if change.variant == DENSE and rank is None and not is_smaller(geometry, found):
        raise AdapterFileError(
            f"{name}: none of our variants holds its change, whose rank is {found.rank}: factors would be larger than "
            "the weight itself. Pass --approximate RANK to keep the nearest factors of that rank"
        )
    return replace(found, m=change.tensors.get("m"))


def _with_length(factors: Factors, geometry: Geometry, weight: Tensor) -> Factors:
    if factors.m is not None:
        return factors
    # DoRA at the very length that the changed rows have anyway: the change as it is
    m = row_norm(weight.double() + product(geometry, factors)).float()
    return replace(factors, m=m)


def _from_factors(factors: Factors) -> LayerChange:
    tensors = {"A": factors.A, "B": factors.B} | ({} if factors.m is None else {"m": factors.m})
    return LayerChange("lora" if factors.m is None else "dora", factors.rank, factors.scale, tensors)


def _config(settled: dict[str, LayerChange], decompose_factor: int, biased: bool) -> LoraConfig:
    bias: Bias = "all" if biased else "none"
    if not settled:
        return LoraConfig(target_modules="none", norm="frozen", bias=bias)
    first = next(iter(settled.values()))
    r = Counter(change.rank for change in settled.values()).most_common(1)[0][0]
    scale = Counter(change.scale for change in settled.values()).most_common(1)[0][0]
    return LoraConfig(
        r=r,
        lora_alpha=r * scale,
        target_modules=list(settled),
        variant=first.variant,  # type: ignore[arg-type]
        decompose_factor=decompose_factor,
        norm="frozen",
        bias=bias,
    )


def _roles(model: nn.Module, found: Imported) -> dict[str, dict[str, Role]]:
    heads = head_layers(model)
    roles: dict[str, dict[str, Role]] = {}
    for layer, own in found.values.items():
        for attribute in own:
            bias = attribute == "bias" and "weight" not in own
            roles.setdefault(layer, {})[attribute] = "head" if layer in heads else "bias" if bias else "saved"
    return roles
