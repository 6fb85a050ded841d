"""What an adapter costs before it is trained: arithmetic, memory traffic, kept activations, and plans that fit."""

from __future__ import annotations

from visionlora.analysis.budget import Budget, Proposal, plan
from visionlora.analysis.cost import Cost, Step, Way, extra_steps, floor_steps, kept
from visionlora.analysis.layer import LayerCost, Setting
from visionlora.analysis.model import ModelCost, model_cost
from visionlora.analysis.sizes import Sizes
from visionlora.analysis.speed import Speed, calibrated

__all__ = [
    "Budget",
    "Cost",
    "LayerCost",
    "ModelCost",
    "Proposal",
    "Setting",
    "Sizes",
    "Speed",
    "Step",
    "Way",
    "calibrated",
    "extra_steps",
    "floor_steps",
    "kept",
    "model_cost",
    "plan",
]
