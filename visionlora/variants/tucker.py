"""Tucker-2: 1x1 in -> r, k x k r -> r, 1x1 r -> out (Kim et al. 2016, arXiv:1511.06530; LyCORIS, arXiv:2309.14859)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry, hollow
from visionlora.variants.low_rank import fresh
from visionlora.variants.variant import Variant, factor_dtype, seen_dtype


class Tucker(Variant):
    """Add a change whose kernel lives between r inputs and r outputs, which saves most on large kernels."""

    tensors = (("A", "M", "B"),)
    branched = True

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        ones = [1] * len(geometry.kernel)
        self.A = nn.Parameter(fresh(geometry, weight, rank, config, taps=False))
        core = torch.empty(
            geometry.groups * rank, rank, *geometry.kernel, dtype=factor_dtype(weight), device=weight.device
        )
        self.M = nn.Parameter(core if hollow(core) else nn.init.kaiming_uniform_(core, a=5**0.5))
        self.B = nn.Parameter(core.new_zeros(geometry.out, rank, *ones))

    @classmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        core = geometry.groups * rank * rank * prod(geometry.kernel)
        return rank * (geometry.groups * geometry.in_ + geometry.out) + core

    def change(self, weight: Tensor) -> Tensor:
        geo, r = self.geometry, self.rank
        A = self.thinned(self.A).view(geo.groups, r, geo.in_)
        M = self.M.view(geo.groups, r, r, -1)
        B = self.B.view(geo.groups, -1, r)
        return (self.scale * torch.einsum("gop,gpqk,gqi->goik", B, M, A)).reshape(geo.shape).to(weight.dtype)

    def branch(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        dtype = seen_dtype(layer, x)
        if self.geometry.kind == "embedding":
            h = self.geometry.same(layer, x, self.thinned(self.A).to(dtype))
            h = self.geometry.pointwise(h, self.M.to(dtype))
        else:
            h = self.geometry.pointwise(x, self.thinned(self.A).to(dtype))
            h = self.geometry.same(layer, h, self.M.to(dtype))
        return self.geometry.pointwise(h * self.scale, self.B.to(dtype))
