"""Backbones with real weights that timm has no name for, built from a folder of weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import nn

TF_INPUT: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "crop_pct": 1.0}


def mobilenet_v1(weights: Path) -> nn.Module:
    """Return MobileNetV1 x 0.25 with ImageNet weights; its strided layers are Conv2dSame."""
    net = _gen_mobilenet_v1("mobilenetv1_100", channel_multiplier=0.25, pad_type="same")
    net.load_state_dict(load_file(weights / "mobilenetv1_025_imagenet" / "model.safetensors"))
    return net


def mobilenet_v2(weights: Path) -> nn.Module:
    """Return MobileNetV2 with ImageNet weights; its strided layers are Conv2dSame."""
    net = timm.create_model("mobilenetv2_100", pad_type="same")
    net.load_state_dict(load_file(weights / "mobilenetv2_imagenet" / "model.safetensors"))
    return net


def vit_mnist(weights: Path) -> nn.Module:
    """Return a small ViT trained on MNIST; its head is an MLP."""
    net = timm.models.VisionTransformer(
        img_size=28, patch_size=7, in_chans=1, num_classes=10, embed_dim=64, depth=6, num_heads=8, mlp_ratio=2.0,
        qkv_bias=False, final_norm=False,
    )  # fmt: skip
    net.head = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 10))
    net.load_state_dict(load_file(weights / "vit_mnist" / "model.safetensors"))
    return net


def with_classes(net: nn.Module, classes: int) -> nn.Module:
    """Change the model in place: give it a head for so many classes that starts at zero."""
    net.reset_classifier(classes)
    with torch.no_grad():
        for parameter in net.get_classifier().parameters():
            parameter.zero_()
    return net
