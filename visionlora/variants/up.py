"""LoRA with the kernel on the way up: 1x1 down, k x k up (a layout of Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from math import prod

from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry
from visionlora.variants.low_rank import fresh
from visionlora.variants.variant import Variant, seen_dtype


class Up(Variant):
    """Add a low-rank change with every tap of the kernel in B: cheaper than LoRA where a layer narrows."""

    tensors = (("A", "B"),)
    branched = True

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        self.A = nn.Parameter(fresh(geometry, weight, rank, config, taps=False))
        self.B = nn.Parameter(self.A.new_zeros(geometry.out, rank, *geometry.kernel))

    @classmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        return rank * (geometry.groups * geometry.in_ + geometry.out * prod(geometry.kernel))

    def change(self, weight: Tensor) -> Tensor:
        geo, r = self.geometry, self.rank
        A = self.thinned(self.A).view(geo.groups, r, geo.in_)
        B = self.B.view(geo.groups, geo.out // geo.groups, r, -1)
        product = (B.transpose(2, 3) @ A.unsqueeze(1)).transpose(2, 3)  # (groups, out, in, taps)
        return (self.scale * product).reshape(geo.shape).to(weight.dtype)

    def branch(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        dtype = seen_dtype(layer, x)
        A, B = self.thinned(self.A).to(dtype), self.B.to(dtype)
        if self.geometry.kind == "embedding":
            return self.geometry.pointwise(self.geometry.same(layer, x, A) * self.scale, B)
        return self.geometry.same(layer, self.geometry.pointwise(x, A) * self.scale, B)
