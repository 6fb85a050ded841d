"""Averages of what adapters own in full: tensors around their common start, and statistics of several domains."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import fsum

import torch
from torch import Tensor

from visionlora.errors import StateError

_SUMS_TO_ONE = 1e-6


@dataclass(frozen=True)
class Average:
    """A merged tensor and what strength 0 of it is."""

    value: Tensor
    start: Tensor | None
    """None: not known, so that only strength 1 has a meaning."""


def average(values: Mapping[str, Tensor], starts: Mapping[str, Tensor | None], weights: Mapping[str, float]) -> Average:
    """Return start + the weighted sum of (value - start), the start being common to all.

    Where it is not (heads for new classes that each began at random), weights that sum to 1 still have a meaning: the
    average of the values. Raises StateError for other weights.
    """
    known = [start for start in starts.values() if start is not None]
    if len(known) == len(values) and all(torch.equal(start, known[0]) for start in known):
        return Average(known[0] + _sum({n: v - known[0] for n, v in values.items()}, weights), known[0])
    total = fsum(weights[name] for name in values)
    if abs(total - 1) > _SUMS_TO_ONE:
        raise StateError(
            "they were trained from different starting values, so only an average of them has a meaning: their shares "
            f"must sum to 1, and sum to {total:g} (a share is the weight; with ties and dare_ties, weight / adapters)"
        )
    start = _sum(dict(zip(starts, known, strict=True)), weights) if len(known) == len(values) else None
    return Average(_sum(values, weights), start)


def mixture(
    means: Mapping[str, Tensor],
    variances: Mapping[str, Tensor],
    weights: Mapping[str, float],
    base: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """Return mean and variance of the images of all adapters together, mixed in proportion to the weights.

    By the law of total variance; a weighted sum of variances could be negative, and an average of them would leave out
    how far the domains lie apart. Weights that sum to less than 1 leave the rest to the base's images; of a larger sum
    only the proportion counts. Raises StateError for a negative weight.
    """
    if min(weights.values()) < 0:
        raise StateError("images cannot be mixed by a negative weight")
    total = max(1.0, fsum(weights.values()))
    shares = {name: weight / total for name, weight in weights.items()}
    rest = 1 - fsum(shares.values())
    mean = _sum(means, shares) + rest * base[0]
    spread = {name: variances[name] + (means[name] - mean).square() for name in means}
    return mean, _sum(spread, shares) + rest * (base[1] + (base[0] - mean).square())


def _sum(tensors: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    first, *others = tensors
    total = weights[first] * tensors[first]
    for name in others:
        total = total + weights[name] * tensors[name]
    return total
