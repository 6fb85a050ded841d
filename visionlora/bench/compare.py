"""Two records side by side: what became slower or larger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from visionlora.bench.ratios import FIGURES, to
from visionlora.bench.settings import ORDERS
from visionlora.bench.table import rows
from visionlora.errors import ConfigError

SLACK = 0.05
SAME = ("batch", "size", "rank", "dtype", "device", "channels_last", "compile")
"""Settings without which two records measure different things."""
JUDGED = ("ours", *ORDERS)
"""What may fail a comparison; others are shown."""


@dataclass(frozen=True)
class Change:
    """One figure of one variant of one model, before and after."""

    model: str
    variant: str
    figure: str
    before: float
    after: float
    regressed: bool

    @property
    def ratio(self) -> float:
        return self.after / self.before if self.before else float(self.after != 0) + 1


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """Return every figure that both records hold. Raises ConfigError where their settings differ."""
    for key in SAME:
        a, b = old["settings"][key], new["settings"][key]
        if a != b:
            raise ConfigError(f"the records cannot be compared: {key} is {a!r} in the first and {b!r} in the second")
    models = {model["name"]: model for model in old["models"]}
    changes = [c for model in new["models"] if model["name"] in models for c in _changes(models[model["name"]], model)]
    if not changes:
        raise ConfigError("the records have no model in common")
    return changes


def comparison(changes: list[Change]) -> str:
    """Return the changes as Markdown."""
    shown = ["time / floor", "saved_bytes", "moved_bytes"]
    body = [
        [f"{c.model} {c.variant}", c.figure, _text(c, c.before), _text(c, c.after), f"{c.ratio:.3f}{_mark(c)}"]
        for c in changes
        if c.regressed or c.figure in shown
    ]
    return rows(["model, variant", "figure", "before", "after", "after / before"], body)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[Change]:
    for variant in new["counts"]:
        if variant not in old["counts"]:
            continue
        judged = variant in JUDGED
        before, after = to(old, variant, "floor"), to(new, variant, "floor")
        if variant != "floor" and before is not None and after is not None:
            worse = after.median > before.median * (1 + SLACK) and after.low > before.high
            yield Change(new["name"], variant, "time / floor", before.median, after.median, judged and worse)
        for figure in FIGURES:
            a, b = old["counts"][variant][figure], new["counts"][variant][figure]
            yield Change(new["name"], variant, figure, a, b, judged and b > a * (1 + SLACK))


def _text(change: Change, value: float) -> str:
    if change.figure.endswith("bytes"):
        return f"{value / 2**20:.1f} MiB"
    return f"{value:.3f}" if change.figure == "time / floor" else f"{value:,.0f}"


def _mark(change: Change) -> str:
    return " **worse**" if change.regressed else ""
