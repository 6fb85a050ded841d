"""The features of each part of a data set, made when first asked for, and the loaders over them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from visionlora.text.caching import cached_features
from visionlora.text.collating import Collate
from visionlora.text.columns import Example
from visionlora.text.features import Features
from visionlora.text.packing import PackedFeatures, Packing, collate_packed
from visionlora.text.settings import TokenSettings, describe

__all__ = ["Loaders"]

logger = logging.getLogger(__name__)


class Loaders:
    """Loaders of one tokenizer; the features of a part are made once."""

    def __init__(self, tokenizer: Any, cache: Path | None, *, batch_size: int, num_workers: int) -> None:
        self.tokenizer, self.cache = tokenizer, cache
        self.batch_size, self.num_workers = batch_size, num_workers
        self.features: dict[str, Features] = {}

    def tokens(self, part: str, examples: Sequence[Example], settings: TokenSettings) -> Features:
        """Return the features of a part, and say once what was cut."""
        if part not in self.features:
            self.features[part] = cached_features(examples, self.tokenizer, settings, self.cache)
            if told := describe(self.features[part].counts, settings.max_length):
                logger.warning("%s: %s", part, told)
        return self.features[part]

    def training(
        self,
        examples: Sequence[Example],
        settings: TokenSettings,
        packing: Packing,
        make_sampler: Callable[[Sized], Sampler[int]],
        *,
        devices: int = 1,
    ) -> DataLoader[Any]:
        """Return the loader of the training part."""
        features = self.tokens("train", examples, settings)
        data: Features | PackedFeatures = features
        collate: Callable[[Any], Any] = Collate(self.tokenizer, settings)
        if packing == "documents":
            data = PackedFeatures(features, settings.max_length)
            collate = partial(collate_packed, padding=self.tokenizer.pad_token_id)
        # a small last batch would weigh its examples more than the others; a set smaller than a batch is one batch
        whole = len(data) >= self.batch_size * devices
        return self._loader(data, collate, sampler=make_sampler(data), drop_last=whole)

    def evaluation(self, part: str, examples: Sequence[Example], settings: TokenSettings) -> DataLoader[Any]:
        """Return the loader of a part in its order, with what evaluation needs beside the tensors."""
        return self._loader(self.tokens(part, examples, settings), Collate(self.tokenizer, settings, examples))

    def _loader(
        self,
        data: Dataset[dict[str, Any]],
        collate: Callable[[Any], Any],
        *,
        sampler: Sampler[int] | None = None,
        drop_last: bool = False,
    ) -> DataLoader[Any]:
        return DataLoader(
            data, batch_size=self.batch_size, sampler=sampler, num_workers=self.num_workers, collate_fn=collate,
            drop_last=drop_last, pin_memory=torch.cuda.is_available(), persistent_workers=self.num_workers > 0,
        )  # fmt: skip
