"""Answers of a model for every image of a loader, and of a run for its test sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.utilities.model_helpers import is_overridden
from safetensors.torch import load_file
from torch import Tensor, nn

from visionlora.io import read_adapter
from visionlora.training.gather import fill, is_sharded
from visionlora.vision.full import WEIGHTS as FULL
from visionlora.vision.loops import as_batch
from visionlora.vision.metrics import Result, Scores, check_labels
from visionlora.vision.module import ImageClassifier

__all__ = ["Answers", "answer", "answers_by_set", "loaders_by_set", "measured_here", "shipped"]


@dataclass(frozen=True)
class Answers:
    """The scores of a set of images and what was answered for each of them."""

    result: Result
    places: Sequence[int]
    """Places of the images in the data set, in the order they came."""
    labels: Sequence[int]
    predicted: Sequence[int]
    confidence: Sequence[float]
    """Probability of the predicted class."""


def answer(
    net: nn.Module,
    loader: Iterable[Any],
    num_classes: int,
    *,
    most_batches: int | None = None,
    precision: Precision | None = None,
) -> Answers:
    """Return the answers of a model in eval mode; the mode is put back. Every process that calls it sees all images.

    Raises DataError for a label outside the classes, NonFiniteError for predictions that are no numbers.
    """
    device, precision = next(net.parameters()).device, precision or Precision()
    scores, rows = Scores(num_classes, device, shared=False), []
    training, seen = net.training, 0
    net.eval()
    try:
        with torch.no_grad(), precision.forward_context():
            for item in islice(iter(loader), most_batches):
                batch = as_batch(item)
                if not len(batch.images):  # none could be read
                    continue
                check_labels(batch.labels, num_classes)
                logits = net(precision.convert_input(batch.images.to(device))).float()
                scores.update(logits, batch.labels.to(device))
                confidence, predicted = logits.softmax(-1).max(-1)
                places = batch.indices if item is batch else batch.indices + seen
                seen += len(batch.images)
                rows.append((places, batch.labels, predicted.cpu(), confidence.cpu()))
    finally:
        net.train(training)
    result = scores.compute()
    places, labels, predicted, confidence = (torch.cat(column).tolist() for column in zip(*rows, strict=True))
    return Answers(result, places, labels, predicted, confidence)


def measured_here(trainer: Trainer, net: nn.Module) -> bool:
    """Tell whether this process measures: the first one, and all of them where a forward pass needs all."""
    return trainer.is_global_zero or is_sharded(net)


def loaders_by_set(trainer: Trainer) -> dict[str, Any]:
    """Return the loaders of the data module's test sets by name, each with all of its images."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None or not is_overridden("test_dataloader", data):
        return {}
    loaders = data.test_dataloader()
    loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    names = getattr(data, "test_names", None) or [f"test {i}" for i in range(len(loaders))]
    return dict(zip(names, loaders, strict=True))


def answers_by_set(trainer: Trainer, module: ImageClassifier) -> dict[str, Answers]:
    """Return the answers of the network as it is for every test set; no process waits for another."""
    limit = trainer.limit_test_batches
    found = {}
    for name, loader in loaders_by_set(trainer).items():
        most = limit if isinstance(limit, int) else int(limit * len(loader)) if limit < 1 else None
        found[name] = answer(
            module.net, loader, len(module.class_names), most_batches=most, precision=trainer.precision_plugin
        )
    return found


@contextmanager
def shipped(module: ImageClassifier, saved: Path) -> Iterator[None]:
    """Let the network have the values that lie on disk inside the block."""
    net = module.net
    state = load_file(saved / FULL) if module.config is None else _adapter_values(saved, module.hparams.adapter_name)
    own: dict[str, Tensor] = net.state_dict()
    kept = {key: own[key].detach().clone() for key in state}
    fill(net, state, strict=False)
    try:
        yield
    finally:
        fill(net, kept, strict=False)


def _adapter_values(saved: Path, name: str) -> dict[str, Tensor]:
    """Return the values of an adapter on disk under the keys of the model that carries it."""
    values = {}
    for key, tensor in read_adapter(saved).tensors.items():
        layer, attribute, leaf = key.split("/")
        values[f"{layer}.adapters.{name}.{attribute}.{leaf}".removeprefix(".")] = tensor
    return values
