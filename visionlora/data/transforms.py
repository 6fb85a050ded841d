"""From a decoded picture to the tensor a backbone expects, as timm's own evaluation transform makes it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from visionlora.config import did_you_mean
from visionlora.data.augment import Augment
from visionlora.data.images import MAX_PIXELS, check_in_chans
from visionlora.errors import ConfigError, ImageError

__all__ = ["InputConfig", "Preprocess", "input_config"]

INTERPOLATIONS = ("bilinear", "bicubic", "nearest", "lanczos", "hamming", "box")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class InputConfig:
    """What a backbone expects as input, in timm's terms."""

    input_size: tuple[int, int, int] = (3, 224, 224)
    """Channels, height, width."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """One value a channel, for pictures in 0..1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    """Share of the resized picture that the crop keeps."""
    crop_mode: str = "center"
    """"center" keeps the shape of things, "squash" keeps all of the picture, "border" keeps both and pads."""

    def __post_init__(self) -> None:
        check_in_chans(self.input_size[0])
        if len(self.input_size) != 3 or min(self.input_size) < 1:
            raise ConfigError(f"input_size is channels, height, width; got {self.input_size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.input_size[0] or not all(math.isfinite(v) for v in values):
                raise ConfigError(f"{name} needs {self.input_size[0]} finite values, one a channel, got {list(values)}")
            if max(values) > 1:
                raise ConfigError(f"{name} is of channels in 0..1, got {list(values)}: divide by 255")
        if min(self.std) <= 0 or not 0 < self.crop_pct <= 1:
            raise ConfigError(f"std must be above 0 and crop_pct in (0, 1], got {list(self.std)} and {self.crop_pct}")
        _one_of("interpolation", self.interpolation, INTERPOLATIONS)
        _one_of("crop_mode", self.crop_mode, CROP_MODES)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data (lists, no tuples), as adapter records and config files hold it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def input_config(
    known: Mapping[str, Any] | None = None,
    *,
    image_size: int | Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str | None = None,
    crop_pct: float | None = None,
    crop_mode: str | None = None,
    in_chans: int = 3,
) -> InputConfig:
    """Return what a backbone expects: known, a data config of timm or an adapter's record, where no argument says more.

    Without either, ImageNet's values. One value stands for all channels; with in_chans=1 three are averaged.
    """
    base = {**InputConfig().to_dict(), **(known or {})}
    height, width = _two(base["input_size"][-2:] if image_size is None else image_size)
    return InputConfig(
        (in_chans, height, width),
        _per_channel(base["mean"] if mean is None else mean, in_chans),
        _per_channel(base["std"] if std is None else std, in_chans),
        interpolation or base["interpolation"],
        base["crop_pct"] if crop_pct is None else crop_pct,
        crop_mode or base["crop_mode"],
    )


class Preprocess:
    """Resize, crop, change at random (training only) and normalise a picture: (channels, height, width) in float32.

    Without a draw the result equals timm's create_transform(is_training=False). The random change depends on
    (seed, *draw) alone, so that a resumed run repeats it, with any number of workers.
    """

    def __init__(self, config: InputConfig, *, augment: Augment | None = None, seed: int = 0) -> None:
        self.config = config
        self._augment = augment
        self._seed = seed
        options = {key: value for key, value in asdict(config).items() if key not in ("mean", "std")}
        self._resize = create_transform(**options, mean=config.mean, std=config.std, is_training=False, normalize=False)
        self._mean, self._std = (torch.tensor(v).view(-1, 1, 1) for v in (config.mean, config.std))

    def __call__(self, image: Image.Image, draw: tuple[int, ...] | None = None) -> Tensor:
        """Return the tensor of a picture in mode RGB or L; draw, say (epoch, index), asks for a random change."""
        self._check_shape(image.size)
        pixels: Tensor = self._resize(image)  # (channels, height, width), uint8
        if self._augment is not None and draw is not None:
            changed = self._augment(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()), (self._seed, *draw))
            pixels = torch.from_numpy(changed).permute(2, 0, 1).contiguous()
        return pixels.to(torch.float32).div_(255).sub_(self._mean).div_(self._std)

    def _check_shape(self, size: tuple[int, int]) -> None:
        """Refuse a strip: its short side is enlarged to the input size, its long side with it."""
        side = max(self.config.input_size[1:]) / self.config.crop_pct
        if self.config.crop_mode == "center" and side * side * max(size) / min(size) > MAX_PIXELS:
            raise ImageError(f"{size[0]} x {size[1]} pixels are too narrow to be resized; crop the image")


def _two(size: int | Sequence[int]) -> tuple[int, int]:
    values = (size, size) if isinstance(size, int) else tuple(size)
    if len(values) != 2 or not all(isinstance(v, int) and v > 0 for v in values):
        raise ConfigError(f"image_size is one whole number or (height, width), got {size!r}")
    return values[0], values[1]


def _per_channel(values: Sequence[float], in_chans: int) -> tuple[float, ...]:
    if in_chans == 1 and len(values) == 3:
        return (sum(values) / 3,)
    return tuple(values) * (in_chans if len(values) == 1 else 1)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{did_you_mean(value, [*choices])}")
