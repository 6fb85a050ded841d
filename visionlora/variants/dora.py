"""DoRA: magnitude apart from direction, W' = m (W + sBA) / ||W + sBA|| (Liu et al. 2024, arXiv:2402.09353)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry
from visionlora.variants.low_rank import LowRank
from visionlora.variants.variant import materialised


class DoRA(LowRank):
    """Train the length of each output row apart from its direction."""

    tensors = (("A", "B", "m"),)

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        self.m = nn.Parameter(_row_norm(materialised(weight, "DoRA")).flatten())

    @classmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        return super().size(geometry, rank, config) + geometry.out

    def change(self, weight: Tensor) -> Tensor:
        product = self.product().to(weight.dtype)
        norm = _row_norm(weight + product).detach()  # section 4.3: as a constant it costs no memory and no accuracy
        m = self.m.view_as(norm).to(weight.dtype)
        ratio = torch.where(norm > 0, m / norm.clamp_min(torch.finfo(norm.dtype).tiny), 1)  # a pruned row stays zero
        # W' - W without the cancellation: both terms are exactly zero at the start
        return weight * (ratio - 1) + product * ratio


def _row_norm(weight: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
    return norm
