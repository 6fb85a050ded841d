"""Verdicts as Markdown tables and as plain data."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

import torch
from exactness_promises import PROMISES, Verdict

Found = dict[str, Verdict]
Column = dict[str, tuple[Found, str]]
"""{layer kind: (verdicts, mark of the way)} of one library."""


def in_a_word(found: Found, mark: str = "") -> str:
    """Return what the user of a layer kind gets: nothing, something wrong, or what was promised up to rounding."""
    if found["attaches"].state == "no":
        return found["attaches"].text
    outputs = [found[name] for name in ("attaches", "start", "acts", "dense", "merged", "saved") if name in found]
    hurts = [v for v in outputs if v.text.startswith(("crash", "silent"))]
    hurts += sorted((v for v in outputs if v.text.startswith("wrong")), key=lambda v: -v.error)
    if hurts:
        return hurts[0].text + mark
    return ("right" if found["merged"].state == "kept" else "right, no merge") + mark


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *lines))


def overview(columns: dict[str, Column]) -> str:
    """Return one word per layer kind and library."""
    labels = list(dict.fromkeys(label for column in columns.values() for label in column))
    cells = {name: {label: in_a_word(*entry) for label, entry in column.items()} for name, column in columns.items()}
    return markdown(["layer", *columns], ([label, *(c.get(label, "") for c in cells.values())] for label in labels))


def counts(columns: dict[str, Column]) -> str:
    """Return per promise and library on how many layer kinds it is kept, not made, broken."""
    lines = []
    for name, promise in PROMISES.items():
        cells = []
        for column in columns.values():
            states = [found[name].state for found, _ in column.values() if name in found]
            cells.append(" / ".join(str(states.count(state)) for state in ("kept", "no", "broken")))
        lines.append([f"`{name}`", promise.__doc__ or "", *cells])
    return markdown(["promise", "meaning", *columns], lines)


def details(column: Column) -> str:
    """Return every verdict on one library."""
    lines = (
        [label + mark, *(found[p].text if p in found else "" for p in PROMISES)]
        for label, (found, mark) in column.items()
    )
    return markdown(["layer", *PROMISES], lines)


def drift_table(found: dict[str, dict[str, float | None]], columns: dict[str, str]) -> str:
    lines = (
        [name, *("-" if row[key] is None else f"{row[key]:.2g}" for key in columns)] for name, row in found.items()
    )
    return markdown(["library", *columns.values()], lines)


def setting(packages: Iterable[str]) -> str:
    names = ("torch", "timm", "transformers", *packages)
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    machine = f"CPU ({platform.machine()}), {torch.get_num_threads()} thread"
    return f"{versions}. {machine}. Seeds 0 (layer, input, fresh adapter) and 1 (the adapter's other numbers)."


def plain(columns: dict[str, Column]) -> dict[str, Any]:
    """Return the verdicts as data for JSON, where infinity is null."""
    return {
        name: {
            label: {"way": "tensor" if mark else "layer"}
            | {
                p: {"state": v.state, "text": v.text, "error": v.error if math.isfinite(v.error) else None}
                for p, v in found.items()
            }
            for label, (found, mark) in column.items()
        }
        for name, column in columns.items()
    }
