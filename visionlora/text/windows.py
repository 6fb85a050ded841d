"""Cutting token lists to a length: windows that overlap, a middle left out, the longer of two first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from visionlora.errors import ConfigError, DataError
from visionlora.text.columns import Example
from visionlora.text.features import FeatureWriter
from visionlora.text.settings import TokenSettings

__all__ = ["longest_first", "note_overlong", "room_for", "span_of", "windows", "without_middle", "words_at"]


def windows(length: int, room: int, shared: int = 0) -> Iterator[tuple[int, int]]:
    """Yield (first, last) of windows over a length, each of at most room tokens, sharing some with the one before."""
    first = 0
    while True:
        yield first, min(first + room, length)
        if first + room >= length:
            return
        first += room - shared


def without_middle(ids: list[int], room: int) -> list[int]:
    """Return the tokens without so many of the middle that they fit: an instruction stands at an end of a prompt."""
    if len(ids) <= room:
        return ids
    tail = room // 2
    return ids[: room - tail] + ids[len(ids) - tail :]


def longest_first(lengths: Sequence[int], room: int) -> list[int]:
    """Return how much of one text or two is kept: the longer one loses until both fit."""
    if len(lengths) == 1 or sum(lengths) <= room:
        return [min(n, room) for n in lengths]
    shorter = min(*lengths, room // 2)
    longer = room - shorter
    return [shorter if n == min(lengths) and (i == 0 or lengths[0] > n) else longer for i, n in enumerate(lengths)]


def room_for(left: int, settings: TokenSettings) -> int:
    """Return the tokens that special tokens leave. Raises ConfigError if there are none."""
    if left < 2:
        raise ConfigError(
            f"max_length {settings.max_length} leaves no room for text beside the special tokens: raise it"
        )
    return left


def note_overlong(writer: FeatureWriter, example: Example, excess: int, settings: TokenSettings) -> None:
    """Count an example that is too long by some tokens; with overlong="raise" raise DataError."""
    if excess <= 0:
        return
    if settings.overlong == "raise":
        cure = "raise max_length, or let overlong cut or split it"
        raise DataError(f"{example.place}: {excess} tokens too long for max_length {settings.max_length}: {cure}")
    if settings.splits:
        writer.count("split")
    else:
        writer.count("cut")
        writer.count("lost", excess)


def span_of(offsets: Sequence[tuple[int, int]], answers: Mapping[str, Sequence[Any]]) -> tuple[int, int] | None:
    """Return the first and last token of the first answer; None where there is none, or none of its tokens."""
    if not answers["text"]:
        return None
    start = answers["answer_start"][0]
    end = start + len(answers["text"][0])
    inside = [at for at, (a, b) in enumerate(offsets) if a < end and b > start and b > a]
    return (inside[0], inside[-1]) if inside else None


def words_at(words: Sequence[str], offsets: Sequence[tuple[int, int]]) -> list[int]:
    """Return which word each token of the words, joined by spaces, ends in; a lone space goes to the word after it."""
    text, of_character = " ".join(words), [0] * len(words[0])
    for number, word in enumerate(words[1:], 1):
        of_character += [number] * (1 + len(word))
    ends = [max(start, start + len(text[start:end].rstrip()) - 1) for start, end in offsets]
    return [of_character[end] for end in ends]
