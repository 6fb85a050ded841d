"""One DataLoader for every use of images: training, evaluation, statistics, prediction."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from visionlora.data.augment import one_thread
from visionlora.data.dataset import ImageDataset, collate_images
from visionlora.vision.features import FeatureDataset, collate_features

FEW = 200
"""Images below which starting worker processes costs more than it saves."""


def image_loader(
    data: ImageDataset | FeatureDataset,
    *,
    batch_size: int,
    num_workers: int | None,
    timeout: float,
    sampler: Sampler[int] | None = None,
    drop_last: bool = False,
    persistent: bool = False,
) -> DataLoader[Any]:
    """Return a loader; without num_workers as many processes decode as the machine and the set are good for."""
    workers = _default_workers(len(data)) if num_workers is None else num_workers
    collate: Callable[[Any], Any] = collate_images
    if isinstance(data, FeatureDataset):  # nothing to decode
        workers, collate = 0, collate_features
    elif sampler is None:  # in an evaluation files that cannot be read may fill a batch; in training that is an error
        collate = partial(collate_images, size=data.preprocess.config.input_size)
    return DataLoader(
        data, batch_size=batch_size, sampler=sampler, num_workers=workers, collate_fn=collate,
        drop_last=drop_last, pin_memory=torch.cuda.is_available(), timeout=timeout if workers else 0,
        worker_init_fn=one_thread, persistent_workers=persistent and workers > 0,
    )  # fmt: skip


def _default_workers(images: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if images < FEW else max(0, min(4, cores - 1))
