"""The layer kinds of the matrix tests, and how a variant is put on one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import visionlora as vl
from visionlora.core.attach import Adapted, Branched, Materialised
from visionlora.core.delta import Delta
from visionlora.errors import TargetError
from visionlora.registry import adapted_layers, adapter_plan
from visionlora.targets import select
from visionlora.variants import VARIANTS

IMAGE = (2, 8, 9, 7)  # odd sizes on purpose


class Unknown(nn.Linear):
    """A Linear subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class HalfPadded(nn.Conv2d):
    """A Conv2d subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(x, (1, 0, 1, 0)), self.weight, self.bias)


class SelfAttention(nn.Module):
    """Attention of x to itself, its three projections fused in a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]


class Positioned(nn.Module):
    """A module that reads a bare parameter: a position embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.pos = nn.Parameter(torch.randn(1, 9, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x + self.pos)


def conv(out: int = 12, kernel: int | tuple[int, int] = 3, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(8, out, kernel, **kwargs)  # type: ignore[arg-type]


def up_conv(out: int = 12, **kwargs: object) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(8, out, 3, stride=2, **kwargs)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Kind:
    """A layer, the shape of its input, the way an adapter takes, and what the config names."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    way: type[Adapted] = Branched
    target: str = "0"
    tokens: bool = False
    """The input is indices into a table."""


LAYERS: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(8, 12), (2, 5, 8)),
    "linear_no_bias": Kind(lambda: nn.Linear(8, 12, bias=False), (3, 8)),
    "linear_subclass": Kind(lambda: Unknown(8, 12), (3, 8), Materialised),
    "conv1d_of_transformers": Kind(lambda: Conv1D(12, 8), (2, 5, 8)),
    "embedding": Kind(lambda: nn.Embedding(20, 8, padding_idx=0), (2, 5), tokens=True),
    "conv_1x1": Kind(lambda: conv(kernel=1), IMAGE),
    "conv_3x3": Kind(lambda: conv(padding=1), IMAGE),
    "conv_stride": Kind(lambda: conv(stride=2, padding=1), IMAGE),
    "conv_1x7": Kind(lambda: conv(kernel=(1, 7), padding=(0, 3)), IMAGE),
    "conv_7x7_stem": Kind(lambda: conv(kernel=7, stride=2, padding=3, bias=False), IMAGE),
    "conv_dilated": Kind(lambda: conv(dilation=2, padding=2), IMAGE),
    "conv_dilated_same": Kind(lambda: conv(dilation=2, padding="same"), IMAGE),
    "conv_valid": Kind(lambda: conv(padding="valid"), IMAGE),
    "conv_reflect": Kind(lambda: conv(padding=1, padding_mode="reflect"), IMAGE),
    "conv_circular": Kind(lambda: conv(padding=2, padding_mode="circular", dilation=2), IMAGE),
    "conv_replicate": Kind(lambda: conv(padding=1, padding_mode="replicate", stride=2), IMAGE),
    "conv_grouped": Kind(lambda: conv(out=16, padding=1, groups=2), IMAGE),
    "conv_grouped_dilated": Kind(lambda: conv(out=16, padding=2, dilation=2, groups=4), IMAGE),
    "conv_32_groups": Kind(lambda: nn.Conv2d(64, 128, 3, padding=1, groups=32), (1, 64, 5, 3)),
    "conv_depthwise": Kind(lambda: conv(out=8, padding=1, groups=8), IMAGE),
    "conv_channel_multiplier": Kind(lambda: conv(out=24, kernel=5, padding=2, groups=8), IMAGE),
    "conv_subclass": Kind(lambda: HalfPadded(8, 12, 3), IMAGE, Materialised),
    "conv2d_same": Kind(lambda: Conv2dSame(8, 12, 3, stride=2), IMAGE, Materialised),
    "std_conv2d": Kind(lambda: StdConv2d(8, 12, 3, padding=1), IMAGE, Materialised),
    "std_conv2d_same": Kind(lambda: StdConv2dSame(8, 12, 3, stride=2), IMAGE, Materialised),
    "scaled_std_conv2d": Kind(lambda: ScaledStdConv2d(8, 12, 3, padding=1), IMAGE, Materialised),
    "scaled_std_conv2d_same": Kind(lambda: ScaledStdConv2dSame(8, 12, 3, stride=2), IMAGE, Materialised),
    "conv1d": Kind(lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9)),
    "conv3d": Kind(lambda: nn.Conv3d(8, 12, 3, padding=1), (2, 8, 4, 5, 3)),
    "conv_transpose": Kind(up_conv, IMAGE, Materialised),
    "conv_transpose_grouped": Kind(lambda: up_conv(out=16, groups=4, padding=1), IMAGE, Materialised),
    "conv_transpose_output_padding": Kind(lambda: up_conv(output_padding=1, bias=False), IMAGE, Materialised),
    "attention_in": Kind(SelfAttention, (2, 5, 8), Materialised, "0.mha.in_proj_weight"),
    "attention_in_parts": Kind(SelfAttention, (2, 5, 8), Materialised, "0.mha.in_proj_weight[q,v]"),
    "attention_out": Kind(SelfAttention, (2, 5, 8), Materialised, "0.mha.out_proj"),
    "bare_parameter": Kind(Positioned, (2, 9, 8), Materialised, "0.pos"),
}


def rank_of(model: nn.Module, variant: str, kind: str) -> int:
    """Return 2, or the largest rank that is a saving on this layer; 0 where the variant has none."""
    try:
        select(model, config_of(variant, kind, r=1))
        select(model, config_of(variant, kind, r=2))
    except TargetError as e:
        return 1 if "set rank_pattern" in str(e) else 0
    return 2


def config_of(variant: str, kind: str, **config: object) -> vl.LoraConfig:
    """Return a config that changes the one tensor of the kind and nothing else."""
    named = {"target_modules": [LAYERS[kind].target], "modules_to_save": "none", "bias": "none", **config}
    return vl.LoraConfig(variant=variant, **named)  # type: ignore[arg-type]


_MODELS = {kind: nn.Sequential(row.make()) for kind, row in LAYERS.items()}
RANKS = {(v, k): rank for v in VARIANTS for k, model in _MODELS.items() if (rank := rank_of(model, v, k))}
CASES = list(RANKS)


def build(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    row = LAYERS[kind]
    x = torch.randint(1, 20, row.shape) if row.tokens else torch.randn(row.shape, dtype=dtype)
    return nn.Sequential(row.make()).to(dtype).eval(), x


def adapted(
    variant: str, kind: str, dtype: torch.dtype = torch.float64, **config: object
) -> tuple[nn.Sequential, Tensor]:
    model, x = build(kind, dtype)
    config = {"r": RANKS[variant, kind], "lora_alpha": 4, **config}
    vl.apply_lora(model, config_of(variant, kind, **config))
    return model, x


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def seat(model: nn.Module) -> tuple[str, Adapted, Delta]:
    """Return the path of the tensor that changes, the layer that owns it and its change."""
    (site,) = adapter_plan(model, "default").sites
    layer = adapted_layers(model)[site.layer]
    return f"{site.layer}.{site.attribute}", layer, layer.adapters["default"][site.attribute]  # type: ignore[index]


def stir(model: nn.Module, name: str = "default") -> None:
    """Give an adapter numbers that matter."""
    with torch.no_grad():
        for group in vl.adapter_parameters(model, name).values():
            for parameter in group.values():
                parameter += 0.3 * torch.randn_like(parameter)
