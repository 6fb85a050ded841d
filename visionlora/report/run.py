"""The end of a training run: before and after measured, the table shown, everything written into the run's folder."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.model_helpers import is_overridden
from safetensors.torch import load_file
from torch import nn

from visionlora.adapt import activate, active_adapters, disabled, remove
from visionlora.atomic import write_atomic
from visionlora.io import load_adapter
from visionlora.io.read import WEIGHTS as ADAPTER
from visionlora.merging import base_state_dict, fingerprint
from visionlora.report.closing import Closing, SetScores
from visionlora.report.measure import Answers, answer
from visionlora.report.pictures import confusion_picture, sample_picture
from visionlora.report.samples import Measured, sections
from visionlora.targets import head_layers
from visionlora.training.checkpoint import AdapterCheckpoint
from visionlora.training.ema import averaged
from visionlora.vision.full import WEIGHTS as FULL
from visionlora.vision.metrics import Result
from visionlora.vision.module import ImageClassifier

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["RunReport"]

log = logging.getLogger(__name__)


class RunReport(Callback):
    """Write summary.json, confusion_matrix.png and samples.png when training ends, and show the closing table.

    Every test set of the data module is measured twice: with the adapter as it lies on disk (the best one, where an
    AdapterCheckpoint keeps it) and with the adapter off, which is the base. In mode "full" the base is measured before
    training. A base whose head does not know the classes has no "before". `directory` None is Trainer's
    default_root_dir; `show` gets the table, in the first process only.
    """

    def __init__(self, directory: str | Path | None = None, *, show: Callable[[str], object] = print) -> None:
        self.directory = None if directory is None else Path(directory)
        self.show = show
        self.closing: Closing | None = None
        self._before: dict[str, Result] = {}
        """Results of the base by test set, in mode full, where it is gone afterwards."""
        self._unknown: str | None = None
        """Why the base cannot name the classes; empty where it can, None before the fit."""
        self._seconds, self._since = 0.0, 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _checked(pl_module)
        if self._unknown is None:  # a resumed run has it from its checkpoint: in mode full the base is gone
            self._unknown = _ignorance(module)
        fresh = trainer.ckpt_path is None and not trainer.fast_dev_run
        if module.config is None and fresh and not self._unknown:
            self._before = {name: answers.result for name, answers in _answers(trainer, module).items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        module = _checked(pl_module)
        memory, memory_of = _memory(module.device)
        seconds = self._total()
        folder = self.directory or Path(trainer.default_root_dir)
        saved = _saved(trainer, module, folder)
        with _shipped(module, saved):
            after = _answers(trainer, module)
        before = self._answers_before(trainer, module)
        sets = {
            n: SetScores(a.result, before[n].result if n in before else self._before.get(n)) for n, a in after.items()
        }
        size = (saved / (FULL if module.config is None else ADAPTER)).stat().st_size
        self.closing = Closing(
            sets,
            classes=len(module.class_names),
            mode=module.hparams.mode,
            trainable=sum(p.numel() for group in module.trainable_groups().values() for p in group),
            base=_parameters(module.net),
            saved=str(saved),
            size=size,
            seconds=seconds,
            epochs=trainer.current_epoch,
            steps=trainer.global_step,
            memory=memory,
            memory_of=memory_of,
            base_unchanged=None if module.config is None else fingerprint(module.net) == module.fingerprint(),
            notes=_notes(self._unknown or "", len(module.class_names)),
        )
        if trainer.is_global_zero:
            self._write(folder, trainer, module, self.closing, after, before)
            self.show(str(self.closing))

    def state_dict(self) -> dict[str, Any]:
        before = {name: asdict(result) for name, result in self._before.items()}
        return {"before": before, "unknown": self._unknown, "seconds": self._total()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._before = {name: Result(**result) for name, result in state["before"].items()}
        self._unknown, self._seconds = state["unknown"], state["seconds"]

    def _total(self) -> float:
        return self._seconds + (time.monotonic() - self._since if self._since else 0.0)

    def _answers_before(self, trainer: Trainer, module: ImageClassifier) -> dict[str, Answers]:
        if module.config is None or self._unknown:
            return {}
        with disabled(module.net):
            return _answers(trainer, module)

    def _write(
        self,
        folder: Path,
        trainer: Trainer,
        module: ImageClassifier,
        closing: Closing,
        after: dict[str, Answers],
        before: dict[str, Answers],
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "summary.json", closing.to_json())
        for logger in trainer.loggers:
            logger.log_metrics(closing.scalars(), step=trainer.global_step)
        results = {name: answers.result for name, answers in after.items()} or module.results
        for name, result in list(results.items())[:1]:
            confusion_picture(folder / "confusion_matrix.png", result, module.class_names, title=name)
        loaders = _test_loaders(trainer)
        sets = {n: Measured(loaders[n].dataset, answers, before.get(n)) for n, answers in after.items()}
        data = trainer.datamodule  # type: ignore[attr-defined]
        training = data.train_dataloader().dataset if data is not None else None
        shown = sections(training, sets, module.class_names, module.hparams.data)
        if any(shown.values()):
            sample_picture(folder / "samples.png", shown)


def _checked(module: LightningModule) -> ImageClassifier:
    assert isinstance(module, ImageClassifier), "RunReport reports on an ImageClassifier"
    return module


def _test_loaders(trainer: Trainer) -> dict[str, Any]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None or not is_overridden("test_dataloader", data):
        return {}
    loaders = data.test_dataloader()
    loaders = loaders if isinstance(loaders, (list, tuple)) else [loaders]
    names = getattr(data, "test_names", None) or [f"test {i}" for i in range(len(loaders))]
    return dict(zip(names, loaders, strict=True))


def _answers(trainer: Trainer, module: ImageClassifier) -> dict[str, Answers]:
    limit = trainer.limit_test_batches
    found = {}
    for name, loader in _test_loaders(trainer).items():
        most = limit if isinstance(limit, int) else int(limit * len(loader)) if limit < 1 else None
        context = trainer.precision_plugin.forward_context()
        found[name] = answer(module.net, loader, len(module.class_names), most_batches=most, context=context)
    return found


@contextmanager
def _shipped(module: ImageClassifier, saved: Path) -> Iterator[None]:
    """Let the network be what lies on disk inside the block."""
    net = module.net
    if module.config is None:
        kept = {key: tensor.detach().clone() for key, tensor in net.state_dict().items()}
        net.load_state_dict(load_file(saved / FULL))
        try:
            yield
        finally:
            net.load_state_dict(kept)
        return
    own = active_adapters(net)
    name = load_adapter(net, saved, name="shipped" if module.hparams.adapter_name != "shipped" else "on_disk")
    try:
        activate(net, name)
        yield
    finally:
        remove(net, name)
        for adapter, strength in own.items():
            activate(net, adapter, strength)


def _saved(trainer: Trainer, module: ImageClassifier, folder: Path) -> Path:
    """Return where the adapter of this run lies; it is written now if no callback kept the best."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, AdapterCheckpoint) and (callback.best is not None or callback.monitor is None):
            return callback.adapter_path
    if trainer.is_global_zero:
        with averaged(trainer, module):
            module.save_adapter(folder / "adapter")
    trainer.strategy.barrier("report")
    return folder / "adapter"


def _ignorance(module: ImageClassifier) -> str:
    """Return why the base cannot name these classes, or nothing."""
    cfg = module.net.__dict__.get("pretrained_cfg") or {}
    names = cfg.get("label_names")
    if names and list(names) != module.class_names:
        return "the base's head knows other classes"
    state = base_state_dict(module.net)
    heads = [state[key] for name in head_layers(module.net) for key in (f"{name}.weight",) if key in state]
    fresh = bool(heads) and not any(bool(weight.any()) for weight in heads)
    return "the base has no head for these classes" if fresh else ""


def _notes(unknown: str, classes: int) -> list[str]:
    return [f"{unknown}: there is no accuracy before; chance is {1 / classes:.1%}"] if unknown else []


def _parameters(net: nn.Module) -> int:
    own = {name for name, _ in net.named_parameters()}
    return sum(tensor.numel() for key, tensor in base_state_dict(net).items() if key in own)


def _memory(device: torch.device) -> tuple[int | None, str]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "GPU"
    if resource is None:
        return None, "process"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process"
