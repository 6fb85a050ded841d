"""The list of classes: taken from the training part, then fixed and checked everywhere else."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from visionlora.config import did_you_mean
from visionlora.data.folders import Sample
from visionlora.errors import DataError

__all__ = ["check_labels", "class_list"]

logger = logging.getLogger(__name__)


def class_list(training: Iterable[Sample], *, classes: Sequence[str] | None = None) -> list[str]:
    """Return the class names in the order of their numbers.

    Without classes they are the labels of the training samples, sorted as text, or by value if all are whole numbers.
    (torchvision's ImageFolder puts "10" before "2": give classes to keep the order of a base trained that way.)
    With classes the list and its order are taken as given: it may name classes without training images (logged where
    there are others), and every label must be in it.
    Raises DataError for fewer than two classes.
    """
    labels = {sample.label for sample in training}
    names = _given(classes) if classes is not None else _sorted(labels)
    if len(names) < 2:
        found = f"only {names[0]!r}" if names else "none"
        raise DataError(f"a classifier needs two classes or more, got {found}")
    check_labels(labels, names, where="the training images")
    unseen = [name for name in names if name not in labels]
    if labels and unseen:
        logger.warning("no training image of %s", ", ".join(unseen))
    return names


def check_labels(labels: Iterable[str], names: Sequence[str], *, where: str) -> None:
    """Raise DataError if a label is not in the list of classes, naming it, the place and the nearest class."""
    unknown = sorted(set(labels) - set(names))
    if unknown:
        told = ", ".join(f"{name!r}{did_you_mean(name, list(names))}" for name in unknown[:5])
        rest = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise DataError(f"{where}: not among the {len(names)} classes ({', '.join(names[:8])} ...): {told}{rest}")


def _given(classes: Sequence[str]) -> list[str]:
    twice = sorted({name for name in classes if list(classes).count(name) > 1})
    if twice:
        raise DataError(f"classes names {', '.join(twice)} more than once")
    return list(classes)


def _sorted(labels: set[str]) -> list[str]:
    numbers = all(label.isascii() and label.isdigit() and str(int(label)) == label for label in labels)
    return sorted(labels, key=int) if numbers else sorted(labels)
