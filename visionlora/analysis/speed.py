"""How fast this machine multiplies and moves numbers: four operations timed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

_DENSE, _THIN = (512, 512, 512), (4096, 384, 8)
"""Rows, inner size and columns of the products that are timed."""
_STREAM = 1 << 22
"""Numbers in a tensor that no cache holds."""
_DENSITY = 16
"""FLOPs a byte below which a product counts as thin: one with a rank of 8 has 4, one of 512 rows and columns 85."""


@dataclass(frozen=True)
class Speed:
    """Rates of one device and type."""

    dense: float
    """FLOPs a second of a product of two large matrices."""
    thin: float
    """The same of a product whose result has as many columns as a rank."""
    bandwidth: float
    """Bytes read and written a second."""
    start: float
    """Seconds an operation takes that has nothing to do."""

    def seconds(self, flops: int, moved_bytes: int) -> float:
        """Return the time of an operation bounded by arithmetic or by memory (the roofline model)."""
        rate = self.thin if flops < _DENSITY * moved_bytes else self.dense
        return max(flops / rate, moved_bytes / self.bandwidth) + self.start


def calibrated(device: str = "cpu", dtype: torch.dtype = torch.float32, *, repeats: int = 5) -> Speed:
    """Return the rates of a device, in some tenths of a second. Neighbours on the machine show in them."""

    def made(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    def product(shape: tuple[int, int, int]) -> float:
        rows, inner, columns = shape
        a, b = made(rows, inner), made(inner, columns)
        return 2 * rows * inner * columns / _fastest(lambda: a @ b, device, repeats)

    long, single = made(_STREAM), made(1)
    stream = _fastest(lambda: long.add_(1), device, repeats)
    start = _fastest(lambda: single.add_(1), device, repeats)
    return Speed(product(_DENSE), product(_THIN), 2 * long.nbytes / stream, start)


def _fastest(run: Callable[[], object], device: str, repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        _wait(device)
        before = perf_counter()
        run()
        _wait(device)
        times.append(perf_counter() - before)
    return min(times[1:])


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
