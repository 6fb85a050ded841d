"""Ways to merge several changes of one weight into one: which entries of each are kept, and how they are summed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Keep = Callable[[Tensor, float, torch.Generator], Tensor]
"""(change, density, random numbers) -> the change with the other entries set to zero."""
Merge = Callable[[Sequence[Tensor], Sequence[float]], Tensor]
"""(changes, weights) -> one change."""


@dataclass(frozen=True)
class Method:
    """How dense changes are merged."""

    keep: Keep | None
    """None: every entry is kept, and density has no meaning."""
    merge: Merge
    averages: bool
    """It averages over the adapters, so that weights of 1 are the rule, and negative ones have no meaning."""


def trim(change: Tensor, density: float, random: torch.Generator) -> Tensor:
    """Keep the largest entries by magnitude (Yadav et al. 2023, arXiv:2306.01708, section 4)."""
    flat = change.flatten()
    kept = flat.abs().topk(max(1, int(density * len(flat)))).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(change)


def drop(change: Tensor, density: float, random: torch.Generator) -> Tensor:
    """Keep entries at random and scale them up: the same change on average (Yu et al. 2023, arXiv:2311.03099)."""
    kept = torch.rand(change.shape, dtype=change.dtype, generator=random) < density
    return change * kept / density


def weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Add the changes (task arithmetic, Ilharco et al. 2022, arXiv:2212.04089)."""
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total += weight * change
    return total


def disjoint_mean(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Average, entry by entry, the weighted changes that agree with the elected sign (arXiv:2306.01708, section 4).

    The sign is that of the unweighted sum; changes that are zero there, or of the other sign, are not counted.
    """
    stacked = torch.stack(list(changes))
    elected = torch.where(stacked.sum(dim=0) >= 0, 1, -1)
    agree = stacked.sign() == elected
    weight = stacked.new_tensor(weights).view(-1, *[1] * changes[0].ndim)
    return (weight * stacked * agree).sum(dim=0) / agree.sum(dim=0).clamp(min=1)


METHODS: dict[str, Method] = {
    "concat": Method(None, weighted_sum, averages=False),
    "svd": Method(None, weighted_sum, averages=False),
    "magnitude_prune": Method(trim, weighted_sum, averages=False),
    "dare_linear": Method(drop, weighted_sum, averages=False),
    "ties": Method(trim, disjoint_mean, averages=True),
    "dare_ties": Method(drop, disjoint_mean, averages=True),
}
"""All but "concat", which keeps every rank, end with a cut to the rank asked for."""
