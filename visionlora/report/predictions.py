"""Predictions as CSV and as JSON lines, row by row."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from visionlora.atomic import atomic_path
from visionlora.errors import ConfigError

__all__ = ["PredictionWriter", "output_paths"]

COLUMNS = "path,label,probability"
"""How the table begins."""


class PredictionWriter:
    """Write OUT.csv and OUT.jsonl while predictions come; use as a context, whose end gives both files their names.

    After an error they are what they were. Files that are no predictions of ours are not replaced: ConfigError.

    A CSV row is path, label, probability, then label_2, probability_2 and so on up to `top`. A JSON line is
    {"path", "label", "probability", "top": [{"label", "probability"}, ...]}. Probabilities have six decimals.
    """

    def __init__(self, out: str | Path, class_names: Sequence[str], *, top: int = 5) -> None:
        if top < 1:
            raise ConfigError(f"top must be at least 1, got {top}")
        self.csv_path, self.jsonl_path = output_paths(out)
        self.class_names, self.top = list(class_names), min(top, len(class_names))
        self.rows = 0
        self._files: tuple[TextIO, TextIO] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> PredictionWriter:
        for path, beginning in ((self.csv_path, COLUMNS), (self.jsonl_path, '{"path": ')):
            _check_is_ours(path, beginning)
        self.csv_path.parent.mkdir(parents=True, exist_ok=True)
        temporary = [self._stack.enter_context(atomic_path(path)) for path in (self.csv_path, self.jsonl_path)]
        table, lines = (self._stack.enter_context(path.open("w", newline="", encoding="utf-8")) for path in temporary)
        self._files = table, lines
        further = [f"{name}_{rank}" for rank in range(2, self.top + 1) for name in ("label", "probability")]
        csv.writer(table).writerow([*COLUMNS.split(","), *further])
        return self

    def __exit__(self, *error: Any) -> None:
        self._files = None
        self._stack.__exit__(*error)

    def write(self, paths: Sequence[str], probabilities: Tensor) -> None:
        """Append the predictions of a batch; probabilities are (batch, classes)."""
        assert self._files is not None, "open the writer with `with`"
        table, lines = self._files
        values, classes = probabilities.float().cpu().topk(self.top, dim=-1)
        for path, row, indices in zip(paths, values.tolist(), classes.tolist(), strict=True):
            found = [(self.class_names[i], round(p, 6)) for i, p in zip(indices, row, strict=True)]
            csv.writer(table).writerow([path, *(cell for pair in found for cell in pair)])
            lines.write(json.dumps(_line(path, found), ensure_ascii=False) + "\n")
            self.rows += 1


def output_paths(out: str | Path) -> tuple[Path, Path]:
    """Return OUT.csv and OUT.jsonl, whether or not one of the endings is already there."""
    stem = Path(out).with_suffix("") if Path(out).suffix in (".csv", ".jsonl") else Path(out)
    return stem.with_name(f"{stem.name}.csv"), stem.with_name(f"{stem.name}.jsonl")


def _check_is_ours(path: Path, beginning: str) -> None:
    """Raise ConfigError for a file that is there and does not begin as one of ours."""
    if path.is_file() and path.stat().st_size and not path.read_bytes().startswith(beginning.encode()):
        raise ConfigError(f"{path} exists and holds no predictions; give another name with --out")


def _line(path: str, found: list[tuple[str, float]]) -> dict[str, Any]:
    top = [{"label": label, "probability": probability} for label, probability in found]
    return {"path": path, **top[0], "top": top}
