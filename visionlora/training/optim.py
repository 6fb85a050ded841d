"""AdamW over the parameter groups of an adapter, and the schedule of their learning rates."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from visionlora.errors import ConfigError


def adamw(
    parameters: Mapping[str, Iterable[nn.Parameter]],
    trainer: Trainer,
    *,
    lr: float,
    weight_decay: float,
    factors: Mapping[str, float],
) -> AdamW:
    """Return AdamW over `parameter_groups`; factors of names that are not there are left out.

    One fused pass over all tensors where the device has it: a quarter of the time for the many small tensors of an
    adapter. Lightning refuses to clip gradients of a fused optimiser under mixed precision; it is not fused there.
    """
    known = {name: factor for name, factor in factors.items() if name in parameters}
    groups = parameter_groups(parameters, lr=lr, weight_decay=weight_decay, factors=known)
    devices = {p.device.type for group in groups for p in group["params"]}
    optimizer = AdamW(groups, fused=devices <= _FUSED and not isinstance(trainer.precision_plugin, MixedPrecision))
    optimizer.register_load_state_dict_post_hook(_lay_out_as_parameters)
    return optimizer


def _lay_out_as_parameters(optimizer: Optimizer) -> None:
    # on a CPU the fused step pairs numbers by their place in memory, whatever the strides (torch 2.15): moments saved
    # in another layout would be taken for those of other numbers
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


_FUSED = {"cpu", "cuda", "mps", "xpu"}
"""Devices whose AdamW has one kernel for all tensors."""


def parameter_groups(
    parameters: Mapping[str, Iterable[nn.Parameter]],
    *,
    lr: float,
    weight_decay: float = 0.0,
    factors: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Return optimiser groups, one or two per name: what decays, and what does not (tensors of at most one dimension).

    `parameters` maps a name ("A", "B", "head", "norm" ...) to its parameters; frozen and repeated ones are left out.
    `factors` multiplies `lr` for a name; `{"B": 16}` is LoRA+ (Hayou et al. 2024).
    Raises ConfigError when nothing is left.
    """
    factors = factors or {}
    _check_factors(factors, parameters)
    groups, seen = [], set[nn.Parameter]()
    for name, given in parameters.items():
        trainable = [p for p in given if p.requires_grad and p not in seen]
        trainable = list(dict.fromkeys(trainable))
        seen.update(trainable)
        rate = lr * factors.get(name, 1.0)
        for suffix, flat, decay in (("", False, weight_decay), (" (no decay)", True, 0.0)):
            chosen = [p for p in trainable if (p.ndim < 2) == flat]
            if chosen:
                groups.append({"name": name + suffix, "params": chosen, "lr": rate, "weight_decay": decay})
    if not groups:
        names = ", ".join(parameters) or "no group"
        raise ConfigError(f"nothing to train: every parameter of {names} is frozen or missing; attach an adapter first")
    return groups


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int) -> dict[str, Any]:
    """Return Lightning's scheduler entry: linear warm-up, then half a cosine down to 0, counted in optimiser steps.

    Pass `total_steps` from the settings. Reading `trainer.estimated_stepping_batches` in `configure_optimizers` instead
    builds the data loader before the checkpoint is loaded (Lightning#20550).
    """
    if not 0 <= warmup_steps < total_steps:
        raise ConfigError(f"warm-up must be shorter than the run: {warmup_steps} of {total_steps} steps")
    schedule = partial(warmup_cosine_factor, warmup_steps=warmup_steps, total_steps=total_steps)
    return {"scheduler": LambdaLR(optimizer, schedule), "interval": "step"}


def warmup_cosine_factor(step: int, *, warmup_steps: int, total_steps: int) -> float:
    """Return what the learning rate is multiplied with at a step (counted from 0)."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    done = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
    return 0.5 * (1 + math.cos(math.pi * done))


def total_steps(samples: int, *, batch_size: int, epochs: int, accumulate: int = 1, devices: int = 1) -> int:
    """Return the number of optimiser steps of a run, as Lightning counts them (a short last batch counts)."""
    batches = math.ceil(math.ceil(samples / devices) / batch_size)
    return math.ceil(batches / accumulate) * epochs


def _check_factors(factors: Mapping[str, float], names: Sequence[str] | Mapping[str, Any]) -> None:
    for name, factor in factors.items():
        if name not in names:
            raise ConfigError(f"there is no parameter group {name!r}; there are {', '.join(names)}")
        if not math.isfinite(factor) or factor <= 0:
            raise ConfigError(f"the learning-rate factor of {name!r} must be a finite number above 0, got {factor!r}")
