"""Scores of a classifier over one set of images, and the checks without which they would lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import (
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from visionlora.errors import DataError, NonFiniteError

__all__ = ["Result", "Scores", "check_labels", "check_predictions"]


@dataclass(frozen=True)
class Result:
    """What a set of images says about a model."""

    images: int
    loss: float
    """Mean cross-entropy, without smoothing or class weights."""
    acc: float
    """Share of right answers (micro average)."""
    f1: float
    """Macro F1; classes that neither occur nor are predicted do not count."""
    ece: float
    """Expected calibration error (Guo et al. 2017), 15 bins, L1."""
    per_class: list[float | None]
    """Share of right answers for each class; None for a class without images."""
    confusion: list[list[int]]
    """Images by true class (rows) and predicted class (columns)."""

    def scalars(self) -> dict[str, float]:
        """Return the four numbers that are logged."""
        return {"loss": self.loss, "acc": self.acc, "f1": self.f1, "ece": self.ece}


class Scores:
    """Running scores of one set of images, reduced over all processes when computed (unless not `shared`)."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", *, shared: bool = True) -> None:
        options: dict[str, Any] = {"num_classes": num_classes, "sync_on_compute": shared}
        options["validate_args"] = False  # we check, with better words
        self.metrics = MetricCollection(
            {
                "f1": MulticlassF1Score(average="macro", **options),
                "ece": MulticlassCalibrationError(n_bins=15, norm="l1", **options),
                "confusion": MulticlassConfusionMatrix(**options),
            }
        ).to(device)
        self.loss = MeanMetric(sync_on_compute=shared).to(device)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch. Raises NonFiniteError for NaN or infinite predictions, which torchmetrics would score."""
        check_predictions(logits)
        logits = logits.float()
        self.metrics.update(logits.softmax(-1), labels)
        self.loss.update(F.cross_entropy(logits, labels), weight=len(labels))

    def compute(self) -> Result:
        """Return the scores so far. Raises DataError where nothing was counted."""
        if not self.metrics["confusion"].update_called:
            raise DataError("no image was scored; the set is empty or limit_*_batches is 0")
        values = self.metrics.compute()
        confusion = values.pop("confusion").cpu()
        images, totals = int(confusion.sum()), confusion.sum(1).tolist()
        per_class = [
            right / total if total else None for right, total in zip(confusion.diag().tolist(), totals, strict=True)
        ]
        return Result(
            images,
            float(self.loss.compute()),
            int(confusion.trace()) / images,
            **{name: float(value) for name, value in values.items()},
            per_class=per_class,
            confusion=confusion.tolist(),
        )


def check_predictions(logits: Tensor) -> None:
    """Raise NonFiniteError unless every prediction is a finite number."""
    bad = ~torch.isfinite(logits).all(-1)
    if bad.any():
        raise NonFiniteError(
            f"{int(bad.sum())} of {len(logits)} predictions of a batch are NaN or infinite; the weights or the images "
            "are damaged, or the precision is too low (try 32-true or bf16-mixed)"
        )


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Raise DataError unless every label is a class number: on a GPU a wrong one ends the process without a word."""
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        wrong = sorted({int(v) for v in labels.tolist() if not 0 <= v < num_classes})
        shown = ", ".join(map(str, wrong[:5]))
        raise DataError(
            f"expected labels from 0 to {num_classes - 1}, got {shown}; num_classes must be that of the data"
        )
