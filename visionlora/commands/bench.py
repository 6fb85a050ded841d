"""`visionlora bench`: training steps of ours, full fine-tuning, a linear probe and PEFT over the physical floor."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from visionlora.atomic import write_atomic
from visionlora.bench.compare import compare, comparison
from visionlora.bench.machine import load
from visionlora.bench.measure import measure
from visionlora.bench.record import new_record, read_record, write_record
from visionlora.bench.settings import BASIC, Settings
from visionlora.bench.table import markdown
from visionlora.bench.texts import TEXTS, text_workload
from visionlora.bench.truth import WrongResult
from visionlora.bench.verbs import imports, verbs
from visionlora.bench.workload import image_workload
from visionlora.errors import ConfigError
from visionlora.vision.backbone import check_model_name


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Measure models, or compare two records. Return 1 for a wrong result or a regression."""
    if options.compare:
        return _compare(*options.compare)
    if not options.models and options.verbs == "none":
        raise ConfigError(
            f"expected the name of a timm model, {', '.join(TEXTS)} or --compare BEFORE AFTER\nvisionlora bench --help"
        )
    settings = _settings(options)
    for name in options.models:
        if name not in TEXTS:
            check_model_name(name)
    with _threads(settings.threads):
        record = _measured(options, settings)
    if options.json:
        write_record(options.json, record)
    text = markdown(record)
    if options.markdown:
        write_atomic(options.markdown, text)
    print(text, end="")
    return 1 if record["failed"] else 0


def _settings(options: argparse.Namespace) -> Settings:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no GPU here")
    chosen = options.variants.split(",") if options.variants else BASIC
    return Settings(
        batch=options.batch,
        size=options.size,
        rank=options.rank,
        rounds=options.rounds,
        variants=tuple(name.strip() for name in chosen),
        dtype=options.dtype,
        device=options.device,
        channels_last=options.channels_last,
        compile=options.compile,
        clock=options.clock,
        threads=options.threads,
        steps=options.steps or (10 if options.device == "cuda" else 1),
        seed=options.seed,
    )


def _measured(options: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    record = new_record(settings)
    for name in options.models:
        print(f"measuring {name}", file=sys.stderr, flush=True)
        try:
            factory = text_workload if name in TEXTS else image_workload
            record["models"].append(measure(name, settings, factory=factory).plain())
        except WrongResult as e:
            record["failed"][name] = str(e)
        if options.json:  # what is measured is kept if a later model ends the run
            write_record(options.json, record)
    if options.verbs != "none":
        print(f"measuring verbs on {options.verbs}", file=sys.stderr, flush=True)
        record["verbs"] = {"model": options.verbs, "times": verbs(options.verbs, settings)}
        record["imports"] = imports()
    record["load"]["after"] = load()
    return record


def _compare(before: str, after: str) -> int:
    changes = compare(read_record(before), read_record(after))
    print(comparison(changes))
    worse = [change for change in changes if change.regressed]
    for change in worse:
        print(f"worse: {change.model} {change.variant}, {change.figure} x {change.ratio:.3f}", file=sys.stderr)
    return 1 if worse else 0


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
