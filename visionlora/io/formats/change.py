"""What a file of another library says of one layer, and of all of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

DENSE = "dense"
"""A change that none of our variants holds: its one tensor, "change", is the whole of it in float64."""


@dataclass(frozen=True)
class LayerChange:
    """The change of one layer's weight, in the words of our variants."""

    variant: str
    rank: int
    scale: float
    tensors: dict[str, Tensor]
    """As adapter_state names them. An "m" beside another variant than DoRA makes DoRA of its change."""
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Row ranges of a fused layer, where the tensors are named deltas.<part>.<tensor>."""


@dataclass(frozen=True)
class Imported:
    """An adapter read from another library's file, not yet on a model."""

    layers: dict[str, LayerChange]
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Tensors owned in full: layer name -> attribute -> tensor."""
    notes: list[str] = field(default_factory=list)
    """What a user should know of the reading."""
