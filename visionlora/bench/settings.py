"""What a measurement is made with. Imports no torch: the command line reads its choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from visionlora.config import did_you_mean
from visionlora.errors import ConfigError

Order = Literal["factorised", "merged", "projected"]
ORDERS: tuple[Order, ...] = get_args(Order)
"""Those of core/orders.py, which imports torch."""
BASIC = ("floor", "full", "linear", "ours", "peft")
VARIANTS = (*BASIC, *ORDERS)


@dataclass(frozen=True)
class Settings:
    """One measurement: every variant of a model sees the same batch, loss, layers, rank and layout."""

    batch: int = 8
    size: int = 224
    """Pixels a side of an image, or tokens of a text."""
    rank: int = 8
    rounds: int = 7
    variants: tuple[str, ...] = BASIC
    """The floor is always measured: every ratio is a ratio to it."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """bf16 is automatic mixed precision: weights stay float32, matrix products run in bfloat16."""
    device: Literal["cpu", "cuda"] = "cpu"
    channels_last: bool = False
    compile: bool = False
    clock: Literal["cpu", "wall"] = "cpu"
    """Time the process spent computing, or time that passed; a GPU is timed by its own events."""
    threads: int = 1
    steps: int = 1
    """Training steps in a row of one variant in one round."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch", "size", "rank", "rounds", "threads", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        for variant in self.variants:
            if variant not in VARIANTS:
                near = did_you_mean(variant, list(VARIANTS))
                raise ConfigError(f"there is no variant {variant!r}{near}\nvariants: {', '.join(VARIANTS)}")
        if self.clock == "cpu" and self.device == "cpu" and self.threads > 1:
            raise ConfigError("the time a process spends adds up over its threads; use --clock wall with --threads")
