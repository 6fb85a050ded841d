"""`visionlora scenes`: write small surveillance scenes as an ordinary image folder."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from visionlora.data.scenes import CLASSES, DOMAINS, write_scenes
from visionlora.data.scenes.scene import check_choice


@dataclass(frozen=True)
class Scenes:
    """Which scenes are drawn."""

    domains: list[str] = field(default_factory=lambda: ["day", "night_tilted", "day_test", "night_tilted_test"])
    """<condition>[_tilted][_test]; pictures of a _test domain are seen in no other."""
    per_class: int = 60
    """Images of each class and domain."""
    test_per_class: int = 30
    """The same for _test domains."""
    size: int = 64
    """Pixels a side."""
    seed: int = 0
    """Another seed draws other scenes."""


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Write the scenes that are not there yet."""
    domains = [name.strip() for name in options.domains.split(",") if name.strip()]
    scenes = Scenes(domains, options.per_class, options.test_per_class, options.size, options.seed)
    written = draw(Path(options.out), scenes)
    print(f"{options.out}: {written} new images of {len(CLASSES)} classes in {', '.join(domains)}")
    return 0


def draw(out: Path, scenes: Scenes) -> int:
    """Write the scenes that are not there yet, with a bar in a terminal; return how many."""
    for name in scenes.domains:
        check_choice("domain", name, list(DOMAINS))
    counts = [scenes.test_per_class if DOMAINS[name].held_out else scenes.per_class for name in scenes.domains]
    with tqdm(total=sum(counts) * len(CLASSES), unit="image", desc="scenes", disable=None, leave=False) as bar:
        return write_scenes(
            out,
            domains=scenes.domains,
            per_class=scenes.per_class,
            test_per_class=scenes.test_per_class,
            size=scenes.size,
            seed=scenes.seed,
            on_image=lambda path: _advance(bar),
        )


def _advance(bar: tqdm[NoReturn]) -> None:
    bar.update()
