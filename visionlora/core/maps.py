"""Linear maps with a weight, their gradients, and thin maps of channels, in every memory format."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

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

    def grad_weight(self, g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Return the gradient of a weight of which only the looks are known."""
        if not self.dims:
            return g.flatten(0, -2).t() @ x.flatten(0, -2)
        if self.is_pointwise(weight) and max(self.stride) == 1 and channels_last(x) and channels_last(g) and on_cpu(g):
            return (by_position(g).t() @ by_position(x)).view(weight.shape)
        dW: Tensor = self._convolution_backward(g, x, weight, (False, True))[1]
        return dW

    def grad_input(self, g: Tensor, like: Like, weight: Tensor) -> Tensor:
        """Return the gradient of an x of which only the looks are known: the values play no part.

        On a CPU, torch's own backward pass of a convolution is 1.3 to 2 times slower than the product of matrices that
        a 1 x 1 kernel is, 8 times with a stride, and slower than a convolution with the kernel turned round, which is
        the same where every channel has its own.
        """
        if not self.dims:
            return g @ weight
        if on_cpu(g) and self.is_pointwise(weight):
            return self._spread(self._across_channels(g, weight.flatten(1)), like)
        if on_cpu(g) and self._is_depthwise(weight) and max(self.stride) == 1:
            kernel = zip(weight.shape[2:], self.dilation, self.padding, strict=True)
            padding = tuple(d * (k - 1) - p for k, d, p in kernel)
            if min(padding) >= 0:
                around = self._replace(padding=padding)
                return around(g, weight.flip(tuple(range(2, weight.ndim))).contiguous(memory_format=like.format))
        dx: Tensor = self._convolution_backward(g, like.stand_in(g), weight, (True, False))[0]
        return dx

    def is_pointwise(self, weight: Tensor) -> bool:
        """Tell whether this is one product of matrices at every position: a 1 x 1 kernel, whatever its stride."""
        return self.groups == 1 and weight.shape[1:].numel() == weight.shape[1] and not any(self.padding)

    def _is_depthwise(self, weight: Tensor) -> bool:
        return self.groups == weight.shape[0] and weight.shape[1] == 1

    def _across_channels(self, g: Tensor, W: Tensor) -> Tensor:
        if channels_last(g):
            return (g.movedim(1, -1) @ W).movedim(-1, 1)
        return torch.matmul(W.t(), g.flatten(2)).view(len(g), -1, *g.shape[2:])

    def _spread(self, dx: Tensor, like: Like) -> Tensor:
        """Return a gradient that has one position of every stride with zeros between."""
        if dx.shape == like.shape:
            return dx
        full = torch.zeros(like.shape, dtype=dx.dtype, device=dx.device).contiguous(memory_format=like.format)
        every = [slice(None), slice(None)] + [slice(None, None, s) for s in self.stride]
        full[tuple(every)] = dx
        return full

    def _convolution_backward(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> Any:
        options = (self.stride, self.padding, self.dilation, False, (0,) * self.dims, self.groups)
        return torch.ops.aten.convolution_backward(g, x, weight, None, *options, [*wanted, False])


class Like(NamedTuple):
    """What a tensor looked like."""

    shape: torch.Size
    dtype: torch.dtype
    last: bool
    """In memory, channels come after positions."""

    @classmethod
    def of(cls, x: Tensor, op: Op) -> Like:
        return cls(x.shape, x.dtype, channels_last(x) and op.dims > 0)

    @property
    def format(self) -> torch.memory_format:
        return torch.channels_last if self.last else torch.contiguous_format

    def stand_in(self, g: Tensor) -> Tensor:
        """Return a tensor that looks alike and holds no values."""
        # convolution_backward takes the format of its result from x; on a CPU it would copy an expanded one
        if self.last or on_cpu(g):
            return torch.empty(self.shape, dtype=g.dtype, device=g.device, memory_format=self.format)
        return g.new_empty(1).expand(self.shape)

    def formatted(self, t: Tensor) -> Tensor:
        return t.contiguous(memory_format=self.format)


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
    if not op.dims:
        y.reshape(-1, y.shape[-1]).addmm_(z.reshape(-1, z.shape[-1]), B.t(), alpha=scale)
    elif channels_last(y):
        by_position(y).addmm_(by_position(z), B.t(), alpha=scale)
    else:
        y.view(*y.shape[:2], -1).baddbmm_(B.expand(len(y), *B.shape), z.flatten(2), alpha=scale)


def down(g: Tensor, B: Tensor) -> Tensor:
    """Return B' g of a convolution, in the shape and format of g but for its channels."""
    if channels_last(g):
        return (g.movedim(1, -1) @ B).movedim(-1, 1)
    return torch.matmul(B.t(), g.flatten(2)).view(len(g), -1, *g.shape[2:])


def outer(g: Tensor, z: Tensor) -> Tensor:
    """Return g z' of a convolution, summed over all positions: (out, r)."""
    # z g' has few rows and g z' few columns: half the time
    if channels_last(g):
        return (by_position(z).t() @ by_position(g)).t()
    return torch.bmm(z.flatten(2), g.flatten(2).mT).sum(0).t()


def by_position(t: Tensor) -> Tensor:
    """Return a map (batch, channels, *positions) as (batch * positions, channels)."""
    return t.movedim(1, -1).reshape(-1, t.shape[1])


def sum_channels(g: Tensor, op: Op) -> Tensor:
    return g.flatten(0, -2).sum(0) if not op.dims else g.transpose(0, 1).flatten(1).sum(1)


def channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def on_cpu(t: Tensor) -> bool:
    """Tell whether a tensor lies where oneDNN and MKL compute, in a type they are timed for here."""
    return t.device.type == "cpu" and t.dtype in (torch.float32, torch.float64)


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
