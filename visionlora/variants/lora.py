"""LoRA: W + scale * B @ A (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from torch import Tensor, nn

from visionlora.variants.low_rank import LowRank


class LoRA(LowRank):
    """Add a trained low-rank matrix to the weight."""

    branched = True

    def change(self, weight: Tensor) -> Tensor:
        return self.product().to(weight.dtype)

    def branch(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.parallel(layer, x)
