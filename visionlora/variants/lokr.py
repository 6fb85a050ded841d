"""LoKr: scale * kron(w1, w2), w2 low-rank where that is smaller (Yeh et al. 2024, LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from math import isqrt, prod

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry, hollow
from visionlora.variants.variant import Variant, factor_dtype


class LoKr(Variant):
    """Add a Kronecker product: a small matrix says how strongly each block of the weight takes one shared change."""

    tensors = (("w1", "w2"), ("w1", "w2_a", "w2_b"))
    thins = "w1"

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        (out_a, out_b), (in_a, in_b) = _blocks(geometry, config)
        like = torch.empty(0, dtype=factor_dtype(weight), device=weight.device)
        self.block = (out_b, in_b, *geometry.kernel)
        self.w1 = nn.Parameter(_kaiming(like.new_empty(out_a, in_a)))
        if rank * (out_b + prod(self.block[1:])) < prod(self.block):
            self.w2_a = nn.Parameter(like.new_zeros(out_b, rank))
            self.w2_b = nn.Parameter(_kaiming(like.new_empty(rank, prod(self.block[1:]))))
            self.w2, self.thins = None, "w2_b"
        else:
            self.w2 = nn.Parameter(like.new_zeros(self.block))

    @classmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        (out_a, out_b), (in_a, in_b) = _blocks(geometry, config)
        taps = in_b * prod(geometry.kernel)
        return out_a * in_a + min(rank * (out_b + taps), out_b * taps)

    def change(self, weight: Tensor) -> Tensor:
        if self.w2 is None:
            w1: Tensor = self.w1
            w2: Tensor = (self.w2_a @ self.thinned(self.w2_b)).view(self.block)
        else:
            w1, w2 = self.thinned(self.w1), self.w2
        product = torch.kron(w1.view(*w1.shape, *[1] * len(self.geometry.kernel)), w2)
        return (self.scale * product).to(weight.dtype)


def _blocks(geometry: Geometry, config: LoraConfig) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return ((rows of w1, rows of w2), (columns of w1, columns of w2))."""
    return _split(geometry.out, config.decompose_factor), _split(geometry.in_, config.decompose_factor)


def _split(size: int, factor: int) -> tuple[int, int]:
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    bound = isqrt(size) if factor < 0 else min(factor, isqrt(size))
    small = next(n for n in range(max(bound, 1), 0, -1) if size % n == 0)
    return small, size // small


def _kaiming(rows: Tensor) -> Tensor:
    return rows if hollow(rows) else nn.init.kaiming_uniform_(rows, a=5**0.5)
