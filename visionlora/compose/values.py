"""Heads, biases and normalisation of several adapters, merged: the tensors an adapter owns in full."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from visionlora.compose.averages import Average, average, mixture
from visionlora.compose.pieces import wide
from visionlora.config import did_you_mean
from visionlora.core.attach import Adapted
from visionlora.core.delta import Value
from visionlora.core.norms import STATISTICS
from visionlora.errors import ConfigError, StateError
from visionlora.plan import Role, base_tensor
from visionlora.registry import adapter_plan

CHOICES = ("average", "first", "base")
"""What `head` and `norm` can be, besides the name of an adapter."""


@dataclass
class Owned:
    """The tensors that the merged adapter owns in full."""

    roles: dict[str, dict[str, Role]] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """{"layer/attribute/value" or ".../start": tensor}, as adapter_state names them."""
    unanchored: list[tuple[str, str]] = field(default_factory=list)
    """(layer, attribute) whose starting value is not known."""

    def put(self, layer: str, attribute: str, role: Role, value: Tensor, start: Tensor | None) -> None:
        """Add one tensor."""
        self.roles.setdefault(layer, {})[attribute] = role
        self.tensors[f"{layer}/{attribute}/value"] = value
        if start is not None:
            self.tensors[f"{layer}/{attribute}/start"] = start


def source_of(choice: str, names: list[str], what: str) -> str | None:
    """Return the adapter whose tensors are taken over ("base": none is), None for an average."""
    known = [*CHOICES, *names]
    if choice not in known:
        raise ConfigError(f"{what} must be one of {', '.join(known)}, got {choice!r}{did_you_mean(choice, known)}")
    if choice == "first":
        return names[0]
    return None if choice == "average" else choice


def merged_values(model: nn.Module, weights: Mapping[str, float], *, head: str, norm: str) -> Owned:
    """Return the tensors of the adapters merged. Raises StateError, naming layer and cure, where they have no sum."""
    names = list(weights)
    sources = {"head": source_of(head, names, "head"), "norm": source_of(norm, names, "norm")}
    merged = Owned()
    plans = [adapter_plan(model, name) for name in names]
    roles = {(n, a): role for plan in plans for n, attributes in plan.values.items() for a, role in attributes.items()}
    for (layer, attribute), role in roles.items():
        changes = {name: _change(model, name, layer, attribute) for name in names}
        source = sources.get(role)
        if source is None:
            _put_average(merged, model, layer, attribute, role, changes, weights)
        elif (taken := changes.get(source)) is not None:
            merged.put(layer, attribute, role, taken.value, taken.start)
            merged.unanchored += [] if taken.anchored else [(layer, attribute)]
    return merged


def _change(model: nn.Module, name: str, layer: str, attribute: str) -> Value | None:
    adapted = model.get_submodule(layer)
    assert isinstance(adapted, Adapted)
    adapters = adapted.adapters
    found = adapters[name]._modules.get(attribute) if name in adapters else None
    if found is not None and not isinstance(found, Value):
        raise StateError(
            f"{name!r} changes the {attribute} of {layer} by low rank and another adapter owns it in full; these two "
            "have no sum"
        )
    return found


def _put_average(
    merged: Owned,
    model: nn.Module,
    layer: str,
    attribute: str,
    role: Role,
    changes: dict[str, Value | None],
    weights: Mapping[str, float],
) -> None:
    base = _base(model, layer, attribute)
    values = {name: base if c is None else wide(c.value) for name, c in changes.items()}
    cure = f'; {role}="{next(iter(values))}" takes one over, "base" takes none' if role in ("head", "norm") else ""
    if len({value.shape for value in values.values()}) > 1:
        shown = ", ".join(f"{name} {len(value)}" for name, value in values.items())
        raise StateError(f"the adapters have {layer} of different sizes ({shown} outputs), which have no average{cure}")
    try:
        if attribute in STATISTICS:
            found = _statistics(model, layer, attribute, weights)
        else:
            found = average(values, {name: _start(base, c) for name, c in changes.items()}, weights)
    except StateError as e:
        raise StateError(f"{attribute} of {layer} of the adapters {', '.join(values)}: {e}{cure}") from None
    stored = role == "head" and any(c is not None and c.start is not None for c in changes.values())
    merged.put(layer, attribute, role, found.value, found.start if stored else None)
    merged.unanchored += [(layer, attribute)] if found.start is None else []


def _start(base: Tensor, change: Value | None) -> Tensor | None:
    if change is None or (change.start is None and change.anchored):
        return base
    return None if change.start is None else wide(change.start)


def _statistics(model: nn.Module, layer: str, attribute: str, weights: Mapping[str, float]) -> Average:
    bases = [_base(model, layer, a) for a in STATISTICS]
    own = [
        {name: base if (c := _change(model, name, layer, a)) is None else wide(c.value) for name in weights}
        for a, base in zip(STATISTICS, bases, strict=True)
    ]
    mixed = mixture(own[0], own[1], weights, (bases[0], bases[1]))
    return Average(mixed[STATISTICS.index(attribute)], bases[STATISTICS.index(attribute)])


def _base(model: nn.Module, layer: str, attribute: str) -> Tensor:
    tensor = base_tensor(model.get_submodule(layer), attribute)
    assert tensor is not None
    return wide(tensor)
