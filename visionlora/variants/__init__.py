"""Factorizations of a weight change, one a file, and the dict from their names to their classes."""

from __future__ import annotations

from visionlora.variants.dora import DoRA
from visionlora.variants.fa import FA
from visionlora.variants.ia3 import IA3
from visionlora.variants.loha import LoHa
from visionlora.variants.lokr import LoKr
from visionlora.variants.lora import LoRA
from visionlora.variants.low_rank import LowRank
from visionlora.variants.spatial import Spatial
from visionlora.variants.tucker import Tucker
from visionlora.variants.up import Up
from visionlora.variants.variant import Variant
from visionlora.variants.vera import VeRA

VARIANTS: dict[str, type[Variant]] = {
    "lora": LoRA,
    "dora": DoRA,
    "fa": FA,
    "loha": LoHa,
    "lokr": LoKr,
    "tucker": Tucker,
    "up": Up,
    "spatial": Spatial,
    "vera": VeRA,
    "ia3": IA3,
}

__all__ = ["VARIANTS", "LowRank", "Variant"]
