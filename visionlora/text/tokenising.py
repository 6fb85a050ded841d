"""From examples to token numbers, a task at a time; what does not fit is cut or split, and counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from visionlora.errors import DataError
from visionlora.text.causal import causal
from visionlora.text.columns import Example, TaskType
from visionlora.text.features import Features, FeatureWriter
from visionlora.text.labels import label_value
from visionlora.text.layout import Layout, layout_of, numbers
from visionlora.text.prompts import fill
from visionlora.text.settings import IGNORED, TokenSettings
from visionlora.text.windows import longest_first, note_overlong, room_for, span_of, windows, words_at

__all__ = ["tokenise"]

CHUNK = 1000


def tokenise(examples: Sequence[Example], tokenizer: Any, settings: TokenSettings) -> Features:
    """Return the features of some examples; the column row tells which one each comes of. Raises DataError."""
    writer = FeatureWriter()
    writer.counts["examples"] = len(examples)
    for start in range(0, len(examples), CHUNK):
        TASK[settings.task](writer, start, examples[start : start + CHUNK], tokenizer, settings)
    features = writer.features()
    if not len(features):
        raise DataError(f"nothing to learn is left of {len(examples)} examples at max_length {settings.max_length}")
    return features


def texts(w: FeatureWriter, start: int, chunk: Sequence[Example], tokenizer: Any, s: TokenSettings) -> None:
    """Add texts, alone or in pairs, with their labels."""
    number = {name: at for at, name in enumerate(s.names)}
    pairs = [e.fields["text_pair"] for e in chunk if "text_pair" in e.fields]
    layouts = [layout_of(tokenizer), *([layout_of(tokenizer, 2)] if pairs else [])]
    firsts = numbers(tokenizer, [e.fields["text"] for e in chunk])["input_ids"]
    seconds = iter(numbers(tokenizer, pairs)["input_ids"] if pairs else ())
    for row, (example, first) in enumerate(zip(chunk, firsts, strict=True), start):
        ids = [first, next(seconds)] if "text_pair" in example.fields else [first]
        layout = layouts[len(ids) - 1]
        room = room_for(s.max_length - layout.size, s)
        note_overlong(w, example, sum(map(len, ids)) - room, s)
        ids = [part[:keep] for part, keep in zip(ids, longest_first([*map(len, ids)], room), strict=True)]
        label = {"labels": label_value(example, s.problem, number)} if s.answered else {}
        w.add(row, **_around(layout, *ids), **label)


def tagged(w: FeatureWriter, start: int, chunk: Sequence[Example], tokenizer: Any, s: TokenSettings) -> None:
    """Add lists of words; the first token of a word carries its tag, the others none."""
    layout, number = layout_of(tokenizer), {name: at for at, name in enumerate(s.names)}
    room = room_for(s.max_length - layout.size, s)
    # as a sentence, not word by word: the word pieces of GPT-2's kind begin with the space before a word
    encoded = numbers(tokenizer, [" ".join(e.fields["tokens"]) for e in chunk], return_offsets_mapping=True)
    for at, (example, ids, offsets) in enumerate(
        zip(chunk, encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ):
        words = words_at(example.fields["tokens"], offsets)
        w.count("words without tokens", len(example.fields["tokens"]) - len(set(words)))
        firsts = [-1 if i and words[i - 1] == word else word for i, word in enumerate(words)]
        tags = [number[tag] for tag in example.fields["tags"]] if s.answered else []
        note_overlong(w, example, len(ids) - room, s)
        for first, last in [*windows(len(ids), room)][: None if s.splits else 1]:
            part = firsts[first:last]
            columns = {"word_ids": _padded(layout, part, -1)}
            if s.answered:
                columns["labels"] = _padded(layout, [tags[i] if i >= 0 else IGNORED for i in part], IGNORED)
            w.add(start + at, **_around(layout, ids[first:last]), **columns)


def questions(w: FeatureWriter, start: int, chunk: Sequence[Example], tokenizer: Any, s: TokenSettings) -> None:
    """Add questions, each with every window of its context; a window without the answer points at the null answer."""
    layout = layout_of(tokenizer, 2)
    asked = numbers(tokenizer, [e.fields["question"].strip() for e in chunk])["input_ids"]
    contexts = numbers(tokenizer, [e.fields["context"] for e in chunk], return_offsets_mapping=True)
    half = (s.max_length - layout.size) // 2
    for at, (example, question) in enumerate(zip(chunk, asked, strict=True)):
        ids, offsets = contexts["input_ids"][at], contexts["offset_mapping"][at]
        w.count("questions cut", int(len(question) > half))
        question = question[:half]
        room = room_for(s.max_length - layout.size - len(question), s)
        note_overlong(w, example, len(ids) - room, s)
        answers = example.fields.get("answers") if s.answered else None
        span = span_of(offsets, answers) if answers else None
        w.count("answers out of tokens", int(bool(answers and answers["text"]) and span is None))
        for first, last in [*windows(len(ids), room, min(s.stride, room // 2))][: None if s.splits else 1]:
            places = [(-1, -1)] * len(layout.around(question, []))
            before = len(layout.pieces[0]) + len(question) + len(layout.pieces[1])
            places[before:before] = offsets[first:last]
            columns: dict[str, Any] = {"offsets": [n for place in places for n in place]}
            if answers is not None:
                columns |= _positions(span, first, last, before, _null(layout, tokenizer))
            w.add(start + at, **_around(layout, question, ids[first:last]), **columns)


def pairs(w: FeatureWriter, start: int, chunk: Sequence[Example], tokenizer: Any, s: TokenSettings) -> None:
    """Add sources with the targets to write."""
    layout, aim = layout_of(tokenizer), layout_of(tokenizer, target=True)
    room = room_for(s.max_length - layout.size, s)
    given = [fill(s.template, e.fields) if s.template else e.fields["source"] for e in chunk]
    sources = numbers(tokenizer, given)["input_ids"]
    wanted = [e.fields["target"] for e in chunk] if s.answered else []
    targets = numbers(tokenizer, wanted, target=True)["input_ids"] if wanted else []
    for at, (example, source) in enumerate(zip(chunk, sources, strict=True)):
        if not source:
            raise DataError(f"{example.place}: the template gives an empty text")
        note_overlong(w, example, len(source) - room, s)
        columns = {}
        if s.answered:
            target = aim.around(targets[at])
            w.count("answers cut", int(len(target) > s.max_target_length))
            # a target that is cut does not end there: its end token goes too
            columns["labels"] = target[: s.max_target_length]
        w.add(start + at, **_around(layout, source[:room]), **columns)


TASK: dict[TaskType, Callable[[FeatureWriter, int, Sequence[Example], Any, TokenSettings], None]] = {
    "SEQ_CLS": texts,
    "TOKEN_CLS": tagged,
    "QUESTION_ANS": questions,
    "CAUSAL_LM": causal,
    "SEQ_2_SEQ_LM": pairs,
}


def _around(layout: Layout, *ids: Sequence[int]) -> dict[str, list[int]]:
    kinds = layout.types_around(*ids)
    return {"input_ids": layout.around(*ids), **({"token_type_ids": kinds} if kinds else {})}


def _padded(layout: Layout, values: Sequence[int], filling: int) -> list[int]:
    before, after = (len(piece) for piece in layout.pieces)
    return [filling] * before + [*values] + [filling] * after


def _positions(span: tuple[int, int] | None, first: int, last: int, before: int, null: int) -> dict[str, int]:
    inside = span is not None and first <= span[0] and span[1] < last
    start, end = (span[0] - first + before, span[1] - first + before) if span is not None and inside else (null, null)
    return {"start_positions": start, "end_positions": end}


def _null(layout: Layout, tokenizer: Any) -> int:
    """Return the place that means "no answer": the classification token, else the first token."""
    front = layout.pieces[0]
    return front.index(tokenizer.cls_token_id) if tokenizer.cls_token_id in front else 0
