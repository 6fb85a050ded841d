"""From a config and a model to the layers that change."""

from __future__ import annotations

from visionlora.targets.heads import head_layers
from visionlora.targets.inert import owner_reads_weight
from visionlora.targets.select import Site, layers_and_projections, select

__all__ = ["Site", "head_layers", "layers_and_projections", "owner_reads_weight", "select"]
