"""The closing table of a run: what was gained, what was forgotten, what it cost."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from visionlora.overview import readable_size, table
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


@dataclass(frozen=True)
class Closing:
    """A finished run in numbers. `str(closing)` is the table."""

    sets: dict[str, SetScores]
    """Test sets by name: "target" first, "source" last."""
    classes: int
    mode: str
    trainable: int
    """Parameters that were trained."""
    base: int
    """Parameters of the model without adapters."""
    saved: str
    """Where the adapter (or, in mode full, the model) lies."""
    size: int
    """Bytes of its weights file."""
    seconds: float
    """Training and validation; for a resumed run the sum."""
    epochs: int
    steps: int
    memory: int | None
    """Peak in bytes: of the GPU, else of the process; None where the system does not tell."""
    memory_of: str
    base_unchanged: bool | None
    """Whether the base, adapter off, has the very weights it came with; None in mode full."""
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
        return "\n".join([*lines, "", *_costs(self), *(f"note: {note}" for note in self.notes)])


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


def _costs(closing: Closing) -> list[str]:
    share = closing.trainable / closing.base if closing.base else 0.0
    what = "model" if closing.mode == "full" else "adapter"
    memory = "not told by this system" if closing.memory is None else readable_size(closing.memory)
    rows = [
        (
            "trained",
            f"{closing.trainable:,} parameters, {share:.2%} of the model's {closing.base:,} (mode {closing.mode})",
        ),
        (what, f"{readable_size(closing.size)} in {closing.saved}"),
        (
            "time",
            f"{_duration(closing.seconds)} for {_count(closing.epochs, 'epoch')}, {_count(closing.steps, 'step')}",
        ),
        ("peak memory", f"{memory} ({closing.memory_of})"),
    ]
    if closing.base_unchanged is not None:
        rows.append(("adapter off", "the base, bit for bit" if closing.base_unchanged else "NOT the base any more"))
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {value}" for name, value in rows]


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
