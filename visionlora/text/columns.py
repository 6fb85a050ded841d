"""Which columns a task reads, and what must be true of their cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from visionlora.config import did_you_mean
from visionlora.errors import ConfigError, DataError
from visionlora.text.cells import check_cell, check_spans
from visionlora.text.reading import SPLIT_NAMES, Row

__all__ = ["FORMS", "TASKS", "Example", "Form", "TaskType", "check_task", "example_of", "form_of"]

TaskType = Literal["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM", "SEQ_2_SEQ_LM"]
TASKS: tuple[TaskType, ...] = get_args(TaskType)


@dataclass(frozen=True)
class Form:
    """One way in which the rows of a task may be written."""

    inputs: tuple[str, ...]
    """Columns that prediction needs too."""
    answers: tuple[str, ...]
    """Columns that prediction does not need."""
    optional: tuple[str, ...] = ()


FORMS: dict[TaskType, tuple[Form, ...]] = {
    "SEQ_CLS": (Form(("text",), ("label",), ("text_pair",)),),
    "TOKEN_CLS": (Form(("tokens",), ("tags",)),),
    "QUESTION_ANS": (Form(("question", "context"), ("answers",), ("id",)),),
    "CAUSAL_LM": (Form(("messages",), ()), Form(("prompt",), ("response",)), Form(("text",), ())),
    "SEQ_2_SEQ_LM": (Form(("source",), ("target",)),),
}
EVERYWHERE = ("domain", "split", "group")


@dataclass(frozen=True, slots=True)
class Example:
    """One checked example of a task."""

    fields: dict[str, Any]
    """Its cells by the task's own names: text, label, question, answers ..."""
    place: str
    domain: str | None = None
    split: str | None = None
    group: str | None = None
    """What keeps related examples in one part; None where nothing does."""
    cells: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The row as it was read."""


def check_task(task: str) -> TaskType:
    """Return the task if there is one of that name."""
    if task not in TASKS:
        near = did_you_mean(str(task).upper(), list(TASKS))
        raise ConfigError(f"task_type must be one of {', '.join(TASKS)}, got {task!r}{near}")
    return task


def form_of(
    task: TaskType,
    rows: Iterable[Row],
    columns: Mapping[str, str],
    *,
    template: Iterable[str] = (),
    answered: bool = True,
) -> Form:
    """Return the form that the rows are written in. Raises DataError where columns lack, with the flag that names one.

    columns gives the column of a task's own name; template the columns of a prompt template, which take the place of
    the prompt (or the source). Without answered only the inputs must be there.
    """
    known = {name for form in FORMS[task] for name in (*form.inputs, *form.answers, *form.optional)} | {*EVERYWHERE}
    for name in columns:
        if name not in known:
            near = did_you_mean(name, sorted(known))
            raise ConfigError(f"columns: {task} has no {name!r}{near}; it reads {', '.join(sorted(known))}")
    rows = list(rows)
    have = list(dict.fromkeys(key for row in rows[:100] for key in row.cells))
    forms = _forms(task, tuple(template))
    for form in forms:
        needed = (*form.inputs, *(form.answers if answered else ()))
        if all(columns.get(name, name) in have for name in needed):
            _check_named(columns, have, form.answers if not answered else ())
            return form
    raise DataError(_lacking(task, rows[0].place, have, columns, forms, answered))


def example_of(row: Row, form: Form, columns: Mapping[str, str], *, answered: bool = True) -> Example:
    """Return the row as a checked example. Raises DataError naming the place: an empty text, a wrong kind, no label."""
    try:
        fields = {name: _cell(row, name, columns) for name in form.inputs}
        for name in (*form.answers, *form.optional):
            lacking = row.cells.get(columns.get(name, name)) in (None, "")
            if not lacking or (answered and name in form.answers):
                fields[name] = _cell(row, name, columns)
        if len(fields.get("tags", ())) not in (0, len(fields.get("tokens", ()))):
            raise DataError(f"{len(fields['tokens'])} tokens but {len(fields['tags'])} tags")
        if "answers" in fields:
            check_spans(fields["context"], fields["answers"])
        domain, split, group = (_name(row, name, columns) for name in EVERYWHERE)
        if split is not None and split.lower() not in SPLIT_NAMES:
            raise DataError(f"split {split!r} must be train, val or test{did_you_mean(split, [*SPLIT_NAMES])}")
    except DataError as e:
        raise DataError(f"{row.place}: {e}") from None
    named = SPLIT_NAMES[split.lower()] if split is not None else row.split
    return Example(fields, row.place, domain or row.domain, named, group, row.cells)


def _forms(task: TaskType, template: tuple[str, ...]) -> tuple[Form, ...]:
    if not template:
        return FORMS[task]
    whole = {"CAUSAL_LM": (Form(template, ("response",)),), "SEQ_2_SEQ_LM": (Form(template, ("target",)),)}
    if task not in whole:
        raise ConfigError(f"template writes prompts for CAUSAL_LM and SEQ_2_SEQ_LM; {task} has none")
    return whole[task]


def _check_named(columns: Mapping[str, str], have: list[str], unread: tuple[str, ...]) -> None:
    for name, column in columns.items():
        if column not in have and name not in unread:
            raise DataError(f"columns: the {name} is {column!r}, which is not among {have}{did_you_mean(column, have)}")


def _lacking(
    task: str, place: str, have: list[str], columns: Mapping[str, str], forms: tuple[Form, ...], answered: bool
) -> str:
    wanted = " or ".join(
        ",".join((*form.inputs, *(form.answers if answered else ()), *(f"[{name}]" for name in form.optional)))
        for form in forms
    )
    nearest = max(reversed(forms), key=lambda form: sum(columns.get(n, n) in have for n in form.inputs + form.answers))
    lacks = [n for n in (*nearest.inputs, *(nearest.answers if answered else ())) if columns.get(n, n) not in have]
    named = columns.get(lacks[0], lacks[0])
    near = did_you_mean(named, have)
    cure = f"name the column: --data.columns.{lacks[0]} COLUMN; a table without header line: --data.header [...]"
    return f"{place}: {task} reads the columns {wanted}; there is no {named!r} in {', '.join(have[:12])}{near}\n{cure}"


def _cell(row: Row, name: str, columns: Mapping[str, str]) -> Any:
    column = columns.get(name, name)
    told = f"the {name}" if name == column else f"the {name} ({column})"
    value = row.cells.get(column)
    if value is None:
        raise DataError(f"{told} is missing")
    try:
        return check_cell(name, value)
    except DataError as e:
        raise DataError(f"{told} {e}") from None


def _name(row: Row, name: str, columns: Mapping[str, str]) -> str | None:
    value = row.cells.get(columns.get(name, name))
    return None if value is None else str(value).strip() or None
