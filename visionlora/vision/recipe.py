"""What fits the size of a network where nothing else is asked for: the adapter of a small CNN, learning rates."""

from __future__ import annotations

import logging
from typing import Literal

from torch import nn

from visionlora.config import LoraConfig
from visionlora.core.attach import own_modules
from visionlora.core.geometry import geometry_of
from visionlora.core.norms import batch_norms
from visionlora.targets import head_layers

log = logging.getLogger(__name__)

Recipe = Literal["auto", "none"]
SMALL = 1_000_000
"""Weights below which a network has too few for what LoRA leaves alone not to matter."""


RATES: dict[str, float] = {"lora": 1e-3, "linear": 3e-3, "norm": 3e-3, "full": 1e-4}
"""Learning rates of AdamW by mode. With MobileNetV2 an adapter at 3e-3 ends 4 points lower (docs/results.md)."""
RATES_OF_SMALL: dict[str, float] = {"lora": 3e-3, "linear": 1e-2, "norm": 1e-2, "full": 1e-3}
"""The same for networks with fewer than SMALL weights."""


def rates_of(net: nn.Module) -> dict[str, float]:
    """Return the learning rates that fit the size of a network without adapters; the head does not count."""
    return RATES_OF_SMALL if _weights(net) < SMALL else RATES


def suited(lora: LoraConfig, net: nn.Module) -> LoraConfig:
    """Return the adapter, or in place of LoRA's defaults, on a CNN with fewer than a million weights, a larger one.

    That one is r 32, scale and shift of the norms, and the depthwise kernels in full: with MobileNetV1 x 0.25 it comes
    within a point of full fine-tuning where the defaults stay 2 behind (docs/results.md). The head does not count.
    """
    if lora != LoraConfig() or not batch_norms(net) or _weights(net) >= SMALL:
        return lora
    depthwise = [name for name, layer in own_modules(net).items() if (geo := geometry_of(layer)) and geo.depthwise]
    log.info(
        "a small CNN: r 32, lora_alpha 64, norm affine%s (recipe none: LoRA's own defaults)",
        f" and {len(depthwise)} depthwise kernels in full" if depthwise else "",
    )
    return LoraConfig(r=32, lora_alpha=64.0, norm="affine", modules_to_save=depthwise or "auto")


def _weights(net: nn.Module) -> int:
    heads = {p for name in head_layers(net) for p in net.get_submodule(name).parameters()}
    return sum(p.numel() for p in net.parameters() if p not in heads)
