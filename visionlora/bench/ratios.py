"""What a record says: ratios of every variant of a model to its floor, and means over models."""

from __future__ import annotations

from collections.abc import Mapping
from math import exp, log
from typing import Any

from visionlora.bench.spread import Ratio, ratio

FIGURES = ("saved_bytes", "peak_bytes", "operations", "moved_bytes", "flops")
"""Deterministic figures of which less is better."""


def times(samples: list[dict[str, float]], parts: tuple[str, ...] = ("forward", "backward")) -> list[float]:
    """Return the milliseconds of every round, the parts of a step added up."""
    return [sum(sample[part] for part in parts) for sample in samples]


def to(model: Mapping[str, Any], variant: str, other: str, *, optimiser: bool = False) -> Ratio | None:
    """Return the time of one variant of a model over that of another, or None where one of them was not timed."""
    samples = model["samples"]
    if variant not in samples or other not in samples:
        return None
    parts = ("forward", "backward", *(("optimiser",) if optimiser else ()))
    return ratio(times(samples[variant], parts), times(samples[other], parts))


def counted(model: Mapping[str, Any], variant: str, other: str, figure: str) -> float | None:
    """Return a deterministic figure of one variant over that of another."""
    counts = model["counts"]
    if variant not in counts or other not in counts or not counts[other][figure]:
        return None
    return float(counts[variant][figure] / counts[other][figure])


def mean(values: list[float]) -> float:
    """Return the geometric mean."""
    return exp(sum(map(log, values)) / len(values))
