"""LoRA: W + scale * B @ A (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry, hollow
from visionlora.variants.init import SPLITS
from visionlora.variants.low_rank import LowRank, per_group
from visionlora.variants.variant import materialised, seen_dtype


class LoRA(LowRank):
    """Add a trained low-rank matrix to the weight.

    Where A and B start as a part of the weight itself (PiSSA and its kin), that part is taken off again by a frozen
    copy of them: the stored base stays the original one, and the change starts at exactly nothing.
    """

    branched = True
    start_A: Tensor | None
    start_B: Tensor | None

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, weight, rank, scale, config)
        split = SPLITS.get(config.init_lora_weights)
        if split is not None and not hollow(weight):
            self._start_from(materialised(weight, config.init_lora_weights), split)
        taken = split is not None
        self.register_buffer("start_A", self.A.detach().clone() if taken else None)
        self.register_buffer("start_B", self.B.detach().clone() if taken else None)

    def change(self, weight: Tensor) -> Tensor:
        change = self.product()
        if self.start_A is not None and self.start_B is not None:
            change = change - self.scale * per_group(self.geometry, self.start_B, self.start_A)
        return change.to(weight.dtype)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        # as one product of twice the rank, a change that starts from the weight would not start at exactly nothing
        return (self.thinned(self.A), self.B, self.scale) if self.start_A is None else None

    def branch(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        branch = self.parallel(layer, x)
        if self.start_A is None or self.start_B is None:
            return branch
        dtype = seen_dtype(layer, x)
        h = self.geometry.same(layer, x, self.start_A.to(dtype))
        return branch - self.geometry.pointwise(h * self.scale, self.start_B.to(dtype))

    @torch.no_grad()
    def _start_from(self, weight: Tensor, split: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
        geo, r = self.geometry, self.rank
        root = self.scale**0.5  # scale * B @ A is the part that is trained
        for i, rows in enumerate(weight.reshape(geo.groups, -1, geo.taps)):
            B, A = split(rows, r)
            self.B.view(geo.groups, -1, r)[i] = B / root
            self.A.view(geo.groups, r, -1)[i] = A / root


def plain(geometry: Geometry, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the factors of a change that started from the weight as one pair of twice the rank.

    B @ A - B0 @ A0 = [B, -B0] @ [A; A0], group by group: plain LoRA against the original base.
    """
    A, B, A0, B0 = (tensors[name] for name in ("A", "B", "start_A", "start_B"))
    rows = [a.reshape(geometry.groups, -1, *a.shape[1:]) for a in (A, A0)]
    return {"A": torch.cat(rows, dim=1).flatten(0, 1), "B": torch.cat([B, -B0], dim=1)}
