"""What the writers of other libraries' files share: an adapter's layers, and the content of a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from visionlora.core.delta import Delta, Value
from visionlora.errors import ConfigError
from visionlora.io.formats.factors import Factors
from visionlora.registry import adapted_layers, adapter_plan
from visionlora.targets import Site

MOST_REASONS = 5


@dataclass(frozen=True)
class Written:
    """The content of a file of another library."""

    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    """What lies beside the tensors, where the format has such a file."""
    decomposed: dict[str, Factors] = field(default_factory=dict)
    """Layers whose change the format cannot hold as it is, by name."""
    notes: list[str] = field(default_factory=list)


def deltas(model: nn.Module, name: str) -> Iterator[tuple[Site, Delta, Tensor]]:
    """Yield every layer of an adapter with its change and its own weight as (out, in, *kernel)."""
    layers = adapted_layers(model)
    for site in adapter_plan(model, name).sites:
        layer = layers[site.layer]
        delta, base = layer.adapters[name][site.attribute], layer.base_tensor(site.attribute)  # type: ignore[index]
        assert base is not None
        yield site, delta, site.geometry.canonical(base.detach())


def values(model: nn.Module, name: str) -> Iterator[tuple[str, str, Tensor, Tensor]]:
    """Yield layer, attribute, value and the base's tensor of everything an adapter owns in full."""
    layers = adapted_layers(model)
    for layer, roles in adapter_plan(model, name).values.items():
        for attribute in roles:
            change, base = layers[layer].adapters[name][attribute], layers[layer].base_tensor(attribute)  # type: ignore[index]
            assert isinstance(change, Value)
            assert base is not None
            yield layer, attribute, change.value.detach(), base.detach()


def refuse(format_name: str, reasons: list[str]) -> None:
    """Raise ConfigError where there are reasons against writing a format."""
    if reasons:
        more = f" (and {len(reasons) - MOST_REASONS} more)" if len(reasons) > MOST_REASONS else ""
        raise ConfigError(f"{format_name} cannot hold this adapter: {'; '.join(reasons[:MOST_REASONS])}{more}")


def number(value: float) -> Tensor:
    """Return a number as a tensor that gives it back unrounded, in float32 where that is enough."""
    wide = Tensor([value]).double().fill_(value).reshape(())
    return wide.float() if float(wide.float()) == value else wide
