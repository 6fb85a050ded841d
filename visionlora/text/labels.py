"""The names of labels and tags: taken from the training part, then fixed and checked everywhere else."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from visionlora.config import did_you_mean
from visionlora.errors import ConfigError, DataError
from visionlora.text.columns import Example, TaskType

__all__ = ["ProblemType", "check_known", "check_problem", "label_list", "label_value", "labels_of"]

logger = logging.getLogger(__name__)

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]


def check_problem(problem: str, task: TaskType) -> ProblemType:
    """Return the kind of labels if the task can have it."""
    kinds = get_args(ProblemType)
    if problem not in kinds:
        raise ConfigError(
            f"problem_type must be one of {', '.join(kinds)}, got {problem!r}{did_you_mean(problem, [*kinds])}"
        )
    if problem != "single_label_classification" and task != "SEQ_CLS":
        raise ConfigError(f"problem_type {problem} belongs to SEQ_CLS; {task} has no such labels")
    return problem  # type: ignore[return-value]


def labels_of(example: Example) -> list[str]:
    """Return the labels an example carries: its label, its several labels, or its tags."""
    if "tags" in example.fields:
        return list(example.fields["tags"])
    label = example.fields.get("label")
    if label is None:
        return []
    return [str(one) for one in label] if isinstance(label, list) else [_as_name(label)]


def label_list(training: Iterable[Example], *, classes: Sequence[str] | None = None) -> list[str]:
    """Return the names in the order of their numbers.

    Without classes they are those of the training examples, sorted as text, or by value if all are whole numbers.
    Classes may name more than the training examples carry (logged). Raises DataError for fewer than two names.
    """
    examples = list(training)
    found = Counter(label for example in examples for label in labels_of(example))
    names = _sorted(found) if classes is None else list(classes)
    if len(set(names)) < len(names):
        raise DataError(f"classes names {', '.join(n for n, c in Counter(names).items() if c > 1)} more than once")
    if len(names) < 2:
        told = f"only {names[0]!r}" if names else "none"
        raise DataError(
            f"a classifier needs two labels or more, got {told}; numbers to predict: problem_type regression"
        )
    check_known(examples, names, where="training")
    unseen = [name for name in names if name not in found]
    if unseen:
        logger.warning("no training example of %s", ", ".join(unseen))
    return names


def check_known(examples: Iterable[Example], names: Sequence[str], *, where: str) -> None:
    """Raise DataError if an example carries a label that has no number, naming the place and the nearest name."""
    known = set(names)
    unknown: dict[str, str] = {}
    for example in examples:
        for label in labels_of(example):
            if label not in known:
                unknown.setdefault(label, example.place)
    if unknown:
        told = "; ".join(
            f"{name!r} ({place}){did_you_mean(name, list(names))}" for name, place in [*unknown.items()][:5]
        )
        rest = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        head = f"{', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
        raise DataError(
            f"the {where} part has labels that are none of the {len(names)} trained on ({head}): {told}{rest}"
        )


def label_value(example: Example, problem: ProblemType, number: dict[str, int]) -> Any:
    """Return what the model is to answer: a number of a label, a 0/1 vector of labels, or a real number."""
    label = example.fields["label"]
    if problem == "multi_label_classification":
        if not isinstance(label, list):
            raise DataError(f"{example.place}: several labels are a list, got {label!r:.40}")
        given = {number[str(one)] for one in label}
        return [int(at in given) for at in range(len(number))]
    if isinstance(label, list):
        raise DataError(
            f"{example.place}: several labels need problem_type multi_label_classification, got {label!r:.40}"
        )
    if problem == "regression":
        try:
            return float(label)
        except ValueError:
            raise DataError(f"{example.place}: regression needs a number as label, got {label!r:.40}") from None
    return number[_as_name(label)]


def _as_name(label: object) -> str:
    """Return 1 for 1.0: a column of whole numbers with a gap comes out of pandas as floats."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _sorted(labels: Iterable[str]) -> list[str]:
    names = set(labels)
    numbers = all(name.isascii() and name.isdigit() and str(int(name)) == name for name in names)
    return sorted(names, key=int) if numbers else sorted(names)
