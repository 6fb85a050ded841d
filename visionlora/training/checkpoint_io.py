"""Lightning's checkpoint files, written atomically and read as plain data."""

from __future__ import annotations

import io
import logging
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from visionlora.atomic import atomic_path
from visionlora.errors import ConfigError, ResumeError

log = logging.getLogger(__name__)

Checkpoint = dict[str, Any]


class AtomicCheckpointIO(CheckpointIO):
    """Save whole files or none; load with `weights_only=True`, never from the network.

    A checkpoint that cannot be read is replaced by the newest readable one beside it, with a warning in the log.
    `inspect` is called with a loaded checkpoint before anything of the run is changed and may refuse it.
    """

    def __init__(self) -> None:
        self.inspect: Callable[[Checkpoint], None] | None = None
        self._proven = False

    def save_checkpoint(self, checkpoint: Checkpoint, path: str | Path, storage_options: Any = None) -> None:
        target = _local(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self._proven:
            _prove_loadable({k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")})
            self._proven = True
        with atomic_path(target) as temporary:
            _torch_save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> Checkpoint:
        if weights_only is False:
            raise ResumeError(f"{path}: checkpoints are read with weights_only=True; leave weights_only away")
        _, checkpoint = newest_readable(_local(path))
        if self.inspect is not None:
            self.inspect(checkpoint)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        _local(path).unlink(missing_ok=True)


def newest_readable(path: Path) -> tuple[Path, Checkpoint]:
    """Return a checkpoint and its path: the one asked for, or with a warning the newest readable one beside it.

    Raises ResumeError where none can be read.
    """
    try:
        return path, read_checkpoint(path)
    except ResumeError as broken:
        for other in _others(path):
            try:
                checkpoint = read_checkpoint(other)
            except ResumeError:
                continue
            log.warning("%s. Going on from %s instead, the newest readable checkpoint beside it", broken, other)
            return other, checkpoint
        raise


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Return a checkpoint as plain data on the CPU. Raises ResumeError for a missing, damaged or foreign file."""
    path = Path(path)
    if not path.is_file():
        found = ", ".join(p.name for p in sorted(path.parent.glob("*.ckpt"))) if path.parent.is_dir() else ""
        raise ResumeError(f"no checkpoint at {path}; " + (f"beside it: {found}" if found else "its folder has none"))
    _check_checksums(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        raise ResumeError(f"{path} holds more than plain data and is refused: {str(e).splitlines()[0]}") from None
    except (RuntimeError, EOFError, ValueError, KeyError) as e:
        raise ResumeError(f"{path} is damaged: {str(e).splitlines()[0]}") from None
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ResumeError(f"{path} is no Lightning checkpoint: it has no state_dict")
    return checkpoint


def _check_checksums(path: Path) -> None:
    # torch.load does not compare the checksums that torch.save wrote
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError, RuntimeError) as e:
        raise ResumeError(f"{path} is damaged or cut off ({path.stat().st_size:,} bytes): {e}") from None
    if damaged:
        raise ResumeError(f"{path} is damaged: the checksum of {damaged} does not fit")


def _others(path: Path) -> list[Path]:
    if not path.exists():  # a wrong path is a mistake to report, not a damage to work around
        return []
    beside = [p for p in path.parent.glob("*.ckpt") if p.name != path.name]
    return sorted(beside, key=lambda p: p.stat().st_mtime, reverse=True)


def _local(path: str | Path) -> Path:
    if "://" in str(path):
        raise ResumeError(f"{path}: checkpoints are local files; download it first and pass its path")
    return Path(path)


def _prove_loadable(rest: Checkpoint) -> None:
    # better at the first save than on the day the run must resume
    buffer = io.BytesIO()
    torch.save(rest, buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, weights_only=True)
    except pickle.UnpicklingError as e:
        raise ConfigError(
            f"this run could not resume: its checkpoint would hold more than plain data ({str(e).splitlines()[0]}). "
            "Keep hyper-parameters and callback states to numbers, text, lists, dicts and tensors"
        ) from None


def _torch_save(checkpoint: Checkpoint, path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as e:  # torch hides a full disk behind an assertion of its zip writer
            if isinstance(e.__context__, OSError):
                raise e.__context__ from None
            raise
