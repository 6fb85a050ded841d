"""Bytes of one forward and backward pass: kept for the backward pass, and allocated at the peak."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from visionlora.analysis.saved import Keeping

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells on standard error that there is no GPU

Pass = Callable[[], Tensor]
"""A forward pass; it returns the loss."""


def saved_bytes(forward: Pass, owned: Iterable[Tensor]) -> int:
    """Return the bytes autograd keeps for the backward pass beyond the owned tensors: parameters, buffers, inputs.

    A storage counts once and whole, however many views of it are kept.
    """
    with (keeping := Keeping(owned)):
        loss = forward()
    loss.backward()
    return keeping.bytes


def peak_bytes(forward: Pass, device: str) -> int:
    """Return the most bytes allocated at once during a forward and backward pass, beyond those before it."""
    return _peak_cuda(forward) if device == "cuda" else _peak_cpu(forward)


def _peak_cuda(forward: Pass) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_cpu(forward: Pass) -> int:
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        forward().backward()
    live = peak = 0
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
