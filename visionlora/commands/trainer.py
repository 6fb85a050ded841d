"""Settings of the Trainer that cannot work, told in words and before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from traceback import walk_tb
from typing import Any

from visionlora.errors import ConfigError, VisionLoRAError

LIGHTNING = ("pytorch_lightning.", "lightning_fabric.")
NOT_OURS = ("ddp_spawn", "ddp_fork", "ddp_notebook")
MOST_SEED = 2**32 - 1


def check_trainer(config: Any) -> None:
    """Raise ConfigError for numbers that Lightning takes and later trips over, or passes over."""
    trainer, seed = config.trainer, config.seed_everything
    if isinstance(trainer.strategy, str) and trainer.strategy.startswith(NOT_OURS):
        raise ConfigError(
            f"trainer.strategy {trainer.strategy} starts its processes out of this one, which then keeps "
            "no checkpoint; take ddp"
        )
    steps, clip = trainer.accumulate_grad_batches, trainer.gradient_clip_val
    if steps < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches must be at least 1 batch, got {steps}")
    if clip is not None and clip < 0:
        raise ConfigError(f"trainer.gradient_clip_val must be at least 0 (no clipping), got {clip}")
    if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"seed_everything must be a whole number from 0 to {MOST_SEED}, got {seed}")


@contextmanager
def refusals_told() -> Iterator[None]:
    """Turn a ValueError that Lightning itself raises (a strategy it does not know, say) into a ConfigError."""
    try:
        yield
    except ValueError as e:
        frames = [frame for frame, _ in walk_tb(e.__traceback__)]
        if isinstance(e, VisionLoRAError) or not str(frames[-1].f_globals.get("__name__")).startswith(LIGHTNING):
            raise
        raise ConfigError(f"trainer: {e}") from None
