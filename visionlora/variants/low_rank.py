"""What the low-rank variants share: A, B, their starting values and their product."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry, hollow
from visionlora.variants.init import STARTS, kaiming
from visionlora.variants.variant import Variant, factor_dtype, seen_dtype


class LowRank(Variant):
    """scale * B @ A, one pair for each group of a grouped convolution.

    A is (groups * r, in, *kernel) and B is (out, r, *1s): the layout PEFT and kohya read when there is one group.
    """

    tensors: ClassVar[tuple[tuple[str, ...], ...]] = (("A", "B"),)
    trains_A: ClassVar[bool] = True

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        A = fresh(geometry, weight, rank, config)
        if self.trains_A:
            self.A: Tensor = nn.Parameter(A)
        else:
            self.register_buffer("A", A)
        self.B = nn.Parameter(A.new_zeros(geometry.out, rank, *[1] * len(geometry.kernel)))

    @classmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        return rank * (geometry.groups * geometry.taps + geometry.out)

    def product(self) -> Tensor:
        """Return scale * B @ A as (out, in, *kernel)."""
        return self.scale * per_group(self.geometry, self.B, self.thinned(self.A))

    def parallel(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Return scale * B(A(x)), the product applied without forming it."""
        dtype = seen_dtype(layer, x)
        h = self.geometry.same(layer, x, self.thinned(self.A).to(dtype))
        return self.geometry.pointwise(h * self.scale, self.B.to(dtype))


def per_group(geometry: Geometry, B: Tensor, A: Tensor) -> Tensor:
    """Return B @ A of every group as (out, in, *kernel)."""
    up = B.view(geometry.groups, geometry.out // geometry.groups, -1)
    return (up @ A.reshape(geometry.groups, up.shape[2], geometry.taps)).view(geometry.shape)


def fresh(geometry: Geometry, weight: Tensor, rank: int, config: LoraConfig, *, taps: bool = True) -> Tensor:
    """Return starting values of A for every group: (groups * r, in, *kernel), or with a kernel of ones."""
    kernel = geometry.kernel if taps else [1] * len(geometry.kernel)
    A = torch.empty(geometry.groups * rank, geometry.in_, *kernel, dtype=factor_dtype(weight), device=weight.device)
    if not hollow(A):
        for rows in A.view(geometry.groups, rank, -1):
            STARTS.get(config.init_lora_weights, kaiming)(rows)
    return A
