"""A resumed run sees exactly the samples and random numbers the stopped run had left."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from visionlora.errors import ResumeError
from visionlora.training.loops import draw_again, ends_epoch_twice, place, training_loaders, validation_follows
from visionlora.training.rng import rng_state, set_rng_state
from visionlora.training.sampler import ResumableSampler

log = logging.getLogger(__name__)

KEY = "visionlora_data"


class ExactResume(Callback):
    """Put every ResumableSampler of the training data, and the random generators, back where the checkpoint was made.

    Lightning builds the iterator of the training data before it knows the epoch it resumes, and with workers the first
    batches are then drawn in the order of epoch 0; this callback builds it again, once, at the right place.
    Random numbers are restored in runs with one process; samples in all of them. Raises ResumeError when the checkpoint
    is from the middle of an epoch and data, seed, batch size or number of devices changed since.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning draws a random number for the validation's loader; a run resumed in it does so again
        self._before_validation = rng_state() if validation_follows(trainer) else None

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        now = self._before_validation if trainer.validating else None
        checkpoint[KEY] = {"loaders": _describe(trainer), "rng": now or rng_state()}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(KEY, {"loaders": None, "rng": None})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loaded, self._loaded = self._loaded, None
        if loaded is None:
            return
        epoch, batches = place(trainer)
        if batches:
            _check_unchanged(loaded["loaders"], _describe(trainer))
            self._restart(trainer, epoch, batches)
        _restore_rng(loaded["rng"], trainer)
        if not batches and not ends_epoch_twice(trainer):
            # a run that goes through draws the workers' seed here, at the start of the epoch
            self._restart(trainer, epoch, 0)

    def _restart(self, trainer: Trainer, epoch: int, batches: int) -> None:
        loaders, resumable = training_loaders(trainer), _resumable(trainer)
        for loader, sampler in resumable:
            position = min(batches * (loader.batch_size or 1), len(sampler))
            sampler.load_state_dict({"epoch": epoch, "position": position})
        if resumable:
            draw_again(trainer)
        if loaders and len(resumable) == len(loaders):
            # Lightning looks for a state of the loader and finds none; the sampler has it
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")


def _resumable(trainer: Trainer) -> list[tuple[DataLoader[Any], ResumableSampler]]:
    loaders = training_loaders(trainer)
    return [(dl, sampler) for dl in loaders if isinstance(sampler := dl.sampler, ResumableSampler)]


def _describe(trainer: Trainer) -> list[dict[str, Any]] | None:
    """Return what decides which samples the next batch of each training loader holds; None without known samplers."""
    resumable = _resumable(trainer)
    if not resumable or len(resumable) != len(training_loaders(trainer)):
        return None
    return [
        {
            "samples": sampler.size,
            "seed": sampler.seed,
            "shuffle": sampler.shuffle,
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
            "devices": sampler.num_replicas,
        }
        for loader, sampler in resumable
    ]


def _check_unchanged(then: list[dict[str, Any]] | None, now: list[dict[str, Any]] | None) -> None:
    if then is None or now is None:
        log.warning("the training data has no ResumableSampler: samples of this epoch may come twice or never")
        return
    if then == now:
        return
    changes = [
        f"{key}: {old[key]} in the checkpoint, {new[key]} now"
        for old, new in zip(then, now, strict=False)
        for key in old
        if old[key] != new[key]
    ] or [f"training loaders: {len(then)} in the checkpoint, {len(now)} now"]
    raise ResumeError(
        "the checkpoint was made in the middle of an epoch and its remaining samples cannot be told any more:\n  "
        + "\n  ".join(changes)
        + "\nresume with the old settings, or from a checkpoint made at the end of an epoch"
    )


def _restore_rng(state: dict[str, Any] | None, trainer: Trainer) -> None:
    if state is not None and trainer.world_size == 1:
        set_rng_state(state)
    elif trainer.is_global_zero:
        log.info("random numbers (dropout, augmentation) start anew; the order of the samples does not")
