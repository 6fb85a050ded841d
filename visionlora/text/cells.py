"""What must be true of a cell, by the name of its column: a text, a label, words, answers, messages."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from visionlora.errors import DataError

__all__ = ["check_cell", "check_spans"]


def check_cell(name: str, value: Any) -> Any:
    """Return the cell of a column as the task reads it. Raises DataError: empty, of a wrong kind, not well formed."""
    check = _CHECKS.get(name, _any)
    return check(value)


def _any(value: Any) -> str:
    """Return a column of a template, which may be empty, as an instruction without input is."""
    if isinstance(value, (list, tuple, Mapping)):
        raise DataError(f"must be text, got {type(value).__name__}")
    return _text(str(value)) if str(value).strip() else ""


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"must be text, got {type(value).__name__} {value!r:.40}")
    if not value.strip():
        raise DataError("is empty")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise DataError(f"holds half a character (\\u{ord(value[e.start]):04x}), which no file in UTF-8 can") from None
    return value


def _words(value: Any) -> list[str]:
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(f"must be a list of words, or text with spaces between them, got {value!r:.40}")
    return [_text(word) for word in value]


def _label(value: Any) -> str | float | list[str]:
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError("is missing or not finite")
    if isinstance(value, (list, tuple)):
        return [str(_label(one)) for one in value]
    if isinstance(value, float):
        return value
    if not isinstance(value, (str, int)):
        raise DataError(f"must be text or a number, got {type(value).__name__}")
    if not str(value).strip():
        raise DataError("is empty")
    return str(value).strip()


def _labels(value: Any) -> list[str]:
    if isinstance(value, str):
        value = value.split()
    if not isinstance(value, (list, tuple)):
        raise DataError(f"must be a list of labels, or text with spaces between them, got {value!r:.40}")
    return [str(_label(one)) for one in value]


def _answers(value: Any) -> dict[str, list[Any]]:
    """Return SQuAD's answers {"text": [...], "answer_start": [...]}; the list form and JSON text are read too."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError('must be SQuAD\'s {"text": [...], "answer_start": [...]}') from None
    try:
        if isinstance(value, Mapping):
            texts, starts = list(value["text"]), [int(at) for at in value["answer_start"]]
        else:
            texts, starts = [one["text"] for one in value], [int(one["answer_start"]) for one in value]
    except (KeyError, TypeError, ValueError):
        raise DataError('must be SQuAD\'s {"text": [...], "answer_start": [...]}') from None
    if len(texts) != len(starts) or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"must have one start for every text, and no empty text, got {value!r:.60}")
    return {"text": texts, "answer_start": starts}


def check_spans(context: str, answers: Mapping[str, list[Any]]) -> None:
    for text, at in zip(answers["text"], answers["answer_start"], strict=True):
        if at < 0 or context[at : at + len(text)] != text:
            found = context.find(text)
            where = f"it stands at {found}" if found >= 0 else "it stands nowhere"
            raise DataError(f"the answer {text!r:.60} does not stand at character {at} of the context: {where}")


def _messages(value: Any) -> list[dict[str, str]]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DataError('must be a list of {"role": ..., "content": ...}') from None
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError('must be a list of {"role": ..., "content": ...}')
    for one in value:
        if not isinstance(one, Mapping) or not isinstance(one.get("role"), str):
            raise DataError(f'must be a list of {{"role": ..., "content": ...}}, got {one!r:.60}')
        _text(one.get("content"))
    return [{"role": one["role"], "content": one["content"]} for one in value]


_CHECKS: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("text", "text_pair", "question", "context", "prompt", "response", "source", "target"), _text),
    "label": _label,
    "tokens": _words,
    "tags": _labels,
    "answers": _answers,
    "messages": _messages,
    "id": str,
}
