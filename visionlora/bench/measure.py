"""All variants of one model: built, checked against the slow truth, counted, then timed in turns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from visionlora.bench.contestants import Contestant, Skipped, floor, full, linear, ours
from visionlora.bench.counts import Counts, count
from visionlora.bench.peft_contestant import peft
from visionlora.bench.settings import ORDERS, VARIANTS, Settings
from visionlora.bench.timing import WARM_UP, Runner, Sample, rounds, watch_for
from visionlora.bench.truth import Truth, WrongResult
from visionlora.bench.workload import Factory, Workload, image_workload


@dataclass
class Result:
    """What was measured of one model."""

    name: str
    layers: int
    """How many carry an adapter."""
    counts: dict[str, Counts] = field(default_factory=dict)
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    """How far the gradient of a variant lies from that of a plain LoRA with dense weights, relative."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Variants that could not be measured, with the reason."""

    def plain(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self)


def measure(name: str, settings: Settings, *, factory: Factory = image_workload, timed: bool = True) -> Result:
    """Return the figures of a model by name. Raises WrongResult where a variant of ours does not compute LoRA."""
    workload = factory(name, settings)
    contestants, result = build(workload, settings)
    for contestant in contestants:
        result.counts[contestant.name] = count(contestant, workload, settings)
    if timed:
        runners = _warm([Runner(c, workload, settings) for c in contestants], settings, result)
        result.samples = rounds(runners, settings)
    return result


def build(workload: Workload, settings: Settings) -> tuple[list[Contestant], Result]:
    """Return the contestants the settings name, each checked, and a result without figures yet."""
    first = ours(workload, settings)
    result = Result(workload.name, len(first.ranks))
    truth = Truth(workload, settings, first.factors)
    makers: dict[str, Callable[[], Contestant]] = {
        "floor": lambda: floor(workload, first.ranks),
        "full": lambda: full(workload),
        "linear": lambda: linear(workload),
        "ours": lambda: first,
        "peft": lambda: peft(workload, settings, first.ranks),
        **{order: _forced(order, workload, settings) for order in ORDERS},
    }
    contestants = []
    for name in [v for v in VARIANTS if v == "floor" or v in settings.variants]:
        try:
            contestant = makers[name]()
            if settings.channels_last:  # the factors of adapters too, whoever made them
                contestant.model.to(memory_format=torch.channels_last)
            contestants.append(_checked(contestant, truth, result))
        except Skipped as e:
            result.skipped[name] = str(e)
    return contestants, result


def _forced(order: str, workload: Workload, settings: Settings) -> Callable[[], Contestant]:
    return lambda: ours(workload, settings, order)


def _checked(contestant: Contestant, truth: Truth, result: Result) -> Contestant:
    try:
        truth.check_base(contestant)
        if contestant.factors:
            result.errors[contestant.name] = truth.check(contestant)
    except (WrongResult, RuntimeError) as e:
        if contestant.name == "peft":
            raise Skipped(f"PEFT computes something else here: {' '.join(str(e).split())[:200]}") from None
        raise
    return contestant


def _warm(runners: list[Runner], settings: Settings, result: Result) -> list[Runner]:
    """Return the runners that can be timed: compiled where asked for, and past their first steps."""
    warm = []
    for runner in runners:
        name = runner.contestant.name
        try:
            if settings.compile:
                runner.contestant.model.compile()
            with warnings.catch_warnings():
                if settings.compile:
                    warnings.simplefilter("ignore")  # the compiler's own
                for _ in range(WARM_UP):
                    runner.step(watch_for(settings))
            warm.append(runner)
        except RuntimeError as e:
            if not settings.compile:
                raise
            result.skipped[name] = f"does not compile: {' '.join(str(e).split())[:200]}"
    return warm
