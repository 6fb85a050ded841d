"""What Lightning prints, without advertising, columns of zeros and run numbers."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelSummary, ProgressBar, TQDMProgressBar

from visionlora.core.delta import Change

log = logging.getLogger(__name__)

LIGHTNING_LOGGERS = ("pytorch_lightning.utilities.rank_zero", "lightning_fabric.utilities.rank_zero")


class NoTips(logging.Filter):
    """Drop log records that advertise a product."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not ("Tip:" in text and ("litlogger" in text or "litmodels" in text))


def silence_tips() -> None:
    """Change Lightning's loggers: no advertising. Call it before a Trainer is built; twice is harmless."""
    for name in LIGHTNING_LOGGERS:
        logger = logging.getLogger(name)
        if not any(isinstance(f, NoTips) for f in logger.filters):
            logger.addFilter(NoTips())


class ParameterSummary(ModelSummary):
    """Log one line of parameter counts; a Trainer with it builds no table of its own."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parameters = list(pl_module.parameters())
        added = {p for m in pl_module.modules() if isinstance(m, Change) for p in m.parameters()}
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        model = sum(p.numel() for p in parameters if p not in added)
        if trainer.is_global_zero:
            share = f"{trained / max(model, 1):.2%}"
            log.info("training %s parameters, %s of the model's %s", f"{trained:,}", share, f"{model:,}")


class TellIdle(Callback):
    """Say so where a call of fit trains nothing: it would end without a word."""

    began = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.began and trainer.is_global_zero:
            log.warning(
                "nothing was trained: %d epochs are done and max_epochs is %s, max_steps %s, limit_train_batches %s",
                trainer.current_epoch, trainer.max_epochs, trainer.max_steps, trainer.limit_train_batches,
            )  # fmt: skip


def progress_bar() -> ProgressBar:
    """Return a bar for a terminal, or a line an epoch for a log file."""
    return Bar() if sys.stdout.isatty() else EpochLines()


class Bar(TQDMProgressBar):
    """Lightning's bar without the run number, redrawn every fifth batch."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=5)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        return _metrics(super().get_metrics(trainer, pl_module))


class EpochLines(ProgressBar):
    """Log one line an epoch: time and the metrics of a progress bar."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled, self._began = True, 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._began = time.monotonic()  # a resumed run enters its epoch in the middle

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._enabled:
            metrics = _metrics(self.get_metrics(trainer, pl_module))
            shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in metrics.items())
            seconds = time.monotonic() - self._began
            log.info("epoch %d of %s  %.1f s  %s", trainer.current_epoch + 1, trainer.max_epochs, seconds, shown)


def _metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name != "v_num"}
