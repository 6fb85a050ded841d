"""A run that is asked to stop finishes its step, saves and says where."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.strategies import ParallelStrategy

from visionlora.training.checkpoint import AdapterCheckpoint
from visionlora.training.loops import handlers_to_restore, validation_follows

log = logging.getLogger(__name__)

HANDLED = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class StoppedBySignal(SystemExit):
    """The run saved its state and ends with exit code 128 + signal number."""


class StopOnSignal(Checkpoint):
    """On SIGTERM, SIGINT (Ctrl-C) or SIGHUP: finish the step, save `last.ckpt`, end with exit code 143, 130 or 129.

    In a validation it saves at once; the resumed run repeats that validation. A second Ctrl-C ends the run at once,
    without saving. With several processes one signal to any of them stops all. SIGUSR1 stays Slurm's.
    Lightning runs a Checkpoint callback after the others, so the averages of the step are in the file. `resume_with` is
    the beginning of a command that goes on from the file, to be told.
    """

    def __init__(self, checkpoint: AdapterCheckpoint, *, resume_with: str = "") -> None:
        self.checkpoint, self.resume_with = checkpoint, resume_with
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        """Handlers to put back, by signal."""
        self._active = False
        self._pid = os.getpid()
        self._pending: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and threading.current_thread() is threading.main_thread():
            self.received = self._pending = None
            self._pid = os.getpid()
            # before any loader worker is forked: Ctrl-C in a terminal reaches the workers too
            self._previous = {n: signal.signal(n, self._handle) or signal.SIG_DFL for n in HANDLED}
            self._active = True

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_again(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._install_again(trainer)

    def _install_again(self, trainer: Trainer) -> None:
        # Lightning has put its own handler of SIGTERM before ours; it ends the run with exit code 0 and saves nothing
        if self._active:
            for number in self._previous:
                signal.signal(number, self._handle)
            handlers_to_restore(trainer, self._previous)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._active = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            _in_worker(number)
            return
        if number == signal.SIGINT and self.received == signal.SIGINT:
            log.warning("second Ctrl-C: ending at once, without saving")
            raise StoppedBySignal(128 + number)
        self.received = number
        log.warning("%s received: saving after this step%s", signal.Signals(number).name, _hint(number))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        number = self._agreed(trainer)
        last = batch_idx + 1 == trainer.num_training_batches
        if number is None or (not last and (batch_idx + 1) % trainer.accumulate_grad_batches):
            return
        if last or validation_follows(trainer):
            self._pending = number  # the next hook saves: then the resumed run validates too
        else:
            self._save_and_stop(trainer, number)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._pending is not None:
            self._save_and_stop(trainer, self._pending)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        number = self._agreed(trainer) if self._active else None
        if number is not None and trainer.sanity_checking:
            raise StoppedBySignal(_exit_code(trainer, number))
        if number is not None:
            self._save_and_stop(trainer, number)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number = self._pending or self._agreed(trainer)
        if number is not None:
            self._save_and_stop(trainer, number)

    def _agreed(self, trainer: Trainer) -> int | None:
        if trainer.world_size == 1:
            return self.received
        return next(
            (n for n in HANDLED if trainer.strategy.reduce_boolean_decision(self.received == n, all=False)), None
        )

    def _save_and_stop(self, trainer: Trainer, number: int) -> None:
        path = self.checkpoint.save_last(trainer)
        trainer.strategy.barrier("stopped by signal")
        if trainer.is_global_zero:
            name = signal.Signals(number).name
            go_on = f"with {self.resume_with} {path}" if self.resume_with else f"from {path}"
            log.warning("stopped by %s at step %d; go on %s", name, trainer.global_step, go_on)
        raise StoppedBySignal(_exit_code(trainer, number))


def _in_worker(number: int) -> None:
    if number != signal.SIGINT:  # the main process decides about Ctrl-C
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


def _hint(number: int) -> str:
    return " (Ctrl-C again ends at once)" if number == signal.SIGINT else ""


def _exit_code(trainer: Trainer, number: int) -> int:
    # Lightning kills the whole run when a process that it started itself ends with an error code
    strategy = trainer.strategy
    environment = strategy.cluster_environment if isinstance(strategy, ParallelStrategy) else None
    return 0 if isinstance(environment, LightningEnvironment) and trainer.global_rank > 0 else 128 + number
