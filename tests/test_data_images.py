"""Every kind of image file gives the right pixels or an error that names the file."""

from __future__ import annotations

import io
import logging
import os
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionlora.data.images import FORMATS, MAX_PIXELS, decode_image, inspect_image, read_image
from visionlora.errors import ConfigError, ImageError


def picture(size: tuple[int, int] = (16, 12)) -> Image.Image:
    """A picture whose corners differ, so that a flip or a turn shows."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


def write(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def png_header_only(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost no data."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    path = write(tmp_path / "a.img", picture(), format=format, **options)
    assert np.array_equal(pixels(read_image(path)), pixels(picture()))


def test_jpeg_is_close_to_the_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jpg", picture(), quality=95)
    assert np.abs(pixels(read_image(path)) - pixels(picture())).max() < 40


def test_content_decides_the_format_not_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "really_png.jpg", picture(), format="PNG")
    assert np.array_equal(pixels(read_image(path)), pixels(picture()))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation_is_applied(tmp_path: Path, format: str, orientation: int) -> None:
    upright = picture((32, 24))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the transpose that stores the picture so that the tag undoes it
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / "a.img", stored, format=format, exif=exif)
    got = read_image(path)
    assert got.size == (32, 24)
    assert np.abs(pixels(got) - pixels(upright)).mean() < 6


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 12 * 16).reshape(12, 16).astype(np.uint16)
    for name in ("a.png", "a.tif", "a.pgm"):
        got = pixels(read_image(write(tmp_path / name, Image.fromarray(values)), in_chans=1))
        assert np.abs(got - values / 257).max() <= 0.5, name


def test_big_endian_sixteen_bit_tiff_is_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 257, 65535]], dtype=">u2")
    image = Image.frombytes("I;16B", (3, 1), values.tobytes())
    assert pixels(read_image(write(tmp_path / "a.tif", image), in_chans=1)).tolist() == [[0, 1, 255]]


def test_float_grey_in_zero_to_one_is_scaled(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)))
    assert pixels(read_image(path))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("values", [[0.0, 200.0], [-0.1, 0.5], [0.0, float("nan")], [0.0, float("inf")]])
def test_float_grey_outside_zero_to_one_is_refused(tmp_path: Path, values: list[float]) -> None:
    path = write(tmp_path / "a.tif", Image.fromarray(np.array([values], dtype=np.float32)))
    with pytest.raises(ImageError, match=r"a\.tif.*0\.\.1"):
        read_image(path)


def test_integer_grey_outside_sixteen_bits_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", Image.fromarray(np.array([[0, 70000]], dtype=np.int32)))
    with pytest.raises(ImageError, match=r"a\.tif.*65535"):
        read_image(path)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "LA", "RGBA", "RGB"])
def test_every_mode_becomes_rgb_or_grey(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / "a.tif" if mode == "CMYK" else tmp_path / "a.png", picture().convert(mode))
    assert read_image(path).mode == "RGB"
    assert read_image(path, in_chans=1).mode == "L"


def test_palette_and_cmyk_keep_their_colours(tmp_path: Path) -> None:
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    palette = write(tmp_path / "p.png", red.convert("P", palette=Image.Palette.ADAPTIVE))
    for path in (palette, write(tmp_path / "c.jpg", red.convert("CMYK"))):
        assert np.abs(pixels(read_image(path))[4, 4] - [255, 0, 0]).max() < 6


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    image.putpixel((1, 0), (0, 0, 0, 255))
    assert pixels(read_image(write(tmp_path / "a.png", image))).tolist() == [[[255] * 3, [0] * 3]]
    key = write(tmp_path / "k.png", Image.new("RGB", (1, 1), (9, 9, 9)), transparency=(9, 9, 9))
    assert pixels(read_image(key)).tolist() == [[[255] * 3]]


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame_and_one_warning(
    tmp_path: Path, format: str, caplog: pytest.LogCaptureFixture
) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    path = write(tmp_path / f"{format}.img", frames[0], format=format, save_all=True, append_images=frames[1:])
    with caplog.at_level(logging.WARNING):
        first, _ = read_image(path), read_image(path)
    assert pixels(first).min() > 250
    assert [r.getMessage() for r in caplog.records] == [f"{path} has several frames; the first one is used"]


def test_zero_bytes_and_html_are_errors_that_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "page.jpg").write_text("<!DOCTYPE html><html>404</html>")
    with pytest.raises(ImageError, match=r"empty\.jpg: the file is empty"):
        read_image(tmp_path / "empty.jpg")
    with pytest.raises(ImageError, match=r"page\.jpg: not an image but HTML"):
        read_image(tmp_path / "page.jpg")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM"])
def test_truncated_files_are_errors_that_name_the_file(tmp_path: Path, format: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = write(tmp_path / "whole.img", noise, format=format).read_bytes()
    cut = tmp_path / "cut.img"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=r"cut\.img"):
        read_image(cut)


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_bytes_give_a_picture_or_an_image_error(format: str) -> None:
    whole = io.BytesIO()
    picture((24, 24)).save(whole, format=format)
    rng = random.Random(0)
    for _ in range(150):
        data = bytearray(whole.getvalue())
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert decode_image(bytes(data), name="bad").mode == "RGB"
        except ImageError as e:
            assert str(e).startswith("bad: ")  # noqa: PT017


@pytest.mark.parametrize("side", [7_072, 10_000, 20_000])
def test_large_claims_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header_only(side, side))
    with pytest.raises(ImageError, match=r"bomb\.png.*50,000,000"):
        read_image(path)
    assert side * side > MAX_PIXELS


@pytest.mark.parametrize("head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"8BPS\0\1" + b"\0" * 40])
def test_formats_outside_the_list_are_refused(tmp_path: Path, head: bytes) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(head)
    with pytest.raises(ImageError, match=r"a\.jpg.*expected one of JPEG"):
        read_image(path)


def test_folders_pipes_loops_and_missing_files_are_image_errors(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name, why in {".": "regular", "pipe.jpg": "regular", "loop.jpg": "symbolic", "gone.jpg": "No such"}.items():
        with pytest.raises(ImageError, match=why):
            read_image(tmp_path / name)


def test_other_channel_counts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="in_chans"):
        read_image(write(tmp_path / "a.png", picture()), in_chans=4)


def test_inspect_tells_what_the_file_holds(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    header, image = inspect_image(write(tmp_path / "a.png", picture((16, 12)).convert("L"), exif=exif))
    assert (header.format, header.mode, header.size, header.orientation, header.frames) == ("PNG", "L", (16, 12), 6, 1)
    assert image.size == (12, 16)
