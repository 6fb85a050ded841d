"""How far two adapters of one base differ, change by change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt

from torch import Tensor, nn

from visionlora.core.delta import Delta
from visionlora.io.formats.factors import dense_change
from visionlora.io.formats.written import deltas, values

Changes = dict[tuple[str, str], Callable[[], tuple[Tensor, float]]]
"""(layer, attribute) -> what gives its change in float64 and the norm of its base: one layer at a time is in memory."""


def difference(model: nn.Module, name: str, other: nn.Module, other_name: str) -> tuple[float, dict[str, float]]:
    """Return how much of an adapter's change another one lacks, relative to the whole, and the same layer by layer.

    A layer's own share is measured against its change, or against a millionth of its base where the change is smaller:
    there it is rounding.
    """
    one, two = _changes(model, name), _changes(other, other_name)
    shares: dict[str, float] = {}
    lost = whole = 0.0
    for key in one.keys() | two.keys():
        change, base = (one.get(key) or two[key])()
        change = change if key in one else change * 0
        error = float((change - two[key]()[0]).norm() if key in two else change.norm())
        size = float(change.norm())
        layer = key[0]
        shares[layer] = max(shares.get(layer, 0.0), error / max(size, 1e-6 * base, 1e-30))
        lost, whole = lost + error**2, whole + size**2
    return sqrt(lost / max(whole, 1e-60)), shares


def _changes(model: nn.Module, name: str) -> Changes:
    found: Changes = {}
    for site, delta, weight in deltas(model, name):
        found[site.layer, site.attribute] = partial(_of_delta, delta, weight)
    for layer, attribute, value, base in values(model, name):
        found[layer, attribute] = partial(_of_value, value, base)
    return found


def _of_delta(delta: Delta, weight: Tensor) -> tuple[Tensor, float]:
    return delta.geometry.stored(dense_change(delta, weight)), float(weight.norm())


def _of_value(value: Tensor, base: Tensor) -> tuple[Tensor, float]:
    return value.double() - base.double(), float(base.double().norm())
