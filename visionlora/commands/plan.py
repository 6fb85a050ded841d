"""`visionlora plan`: from a budget to an adapter, as a table and as settings for `visionlora fit`."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from dataclasses import replace
from typing import Any

from visionlora.analysis import Budget, Proposal, plan
from visionlora.commands.cost import MIB, setting_of, totals
from visionlora.commands.info import lora_config
from visionlora.config import LoraConfig
from visionlora.errors import ConfigError
from visionlora.overview import table
from visionlora.vision.backbone import create_backbone
from visionlora.vision.settings import LEAN

_COUNTS = {"": 1, "k": 1000, "m": 1000**2}
_BYTES = {"b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Print the largest adapter on a backbone that fits a budget."""
    budget = Budget(
        None if options.parameters is None else int(_number("parameters", options.parameters, _COUNTS)),
        None if options.memory is None else int(_number("memory", options.memory, _BYTES)),
        options.milliseconds,
    )
    net = create_backbone(options.model, pretrained=False, num_classes=options.num_classes)
    setting = setting_of(options, net)
    print(f"counting steps of {options.model}", file=sys.stderr, flush=True)
    found = plan(net, budget, config=lora_config(rest, "visionlora plan"), setting=setting)
    print("\n".join([*described(options.model, budget, found), "", *yaml(options.model, found), "", flags(found)]))
    return 0


def described(name: str, budget: Budget, found: Proposal) -> list[str]:
    """Return what was found, beside the budget, and what its step costs."""
    cost, s = found.cost, found.cost.setting
    asked = {
        "parameters": (f"{cost.trained:,}", budget.parameters and f"{budget.parameters:,}"),
        "memory": (f"{cost.memory / MIB:,.0f} MiB", budget.memory and f"{budget.memory / MIB:,.0f} MiB"),
        "time": (
            "-" if found.milliseconds is None else f"{found.milliseconds:,.1f} ms",
            budget.milliseconds and f"{budget.milliseconds:g} ms",
        ),
    }
    rows = [(what, limit or "-", comes_to) for what, (comes_to, limit) in asked.items()]
    kept, all_ = found.blocks
    layers = f"{len(cost.layers) + len(cost.uncounted)} layers of {'all' if kept == all_ else f'the last {kept} of'} "
    lines = [
        f"{name}: {found.config.variant} at rank {found.config.r} in {layers}{all_} blocks",
        f"a step of {s.batch} images, {s.height} x {s.width}, {s.dtype}, AdamW",
        "",
        *table(("", "budget", "comes to"), rows, right=(1, 2)),
        "",
        *totals(cost, None),
    ]
    lines += ["note: blocks are computed again in the backward pass: one more forward pass"] * found.saving.checkpoint
    return lines + [f"note: {LEAN}"] * found.saving.lean


def yaml(name: str, found: Proposal) -> list[str]:
    """Return the settings of a config file that train this adapter."""
    lora = ", ".join(f"{key}: {json.dumps(value)}" for key, value in _lora(found).items())
    settings = [f"  {key}: {_plain(value)}" for key, value in _model(found).items()]
    return ["model:", f"  model_name: {name}", *settings, f"  lora: {{{lora}}}"]


def flags(found: Proposal) -> str:
    """Return the same as flags of `visionlora fit`."""
    words = [(f"--model.{key}", _plain(value)) for key, value in _model(found).items()]
    words += [(f"--model.lora.{key}", _plain(value)) for key, value in _lora(found).items()]
    return " ".join(f"{flag} {shlex.quote(value)}" for flag, value in words)


def _model(found: Proposal) -> dict[str, Any]:
    lean = {"memory": "lean"} if found.saving.lean else {}
    return lean | ({"grad_checkpointing": True} if found.saving.checkpoint else {})


def _lora(found: Proposal) -> dict[str, Any]:
    config = replace(found.config, variant="lora") if found.saving.lean else found.config
    default = LoraConfig().to_dict()
    always = ("r", "lora_alpha")
    return {key: v for key, v in config.to_dict().items() if key in always or v != default[key]}


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(name: str, text: str, units: dict[str, int]) -> float:
    found = re.fullmatch(r"\s*([\d_,]*\.?\d+)\s*([a-zA-Z]*)\s*", text)
    unit = found[2].lower() if found else None
    if found is None or unit not in units:
        example = "300k or 1.5M" if name == "parameters" else "400MiB or 2GB"
        raise ConfigError(f"--{name} must be a number like {example}, got {text!r}")
    return float(re.sub("[_,]", "", found[1])) * units[unit]
