"""Whole entities in tagged words: where they begin, where they end, how many of them are right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

__all__ = ["entities", "entity_f1"]


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Return (kind, first word, word after the last) of each entity; B-, I-, E-, S- and O are read as conlleval does.

    >>> sorted(entities(["B-PER", "I-PER", "O", "I-LOC"]))
    [('LOC', 3, 4), ('PER', 0, 2)]
    """
    found, start, open_kind = set(), 0, ""
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        goes_on = prefix in ("I", "E") and kind == open_kind and open_kind != ""
        if not goes_on:
            if open_kind:
                found.add((open_kind, start, i))
            start, open_kind = i, kind if prefix in ("B", "I", "E", "S") else ""
        if prefix in ("E", "S") and open_kind:
            found.add((open_kind, start, i + 1))
            open_kind = ""
    return found


def entity_f1(words: Iterable[tuple[int, int, int, int]], names: Sequence[str]) -> float:
    """Return the micro F1 of whole entities; words are (row, word, right tag, found tag), sorted."""
    right = wanted = given = 0
    for _, group in groupby(words, key=lambda word: word[0]):
        row = list(group)
        true, found = (entities([names[word[column]] for word in row]) for column in (2, 3))
        right, wanted, given = right + len(true & found), wanted + len(true), given + len(found)
    return 2 * right / (wanted + given) if wanted + given else 0.0
