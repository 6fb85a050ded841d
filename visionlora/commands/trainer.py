"""Settings of the Trainer that cannot work, told in words and before anything is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from visionlora.errors import ConfigError

MOST_SEED = 2**32 - 1


def check_trainer(config: Any) -> None:
    """Raise ConfigError for numbers that Lightning takes and later trips over, or passes over."""
    trainer, seed = config.trainer, config.seed_everything
    steps, clip = trainer.accumulate_grad_batches, trainer.gradient_clip_val
    if steps < 1:
        raise ConfigError(f"trainer.accumulate_grad_batches must be at least 1 batch, got {steps}")
    if clip is not None and clip < 0:
        raise ConfigError(f"trainer.gradient_clip_val must be at least 0 (no clipping), got {clip}")
    if not isinstance(seed, bool) and isinstance(seed, int) and not 0 <= seed <= MOST_SEED:
        raise ConfigError(f"seed_everything must be a whole number from 0 to {MOST_SEED}, got {seed}")


@contextmanager
def refusals_told() -> Iterator[None]:
    """Turn a ValueError of the Trainer, about a strategy or an accelerator it does not know, into a ConfigError."""
    try:
        yield
    except ValueError as e:
        raise ConfigError(f"trainer: {e}") from None
