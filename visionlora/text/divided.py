"""A data set as it is divided: its rows, its parts, its labels; nothing is tokenised here."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import pytorch_lightning as pl

from visionlora.data.dataset import OnError
from visionlora.data.parts import Division
from visionlora.errors import DataError
from visionlora.text.collating import rows_of_stage
from visionlora.text.columns import Example, TaskType
from visionlora.text.examples import checked_examples
from visionlora.text.labels import ProblemType, check_known, label_list, labels_of
from visionlora.text.parts import TextParts, divide
from visionlora.text.reading import Row

__all__ = ["DividedTexts"]

logger = logging.getLogger(__name__)


class DividedTexts(pl.LightningDataModule):
    """The examples of a task by part: training, validation, named tests, those to predict on."""

    task_type: TaskType
    problem_type: ProblemType
    root: str | None
    val_root: str | None
    test_root: str | None
    source_root: str | None
    predict_source: str | None
    columns: dict[str, str]
    template: str | None
    on_error: OnError
    _division: Division
    _classes: list[str] | None
    _read: Callable[[str], list[Row]]

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, list[str]] = {}
        """Examples left out so far by on_error="skip", by data set: their places with the reason."""
        self._rows: list[Row] | None = None

    @cached_property
    def parts(self) -> TextParts:
        """The divided data set. The first use reads the files."""
        if self.root is None:
            raise DataError("no data: give a file, a folder or the name of a data set as root")
        rows = self._rows if self._rows is not None else self._read(self.root)
        for root, split in ((self.val_root, "val"), (self.test_root, "test")):
            if root is not None:
                rows = [replace(row, split=row.split or "train") for row in rows if row.split != split]
                rows += [replace(row, split=split) for row in self._read(root)]
        source = None if self.source_root is None else self._examples("source", self._read(self.source_root))
        parts = divide(self._examples("data", rows), self._division, source=source)
        tests = {f"test {name}": part for name, part in parts.tests.items()}
        counts = {"train": parts.train, "val": parts.val, **tests}
        logger.info("examples: %s", ", ".join(f"{name} {len(part)}" for name, part in counts.items()))
        return parts

    @cached_property
    def label_names(self) -> list[str] | None:
        """The labels or tags in the order of their numbers; None for tasks that have none."""
        if self.task_type not in ("SEQ_CLS", "TOKEN_CLS") or self.problem_type == "regression":
            return None
        if self.root is None and self._classes is not None:
            return list(self._classes)
        names = label_list(self.parts.train, classes=self._classes)
        for where, part in {"validation": self.parts.val, **self.parts.tests}.items():
            check_known(part, names, where=where)
        return names

    @property
    def num_labels(self) -> int:
        """How many numbers the head gives: one a label, 1 for regression, 0 for tasks without labels."""
        return len(self.label_names) if self.label_names is not None else int(self.problem_type == "regression")

    @property
    def class_counts(self) -> list[int]:
        """Training examples of each label, or training words of each tag."""
        counts = Counter(label for example in self.parts.train for label in labels_of(example))
        return [counts[name] for name in self.label_names or ()]

    @property
    def test_names(self) -> list[str]:
        """Names of the test loaders, in their order."""
        return list(self.parts.tests)

    @property
    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """The rows that evaluation compares with, by stage: val, test/<name> (test, if there is one), predict."""
        parts = {} if self.root is None else {"val": self.parts.val}
        if self.root is not None:
            tests = {f"test/{name}": part for name, part in self.parts.tests.items()}
            parts |= tests if len(tests) != 1 else {**tests, "test": next(iter(tests.values()))}
        if self.predict_source is not None:
            parts["predict"] = self._to_predict
        return {
            stage: rows_of_stage(part, self.task_type, whole=stage == "predict", columns=self.columns)
            for stage, part in parts.items()
        }

    def _examples(self, name: str, rows: list[Row], *, answered: bool = True) -> list[Example]:
        found, skipped = checked_examples(
            rows, self.task_type, self.columns, template=self.template, answered=answered, on_error=self.on_error
        )
        if skipped:
            self.skipped[name] = skipped
        return found

    @cached_property
    def _to_predict(self) -> list[Example]:
        return self._examples("predict", self._read(str(self.predict_source)), answered=False)

    @property
    def _by_part(self) -> dict[str, list[Example]]:
        tests = {f"test {name}": examples for name, examples in self.parts.tests.items()}
        return {"train": self.parts.train, "val": self.parts.val, **tests}
