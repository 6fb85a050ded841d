"""Measure one adapter at several strengths: how much of the target is kept while the source comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from visionlora.adapt import activate, disabled
from visionlora.compose.recipe import check_number
from visionlora.config import did_you_mean
from visionlora.errors import ConfigError
from visionlora.overview import table
from visionlora.registry import check_known_name

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Sweep:
    """Metrics by strength. `str(sweep)` is a table."""

    name: str
    rows: tuple[tuple[float, dict[str, float]], ...]
    """(strength, metrics), in the order they were measured."""

    def best(self, metric: str) -> float:
        """Return the strength with the largest value of a metric; the smaller strength of two equals."""
        known = list(self.rows[0][1])
        if metric not in known:
            raise ConfigError(f"no metric {metric!r}{did_you_mean(metric, known)}; measured were {', '.join(known)}")
        return min(self.rows, key=lambda row: (-row[1][metric], row[0]))[0]

    def __str__(self) -> str:
        known = list(self.rows[0][1])
        cells = [(f"{strength:g}", *(f"{metrics[key]:.4g}" for key in known)) for strength, metrics in self.rows]
        return "\n".join(table((f"strength of {self.name}", *known), cells, right=range(1 + len(known))))


def sweep(
    model: nn.Module, name: str, strengths: Iterable[float], evaluate: Callable[[nn.Module], float | Metrics]
) -> Sweep:
    """Return what `evaluate(model)` measures at every strength; 0 is the base, 1 the adapter (arXiv:2109.01903).

    `evaluate` returns one number, or several by name: {"target": 0.91, "source": 0.87}. It runs without gradients. The
    model is left as it was, with the adapters active that were active before, whatever happens.
    """
    check_known_name(model, name)
    chosen = [check_number("a strength", strength) for strength in strengths]
    if not chosen:
        raise ConfigError("expected at least one strength")
    grads = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    rows = []
    try:
        with disabled(model), torch.no_grad():
            for strength in chosen:
                measured = evaluate(activate(model, name, strength))
                metrics = measured if isinstance(measured, Mapping) else {"metric": float(measured)}
                rows.append((strength, dict(metrics)))
    finally:
        for parameter, required in grads:
            parameter.requires_grad_(required)
    return Sweep(name, tuple(rows))
