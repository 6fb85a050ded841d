"""The tensors that LyCORIS keeps of one layer, as a change of ours: every size checked, Tucker cores multiplied out."""

from __future__ import annotations

import torch
from torch import Tensor

from visionlora.core.geometry import Geometry
from visionlora.errors import AdapterFileError
from visionlora.io.formats.change import DENSE, LayerChange
from visionlora.io.formats.layer import dense_of
from visionlora.io.strict import wrong


class Leaves:
    """The tensors of one layer, each checked as it is taken."""

    def __init__(self, layer: str, own: dict[str, Tensor]) -> None:
        self.layer, self.own = layer, own

    def __contains__(self, leaf: str) -> bool:
        return leaf in self.own

    def take(self, leaf: str, *shape: int) -> Tensor:
        """Return a tensor of a shape; -1 is any size, and sizes of 1 at the end may be missing or too many."""
        if leaf not in self.own:
            raise AdapterFileError(f"{self.layer}: {leaf} is missing beside {', '.join(self.own)}")
        found = self.own[leaf]
        own = list(found.shape)
        while len(own) > len(shape) and own[-1] == 1:
            own.pop()
        own += [1] * (len(shape) - len(own))
        if len(own) != len(shape) or any(n not in (-1, o) for n, o in zip(shape, own, strict=True)):
            expected = ", ".join("any" if n == -1 else str(n) for n in shape)
            raise wrong(f"{self.layer}.{leaf}", f"the shape ({expected}) for this layer", tuple(found.shape))
        return found.to(torch.promote_types(found.dtype, torch.float32)).reshape(own)

    def number(self, leaf: str, default: float) -> float:
        """Return a tensor of one number."""
        found = self.own.get(leaf)
        if found is not None and found.numel() != 1:
            raise wrong(f"{self.layer}.{leaf}", "one number", tuple(found.shape))
        return default if found is None else float(found)

    def scale(self, rank: int) -> float:
        """Return alpha / rank; a file without alpha means 1."""
        alpha = self.number("alpha", float(rank))
        if alpha <= 0:
            raise wrong(f"{self.layer}.alpha", "a number above 0", alpha)
        return alpha / rank


def lora(geo: Geometry, leaves: Leaves) -> LayerChange:
    """Return LoRA, or with a lora_mid Tucker; in a grouped convolution these files share one pair between groups."""
    ones = [1] * len(geo.kernel)
    if "lora_mid.weight" in leaves:
        A = leaves.take("lora_down.weight", -1, geo.in_, *ones)
        M = leaves.take("lora_mid.weight", len(A), len(A), *geo.kernel)
        B = leaves.take("lora_up.weight", geo.out, len(A), *ones)
        many = [geo.groups, *[1] * (A.ndim - 1)]
        return LayerChange("tucker", len(A), leaves.scale(len(A)), {"A": A.repeat(many), "M": M.repeat(many), "B": B})
    A = leaves.take("lora_down.weight", -1, geo.in_, *geo.kernel)
    B = leaves.take("lora_up.weight", geo.out, len(A), *ones)
    scale = leaves.scale(len(A))
    A, B = own_pairs(geo, A, B)
    return LayerChange("lora", B.shape[1], scale, {"A": A, "B": B})


def own_pairs(geo: Geometry, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return a pair shared by the groups of a convolution as one pair for each: every group keeps what it uses."""
    if geo.groups == 1:
        return A, B
    rows = B.view(geo.groups, -1, len(A))
    used = [(group != 0).any(dim=0).nonzero().flatten() for group in rows]
    r = max(1, *(len(columns) for columns in used))
    own_A, own_B = A.new_zeros(geo.groups, r, *A.shape[1:]), B.new_zeros(geo.groups, rows.shape[1], r)
    for g, columns in enumerate(used):
        own_A[g, : len(columns)] = A[columns]
        own_B[g, :, : len(columns)] = rows[g][:, columns]
    return own_A.flatten(0, 1), own_B.view(geo.out, r, *[1] * len(geo.kernel))


def loha(geo: Geometry, leaves: Leaves) -> LayerChange:
    """Return LoHa; hada_t1 and hada_t2 are multiplied into the factors beside them."""
    factors: dict[str, Tensor] = {}
    for i in (1, 2):
        if f"hada_t{i}" in leaves:
            a, b = leaves.take(f"hada_w{i}_a", -1, geo.out), leaves.take(f"hada_w{i}_b", -1, geo.in_)
            core = leaves.take(f"hada_t{i}", len(a), len(b), *geo.kernel)
            a, b = a.t().contiguous(), torch.einsum("ij...,jc->ic...", core, b).flatten(1)
        else:
            a = leaves.take(f"hada_w{i}_a", geo.out, -1)
            b = leaves.take(f"hada_w{i}_b", a.shape[1], geo.taps)
        factors |= {f"w{i}_a": a, f"w{i}_b": b}
    rank = len(factors["w1_b"])
    if len(factors["w2_b"]) != rank:
        raise wrong(f"{leaves.layer}.hada_w2_b", f"the rank of hada_w1_b, {rank}", len(factors["w2_b"]))
    return LayerChange("loha", rank, leaves.scale(rank), factors)


def lokr(geo: Geometry, leaves: Leaves) -> LayerChange:
    """Return LoKr; a w1 in factors and a core lokr_t2 are multiplied out. Without any factors alpha has no meaning."""
    rank = 0
    if "lokr_w1" in leaves:
        w1 = leaves.take("lokr_w1", -1, -1)
    else:
        a = leaves.take("lokr_w1_a", -1, -1)
        rank = a.shape[1]
        w1 = a @ leaves.take("lokr_w1_b", rank, -1)
    if geo.out % w1.shape[0] or geo.in_ % w1.shape[1]:
        raise wrong(f"{leaves.layer}.lokr_w1", f"sizes that divide {geo.out} and {geo.in_}", tuple(w1.shape))
    rows, columns = geo.out // w1.shape[0], geo.in_ // w1.shape[1]
    if "lokr_w2" in leaves:
        tensors = {"w1": w1, "w2": leaves.take("lokr_w2", rows, columns, *geo.kernel)}
        return LayerChange("lokr", max(rank, 1), leaves.scale(rank) if rank else 1.0, tensors)
    if "lokr_t2" in leaves:
        a, b = leaves.take("lokr_w2_a", -1, rows), leaves.take("lokr_w2_b", -1, columns)
        core = leaves.take("lokr_t2", len(a), len(b), *geo.kernel)
        a, b = a.t().contiguous(), torch.einsum("ij...,jc->ic...", core, b).flatten(1)
    else:
        a = leaves.take("lokr_w2_a", rows, -1)
        b = _flat(leaves, "lokr_w2_b", a.shape[1], columns, geo)
    return LayerChange("lokr", len(b), leaves.scale(rank or len(b)), {"w1": w1, "w2_a": a, "w2_b": b})


def dora(geo: Geometry, leaves: Leaves, change: LayerChange, weight: Tensor) -> LayerChange:
    """Return a change with the dora_scale beside it.

    Its shape tells along what LyCORIS normalised (wd_on_out): (out, 1) each output, which is DoRA, or (1, in) each
    input, as its first versions did, which none of our variants can hold.
    """
    m = leaves.own["dora_scale"].double()
    if m.shape[0] == geo.out and m.numel() == geo.out:
        variant = "dora" if change.variant == "lora" else change.variant
        return LayerChange(variant, change.rank, change.scale, {**change.tensors, "m": m.flatten().float()})
    m = leaves.take("dora_scale", 1, geo.in_, *[1] * len(geo.kernel)).double()
    changed = weight.double() + dense_of(change, geo, weight)
    norm = changed.transpose(0, 1).flatten(1).norm(dim=1).view(m.shape)
    dense = changed * (m / norm.clamp_min(torch.finfo(torch.float64).tiny)) - weight.double()
    return LayerChange(DENSE, 1, 1.0, {"change": dense})


def _flat(leaves: Leaves, leaf: str, rank: int, columns: int, geo: Geometry) -> Tensor:
    # (rank, columns * taps), or with the kernel unfolded as LyCORIS's functional interface has it
    if leaf in leaves and leaves.own[leaf].ndim > 2:
        return leaves.take(leaf, rank, columns, *geo.kernel).flatten(1)
    return leaves.take(leaf, rank, columns * (geo.taps // geo.in_))
