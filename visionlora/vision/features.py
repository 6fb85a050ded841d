"""What a frozen prefix made of every image of a data set: kept in memory or in a file, read like the images."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from visionlora.atomic import atomic_path
from visionlora.data.dataset import ImageDataset
from visionlora.errors import ConfigError

__all__ = ["FeatureBatch", "FeatureDataset", "collate_features", "file_of", "kept_in_memory", "kept_on_disk", "read"]

FOLDER = Path("~/.cache/visionlora/prefix")
"""Where the files lie, unless the variable VISIONLORA_CACHE names another folder."""
_STORED = {torch.bfloat16: np.int16}  # numpy has no bfloat16


class FeatureBatch(NamedTuple):
    """What Batch is for images, of features of the frozen prefix."""

    images: Tensor
    """(batch, ...), whatever the prefix gives for one image."""
    labels: Tensor
    indices: Tensor


class FeatureDataset(Dataset[tuple[Tensor, int, int]]):
    """Features by place, as (features, label, place); keys are those of ImageDataset."""

    def __init__(self, features: Tensor, images: ImageDataset) -> None:
        self.features, self.images, self.labels = features, images, images.labels

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, key: int) -> tuple[Tensor, int, int]:
        at = key % len(self)
        return self.features[at], self.labels[at], at

    def name_of(self, at: int) -> str:
        """Return what a message calls an image: its file."""
        return self.images.name_of(at)


def collate_features(items: Sequence[tuple[Tensor, int, int]]) -> FeatureBatch:
    """Return a batch of features."""
    return FeatureBatch(*default_collate(list(items)))


def kept_in_memory(batches: Iterable[Tensor], count: int) -> Tensor:
    """Return the features of all images in one tensor. Raises ConfigError where memory would not hold them."""
    kept, at = torch.empty(0), 0
    for batch in batches:
        if not at:
            _check_memory(count * batch[0].numel() * batch.element_size())
            kept = torch.empty((count, *batch.shape[1:]), dtype=batch.dtype)
        kept[at : at + len(batch)] = batch
        at += len(batch)
    return kept


def kept_on_disk(batches: Iterable[Tensor], count: int, key: str) -> Tensor:
    """Write the features of all images to a file, whole or not at all, and return them as they lie there."""
    iterator = iter(batches)
    first = next(iterator)
    path = _path(key, first.dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape, kind = (count, *first.shape[1:]), _STORED.get(first.dtype)
    with atomic_path(path, need=count * first[0].numel() * first.element_size()) as temporary:
        dtype = np.dtype(kind) if kind is not None else first[:0].numpy().dtype
        file = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        at = 0
        for batch in _chained(first, iterator):
            file[at : at + len(batch)] = (batch.view(torch.int16) if kind is not None else batch).numpy()
            at += len(batch)
        file.flush()
        del file
    found = read(key, count)
    assert found is not None
    return found


def read(key: str, count: int) -> Tensor | None:
    """Return the features that lie in the file of a key, read as they are asked for; None where there is none."""
    for path in file_of(key):
        array = np.load(path, mmap_mode="c")
        if len(array) == count:
            dtype = getattr(torch, path.stem.rpartition("-")[2])
            return torch.from_numpy(array).view(dtype)
    return None


def file_of(key: str) -> list[Path]:
    """Return the file of a key, if there is one."""
    return sorted(_folder().glob(f"{key}-*.npy"))


def key_of(images: ImageDataset, what: dict[str, Any]) -> str:
    """Return the name of features: a hash of what made them and of every file's path, size and time of change."""
    digest = hashlib.sha256(json.dumps(what, sort_keys=True).encode())
    for path in images.paths:
        status = Path(path).stat()
        digest.update(f"{Path(path).resolve()}|{status.st_size}|{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _path(key: str, dtype: torch.dtype) -> Path:
    return _folder() / f"{key}-{str(dtype).removeprefix('torch.')}.npy"


def _folder() -> Path:
    return Path(os.environ.get("VISIONLORA_CACHE", FOLDER)).expanduser()


def _chained(first: Tensor, rest: Iterable[Tensor]) -> Iterable[Tensor]:
    yield first
    yield from rest


def _check_memory(needed: int) -> None:
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > 0.8 * free:
        raise ConfigError(
            f"cache_prefix: memory would take {needed / 2**30:.1f} GiB of features, {free / 2**30:.1f} GiB are free; "
            "take --model.cache_prefix disk"
        )
