"""Image folders and CSV files as loaders for training, validation, tests by domain, and prediction."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Sized
from functools import cached_property, partial
from typing import Any, Literal

import pytorch_lightning as pl
from torch.utils.data import DataLoader, Sampler

from visionlora.data.augment import build_augment
from visionlora.data.classes import class_list
from visionlora.data.dataset import ImageDataset, OnError
from visionlora.data.find import find_images
from visionlora.data.folders import Layout, Sample, read_csv, read_tree
from visionlora.data.parts import Division, Parts, check_fractions, divide
from visionlora.data.splits import GroupBy
from visionlora.data.transforms import InputConfig, Preprocess, input_config
from visionlora.errors import ConfigError, DataError
from visionlora.training.sampler import ResumableSampler
from visionlora.vision.backbone import data_config
from visionlora.vision.features import FeatureDataset
from visionlora.vision.loaders import image_loader

__all__ = ["ImageFolderData"]

logger = logging.getLogger(__name__)


class ImageFolderData(pl.LightningDataModule):
    """Labelled images on disk, divided, decoded, augmented and batched for a timm backbone.

    The data set is a folder tree (class/image, split/class/image, domain/class/image, domain/split/class/image) or a
    CSV (path,label[,domain][,split]). Test images come as several loaders, named by test_names: "target" first, then
    single domains, "source" last: the images of the base's own training, which measure forgetting.

    Args:
        root: folder tree with the images.
        csv: CSV with their paths and labels, instead of root.
        layout: what the folders of root mean; "auto" tells it from the tree.
        train_domains: domains to train on; by default all that are neither tested nor the source.
        test_domains: domains that measure the target; by default images held out of the training domains, and every
            other domain on its own.
        source_root: another folder tree with images of the base's own training.
        source_domains: domains of source_root, or of the data set itself, that measure forgetting.
        classes: their names in the order of their numbers; by default the sorted labels of the training images.
        val_fraction: share held out for validation, where the files name no validation split.
        test_fraction: share held out as target test, where the files name no split and there are no test_domains.
        split_seed: of held-out parts and shots.
        group_by: regular expression, matched in file names, whose match keeps near-duplicates in one part.
        shots: training images of each class; by default all.
        augment: random changes of training images: none, light, surveillance, or a list of
            {name: RandomGamma, gamma_limit: [60, 140], p: 0.5}.
        seed: of the order of training images and of their random changes; by default the run's seed_everything.
        model_name: timm's name of the backbone, whose input the images are made for.
        model_args: further arguments of the backbone; img_size and in_chans matter here.
        image_size: side in pixels, or height and width; by default the backbone's.
        mean: of the channels in 0..1; by default the backbone's.
        std: of the channels in 0..1; by default the backbone's.
        interpolation: of the resizing; by default the backbone's.
        crop_pct: share of the resized image that is kept; by default the backbone's.
        crop_mode: center, squash or border; by default the backbone's.
        in_chans: 3 (RGB) or 1 (grey); by default the backbone's.
        batch_size: images in a batch, on each device.
        num_workers: processes that decode; by default one less than there are cores, at most 4, none for small sets.
        worker_timeout: seconds after which a worker that gives no batch is an error.
        on_error: raise stops at an image that cannot be read, skip leaves it out, logs and counts it.
        train_sampler: makes a sampler for the training images; by default a ResumableSampler, which a run can resume.
        predict_source: file, folder or glob of images for predict.
    """

    def __init__(
        self,
        root: str | None = None,
        csv: str | None = None,
        *,
        layout: Layout = "auto",
        train_domains: list[str] | None = None,
        test_domains: list[str] | None = None,
        source_root: str | None = None,
        source_domains: list[str] | None = None,
        classes: list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        group_by: GroupBy | None = None,
        shots: int | None = None,
        augment: str | list[dict[str, Any]] = "light",
        seed: int | None = None,
        model_name: str | None = None,
        model_args: dict[str, Any] | None = None,
        image_size: int | list[int] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        interpolation: str | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        in_chans: int | None = None,
        batch_size: int = 32,
        num_workers: int | None = None,
        worker_timeout: float = 300.0,
        on_error: OnError = "raise",
        train_sampler: Callable[[Sized], Sampler[int]] | None = None,
        predict_source: str | None = None,
    ) -> None:
        super().__init__()
        # a function is no plain data, and both modules have a seed, which loggers take for a contradiction
        code = ["train_sampler", *(["group_by"] if callable(group_by) else [])]
        self.save_hyperparameters(ignore=code, logger=False)
        _check(root, csv, batch_size, num_workers, worker_timeout)
        check_fractions(val_fraction, test_fraction)
        self.root, self.csv, self.layout, self.source_root = root, csv, layout, source_root
        self.predict_source, self._classes = predict_source, None if classes is None else list(classes)
        self._division = Division(
            train_domains, test_domains, source_domains, val_fraction, test_fraction, split_seed, group_by, shots
        )
        self.input_config = _input_of(
            model_name, model_args or {}, in_chans, image_size=image_size, mean=mean, std=std,
            interpolation=interpolation, crop_pct=crop_pct, crop_mode=crop_mode,
        )  # fmt: skip
        self._augment, self.seed, self.train_sampler = build_augment(augment), seed, train_sampler
        self.batch_size, self.num_workers, self.worker_timeout = batch_size, num_workers, worker_timeout
        self.on_error: OnError = on_error
        self._datasets: dict[str, ImageDataset] = {}
        self.features: dict[str, FeatureDataset] = {}
        """What stands in for images of "train" and "val", while a frozen prefix is cached."""

    @property
    def record(self) -> dict[str, Any]:
        """What the images go through, as plain data: input_size, mean, std, interpolation, crop_pct, crop_mode."""
        return self.input_config.to_dict()

    @cached_property
    def parts(self) -> Parts:
        """The divided data set. The first use lists the files."""
        source = self._tree(self.source_root) if self.source_root is not None else None
        parts = divide(self._samples(), self._division, source=source, classes=self._classes)
        counts = {"train": parts.train, "val": parts.val, **{f"test {k}": v for k, v in parts.tests.items()}}
        told = ", ".join(f"{name} {len(part)}" for name, part in counts.items())
        logger.info("%d classes; images: %s", len(parts.class_names), told)
        return parts

    @property
    def class_names(self) -> list[str]:
        """The classes in the order of their numbers."""
        if self.root is None and self.csv is None and self._classes is not None:
            return class_list([], classes=self._classes)
        return self.parts.class_names

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def class_counts(self) -> list[int]:
        """Training images of each class."""
        counts = Counter(sample.label for sample in self.parts.train)
        return [counts[name] for name in self.class_names]

    @property
    def test_names(self) -> list[str]:
        """Names of the test loaders, in their order."""
        return list(self.parts.tests)

    @property
    def skipped(self) -> dict[str, list[str]]:
        """Files left out so far by on_error="skip", by part."""
        return {name: data.skipped for name, data in self._datasets.items() if data.skipped}

    def train_dataloader(self) -> DataLoader[Any]:
        data = self.features.get("train") or self._dataset("train", augmented=True)
        make = self.train_sampler or self._resumable
        whole = self.batch_size * (self.trainer.world_size if self.trainer is not None else 1)
        # a small last batch would weigh its images more than the others; a set smaller than a batch is one batch
        return self._loader(data, sampler=make(data), drop_last=len(data) >= whole, persistent=True)

    def val_dataloader(self) -> DataLoader[Any]:
        if not self.parts.val:
            raise DataError("no validation images: set val_fraction above 0, or --trainer.limit_val_batches 0")
        return self._loader(self.features.get("val") or self._dataset("val"), persistent=True)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self._loader(self._dataset(f"test {name}")) for name in self.parts.tests]

    def predict_dataloader(self) -> DataLoader[Any]:
        if self.predict_source is None:
            raise DataError("nothing to predict: give a file, folder or glob as --source (in Python: predict_source)")
        paths, preprocess = find_images(self.predict_source), Preprocess(self.input_config)
        self._datasets["predict"] = ImageDataset(paths, None, preprocess, on_error=self.on_error)
        return self._loader(self._datasets["predict"])

    def statistics_dataloader(self) -> DataLoader[Any]:
        """Return the training images as evaluation sees them, once and in order, to estimate statistics."""
        return self._loader(self._dataset("train"))

    def images(self, part: Literal["train", "val"]) -> ImageDataset:
        """Return the images of a part as evaluation sees them."""
        return self._dataset(part)

    @property
    def augments(self) -> bool:
        """Tell whether training images change at random."""
        return self._augment is not None

    def teardown(self, stage: str) -> None:
        for name, paths in self.skipped.items():
            logger.warning("%s: %d of %d images could not be read", name, len(paths), len(self._datasets[name]))

    def _samples(self) -> list[Sample]:
        if self.csv is not None:
            return read_csv(self.csv)
        if self.root is None:
            raise DataError("no data: give a folder as root or a CSV as csv")
        return self._tree(self.root)

    def _tree(self, root: str) -> list[Sample]:
        return read_tree(root, layout=self.layout, classes=self._classes)

    def _dataset(self, part: str, *, augmented: bool = False) -> ImageDataset:
        key = f"{part} for statistics" if part == "train" and not augmented else part
        if key not in self._datasets:
            tests = {f"test {name}": samples for name, samples in self.parts.tests.items()}
            samples = {"train": self.parts.train, "val": self.parts.val, **tests}[part]
            number = {name: i for i, name in enumerate(self.class_names)}
            paths, labels = [s.path for s in samples], [number[s.label] for s in samples]
            preprocess = Preprocess(self.input_config, augment=self._augment if augmented else None, seed=self._seed())
            self._datasets[key] = ImageDataset(paths, labels, preprocess, on_error=self.on_error)
        return self._datasets[key]

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    def _resumable(self, data: Sized) -> Sampler[int]:
        return ResumableSampler(len(data), seed=self._seed(), keys="unrolled")

    @property
    def _loader(self) -> Callable[..., DataLoader[Any]]:
        return partial(
            image_loader, batch_size=self.batch_size, num_workers=self.num_workers, timeout=self.worker_timeout
        )


def _check(root: str | None, csv: str | None, batch_size: int, num_workers: int | None, worker_timeout: float) -> None:
    if root is not None and csv is not None:
        raise ConfigError(f"give root or csv, not both: {root} and {csv}")
    if batch_size < 1 or (num_workers or 0) < 0 or worker_timeout <= 0:
        raise ConfigError("batch_size and worker_timeout must be above 0, num_workers at least 0")


def _input_of(model_name: str | None, args: dict[str, Any], in_chans: int | None, **given: Any) -> InputConfig:
    """Return the input of a backbone, where nothing else is given for a part of it."""
    known = data_config(model_name, model_args=args) if model_name else {}
    if known and in_chans not in (None, known["input_size"][0]):
        raise ConfigError(
            f"data.in_chans is {in_chans} and {model_name} takes {known['input_size'][0]} channels: leave it away, or "
            f"build the model for it with model.model_args.in_chans {in_chans}"
        )
    chans = known["input_size"][0] if known else args.get("in_chans", 3)
    return input_config(known, in_chans=in_chans or chans, **given)
