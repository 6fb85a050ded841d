"""VeRA: two trained vectors between frozen random projections (Kopiczko et al. 2024, arXiv:2310.11454)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from math import prod, sqrt

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry, hollow
from visionlora.variants.low_rank import per_group
from visionlora.variants.variant import Variant, factor_dtype, seen_dtype

_START = 0.1  # of d, section 3.1


class VeRA(Variant):
    """Add b * B @ (d * A) with A and B frozen: a layer's change is r + out numbers.

    The projections are drawn from their shape alone, so that layers of one shape share them and no file holds them.
    """

    tensors = (("d", "b"),)
    branched = True
    scaled = False
    thins = "d"

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        ones, like = [1] * len(geometry.kernel), torch.empty(0, dtype=factor_dtype(weight), device=weight.device)
        A, B = (geometry.groups * rank, geometry.in_, *geometry.kernel), (geometry.out, rank, *ones)
        self.register_buffer("A", like.new_empty(A), persistent=False)
        self.register_buffer("B", like.new_empty(B), persistent=False)
        self._project()
        self.d = nn.Parameter(like.new_full((geometry.groups * rank,), _START))
        self.b = nn.Parameter(like.new_zeros(geometry.out))

    A: Tensor
    B: Tensor

    @classmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        return geometry.groups * rank + geometry.out

    @classmethod
    def largest_rank(cls, geometry: Geometry, config: LoraConfig) -> int:
        return max(0, (prod(geometry.shape) - geometry.out) // geometry.groups)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VeRA:
        was_meta = self.A.is_meta
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if was_meta:  # no file holds the projections: whoever gives the model memory must not find them empty
            self._project()
        return self

    def _project(self) -> None:
        if not hollow(self.A):
            self.A.copy_(projection("A", tuple(self.A.shape)))
            self.B.copy_(projection("B", tuple(self.B.shape)))

    def change(self, weight: Tensor) -> Tensor:
        return per_group(self.geometry, *self._factors()).to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        B, A = self._factors()
        return A, B, 1.0

    def branch(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        B, A = (factor.to(seen_dtype(layer, x)) for factor in self._factors())
        return self.geometry.pointwise(self.geometry.same(layer, x, A), B)

    def _factors(self) -> tuple[Tensor, Tensor]:
        rows = [1] * (self.A.ndim - 1)
        return self.B * self.b.view(-1, *rows), self.A * self.thinned(self.d).view(-1, *rows)


@lru_cache(maxsize=64)
def projection(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return a frozen projection with Kaiming-uniform values, the same on every machine and in every version."""
    # a hash in counter mode, not torch's generator, whose stream torch does not promise to keep
    bits = hashlib.shake_256(f"visionlora vera {name} {shape}".encode()).digest(4 * prod(shape))
    uniform = torch.frombuffer(bytearray(bits), dtype=torch.int32).double() / 2**31  # in [-1, 1)
    return (uniform * sqrt(3 / prod(shape[1:]))).float().view(shape)
