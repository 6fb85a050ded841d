"""From a config and a model to the layers that change."""

from __future__ import annotations

from visionlora.targets.heads import head_layers
from visionlora.targets.inert import Cure, cure, owner_reads_weight
from visionlora.targets.select import Site, select

__all__ = ["Cure", "Site", "cure", "head_layers", "owner_reads_weight", "select"]
