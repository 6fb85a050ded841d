"""What adapters keep for the backward pass: no more than LoRA, whatever the variant, the layer and the dropout."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from kept import kept_bytes
from layer_kinds import CASES, LAYERS, RANKS, config_of, seat
from torch import nn
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from visionlora.analysis.work import work

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


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_blocks_computed_again_hold_no_activation(variant: str) -> None:
    # nodes that held inputs beside what autograd saved kept 18 of them through checkpointed blocks, plain ones 16
    blocks = [nn.Sequential(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))) for _ in range(4)]
    net = vl.apply_lora(nn.Sequential(nn.Conv2d(3, 16, 1), *blocks), vl.LoraConfig(r=2, variant=variant))  # type: ignore[arg-type]
    x = torch.randn(4, 3, 32, 32)

    def forward() -> torch.Tensor:
        h = net[0](x)
        for block in net[1:]:  # type: ignore[index]
            h = checkpoint(block, h, use_reentrant=False)
        return h.mean()

    forward().backward()
    net.zero_grad(set_to_none=True)
    assert work(forward).peak_bytes < 12 * 4 * 16 * 32**2 * 4
