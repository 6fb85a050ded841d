"""What the low-rank variants share: A, B, their starting values, their product and dropout on the rank."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.delta import Delta
from visionlora.core.geometry import Geometry
from visionlora.variants.init import STARTS


class LowRank(Delta):
    """scale * B @ A, one pair for each group of a grouped convolution.

    A is (groups * r, in, *kernel) and B is (out, r, *1s): the layout PEFT and kohya read when there is one group.
    """

    trains_A: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, rank, scale)
        self.dropout = config.lora_dropout
        A = self._fresh_A(weight, STARTS[config.init_lora_weights])
        if self.trains_A:
            self.A: Tensor = nn.Parameter(A)
        else:
            self.register_buffer("A", A)
        self.B = nn.Parameter(A.new_zeros(geometry.out, rank, *[1] * len(geometry.kernel)))

    def product(self) -> Tensor:
        """Return scale * B @ A as (out, in, *kernel)."""
        geo, r = self.geometry, self.rank
        A = self._thinned().view(geo.groups, r, geo.in_ * prod(geo.kernel))
        B = self.B.view(geo.groups, geo.out // geo.groups, r)
        return (self.scale * (B @ A)).view(geo.shape)

    def parallel(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return scale * B(A(x)), the product applied without forming it."""
        h = self.geometry.down(layer, x, self._thinned().to(x.dtype))
        return self.geometry.up(h * self.scale, self.B.to(x.dtype))

    def _fresh_A(self, weight: Tensor, start: Callable[[Tensor], None]) -> Tensor:
        # in float32 whatever the base is stored in: optimiser steps of 1e-4 vanish in bfloat16
        geo, r = self.geometry, self.rank
        dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
        A = torch.empty(geo.groups * r, geo.in_, *geo.kernel, dtype=dtype, device=weight.device)
        if not A.is_meta:
            for rows in A.view(geo.groups, r, -1):
                start(rows)
        return A

    def _thinned(self) -> Tensor:
        if not (self.training and self.dropout):
            return self.A
        keep = torch.rand(self.A.shape[0], *[1] * (self.A.ndim - 1), device=self.A.device) >= self.dropout
        return self.A * (keep.to(self.A.dtype) / (1 - self.dropout))
