"""An exponential moving average of what is trained, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from visionlora.errors import ConfigError, ResumeError
from visionlora.training.gather import gathered, like, reshard


class AdapterEMA(Callback):
    """Average the trainable tensors over optimiser steps; measure and ship the average, train the raw values.

    The decay rises as (1 + n) / (10 + n) up to `decay`, so that a short run is not stuck at its first weights.
    The averages are float32 and part of the checkpoint. After training the model holds the average.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"decay must be in [0, 1), got {decay!r}")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}
        self._step = 0

    @property
    def swapped(self) -> bool:
        """Whether the model holds the average now."""
        return bool(self._raw)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tensors = _trainable(pl_module)
        if not self.average:
            self.average = {name: t.detach().float().clone() for name, t in tensors.items()}
        if self.average.keys() != tensors.keys():
            raise ResumeError(
                "the averaged tensors of the checkpoint are not the trained ones; resume without AdapterEMA"
            )
        self.average = {name: like(self.average[name].to(t.device), t) for name, t in tensors.items()}
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:  # gradients are still being accumulated
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        current = [t.detach().float() for t in _trainable(pl_module).values()]
        torch._foreach_lerp_(list(self.average.values()), current, 1 - decay)

    def swap_in(self, pl_module: LightningModule) -> None:
        """Change the model: put the average in and keep the raw values aside."""
        tensors = _trainable(pl_module)
        self._raw = {name: t.detach().clone() for name, t in tensors.items()}
        _copy(self.average, tensors)

    def swap_out(self, pl_module: LightningModule) -> None:
        """Change the model: put the raw values back."""
        _copy(self._raw, _trainable(pl_module))
        self._raw = {}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.average and not trainer.sanity_checking:
            self.swap_in(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.swapped:
            self.swap_out(pl_module)

    on_test_start = on_predict_start = on_validation_start
    on_test_end = on_predict_end = on_validation_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.swapped:
            self.swap_out(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _copy(self.average, _trainable(pl_module))
        self.average = {}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] |= gathered(self._raw)  # training goes on from the raw values

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates, "average": gathered(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates, self.average = state["updates"], state["average"]


@contextmanager
def averaged(trainer: Trainer, pl_module: LightningModule) -> Iterator[None]:
    """Let the model hold its average inside the block, if an AdapterEMA keeps one."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, AdapterEMA)]  # type: ignore[attr-defined]
    ema = callbacks[0] if callbacks and callbacks[0].average and not callbacks[0].swapped else None
    if ema is not None:
        ema.swap_in(pl_module)
    try:
        yield
    finally:
        if ema is not None:
            ema.swap_out(pl_module)


def _trainable(module: torch.nn.Module) -> dict[str, Tensor]:
    reshard(module)
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(like(source[name], tensor))
