"""What a run writes besides checkpoints: its config, its metrics, its TensorBoard log."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.cli import SaveConfigCallback
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter
from pytorch_lightning.trainer.states import TrainerFn

from visionlora.atomic import write_atomic
from visionlora.commands.runs import CONFIG
from visionlora.errors import ConfigError
from visionlora.overview import table
from visionlora.report.predictions import PredictionWriter
from visionlora.vision.metrics import Result

FORGOTTEN = ("ckpt_path", "adapter", "run", "output")
"""Settings of one call, not of a run: a saved config starts afresh in a folder of its own."""


def loggers(folder: Path) -> list[Logger]:
    """Return metrics.csv and a TensorBoard log in the folder of a run."""
    return [MetricsFile(folder), TensorBoardLogger(folder, name="", version="tensorboard")]


class MetricsFile(CSVLogger):
    """metrics.csv in the folder itself; a resumed run goes on below the rows of the stopped one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    def log_dir(self) -> str:
        return self.save_dir

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Rows(self.save_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Leave them to config.yaml."""


class _Rows(ExperimentWriter):
    def _check_log_dir_exists(self) -> None:
        # Lightning deletes the file of an earlier run here
        path = Path(self.metrics_file_path)
        if path.is_file():
            with path.open(newline="") as file:
                self.metrics_keys = list(csv.DictReader(file).fieldnames or [])


class SaveStageConfig(SaveConfigCallback):
    """Save the whole config as config.yaml for fit, as config.test.yaml and so on for the other stages."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Wait: a checkpoint may yet refuse this config, and that of its run must stay."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, CONFIG)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._save(trainer, "config.validate.yaml")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, "config.test.yaml")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer, "config.predict.yaml")

    def _save(self, trainer: Trainer, name: str) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = self.config.clone()
        for key in FORGOTTEN:
            config.pop(key, None)
        config.trainer.default_root_dir = None
        write_atomic(folder / name, self.parser.dump(config, skip_none=False))
        self.already_saved = True


class WritePredictions(Callback):
    """Write OUT.csv and OUT.jsonl while predictions come, and say where they are."""

    def __init__(self, out: str | Path, *, top: int) -> None:
        self.out, self.top = out, top
        self._writer: PredictionWriter | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            raise ConfigError("predictions are written by one process: --trainer.devices 1")
        names: list[str] = pl_module.class_names  # type: ignore[assignment]
        self._writer = PredictionWriter(self.out, names, top=self.top).__enter__()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        assert self._writer is not None
        self._writer.write(outputs["paths"], outputs["probabilities"])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._writer is not None:
            self._writer.__exit__(None, None, None)
            images = "1 image" if self._writer.rows == 1 else f"{self._writer.rows:,} images"
            print(f"{images}: {self._writer.csv_path}, {self._writer.jsonl_path}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._writer is not None:
            self._writer.__exit__(type(exception), exception, exception.__traceback__)
            self._writer = None


def results_table(results: Mapping[str, Result]) -> str:
    """Return the scores of every set of images, one line each."""
    rows = [
        (name, f"{r.images:,}", f"{r.acc:.1%}", f"{r.f1:.1%}", f"{r.ece:.3f}", f"{r.loss:.4f}")
        for name, r in results.items()
    ]
    head = ("images of", "number", "accuracy", "macro F1", "calibration error", "loss")
    return "\n".join(table(head, rows, right=(1, 2, 3, 4, 5)))


def save_results(path: Path, results: Mapping[str, Result]) -> None:
    """Write the scores with those of every class and the confusion matrix as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({name: asdict(result) for name, result in results.items()}, indent=1) + "\n")
