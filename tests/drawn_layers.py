"""Layers of drawn sizes, and adapters that fit them."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from math import prod, sqrt

import torch
from hypothesis import strategies as st
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import visionlora as vl
from visionlora.core.geometry import geometry_of
from visionlora.variants import VARIANTS

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
TIMM = (Conv2dSame, StdConv2d, ScaledStdConv2d)
STARTS = ("default", "gaussian", "orthogonal")
SPLITS = ("pissa", "olora", "soma")


@dataclass(frozen=True)
class Layer:
    """A layer, its input, and what a slow truth must know of its weight."""

    module: nn.Module
    x: Tensor = field(repr=False)
    out: int
    in_: int
    """Inputs of one group."""
    groups: int = 1
    kernel: tuple[int, ...] = ()

    def model(self) -> nn.Sequential:
        """Return a model of the layer alone, which shares nothing with other calls."""
        return nn.Sequential(copy.deepcopy(self.module)).eval()

    def canonical(self, weight: Tensor) -> Tensor:
        """Return the layer's weight as (out, in, *kernel)."""
        if isinstance(self.module, TRANSPOSED):
            return torch.cat([rows.transpose(0, 1) for rows in weight.split(self.in_)])
        return weight.t() if isinstance(self.module, (Conv1D, nn.Embedding)) else weight

    def stored(self, weight: Tensor) -> Tensor:
        """Return (out, in, *kernel) as the layer has it."""
        if isinstance(self.module, TRANSPOSED):
            return torch.cat([rows.transpose(0, 1) for rows in weight.split(self.out // self.groups)])
        return weight.t() if isinstance(self.module, (Conv1D, nn.Embedding)) else weight


@dataclass(frozen=True)
class Adapter:
    """One adapter of a layer."""

    config: vl.LoraConfig
    strength: float

    @property
    def scale(self) -> float:
        c = self.config
        return c.lora_alpha / (sqrt(c.r) if c.use_rslora else c.r)


@dataclass(frozen=True)
class Case:
    """A layer and the adapters it shall carry."""

    layer: Layer
    adapters: tuple[Adapter, ...]


def sizes(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


def axes(dims: int, low: int, high: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Return what draws a number for each axis of an image."""
    return st.tuples(*[sizes(low, high)] * dims)


@st.composite
def linears(draw: st.DrawFn) -> Layer:
    out, in_ = draw(sizes(1, 9)), draw(sizes(1, 9))
    shape = draw(st.lists(sizes(0, 3), max_size=3))
    kind = draw(st.sampled_from(["linear", "conv1d_of_transformers", "embedding"]))
    if kind == "embedding":
        # no padding_idx: torch keeps a dense weight's padding row from all gradients, a branch keeps it from A's alone
        return Layer(nn.Embedding(in_, out).double(), torch.randint(in_, shape), out, in_)
    module = Conv1D(out, in_) if kind != "linear" else nn.Linear(in_, out, bias=draw(st.booleans()))
    return Layer(module.double(), torch.randn(*shape, in_).double(), out, in_)


@st.composite
def convolutions(draw: st.DrawFn) -> Layer:
    kind = draw(st.sampled_from(CONVS + TRANSPOSED + TIMM))
    dims = 2 if kind in TIMM else 1 + (CONVS + TRANSPOSED).index(kind) % 3
    groups, out, in_, kernel = draw(sizes(1, 4)), draw(sizes(1, 5)), draw(sizes(1, 5)), draw(axes(dims, 1, 6 - dims))
    if kind in TIMM and in_ * prod(kernel) == 1:
        in_ = 2  # a row of one number has no spread to be divided by: the layer itself refuses
    stride, dilation = draw(axes(dims, 1, 3)), draw(axes(dims, 1, 2))
    padding, image = draw(
        _transposed(kernel, stride, dilation) if kind in TRANSPOSED else _padded(kind, kernel, dilation)
    )
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans()), **padding}
    module = kind(groups * in_, groups * out, kernel, **options).double()
    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,)]))
    image = [low + draw(sizes(0, 4)) for low in image]
    return Layer(module, torch.randn(*batch, groups * in_, *image).double(), groups * out, in_, groups, kernel)


Padding = tuple[dict[str, object], list[int]]
"""Options of a convolution, and the smallest image that they and its kernel have a meaning for."""


@st.composite
def _padded(draw: st.DrawFn, kind: type[nn.Module], kernel: tuple[int, ...], dilation: tuple[int, ...]) -> Padding:
    if kind is Conv2dSame:
        return {}, [1] * len(kernel)
    span = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    options: dict[str, object] = {"padding": draw(axes(len(kernel), 0, 3))}
    if kind in CONVS:
        options["padding"] = draw(st.sampled_from([options["padding"], "same", "valid"]))
        options["padding_mode"] = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if options["padding"] == "same":
        options["stride"] = 1
    sides = {"same": [s // 2 for s in span], "valid": [0] * len(span)}.get(options["padding"], options["padding"])
    # reflection and repetition need an image larger than what they add
    return options, [max(1, s - 2 * p, p + 1) for s, p in zip(span, sides, strict=True)]


@st.composite
def _transposed(
    draw: st.DrawFn, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Padding:
    extra = tuple(draw(sizes(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    cut = tuple(draw(sizes(0, (d * (k - 1) + e) // 2)) for k, d, e in zip(kernel, dilation, extra, strict=True))
    return {"padding": cut, "output_padding": extra}, [1] * len(kernel)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    torch.manual_seed(draw(sizes(0, 1 << 16)))
    return draw(st.one_of(convolutions(), linears()))


def largest_rank(variant: str, layer: Layer, **config: object) -> int:
    geometry = geometry_of(layer.module)
    assert geometry is not None
    return VARIANTS[variant].largest_rank(geometry, vl.LoraConfig(variant=variant, **config))  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn, variant: str) -> Case:
    """Draw a layer that a variant fits, with it and up to two more adapters of any fitting variants."""
    layer = draw(layers().filter(lambda layer: largest_rank(variant, layer)))
    fitting = [v for v in VARIANTS if largest_rank(v, layer)]
    variants = [variant, *draw(st.lists(st.sampled_from(fitting), max_size=2))]
    return Case(layer, tuple(draw(adapters(v, layer)) for v in variants))


@st.composite
def adapters(draw: st.DrawFn, variant: str, layer: Layer) -> Adapter:
    factors = [f for f in (-1, 2, 3) if variant == "lokr" and largest_rank(variant, layer, decompose_factor=f)]
    factor = draw(st.sampled_from(factors or [-1]))
    config = vl.LoraConfig(
        r=draw(sizes(1, min(largest_rank(variant, layer, decompose_factor=factor), 6))),
        lora_alpha=draw(st.sampled_from([0.5, 1.0, 3.0, 16.0])),
        lora_dropout=draw(st.sampled_from([0.0, 0.5])),  # of training mode, which is not drawn
        target_modules=["0"],
        modules_to_save="none",
        variant=variant,  # type: ignore[arg-type]
        use_rslora=draw(st.booleans()),
        decompose_factor=factor,
        init_lora_weights=draw(st.sampled_from((*STARTS, *(SPLITS if variant == "lora" else ())))),
    )
    return Adapter(config, draw(st.sampled_from([1.0, 1.0, 0.0, 0.25, 1.7])))
