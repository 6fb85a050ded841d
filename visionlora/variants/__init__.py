"""Factorizations of a weight change, one a file, and the dict from their names to their classes."""

from __future__ import annotations

from visionlora.variants.dora import DoRA
from visionlora.variants.fa import FA
from visionlora.variants.lora import LoRA
from visionlora.variants.low_rank import LowRank

VARIANTS: dict[str, type[LowRank]] = {"lora": LoRA, "dora": DoRA, "fa": FA}

__all__ = ["VARIANTS", "LowRank"]
