"""LoRA beside linear probe, norm tuning and full fine-tuning on real images, as accuracy on target and source.

    python benchmarks/adaptation.py signs --data DATA --weights WEIGHTS --work WORK --out results.jsonl

Every task starts from a classifier that knows the source domain (trained in full there, once, or published) and adapts
it to the target domain with the target's labels. LoRA runs at the defaults of ImageClassifier; each other method runs
at every learning rate of a grid and is reported at the one that is best on the target test images, which favours it.
The tasks caltech-v1 and signs-dev are for choosing defaults: none of their target images is in another task's test.
One line of JSON a run; `--table results.jsonl` prints the tables of docs/results.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytorch_lightning as pl
from backbones import TF_INPUT, mobilenet_v1, mobilenet_v2, vit_mnist, with_classes
from safetensors.torch import load_file, save_file
from torch import nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import geometry_of
from visionlora.data.folders import Sample, read_tree
from visionlora.data.splits import stratified_split
from visionlora.vision.datamodule import ImageFolderData
from visionlora.vision.module import ImageClassifier

GRID: dict[str, tuple[float | None, ...]] = {
    "lora": (None,),
    "lora-bias": (None,),
    "lora-affine": (None,),
    "lora-stats": (None,),
    "lora-depthwise": (None,),
    "linear": (3e-3, 1e-2),
    "norm": (1e-2, 3e-2),
    "full": (3e-4, 1e-3, 3e-3),
}
SHORT_GRID: dict[str, tuple[float | None, ...]] = {
    "lora": (None,),
    "lora-bias": (None,),
    "lora-affine": (None,),
    "lora-stats": (None,),
    "lora-depthwise": (None,),
    "linear": (1e-2,),
    "norm": (1e-2,),
    "full": (3e-4, 1e-3),
}


@dataclass(frozen=True)
class Task:
    """A backbone, a source it knows and a target it should learn."""

    backbone: Callable[[Path], nn.Module]
    folder: str
    classes: int
    source: tuple[str, str]
    """Domain the base is trained on, and the domain of its test images; the same twice: a fifth of it."""
    target: tuple[str, str]
    """Likewise; the same twice: the second of `shares`."""
    size: int
    epochs: int
    base_epochs: int = 8
    shares: tuple[float, ...] = (0.5, 0.5)
    """Parts of the target domain: for training, for the test, and unused."""
    group_by: str | None = None
    input: dict[str, Any] = field(default_factory=lambda: dict(TF_INPUT))
    grid: dict[str, tuple[float | None, ...]] = field(default_factory=lambda: dict(GRID))


def office(backbone: Callable[[Path], nn.Module], target: str, epochs: int, shares: tuple[float, ...]) -> Task:
    grid = SHORT_GRID if backbone is mobilenet_v2 else GRID
    return Task(backbone, "office", 10, ("amazon", "amazon"), (target, target), 128, epochs, 8, shares, grid=grid)


def signs(target: tuple[str, str], shares: tuple[float, ...]) -> Task:
    return Task(mobilenet_v1, "signs", 12, ("bright", "bright_test"), target, 128, 6, 8, shares, "^[^_]+")


TASKS = {
    "caltech-v1": office(mobilenet_v1, "caltech10", 20, (0.14, 0.36, 0.5)),
    "signs-dev": signs(("dark", "dark"), (0.6, 0.4)),
    "signs": signs(("dark", "dark_test"), ()),
    "webcam-v1": office(mobilenet_v1, "webcam", 20, (0.5, 0.5)),
    "dslr-v1": office(mobilenet_v1, "dslr", 20, (0.5, 0.5)),
    "webcam-v2": office(mobilenet_v2, "webcam", 10, (0.5, 0.5)),
    "dslr-v2": office(mobilenet_v2, "dslr", 10, (0.5, 0.5)),
    "digits": Task(
        vit_mnist, "digits", 10, ("mnist_test", "mnist_test"), ("usps_train", "usps_test"), 28, 8, 0,
        input={"mean": [0.1307], "std": [0.3081], "in_chans": 1, "interpolation": "bilinear", "crop_pct": 1.0},
    ),
}  # fmt: skip


def write_parts(task: Task, root: Path, path: Path) -> None:
    """Write the data set of a task as CSV with the domains source, source_test, target and target_test."""
    parts: dict[str, list[Sample]] = {}
    samples = read_tree(root / task.folder, layout="domain/class")
    for name, (train, test), shares in (("source", task.source, (0.8, 0.2)), ("target", task.target, task.shares)):
        own = [s for s in samples if s.domain == train]
        if train == test and task.base_epochs:
            parts[name], parts[f"{name}_test"] = stratified_split(own, shares, group_by=task.group_by)[:2]
        else:
            parts[name] = own if train != test else []  # a published base: nothing to train on
            parts[f"{name}_test"] = [s for s in samples if s.domain == test]
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "domain"))
        rows.writerows((Path(s.path).resolve(), s.label, name) for name, part in parts.items() for s in part)


def data_of(task: Task, table: Path, domain: str, seed: int) -> ImageFolderData:
    return ImageFolderData(
        csv=str(table), train_domains=[domain], test_domains=["target_test"], source_domains=["source_test"],
        val_fraction=0.0, image_size=task.size, augment="none" if task.classes == 10 and task.size == 28 else "light",
        batch_size=32, num_workers=0, seed=seed, **task.input,
    )  # fmt: skip


def fit(net: nn.Module, data: ImageFolderData, classes: int, epochs: int, seed: int, **settings: Any) -> dict[str, Any]:
    """Train and test; return accuracies, parameters and seconds."""
    pl.seed_everything(seed, verbose=False)
    module = ImageClassifier.from_model(net, num_classes=classes, seed=seed, label_smoothing=0.1, **settings)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    start = time.perf_counter()
    if epochs:
        trainer.fit(module, datamodule=data)
    seconds = time.perf_counter() - start
    trainer.test(module, datamodule=data, verbose=False)
    scores = {name.rpartition("/")[2]: result.acc for name, result in module.results.items()}
    trained = sum(p.numel() for group in module.trainable_groups().values() for p in group)
    return {"target": scores["target"], "source": scores["source"], "trained": trained, "seconds": round(seconds, 1)}


def base_of(task: Task, name: str, table: Path, weights: Path, work: Path) -> nn.Module:
    """Return the network that knows the source; train it on first use."""
    net = task.backbone(weights)
    if not task.base_epochs:
        return net
    with_classes(net, task.classes)
    path = work / f"{task.backbone.__name__}-{task.folder}.safetensors"
    if not path.exists():
        rate = 1e-3 if task.backbone is mobilenet_v1 else 3e-4
        scores = fit(net, data_of(task, table, "source", 0), task.classes, task.base_epochs, 0, mode="full", lr=rate)
        print(f"base of {name}: {scores}", flush=True)
        save_file(net.state_dict(), path)
    net.load_state_dict(load_file(path))
    return net


def runs(task: Task, modes: list[str], seeds: int) -> Iterator[tuple[int, str, float | None]]:
    return ((seed, mode, rate) for seed in range(seeds) for mode in modes for rate in task.grid[mode])


def measure(name: str, args: argparse.Namespace) -> None:
    task = TASKS[name]
    args.work.mkdir(parents=True, exist_ok=True)
    table = args.work / f"{name}.csv"
    write_parts(task, args.data, table)
    done = already(args.out, name)
    for seed, mode, rate in [(None, "before", None), *runs(task, args.modes, args.seeds)]:
        if (seed, mode, rate) in done:
            continue
        net = base_of(task, name, table, args.weights, args.work)
        epochs, settings = (task.epochs, settings_of(mode, rate, net)) if mode != "before" else (0, {})
        scores = fit(net, data_of(task, table, "target", seed or 0), task.classes, epochs, seed or 0, **settings)
        record(args.out, {"task": name, "mode": mode, "seed": seed, "lr": rate, **scores})


def settings_of(mode: str, rate: float | None, net: nn.Module) -> dict[str, Any]:
    """Return the settings of a mode; the variations of LoRA differ from the defaults in what else they train."""
    depthwise = [n for n, m in net.named_modules() if (geo := geometry_of(m)) is not None and geo.depthwise]
    variations = {
        "lora-bias": {"bias": "all"},
        "lora-affine": {"norm": "affine"},
        "lora-stats": {"norm": "stats-affine"},
        "lora-depthwise": {"modules_to_save": depthwise or "auto"},
    }
    if mode in variations:
        return {"mode": "lora", "lora": LoraConfig(**variations[mode]), "lr": rate}
    return {"mode": mode, "lr": rate}


def already(path: Path, name: str) -> set[tuple[Any, Any, Any]]:
    """Return the runs of a task that a broken-off call has left in the results."""
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["task"] == name]
    return {(row.get("seed"), row["mode"], row.get("lr")) for row in rows}


def record(path: Path, row: dict[str, Any]) -> None:
    print(row, flush=True)
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def tables(path: Path) -> str:
    """Return the Markdown tables of a results file."""
    found: dict[str, dict[str, dict[Any, list[dict[str, Any]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(list))
    )
    for line in path.read_text().splitlines():
        row = json.loads(line)
        found[row["task"]][row["mode"]][row.get("lr")].append(row)
    lines = []
    for task, modes in found.items():
        lines += [f"### {task}", "", "| method | trained | target | source | s |", "|---|---|---|---|---|"]
        for mode, rates in modes.items():
            rate, rows = max(rates.items(), key=lambda item: mean(r["target"] for r in item[1]))
            label = mode if rate is None else f"{mode} (lr {rate:g})"
            cells = [f"{rows[0]['trained']:,}", *(spread([100 * r[k] for r in rows]) for k in ("target", "source"))]
            lines.append(f"| {label} | {' | '.join(cells)} | {mean(r['seconds'] for r in rows):.0f} |")
        lines.append("")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--data", type=Path, help="folder with office/, signs/ and digits/")
    parser.add_argument("--weights", type=Path, help="folder with the weights backbones.py reads")
    parser.add_argument("--work", type=Path, default=Path("runs/adaptation"), help="where base models and lists go")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptation.jsonl"))
    parser.add_argument("--modes", nargs="+", default=list(GRID), choices=GRID)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", type=Path, help="print the tables of a results file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if args.table:
        print(tables(args.table))
    for name in args.tasks:
        measure(name, args)


if __name__ == "__main__":
    main()
