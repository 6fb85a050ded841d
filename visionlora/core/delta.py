"""What one adapter does to one tensor of a layer: a computed change or a value of its own."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.core.geometry import Geometry
from visionlora.errors import StateError


class Change(nn.Module, ABC):
    """One adapter's effect on one tensor."""

    @abstractmethod
    def onto(self, total: Tensor, base: Tensor, strength: float) -> Tensor:
        """Return `total` (the base plus other adapters' changes) with this change, at a strength, added."""

    def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
        # a checkpoint of the base alone must load with strict=True while adapters are attached
        if any(key.startswith(prefix) for key in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *args)


class Delta(Change):
    """One trainable change to one weight, seen as (out, in, *kernel).

    `change` is the truth. A variant that can reach the same output more cheaply sets `branched` and defines `branch`.
    """

    branched: bool = False
    sees_output: bool = False
    """Its branch is computed from the whole layer's output, so that it cannot be one part of a fused layer."""

    def __init__(self, geometry: Geometry, rank: int, scale: float) -> None:
        super().__init__()
        self.geometry, self.rank, self.scale = geometry, rank, scale

    @abstractmethod
    def change(self, weight: Tensor) -> Tensor:
        """Return what is added to the base weight, same shape and dtype; the weight is float32 or wider."""

    def forward(self, weight: Tensor) -> Tensor:
        return self.change(weight)

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        """Return A (groups * r, in, *kernel), B (out, r, *1s) and s where the change is s B A, else None."""
        return None

    def drawn(self) -> dict[str, Tensor]:
        """Return what the change draws anew in every call, by name; given as its tensors, they make it certain."""
        return {}

    def branch(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return what is added to y, the layer's own output for x."""
        raise NotImplementedError

    def onto(self, total: Tensor, base: Tensor, strength: float) -> Tensor:
        canonical, stored = self.geometry.canonical, self.geometry.stored
        change = self.change(canonical(base))
        return total + stored(change if strength == 1 else strength * change)


class Parts(Delta):
    """Separate changes of some row ranges of a fused weight: q and v of a qkv projection."""

    def __init__(self, geometry: Geometry, parts: dict[str, tuple[int, Delta]]) -> None:
        deltas = {name: delta for name, (_, delta) in parts.items()}
        super().__init__(geometry, next(iter(deltas.values())).rank, next(iter(deltas.values())).scale)
        self.deltas = nn.ModuleDict(deltas)
        self.branched = all(delta.branched and not delta.sees_output for delta in deltas.values())
        self.starts = {name: start for name, (start, _) in parts.items()}

    def _rows(self) -> list[tuple[int, Delta]]:
        return [(self.starts[name], delta) for name, delta in self.deltas.items()]  # type: ignore[misc]

    def drawn(self) -> dict[str, Tensor]:
        return {
            f"deltas.{part}.{key}": tensor
            for part, delta in self.deltas.items()
            for key, tensor in delta.drawn().items()  # type: ignore[operator]
        }

    def factors(self) -> tuple[Tensor, Tensor, float] | None:
        found = [(start, delta, delta.factors()) for start, delta in self._rows()]
        pairs = [(start, delta, *factors) for start, delta, factors in found if factors is not None]
        if len(pairs) != len(found) or self.geometry.groups > 1:
            return None
        ups = [
            F.pad(B.flatten(1) * scale, (0, 0, start, self.geometry.out - start - delta.geometry.out))
            for start, delta, _, B, scale in pairs
        ]
        return torch.cat([A for _, _, A, *_ in pairs]), torch.cat(ups, dim=1), 1.0

    def change(self, weight: Tensor) -> Tensor:
        out = torch.zeros_like(weight)
        for start, delta in self._rows():
            rows = slice(start, start + delta.geometry.out)
            out[rows] = delta.change(weight[rows])
        return out

    def branch(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        channels = 1 if self.geometry.kind == "conv" else y.ndim - 1
        rows = sorted(self._rows(), key=lambda row: row[0])
        pieces, end = [], 0
        for start, delta in rows:
            piece = delta.branch(layer, x, y)
            pieces += [_zeros(piece, channels, start - end), piece]
            end = start + delta.geometry.out
        return torch.cat([*pieces, _zeros(piece, channels, self.geometry.out - end)], dim=channels)


class Value(Change):
    """A tensor of the layer replaced by the adapter's own: head, bias, normalisation.

    At strength t the layer sees start + t * (value - start). The start is the base's tensor, or, for a head that the
    base does not know (fresh classes), a stored one.
    """

    def __init__(self, value: Tensor, *, trainable: bool, start: Tensor | None = None, additive: bool = False) -> None:
        super().__init__()
        self.trainable = trainable
        self.additive = additive
        """Several adapters may change the tensor at once: their differences from the base add up."""
        self.anchored = True
        """False: the base's tensor is not the one this value was trained from, so only strength 1 has a meaning."""
        if trainable:
            self.value = nn.Parameter(value.detach().clone())
        else:
            self.register_buffer("value", value.detach().clone())
        self.register_buffer("start", None if start is None else start.detach().clone())

    value: Tensor
    start: Tensor | None

    def onto(self, total: Tensor, base: Tensor, strength: float) -> Tensor:
        if total is not base and self.additive:
            return total + strength * (self.value - base)
        if total is not base:
            raise StateError("two active adapters own the same head, bias or normalisation; activate one of them")
        if strength == 1:
            return self.value
        start = base if self.start is None else self.start
        if not self.anchored or start.shape != self.value.shape:
            raise StateError(
                f"strength {strength} needs the tensor this adapter was trained from, which this base does not have "
                "(another head); use strength 1"
            )
        return torch.lerp(start.to(self.value.dtype), self.value, strength)


def _zeros(like: Tensor, dim: int, size: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = size
    return like.new_zeros(shape)
