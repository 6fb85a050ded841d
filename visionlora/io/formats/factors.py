"""Any change of a weight as low-rank factors: its own where it has some, by singular value decomposition elsewhere."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from math import hypot, prod, sqrt

import torch
from torch import Tensor

from visionlora.core.delta import Delta, Parts
from visionlora.core.geometry import Geometry
from visionlora.core.thin import Thin, cut
from visionlora.io.formats.products import NUMERIC, thin
from visionlora.variants import LowRank
from visionlora.variants.dora import DoRA
from visionlora.variants.ia3 import IA3


@dataclass(frozen=True)
class Factors:
    """One low-rank pair for a whole weight, a pair for each group of a grouped convolution.

    The change is scale * B @ A; with m, what DoRA makes of it.
    """

    A: Tensor
    """(groups * r, in, *kernel)"""
    B: Tensor
    """(out, r, *1s)"""
    scale: float
    m: Tensor | None = None
    """(out), the length of each row of the changed weight."""
    error: float = 0.0
    """Norm of what is lost, and"""
    norm: float = 0.0
    """norm of the whole change; both 0 where nothing was computed, only laid out anew."""

    @property
    def rank(self) -> int:
        return self.B.shape[1]


def factors_of(delta: Delta, weight: Tensor, *, dora: bool = True) -> Factors:
    """Return a change in factors; the weight is (out, in, *kernel).

    LoRA, DoRA and parts of a fused layer keep their numbers. Products of thin matrices are multiplied out; everything
    else, and DoRA where it may not stay one, is decomposed in float64 at its own rank. Only rounding is lost.
    """
    if isinstance(delta, IA3) and dora:
        return _rescaled(delta, weight)
    kept = _low_rank(delta)
    if kept is None or (not dora and any(isinstance(leaf, DoRA) for _, leaf in kept)):
        found = thin(delta)
        if found is not None:
            return _rounded(delta.geometry, found.times(delta.scale))
        return decompose(delta.geometry, dense_change(delta, weight))
    return _side_by_side(delta.geometry, kept, _magnitude(kept, weight))


def dense_change(delta: Delta, weight: Tensor) -> Tensor:
    """Return the whole change in float64, as (out, in, *kernel)."""
    wide = copy.deepcopy(delta).double().eval()
    with torch.no_grad():
        change: Tensor = wide.change(weight.detach().double())
    return change


def decompose(geometry: Geometry, change: Tensor, rank: int | None = None) -> Factors:
    """Return the nearest factors of at most a rank, without a rank those that lose nothing but rounding."""
    dense = change.double().reshape(geometry.groups, geometry.out // geometry.groups, -1)
    kept = cut(dense, rank, noise=NUMERIC)
    found = _rounded(geometry, kept.factors)
    return replace(found, error=hypot(found.error, sqrt(kept.dropped)), norm=sqrt(kept.total))


def product(geometry: Geometry, factors: Factors) -> Tensor:
    """Return scale * B @ A in float64, as (out, in, *kernel)."""
    A = factors.A.double().reshape(geometry.groups, factors.rank, -1)
    B = factors.B.double().reshape(geometry.groups, -1, factors.rank)
    return (factors.scale * (B @ A)).reshape(geometry.shape)


def is_smaller(geometry: Geometry, factors: Factors) -> bool:
    """Tell whether the factors hold fewer numbers than the weight they change."""
    return factors.A.numel() + factors.B.numel() < prod(geometry.shape)


def row_norm(weight: Tensor) -> Tensor:
    """Return the length of each row of (out, in, *kernel), in float64."""
    norm: Tensor = torch.linalg.vector_norm(weight.double().flatten(1), dim=1)
    return norm


def _rounded(geometry: Geometry, exact: Thin) -> Factors:
    """Return factors given in float64 as float32 in our layout, and what the rounding lost."""
    r, ones, whole = exact.rank, [1] * len(geometry.kernel), exact.dense().reshape(geometry.shape)
    A = exact.A.reshape(geometry.groups * r, geometry.in_, *geometry.kernel)
    found = Factors(A.float(), exact.B.reshape(geometry.out, r, *ones).float(), 1.0)
    return replace(found, error=float((product(geometry, found) - whole).norm()), norm=float(whole.norm()))


def _low_rank(delta: Delta) -> list[tuple[int, LowRank]] | None:
    """Return the parts of a change with the row each begins at, or None where one is not B @ A."""
    parts = [(0, delta)] if not isinstance(delta, Parts) else [(delta.starts[n], d) for n, d in delta.deltas.items()]
    found = [(start, leaf) for start, leaf in parts if isinstance(leaf, LowRank)]
    return found if len(found) == len(parts) else None


def _side_by_side(geometry: Geometry, parts: list[tuple[int, LowRank]], m: Tensor | None) -> Factors:
    first = parts[0][1]
    if first.geometry.out == geometry.out:
        return Factors(first.A.detach(), first.B.detach(), first.scale, m)
    # side by side in A, each with rows of its own in B and zeros elsewhere: the same sums, no number changed
    A = torch.cat([leaf.A.detach() for _, leaf in parts])
    B, column = A.new_zeros(geometry.out, len(A), *[1] * len(geometry.kernel)), 0
    for start, leaf in parts:
        B[start : start + leaf.geometry.out, column : column + leaf.rank] = leaf.B.detach()
        column += leaf.rank
    return Factors(A, B, first.scale, m)


def _magnitude(parts: list[tuple[int, LowRank]], weight: Tensor) -> Tensor | None:
    trained = [(start, leaf) for start, leaf in parts if isinstance(leaf, DoRA)]
    if not trained:
        return None
    m = row_norm(weight).float()
    for start, leaf in trained:
        m[start : start + leaf.geometry.out] = leaf.m.detach()
    return m


def _rescaled(delta: IA3, weight: Tensor) -> Factors:
    # a row times s is the same row at another length, which is what DoRA trains
    geo = delta.geometry
    A, B = weight.new_zeros(geo.groups, geo.in_, *geo.kernel), weight.new_zeros(geo.out, 1, *[1] * len(geo.kernel))
    m = row_norm(weight) * delta.s.detach().double()
    return Factors(A.float(), B.float(), 1.0, m.float())
