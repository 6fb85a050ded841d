"""What every variant tells of itself before it is built: how many numbers it would hold at a rank."""

from __future__ import annotations

from abc import abstractmethod
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from visionlora.config import LoraConfig
from visionlora.core.delta import Delta
from visionlora.core.geometry import Geometry, materialisable, widened
from visionlora.core.quantised import is_quantised
from visionlora.errors import TargetError


class Variant(Delta):
    """A delta that the config can name."""

    tensors: ClassVar[tuple[tuple[str, ...], ...]]
    """Names of its stored tensors; several tuples where the sizes of a layer decide."""
    ranked: ClassVar[bool] = True
    """False: it has no rank, every layer is recorded at rank 1."""
    scaled: ClassVar[bool] = True
    """False: lora_alpha has no meaning, every layer is recorded at scale 1."""
    keeps_input: ClassVar[bool] = True
    """False: no gradient needs the input of the layer."""
    thins: str = "A"
    """Name of the tensor whose rows dropout drops: each of them is one part of the change."""
    left: Tensor | None
    """What dropout leaves of each part, where it is given instead of drawn."""

    def __init__(self, geometry: Geometry, weight: Tensor, rank: int, scale: float, config: LoraConfig) -> None:
        super().__init__(geometry, rank, scale)
        self.dropout = config.lora_dropout
        self.register_buffer("left", None, persistent=False)

    @classmethod
    @abstractmethod
    def size(cls, geometry: Geometry, rank: int, config: LoraConfig) -> int:
        """Return how many numbers the change would hold."""

    @classmethod
    def unfit(cls, geometry: Geometry) -> str | None:
        """Return why the variant has no meaning on such a layer, or None where it has one."""
        return None

    @classmethod
    def largest_rank(cls, geometry: Geometry, config: LoraConfig) -> int:
        """Return the largest rank at which the change has no more numbers than the weight (0: none)."""
        weight, low, high = prod(geometry.shape), 0, geometry.max_rank
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cls.size(geometry, middle, config) <= weight else (low, middle - 1)
        return 0 if cls.unfit(geometry) else low

    @property
    def random(self) -> bool:
        """Its change differs from call to call: dropout."""
        return self.training and self.dropout > 0

    def drawn(self) -> dict[str, Tensor]:
        return {"left": self._left(getattr(self, self.thins))} if self.random else {}

    def thinned(self, factor: Tensor) -> Tensor:
        """Return the factor with rank-one parts (its first dimension) dropped in training, the rest scaled up."""
        if not self.random:
            return factor
        left = self._left(factor) if self.left is None else self.left
        return factor * left.view(-1, *[1] * (factor.ndim - 1))

    def _left(self, factor: Tensor) -> Tensor:
        keep = torch.rand(len(factor), device=factor.device) >= self.dropout
        return keep.to(factor.dtype) / (1 - self.dropout)


def materialised(weight: Tensor, what: str) -> Tensor:
    """Return the weight in float32 or wider. Raises TargetError where nobody can see it."""
    if not materialisable(weight) and not is_quantised(weight):
        raise TargetError(f"{what} needs the weight itself, and {type(weight).__name__} hides it; use the plain LoRA")
    return widened(weight.detach())


def factor_dtype(weight: Tensor) -> torch.dtype:
    """Return the type of trained factors: float32 whatever the base is stored in, or wider.

    Optimiser steps of 1e-4 vanish in bfloat16.
    """
    return torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32


def seen_dtype(layer: torch.nn.Module, x: Tensor) -> torch.dtype:
    """Return the type in which a branch runs: that of its input, or of the table where the input is indices."""
    if x.is_floating_point():
        return x.dtype
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.dtype
