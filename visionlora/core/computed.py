"""A weight that is computed from a few trained numbers: formed again in the backward pass, not kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionlora.core.deferred import Deferred
from visionlora.core.delta import Delta
from visionlora.core.geometry import widened

Compute = Callable[..., Tensor]


class ComputedWeight(torch.autograd.Function):
    """What a function makes of some tensors, which are all that is kept."""

    @staticmethod
    def forward(ctx: Any, compute: Compute, like: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.compute = compute
        ctx.save_for_backward(*tensors)
        return compute(*tensors) if like is None else Deferred(compute, tensors, like)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[2:]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(want) for t, want in zip(ctx.saved_tensors, wanted, strict=True)]
            weight = ctx.compute(*leaves)
        found = iter(torch.autograd.grad(weight, [t for t in leaves if t.requires_grad], grad, allow_unused=True))
        return None, None, *(next(found) if want else None for want in wanted)


def computation(weight: Tensor, deltas: Sequence[tuple[Delta, float]]) -> tuple[Compute, list[Tensor]]:
    """Return a function that adds changes to (out, in, *kernel), and the tensors it is to be called with.

    What dropout leaves of the rank is drawn here, once: called again, the function gives the same weight.
    """
    states = [{**dict(delta.named_parameters()), **delta.drawn()} for delta, _ in deltas]

    def compute(*tensors: Tensor) -> Tensor:
        base = widened(weight)
        total, rest = base, iter(tensors)
        for (delta, strength), state in zip(deltas, states, strict=True):
            change = torch.func.functional_call(delta, {key: next(rest) for key in state}, (base,))
            total = total + (change if strength == 1 else strength * change)
        return total

    return compute, [tensor for state in states for tensor in state.values()]


def computed_weight(weight: Tensor, deltas: Sequence[tuple[Delta, float]], *, deferred: bool = False) -> Tensor:
    """Return a stored weight with its changes; autograd keeps the trained numbers alone.

    Deferred, it is not even formed before an operation needs it.
    """
    geometry = deltas[0][0].geometry
    compute, tensors = computation(geometry.canonical(weight), deltas)

    def stored(*tensors: Tensor) -> Tensor:
        return geometry.stored(compute(*tensors)).to(weight.dtype)

    changed: Tensor = ComputedWeight.apply(stored, weight if deferred else None, *tensors)
    return changed
