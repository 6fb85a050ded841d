"""Training steps of several contestants, interleaved and timed: forward, backward and optimiser apart."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.optim import AdamW

from visionlora.bench.contestants import Contestant
from visionlora.bench.settings import Settings
from visionlora.bench.workload import Workload

WARM_UP = 2
LEARNING_RATE = 1e-6  # numbers stay of one size however many steps are timed


@dataclass(frozen=True)
class Sample:
    """One round of one contestant, milliseconds a step."""

    forward: float
    backward: float
    optimiser: float


class Watch(Protocol):
    """Marks points in time and tells the milliseconds between them."""

    def mark(self) -> None: ...

    def laps(self) -> list[float]: ...


class _HostWatch:
    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.times = clock, list[float]()

    def mark(self) -> None:
        self.times.append(self.clock())

    def laps(self) -> list[float]:
        return [1e3 * (b - a) for a, b in zip(self.times, self.times[1:], strict=False)]


class _CudaWatch:
    def __init__(self) -> None:
        self.events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.events.append(event)

    def laps(self) -> list[float]:
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.events, self.events[1:], strict=False)]


class Runner:
    """A contestant with its optimiser."""

    def __init__(self, contestant: Contestant, workload: Workload, settings: Settings) -> None:
        self.contestant, self.workload, self.settings = contestant, workload, settings
        trained = contestant.trained() or [torch.nn.Parameter(torch.zeros(1))]  # the floor of a model without a head
        self.optimiser = AdamW(trained, lr=LEARNING_RATE, fused=True)

    def step(self, watch: Watch) -> None:
        """Do one training step, marking its four points in time."""
        watch.mark()
        loss = self.contestant.loss(self.workload, self.settings)
        watch.mark()
        loss.backward()
        watch.mark()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        watch.mark()

    def round(self) -> Sample:
        """Return the mean of some steps in a row."""
        watch = watch_for(self.settings)
        for _ in range(self.settings.steps):
            self.step(watch)
        laps, n = watch.laps(), self.settings.steps
        return Sample(*(sum(laps[part::4]) / n for part in range(3)))  # every fourth lap lies between two steps


def watch_for(settings: Settings) -> Watch:
    """Return a watch of the clock that the settings name."""
    return _CudaWatch() if settings.device == "cuda" else host_watch(settings)


def host_watch(settings: Settings) -> Watch:
    """Return a watch of the processor's clock, whatever device computes."""
    return _HostWatch(time.process_time if settings.clock == "cpu" else time.perf_counter)


def rounds(runners: list[Runner], settings: Settings) -> dict[str, list[Sample]]:
    """Return the samples of every runner by name: in each round all of them run once, in an order drawn anew."""
    drawn = random.Random(settings.seed)
    samples: dict[str, list[Sample]] = {runner.contestant.name: [] for runner in runners}
    gc.collect()
    gc.disable()
    try:
        for _ in range(settings.rounds):
            for runner in drawn.sample(runners, len(runners)):
                samples[runner.contestant.name].append(runner.round())
    finally:
        gc.enable()
    return samples
