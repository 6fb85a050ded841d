"""What a combination of adapters kept of each layer, as numbers and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum, sqrt

from visionlora.core.thin import Cut
from visionlora.overview import table


@dataclass(frozen=True)
class Layer:
    """One layer of the new adapter."""

    name: str
    adapters: tuple[str, ...]
    """Those that change this layer."""
    rank: int
    norm: float
    """Frobenius norm of the merged change before it was cut to the rank."""
    lost: float
    """Frobenius norm of what the cut left out."""

    @property
    def error(self) -> float:
        """Relative Frobenius error of the layer's change; 0 is exact."""
        return self.lost / self.norm if self.norm else 0.0


@dataclass(frozen=True)
class Combination:
    """How a new adapter came about. `str(combination)` is a table."""

    name: str
    method: str
    weights: dict[str, float]
    layers: tuple[Layer, ...]
    owned: dict[str, int]
    """Numbers owned in full by role: "head", "norm", "bias", "saved"."""

    @property
    def error(self) -> float:
        """Relative Frobenius error over all layers."""
        total = fsum(layer.norm**2 for layer in self.layers)
        return sqrt(fsum(layer.lost**2 for layer in self.layers) / total) if total else 0.0

    def __str__(self) -> str:
        cells = [
            (n.name, f"{len(n.adapters)} of {len(self.weights)}", str(n.rank), f"{n.norm:.4g}", f"{n.error:.2%}")
            for n in self.layers
        ]
        cells += [(f"({role}, in full)", "", "", "", "") for role in self.owned]
        lines = table(("layer", "adapters", "rank", "change", "error"), cells, right=(2, 3, 4))
        return "\n".join([*lines, "", self.totals()])

    def totals(self) -> str:
        """Return the closing line."""
        terms = " ".join(f"{weight:+g} {name}" for name, weight in self.weights.items())
        return f"{self.name} = {terms} by {self.method}: {len(self.layers)} layers, relative error {self.error:.2%}"


def layer_of(name: str, adapters: Sequence[str], rank: int, cuts: Sequence[Cut]) -> Layer:
    """Return the report of one layer, whose parts were cut one by one."""
    norm, lost = (sqrt(fsum(getattr(cut, field) for cut in cuts)) for field in ("total", "dropped"))
    return Layer(name, tuple(adapters), rank, norm, lost)
