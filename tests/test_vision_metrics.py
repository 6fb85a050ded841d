"""Scores against numpy, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from visionlora.errors import DataError, NonFiniteError
from visionlora.vision.metrics import Scores, check_labels


def batches(n: int = 60, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, classes - 1, (n,), generator=generator)  # the last class never occurs
    logits = torch.randn(n, classes, generator=generator) + 2 * torch.nn.functional.one_hot(labels, classes)
    return logits, labels


def numpy_scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, object]:
    classes, n = logits.shape[1], len(labels)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    guess, confidence = p.argmax(1), p.max(1)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, guess), 1)
    f1 = [
        2 * confusion[c, c] / (confusion[c].sum() + confusion[:, c].sum())
        for c in range(classes)
        if confusion[c].sum() + confusion[:, c].sum()
    ]
    bins = np.clip(np.ceil(confidence * 15).astype(int) - 1, 0, 14)
    ece = sum(
        abs((guess == labels)[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).sum() / n
        for b in set(bins)
    )
    loss = -np.log(p[np.arange(n), labels]).mean()
    return {
        "acc": (guess == labels).mean(),
        "f1": np.mean(f1),
        "ece": ece,
        "loss": loss,
        "confusion": confusion.tolist(),
    }


def test_scores_over_uneven_batches_equal_numpy():
    logits, labels = batches()
    scores = Scores(4)
    for part in (slice(0, 50), slice(50, 60)):
        scores.update(logits[part], labels[part])
    result, truth = scores.compute(), numpy_scores(logits.double().numpy(), labels.numpy())
    assert result.images == 60
    assert result.confusion == truth.pop("confusion")
    assert result.scalars() == pytest.approx(truth, abs=1e-6)


def test_a_class_without_images_has_no_accuracy():
    logits, labels = batches()
    scores = Scores(4)
    scores.update(logits, labels)
    per_class = scores.compute().per_class
    assert per_class[3] is None
    assert per_class[0] == pytest.approx(float((logits.argmax(1) == 0)[labels == 0].float().mean()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_predictions_that_are_no_numbers_are_refused(bad):
    logits, labels = batches()
    logits[7, 1] = bad
    with pytest.raises(NonFiniteError, match="1 of 60 predictions"):
        Scores(4).update(logits, labels)


def test_scores_of_nothing_are_refused():
    with pytest.raises(DataError, match="no image was scored"):
        Scores(4).compute()


@pytest.mark.parametrize("labels", [[0, 4], [-1, 2], [7]])
def test_labels_outside_the_classes_are_refused(labels):
    with pytest.raises(DataError, match="expected labels from 0 to 3"):
        check_labels(torch.tensor(labels), 4)


def test_right_labels_and_no_labels_pass():
    check_labels(torch.tensor([0, 3]), 4)
    check_labels(torch.tensor([], dtype=torch.long), 4)
