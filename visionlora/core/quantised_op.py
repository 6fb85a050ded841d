"""A linear map by a quantised weight, with or without a low-rank change: the weight is made twice, never kept."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionlora.core.kept import keep
from visionlora.core.maps import Op, cast, compute_dtype, sum_channels
from visionlora.core.quantised import dequantised
from visionlora.core.rows import thin_gradients

_Grads = tuple[Tensor | None, ...]


class QuantisedOp(torch.autograd.Function):
    """x (W + s B A)', or x W' where there is no change.

    torchao's own linear keeps W in the type of x for the backward pass: in training nothing would be saved. The numbers
    of W are needed in a buffer anyway, so that the change is added there and costs one thin product.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float
    ) -> Tensor:
        """A is (r, in), B is (out, r)."""
        dtype = compute_dtype(x)
        ctx.scale, ctx.dtype, ctx.like = scale, dtype, x.dtype
        ctx.weight = weight  # save_for_backward would unpack the tensor into its parts
        z = F.linear(x.to(dtype), A.to(dtype)) if A is not None and not A.requires_grad else None
        kept = keep(x, dtype) if A is not None and A.requires_grad else None
        ctx.again = kept and kept.recipe()  # a node that held the tensors itself would outwit checkpointing
        ctx.save_for_backward(A, B, z, *(kept.tensors if kept else ()))
        return quantised_linear(x.to(dtype), weight, bias, A, B, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> _Grads:
        A, B, z, *saved = ctx.saved_tensors
        dtype, scale = ctx.dtype, ctx.scale
        needs_x, _, needs_bias, needs_A, needs_B, _ = ctx.needs_input_grad
        g = grad.to(dtype)
        dx = (g @ _merged(ctx.weight, A, B, scale).to(dtype)).to(ctx.like) if needs_x else None
        dbias = sum_channels(grad, Op()) if needs_bias else None
        dA = dB = None
        if needs_A or needs_B:
            rows = ctx.again.rows(saved, g.shape[:-1], dtype) if ctx.again else None
            thin = None if z is None else z.flatten(0, -2)
            factors, wanted = (A.to(dtype), B.to(dtype) * scale), (False, needs_A, needs_B)
            _, dA, dB = thin_gradients(g.flatten(0, -2), rows, thin, *factors, wanted)
            dA = None if dA is None else dA.to(A.dtype)
            dB = None if dB is None else dB.to(B.dtype) * scale
        return dx, None, dbias, dA, dB, None


def quantised_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor | None, B: Tensor | None, scale: float
) -> Tensor:
    """Return x (W + s B A)' + bias in the type of x."""
    return F.linear(x, _merged(weight, A, B, scale).to(x.dtype), cast(bias, x.dtype))


def _merged(weight: Tensor, A: Tensor | None, B: Tensor | None, scale: float) -> Tensor:
    numbers = dequantised(weight)
    if A is None or B is None:
        return numbers
    wide = numbers if numbers.dtype in (torch.float32, torch.float64) else numbers.float()
    return wide.addmm_(B.to(wide.dtype), A.to(wide.dtype), alpha=scale)
