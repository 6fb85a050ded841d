"""The model card that lies beside an adapter: what it is, for which base, how to load it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from visionlora.io.record import TEXT
from visionlora.variants import VARIANTS

GENERATED = "<!-- written by visionlora at every save; delete this line to keep your own text -->"

_TEMPLATE = """---
library_name: visionlora
tags: [lora, {tags}]
---
{generated}

# {name}

A {variant} adapter for `{base}`, written by visionlora {version}. It holds what makes the adapted model differ from its
base and nothing else; the base is left untouched.

| | |
|---|---|
| base | {base_row} |
| base weights (SHA-256) | `{fingerprint}` |
| adapted layers | {layers} |
| normalisation | {norm} |
| classes | {classes} |
| input | {data} |
| parameters | {parameters:,} |
| size | {kb:,.1f} kB |
{metrics}
## Load

```python
import visionlora as vl{imported}

model = {loader}("path/to/this/folder")  # rebuilds the base and checks its weights
vl.load_adapter(other, "path/to/this/folder")  # or onto a model of the same base
```
{peft}
Files: `adapter_model.safetensors` is complete by itself; `visionlora.json` shows its record to people.
"""


def card(record: dict[str, Any], parameters: int, size: int, reasons: Iterable[str]) -> str:
    """Return the text of the card."""
    base, config, layers = record["base"], record["plan"]["config"], record["plan"]["layers"]
    ranks = sorted({entry["rank"] for entry in layers.values()})
    name = base["name"] or base["class"]
    text = TEXT in (record["data"] or {})
    return _TEMPLATE.format(
        generated=GENERATED,
        tags="transformers" if text else "image-classification, timm",
        imported="\nfrom visionlora.text import load_model" if text else "",
        loader="load_model" if text else "vl.load_model",
        name=record["name"],
        variant=VARIANTS[config["variant"]].__name__,
        base=name,
        base_row=" ".join(f"`{part}`" for part in (name, base["tag"], base["class"], base["dtype"]) if part),
        fingerprint=base["fingerprint"],
        version=record["versions"]["visionlora"],
        layers=f"{len(layers)}, rank {', '.join(map(str, ranks))}" if layers else "none",
        norm=config["norm"],
        classes=_classes(record["classes"]),
        data=_data(record["data"]),
        parameters=parameters,
        kb=size / 1000,
        metrics=_metrics(record["metrics"]),
        peft=_peft(list(reasons)),
    )


def _classes(names: list[str] | None) -> str:
    if names is None:
        return "not recorded"
    shown = ", ".join(f"`{_cell(name)}`" for name in names[:50])
    return f"{len(names)}: {shown}" + (f" and {len(names) - 50} more" if len(names) > 50 else "")


def _data(data: dict[str, Any] | None) -> str:
    if data is None:
        return "not recorded"
    if TEXT in data:
        return f"{_cell(str(data[TEXT]))}" + (f", at most {data['max_length']} tokens" if "max_length" in data else "")
    size = "x".join(map(str, data["input_size"]))
    return f"{size}, mean {data['mean']}, std {data['std']}, {data['interpolation']}, crop {data['crop_pct']}"


def _metrics(metrics: dict[str, Any]) -> str:
    if not metrics:
        return ""
    rows = [f"| {_cell(key)} | {_cell(f'{v:.4g}' if isinstance(v, float) else str(v))} |" for key, v in metrics.items()]
    return "\n".join(["", "## Metrics", "", "| metric | value |", "|---|---|", *rows, ""])


def _peft(reasons: list[str]) -> str:
    if not reasons:
        return "\nPEFT reads this folder as well: `PeftModel.from_pretrained(base, folder)`.\n"
    return f"\nPEFT cannot express this adapter ({_cell(reasons[0])}).\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'")
