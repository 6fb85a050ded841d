"""Many adapters in one batch: each sample runs through its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.core.attach import Adapted, Branched, adapted_class, own_class, set_active
from visionlora.core.delta import Change, Delta
from visionlora.core.geometry import materialisable, own_output
from visionlora.errors import StateError

Changes = dict[str, list[tuple[Change, float]]]
"""Attribute -> changes and strengths, as Adapted.running holds them."""


class Route:
    """Which adapter each sample of a batch runs through; None is the base."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.size = len(names)
        self.places: dict[str | None, list[int]] = {}
        for place, name in enumerate(names):
            self.places.setdefault(name, []).append(place)

    def rows(self, x: Tensor) -> dict[str | None, Tensor]:
        """Return the rows of x of every adapter: windows and beams of one sample lie behind each other."""
        each, rest = divmod(len(x), self.size) if x.ndim else (0, 1)
        if rest or not each:
            raise StateError(
                f"{self.size} adapters are named, one a sample, and a layer got an input of shape {tuple(x.shape)}: "
                "give as many names as samples; a layer that mixes samples cannot be routed, exclude it"
            )
        inside = torch.arange(each, device=x.device)
        return {
            name: (torch.tensor(places, device=x.device).unsqueeze(1) * each + inside).flatten()
            for name, places in self.places.items()
        }


class Routed(Adapted):
    """What an adapted layer is inside `routed`, in front of what it is elsewhere."""

    way: Route
    changes_of: dict[str | None, Changes]
    inside: bool
    """Its own forward is running, so that its tensors are those of one adapter."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if any(isinstance(a, Tensor) for a in (*args, *kwargs.values())):
            raise StateError(f"a {own_class(self).__name__} takes several tensors and cannot be routed; exclude it")
        rows = self.way.rows(x)
        self.inside = True
        try:
            if not args and not kwargs and self._adds():
                return self._added(x, rows)
            return _joined({name: self._alone(name, x[at], *args, **kwargs) for name, at in rows.items()}, rows, self)
        finally:
            self.inside, self.running = False, {}

    def seen(self, attribute: str) -> Tensor | None:
        if self.inside or not any(attribute in changes for changes in self.changes_of.values()):
            return super().seen(attribute)
        stored = self.base_tensor(attribute)
        if not isinstance(self, Branched) or stored is None:
            raise StateError(
                f"the {attribute} of a {own_class(self).__name__} is read by the module around it, which has one for "
                "the whole batch: such a layer cannot be routed; run the adapters one after the other with activate"
            )
        return torch.empty_like(stored, device="meta")  # its type and shape may be asked for (T5), its numbers not

    def _norm_to_fold(self) -> None:
        return None  # the norm behind it is routed as well

    def _adds(self) -> bool:
        """Tell whether every adapter adds a branch to the layer's own output, which is then computed once."""
        stored = self._parameters.get("weight")
        return (
            isinstance(self, Branched)
            and stored is not None
            and materialisable(stored)
            and all(changes.keys() <= {"weight"} for changes in self.changes_of.values())
            and all(isinstance(c, Delta) and c.branched for own in self.changes_of.values() for c, _ in _weight(own))
        )

    def _added(self, x: Tensor, rows: dict[str | None, Tensor]) -> Tensor:
        stored = self._parameters["weight"]
        assert stored is not None
        y = own_output(self, x, stored)
        found = [(rows[name], c) for name in rows for c, _ in _weight(self.changes_of[name])]
        if not found:
            return y
        branches = torch.cat([c.branch(self, x[at], y[at]) for at, c in found])  # type: ignore[operator]
        return y.index_add(0, torch.cat([at for at, _ in found]), branches.to(y.dtype))

    def _alone(self, name: str | None, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.running = self.changes_of[name]
        y = super().forward(x, *args, **kwargs)
        if not isinstance(y, Tensor):
            raise StateError(f"a {own_class(self).__name__} gives {type(y).__name__} and cannot be routed; exclude it")
        return y


@contextmanager
def routed(layers: Iterable[Adapted], names: Sequence[str | None]) -> Iterator[None]:
    """Run each sample of a batch through its own adapter inside the with block, on these layers."""
    way, changed = Route(names), list[Adapted]()
    try:
        for layer in layers:
            if any(name is not None and name in layer.adapters for name in way.places):
                changed.append(layer)
                _enter(layer, way)
        yield
    finally:
        for layer in changed:
            _leave(layer)


def _enter(layer: Adapted, way: Route) -> None:
    layer.__class__ = adapted_class(_in_front(layer.mixin), own_class(layer), layer.changed)
    assert isinstance(layer, Routed)
    layer.way, layer.inside, layer.running = way, False, {}
    layer.changes_of = {name: _changes(layer, name) for name in way.places}


def _leave(layer: Adapted) -> None:
    layer.__class__ = adapted_class(layer.mixin, own_class(layer), layer.changed)
    for key in ("way", "inside", "changes_of"):
        delattr(layer, key)
    set_active(layer, layer.active)


def _changes(layer: Adapted, name: str | None) -> Changes:
    found = layer.adapters[name].items() if name is not None and name in layer.adapters else ()  # type: ignore[operator]
    return {attribute: [(change, 1.0)] for attribute, change in found}


def _weight(changes: Changes) -> list[tuple[Change, float]]:
    return changes.get("weight", [])


_MIXINS: dict[type, type[Adapted]] = {}


def _in_front(mixin: type[Adapted]) -> type[Adapted]:
    if mixin not in _MIXINS:
        _MIXINS[mixin] = type(f"Routed{mixin.__name__}", (Routed, mixin), {"__module__": __name__})
    return _MIXINS[mixin]


def _joined(parts: dict[str | None, Tensor], rows: dict[str | None, Tensor], layer: nn.Module) -> Tensor:
    """Return the outputs in the order of the batch; heads of fewer classes are filled up with scores of -inf."""
    dim = 1 if isinstance(layer, nn.modules.conv._ConvNd) else -1
    widest = max(part.shape[dim] for part in parts.values())
    filled = [_widened(part, dim, widest) for part in parts.values()]
    order = torch.cat([rows[name] for name in parts])
    joined = torch.cat(filled)
    return joined.new_empty(joined.shape).index_copy(0, order, joined)


def _widened(part: Tensor, dim: int, width: int) -> Tensor:
    lacking = width - part.shape[dim]
    if not lacking:
        return part
    after = (part.ndim - 1 - dim % part.ndim) * 2  # F.pad counts from the last dimension
    return F.pad(part, (0,) * (after + 1) + (lacking,), value=float("-inf"))
