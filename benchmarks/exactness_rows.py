"""The layer kinds of the tables; most are those of the matrix tests."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exactness_libraries import Spot

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from layer_kinds import IMAGE, LAYERS, Kind, conv


@dataclass(frozen=True)
class Row:
    kind: Kind
    spot: Spot


def layer(kind: Kind) -> Row:
    return Row(kind, Spot(["0"], ["0"], ["0.weight"]))


def picture(**options: Any) -> Row:
    return layer(Kind(lambda: conv(padding=1, **options), IMAGE))


def attention(modules: list[str], *names: str) -> Row:
    tensors = [name if name.endswith("weight") else f"{name}.weight" for name in names]
    return Row(LAYERS["attention_in"], Spot(list(names), modules, tensors))


ROWS: dict[str, Row] = {
    "Linear": layer(LAYERS["linear"]),
    "Linear, no bias": layer(LAYERS["linear_no_bias"]),
    "Linear subclass, own forward": layer(LAYERS["linear_subclass"]),
    "Conv1D of transformers": layer(LAYERS["conv1d_of_transformers"]),
    "Embedding": layer(LAYERS["embedding"]),
    "Conv1d": layer(LAYERS["conv1d"]),
    "Conv2d 1x1": layer(LAYERS["conv_1x1"]),
    "Conv2d 3x3": layer(LAYERS["conv_3x3"]),
    "Conv2d stride 2": layer(LAYERS["conv_stride"]),
    "Conv2d 1x7": layer(LAYERS["conv_1x7"]),
    "Conv2d 7x7 stem": layer(LAYERS["conv_7x7_stem"]),
    "Conv2d dilation 2": layer(LAYERS["conv_dilated"]),
    'Conv2d dilation 2, padding="same"': layer(LAYERS["conv_dilated_same"]),
    "Conv2d reflect": picture(padding_mode="reflect"),
    "Conv2d circular": picture(padding_mode="circular"),
    "Conv2d replicate": picture(padding_mode="replicate"),
    "Conv2d circular, dilation 2": layer(LAYERS["conv_circular"]),
    "Conv2d 4 groups": picture(out=16, groups=4),
    "Conv2d 32 groups": layer(LAYERS["conv_32_groups"]),
    "Conv2d depthwise": layer(LAYERS["conv_depthwise"]),
    "Conv2d channel multiplier 3": layer(LAYERS["conv_channel_multiplier"]),
    "Conv2d subclass, own forward": layer(LAYERS["conv_subclass"]),
    "Conv3d": layer(LAYERS["conv3d"]),
    "ConvTranspose2d": layer(LAYERS["conv_transpose"]),
    "ConvTranspose2d 4 groups": layer(LAYERS["conv_transpose_grouped"]),
    "ConvTranspose2d output_padding": layer(LAYERS["conv_transpose_output_padding"]),
    "timm Conv2dSame": layer(LAYERS["conv2d_same"]),
    "timm StdConv2d": layer(LAYERS["std_conv2d"]),
    "timm ScaledStdConv2d": layer(LAYERS["scaled_std_conv2d"]),
    "MultiheadAttention, both": attention(["0.mha"], "0.mha.in_proj_weight", "0.mha.out_proj"),
    "MultiheadAttention in_proj": attention([], "0.mha.in_proj_weight"),
    "MultiheadAttention out_proj": attention(["0.mha.out_proj"], "0.mha.out_proj"),
    "bare nn.Parameter": Row(LAYERS["bare_parameter"], Spot(["0.pos"], [], ["0.pos"])),
}
