"""`visionlora scenes`: write small surveillance scenes as an ordinary image folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from visionlora.data.scenes import CLASSES, DOMAINS, write_scenes
from visionlora.data.scenes.scene import check_choice


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Write the scenes that are not there yet."""
    domains = [name.strip() for name in options.domains.split(",") if name.strip()]
    for name in domains:
        check_choice("domain", name, list(DOMAINS))
    counts = [options.test_per_class if DOMAINS[name].held_out else options.per_class for name in domains]
    with tqdm(total=sum(counts) * len(CLASSES), unit="image", desc="scenes", disable=None) as bar:
        written = write_scenes(
            options.out,
            domains=domains,
            per_class=options.per_class,
            test_per_class=options.test_per_class,
            size=options.size,
            seed=options.seed,
            on_image=lambda path: _advance(bar),
        )
    print(f"{Path(options.out)}: {written} new images of {len(CLASSES)} classes in {', '.join(domains)}")
    return 0


def _advance(bar: tqdm[NoReturn]) -> None:
    bar.update()
