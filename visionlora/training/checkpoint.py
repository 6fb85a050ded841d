"""What a run leaves on disk: `last.ckpt` to go on from, and `adapter/`, the best one, to ship."""

from __future__ import annotations

import logging
import math
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, WeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy

from visionlora.atomic import atomic_path
from visionlora.errors import ConfigError, NonFiniteError
from visionlora.training.checkpoint_io import AtomicCheckpointIO
from visionlora.training.ema import averaged
from visionlora.training.fsdp2 import whole_checkpoints
from visionlora.training.gather import whole_in_first_process
from visionlora.training.loops import between_steps, in_fit, validate_again, validation_follows
from visionlora.training.rates import Rates
from visionlora.training.record import changed_settings, check_fits, filter_frozen, make_record, plain_settings

log = logging.getLogger(__name__)

BEST: dict[str, Literal["min", "max"]] = {
    **dict.fromkeys(("loss", "ece", "ppl"), "min"),
    **dict.fromkeys(("acc", "f1", "em", "rougeL", "bleu", "r2"), "max"),
}
"""Which end of a metric is the good one, by the last part of its name."""


class AdapterCheckpoint(Checkpoint):
    """Keep `last.ckpt` (resumable, without the frozen base) and `adapter/` (best by a validation metric).

    `last.ckpt` is written after every epoch, every `every_n_steps` optimiser steps, and when a fault outside a training
    step ends the run; the one before it stays as `previous.ckpt`. `adapter/` is written by the module's `save_adapter`
    whenever `monitor` improves (mode "auto": losses and errors fall, other metrics rise); without `monitor`, after
    every epoch. A fast_dev_run keeps nothing. `directory` None is Trainer's default_root_dir.

    Resuming checks the checkpoint before anything changes: the base fingerprint, every tensor, the parameter groups and
    the settings named in `fixed` (dotted hyper-parameters, a prefix covers what is below it) must fit, else ResumeError
    with the differences. Every other setting is taken from the run that resumes, learning rates included, and told.
    Needs Trainer(plugins=[AtomicCheckpointIO()]).
    """

    def __init__(
        self,
        directory: str | Path | None = None,
        *,
        monitor: str | None = "val/acc",
        mode: Literal["auto", "min", "max"] = "auto",
        every_n_steps: int | None = None,
        fixed: Sequence[str] = (),
    ) -> None:
        if mode not in ("auto", "min", "max"):
            raise ConfigError(f'mode must be "auto", "min" or "max", got {mode!r}')
        known = BEST.get((monitor or "").rpartition("/")[2])
        if known is not None and mode not in ("auto", known):
            raise ConfigError(f"the best {monitor} is its {known}, not its {mode}; leave mode away")
        self.directory = None if directory is None else Path(directory)
        self.monitor, self.mode, self.every_n_steps, self.fixed = monitor, mode, every_n_steps, tuple(fixed)
        self.best: float | None = None
        """Value of the monitored metric when `adapter/` was written."""
        self.best_step: int | None = None
        self._fingerprint = ""
        self._saved_at, self._due, self._compared = -1, False, False
        self._rates = Rates()

    @property
    def last_path(self) -> Path:
        assert self.directory is not None, "known after setup"
        return self.directory / "last.ckpt"

    @property
    def adapter_path(self) -> Path:
        assert self.directory is not None, "known after setup"
        return self.directory / "adapter"

    @property
    def best_model_path(self) -> str:
        """Nothing: Lightning would load it for `ckpt_path="best"`; the best here is an adapter, not a checkpoint."""
        return ""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # processes that start one after the other may have found another folder free
        self.directory = trainer.strategy.broadcast(self.directory or Path(trainer.default_root_dir))
        if isinstance(trainer.strategy, ModelParallelStrategy):
            whole_checkpoints(trainer.strategy)
        checkpoint_io = trainer.strategy.checkpoint_io
        if not isinstance(checkpoint_io, AtomicCheckpointIO):
            raise ConfigError("AdapterCheckpoint needs Trainer(plugins=[AtomicCheckpointIO()])")
        if any(isinstance(c, WeightAveraging) for c in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError("Lightning's weight averaging writes and wants the whole model; use AdapterEMA instead")
        pl_module.strict_loading = False  # the frozen base is not in the file; the keys are checked in `record`
        self._fingerprint = pl_module.fingerprint()  # type: ignore[operator]
        checkpoint_io.inspect = lambda checkpoint: self._inspect(checkpoint, pl_module, stage)

    def _inspect(self, checkpoint: dict[str, Any], pl_module: LightningModule, stage: str) -> None:
        check_fits(checkpoint, pl_module, self._fingerprint, self.fixed)
        if stage == "fit":
            for line in changed_settings(checkpoint, pl_module):
                log.info("changed since the checkpoint: %s", line)
            self._rates.remember_checkpoint(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rates.remember_configured(trainer)
        if trainer.fast_dev_run and trainer.is_global_zero:
            log.info("fast_dev_run: a trial, of which nothing is kept")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rates.apply(trainer)
        self._saved_at = trainer.global_step
        if self.best is not None and not trainer.strategy.broadcast(self.adapter_path.is_dir()):
            if trainer.is_global_zero:
                log.info("no adapter at %s: the best one is chosen anew", self.adapter_path)
            self.best = self.best_step = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        every = None if trainer.fast_dev_run else self.every_n_steps
        self._due = every is not None and every > 0 and step % every == 0 and step != self._saved_at
        # from a file of here a resumed run would not go back to the validation and the end of the epoch that follow;
        # there it is saved too
        if self._due and not validation_follows(trainer) and batch_idx + 1 < trainer.num_training_batches:
            self.save_last(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if in_fit(trainer) and self._due:
            self.save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.monitor is not None and not self._compared and not trainer.fast_dev_run:
            save_in_first_process(trainer, pl_module, self.adapter_path)
            if trainer.is_global_zero:
                log.info("%s was never measured: %s is that of the last step", self.monitor, self.adapter_path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if in_fit(trainer) and not trainer.fast_dev_run and self.monitor is not None and self._improved(trainer):
            save_in_first_process(trainer, pl_module, self.adapter_path)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:
            return
        if self.monitor is None:
            save_in_first_process(trainer, pl_module, self.adapter_path)
        self.save_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, NonFiniteError):
            self._tell_the_last_good(trainer)
            return
        # between two steps (a loader worker died, an image cannot be read) the state is sound; inside one it is not
        began = self._saved_at >= 0  # else nothing was trained since the checkpoint
        sound = in_fit(trainer) and between_steps(trainer) and trainer.global_step > 0 and began
        if sound and isinstance(exception, Exception) and trainer.world_size == 1:
            self.save_last(trainer)
            log.error("the run failed between two steps; go on from %s once the cause is gone", self.last_path)

    def _tell_the_last_good(self, trainer: Trainer) -> None:
        if in_fit(trainer) and trainer.is_global_zero:
            kept = [str(path) for path in (self.adapter_path, self.last_path) if path.exists()]
            where = f"kept from before: {', '.join(kept)}" if kept else "nothing was saved before"
            log.error("stopped at step %d, epoch %d; %s", trainer.global_step, trainer.current_epoch, where)

    def save_last(self, trainer: Trainer) -> Path:
        """Write `last.ckpt`, keep the one before as `previous.ckpt`; every process must call it. Return the path."""
        if trainer.is_global_zero and zipfile.is_zipfile(self.last_path):  # a cut file must not replace a whole one
            _keep(self.last_path, self.last_path.with_name("previous.ckpt"))
        trainer.save_checkpoint(self.last_path)
        self._saved_at, self._due = trainer.global_step, False
        return self.last_path

    def _improved(self, trainer: Trainer) -> bool:
        metrics, self._compared = trainer.callback_metrics, True
        if self.monitor not in metrics:
            raise ConfigError(f"no metric {self.monitor!r} to choose the best adapter by; logged: {', '.join(metrics)}")
        # every process must save or none: without sync_dist each has a metric of its own, and the first one decides
        value = trainer.strategy.broadcast(float(metrics[self.monitor]))
        if not math.isfinite(value):
            log.warning("%s is %s at step %d: not the best adapter", self.monitor, value, trainer.global_step)
            return False
        falls = "min" in (self.mode, BEST.get(str(self.monitor).rpartition("/")[2]))
        better = self.best is None or (value < self.best if falls else value > self.best)
        if better:
            self.best, self.best_step = value, trainer.global_step
        return better

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        filter_frozen(checkpoint, pl_module)
        plain_settings(checkpoint)
        if trainer.validating and in_fit(trainer):
            validate_again(checkpoint)
        checkpoint["visionlora"] = make_record(pl_module, self._fingerprint)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.best_step = state["best"], state["best_step"]
        self._compared = self.best is not None


def save_in_first_process(trainer: Trainer, pl_module: LightningModule, directory: Path) -> None:
    """Write what is shipped, averages where there are any, to a directory; every process must call it."""
    with averaged(trainer, pl_module), whole_in_first_process(pl_module):
        if trainer.is_global_zero:
            pl_module.save_adapter(directory)  # type: ignore[operator]
    trainer.strategy.barrier("save_adapter")


def _keep(path: Path, as_path: Path) -> None:
    with atomic_path(as_path) as temporary:
        temporary.unlink()
        try:
            os.link(path, temporary)
        except OSError:  # a file system without links
            temporary.write_bytes(path.read_bytes())
