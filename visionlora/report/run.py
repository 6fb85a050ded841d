"""The end of a training run: before and after measured, the table shown, everything written into the run's folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.plugins.precision import DoublePrecision, HalfPrecision

from visionlora.adapt import disabled
from visionlora.atomic import write_atomic
from visionlora.merging import fingerprint
from visionlora.report.closing import Closing, SetScores
from visionlora.report.costs import costs_of, peak_memory, saved_adapter
from visionlora.report.head import has_new_head
from visionlora.report.measure import Answers, answers_by_set, loaders_by_set, measured_here, shipped
from visionlora.report.pictures import confusion_picture, sample_picture
from visionlora.report.samples import Measured, sections
from visionlora.training.gather import whole_in_first_process
from visionlora.vision.features import FeatureDataset
from visionlora.vision.metrics import Result
from visionlora.vision.module import ImageClassifier
from visionlora.vision.settings import LEAN

__all__ = ["RunReport", "ignorance"]

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
        self._base = ""
        """Fingerprint of the base as the run trains on it: precision bf16-true or 64-true casts it first."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = _checked(pl_module)
        if self._unknown is None:  # a resumed run has it from its checkpoint: in mode full the base is gone
            self._unknown = ignorance(module)
        cast = isinstance(trainer.precision_plugin, (HalfPrecision, DoublePrecision))
        self._base = _fingerprint(trainer, module) if cast else module.fingerprint()
        fresh = trainer.ckpt_path is None and not trainer.fast_dev_run
        if module.config is None and fresh and not self._unknown and measured_here(trainer, module.net):
            self._before = {name: answers.result for name, answers in answers_by_set(trainer, module).items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.monotonic()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        module = _checked(pl_module)
        seconds, memory = self._total(), peak_memory(module.device)  # before the report takes its own
        folder = self.directory or Path(trainer.default_root_dir)
        saved = saved_adapter(trainer, module, folder)
        if not measured_here(trainer, module.net):
            return  # done: this process does not wait for the first one to measure
        with shipped(module, saved):
            after = answers_by_set(trainer, module)
        before = self._answers_before(trainer, module)
        unchanged = None if module.config is None else _fingerprint(trainer, module) == self._base
        if trainer.is_global_zero:
            results = {n: before[n].result for n in before} or self._before
            self.closing = Closing(
                sets={n: SetScores(a.result, results.get(n)) for n, a in after.items()},
                classes=len(module.class_names),
                notes=_notes(self._unknown or "", module),
                **costs_of(trainer, module, saved, seconds=seconds, memory=memory, unchanged=unchanged),
            )
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
            return answers_by_set(trainer, module)

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
        loaders = loaders_by_set(trainer)
        sets = {n: Measured(loaders[n].dataset, answers, before.get(n)) for n, answers in after.items()}
        data = trainer.datamodule  # type: ignore[attr-defined]
        training = data.train_dataloader().dataset if data is not None else None
        training = training.images if isinstance(training, FeatureDataset) else training
        shown = sections(training, sets, module.class_names, module.hparams.data)
        if any(shown.values()):
            sample_picture(folder / "samples.png", shown)


def _checked(module: LightningModule) -> ImageClassifier:
    assert isinstance(module, ImageClassifier), "RunReport reports on an ImageClassifier"
    return module


def _fingerprint(trainer: Trainer, module: ImageClassifier) -> str:
    """Return the hash of the base as it is, in the first process only; every process must call it."""
    with whole_in_first_process(module):
        return fingerprint(module.net) if trainer.is_global_zero else ""


def ignorance(module: ImageClassifier) -> str:
    """Return why the base cannot name these classes, or nothing."""
    cfg = module.net.__dict__.get("pretrained_cfg") or {}
    names = cfg.get("label_names")
    if names and list(names) != module.class_names:
        return "the base's head knows other classes"
    return "the base has no head for these classes" if has_new_head(module.net) else ""


def _notes(unknown: str, module: ImageClassifier) -> list[str]:
    told = [f"{unknown}: there is no accuracy before; chance is {1 / len(module.class_names):.1%}"] if unknown else []
    return [*told, LEAN] if module.config is not None and module.config.variant == "fa" else told
