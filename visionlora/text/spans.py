"""From scores of starts and ends to answers: the best span over all windows of a context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Candidate", "best_answers", "candidates"]

_BEST = 20
"""Likeliest starts and ends that are paired."""


@dataclass(frozen=True)
class Candidate:
    """What one window of a context offers as the answer to its question."""

    example: str
    score: float
    """Logit of the start and of the end, added; -inf where the window has no span at all."""
    span: tuple[int, int]
    """Characters of the context."""
    null: float
    """The same for no answer, which points at the window's first token."""


def candidates(logits: Tensor, batch: Mapping[str, Any], *, most_tokens: int) -> list[Candidate]:
    """Return the best span of every window of a batch; logits are (batch, tokens, 2: start and end).

    `batch["offset_mapping"]` holds (first, last) characters of a token of the context and None for all others.
    """
    rows = zip(batch["example_id"], batch["offset_mapping"], logits.float().cpu(), strict=True)
    return [_best(example, offsets, scores, most_tokens) for example, offsets, scores in rows]


def best_answers(
    found: Sequence[Candidate], contexts: Mapping[str, str], null_threshold: float | None = None
) -> dict[str, str]:
    """Return the answer of each example. With a threshold no answer ("") wins where it scores more than that above."""
    best: dict[str, Candidate] = {}
    null: dict[str, float] = {}
    for candidate in found:
        held = best.get(candidate.example)
        if held is None or candidate.score > held.score:
            best[candidate.example] = candidate
        # a question has no answer if no window has one
        null[candidate.example] = min(candidate.null, null.get(candidate.example, candidate.null))
    silent = {k for k, c in best.items() if null_threshold is not None and null[k] - c.score > null_threshold}
    return {k: "" if k in silent else contexts[k][c.span[0] : c.span[1]] for k, c in best.items()}


def _best(example: str, offsets: Sequence[Any], scores: Tensor, most_tokens: int) -> Candidate:
    null = float(scores[0].sum())
    inside = torch.tensor([i for i, offset in enumerate(offsets) if offset is not None and offset[1] > offset[0]])
    if not len(inside):
        return Candidate(example, float("-inf"), (0, 0), null)
    starts, ends = (_likeliest(scores[:, side], inside) for side in (0, 1))
    length = ends[None] - starts[:, None]  # (starts, ends)
    total = scores[starts, 0][:, None] + scores[ends, 1][None]
    total = total.masked_fill((length < 0) | (length >= most_tokens), float("-inf"))
    if not torch.isfinite(total).any():  # every likely end lies before every likely start: one token then
        starts = ends = inside
        total = (scores[inside, 0] + scores[inside, 1]).diag_embed() + _off_diagonal(len(inside))
    start, end = divmod(int(total.argmax()), total.shape[1])
    span = (int(offsets[starts[start]][0]), int(offsets[ends[end]][1]))
    return Candidate(example, float(total.max()), span, null)


def _likeliest(scores: Tensor, inside: Tensor) -> Tensor:
    return inside[scores[inside].topk(min(_BEST, len(inside))).indices]


def _off_diagonal(size: int) -> Tensor:
    return torch.full((size, size), float("-inf")).fill_diagonal_(0)
