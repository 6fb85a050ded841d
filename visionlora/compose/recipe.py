"""How changes are merged and cut: the options of `combine`, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from visionlora.compose.methods import METHODS, Method, weighted_sum
from visionlora.compose.pieces import Piece, dense
from visionlora.config import did_you_mean
from visionlora.core.thin import Cut, Thin, cut, joined
from visionlora.errors import ConfigError

DENSITY = 0.5
"""Share of the entries that are kept, where a method drops some and nothing else is said."""


@dataclass(frozen=True)
class Recipe:
    """A method with its settings."""

    name: str
    rank: int | None
    """None: as large as the largest of the merged adapters, layer by layer."""
    density: float
    random: torch.Generator

    @property
    def method(self) -> Method:
        return METHODS[self.name]

    def thinned(self, change: Tensor) -> Tensor:
        """Return the entries of one adapter's change that take part."""
        return change if self.method.keep is None else self.method.keep(change, self.density, self.random)

    def merged(self, changes: Sequence[Piece], weights: Sequence[float], rank: int) -> Cut:
        """Return the merge of changes of one block of a weight."""
        change = self._sum(changes, weights)
        if self.name != "concat":
            return cut(change, rank)
        rows, columns = (change.B.shape[1], change.A.shape[2]) if isinstance(change, Thin) else change.shape[1:]
        if isinstance(change, Thin) and change.rank <= min(rows, columns):
            return Cut(change, 0.0, change.square())
        return cut(change, min(rows, columns))  # dense changes, or more rank than the layer has: exact all the same

    def _sum(self, changes: Sequence[Piece], weights: Sequence[float]) -> Piece:
        thin = [change.times(w) for change, w in zip(changes, weights, strict=True) if isinstance(change, Thin)]
        if self.method.merge is weighted_sum and len(thin) == len(changes):
            return joined(thin)
        return self.method.merge([dense(change) for change in changes], weights)


def make_recipe(method: str, weights: Sequence[float], rank: int | None, density: float | None, seed: int) -> Recipe:
    """Return the recipe. Raises ConfigError for settings that cannot work together."""
    if check_method(method).averages and min(weights) < 0:
        signed = [name for name, known in METHODS.items() if not known.averages]
        raise ConfigError(
            f"{method} elects a sign for every entry before it weighs, so weights must be positive, got "
            f"{min(weights):g}; {', '.join(signed)} can subtract an adapter"
        )
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ConfigError(f"rank must be a whole number of at least 1, got {rank!r}")
    if rank is not None and method == "concat":
        raise ConfigError(f'concat is exact and keeps every rank; for rank {rank} use method="svd"')
    if density is not None and METHODS[method].keep is None:
        sparse = [name for name, known in METHODS.items() if known.keep is not None]
        raise ConfigError(f"{method} keeps every entry, density belongs to {', '.join(sparse)}")
    if density is not None and not (_is_number(density) and 0 < density <= 1):
        raise ConfigError(f"density, the share of entries kept, must be above 0 and at most 1, got {density!r}")
    return Recipe(method, rank, DENSITY if density is None else density, torch.Generator().manual_seed(seed))


def check_method(method: str) -> Method:
    """Return a method by its name."""
    if method not in METHODS:
        near = did_you_mean(method, list(METHODS))
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}{near}")
    return METHODS[method]


def check_number(what: str, value: object) -> float:
    """Return a value that is a finite number."""
    if not _is_number(value):
        raise ConfigError(f"{what} must be a finite number, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
