"""Run the frozen prefix once for each image before training, and train on what it gave."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn

from visionlora.core.quantised import quantised_base
from visionlora.data.dataset import ImageDataset, collate_images
from visionlora.errors import ConfigError
from visionlora.vision.datamodule import ImageFolderData
from visionlora.vision.features import FeatureDataset, file_of, kept_in_memory, kept_on_disk, key_of, read
from visionlora.vision.layout import laid_out
from visionlora.vision.prefix import Cut, cut

__all__ = ["cache_prefix", "drop_cache"]

log = logging.getLogger(__name__)


def cache_prefix(net: nn.Module, trainer: Trainer, where: str, fingerprint: str, layout: torch.memory_format) -> Cut:
    """Change the data module: training and validation give features of the frozen prefix. Return where the cut is.

    Raises ConfigError where that would not be what training on images computes.
    """
    data = _checked(trainer)
    parts = cut(net, layout)
    what = {
        "version": 2,
        "base": fingerprint,
        "quantised": getattr(quantised_base(net), "scheme", None),
        "until": parts.frozen[-1].name,
        "precision": str(trainer.precision),
        "device": next(net.parameters()).device.type,
        "layout": str(layout),
        "batch_size": data.batch_size,
        "torch": torch.__version__,
        "input": data.record,
    }
    sets = {"train": data.images("train")} | ({"val": data.images("val")} if data.parts.val else {})
    training = net.training
    net.eval()
    try:
        for name, images in sets.items():
            data.features[name] = _features(net, parts, images, trainer, where, what)
    finally:
        net.train(training)
    log.info("frozen prefix (%d steps, until %s) computed once for each image", len(parts.frozen), what["until"])
    return parts


def drop_cache(trainer: Trainer) -> None:
    """Change the data module: it gives images again."""
    trainer.datamodule.features.clear()  # type: ignore[attr-defined]


def _checked(trainer: Trainer) -> ImageFolderData:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, ImageFolderData):
        raise ConfigError("cache_prefix needs the images of an ImageFolderData; leave it away with loaders of your own")
    if data.augments:
        raise ConfigError("cache_prefix needs the same picture each time: set --data.augment none, or leave it away")
    if trainer.world_size > 1:
        raise ConfigError(
            f"cache_prefix runs on one device, this run has {trainer.world_size}: set --trainer.devices 1"
        )
    return data


def _features(
    net: nn.Module, parts: Cut, images: ImageDataset, trainer: Trainer, where: str, what: dict[str, Any]
) -> FeatureDataset:
    key = key_of(images, what) if where == "disk" else ""
    found = read(key, len(images)) if key else None
    if found is None:
        batches = _computed(net, parts, images, trainer, int(what["batch_size"]))
        found = kept_on_disk(batches, len(images), key) if key else kept_in_memory(batches, len(images))
    size = found.numel() * found.element_size() / 2**20
    log.info("features of %d images: %.0f MiB %s", len(images), size, f"in {file_of(key)[0]}" if key else "in memory")
    return FeatureDataset(found, images)


def _computed(net: nn.Module, parts: Cut, images: ImageDataset, trainer: Trainer, size: int) -> Iterator[Tensor]:
    """Yield the features batch by batch; a short last batch is filled up, so that all have the size of training."""
    device, precision = next(net.parameters()).device, trainer.precision_plugin
    for start in range(0, len(images), size):
        places = range(start, min(start + size, len(images)))
        batch = collate_images([images[i] for i in places]).images
        if len(batch) < len(places):
            raise ConfigError(
                f"cache_prefix needs every image, and some cannot be read: {', '.join(images.skipped[:3])}"
            )
        short = size - len(batch)
        x = torch.cat([batch, batch[-1:].expand(short, *batch.shape[1:])]) if short and start else batch
        x = precision.convert_input(x.to(device))
        with torch.no_grad(), precision.forward_context():
            features = parts.features(x)
            if not start:
                _check(net, parts, x, features)
        yield features[: len(batch)].cpu()


def _check(net: nn.Module, parts: Cut, x: Tensor, features: Tensor) -> None:
    if not torch.equal(parts.logits(features), net(laid_out(x, parts.layout))):
        raise ConfigError(
            f"cache_prefix: this {type(net).__name__} does more than its steps one after the other; leave cache_prefix "
            "away"
        )
