"""What a run died of (workers, memory, images of another size, a batch of one), and what to do about it."""

from __future__ import annotations

import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from visionlora.errors import TrainingError, VisionLoRAError

WORKER_TIMEOUT = 300.0
"""Seconds to wait for a batch before a worker counts as hanging; pass it to DataLoader(timeout=...) with workers."""

SHARED_MEMORY = Path("/dev/shm")


class ExplainFailures(Callback):
    """Note what a failing run was doing, so that `explained` can say it in the message."""

    def __init__(self) -> None:
        self.explanation: str | None = None
        self._batch = "no batch yet"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._batch = f"training batch {batch_idx}, {_shapes(batch)}"

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        self._batch = f"validation batch {batch_idx}, {_shapes(batch)}"

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, VisionLoRAError):
            return
        if _out_of_memory(exception):
            self.explanation = _memory_story(exception, self._batch)
        elif _worker_failure(exception):
            self.explanation = _worker_story(exception, trainer)
        elif str(exception).startswith("Expected more than 1 value per channel"):
            self.explanation = _lonely_story(self._batch)
        elif _of_size(exception, pl_module, self._batch):
            self.explanation = _size_story(exception, self._batch)
        elif str(exception).startswith("Early stopping conditioned on metric"):
            self.explanation = str(exception)
        elif str(exception).startswith("You restored a checkpoint with current_epoch"):
            self.explanation = (
                f"max_epochs {trainer.max_epochs} lies before the checkpoint, which is of epoch "
                f"{trainer.current_epoch + 1}: give more to go on, trainer.max_epochs"
            )


@contextmanager
def explained(trainer: Trainer) -> Iterator[None]:
    """Turn the end of a run that ExplainFailures understands into a TrainingError that says so.

    Wrap it around `trainer.fit(...)`; the trainer needs an ExplainFailures callback.
    """
    try:
        yield
    except VisionLoRAError as e:
        raise _without_worker(e) from None
    except Exception as e:
        notes = [c for c in trainer.callbacks if isinstance(c, ExplainFailures)]  # type: ignore[attr-defined]
        if notes and notes[0].explanation:
            raise TrainingError(notes[0].explanation) from e
        raise


def _without_worker(error: VisionLoRAError) -> VisionLoRAError:
    """Return the error as the worker of a DataLoader raised it, without the traceback that torch puts around it."""
    text = str(error)
    if not text.startswith("Caught ") or "Original Traceback" not in text:
        return error
    own = re.search(rf"\n(?:\w+\.)*{type(error).__name__}: (.*)\Z", text, re.S)
    return type(error)(own[1].strip()) if own else error


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def _worker_failure(error: BaseException) -> bool:
    if isinstance(error, (ConnectionError, EOFError)):  # the pipe of a worker that is gone
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(("DataLoader worker", "DataLoader timed out"))


def _memory_story(error: BaseException, batch: str) -> str:
    return (
        f"out of memory in {batch}; {_free_memory()} ({str(error).splitlines()[0] if str(error) else 'no detail'}). "
        "Halve the batch size and double accumulate_grad_batches (same result), use precision bf16-mixed, a smaller "
        "image size or backbone, or fewer workers"
    )


def _lonely_story(batch: str) -> str:
    return (
        f"BatchNorm met a single value a channel in {batch}, and one value has no spread: raise the batch size, "
        "or train in mode lora, linear or norm, where BatchNorm is constant"
    )


def _of_size(error: BaseException, module: LightningModule, batch: str) -> bool:
    """Tell whether timm refused the size of images, or tripped over one that is not what the backbone is built for."""
    if isinstance(error, AssertionError):
        return str(error).startswith("Input")
    cfg = getattr(getattr(module, "net", None), "pretrained_cfg", None) or {}
    size = ", ".join(map(str, cfg.get("input_size", ())[1:]))
    return isinstance(error, RuntimeError) and bool(cfg.get("fixed_input_size")) and f"{size})" not in batch


def _size_story(error: BaseException, batch: str) -> str:
    return (
        f"the model does not take the images of {batch} ({error}). Leave data.image_size away, or build the model for "
        "that size where it can be (ViT, Swin): model.model_args.img_size"
    )


def _free_memory() -> str:
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of the accelerator's memory are free"
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return f"{int(found[1]) / 2**20:.1f} GiB of memory are free" if found else "free memory unknown"


def _worker_story(error: BaseException, trainer: Trainer) -> str:
    rank = f" of process {trainer.global_rank}" if trainer.world_size > 1 else ""
    if "timed out" in str(error):
        return (
            f"the data loader workers{rank} gave no batch in time ({error}). A disk or network share may hang; raise "
            "the timeout, or set num_workers to 0 to see where it stops"
        )
    dead = _dead_workers(trainer)
    text = f"data loader {' and '.join(w for w, _ in dead) or 'worker'}{rank} died ({error}). "
    codes = {code for _, code in dead}
    if -signal.SIGBUS in codes or "Bus error" in str(error):
        return (
            text
            + f"Shared memory ran out ({_shared_memory()}): enlarge it (docker run --shm-size=2g) or use fewer workers"
        )
    if -signal.SIGKILL in codes or "Killed" in str(error):
        return text + f"The system kills processes when memory runs out ({_free_memory()}): use fewer workers"
    return text + "Set num_workers to 0 to see the error itself"


def _shared_memory() -> str:
    if not SHARED_MEMORY.is_dir():
        return "no /dev/shm"
    usage = shutil.disk_usage(SHARED_MEMORY)
    return f"{usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB of /dev/shm are free"


def _dead_workers(trainer: Trainer) -> list[tuple[str, int]]:
    """Return index, process id and exit code of the workers that ended badly."""
    epoch_loop = trainer.fit_loop.epoch_loop
    dead = []
    for loop in (trainer.fit_loop, epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        combined = loop._combined_loader
        mode = None if combined is None else combined._iterator
        for iterator in [] if mode is None else mode.iterators:
            if isinstance(iterator, _MultiProcessingDataLoaderIter):
                dead += [
                    (f"worker {i} (pid {w.pid})", w.exitcode) for i, w in enumerate(iterator._workers) if w.exitcode
                ]
    return dead


def _shapes(batch: Any) -> str:
    tensors = _tensors(batch)
    return ", ".join(str(tuple(t.shape)) for t in tensors[:3]) or "no tensors"


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return [t for value in values for t in _tensors(value)]
