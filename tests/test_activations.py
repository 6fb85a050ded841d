"""What adapters keep for the backward pass: no more than LoRA, whatever the variant, the layer and the dropout."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from kept import kept_bytes
from layer_kinds import CASES, LAYERS, RANKS, config_of, seat
from torch import nn

import visionlora as vl

MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 2}, 64),
    "resnet10t": ({}, 64),
    "resnext26ts": ({}, 64),  # grouped
    "test_nfnet": ({}, 64),  # standardised weights
    "test_efficientnet": ({"pad_type": "same"}, 64),  # Conv2dSame
    "eva02_tiny_patch14_224": ({"img_size": 56, "depth": 2}, 56),  # its attention reads the weight
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_dora_keeps_what_lora_keeps(name: str, dropout: float) -> None:
    small, size = MODELS[name]
    kept = {}
    for variant in ("lora", "dora"):
        model = timm.create_model(name, num_classes=5, **small).train()
        vl.apply_lora(model, vl.LoraConfig(r=8, variant=variant, lora_dropout=dropout))  # type: ignore[arg-type]
        kept[variant] = kept_bytes(model, torch.randn(2, 3, size, size))
    assert kept["dora"] <= 1.2 * kept["lora"]


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_dropout_keeps_no_activation(variant: str, kind: str) -> None:
    shape, kept = (32, *LAYERS[kind].shape[1:]), []
    for dropout in (0.0, 0.5):
        model = nn.Sequential(LAYERS[kind].make())
        vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind], lora_dropout=dropout))
        x = torch.randint(1, 20, shape) if LAYERS[kind].tokens else torch.randn(shape, requires_grad=True)
        kept.append(kept_bytes(model.train(), x))
    delta = seat(model)[2]
    numbers = sum(t.numel() for t in (*delta.parameters(), *delta.buffers()))
    # in float32: thinned factors and what dropout left of each part; an attention reads its weight up to three times
    assert kept[1] - kept[0] <= 4 * 4 * numbers
