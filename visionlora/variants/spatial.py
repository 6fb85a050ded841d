"""A few learned filters a layer, mixed per channel (filter subspace: Chen et al. 2024, arXiv:2403.00269)."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry, hollow
from visionlora.variants.init import STARTS
from visionlora.variants.variant import Variant, factor_dtype


class Spatial(Variant):
    """Add to every filter a mix of r learned filters: the low rank lies between channels and taps.

    For depthwise kernels, which have no channel matrix that a low rank could save on.
    """

    tensors = (("A", "B"),)

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        A = torch.empty(rank, *geometry.kernel, dtype=factor_dtype(weight), device=weight.device)
        if not hollow(A):
            STARTS[config.init_lora_weights](A.view(rank, -1))
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(A.new_zeros(geometry.out, geometry.in_, rank))

    @classmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        return rank * (prod(geometry.kernel) + geometry.out * geometry.in_)

    @classmethod
    def unfit(cls, geometry: Geometry) -> str | None:
        return "it has no kernel that filters could be shared over" if prod(geometry.kernel) == 1 else None

    @classmethod
    def largest_rank(cls, geometry: Geometry, config: LoraConfig) -> int:
        filters, taps = geometry.out * geometry.in_, prod(geometry.kernel)
        return 0 if cls.unfit(geometry) else filters * taps // (filters + taps)

    def change(self, weight: Tensor) -> Tensor:
        mixed = self.B @ self.thinned(self.A).flatten(1)
        return (self.scale * mixed).view(self.geometry.shape).to(weight.dtype)
