"""What a layer does with its weight: the only file that knows layer kinds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["linear", "conv1d_hf", "conv"]

_CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_CONV_OPS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Geometry:
    """Sizes of one weight, seen as (out, in, *kernel)."""

    kind: Kind
    out: int
    """Output features or channels, of all groups together."""
    in_: int
    """Input features or channels of one group."""
    groups: int = 1
    kernel: tuple[int, ...] = ()
    known: bool = True
    """The class is known exactly: a parallel branch equals the layer run with the changed weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.out, self.in_, *self.kernel)

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.in_ == 1

    @property
    def max_rank(self) -> int:
        """The rank beyond which the matrix of a group cannot change any more."""
        return min(self.out // self.groups, self.in_ * prod(self.kernel))

    @property
    def break_even_rank(self) -> int:
        """The largest rank at which A and B together have no more parameters than the weight (0: none)."""
        taps = self.in_ * prod(self.kernel)
        return self.out * taps // (self.groups * taps + self.out)

    def rows(self, count: int) -> Geometry:
        """Return the geometry of a part of the outputs."""
        return replace(self, out=count)

    def canonical(self, weight: Tensor) -> Tensor:
        """Return the stored weight as (out, in, *kernel)."""
        return weight.t() if self.kind == "conv1d_hf" else weight

    stored = canonical  # a transpose undoes itself

    def down(self, layer: nn.Module, x: Tensor, A: Tensor) -> Tensor:
        """Return x seen through the layer's own op with A as its weight: groups * r features."""
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            h: Tensor = layer._conv_forward(x, A, None)  # stride, dilation and padding of every mode come with it
            return h
        return F.linear(x, A)

    def up(self, h: Tensor, B: Tensor) -> Tensor:
        """Return h taken back to the outputs by a pointwise op, group by group."""
        if self.kind != "conv":
            return F.linear(h, B)
        return _CONV_OPS[len(self.kernel)](h, B, groups=self.groups)


def geometry_of(layer: nn.Module) -> Geometry | None:
    """Return the geometry of a layer, or None for a layer whose weight we cannot change."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return None
    if _is_hf_conv1d(layer):
        rows, columns = weight.shape
        return Geometry("conv1d_hf", out=columns, in_=rows)
    if isinstance(layer, nn.Linear):
        known = type(layer).forward is nn.Linear.forward or not materialisable(weight)
        return Geometry("linear", out=layer.out_features, in_=layer.in_features, known=known)
    for base, dims in _CONVS.items():
        if isinstance(layer, base):
            known = type(layer).forward is base.forward and type(layer)._conv_forward is base._conv_forward  # type: ignore[attr-defined]
            kernel = tuple(weight.shape[2:])
            assert len(kernel) == dims
            return Geometry("conv", weight.shape[0], weight.shape[1], layer.groups, kernel, known)  # type: ignore[arg-type]
    return None


def materialisable(weight: Tensor) -> bool:
    """Tell whether a changed copy of the weight can be formed: quantised weights cannot."""
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point()


def widened(weight: Tensor) -> Tensor:
    """Return the weight in float32 or wider: a small change added to a bfloat16 weight would be rounded away."""
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def _is_hf_conv1d(layer: nn.Module) -> bool:
    # transformers' Conv1D is a Linear whose weight is stored (in, out); known by name: transformers stays optional
    return any((c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D") for c in type(layer).__mro__)
