"""PEFT's view of an adapter: its adapter_config.json, or the reasons why PEFT cannot express it."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

from torch import nn

from visionlora.adapt import adapted_layers
from visionlora.core.attach import Adapted, Branched, own_class
from visionlora.plan import Plan
from visionlora.targets import Site


def peft_config(model: nn.Module, plan: Plan, base_name: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the config with which PEFT computes the same outputs in eval mode, or None and the reasons."""
    names = _own_names(model)
    sites = [reason for site in plan.sites if (reason := _site_reason(model, site))]
    reasons = [*_plan_reasons(plan), *sites, *_saved_reasons(model, plan, names)]
    if reasons:
        return None, reasons
    config = plan.config
    r = Counter(site.rank for site in plan.sites).most_common(1)[0][0]
    alphas = {site.name: _alpha(site, config.use_rslora) for site in plan.sites}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": config.variant == "dora",
        "bias": config.bias,
        "fan_in_fan_out": any(site.geometry.kind == "conv1d_hf" for site in plan.sites),
        "init_lora_weights": True,
        "target_modules": _targets(plan, names),
        "modules_to_save": _saved(plan) or None,
        "rank_pattern": {_anchored(s.name): s.rank for s in plan.sites if s.rank != r},
        "alpha_pattern": {_anchored(name): a for name, a in alphas.items() if a != alpha},
    }, []


def _plan_reasons(plan: Plan) -> list[str]:
    reasons = []
    if not plan.sites:
        reasons.append("it changes no layer by low rank, and PEFT needs one")
    if plan.config.norm != "frozen":
        reasons.append(f'norm="{plan.config.norm}": PEFT has no normalisation policy')
    return reasons


def _site_reason(model: nn.Module, site: Site) -> str | None:
    """Return why PEFT would compute something else, or nothing, on a layer."""
    layer = model.get_submodule(site.name)
    if site.parts:
        return f"{site.name}: only the parts {', '.join(site.parts)} change, PEFT changes a layer as a whole"
    if site.geometry.groups > 1:
        return f"{site.name}: one low-rank pair for each of {site.geometry.groups} groups, PEFT has one for all"
    if isinstance(layer, Adapted) and layer.mixin is not Branched:
        return f"{site.name}: {own_class(layer).__name__} needs its changed weight, PEFT only adds to its output"
    if isinstance(layer, nn.modules.conv._ConvNd) and (layer.padding_mode != "zeros" or set(layer.dilation) != {1}):
        return f"{site.name}: PEFT loses the dilation and padding mode of a convolution"
    return None


def _saved_reasons(model: nn.Module, plan: Plan, names: list[str]) -> list[str]:
    reasons = []
    for name in _saved(plan):
        others = [n for n in names if n.endswith(name) and n != name]
        if others:
            reasons.append(f"{name}: PEFT would train {others[0]} in full as well, whose name ends alike")
        elif model.get_submodule(name)._buffers:
            reasons.append(f"{name}: trained in full without its buffers, PEFT saves them too")
    return reasons


def _saved(plan: Plan) -> list[str]:
    return [name for name, roles in plan.values.items() if {"head", "saved"} & set(roles.values())]


def _targets(plan: Plan, names: list[str]) -> list[str] | str:
    chosen = {site.name for site in plan.sites}
    # PEFT takes an entry of a list as a name ending too: "conv1" would also be layer1.0.conv1
    if any(n.endswith(f".{c}") for c in chosen for n in names if n not in chosen):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return sorted(chosen)


def _anchored(name: str) -> str:
    return f"^{re.escape(name)}"


def _alpha(site: Site, rslora: bool) -> float:
    return site.scale * (math.sqrt(site.rank) if rslora else site.rank)


def _own_names(model: nn.Module) -> list[str]:
    inside = tuple(f"{name}.adapters" if name else "adapters" for name in adapted_layers(model))
    return [n for n, _ in model.named_modules() if n and not (inside and n.startswith(inside))]
