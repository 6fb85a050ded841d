"""Autograd functions of the fast path: the layer's own numbers, with less kept for the backward pass and less moved.

Orders of computation, for a base weight W, thin factors A and B and s = alpha / r, all giving the same output:

factorised  y = x W' + (x A') B' s           the branch is added in place; z = x A' is kept beside x
merged      y = x (W + s B A)'               thin gradients; the merged weight is formed again, never kept
projected   y = x (W + s B A)'               dense weight gradient, projected: dB = s dW A', dA = s B' dW

The merged order is "forward2, backward5" of RunLoRA (Cherniuk et al. 2023, arXiv:2312.03415); none of them keeps or
returns a gradient of W. Double backward is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionlora.core.kept import keep
from visionlora.core.maps import (
    Like,
    Op,
    add_up,
    as_given,
    by_position,
    cast,
    channels_last,
    column,
    compute_dtype,
    down,
    gained,
    matrix,
    on_cpu,
    outer,
    sum_channels,
    tensor,
)
from visionlora.core.orders import Order
from visionlora.core.rows import Rows, thin_gradients

_Grads = tuple[Tensor | None, ...]


class LowRankOp(torch.autograd.Function):
    """The map by W + s B A, times a constant gain for every output channel."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        gain: Tensor | None,
        scale: float,
        op: Op,
        order: Order,
    ) -> Tensor:
        """A is (groups * r, in, *kernel), B is (out, r); weight and gain are constants."""
        dtype = compute_dtype(x)
        ctx.op, ctx.order, ctx.scale, ctx.dtype, ctx.like = op, order, scale, dtype, Like.of(x, op)
        y, z = low_rank(x.to(dtype), weight, bias, A, B, gain, scale, op, order)
        thin = not A.requires_grad and order != "projected"
        if thin and z is None:
            z = op(x.to(dtype), A.to(dtype))
        kept = None if thin else keep(x, dtype)
        ctx.again = kept and kept.recipe()
        ctx.save_for_backward(weight, A, B, gain, z, *(kept.tensors if kept else ()))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        weight, A, B, gain, z, *saved = ctx.saved_tensors
        op, dtype, like, scale = ctx.op, ctx.dtype, ctx.like, ctx.scale
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        g = like.formatted(grad.to(dtype))
        dbias = sum_channels(grad, op) if needs_bias else None
        dz: Tensor | None
        dA: Tensor | None
        dB: Tensor | None
        if ctx.order == "projected":
            x = ctx.again.get(saved, dtype)
            full = _merged(weight, A, B, gain, scale, op).to(dtype)
            dx = op.grad_input(g, like, full) if needs_x else None
            dA = dB = None
            if needs_A or needs_B:
                dA, dB = _project(gained(op.grad_weight(g, x, full).to(A.dtype), gain), A, B, scale, op)
        else:
            wanted = (needs_x and ctx.order == "factorised", needs_A, needs_B)
            thin_B = gained(B, gain).to(dtype) * scale
            if op.dims:
                x = ctx.again.get(saved, dtype) if ctx.again else None
                dz, dA, dB = _thin_gradients(g, x, z, A.to(dtype), thin_B, wanted, op)
            else:
                rows = ctx.again.rows(saved, like.shape[:-1], dtype) if ctx.again else None
                thin = None if z is None else z.reshape(-1, z.shape[-1])
                dz, dA, dB = thin_gradients(g.reshape(-1, g.shape[-1]), rows, thin, A.to(dtype), thin_B, wanted)
            dA = None if dA is None else dA.to(A.dtype)
            dB = None if dB is None else gained(dB.to(B.dtype) * scale, gain)
            dx = _thin_grad_input(ctx, g, dz, weight, A, B, gain) if needs_x else None
        return None if dx is None else dx.to(like.dtype), None, dbias, dA, dB, None, None, None, None


def low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gain: Tensor | None,
    scale: float,
    op: Op,
    order: Order,
) -> tuple[Tensor, Tensor | None]:
    """Return the map of x by (W + s B A) gain, and x A' where it was needed."""
    if order != "factorised":
        return op(x, _merged(weight, A, B, gain, scale, op).to(x.dtype), cast(bias, x.dtype)), None
    y = op(x, gained(weight, gain).to(x.dtype), cast(bias, x.dtype))
    z = op(x, A.to(x.dtype))
    add_up(y, z, gained(B, gain).to(x.dtype), scale, op)
    return y, z


class ComputedOp(torch.autograd.Function):
    """The map by a weight that a function computes from a few trained numbers: the weight is formed again, not kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        gain: Tensor | None,
        op: Op,
        compute: Callable[..., Tensor],
        *tensors: Tensor,
    ) -> Tensor:
        dtype = compute_dtype(x)
        ctx.op, ctx.compute, ctx.dtype, ctx.like = op, compute, dtype, Like.of(x, op)
        kept = keep(x, dtype)
        ctx.again, ctx.count = kept.recipe(), len(kept.tensors)
        ctx.save_for_backward(gain, *kept.tensors, *tensors)
        return op(x.to(dtype), gained(compute(*tensors), gain).to(dtype), cast(bias, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        gain, *rest = ctx.saved_tensors
        saved, tensors = rest[: ctx.count], rest[ctx.count :]
        op, dtype, like = ctx.op, ctx.dtype, ctx.like
        wanted = [i for i, need in enumerate(ctx.needs_input_grad[5:]) if need]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
            weight = ctx.compute(*leaves)
        g = like.formatted(grad.to(dtype))
        full = gained(weight.detach(), gain).to(dtype)
        dx = op.grad_input(g, like, full) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = [None] * len(tensors)
        if wanted:
            pulled = gained(op.grad_weight(g, ctx.again.get(saved, dtype), full).to(weight.dtype), gain)
            found = torch.autograd.grad(weight, [leaves[i] for i in wanted], pulled, allow_unused=True)
            for i, found_grad in zip(wanted, found, strict=True):
                grads[i] = found_grad
        dbias = sum_channels(grad, op) if ctx.needs_input_grad[1] else None
        return None if dx is None else dx.to(like.dtype), dbias, None, None, None, *grads


class FrozenOp(torch.autograd.Function):
    """The map by a constant weight, which keeps nothing but that weight: PyTorch's convolution keeps x as well."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, gain: Tensor | None, op: Op) -> Tensor:
        dtype = compute_dtype(x)
        ctx.op, ctx.dtype, ctx.like = op, dtype, Like.of(x, op)
        ctx.save_for_backward(weight, gain)
        return op(x.to(dtype), gained(weight, gain).to(dtype), cast(bias, dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        weight, gain = ctx.saved_tensors
        g = ctx.like.formatted(grad.to(ctx.dtype))
        dx = ctx.op.grad_input(g, ctx.like, gained(weight, gain).to(ctx.dtype))
        dbias = sum_channels(grad, ctx.op) if ctx.needs_input_grad[2] else None
        return dx.to(ctx.like.dtype), None, dbias, None, None


def _thin_gradients(
    g: Tensor, x: Tensor | None, z: Tensor | None, A: Tensor, B: Tensor, wanted: tuple[bool, bool, bool], op: Op
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return what thin_gradients gives, for a convolution."""
    wants_dz, wants_dA, wants_dB = wanted
    if on_cpu(g) and channels_last(g) and op.is_pointwise(A) and max(op.stride) == 1:
        thin = None if z is None else by_position(z)
        source = None if x is None else Rows.of(by_position(x))
        dz, dA, dB = thin_gradients(by_position(g), source, thin, A.flatten(1), B, wanted)
        shape = (len(g), *g.shape[2:], B.shape[1])
        return None if dz is None else dz.view(shape).movedim(-1, 1), None if dA is None else dA.view(A.shape), dB
    if z is None:
        assert x is not None
        z = op(x, A)
    dz = down(g, B) if wants_dz or wants_dA else None
    dA = op.grad_weight(dz, x, A) if wants_dA and dz is not None and x is not None else None
    return dz, dA, outer(g, z) if wants_dB else None


def _thin_grad_input(
    ctx: Any, g: Tensor, dz: Tensor | None, weight: Tensor, A: Tensor, B: Tensor, gain: Tensor | None
) -> Tensor:
    op: Op = ctx.op
    dtype, like = ctx.dtype, ctx.like
    if ctx.order == "merged":
        return op.grad_input(g, like, _merged(weight, A, B, gain, ctx.scale, op).to(dtype))
    dx = op.grad_input(g, like, gained(weight, gain).to(dtype))
    assert dz is not None
    if not op.dims:
        return dx.flatten(0, -2).addmm_(dz, A.to(dtype)).view_as(dx)
    return dx.add_(op.grad_input(dz, like, A.to(dtype)))


def _merged(weight: Tensor, A: Tensor, B: Tensor, gain: Tensor | None, scale: float, op: Op) -> Tensor:
    wide = weight if weight.dtype in (torch.float32, torch.float64) else weight.float()
    groups = op.groups if op.dims else 1
    last = channels_last(weight)
    A, B = A.to(wide.dtype), B.to(wide.dtype)
    # autocast would add in its own type, to W rounded to it: a change below half of its spacing would vanish
    with as_given(weight.device.type):
        if op.dims or wide.is_contiguous():
            up, thin = B.reshape(groups, -1, B.shape[1]), matrix(A, groups, last)
            total = tensor(torch.baddbmm(matrix(wide, groups, last), up, thin, alpha=scale), weight.shape, last)
        else:  # stored as (in, out): in another order in memory it would be multiplied in another order, to other bits
            total = torch.addmm(wide.t(), A.t(), B.t(), alpha=scale).t()
    return total if gain is None else total.mul_(column(gain, total))


def _project(dW: Tensor, A: Tensor, B: Tensor, scale: float, op: Op) -> tuple[Tensor, Tensor]:
    groups = op.groups if op.dims else 1
    last = channels_last(dW)
    dense, up, thin = matrix(dW, groups, last), B.reshape(groups, -1, B.shape[1]), matrix(A, groups, last)
    dA = tensor(torch.bmm(up.mT, dense).mul_(scale), A.shape, last)
    return dA, torch.bmm(dense, thin.mT).mul_(scale).view(B.shape)
