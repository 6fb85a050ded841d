"""What a text task asks of the running trainer and of its data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DistributedSampler

from visionlora.errors import ConfigError
from visionlora.eva import fit_to_data
from visionlora.registry import adapter_plan, adapter_state
from visionlora.targets import head_layers
from visionlora.text.inputs import model_inputs

log = logging.getLogger(__name__)

__all__ = ["class_weight", "examples_of", "full_groups", "planned_steps", "see_data", "seeded", "set_names"]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from a seed inside the block; the generator outside goes on as if nothing was drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def full_groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return all parameters of a network, those of its head apart."""
    heads = {p for name in head_layers(net) for p in net.get_submodule(name).parameters()}
    groups = {"head": [p for p in net.parameters() if p in heads]}
    return {**(groups if heads else {}), "backbone": [p for p in net.parameters() if p not in heads]}


def set_names(stage: str, count: int, trainer: Trainer) -> list[str]:
    """Return the names of the measured sets: the stage, with the data's own names where there are several."""
    if count == 1 or stage != "test":
        return [stage] if count == 1 else [f"{stage}/{i}" for i in range(count)]
    names: Sequence[str] = getattr(trainer.datamodule, "test_names", None) or list(map(str, range(count)))  # type: ignore[attr-defined]
    return [f"{stage}/{name}" for name in names]


def examples_of(trainer: Trainer, name: str) -> Sequence[Mapping[str, Any]]:
    """Return the examples of a measured set as the data module has them; none without a data module."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None or not hasattr(data, "examples"):
        return ()
    found: Mapping[str, Sequence[Mapping[str, Any]]] = data.examples
    only = [f"test/{test}" for test in getattr(data, "test_names", ())] if name == "test" else []
    return next((found[key] for key in (name, *only) if key in found), ())


def planned_steps(trainer: Trainer) -> int:
    """Return the number of optimiser steps of the whole run, without touching the loader that will be trained on.

    With a data module its loader is made once more and only measured (Lightning#20550: a loader made before the
    checkpoint is read loses its place in the epoch).
    """
    if trainer.max_epochs in (None, -1):
        if trainer.max_steps < 1:
            raise ConfigError("a schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        return trainer.max_steps
    if trainer.datamodule is None:  # type: ignore[attr-defined]
        return max(1, int(trainer.estimated_stepping_batches))
    loader = trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
    batches = _limited(_batches(loader, trainer.world_size), trainer.limit_train_batches)
    total = math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs  # type: ignore[operator]
    return max(1, min(total, trainer.max_steps) if trainer.max_steps > 0 else total)


def class_weight(setting: str | list[float], trainer: Trainer, classes: int, device: torch.device) -> Tensor | None:
    """Return the weight of each class in the loss. A class without training examples weighs nothing."""
    if setting == "none":
        return None
    weights = list(map(float, setting)) if not isinstance(setting, str) else _balanced(trainer, classes)
    return torch.tensor(weights, device=device)


def see_data(net: nn.Module, name: str, trainer: Trainer) -> None:
    """Change the adapter before its training: with "eva" its layers start along the directions of the data."""
    if adapter_plan(net, name).config.init_lora_weights != "eva":
        return
    device, precision, training = next(net.parameters()).device, trainer.precision_plugin, net.training
    net.eval()  # no dropout
    with precision.forward_context():
        shares = fit_to_data(net, _moved(trainer, device), lambda batch: net(**model_inputs(net, batch)))  # type: ignore[arg-type]
    log.info("A starts along directions that hold %.0f %% of its input", 100 * mean(shares.values()))
    net.train(training)
    if dist.is_available() and dist.is_initialized():
        for tensor in adapter_state(net, name).values():
            dist.broadcast(tensor, 0)


def _moved(trainer: Trainer, device: torch.device) -> Iterable[dict[str, Any]]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        trainer.fit_loop.setup_data()
    loader = trainer.train_dataloader if data is None else data.statistics_dataloader()
    return ({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()} for batch in loader)  # type: ignore[union-attr]


def _batches(loader: Any, devices: int) -> int:
    spread = devices > 1 and not isinstance(getattr(loader, "sampler", None), DistributedSampler)
    return math.ceil(len(loader) / devices) if spread else len(loader)


def _limited(batches: int, limit: int | float | None) -> int:
    if limit is None or (isinstance(limit, float) and limit == 1):
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _balanced(trainer: Trainer, classes: int) -> list[float]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None:
        raise ConfigError(
            "class_weights: balanced counts the labels of a data module; without one give a list of numbers"
        )
    counts = list(data.class_counts)
    if len(counts) != classes:
        raise ConfigError(f"the data have {len(counts)} classes, the model has {classes} label_names")
    return [sum(counts) / (classes * count) if count else 0.0 for count in counts]
