"""Decoding of one image file, the same in training, prediction and serving."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from os import PathLike
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from visionlora.errors import ConfigError, ImageError

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "MAX_PIXELS",
    "Header",
    "check_in_chans",
    "decode_image",
    "inspect_image",
    "read_image",
]

logger = logging.getLogger(__name__)

# GIF and PPM are common in older public datasets and their decoders are small. EPS (starts Ghostscript), PSD, FITS
# and other rarely fuzzed decoders stay closed, whatever the file is called.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
MAX_PIXELS = 50_000_000
BACKGROUND = (255, 255, 255)
ORIENTATION_TAG = 0x0112

# What Pillow's decoders raise on damaged files (found by flipping bytes in every format, see the tests); UserWarning
# where the program turns warnings into errors.
_DAMAGE = (
    *(OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, KeyError, IndexError, TypeError),
    *(AttributeError, ArithmeticError, RuntimeError, AssertionError, MemoryError, UserWarning),
)


@dataclass(frozen=True)
class Header:
    """What an image file says about its picture."""

    format: str
    mode: str
    size: tuple[int, int]
    """Width and height in the file, before the EXIF orientation is applied."""
    orientation: int
    """EXIF orientation, 1 is upright."""
    frames: int


def read_image(path: str | PathLike[str], *, in_chans: int = 3) -> Image.Image:
    """Return the upright 8-bit picture in a file: mode RGB, or L (grey) with in_chans=1.

    The content decides the format, never the file name. EXIF orientation is applied. Grey of 16 bits is scaled from
    0..65535, floating-point grey from 0..1 (other values are refused); the rule never depends on the picture.
    Transparency is laid over white, animations give their first frame, ICC profiles are ignored. Raises ImageError
    naming the file: unreadable, cut short, empty, another format, or above MAX_PIXELS (checked before decoding).
    """
    return inspect_image(path, in_chans=in_chans)[1]


def decode_image(data: bytes, *, name: str = "image", in_chans: int = 3) -> Image.Image:
    """Return the picture in encoded bytes, under the rules of read_image; name stands for the file in messages."""
    check_in_chans(in_chans)
    with _opened(io.BytesIO(data), name) as image:
        return _to_eight_bit(image, name, in_chans)


def inspect_image(path: str | PathLike[str], *, in_chans: int = 3) -> tuple[Header, Image.Image]:
    """Return the header of an image file and its picture, under the rules of read_image."""
    check_in_chans(in_chans)
    with _opened(path, str(path)) as image:
        format, mode, size = image.format or "", image.mode, image.size
        image.load()  # before getexif, which in a PNG lies behind the pixels
        header = Header(format, mode, size, image.getexif().get(ORIENTATION_TAG, 1), _frames(image))
        return header, _to_eight_bit(image, str(path), in_chans)


def check_in_chans(in_chans: int) -> None:
    """Raise ConfigError unless pictures can be decoded to this many channels."""
    if in_chans not in (1, 3):
        raise ConfigError(f"in_chans must be 1 (grey) or 3 (RGB), got {in_chans!r}")


@contextmanager
def _opened(source: str | PathLike[str] | io.BytesIO, name: str) -> Iterator[Image.Image]:
    try:
        _check_is_file(source)
        with Image.open(source, formats=FORMATS) as image:
            _check_pixels(image.size, name)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name}: {_what_it_is(source)}; expected one of {', '.join(FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"{name}: {_too_large()}") from None
    except _DAMAGE as e:
        raise ImageError(f"{name}: damaged or unreadable image ({_reason(e)})") from None


def _check_is_file(source: object) -> None:
    # open() on a named pipe would wait for ever
    if isinstance(source, (str, PathLike)) and Path(source).exists() and not Path(source).is_file():
        raise OSError("not a regular file")


def _check_pixels(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise ImageError(f"{name}: {size[0]} x {size[1]} pixels; {_too_large()}")


def _too_large() -> str:
    return f"at most {MAX_PIXELS:,} pixels are decoded, so make the image smaller"


def _what_it_is(source: object) -> str:
    if isinstance(source, io.BytesIO):
        head = source.getvalue()[:256]
    else:
        with Path(str(source)).open("rb") as file:
            head = file.read(256)
    if not head:
        return "the file is empty (0 bytes)"
    if head.lstrip()[:1] == b"<":
        return "not an image but HTML or XML"
    return "not an image in a known format"


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _frames(image: Image.Image) -> int:
    # MPO is what phones write for one still picture with a depth or gain map; its extra frames are not an animation
    return 1 if image.format == "MPO" else int(getattr(image, "n_frames", 1))


def _to_eight_bit(image: Image.Image, name: str, in_chans: int) -> Image.Image:
    if getattr(image, "is_animated", False) and image.format != "MPO":
        _warn_animated(name)
    ImageOps.exif_transpose(image, in_place=True)
    image = _flattened(_scaled(image))
    mode = "RGB" if in_chans == 3 else "L"
    return image if image.mode == mode else image.convert(mode)


@lru_cache(maxsize=4096)
def _warn_animated(name: str) -> None:
    logger.warning("%s has several frames; the first one is used", name)


def _scaled(image: Image.Image) -> Image.Image:
    """Bring 16-bit and floating-point grey to 8 bits, where Pillow's own convert would clip."""
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image, dtype=np.float64)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = float(values.min()), float(values.max())
    if not (low >= 0 and high <= top):  # also refuses NaN
        kind = "floating-point grey must lie in 0..1" if image.mode == "F" else "integer grey must lie in 0..65535"
        raise ValueError(f"{kind}, got {low:g}..{high:g}")
    return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))


def _flattened(image: Image.Image) -> Image.Image:
    """Lay transparency over white."""
    if not image.has_transparency_data:
        return image.convert("RGB") if image.mode in ("P", "CMYK", "YCbCr") else image
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (*BACKGROUND, 255)), rgba).convert("RGB")
