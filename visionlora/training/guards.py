"""Callbacks that stop a run which would learn nothing or destroy what it learned."""

from __future__ import annotations

import logging

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor
from torch.optim import Optimizer

from visionlora.adapt import check_gradients
from visionlora.errors import NonFiniteError
from visionlora.registry import adapter_names
from visionlora.training.gather import own_part
from visionlora.training.loops import training_loaders
from visionlora.training.sampler import ResumableSampler

log = logging.getLogger(__name__)
MOST = 16
"""Samples named in a message."""


class CheckGradients(Callback):
    """Check once, after the first backward pass, that every trainable adapter tensor got a gradient.

    Raises InertAdapterError naming the layers. A network without adapters is not checked.
    """

    def __init__(self) -> None:
        self._done = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._done and adapter_names(pl_module.net):  # type: ignore[arg-type]
            check_gradients(pl_module.net)  # type: ignore[arg-type]
        self._done = True


class StopOnNonFinite(Callback):
    """Stop before an optimiser step whose loss or gradients are NaN or infinite.

    Raises NonFiniteError with step, epoch, batches and samples. Weights stay as after the last good step; nothing is
    saved afterwards. One device synchronisation a step. With a gradient scaler (16-mixed) infinite gradients are normal
    and left to it.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[int, Tensor]] = []
        """Losses since the last optimiser step, with their batch index."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._losses.append((trainer.fit_loop.batch_idx, loss.detach()))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        losses, self._losses = self._losses, []
        sound = torch.stack([loss.isfinite().all() for _, loss in losses])
        gradients = sound.new_ones(()) if _scaled(trainer) else _gradients_finite(optimizer, sound)
        mine_bad = not bool(sound.all() & gradients)
        if trainer.strategy.reduce_boolean_decision(mine_bad, all=False):
            raise NonFiniteError(_report(trainer, losses, sound.tolist(), bool(gradients)))


def _scaled(trainer: Trainer) -> bool:
    plugin = trainer.precision_plugin
    return isinstance(plugin, MixedPrecision) and plugin.scaler is not None


def _gradients_finite(optimizer: Optimizer, like: Tensor) -> Tensor:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return like.new_ones(())
    return torch.stack(torch._foreach_norm([own_part(g) for g in gradients])).isfinite().all()


def _report(trainer: Trainer, losses: list[tuple[int, Tensor]], sound: list[bool], gradients: bool) -> str:
    bad = [(index, loss) for (index, loss), ok in zip(losses, sound, strict=True) if not ok]
    where = f"optimiser step {trainer.global_step}, epoch {trainer.current_epoch}"
    if bad:
        what = "the loss is " + ", ".join(f"{float(loss):g} in batch {index}" for index, loss in bad)
    elif not gradients:
        what = f"the loss is finite but a gradient is not, batch {', '.join(str(index) for index, _ in losses)}"
    else:
        what = "the loss or a gradient is not finite on another device"
    samples = _samples(trainer, [index for index, _ in bad or losses])
    return (
        f"{where}: {what}{samples}. The step was not applied and nothing was saved after it: last.ckpt and adapter/, "
        "where there are any, are from before. Lower the learning rate, clip gradients (gradient_clip_val), try "
        "precision 32-true or bf16-mixed, and look at these samples"
    )


def _samples(trainer: Trainer, batches: list[int]) -> str:
    loaders = training_loaders(trainer)
    if len(loaders) != 1 or not isinstance(loaders[0].sampler, ResumableSampler):
        return ""
    sampler, size = loaders[0].sampler, loaders[0].batch_size or 1
    order = sampler.order(sampler.epoch)
    indices = [i for batch in batches for i in order[batch * size : (batch + 1) * size]]
    more = f" and {len(indices) - MOST} more" if len(indices) > MOST else ""
    name_of = getattr(loaders[0].dataset, "name_of", None)  # images have a file, rows of a table a number
    if name_of is not None:
        return f" ({', '.join(name_of(i % len(order)) for i in indices[:MOST])}{more})"
    return f" (samples {', '.join(map(str, indices[:MOST]))}{more} of the training set)"
