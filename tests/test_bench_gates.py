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
        "peft": (0.50, 0.80, 1.04, 1.01, 2.05),
        "full": (0.46, 0.38, 1.38, 0.73, 4.40),
        "floor": (0.51, 0.80, 1.68, 1.11, 4.45),
    },
    "vit_small_patch16_224": {
        "peft": (1.01, 1.01, 0.91, 1.01, 1.05),
        "full": (1.01, 0.46, 1.18, 0.71, 2.05),
        "floor": (1.63, 1.56, 1.61, 1.06, 2.80),
    },
    "convnext_tiny": {
        "peft": (1.01, 1.01, 0.91, 1.01, 1.08),
        "full": (0.91, 0.44, 1.16, 0.71, 1.80),
        "floor": (1.85, 1.64, 1.66, 1.08, 2.55),
    },
    "efficientnet_b0": {
        "peft": (0.72, 0.75, 0.92, 1.01, 1.75),
        "full": (0.65, 0.62, 1.08, 0.82, 2.45),
        "floor": (0.75, 0.78, 1.27, 1.23, 2.55),
    },
    "mobilenetv3_large_100": {
        "peft": (0.64, 0.70, 0.91, 1.01, 1.85),
        "full": (0.61, 0.51, 1.12, 0.85, 2.85),
        "floor": (0.67, 0.74, 1.32, 1.28, 2.90),
    },
    "swin_tiny_patch4_window7_224": {
        "peft": (1.01, 1.01, 0.93, 1.01, 1.05),
        "full": (0.99, 0.41, 1.13, 0.73, 1.55),
        "floor": (1.71, 1.64, 1.47, 1.08, 1.95),
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
