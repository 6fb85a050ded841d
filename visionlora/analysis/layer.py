"""A training step to count, and what one adapted layer costs in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from visionlora.analysis.cost import Cost, Way, cost, extra_steps, floor_steps, kept
from visionlora.analysis.sizes import Sizes
from visionlora.core.orders import Order, forced
from visionlora.errors import ConfigError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Setting:
    """A training step: how many images of which size, computed where and in which type."""

    batch: int = 8
    channels: int = 3
    height: int = 224
    width: int = 224
    device: str = "cpu"
    """Decides which order a layer takes; nothing is computed on it."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Every tensor is counted in numbers of this type."""
    order: Order | None = None
    """Forced on every layer that can take it."""

    def __post_init__(self) -> None:
        for name in ("batch", "channels", "height", "width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        with forced(self.order):
            pass  # refuses an unknown order

    @property
    def computed_in(self) -> torch.dtype:
        return _DTYPES[self.dtype]

    @property
    def itemsize(self) -> int:
        return self.computed_in.itemsize


@dataclass(frozen=True)
class LayerCost:
    """One call of one adapted layer."""

    name: str
    what: str
    """"conv 3x3 /2, 64 -> 128", "linear 384 -> 1152"."""
    sizes: Sizes
    way: Way
    itemsize: int
    saved: int
    """Bytes this call keeps for the backward pass, counted on the call itself."""
    change: tuple[int, int] = (0, 0)
    """FLOPs to form a change that is no product of two factors, and to pull a gradient back through it."""

    @property
    def floor(self) -> Cost:
        return cost(floor_steps(self.sizes), self.itemsize)

    @property
    def extra(self) -> Cost:
        """What the adapter adds to the floor."""
        return self.by(self.way)._replace(saved=self.saved)

    def by(self, way: Way) -> Cost:
        """Return what the adapter would add in this order, what is kept by formula."""
        return cost(extra_steps(self.sizes, way, self.change), self.itemsize, kept(self.sizes, way))
