"""A record as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from visionlora.bench.ratios import counted, mean, times, to
from visionlora.bench.spread import Ratio

HEAD = (
    *("variant", "forward ms", "backward ms", "optimiser ms", "fwd+bwd / floor", "95 %", "of minima", "step / floor"),
    *("saved MiB", "peak MiB", "operations", "moved GiB", "GFLOP", "trained"),
)
GOALS = ("floor", "full", "peft")
"""What ours is put in relation to, over all models."""


def markdown(record: Mapping[str, Any]) -> str:
    """Return the whole record as Markdown."""
    parts = [_setting(record), *(_model(model) for model in record["models"]), *_over_models(record["models"])]
    parts += [f"**{name}: failed.** {reason}" for name, reason in record["failed"].items()]
    return "\n\n".join([*parts, *_verbs(record)]) + "\n"


def rows(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, all columns but the first flush right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _setting(record: Mapping[str, Any]) -> str:
    s, m, v = record["settings"], record["machine"], record["versions"]
    where = m.get("gpu") or f"{m['cpu']} ({', '.join(m['flags'])}), {s['threads']} of {m['cores']} cores"
    clock = "GPU events" if s["device"] == "cuda" else {"cpu": "processor time", "wall": "wall clock"}[s["clock"]]
    layout = "channels_last" if s["channels_last"] else "contiguous"
    turns = f"{s['rounds']} rounds of {s['steps']} step{'s' if s['steps'] > 1 else ''}"
    loads = " and ".join(f"{value[0]:g}" for value in record["load"].values() if value)
    return (
        f"{where}; {', '.join(f'{name} {number}' for name, number in v.items())}. Batch {s['batch']}, "
        f"size {s['size']}, rank {s['rank']}, {s['dtype']}, {layout}{', compiled' if s['compile'] else ''}; "
        f"{clock}, {turns}; load before and after: {loads or 'unknown'}."
    )


def _model(model: Mapping[str, Any]) -> str:
    body = [_variant(model, name) for name in model["counts"]]
    title = f"### {model['name']}\n\n{model['layers']} layers adapted.\n\n{rows(HEAD, body)}"
    return "\n".join([title, "", *(f"{name}: {reason}" for name, reason in model["skipped"].items())]).rstrip()


def _variant(model: Mapping[str, Any], name: str) -> list[str]:
    counts = model["counts"][name]
    exact = [
        f"{counts['saved_bytes'] / 2**20:.1f}",
        f"{counts['peak_bytes'] / 2**20:.1f}",
        f"{counts['operations']:,}",
        f"{counts['moved_bytes'] / 2**30:.2f}",
        f"{counts['flops'] / 1e9:.1f}",
        f"{counts['trainable']:,}",
    ]
    ratio, step = to(model, name, "floor"), to(model, name, "floor", optimiser=True)
    if ratio is None or step is None:
        return [name, *["-"] * 7, *exact]
    parts = [f"{median(times(model['samples'][name], (part,))):.1f}" for part in ("forward", "backward", "optimiser")]
    return [name, *parts, *_ratio(ratio), f"{step.median:.3f}", *exact]


def _ratio(ratio: Ratio) -> list[str]:
    interval = f"{ratio.low:.3f} to {ratio.high:.3f}{' **too noisy**' if ratio.noisy else ''}"
    return [f"{ratio.median:.3f}", interval, f"{ratio.of_minima:.3f}"]


def _over_models(models: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    body = []
    for model in models:
        cells = [_shown(to(model, "ours", other)) for other in GOALS]
        saved = [counted(model, "ours", other, "saved_bytes") for other in GOALS]
        moved = [counted(model, "ours", other, "moved_bytes") for other in GOALS]
        body.append([model["name"], *cells, *map(_number, saved), *map(_number, moved)])
    means = []
    for other in GOALS:
        found = [ratio.median for model in models if (ratio := to(model, "ours", other)) is not None]
        means.append(f"{mean(found):.3f}" if found else "-")
    if not any("ours" in model["counts"] for model in models):
        return
    if len(models) > 1:
        body.append(["geometric mean", *means, *[""] * 6])
    head = ["ours over", *(f"{what}{other}" for what in ("time ", "saved ", "moved ") for other in GOALS)]
    yield f"### Ours\n\n{rows(head, body)}"


def _shown(ratio: Ratio | None) -> str:
    return "-" if ratio is None else f"{ratio.median:.3f}{' (too noisy)' if ratio.noisy else ''}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _verbs(record: Mapping[str, Any]) -> Iterator[str]:
    found = record["verbs"]
    body = [[f"{verb}, {found['model']}", _ms(values)] for verb, values in found.get("times", {}).items()]
    base = record["imports"].get("import torch")
    for what, values in record["imports"].items():
        body.append([what, f"{_ms(values)} ({median(values) / median(base):.3f} of import torch)"])
    if body:
        yield f"### Verbs\n\n{rows(['what', 'ms, median (least)'], body)}"


def _ms(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f})"
