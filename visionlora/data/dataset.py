"""A map-style dataset of image files, and the collation that leaves out what could not be read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from visionlora.config import did_you_mean
from visionlora.data.images import read_image
from visionlora.data.transforms import Preprocess
from visionlora.errors import DataError, ImageError

__all__ = ["UNLABELLED", "Batch", "ImageDataset", "OnError", "collate_images"]

logger = logging.getLogger(__name__)

OnError = Literal["raise", "skip"]
UNLABELLED = -1
_FAILURES = (ValueError, TypeError, RuntimeError, OSError, LookupError, ArithmeticError, AttributeError)


class Batch(NamedTuple):
    """Images with what is known of them; unpacks as a triple."""

    images: Tensor
    """(batch, channels, height, width), float32."""
    labels: Tensor
    """(batch,), int64; UNLABELLED for prediction."""
    indices: Tensor
    """(batch,), int64: the places of the images in the dataset's paths."""


class ImageDataset(Dataset["tuple[Tensor, int, int] | None"]):
    """Image files by place, as (image, label, place).

    A key of len(dataset) or more is epoch * len(dataset) + place: it asks for the random change of that epoch, which
    is how ResumableSampler(keys="unrolled") asks. Plain keys repeat the change of epoch 0.

    on_error="raise": a file that cannot be read is an ImageError naming it. "skip": the item is None, which
    collate_images leaves out; it is logged once, listed in skipped, and never replaced by another image.
    """

    def __init__(
        self,
        paths: Sequence[str],
        labels: Sequence[int] | None,
        preprocess: Preprocess,
        *,
        on_error: OnError = "raise",
    ) -> None:
        if not paths:
            raise DataError("a dataset needs at least one image")
        if labels is not None and (len(labels) != len(paths) or min(labels) < 0):
            raise DataError(f"expected one class number, 0 or above, for each of {len(paths)} images")
        if on_error not in ("raise", "skip"):
            raise DataError(
                f"on_error must be raise or skip, got {on_error!r}{did_you_mean(on_error, ['raise', 'skip'])}"
            )
        self.paths = list(paths)
        self.labels = [UNLABELLED] * len(paths) if labels is None else list(labels)
        self.preprocess = preprocess
        self.on_error = on_error
        # shared memory: workers mark what they skip, the main process reads it
        self._bad = torch.zeros(len(paths), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: int) -> tuple[Tensor, int, int] | None:
        epoch, at = divmod(key, len(self))
        try:
            return self._image(epoch, at), self.labels[at], at
        except ImageError as e:
            if self.on_error == "raise":
                raise ImageError(f"{e}; on_error skip leaves such images out, visionlora doctor lists them") from None
            self._skip(at, str(e))
            return None

    @property
    def skipped(self) -> list[str]:
        """The files left out so far, in any worker of this process."""
        return [self.paths[at] for at in self._bad.nonzero().flatten().tolist()]

    def name_of(self, at: int) -> str:
        """Return what a message calls an image: its file."""
        return self.paths[at]

    def _image(self, epoch: int, at: int) -> Tensor:
        path = self.paths[at]
        image = read_image(path, in_chans=self.preprocess.config.input_size[0])
        try:
            return self.preprocess(image, (epoch, at))
        except DataError as e:
            raise type(e)(f"{path}: {e}") from e
        except _FAILURES as e:
            raise DataError(f"{path}: {type(e).__name__}: {e}") from e

    def _skip(self, at: int, reason: str) -> None:
        if not self._bad[at]:
            self._bad[at] = True
            logger.warning("skipped %s", reason)


def collate_images(items: list[tuple[Tensor, int, int] | None], *, size: Sequence[int] | None = None) -> Batch:
    """Return the batch of the items that could be read.

    Where there are none: an empty batch of images of this size (channels, height, width), without one an ImageError.
    """
    found = [item for item in items if item is not None]
    if not found and size is not None:
        none = torch.zeros(0, dtype=torch.int64)
        return Batch(torch.zeros(0, *size), none, none)
    if not found:
        raise ImageError(f"none of the {len(items)} images of a batch could be read; see the log for their names")
    return Batch(*default_collate(found))
