"""What the callbacks need to know of Lightning's loops, much of it private: the one file to look at after an update."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Trainer
from pytorch_lightning.trainer.states import TrainerFn
from torch.utils.data import DataLoader


def in_fit(trainer: Trainer) -> bool:
    """Tell whether a fit is under way, its validations included, its sanity check not."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def between_steps(trainer: Trainer) -> bool:
    """Tell whether every training batch that was begun is finished."""
    progress = trainer.fit_loop.epoch_loop.batch_progress.current
    return progress.ready == progress.completed


def place(trainer: Trainer) -> tuple[int, int]:
    """Return the epoch that a resumed run goes on with and the number of its batches that are done."""
    epochs: Any = trainer.fit_loop.epoch_progress.current
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    unfinished = epochs.ready > epochs.processed
    return epochs.processed, batches.processed if unfinished else 0


def validation_follows(trainer: Trainer) -> bool:
    """Tell, at the end of a training batch, whether Lightning validates before the next."""
    fetcher = trainer.fit_loop._data_fetcher
    return fetcher is not None and trainer.fit_loop.epoch_loop._should_check_val_fx(fetcher)


def handlers_to_restore(trainer: Trainer, handlers: dict[int, Any]) -> None:
    """Change what Lightning puts back as signal handlers when the run ends, be it by an error."""
    trainer._signal_connector._original_handlers.update(handlers)


def training_loaders(trainer: Trainer) -> list[DataLoader[Any]]:
    """Return the loaders of the training data, as Lightning uses them."""
    combined = trainer.fit_loop._combined_loader
    return [] if combined is None else [dl for dl in combined.flattened if isinstance(dl, DataLoader)]


def ends_epoch_twice(trainer: Trainer) -> bool:
    """Change the counters of a run that was resumed after an epoch and counts in steps; tell whether it is one.

    With `max_steps` Lightning ends that epoch a second time, without batches, and would count it twice.
    """
    loop = trainer.fit_loop
    if not loop.restarted_on_epoch_end:
        return False
    counters: list[Any] = [loop.epoch_progress.current, loop.epoch_progress.total]
    for counter in counters:
        counter.processed -= 1
    loop.epoch_loop._batches_that_stepped -= 1
    return True


def draw_again(trainer: Trainer) -> None:
    """Change the run: the next training batch comes from a new iterator of the loaders."""
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]


def validate_again(checkpoint: dict[str, Any]) -> None:
    """Change a checkpoint made in a validation: the resumed run begins that validation again.

    Lightning skips a validation unless its progress says that a batch was begun and not finished.
    """
    loops = checkpoint["loops"]["fit_loop"]
    progress = loops["epoch_loop.val_loop.batch_progress"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    none = dict.fromkeys(begun, 0)
    loops["epoch_loop.val_loop.batch_progress"] = progress | {"total": begun, "current": none, "is_last_batch": False}
