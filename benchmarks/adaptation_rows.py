"""Results of adaptation.py: one line of JSON a run, kept, read and printed as tables."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

FOUND = ("target", "source", "trained", "seconds")
"""What a run measures; everything else in a row says which run it is."""


def which(row: dict[str, Any]) -> dict[str, Any]:
    """Return what says which run a row is of."""
    return {key: value for key, value in row.items() if key not in FOUND}


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, row: dict[str, Any]) -> None:
    print(row, flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def tables(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table for each task, with a line for each method, rate and number of epochs."""
    lines = []
    for task, own in grouped(rows, heading_of).items():
        lines += [f"## {task}", "", "| method | seeds | trained | target | source |", "|---|---|---|---|---|"]
        lines += [line_of(label, runs) for label, runs in grouped(own, label_of).items()] + [""]
    return "\n".join(lines)


def grouped(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[key(row)].append(row)
    return found


def heading_of(row: dict[str, Any]) -> str:
    folds = f"{row['folds']} folds of its training images" if "folds" in row else ""
    return ", ".join(part for part in (row["task"], folds, f"base {row['base']}" if "base" in row else "") if part)


def label_of(row: dict[str, Any]) -> str:
    asked = {"lr": row["lr"], "epochs": row.get("epochs"), **row.get("lora", {}), **row.get("settings", {})}
    words = [f"{key} {value}" for key, value in asked.items() if value is not None]
    return row["mode"] + (f" ({', '.join(words)})" if words else "")


def line_of(label: str, rows: list[dict[str, Any]]) -> str:
    seeds = "-" if rows[0]["mode"] == "before" else len(rows)
    scores = (spread([100 * row[key] for row in rows]) for key in ("target", "source"))
    return f"| {label} | {seeds} | {rows[0]['trained']:,} | {' | '.join(scores)} |"


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"
