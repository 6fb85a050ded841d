"""The end of a training run on text: before and after measured, the table shown, everything written into its folder."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor

from visionlora.adapt import disabled
from visionlora.atomic import write_atomic
from visionlora.io import read_adapter
from visionlora.merging import fingerprint
from visionlora.overview import table
from visionlora.report.costs import Costs, costs_of, peak_memory, saved_adapter
from visionlora.text.full import WEIGHTS as FULL
from visionlora.text.metrics import LanguageScores, Result
from visionlora.text.module import TextTask
from visionlora.training.gather import fill, is_sharded

__all__ = ["TextReport", "scores_table"]

log = logging.getLogger(__name__)

HEADLESS = "the base has no head for this task: there are no scores before"
SHOWN = ("acc", "f1", "em", "ppl", "rougeL", "bleu", "r2", "ece")
"""Scores of the table, of those a task has."""


@dataclass(frozen=True, kw_only=True)
class TextClosing(Costs):
    """A finished run in numbers. `str(closing)` is the table."""

    after: dict[str, Result]
    """Test sets by name: "target" first, "source" last."""
    before: dict[str, Result]
    """The same with the adapter off; empty where the base cannot answer."""
    note: str

    def to_json(self) -> str:
        """Return all of it."""
        return json.dumps(asdict(self), indent=1) + "\n"

    def __str__(self) -> str:
        rows = [row for name, result in self.after.items() for row in _rows(name, result, self.before.get(name))]
        lines = table(("texts of", "number", "score", "before", "after", "change"), rows, right=(1, 3, 4, 5))
        notes = [f"note: {self.note}"] if self.note else []
        return "\n".join([*(lines if rows else ["no test texts"]), "", *self.cost_lines(), *notes])


class TextReport(Callback):
    """Write summary.json when training ends, and show the closing table.

    Every test set of the data module is measured twice: with the adapter as it lies on disk (the best one, where an
    AdapterCheckpoint keeps it) and with the adapter off, which is the base. A task whose head the adapter brings has
    no "before"; a language model has one, its perplexity and its texts.
    """

    def __init__(self, directory: str | Path | None = None, *, show: Callable[[str], object] = print) -> None:
        self.directory = None if directory is None else Path(directory)
        self.show = show
        self.closing: TextClosing | None = None
        self._before: dict[str, Result] = {}
        self._seconds, self._since = 0.0, 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fresh = trainer.ckpt_path is None and not trainer.fast_dev_run
        if fresh and _task(pl_module).config is None and _knows(pl_module) and not is_sharded(pl_module.net):
            self._before = results(trainer, pl_module)  # in mode full the base is gone afterwards

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _task(pl_module)
        if trainer.fast_dev_run or is_sharded(module.net):
            return
        seconds, memory, folder = (
            self._total(),
            peak_memory(module.device),
            self.directory or Path(trainer.default_root_dir),
        )
        saved = saved_adapter(trainer, module, folder)
        if not trainer.is_global_zero:
            return
        with shipped(module, saved):
            after = results(trainer, module)
        before = self._before
        if module.config is not None and _knows(module):
            with disabled(module.net):
                before = results(trainer, module)
        unchanged = None if module.config is None else fingerprint(module.net) == module.fingerprint()
        self.closing = TextClosing(
            after=after,
            before=before,
            note="" if _knows(module) else HEADLESS,
            **costs_of(trainer, module, saved, seconds=seconds, memory=memory, unchanged=unchanged),
        )
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "summary.json", self.closing.to_json())
        self.show(str(self.closing))

    def state_dict(self) -> dict[str, Any]:
        return {"before": {name: asdict(result) for name, result in self._before.items()}, "seconds": self._total()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = {name: Result(**result) for name, result in state["before"].items()}
        self._seconds = state["seconds"]

    def _total(self) -> float:
        return self._seconds + (time.monotonic() - self._since if self._since else 0.0)


def results(trainer: Trainer, module: TextTask) -> dict[str, Result]:
    """Return the scores of the model as it is for every test set of the data module; no process waits for another."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None or not hasattr(data, "test_names"):
        return {}
    limit, found, training = trainer.limit_test_batches, {}, module.net.training
    module.net.eval()
    try:
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for name, loader in zip(data.test_names, data.test_dataloader(), strict=True):
                most = limit if isinstance(limit, int) else int(limit * len(loader)) if limit < 1 else None
                scores = module.task.scores(data.examples[f"test/{name}"], module.device, shared=False)
                for batch in islice(iter(loader), most):
                    placed = {k: v.to(module.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                    scores.update(module(placed), placed)
                    if isinstance(scores, LanguageScores) and "references" in placed:
                        texts = module.write(placed)
                        if texts is not None:
                            scores.add_texts(texts, placed["references"])
                found[name] = scores.compute()
    finally:
        module.net.train(training)
    return found


@contextmanager
def shipped(module: TextTask, saved: Path) -> Iterator[None]:
    """Let the network have the values that lie on disk inside the block."""
    net, name = module.net, module.hparams.adapter_name
    if module.config is None:
        state = load_file(saved / FULL)
    else:
        parts = {key: key.split("/") for key in read_adapter(saved).tensors}
        tensors = read_adapter(saved).tensors
        state = {
            f"{layer}.adapters.{name}.{attribute}.{leaf}".removeprefix("."): tensors[key]
            for key, (layer, attribute, leaf) in parts.items()
        }
    own = net.state_dict()
    kept = {key: own[key].detach().clone() for key in state if key in own}
    fill(net, {key: state[key] for key in kept}, strict=False)
    try:
        yield
    finally:
        fill(net, kept, strict=False)


def scores_table(found: Mapping[str, Result]) -> str:
    """Return the scores of every set of texts, one line each."""
    names = [name for name in ("loss", *SHOWN) if any(name in result.scalars() for result in found.values())]
    rows = [
        (name, f"{result.count:,}", *(_number(result.scalars().get(score)) for score in names))
        for name, result in found.items()
    ]
    return "\n".join(table(("texts of", "number", *names), rows, right=tuple(range(1, len(names) + 2))))


def _rows(name: str, after: Result, before: Result | None) -> Iterator[tuple[str, ...]]:
    scores = [score for score in SHOWN if score in after.scalars()]
    for at, score in enumerate(scores):
        now = after.scalars()[score]
        was = None if before is None else before.scalars().get(score)
        change = "-" if was is None else f"{now - was:+.3f}"
        yield (name if not at else "", f"{after.count:,}" if not at else "", score, _number(was), _number(now), change)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _task(module: LightningModule) -> TextTask:
    assert isinstance(module, TextTask), "TextReport reports on a TextTask"
    return module


def _knows(module: Any) -> bool:
    """Tell whether the base answers without an adapter: a language model does, a classifier has no head yet."""
    return bool(module.task.writes)
