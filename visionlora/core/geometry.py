"""What a layer does with its weight: the only file that knows layer kinds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from visionlora.core.quantised import dequantised, is_quantised

Kind = Literal["linear", "conv1d_hf", "embedding", "conv", "conv_transpose", "bare"]

_CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
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
    standardised: bool = False
    """The layer divides each row of its weight by its spread, so that the length of a row means nothing."""
    own_shape: tuple[int, ...] = ()
    """Shape of a bare parameter, which is seen as the matrix (all dimensions but the last, the last)."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.out, self.in_, *self.kernel)

    @property
    def taps(self) -> int:
        """Numbers in one row of the weight."""
        return self.in_ * prod(self.kernel)

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.in_ == 1

    @property
    def max_rank(self) -> int:
        """The rank beyond which the matrix of a group cannot change any more."""
        return min(self.out // self.groups, self.taps)

    def rows(self, count: int) -> Geometry:
        """Return the geometry of a part of the outputs."""
        return replace(self, out=count)

    def canonical(self, weight: Tensor) -> Tensor:
        """Return the stored weight as (out, in, *kernel)."""
        if self.kind in ("conv1d_hf", "embedding"):
            return weight.t()
        if self.kind == "conv_transpose":  # stored as (in of all groups, out of one group, *kernel)
            grouped = weight.view(self.groups, self.in_, *weight.shape[1:])
            return grouped.transpose(1, 2).flatten(0, 1)
        return weight.reshape(self.shape) if self.kind == "bare" else weight

    def stored(self, weight: Tensor) -> Tensor:
        """Return a weight given as (out, in, *kernel) as the layer stores it: the inverse of canonical."""
        if self.kind in ("conv1d_hf", "embedding"):
            return weight.t()
        if self.kind == "conv_transpose":
            grouped = weight.reshape(self.groups, self.out // self.groups, *weight.shape[1:])
            return grouped.transpose(1, 2).flatten(0, 1)
        return weight.reshape(self.own_shape) if self.kind == "bare" else weight

    def same(self, layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
        """Return x seen through the layer's own op (stride, dilation, padding of every mode) with another weight."""
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            h: Tensor = layer._conv_forward(x, weight, None)
            return h
        if isinstance(layer, nn.Embedding):
            return F.embedding(x, weight.t(), layer.padding_idx)
        return F.linear(x, weight)

    def pointwise(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return x mixed by a weight of kernel size 1, group by group."""
        if self.kind != "conv":
            return F.linear(x, weight)
        return _CONV_OPS[len(self.kernel)](x, weight, groups=self.groups)


def geometry_of(layer: nn.Module) -> Geometry | None:
    """Return the geometry of a layer's weight, or None for a layer whose weight we cannot change."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return None
    if _is_hf_conv1d(layer):
        rows, columns = weight.shape
        return Geometry("conv1d_hf", out=columns, in_=rows)
    if isinstance(layer, nn.Linear):
        known = _own(layer).forward is nn.Linear.forward or not materialisable(weight)
        return Geometry("linear", out=layer.out_features, in_=layer.in_features, known=known)
    if isinstance(layer, nn.Embedding):
        # max_norm rescales the stored weight in every forward pass: there is no frozen base to add to
        known = _own(layer).forward is nn.Embedding.forward
        return None if layer.max_norm else Geometry("embedding", layer.embedding_dim, layer.num_embeddings, known=known)
    return _conv_geometry(layer, weight)


def bare_geometry(parameter: Tensor) -> Geometry | None:
    """Return the geometry of a parameter that a module reads itself, or None for a vector."""
    if parameter.ndim < 2:
        return None
    rows = prod(parameter.shape[:-1])
    return Geometry("bare", rows, parameter.shape[-1], known=False, own_shape=tuple(parameter.shape))


def own_output(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return what a layer of a known class gives with a weight, whatever its `weight` attribute shows."""
    if isinstance(layer, nn.Embedding):
        options = (layer.padding_idx, None, layer.norm_type, layer.scale_grad_by_freq, layer.sparse)
        return F.embedding(x, weight, *options)
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        y: Tensor = layer._conv_forward(x, weight, bias)
        return y
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    flat = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)  # type: ignore[arg-type]  # transformers' Conv1D
    return flat.view(*x.shape[:-1], flat.shape[1])


def plain_linear(layer: nn.Module) -> bool:
    """Tell whether the layer is a Linear that runs torch's own forward pass, whatever its weight is stored in."""
    return isinstance(layer, nn.Linear) and _own(layer).forward is nn.Linear.forward


def materialisable(weight: Tensor) -> bool:
    """Tell whether a changed copy of the weight can be formed: quantised weights cannot."""
    return plain(weight) and weight.is_floating_point()


def plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is of torch's own kind, with numbers or (visionlora.analysis) without."""
    return type(tensor) in (nn.Parameter, Tensor, FakeTensor)


def hollow(tensor: Tensor) -> bool:
    """Tell whether a tensor has a shape and no numbers: on the meta device, or while costs are counted."""
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def widened(weight: Tensor) -> Tensor:
    """Return the weight in float32 or wider: a small change added to a bfloat16 weight would be rounded away."""
    weight = dequantised(weight) if is_quantised(weight) else weight
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def _conv_geometry(layer: nn.Module, weight: Tensor) -> Geometry | None:
    kernel = tuple(weight.shape[2:])
    if isinstance(layer, _TRANSPOSED):
        return Geometry(
            "conv_transpose", layer.out_channels, layer.in_channels // layer.groups, layer.groups, kernel, known=False
        )
    for base, dims in _CONVS.items():
        if isinstance(layer, base):
            own = _own(layer)
            known = own.forward is base.forward and own._conv_forward is base._conv_forward  # type: ignore[attr-defined]
            assert len(kernel) == dims
            standardised = own.__module__ == "timm.layers.std_conv"
            out, in_ = weight.shape[:2]
            return Geometry("conv", out, in_, layer.groups, kernel, known, standardised)  # type: ignore[arg-type]
    return None


def _own(layer: nn.Module) -> type[nn.Module]:
    """Return the class a layer had before it was adapted, whose forward tells what kind it is."""
    return next(c for c in type(layer).__mro__ if c.__module__ != "visionlora.core.attach")


def _is_hf_conv1d(layer: nn.Module) -> bool:
    # transformers' Conv1D is a Linear whose weight is stored (in, out); known by name: transformers stays optional
    return any((c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D") for c in type(layer).__mro__)
