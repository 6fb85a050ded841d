"""LoRA with A frozen at its random start (LoRA-FA, Zhang et al. 2023, arXiv:2308.03303)."""

from __future__ import annotations

from torch import Tensor, nn

from visionlora.variants.low_rank import LowRank


class FA(LowRank):
    """Train B alone: half the parameters, and the layer's input need not be kept for the backward pass."""

    branched = True
    trains_A = False
    keeps_input = False

    def change(self, weight: Tensor) -> Tensor:
        return self.product().to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor, float]:
        return self.thinned(self.A), self.B, self.scale

    def branch(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.parallel(layer, x)
