"""Linear maps with a weight, their gradients, and thin maps of channels, in every memory format."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Op(NamedTuple):
    """A linear map of x by a weight: x @ W.T where dims is 0, else a convolution that pads with zeros."""

    dims: int = 0
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self.dims:
            return F.linear(x, weight, bias)
        zeros = (0,) * self.dims
        return torch.convolution(x, weight, bias, self.stride, self.padding, self.dilation, False, zeros, self.groups)

    def backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
        """Return the gradients of x and of the weight, those that are wanted."""
        if not self.dims:
            dx = g @ weight if wanted[0] else None
            return dx, g.flatten(0, -2).t() @ x.flatten(0, -2) if wanted[1] else None
        options = (self.stride, self.padding, self.dilation, False, (0,) * self.dims, self.groups)
        grads = torch.ops.aten.convolution_backward(g, x, weight, None, *options, (*wanted, False))
        return grads[0], grads[1]

    def grad_input(self, g: Tensor, like: Like, weight: Tensor) -> Tensor:
        """Return the gradient of an x of which only the looks are known: the values play no part."""
        dx, _ = self.backward(g, like.stand_in(g) if self.dims else g, weight, (True, False))
        assert dx is not None
        return dx


class Like(NamedTuple):
    """What a tensor looked like."""

    shape: torch.Size
    dtype: torch.dtype
    last: bool
    """In memory, channels come after positions."""

    @classmethod
    def of(cls, x: Tensor) -> Like:
        return cls(x.shape, x.dtype, channels_last(x))

    def stand_in(self, g: Tensor) -> Tensor:
        """Return a tensor that looks alike and holds no values."""
        if self.last:  # convolution_backward takes the format of its result from x
            return torch.empty(self.shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
        return g.new_empty(1).expand(self.shape)

    def formatted(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=torch.channels_last) if self.last else t.contiguous()


def matrix(t: Tensor, groups: int, last: bool) -> Tensor:
    """Return a weight or a thin factor (rows, in, *kernel) as (groups, rows of one, taps), in its order in memory."""
    return (t.movedim(1, -1) if last else t).reshape(groups, t.shape[0] // groups, -1)


def tensor(m: Tensor, shape: torch.Size, last: bool) -> Tensor:
    """Return such a matrix in the shape it had."""
    return m.view(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if last else m.view(shape)


def gained(t: Tensor, gain: Tensor | None) -> Tensor:
    return t if gain is None else t * column(gain, t)


def column(gain: Tensor, t: Tensor) -> Tensor:
    return gain.to(t.dtype).view(-1, *[1] * (t.ndim - 1))


def add_up(y: Tensor, z: Tensor, B: Tensor, scale: float, op: Op) -> None:
    """Change y in place: add s B z."""
    if rows := _rows(op, y, z):
        rows[0].addmm_(rows[1], B.t(), alpha=scale)
    else:
        y.view(*y.shape[:2], -1).baddbmm_(B.expand(len(y), *B.shape), z.flatten(2), alpha=scale)


def down(g: Tensor, B: Tensor, scale: float, op: Op) -> Tensor:
    """Return s B' g, in the shape and format of g but for its channels."""
    B = B * scale
    if not op.dims:
        return g @ B
    if channels_last(g):
        return (g.movedim(1, -1) @ B).movedim(-1, 1)
    return torch.matmul(B.t(), g.flatten(2)).view(len(g), -1, *g.shape[2:])


def outer(g: Tensor, z: Tensor, op: Op) -> Tensor:
    """Return g z' summed over all positions: (out, r)."""
    if rows := _rows(op, g, z):
        return rows[0].t() @ rows[1]
    return torch.bmm(g.flatten(2), z.flatten(2).mT).sum(0)


def _rows(op: Op, *tensors: Tensor) -> list[Tensor] | None:
    """Return the tensors as (positions, channels) views, or None where channels come before positions in memory."""
    if not op.dims:
        return [t.reshape(-1, t.shape[-1]) for t in tensors]
    if not channels_last(tensors[0]):
        return None
    return [t.movedim(1, -1).reshape(-1, t.shape[1]) for t in tensors]


def sum_channels(g: Tensor, op: Op) -> Tensor:
    return g.flatten(0, -2).sum(0) if not op.dims else g.transpose(0, 1).flatten(1).sum(1)


def channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type that x is used in: autocast's where it is on."""
    wanted = autocast_dtype(x.device.type)
    return x.dtype if wanted is None or x.dtype == torch.float64 else wanted


def as_given(kind: str) -> AbstractContextManager[object]:
    """Return a context in which types are as given on this kind of device, whatever autocast would make of them."""
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """Return the type that autocast computes in on this kind of device, or None where it is off or unknown."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None
