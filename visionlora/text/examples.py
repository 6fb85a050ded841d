"""Rows checked one by one: each becomes an example, stops the run, or is left out and counted."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from visionlora.data.dataset import OnError
from visionlora.errors import DataError
from visionlora.text.columns import FORMS, Example, Form, TaskType, example_of, form_of
from visionlora.text.prompts import columns_of
from visionlora.text.reading import Row

__all__ = ["checked_examples"]

logger = logging.getLogger(__name__)


def checked_examples(
    rows: Sequence[Row],
    task: TaskType,
    columns: Mapping[str, str],
    *,
    template: str | None = None,
    answered: bool = True,
    on_error: OnError = "raise",
) -> tuple[list[Example], list[str]]:
    """Return the rows as examples, and with on_error="skip" the places of those left out, with the reason.

    A test split whose rows all lack their answers, as in GLUE, is left out. Raises DataError.
    """
    if not answered:
        columns = _for_plain_text(rows, task, columns, template)
    form = form_of(task, rows, columns, template=columns_of(template), answered=answered)
    if answered:
        rows = _with_answers(rows, form, columns)
    examples, skipped = [], []
    for row in rows:
        try:
            examples.append(example_of(row, form, columns, answered=answered))
        except DataError as e:
            if on_error == "raise":
                raise
            skipped.append(str(e))
            if len(skipped) <= 5:
                logger.warning("skipped %s", e)
    if skipped:
        logger.warning("%d of %d examples are skipped", len(skipped), len(rows))
    if not examples:
        raise DataError(f"none of {len(rows)} examples can be used; the first: {skipped[0]}")
    return _with_ids(examples) if task == "QUESTION_ANS" else examples, skipped


def _for_plain_text(
    rows: Sequence[Row], task: TaskType, columns: Mapping[str, str], template: str | None
) -> Mapping[str, str]:
    """Return the columns with the one input of a task read from "text", where rows hold nothing else."""
    asked = columns_of(template) or [name for form in FORMS[task] for name in form.inputs if name != "messages"][:1]
    if len(asked) == 1 and all(set(row.cells) <= {"text", "label"} for row in rows[:100]):
        return {asked[0]: "text", **columns}
    return columns


def _with_answers(rows: Sequence[Row], form: Form, columns: Mapping[str, str]) -> list[Row]:
    named = [columns.get(name, name) for name in form.answers]
    tested = [row for row in rows if row.split == "test"]
    if named and tested and all(row.cells.get(name) is None for row in tested for name in named):
        logger.warning("the %d rows of the test split have no %s: they are left out", len(tested), ", ".join(named))
        return [row for row in rows if row.split != "test"]
    return list(rows)


def _with_ids(examples: Iterable[Example]) -> list[Example]:
    """Return questions that all have an id: their own, or their number. Raises DataError if two have the same."""
    found, seen = [], dict[str, str]()
    for at, example in enumerate(examples):
        name = example.fields.get("id", str(at))
        if name in seen:
            raise DataError(f"{example.place}: the id {name!r} is that of {seen[name]} too; ids tell questions apart")
        seen[name] = example.place
        found.append(replace(example, fields={**example.fields, "id": name}))
    return found
