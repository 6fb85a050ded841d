"""What a language model answers, row by row, as CSV and as JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from visionlora.atomic import write_atomic
from visionlora.errors import ConfigError
from visionlora.report.predictions import output_paths

__all__ = ["WriteAnswers"]


ANSWERS = {"probability", "labels", "value", "tags", "answer", "written"}
"""Columns that tell a file of ours from one of the user's; `label` is in both."""


class WriteAnswers(Callback):
    """Write OUT.csv and OUT.jsonl when prediction ends: each row as it was read, with its answer beside it.

    Columns are label and probability, labels, value, tags, answer or written, by task.
    """

    def __init__(self, out: str | Path) -> None:
        self.csv_path, self.jsonl_path = output_paths(out)
        self._found: dict[int, dict[str, Any]] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ConfigError("predictions are written by one process: --trainer.devices 1")
        self._found = {}
        for path in (self.csv_path, self.jsonl_path):
            if path.is_file() and not ANSWERS & set(_columns(path)):
                raise ConfigError(f"{path} exists and holds no answers; give another name with --out")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        for at, row in enumerate(outputs["rows"]):
            answer = answer_of(outputs, at)
            if "tags" in answer and row in self._found:  # a long row comes in several windows
                answer["tags"] = {**self._found[row]["tags"], **answer["tags"]}
            self._found[row] = answer

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rows = trainer.datamodule.examples["predict"]  # type: ignore[attr-defined]
        found = [{**row, **self._answer(row, at, pl_module)} for at, row in enumerate(rows)]
        self.csv_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.jsonl_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
        write_atomic(self.csv_path, _table(found))
        print(f"{len(found):,} rows: {self.csv_path}, {self.jsonl_path}")

    def _answer(self, row: Mapping[str, Any], at: int, module: Any) -> dict[str, Any]:
        if module.answered:
            return {"answer": module.answered.get(row["id"], "")}
        answer = self._found.get(at, {})
        if "tags" in answer:
            return {"tags": [answer["tags"].get(word) for word in range(len(row["tokens"]))]}
        return answer


def answer_of(outputs: Mapping[str, Any], at: int) -> dict[str, Any]:
    """Return what the model answers for one feature of a batch."""
    if "texts" in outputs:
        return {"written": outputs["texts"][at]}
    if "values" in outputs:
        return {"value": round(float(outputs["values"][at]), 6)}
    if "answers" in outputs:
        return {}
    found = outputs["classes"][at]
    if isinstance(found, Mapping):
        return {"tags": dict(found)}
    if isinstance(found, list):
        return {"labels": found}
    return {"label": found, "probability": round(float(outputs["probabilities"][at].max()), 6)}


def _table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: v if isinstance(v, (str, int, float)) else json.dumps(v) for k, v in row.items()})
    return text.getvalue()


def _columns(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        first = file.readline()
    if path.suffix == ".csv":
        return next(csv.reader([first]), [])
    try:
        row = json.loads(first)
    except ValueError:
        return []
    return list(row) if isinstance(row, dict) else []
