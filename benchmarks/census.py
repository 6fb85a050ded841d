"""What an adapter is on every model of timm, and whether it keeps its promises there.

    python benchmarks/census.py prove --out families.jsonl    # real numbers: a backbone or more of every family
    python benchmarks/census.py look --out names.jsonl        # no numbers: every name timm knows
    python benchmarks/census.py table families.jsonl names.jsonl > docs/families.md

One line of JSON a model; a run that was broken off goes on where it stopped. `prove` takes each backbone in full depth
and width at the smallest image it accepts (tests/proof.py says what is checked), in float64, those of more than 120
million parameters in float32. `look` runs every name at its own image size on PyTorch's meta device: what is adapted
is called and gets a gradient, and is no stem, no gate and no head.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import visionlora as vl
from visionlora.core.attach import Branched, own_class
from visionlora.core.geometry import geometry_of
from visionlora.registry import adapted_layers, adapter_plan
from visionlora.targets import head_layers
from visionlora.targets.presets import PRESETS, family

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import FAMILIES, NETS, Net
from proof import check_choice, prove

Row = dict[str, Any]

WIDE = 120_000_000
"""Parameters beyond which a proof runs in float32; legacy_senet154, of 115 million, multiplies rounding by 1e7."""
LOW_RANK = vl.LoraConfig(bias="none", modules_to_save="none")
"""The defaults without what they train in full, so that the table counts low-rank changes."""
MODULE_OF = {net.name: module for module, nets in FAMILIES.items() for net in nets}


def proven(net: Net) -> Row:
    """Return what an adapter is on a backbone, and the evidence for its promises."""
    start = time.perf_counter()
    row = {"model": net.name, "module": MODULE_OF[net.name], "px": net.size, **counted(net.name)}
    model = net.create()
    dtype = torch.float32 if row["base"] > WIDE else torch.float64
    x = torch.randn(2, 3, net.size, net.size, dtype=dtype)
    evidence = prove(model, x, tolerance=1e-4 if dtype == torch.float32 else 1e-10)
    return {
        **row, "float": 32 if dtype == torch.float32 else 64, "effect": evidence.effect, "error": evidence.error,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def counted(name: str) -> Row:
    """Return the numbers of the default adapter on a model of 1000 classes."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=1000)
    preset = family(model)
    vl.apply_lora(model, LOW_RANK)
    report, layers = vl.summary(model), adapted_layers(model)
    sites = {site.layer for site in adapter_plan(model, "default").sites}
    reached = sum(layers[site]._parameters["weight"].numel() for site in sites)  # type: ignore[union-attr]
    return {
        "preset": preset if preset in PRESETS else "", "layers": len(sites),
        "of": sum(geometry_of(m) is not None for _, m in model.named_modules()),
        "computed": sum(not isinstance(layers[site], Branched) for site in sites),
        "parameters": report.parameters, "base": report.base, "reached": reached / report.base,
    }  # fmt: skip


def looked_at(name: str) -> Row:
    """Return which kinds of layers a model has and which of them an adapter takes; raise where it should not."""
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7).eval()
    x = torch.empty(2, *model.pretrained_cfg["input_size"], device="meta")
    keys = set(model.state_dict())
    vl.apply_lora(model, vl.LoraConfig(r=4))
    assert set(vl.base_state_dict(model)) == keys, "attaching changes the keys of the base"
    sites = {site.layer for site in adapter_plan(model, "default").sites}
    assert not sites & set(head_layers(model)), "the head is adapted"
    torch.autograd.backward([t.sum() for t in check_choice(model, x)])
    vl.check_gradients(model)
    kinds = sorted({kind_of(model, site) for site in sites})
    vl.remove(model)
    return {"model": name, "layers": len(sites), "kinds": kinds, "follows": follows_classes(model)}


def kind_of(model: nn.Module, name: str) -> str:
    """Return the block a layer lies in and the kind of layer it is: what makes one layer unlike another."""
    layer, owner = model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])
    geometry = geometry_of(layer)
    assert geometry is not None
    groups = " in groups" if geometry.groups > 1 else ""
    where = type(owner).__module__.removeprefix("timm.")
    return f"{where}.{type(owner).__name__}: {own_class(layer).__name__}{groups}"


def follows_classes(model: nn.Module) -> list[str]:
    """Return the layers outside the head whose size depends on the number of classes: there should be none."""
    heads = head_layers(model)
    if not heads:
        return []
    before = {key: t.shape for key, t in model.state_dict().items()}
    model.reset_classifier(11)  # type: ignore[operator]
    after = {key: t.shape for key, t in model.state_dict().items()}
    return sorted({key.rpartition(".")[0] for key in after if after[key] != before.get(key)} - {*heads})


def every(names: Iterable[str], row_of: Callable[[str], Row], out: Path) -> int:
    """Write the row of every name that has none yet; return how many failed."""
    done = {row["model"] for row in rows(out)} if out.exists() else set()
    failed = 0
    for name in names:
        if name in done:
            continue
        try:
            row = row_of(name)
        except Exception as e:
            row, failed = {"model": name, "failed": f"{type(e).__name__}: {e}"[:500]}, failed + 1
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        logging.info("%s %s", name, row.get("failed", "ok"))
    return failed


def rows(path: Path) -> list[Row]:
    """Return the rows of a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def page(families: list[Row], names: list[Row]) -> str:
    """Return docs/families.md."""
    bad = [f"{row['model']}: {row['failed']}" for row in (*families, *names) if "failed" in row]
    good, seen = [r for r in families if "failed" not in r], [r for r in names if "failed" not in r]
    follows = [row["model"] for row in seen if row["follows"]]
    shown = {kind for row in seen if row["model"] in MODULE_OF for kind in row["kinds"]}
    unshown = sorted({kind for row in seen for kind in row["kinds"]} - shown)
    versions = ", ".join(f"{package} {version(package)}" for package in ("timm", "torch", "visionlora"))
    wide = [r for r in good if r["float"] == 32]
    text = HEAD.format(
        versions=versions, models=len(good), modules=len({r["module"] for r in good}), names=len(seen),
        kinds=len(shown), worst=f"{max(r['error'] for r in good if r['float'] == 64):.0e}",
        wide=", ".join(f"{r['model']} ({r['error']:.0e})" for r in wide) or "none",
    )  # fmt: skip
    failures = [*bad, *(f"{name}: a layer outside the head follows the classes" for name in follows), *unshown]
    outcome = "None." if not failures else "\n".join(f"- {line}" for line in failures)
    return f"{text}\n{table(good)}\n\n## Failures and gaps\n\n{outcome}\n"


def table(good: list[Row]) -> str:
    """Return the Markdown table, a line a backbone."""
    lines = ["| module | model | preset | layers | computed | parameters | share | reached | px | effect | error |"]
    lines += ["|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for r in sorted(good, key=lambda r: (r["module"], NAMES.index(r["model"]))):
        preset = "attention + MLP" if r["preset"] else "dense"
        cells = (
            *(r["module"], r["model"], preset, f"{r['layers']} of {r['of']}", r["computed"]),
            *(f"{r['parameters']:,}", f"{r['parameters'] / r['base']:.2%}", f"{r['reached']:.0%}"),
            *(r["px"], f"{r['effect']:.2g}", f"{r['error']:.0e}"),
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


NAMES = [net.name for net in NETS]

HEAD = """# Families

What an adapter at its defaults is on every model module of timm, and whether it keeps its promises there.
Measured with {versions} on one CPU core:

```sh
python benchmarks/census.py prove --out families.jsonl
python benchmarks/census.py look --out names.jsonl
python benchmarks/census.py table families.jsonl names.jsonl > docs/families.md
```

**{models} backbones of all {modules} model modules**, in full depth and width, with random weights, keep every promise
of `tests/proof.py`: a fresh adapter changes no bit of the output and no key of the base; every A, every B and the head
have a say in the output; `disabled` and `remove` give the base, bit for bit; merged and unmerged outputs agree (worst:
{worst} of the change, in float64); the adapter's tensors, attached again, give the same output, bit for bit.
In float32, for their size: {wide}.

**All {names} names of timm**, at their own image size on PyTorch's meta device (shapes without numbers): every adapted layer is called and gets
a gradient; none of them is the stem, a gate, a network of positions or the head; every layer whose size follows the
number of classes is head. The backbones of the table hold all {kinds} pairs of block and layer kind that are adapted in
any of these names.

| column | |
|---|---|
| preset | `attention + MLP`: the names of attention and MLP layers; `dense`: every dense Linear and convolution outside stem, squeeze-excite and gating blocks, networks of positions and head |
| layers | layers with a low-rank change, of all Linear and convolution layers of the model |
| computed | of those, layers that run on the changed weight; all others run untouched beside a branch |
| parameters | of the low-rank changes at rank 16 (less where a layer is too small), without head and biases |
| share | those over the parameters of the model with 1000 classes |
| reached | parameters of the layers that change over those of the model |
| px | side of the image in the proof, the smallest the model takes |
| effect | largest change of an output by a random adapter, over the largest output |
| error | largest difference of merged and unmerged output, over the largest change |
"""  # noqa: E501


def main() -> int:
    """Run what the command line asks for; return 1 where a model failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])  # type: ignore[union-attr]
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("prove", "look"):
        verbs.add_parser(verb).add_argument("--out", type=Path, required=True)
    verbs.add_parser("table").add_argument("files", type=Path, nargs=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if options.verb == "prove":
        nets = {net.name: net for net in NETS}
        return int(every(nets, lambda name: proven(nets[name]), options.out) > 0)
    if options.verb == "look":
        return int(every(timm.list_models(), looked_at, options.out) > 0)
    sys.stdout.write(page(*map(rows, options.files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
