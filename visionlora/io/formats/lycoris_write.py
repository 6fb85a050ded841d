"""Write an adapter with the tensor names of kohya's tools and of LyCORIS."""

from __future__ import annotations

from collections.abc import Collection, Container

import torch
from torch import Tensor, nn

from visionlora.core.delta import Delta
from visionlora.core.geometry import Geometry, geometry_of
from visionlora.core.norms import is_norm
from visionlora.io.formats.factors import Factors, decompose, dense_change, factors_of, is_smaller
from visionlora.io.formats.names import Layers
from visionlora.io.formats.written import Written, deltas, number, refuse, values
from visionlora.plan import base_tensor
from visionlora.registry import adapter_plan
from visionlora.variants.loha import LoHa
from visionlora.variants.lokr import LoKr
from visionlora.variants.tucker import Tucker

PREFIX = "lycoris"
"""What LyCORIS's own wrapper puts before the names of any model's layers."""

_KINDS = ("linear", "conv1d_hf", "conv")
_FULL = {"weight": "diff", "bias": "diff_b"}
_NORM = {"weight": "w_norm", "bias": "b_norm"}


def lycoris_tensors(model: nn.Module, name: str, *, prefix: str = PREFIX, rank: int | None = None) -> Written:
    """Return the content of a file for an adapter of a model.

    A change that has no names there is written as LoRA where low-rank factors hold it, else in full (`diff`), or with
    `rank` as the nearest factors of at most that rank. Raises ConfigError for what cannot be written at all.
    """
    refuse("a LyCORIS file", _reasons(model, name))
    names, decomposed = Layers(model, prefix), {}  # type: Layers, dict[str, Factors]
    found: dict[str, dict[str, Tensor]] = {}
    for site, delta, weight in deltas(model, name):
        own = _own_names(delta)
        if own is None:
            factors = _factors(delta, weight, rank)
            decomposed |= {site.name: factors} if factors is not None and factors.norm else {}
            own = {"diff": _full(delta, weight)} if factors is None else _lora(delta.geometry, factors)
        found[site.name] = own
    notes = _notes(model, name, found)
    for layer, attribute, value, base in values(model, name):
        leaf = _leaves(model.get_submodule(layer))[attribute]
        found.setdefault(layer, {})[leaf] = (value.double() - base.double()).to(value.dtype)
    for layer, own in found.items():
        own |= _missing_weight(model.get_submodule(layer), own)
    tensors = {f"{names.write(layer)}.{leaf}": t for layer, own in found.items() for leaf, t in own.items()}
    return Written({k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, {}, decomposed, notes)


def _reasons(model: nn.Module, name: str) -> list[str]:
    sites = adapter_plan(model, name).sites
    reasons = [f"{s.name} is no Linear and no convolution" for s in sites if s.geometry.kind not in _KINDS]
    for layer, attribute, value, base in values(model, name):
        if attribute not in _leaves(model.get_submodule(layer)):
            reasons.append(f"the {attribute} of {layer or 'the model'} has no name in it")
        elif value.shape != base.shape:
            reasons.append(f"{layer} has the shape {tuple(value.shape)}, in the base {tuple(base.shape)}")
    return reasons


def _notes(model: nn.Module, name: str, changed: Container[str]) -> list[str]:
    """Return what LyCORIS's own loader does not do, where ComfyUI and we do."""
    owned = adapter_plan(model, name).values
    beside = [layer for layer in owned if layer in changed]
    batch = [layer for layer in owned if isinstance(model.get_submodule(layer), nn.modules.batchnorm._BatchNorm)]
    notes = []
    if beside:
        notes.append(f"{len(beside)} biases lie beside a change of rank (diff_b); LyCORIS's own loader leaves them out")
    if batch:
        notes.append(f"{len(batch)} BatchNorm layers are written (w_norm); LyCORIS's own loader has none")
    return notes


def _leaves(module: nn.Module) -> dict[str, str]:
    """Return the names that whole differences of a layer's tensors have."""
    if is_norm(module):
        return _NORM
    geometry = geometry_of(module)
    return _FULL if geometry is not None and geometry.kind in _KINDS else {}


def _missing_weight(module: nn.Module, own: Collection[str]) -> dict[str, Tensor]:
    """Return a difference of nothing where a bias is alone: readers look for it only beside a weight's."""
    weight, leaves = base_tensor(module, "weight"), _leaves(module)
    alone = set(own) == {leaves.get("bias")}
    return {leaves["weight"]: torch.zeros_like(weight, dtype=torch.float32)} if alone and weight is not None else {}


def _own_names(delta: Delta) -> dict[str, Tensor] | None:
    """Return the tensors of a change that LyCORIS has names for, or None."""
    if isinstance(delta, LoHa):
        factors = {f"hada_{leaf}": getattr(delta, leaf) for leaf in ("w1_a", "w1_b", "w2_a", "w2_b")}
        return {**factors, "alpha": number(delta.scale * delta.rank)}
    if isinstance(delta, LoKr):
        return _lokr(delta)
    if isinstance(delta, Tucker) and delta.geometry.groups == 1:
        factors = {"lora_down.weight": delta.A, "lora_mid.weight": delta.M, "lora_up.weight": delta.B}
        return {**factors, "alpha": number(delta.scale * delta.rank)}
    return None


def _lokr(delta: LoKr) -> dict[str, Tensor]:
    if delta.w2 is None and delta.rank < max(delta.block[:2]) / 2:
        low_rank = {"lokr_w2_a": delta.w2_a, "lokr_w2_b": delta.w2_b}
        return {"lokr_w1": delta.w1, **low_rank, "alpha": number(delta.scale * delta.rank)}
    # from that rank on LyCORIS expects the matrix in full, and without low-rank factors it takes the scale to be 1
    w2 = delta.w2 if delta.w2 is not None else (delta.w2_a.double() @ delta.w2_b.double()).float().view(delta.block)
    return {"lokr_w1": delta.scale * delta.w1, "lokr_w2": w2, "alpha": number(1.0)}


def _factors(delta: Delta, weight: Tensor, rank: int | None) -> Factors | None:
    """Return the change in factors, or None where they would be larger than the weight and no rank is given."""
    factors = factors_of(delta, weight)
    if not factors.norm or is_smaller(delta.geometry, factors):
        return factors
    return None if rank is None else decompose(delta.geometry, dense_change(delta, weight), rank)


def _full(delta: Delta, weight: Tensor) -> Tensor:
    return delta.geometry.stored(dense_change(delta, weight)).float()


def _lora(geo: Geometry, factors: Factors) -> dict[str, Tensor]:
    B, r, groups = factors.B, factors.rank, geo.groups
    if groups > 1:
        # these files share one pair between the groups: each group gets columns of its own, zero in the others
        up = B.new_zeros(groups, geo.out // groups, groups, r)
        up[torch.arange(groups), :, torch.arange(groups)] = B.view(groups, -1, r)
        B = up.view(geo.out, groups * r, *[1] * len(geo.kernel))
    own = {"lora_down.weight": factors.A, "lora_up.weight": B, "alpha": number(factors.scale * B.shape[1])}
    return own if factors.m is None else {**own, "dora_scale": factors.m.view(-1, *[1] * (B.ndim - 1))}
