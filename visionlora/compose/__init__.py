"""Arithmetic of adapters: several made into one, one at several strengths."""

from __future__ import annotations

from visionlora.compose.adapters import combine
from visionlora.compose.report import Combination
from visionlora.compose.strengths import Sweep, sweep

__all__ = ["Combination", "Sweep", "combine", "sweep"]
