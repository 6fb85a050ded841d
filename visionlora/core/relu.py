"""ReLU that keeps one bit of every number for the backward pass, for layers that need no input of their own."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from visionlora.core.attach import Adapted, own_class
from visionlora.core.fast import eager

_GATHER, _SPREAD, _SELECT = 0x0102040810204080, 0x0101010101010101, 0x8040201008040201 - (1 << 64)
"""A product with the first brings the lowest bits of eight bytes together in the highest byte; the second copies a byte
to all eight, of which the third keeps one bit each (Warren, Hacker's Delight, 2nd edition, chapter 7)."""


class PackedReLU(Adapted):
    """A ReLU or ReLU6 that keeps where its slope is one, packed eight to a byte, instead of its output.

    It pays where the layers behind it do not keep that output either: convolutions with a frozen A.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled() and x.requires_grad and eager(x)):
            return super().forward(x)  # type: ignore[no-any-return]
        top = 6.0 if own_class(self) is nn.ReLU6 else None
        return _Packed.apply(x, top, bool(self.inplace))  # type: ignore[no-any-return]


def packable(layer: nn.Module) -> bool:
    """Tell whether the layer can be a PackedReLU."""
    return own_class(layer) in (nn.ReLU, nn.ReLU6) and sys.byteorder == "little"


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, top: float | None, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        y = x if inplace else torch.empty_like(x)
        torch.clamp(x, 0, top, out=y)
        ctx.save_for_backward(packed(y > 0 if top is None else (y > 0) & (y < top)))
        ctx.shape, ctx.stride = y.shape, y.stride() if _dense(y) else torch.empty(y.shape, device="meta").stride()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (bits,) = ctx.saved_tensors
        return torch.where(unpacked(bits, ctx.shape, ctx.stride), g, 0), None, None


def packed(mask: Tensor) -> Tensor:
    """Return a mask as bytes of eight bits each, in its order in memory."""
    flat = mask.as_strided((mask.numel(),), (1,)) if _dense(mask) else mask.flatten()
    missing = -len(flat) % 8
    flat = torch.cat([flat, flat.new_zeros(missing)]) if missing else flat
    return (flat.view(torch.int64).mul(_GATHER) >> 56).to(torch.uint8)


def unpacked(bits: Tensor, shape: torch.Size, stride: tuple[int, ...]) -> Tensor:
    """Return the mask again, its numbers side by side in the order of these strides."""
    flat = (bits.to(torch.int64).mul_(_SPREAD)).bitwise_and_(_SELECT).view(torch.uint8).ne(0)[: shape.numel()]
    return flat.as_strided(shape, stride)


def _dense(t: Tensor) -> bool:
    """Tell whether the numbers lie side by side in memory, in whatever order."""
    return t.is_contiguous() or (t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last))
