"""Write rendered pictures as an ordinary image folder, OUT/<domain>/<class>/<number>.jpg."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from visionlora.data.scenes.camera import CAMERAS
from visionlora.data.scenes.scene import CLASSES, check_choice, check_size, render
from visionlora.data.scenes.weather import CONDITIONS
from visionlora.errors import ConfigError, DataError

RECORD = ".scenes.json"  # hidden: an image folder holds images
FORMAT = 1  # raise it when the same seed no longer gives the same picture


@dataclass(frozen=True)
class Domain:
    """A condition seen by a camera, and whether the pictures are held out."""

    name: str
    condition: str
    camera: str
    held_out: bool


def _all_domains() -> Iterator[Domain]:
    for condition in CONDITIONS:
        for camera in CAMERAS:
            angle = "" if camera == "level" else f"_{camera}"
            yield Domain(f"{condition}{angle}", condition, camera, held_out=False)
            yield Domain(f"{condition}{angle}_test", condition, camera, held_out=True)


DOMAINS = {domain.name: domain for domain in _all_domains()}
"""Every domain by name: <condition>, with _tilted for the steep camera and _test for pictures of their own seeds."""


def image_seed(seed: int, domain: str, klass: str, index: int) -> int:
    """Return the seed of one picture, the same in any process and any order."""
    digest = hashlib.sha256(f"{seed}/{domain}/{klass}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def write_scenes(
    out: str | Path,
    *,
    domains: Sequence[str] = ("day", "night_tilted", "day_test", "night_tilted_test"),
    per_class: int = 60,
    test_per_class: int = 30,
    size: int = 64,
    seed: int = 0,
    on_image: Callable[[Path], None] | None = None,
) -> int:
    """Write the pictures that are not there yet and return their number.

    Each domain gets per_class pictures a class, a domain that ends in _test gets test_per_class. A killed run leaves
    whole files only and is completed by calling it again; one folder takes one writer at a time. on_image is called
    for every picture, new or found. Raises DataError for a folder that holds anything else.
    """
    _check(domains, per_class, test_per_class, size, seed)
    out = Path(out)
    _claim(out, {"format": FORMAT, "seed": seed, "size": size})
    written = 0
    for domain in map(DOMAINS.__getitem__, dict.fromkeys(domains)):
        for klass in CLASSES:
            for index in range(test_per_class if domain.held_out else per_class):
                path = out / domain.name / klass / f"{index:04d}.jpg"
                written += _write(path, domain, klass, image_seed(seed, domain.name, klass, index), size)
                if on_image is not None:
                    on_image(path)
    return written


def _write(path: Path, domain: Domain, klass: str, seed: int, size: int) -> bool:
    if path.exists() and path.stat().st_size:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    picture = Image.fromarray(render(klass, domain.condition, domain.camera, seed, size))
    picture.save(part, format="JPEG", quality=90)
    part.replace(path)
    return True


def _claim(out: Path, record: dict[str, Any]) -> None:
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; scenes are written into a folder, choose another name")
    out.mkdir(parents=True, exist_ok=True)
    path = out / RECORD
    if path.exists():
        _compare(path, record)
    elif any(entry.name != f".{RECORD}.part" for entry in out.iterdir()):
        raise DataError(f"{out} already holds other files and no {RECORD}; choose an empty or a new folder")
    else:
        part = out / f".{RECORD}.part"
        part.write_text(json.dumps(record) + "\n")
        part.replace(path)


def _compare(path: Path, record: dict[str, Any]) -> None:
    try:
        found = json.loads(path.read_text())
    except ValueError as e:
        raise DataError(f"{path} is not the record of a scenes folder ({e}); choose an empty or a new folder") from None
    if found != record:
        raise DataError(f"{path.parent} holds scenes of {found}, asked for {record}; choose an empty or a new folder")


def _check(domains: Sequence[str], per_class: int, test_per_class: int, size: int, seed: int) -> None:
    if isinstance(domains, str) or not domains:
        raise ConfigError(f"domains must be a list of at least one name such as [day, night_tilted], got {domains!r}")
    for name in domains:
        check_choice("domain", name, list(DOMAINS))
    check_size(size)
    for what, value, least in (("per_class", per_class, 1), ("test_per_class", test_per_class, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 10**9:
            raise ConfigError(f"{what} must be a whole number of at least {least}, got {value!r}")
