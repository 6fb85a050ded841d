"""Answers of a model for every image of a loader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from visionlora.vision.loops import as_batch
from visionlora.vision.metrics import Result, Scores, check_labels

__all__ = ["Answers", "answer"]


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
    context: AbstractContextManager[Any] | None = None,
) -> Answers:
    """Return the answers of a model in eval mode; the mode is put back. Every process that calls it sees all images.

    Raises DataError for a label outside the classes, NonFiniteError for predictions that are no numbers.
    """
    device = next(net.parameters()).device
    scores, rows = Scores(num_classes, device, shared=False), []
    training, seen = net.training, 0
    net.eval()
    try:
        with torch.no_grad(), context or nullcontext():
            for item in islice(iter(loader), most_batches):
                batch = as_batch(item)
                check_labels(batch.labels, num_classes)
                logits = net(batch.images.to(device)).float()
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
