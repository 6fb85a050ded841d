"""What a training step may cost: figures that no clock and no neighbour can change, over those of the others.

Every bound is the largest ratio of ours that is accepted, on 2 small images. Timings are reported by `visionlora bench`
and never asserted; bytes moved are what foretells them.
"""

from __future__ import annotations

from functools import cache

import pytest

from visionlora.bench.measure import Result, measure
from visionlora.bench.settings import Settings

SIZES = {
    "resnet50": 128,
    "vit_small_patch16_224": 128,
    "convnext_tiny": 128,
    "efficientnet_b0": 128,
    "mobilenetv3_large_100": 128,
    "swin_tiny_patch4_window7_224": 112,
}
FIGURES = ("saved_bytes", "peak_bytes", "moved_bytes", "flops", "operations")
BOUNDS: dict[str, dict[str, tuple[float, float, float, float, float]]] = {
    "resnet50": {
        "peft": (0.47, 0.78, 1.06, 1.00, 2.12),
        "full": (0.44, 0.38, 1.40, 0.72, 4.54),
        "floor": (0.49, 0.80, 1.71, 1.09, 4.60),
    },
    "vit_small_patch16_224": {
        "peft": (0.65, 0.69, 0.84, 1.02, 1.35),
        "full": (0.65, 0.31, 1.10, 0.71, 2.68),
        "floor": (1.03, 1.05, 1.50, 1.06, 3.65),
    },
    "convnext_tiny": {
        "peft": (0.50, 0.61, 0.81, 1.01, 1.42),
        "full": (0.45, 0.26, 1.03, 0.70, 2.39),
        "floor": (0.91, 0.98, 1.48, 1.07, 3.37),
    },
    "efficientnet_b0": {
        "peft": (0.43, 0.52, 0.82, 1.00, 1.85),
        "full": (0.39, 0.42, 0.97, 0.80, 2.60),
        "floor": (0.45, 0.54, 1.14, 1.21, 2.68),
    },
    "mobilenetv3_large_100": {
        "peft": (0.45, 0.57, 0.74, 0.99, 1.91),
        "full": (0.43, 0.42, 0.91, 0.82, 2.98),
        "floor": (0.48, 0.60, 1.07, 1.24, 3.04),
    },
    "swin_tiny_patch4_window7_224": {
        "peft": (0.73, 0.76, 0.83, 1.01, 1.23),
        "full": (0.70, 0.30, 1.01, 0.72, 1.83),
        "floor": (1.21, 1.22, 1.32, 1.07, 2.31),
    },
}


@cache
def measured(name: str) -> Result:
    settings = Settings(batch=2, size=SIZES[name], variants=("floor", "full", "ours", "peft"))
    return measure(name, settings, timed=False)


@pytest.mark.parametrize("other", ["floor", "full", "peft"])
@pytest.mark.parametrize("name", list(SIZES))
def test_a_step_costs_no_more_than(name: str, other: str) -> None:
    result = measured(name)
    if other == "peft" and "peft" in result.skipped:
        pytest.skip(f"peft: {result.skipped['peft']}")
    mine, theirs = result.counts["ours"], result.counts[other]
    ratios = {figure: getattr(mine, figure) / getattr(theirs, figure) for figure in FIGURES}
    bounds = dict(zip(FIGURES, BOUNDS[name][other], strict=True))
    over = {figure: (round(ratios[figure], 3), bounds[figure]) for figure in FIGURES if ratios[figure] > bounds[figure]}
    assert not over, f"ours over {other} on {name}, (found, bound): {over}"


@pytest.mark.parametrize("name", list(SIZES))
def test_peft_trains_as_many_numbers(name: str) -> None:
    result = measured(name)
    if "peft" in result.skipped:
        pytest.skip(f"peft: {result.skipped['peft']}")
    assert result.counts["ours"].trainable == result.counts["peft"].trainable
