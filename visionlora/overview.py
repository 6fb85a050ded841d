"""What an adapter changes on a model, layer by layer, as a table to read and numbers to use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from visionlora.core.attach import Branched, own_class
from visionlora.core.delta import Delta
from visionlora.core.geometry import Geometry
from visionlora.errors import StateError
from visionlora.merging import base_state_dict
from visionlora.plan import Plan
from visionlora.registry import (
    adapted_layers,
    adapter_names,
    adapter_parameters,
    adapter_plan,
    adapter_state,
    registry_of,
)
from visionlora.targets import head_layers, layers_and_projections
from visionlora.variants import VARIANTS

How = Literal["branched", "materialised"]


@dataclass(frozen=True)
class Row:
    """One layer with a low-rank change."""

    layer: str
    kind: str
    """Class of the layer as its library named it."""
    how: How
    """"branched" runs the layer untouched beside a cheap branch, "materialised" runs it on the changed weight."""
    rank: int
    scale: float
    parameters: int
    share: float
    """Parameters of the change over those of the weight it changes."""


@dataclass(frozen=True)
class Summary:
    """An adapter in numbers. `str(summary)` is a table."""

    name: str
    rows: tuple[Row, ...]
    full: dict[str, int]
    """Numbers owned in full by role: "head", "norm" (statistics included), "bias", "saved"."""
    skipped: dict[str, str]
    """Layers that could change and do not, with the reason."""
    trainable: int
    base: int
    """Parameters of the base model."""
    size: int
    """Bytes of the adapter's tensors."""

    @property
    def parameters(self) -> int:
        """All numbers of the adapter: changes and tensors owned in full."""
        return sum(row.parameters for row in self.rows) + sum(self.full.values())

    @property
    def share(self) -> float:
        """Numbers of the adapter over parameters of the base."""
        return self.parameters / self.base if self.base else 0.0

    def __str__(self) -> str:
        cells: list[tuple[str, ...]] = [
            (r.layer, r.kind, r.how, str(r.rank), f"{r.scale:g}", f"{r.parameters:,}", f"{r.share:.1%}")
            for r in self.rows
        ]
        cells += [(f"({role}, in full)", "", "", "", "", f"{count:,}", "") for role, count in self.full.items()]
        head = ("layer", "class", "how", "rank", "scale", "parameters", "of layer")
        lines = [*table(head, cells, right=(3, 4, 5, 6)), "", self.totals()]
        return "\n".join(lines + [f"left alone: {line}" for line in self.reasons()])

    def totals(self) -> str:
        """Return the closing line."""
        return (
            f"adapter {self.name}: {len(self.rows)} layers, {self.parameters:,} parameters "
            f"({self.trainable:,} trainable), {self.share:.2%} of the base's {self.base:,}, {readable_size(self.size)}"
        )

    def reasons(self, most: int = 3) -> list[str]:
        """Return one line for each reason to leave layers alone: how many, and the first few names."""
        lines = []
        for reason, count in Counter(self.skipped.values()).items():
            names = [name for name, why in self.skipped.items() if why == reason]
            more = f" and {count - most} more" if count > most else ""
            lines.append(f"{reason}: {', '.join(names[:most])}{more}")
        return lines


def summary(model: nn.Module, name: str | None = None) -> Summary:
    """Return what an adapter changes; without a name, the active adapter or the only one."""
    name = _only(model) if name is None else name
    plan, state, layers = adapter_plan(model, name), adapter_state(model, name), adapted_layers(model)
    rows = []
    for site in plan.sites:
        layer = layers[site.layer]
        delta = layer.adapters[name][site.attribute]  # type: ignore[index]
        assert isinstance(delta, Delta)
        count = sum(p.numel() for p in delta.parameters())
        label = site.name + (f"[{','.join(site.parts)}]" if site.parts else "")
        how: How = "branched" if isinstance(layer, Branched) else "materialised"
        share = count / layer._parameters[site.attribute].numel()  # type: ignore[union-attr]
        rows.append(Row(label, own_class(layer).__name__, how, site.rank, site.scale, count, share))
    groups = adapter_parameters(model, name).values()
    return Summary(
        name,
        tuple(rows),
        _full(plan, {key: tensor.numel() for key, tensor in state.items()}),
        _skipped(model, plan),
        trainable=sum(p.numel() for group in groups for p in group.values() if p.requires_grad),
        base=_base_parameters(model),
        size=sum(tensor.numel() * tensor.element_size() for tensor in state.values()),
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    """Return the lines of a table with aligned columns; those in `right` are flush right."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, ["-" * w for w in widths], *rows)
    ]
    return [line.rstrip() for line in lines]


def readable_size(size: float) -> str:
    """Return a number of bytes as people write it: 1 kB = 1000 B."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _only(model: nn.Module) -> str:
    active, known = list(registry_of(model).active), adapter_names(model)
    for names in (active, known):
        if len(names) == 1:
            return names[0]
    raise StateError(f"the model has {len(known)} adapters, which one? summary(model, name) with {', '.join(known)}")


def _full(plan: Plan, sizes: dict[str, int]) -> dict[str, int]:
    full: dict[str, int] = {}
    for layer, attributes in plan.values.items():
        for attribute, role in attributes.items():
            full[role] = full.get(role, 0) + sizes[f"{layer}/{attribute}/value"]
    return full


def _base_parameters(model: nn.Module) -> int:
    own = {name for name, _ in model.named_parameters()}
    return sum(tensor.numel() for key, tensor in base_state_dict(model).items() if key in own)


def _skipped(model: nn.Module, plan: Plan) -> dict[str, str]:
    changed = {site.name for site in plan.sites} | {n for n, owned in plan.values.items() if "weight" in owned}
    heads = head_layers(model)
    candidates = {n: geo for n, geo in layers_and_projections(model).items() if n not in changed}
    return {name: _reason(geo, name in heads, plan) for name, geo in candidates.items()}


def _reason(geo: Geometry, is_head: bool, plan: Plan) -> str:
    if is_head:
        return "classifier head"
    if geo.depthwise:
        return "depthwise"
    if not VARIANTS[plan.config.variant].largest_rank(geo, plan.config):
        return "too few weights for a low-rank change"
    return f"not meant by target_modules={plan.config.target_modules!r}"
