"""Random changes of a training picture, named in plain data and repeatable by seed, made by albumentations."""

from __future__ import annotations

import inspect
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from visionlora.config import did_you_mean
from visionlora.errors import DataError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else the import asks the network for a newer version
import albumentations as A
from albumentations.augmentations.crops.transforms import CropSizeError

__all__ = ["PRESETS", "Augment", "AugmentSpec", "Pixels", "build_augment", "one_thread"]

AugmentSpec = str | Sequence[Mapping[str, Any]]
Pixels = npt.NDArray[np.uint8]

REFLECT = cv2.BORDER_REFLECT_101
PRESETS: dict[str, list[dict[str, Any]]] = {
    "none": [],
    # No flips: they change the meaning of signs and digits. Add {name: HorizontalFlip} where they do not.
    "light": [
        {"name": "Affine", "scale": [0.9, 1.1], "translate_percent": [-0.05, 0.05], "rotate": [-7, 7],
         "shear": [-3, 3], "border_mode": REFLECT, "p": 0.7},
        {"name": "RandomBrightnessContrast", "brightness_limit": 0.15, "contrast_limit": 0.15, "p": 0.5},
        {"name": "RandomGamma", "gamma_limit": [85, 118], "p": 0.3},
    ],
    # A camera at another height and angle, at another hour and in other weather, behind a cheap sensor and a codec.
    "surveillance": [
        {"name": "Perspective", "scale": [0.02, 0.08], "border_mode": REFLECT, "p": 0.4},
        {"name": "Affine", "scale": [0.85, 1.15], "translate_percent": [-0.06, 0.06], "rotate": [-10, 10],
         "shear": [-5, 5], "border_mode": REFLECT, "p": 0.6},
        {"name": "RandomGamma", "gamma_limit": [50, 170], "p": 0.5},
        {"name": "RandomBrightnessContrast", "brightness_limit": [-0.35, 0.25], "contrast_limit": 0.3, "p": 0.5},
        {"name": "OneOf", "p": 0.12, "transforms": [
            {"name": "RandomRain", "rain_type": "drizzle", "blur_value": 3, "brightness_coefficient": 0.85, "p": 1.0},
            # Fog of one depth is t * picture + (1 - t) * air light (Koschmieder). RandomFog draws its particles one by
            # one: 69 ms for a picture of 224 pixels, against 0.06 ms.
            {"name": "RandomBrightnessContrast", "contrast_limit": [-0.6, -0.3], "brightness_limit": [0.2, 0.45],
             "p": 1.0},
        ]},
        {"name": "OneOf", "p": 0.25, "transforms": [
            {"name": "MotionBlur", "blur_limit": [3, 7], "p": 1.0},
            {"name": "Defocus", "radius": [1, 3], "p": 1.0},
        ]},
        {"name": "ToGray", "p": 0.1},  # infrared light
        {"name": "ISONoise", "color_shift": [0.01, 0.05], "intensity": [0.1, 0.5], "p": 0.4},
        {"name": "ImageCompression", "quality_range": [35, 90], "p": 0.4},
    ],
}  # fmt: skip
_FAILURES = (cv2.error, CropSizeError, ValueError, TypeError, RuntimeError, IndexError, KeyError, ArithmeticError)
CONTAINERS = ("OneOf", "SomeOf", "RandomOrder", "Sequential")


class Augment:
    """Random changes of one uint8 picture (height, width, 1 or 3 channels) that keep its shape."""

    def __init__(self, transforms: list[Any]) -> None:
        self._compose = A.Compose(transforms)

    def __call__(self, pixels: Pixels, seed: Sequence[int]) -> Pixels:
        """Return the changed picture; the same seed numbers give the same change in any process."""
        generator = np.random.default_rng(list(seed))
        self._compose.set_random_state(generator, random.Random(repr(list(seed))))
        cv2.setRNGSeed(int(generator.integers(2**31)))
        grey = pixels.shape[2] == 1
        try:  # weather, colour and sensor noise are defined on colour pictures only
            changed = self._compose(image=np.repeat(pixels, 3, axis=2) if grey else pixels)["image"]
        except _FAILURES as e:
            raise DataError(f"augment fails on a picture of shape {pixels.shape}: {e}") from e
        changed = cv2.cvtColor(changed, cv2.COLOR_RGB2GRAY)[:, :, None] if grey else changed
        if changed.shape != pixels.shape or changed.dtype != np.uint8:
            raise DataError(
                f"augment must keep shape and type, it made {changed.shape} {changed.dtype} of {pixels.shape} uint8"
            )
        return np.ascontiguousarray(changed)


def build_augment(augment: AugmentSpec) -> Augment | None:
    """Return the changes a preset name or a list of {name, keyword arguments} stands for; None if there are none.

    Names are classes of albumentations (OneOf, SomeOf, RandomOrder and Sequential take a list as transforms).
    Raises DataError for an unknown preset, class, argument or value.
    """
    if isinstance(augment, str):
        if augment not in PRESETS:
            near = did_you_mean(augment, [*PRESETS])
            raise DataError(f"augment must be a list or one of {', '.join(PRESETS)}, got {augment!r}{near}")
        augment = PRESETS[augment]
    return Augment([_build(entry) for entry in augment]) if augment else None


def one_thread(worker: int) -> None:
    """Keep OpenCV to one thread in a loader's worker: there are as many workers as cores."""
    cv2.setNumThreads(0)


def _build(entry: Mapping[str, Any]) -> Any:
    if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
        raise DataError(f"augment: expected {{name: RandomGamma, gamma_limit: [60, 140], p: 0.5}}, got {entry!r}")
    name = entry["name"]
    options = {key: value for key, value in entry.items() if key != "name"}
    kind = _find(name)
    _check_options(name, options, list(inspect.signature(kind).parameters))
    if name in CONTAINERS:
        options["transforms"] = [_build(inner) for inner in options.get("transforms", ())]
    else:
        options["strict"] = True  # without it albumentations falls back to its defaults and only warns
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return kind(**options)
    except (ValueError, TypeError, ArithmeticError, UserWarning, DeprecationWarning) as e:
        raise DataError(f"augment: {name}: {_reason(e)}") from None


def _find(name: str) -> Any:
    kinds = {key: kind for key, kind in vars(A).items() if inspect.isclass(kind) and _usable(key, kind)}
    if name not in kinds:
        raise DataError(f"augment: albumentations has no transform {name!r}{did_you_mean(name, [*kinds])}")
    return kinds[name]


def _usable(name: str, kind: type) -> bool:
    # Lambda takes Python functions, which plain data cannot name
    return name in CONTAINERS or (issubclass(kind, A.BasicTransform) and name != "Lambda")


def _check_options(name: str, options: Mapping[str, Any], known: list[str]) -> None:
    for key in options:
        if key not in known:
            raise DataError(
                f"augment: {name} has no argument {key!r}{did_you_mean(key, known)}; it has {', '.join(known)}"
            )


def _reason(error: BaseException) -> str:
    if isinstance(error.__cause__, ValidationError):
        return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.__cause__.errors()[:3])
    return str(error)
