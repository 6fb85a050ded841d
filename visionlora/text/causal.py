"""Token numbers of a causal model: documents that end, and prompts of which the answer alone is learned."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from visionlora.errors import ConfigError
from visionlora.text.columns import Example
from visionlora.text.features import FeatureWriter
from visionlora.text.layout import layout_of, numbers
from visionlora.text.prompts import Piece, pieces_of, prompt_of, uses_chat
from visionlora.text.settings import IGNORED, TokenSettings
from visionlora.text.windows import note_overlong, windows, without_middle

__all__ = ["causal"]

Part = tuple[list[int], bool]
"""Token numbers, and whether they are learned."""


def causal(w: FeatureWriter, start: int, chunk: Sequence[Example], tokenizer: Any, s: TokenSettings) -> None:
    """Add documents or prompts with their answers; the column prompt counts the tokens before the last answer."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ConfigError(f"CAUSAL_LM needs a tokenizer with an end-of-text token; {type(tokenizer).__name__} has none")
    front = list(layout_of(tokenizer).pieces[0])
    if not s.answered:
        _prompts(w, start, chunk, tokenizer, s, front)
        return
    found = [pieces_of(example, tokenizer, template=s.template, chat=s.chat) for example in chunk]
    for row, (example, parts) in enumerate(zip(chunk, _numbered(tokenizer, found), strict=True), start):
        chat = "text" not in example.fields and uses_chat(tokenizer, s.chat)
        parts = _ended(parts, end, tokenizer.all_special_ids if chat else [end])
        if not chat and front:  # a chat template writes its own beginning
            parts.insert(0, (front, False))
        if any(not learned for ids, learned in parts if ids != front):
            _answers(w, row, example, parts, s)
        else:
            _document(w, row, example, [i for ids, _ in parts for i in ids], s)


def _document(w: FeatureWriter, row: int, example: Example, ids: list[int], s: TokenSettings) -> None:
    note_overlong(w, example, len(ids) - s.max_length, s)
    # a token is shared: the first one of a window is given, so each is learned exactly once
    for first, last in [*windows(len(ids), s.max_length, 1)][: None if s.splits else 1]:
        w.add(row, input_ids=ids[first:last], labels=ids[first:last], prompt=0)


def _answers(w: FeatureWriter, row: int, example: Example, parts: list[Part], s: TokenSettings) -> None:
    excess = sum(len(ids) for ids, _ in parts) - s.max_length
    if excess > 0 and s.overlong != "raise":
        w.count("cut")
        w.count("lost", excess)
    else:
        note_overlong(w, example, excess, s)
    if excess > 0:
        parts = _fitted(w, parts, s)
    ids = [i for part, _ in parts for i in part][: s.max_length]
    labels = [i if learned else IGNORED for part, learned in parts for i in part][: s.max_length]
    last = sum(len(part) for part, _ in parts[:-1])
    if all(label == IGNORED for label in labels[1:]):
        w.count("dropped")
        return
    w.add(row, input_ids=ids, labels=labels, prompt=min(last, s.max_length) if last < s.max_length else 0)


def _fitted(w: FeatureWriter, parts: list[Part], s: TokenSettings) -> list[Part]:
    """Return a prompt and its answer shortened; of longer talks the end is cut off by the caller."""
    given = [i for ids, learned in parts if not learned for i in ids]
    if sum(learned for _, learned in parts) > 1 or not parts[-1][1]:
        return parts
    answer = parts[-1][0]
    room = max(s.max_length - len(given), s.max_target_length)
    w.count("answers cut", int(len(answer) > room))
    answer = answer[:room]
    return [(without_middle(given, s.max_length - len(answer)), False), (answer, True)]


def _prompts(
    w: FeatureWriter, start: int, chunk: Sequence[Example], tokenizer: Any, s: TokenSettings, front: list[int]
) -> None:
    texts = [prompt_of(example, tokenizer, template=s.template, chat=s.chat) for example in chunk]
    room = s.max_length - s.max_target_length
    for row, (example, ids) in enumerate(zip(chunk, numbers(tokenizer, texts)["input_ids"], strict=True), start):
        chat = "text" not in example.fields and uses_chat(tokenizer, s.chat)
        ids = list(ids) if chat else front + list(ids)
        if len(ids) > room:
            w.count("cut")
            w.count("lost", len(ids) - room)
        w.add(row, input_ids=without_middle(ids, room), prompt=0)


def _numbered(tokenizer: Any, found: Sequence[Sequence[Piece]]) -> Iterator[list[Part]]:
    """Yield the pieces of each example as numbers; all are tokenised in one call, each by itself."""
    texts = [piece.text for pieces in found for piece in pieces]
    ids = iter(numbers(tokenizer, texts)["input_ids"])
    for pieces in found:
        yield [(list(part), piece.learned) for part, piece in zip(islice(ids, len(pieces)), pieces, strict=True)]


def _ended(parts: list[Part], end: int, closing: Sequence[int]) -> list[Part]:
    """Return the parts with the end-of-text token after each learned one that holds no closing token already."""
    marks = set(closing)
    return [([*ids, end], True) if learned and not marks & set(ids[-3:]) else (ids, learned) for ids, learned in parts]
