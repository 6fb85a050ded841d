"""The figures of a training step that no clock and no neighbour can change."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from visionlora.analysis.work import work
from visionlora.bench.contestants import Contestant
from visionlora.bench.memory import peak_bytes, saved_bytes
from visionlora.bench.settings import Settings
from visionlora.bench.workload import Workload


@dataclass(frozen=True)
class Counts:
    """One forward and backward pass, without the optimiser."""

    saved_bytes: int
    """Kept by autograd for the backward pass, beyond parameters, buffers and the input."""
    peak_bytes: int
    """Allocated at once, gradients included."""
    operations: int
    moved_bytes: int
    flops: int
    trainable: int
    """Trained numbers."""


def count(contestant: Contestant, workload: Workload, settings: Settings) -> Counts:
    """Return the deterministic figures of a contestant, which is not compiled and keeps no gradients."""

    def forward() -> Tensor:
        return contestant.loss(workload, settings)

    def clear() -> None:
        contestant.model.zero_grad(set_to_none=True)

    clear()
    owned = [*contestant.model.parameters(), *contestant.model.buffers(), *workload.inputs]
    saved = saved_bytes(forward, owned)
    clear()
    peak = peak_bytes(forward, settings.device)
    clear()
    done = work(forward)
    clear()
    trainable = sum(p.numel() for p in contestant.trained())
    return Counts(saved, peak, done.operations, done.moved_bytes, done.flops, trainable)
