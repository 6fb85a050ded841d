"""LoHa: scale * (w1_a @ w1_b) * (w2_a @ w2_b), elementwise (FedPara, Hyeon-Woo et al. 2022, arXiv:2108.06098)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry
from visionlora.variants.variant import Variant, factor_dtype


class LoHa(Variant):
    """Add the Hadamard product of two low-rank matrices: rank up to r * r for twice LoRA's numbers."""

    tensors = (("w1_a", "w1_b", "w2_a", "w2_b"),)
    thins = "w1_b"

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        like = torch.empty(0, dtype=factor_dtype(weight), device=weight.device)
        self.w1_a, self.w2_a = (nn.Parameter(like.new_zeros(geometry.out, rank)) for _ in range(2))
        self.w1_b, self.w2_b = (nn.Parameter(like.new_zeros(rank, geometry.taps)) for _ in range(2))
        nn.init.normal_(self.w1_a, std=0.1)  # w2_a stays zero: the change starts at nothing
        nn.init.normal_(self.w1_b)
        nn.init.normal_(self.w2_b)

    @classmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        return 2 * rank * (geometry.out + geometry.taps)

    def change(self, weight: Tensor) -> Tensor:
        product = (self.w1_a @ self.thinned(self.w1_b)) * (self.w2_a @ self.w2_b)
        return (self.scale * product).view(self.geometry.shape).to(weight.dtype)
