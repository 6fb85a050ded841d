"""(IA)^3: each output scaled by a learned factor (Liu et al. 2022, arXiv:2205.05638)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry
from visionlora.variants.variant import Variant, factor_dtype


class IA3(Variant):
    """Scale each row of the weight: one number an output. The bias is left as it is."""

    tensors = (("s",),)
    branched = sees_output = True
    ranked = scaled = False
    thins = "s"

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        self.s = nn.Parameter(torch.ones(geometry.out, dtype=factor_dtype(weight), device=weight.device))

    @classmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        return geometry.out

    @classmethod
    def unfit(cls, geometry: Geometry) -> str | None:
        return "it standardises its weight, so that a row's scale has no effect" if geometry.standardised else None

    def change(self, weight: Tensor) -> Tensor:
        return weight * self._excess(weight.ndim - 1).to(weight.dtype)

    def branch(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        bias = None if self.geometry.kind == "embedding" else layer.bias
        trailing = len(self.geometry.kernel)
        product = y if bias is None else y - bias.to(y.dtype).view(-1, *[1] * trailing)  # type: ignore[operator]
        return product * self._excess(trailing).to(y.dtype)

    def _excess(self, trailing: int) -> Tensor:
        return (self.thinned(self.s - 1)).view(-1, *[1] * trailing)
