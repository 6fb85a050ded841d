"""LoRA beside linear probe, norm tuning and full fine-tuning on real images, as accuracy on target and source.

    python benchmarks/adaptation.py signs --data DATA --weights WEIGHTS --work WORK --out results.jsonl

Every task starts from a classifier that knows the source domain (trained in full there, once, or published) and adapts
it to the target domain with the target's labels. LoRA runs at the defaults of ImageClassifier, each other method at
every learning rate of a grid. The tasks caltech-v1, caltech-v2 and signs-dev are for choosing defaults: none of their
target images is in another task's test; --folds chooses settings on a task's own training images.
One line of JSON a run: adaptation.jsonl has those of docs/results.md, and `--table` prints its tables.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from adaptation_rows import append, read_rows, tables, which
from backbones import TF_INPUT, mobilenet_v1, mobilenet_v2, vit_mnist, with_classes
from safetensors.torch import load_file, save_file
from torch import nn

from visionlora.config import LoraConfig
from visionlora.data.folders import Sample, read_tree
from visionlora.data.splits import stratified_split
from visionlora.vision.datamodule import ImageFolderData
from visionlora.vision.module import ImageClassifier

RATES: dict[str, tuple[float, ...]] = {"linear": (3e-3, 1e-2), "norm": (1e-2, 3e-2), "full": (3e-4, 1e-3, 3e-3)}
"""Learning rates of a method; the others run at the default of ImageClassifier."""
RATES_V2: dict[str, tuple[float, ...]] = {"linear": (3e-3, 1e-2), "norm": (3e-3, 1e-2), "full": (1e-4, 3e-4, 1e-3)}
LORA: dict[str, dict[str, Any]] = {
    "lora": {},
    "lora-bias": {"bias": "all"},
    "lora-affine": {"norm": "affine"},
    "lora-stats": {"norm": "stats-affine"},
    "lora-depthwise": {"modules_to_save": ["conv_dw"]},
    "lora-lean": {"variant": "fa"},
    "lora-small-cnn": {"norm": "affine", "modules_to_save": ["conv_dw"], "r": 32, "lora_alpha": 64.0},
}
"""What the variations of LoRA set beside the defaults of LoraConfig."""
MODES = (*LORA, "linear", "norm", "full")


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
    rates: dict[str, tuple[float, ...]] = field(default_factory=lambda: dict(RATES))
    modes: tuple[str, ...] = MODES


def office(backbone: Callable[[Path], nn.Module], target: str, epochs: int, shares: tuple[float, ...]) -> Task:
    rates = RATES_V2 if backbone is mobilenet_v2 else RATES
    return Task(backbone, "office", 10, ("amazon", "amazon"), (target, target), 128, epochs, 8, shares, rates=rates)


def signs(target: tuple[str, str], shares: tuple[float, ...]) -> Task:
    return Task(mobilenet_v1, "signs", 12, ("bright", "bright_test"), target, 128, 6, 8, shares, "^[^_]+")


TASKS = {
    "caltech-v1": office(mobilenet_v1, "caltech10", 20, (0.14, 0.36, 0.5)),
    "caltech-v2": office(mobilenet_v2, "caltech10", 10, (0.14, 0.36, 0.5)),
    "signs-dev": signs(("dark", "dark"), (0.6, 0.4)),
    "signs": signs(("dark", "dark_test"), ()),
    "webcam-v1": office(mobilenet_v1, "webcam", 20, (0.5, 0.5)),
    "dslr-v1": office(mobilenet_v1, "dslr", 20, (0.5, 0.5)),
    "webcam-v2": office(mobilenet_v2, "webcam", 10, (0.5, 0.5)),
    "dslr-v2": office(mobilenet_v2, "dslr", 10, (0.5, 0.5)),
    "digits": Task(
        vit_mnist, "digits", 10, ("mnist_test", "mnist_test"), ("usps_train", "usps_test"), 28, 8, 0,
        input={"mean": [0.1307], "std": [0.3081], "in_chans": 1, "interpolation": "bilinear", "crop_pct": 1.0},
        modes=("lora", "lora-bias", "linear", "norm", "full"),
    ),
}  # fmt: skip


def write_parts(task: Task, root: Path, path: Path, fold: tuple[int, int] | None = None) -> None:
    """Write the data set of a task as CSV with the domains source, source_test, target and target_test.

    With a fold, (0, 3) say, target_test is the first third of the target's training images instead.
    """
    parts: dict[str, list[Sample]] = {}
    samples = read_tree(root / task.folder, layout="domain/class")
    for name, (train, test), shares in (("source", task.source, (0.8, 0.2)), ("target", task.target, task.shares)):
        own = [s for s in samples if s.domain == train]
        if train == test and task.base_epochs:
            parts[name], parts[f"{name}_test"] = stratified_split(own, shares, group_by=task.group_by)[:2]
        else:
            parts[name] = own if train != test else []  # a published base: nothing to train on
            parts[f"{name}_test"] = [s for s in samples if s.domain == test]
    if fold:
        parts["target"], parts["target_test"] = outside_and_inside(parts["target"], *fold)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("path", "label", "domain"))
        rows.writerows((Path(s.path).resolve(), s.label, name) for name, part in parts.items() for s in part)


def outside_and_inside(samples: list[Sample], at: int, folds: int) -> tuple[list[Sample], list[Sample]]:
    """Return the samples outside a fold and those in it; every class is spread over the folds."""
    shuffled: list[Sample] = []
    for label in sorted({s.label for s in samples}):
        own = sorted((s for s in samples if s.label == label), key=lambda s: str(s.path))
        random.Random(7).shuffle(own)
        shuffled += own
    inside = shuffled[at % folds :: folds]
    return [s for s in sorted(shuffled, key=lambda s: str(s.path)) if s not in inside], inside


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


def base_of(task: Task, name: str, table: Path, weights: Path, work: Path, which_base: str | None) -> nn.Module:
    """Return the network that knows the source; train it on first use, once for every name of a base."""
    net = task.backbone(weights)
    if not task.base_epochs:
        return net
    with_classes(net, task.classes)
    kept = "-".join(part for part in (task.backbone.__name__, task.folder, which_base) if part)
    path = work / f"{kept}.safetensors"
    if not path.exists():
        rate = 1e-3 if task.backbone is mobilenet_v1 else 3e-4
        scores = fit(net, data_of(task, table, "source", 0), task.classes, task.base_epochs, 0, mode="full", lr=rate)
        print(f"base of {name}: {scores}", flush=True)
        save_file({key: tensor.contiguous() for key, tensor in net.state_dict().items()}, path)
    net.load_state_dict(load_file(path))
    return net


def runs(task: Task, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what says which run it is: seed, mode, learning rate, and what else was asked for."""
    keys = ("epochs", "folds", "lora", "settings", "base")
    asked = {key: value for key in keys if (value := getattr(args, key)) is not None}
    if not asked:
        yield {"mode": "before", "seed": None, "lr": None}
    for seed in args.seeds:
        for mode in (m for m in task.modes if m in args.modes):
            for rate in args.lr or task.rates.get(mode, (None,)):
                yield {"mode": mode, "seed": seed, "lr": rate, **asked}


def measure(name: str, args: argparse.Namespace) -> None:
    task = TASKS[name]
    args.work.mkdir(parents=True, exist_ok=True)
    table = args.work / f"{name}.csv"
    rows = read_rows(args.out)
    for run in runs(task, args):
        run = {"task": name, **run}
        if any(which(row) == run for row in rows):  # a call that broke off has left it
            continue
        seed = run["seed"] or 0
        write_parts(task, args.data, table, (seed, args.folds) if args.folds else None)
        net = base_of(task, name, table, args.weights, args.work, args.base)
        epochs = 0 if run["mode"] == "before" else run.get("epochs", task.epochs)
        scores = fit(net, data_of(task, table, "target", seed), task.classes, epochs, seed, **settings_of(run))
        append(args.out, run | scores | ({"trained": 0} if run["mode"] == "before" else {}))


def settings_of(run: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of ImageClassifier for a run."""
    mode = run["mode"]
    if mode in LORA:
        lora = LoraConfig(**LORA[mode] | run.get("lora", {}))
        return {"mode": "lora", "recipe": "none", "lora": lora, "lr": run["lr"], **run.get("settings", {})}
    return {} if mode == "before" else {"mode": mode, "lr": run["lr"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="*", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--data", type=Path, help="folder with office/, signs/ and digits/")
    parser.add_argument("--weights", type=Path, help="folder with the weights backbones.py reads")
    parser.add_argument("--work", type=Path, default=Path("runs/adaptation"), help="where base models and lists go")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptation.jsonl"))
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates, instead of those of the method")
    parser.add_argument("--epochs", type=int, help="instead of the epochs of the task")
    parser.add_argument(
        "--folds", type=int, help="test on the target's training images: seed k on the k-th of so many parts"
    )
    parser.add_argument("--lora", type=json.loads, help="""more settings of LoraConfig: '{"r": 32}'""")
    parser.add_argument("--settings", type=json.loads, help="""more settings of LoRA runs: '{"lora_plus": 4}'""")
    parser.add_argument("--base", help="name of a base of its own: another training of it; rows are kept apart")
    parser.add_argument("--table", type=Path, help="print the tables of a results file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if args.table:
        print(tables(read_rows(args.table)))
    for name in args.tasks:
        measure(name, args)


if __name__ == "__main__":
    main()
