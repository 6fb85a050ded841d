"""In which order a low-rank layer computes: chosen for each layer from its sizes, overridable, stored nowhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch

from visionlora.core.geometry import Geometry
from visionlora.errors import ConfigError

Order = Literal["factorised", "merged", "projected"]
ORDERS: tuple[Order, ...] = get_args(Order)

_FORCED: ContextVar[Order | None] = ContextVar("order", default=None)


def choose(geometry: Geometry, rank: int, positions: int, device: str, dtype: torch.dtype, *, frozen_A: bool) -> Order:
    """Return the order for a layer that gives `positions` outputs (images x pixels, or tokens) for each feature."""
    if geometry.groups > 1:  # thin factors of every group together are wider than the layer
        return "projected"
    forced = _FORCED.get()
    if forced is not None:
        return "merged" if frozen_A and forced == "projected" else forced
    harmonic = geometry.out * geometry.taps / (geometry.out + geometry.taps)
    if harmonic < _narrow(device, dtype, rank):  # one forward pass, trained or not: a loaded adapter gives equal bits
        return "merged" if frozen_A else "projected"
    # a thin product of rows runs from the cache here, so that forming the weight twice pays for many rows only: even at
    # 5 to 10 times this width, 8 % ahead at 40 times (one core, 192 to 768 features)
    many = 8 if device == "cpu" and not geometry.kernel else 2
    return "merged" if positions > many * harmonic else "factorised"


@contextmanager
def forced(order: Order | None) -> Iterator[None]:
    """Run layers in this order inside the with block where it is possible (None: chosen for each layer again)."""
    if order is not None and order not in ORDERS:
        raise ConfigError(f"expected an order of {', '.join(ORDERS)}, got {order!r}")
    token = _FORCED.set(order)
    try:
        yield
    finally:
        _FORCED.reset(token)


def _narrow(device: str, dtype: torch.dtype, rank: int) -> float:
    # below this width a dense weight gradient costs less than thin products, which memory bandwidth bounds: measured
    # on a CPU; on a GPU the balance of arithmetic and bandwidth (312 TFLOP/s bf16 to 2 TB/s), not measured
    if device == "cpu":
        return 24 + 2 * rank
    return 300 if dtype in (torch.bfloat16, torch.float16) else 40
