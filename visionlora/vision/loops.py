"""What an image classifier asks of the running trainer and of its data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from visionlora.core.norms import batch_norms, estimate_statistics
from visionlora.data.dataset import UNLABELLED, Batch, ImageDataset
from visionlora.errors import ConfigError
from visionlora.eva import fit_to_data
from visionlora.registry import adapter_plan, adapter_state
from visionlora.targets import head_layers
from visionlora.vision.backbone import data_config
from visionlora.vision.features import FeatureBatch

log = logging.getLogger(__name__)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw random numbers from a seed inside the block; the generator outside goes on as if nothing was drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def as_batch(batch: Any) -> Batch | FeatureBatch:
    """Return a batch of a plain loader, (images, labels) or images alone, as a Batch."""
    if isinstance(batch, (Batch, FeatureBatch)):
        return batch
    images, *rest = batch if isinstance(batch, (tuple, list)) else (batch,)
    labels = rest[0] if rest else torch.full((len(images),), UNLABELLED)
    return Batch(images, labels, torch.arange(len(images)))


def full_groups(net: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return all parameters of a network, those of its classifier head apart."""
    heads = {p for name in head_layers(net) for p in net.get_submodule(name).parameters()}
    rest = [p for p in net.parameters() if p not in heads]
    return {"head": [p for p in net.parameters() if p in heads], "backbone": rest}


def input_of(settings: Any) -> dict[str, Any] | None:
    """Return what the images of a classifier go through, as recorded or as timm has it; None for an unnamed network."""
    if settings.data or not settings.model_name:
        return settings.data  # type: ignore[no-any-return]
    return data_config(settings.model_name, model_args=settings.model_args)


def example_of(net: nn.Module, wanted: dict[str, Any] | None) -> Tensor:
    """Return one black image of the size a network wants."""
    size = wanted["input_size"] if wanted else (3, 224, 224)
    return next(net.parameters()).new_zeros(1, *size)


def image_paths(loaders: Any, loader_index: int, batch: Batch) -> list[str]:
    """Return the files a batch was read from; the places in the batch where the data are no files."""
    loader = loaders[loader_index] if isinstance(loaders, Sequence) else loaders
    data = loader.dataset if isinstance(loader, DataLoader) else None
    return [data.paths[i] if isinstance(data, ImageDataset) else str(i) for i in batch.indices.tolist()]


def set_names(stage: str, count: int, trainer: Trainer) -> list[str]:
    """Return the names of the measured sets: the stage, with the data's own names where there are several."""
    if count == 1 or stage != "test":
        return [stage] if count == 1 else [f"{stage}/{i}" for i in range(count)]
    names: Sequence[str] = getattr(trainer.datamodule, "test_names", None) or list(map(str, range(count)))
    return [f"{stage}/{name}" for name in names]


def planned_steps(trainer: Trainer) -> int:
    """Return the number of optimiser steps of the whole run, without touching the loader that will be trained on.

    With a data module its loader is made once more and only measured (Lightning#20550: a loader made before the
    checkpoint is read loses its place in the epoch).
    """
    if trainer.max_epochs in (None, -1):
        if trainer.max_steps < 1:
            raise ConfigError("a schedule needs an end: set --trainer.max_epochs or --trainer.max_steps")
        return trainer.max_steps
    if trainer.datamodule is None:
        return max(1, int(trainer.estimated_stepping_batches))
    batches = _limited(_batches(trainer.datamodule.train_dataloader(), trainer.world_size), trainer.limit_train_batches)
    total = math.ceil(batches / trainer.accumulate_grad_batches) * trainer.max_epochs
    return max(1, min(total, trainer.max_steps) if trainer.max_steps > 0 else total)


def class_weight(setting: str | list[float], trainer: Trainer, classes: int, device: torch.device) -> Tensor | None:
    """Return the weight of each class in the loss. A class without training images weighs nothing."""
    if setting == "none":
        return None
    weights = list(map(float, setting)) if not isinstance(setting, str) else _balanced(trainer, classes)
    return torch.tensor(weights, device=device)


def see_data(net: nn.Module, name: str, trainer: Trainer) -> None:
    """Change the adapter before its training to what the config wants from the training images, without labels.

    These are BatchNorm statistics and, for "eva", the directions its layers start along: the same on all ranks. The
    images come as they do in evaluation where the data module tells how, else from the training loader as it is.
    """
    config = adapter_plan(net, name).config
    device, precision = next(net.parameters()).device, trainer.precision_plugin
    training = net.training
    net.eval()  # no dropout
    with precision.forward_context():
        if config.norm in ("stats", "stats-affine") and batch_norms(net):
            batches = (precision.convert_input(images.to(device)) for images in _undisturbed(trainer))
            seen = estimate_statistics(net, batches, net)
            log.info("BatchNorm statistics re-estimated once, on %d training images", seen)
        if config.init_lora_weights == "eva":
            batches = (precision.convert_input(images.to(device)) for images in _undisturbed(trainer))
            shares = fit_to_data(net, batches)
            log.info("A starts along directions that hold %.0f %% of its input", 100 * mean(shares.values()))
    net.train(training)
    if dist.is_available() and dist.is_initialized():
        for tensor in adapter_state(net, name).values():
            dist.broadcast(tensor, 0)


def _undisturbed(trainer: Trainer) -> Iterator[Tensor]:
    if trainer.datamodule is not None:
        loader = trainer.datamodule.statistics_dataloader()
    else:
        trainer.fit_loop.setup_data()
        loader = trainer.train_dataloader
    for batch in loader:
        images = as_batch(batch).images
        if len(images):  # else none could be read
            yield images


def _batches(loader: Any, devices: int) -> int:
    spread = devices > 1 and not isinstance(getattr(loader, "sampler", None), DistributedSampler)
    return math.ceil(len(loader) / devices) if spread else len(loader)


def _limited(batches: int, limit: int | float | None) -> int:
    if limit is None or (isinstance(limit, float) and limit == 1):
        return batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def _balanced(trainer: Trainer, classes: int) -> list[float]:
    if trainer.datamodule is None:
        raise ConfigError(
            "class_weights: balanced counts the images of a data module; without one give a list of numbers"
        )
    counts = list(trainer.datamodule.class_counts)
    if len(counts) != classes:
        raise ConfigError(f"the data have {len(counts)} classes, the model has num_classes={classes}")
    return [sum(counts) / (classes * count) if count else 0.0 for count in counts]
