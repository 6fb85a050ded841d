"""The closing table of a run: what was gained, what was forgotten, what it cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from visionlora.overview import table
from visionlora.report.costs import Costs
from visionlora.vision.metrics import Result

__all__ = ["SOURCE", "Closing", "SetScores"]

SOURCE = "source"
"""Name of the test set that measures forgetting."""


@dataclass(frozen=True)
class SetScores:
    """One set of test images before and after."""

    after: Result
    before: Result | None
    """None where the base has no head for these classes."""


@dataclass(frozen=True, kw_only=True)
class Closing(Costs):
    """A finished run in numbers. `str(closing)` is the table."""

    sets: dict[str, SetScores]
    """Test sets by name: "target" first, "source" last."""
    classes: int
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> str:
        """Return all of it, scores by class and confusion matrices too."""
        return json.dumps(asdict(self), indent=1, allow_nan=False) + "\n"

    def scalars(self) -> dict[str, float]:
        """Return the accuracies for a log: test/<set>/acc and test/<set>/acc_before."""
        values = {f"test/{name}/acc": scores.after.acc for name, scores in self.sets.items()}
        before = {f"test/{name}/acc_before": s.before.acc for name, s in self.sets.items() if s.before is not None}
        return values | before

    def __str__(self) -> str:
        lines = _accuracies(self.sets) if self.sets else ["no test images: accuracy was not measured"]
        return "\n".join([*lines, "", *self.cost_lines(), *(f"note: {note}" for note in self.notes)])


def _accuracies(sets: dict[str, SetScores]) -> list[str]:
    rows = [_row(name, scores) for name, scores in sets.items()]
    return table(("accuracy on", "images", "before", "after", "change", ""), rows, right=(1, 2, 3, 4))


def _row(name: str, scores: SetScores) -> tuple[str, ...]:
    before, after = scores.before, scores.after
    if before is None:
        was, change, remark = "-", "-", ""
    else:
        points = 100 * (after.acc - before.acc)
        was, change = f"{before.acc:.1%}", f"{points:+.1f}"
        remark = ("forgotten" if points < 0 else "nothing forgotten") if name == SOURCE else ""
    return name, f"{after.images:,}", was, f"{after.acc:.1%}", change, remark
