"""What a training step costs, as tables."""

from __future__ import annotations

import argparse
from typing import Any

from torch import nn

from visionlora.analysis import ModelCost, Setting, Speed, calibrated, model_cost
from visionlora.analysis.layer import LayerCost
from visionlora.config import LoraConfig
from visionlora.errors import ConfigError
from visionlora.overview import table
from visionlora.vision.backbone import data_config

MIB = 2**20


def setting_of(options: argparse.Namespace, net: nn.Module) -> Setting:
    """Return the training step that the flags mean on a backbone."""
    channels, *own = data_config(net)["input_size"]
    height, width = own if options.size is None else (options.size, options.size)
    return Setting(options.batch, channels, height, width, options.device, options.dtype, options.order)


def told(title: str, net: nn.Module, config: LoraConfig, options: argparse.Namespace) -> str:
    """Return what a training step of a backbone with an adapter costs, layer by layer and in sum."""
    cost = counted(net, setting_of(options, net), config)
    speed = speed_of(options) if options.time else None
    s = cost.setting
    step = f"a step of {s.batch} images, {s.height} x {s.width}, {s.dtype}, orders as on {s.device}"
    head = ("layer", "what", "order", "GFLOP", "over floor", "MiB moved", "MiB kept")
    rows = [_row(layer) for layer in cost.layers]
    return "\n".join([f"{title}: {step}", "", *table(head, rows, right=(3, 4, 5, 6)), "", *totals(cost, speed)])


def counted(net: nn.Module, setting: Setting, config: LoraConfig, **more: Any) -> ModelCost:
    """Return the costs of a step. Raises ConfigError where the backbone takes no images of that size."""
    try:
        return model_cost(net, setting, config=config, **more)
    except (AssertionError, RuntimeError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ConfigError(
            f"{type(net).__name__} does not take {setting.height} x {setting.width} images: {reason}; "
            "--size sets the pixels a side"
        ) from None


def speed_of(options: argparse.Namespace) -> Speed:
    """Return the rates of this machine."""
    return calibrated(options.device)


def totals(cost: ModelCost, speed: Speed | None) -> list[str]:
    """Return the sums, a line each."""
    extra, floor, work = cost.extra, cost.floor, cost.work
    over = f" ({extra.flops / floor.flops:.1%} over their floor)" if floor.flops else ""
    lines = {
        "adapters add": f"{_giga(extra.flops)} GFLOP{over}, {extra.moved / MIB:,.0f} MiB moved, "
        f"{extra.saved / MIB:,.1f} MiB kept",
        "whole step": f"{_giga(work.flops)} GFLOP, {work.moved_bytes / MIB:,.0f} MiB moved by {work.operations:,} "
        f"operations, {cost.saved / MIB:,.1f} MiB kept for the backward pass",
        "memory": f"{cost.memory / MIB:,.0f} MiB: weights {cost.weights / MIB:,.0f}, AdamW "
        f"{8 * cost.trained / MIB:,.1f}, peak of activations and gradients {work.peak_bytes / MIB:,.0f}",
        "norms folded": f"{cost.folded} into the convolution before them",
    }
    if speed is not None:
        lines["estimated"] = f"{cost.milliseconds(speed):,.0f} ms, adapters {cost.extra_milliseconds(speed):,.0f} ms"
    if cost.uncounted:
        lines["not by layer"] = (
            f"{', '.join(cost.uncounted[:3])}{' ...' if cost.uncounted[3:] else ''}: read, not called"
        )
    width = max(map(len, lines))
    return [f"{name:<{width}}  {text}" for name, text in lines.items()]


def _row(layer: LayerCost) -> tuple[str, ...]:
    extra, floor = layer.extra, layer.floor
    return (
        layer.name,
        layer.what,
        layer.way,
        _giga(floor.flops + extra.flops),
        f"{extra.flops / floor.flops:.1%}",
        f"{(floor.moved + extra.moved) / MIB:,.1f}",
        f"{extra.saved / MIB:,.2f}",
    )


def _giga(flops: int) -> str:
    return f"{flops / 1e9:,.2f}" if flops >= 1e7 else f"{flops / 1e9:.4f}"
