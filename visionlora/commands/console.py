"""What a training command shows: our own log lines, and of Lightning's what a user can act on."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from visionlora.training.quiet import silence_tips

NOISE = (
    "Trainer already configured with model summary callbacks",
    "TPU available:",
    "Restoring states from",
    "`weights_only` was not set",
    "Seed set to",
    "`Trainer.fit` stopped",
)
"""Beginnings of Lightning's log lines that tell nothing."""

EXPECTED = (
    r".*isinstance\(treespec, LeafSpec\)",  # Lightning calls what torch deprecated
    r"(?is)\s*by default only one jsonargparse|.*deprecated in v4\.",  # LightningCLI's own calls
    r"Found \d+ module\(s\) in eval mode at the start of training",  # BatchNorm of a frozen base, on purpose
    r"Be aware that when using `ckpt_path`",  # a measurement needs no report of a run
    r"Image size \(\d+ pixels\) exceeds limit",  # refused by us, with its name
    r"The '\w+_dataloader' does not have many workers",  # the data module chose the number
)
"""Warnings about what is meant to be so."""


@contextmanager
def quiet() -> Iterator[None]:
    """Show the package's log on standard error, one plain line each, and keep known noise out, inside the block."""
    silence_tips()
    ours, shown, noise = logging.getLogger("visionlora"), logging.StreamHandler(sys.stderr), _NoNoise()
    shown.setFormatter(logging.Formatter("%(message)s"))
    level = ours.level
    theirs = [handler for name in ("pytorch_lightning", "lightning_fabric") for handler in _handlers(name)]
    ours.addHandler(shown)
    ours.setLevel(logging.INFO)
    for handler in theirs:
        handler.addFilter(noise)
    try:
        with warnings.catch_warnings():
            for message in EXPECTED:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        ours.removeHandler(shown)
        ours.setLevel(level)
        for handler in theirs:
            handler.removeFilter(noise)


def _handlers(name: str) -> list[logging.Handler]:
    return logging.getLogger(name).handlers


class _NoNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(NOISE)
