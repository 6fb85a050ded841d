"""PEFT's view of an adapter: its adapter_config.json, or the reasons why PEFT cannot express it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from visionlora.config import LoraConfig
from visionlora.core.attach import Adapted, Branched, own_class, own_modules
from visionlora.io.keys import PEFT, file_keys
from visionlora.plan import Plan
from visionlora.targets import Site

_VARIANTS = ("lora", "dora", "fa")
_OWN_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""What PEFT trains in full by itself for a task; a name inside it would be wrapped twice."""
_PADS_ITSELF = ("timm.layers.conv2d_same", "Conv2dSame")  # PEFT builds its lora_A from the layer's own class


def peft_config(model: nn.Module, plan: Plan, base_name: str | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the config with which PEFT computes the same outputs in eval mode, or None and the reasons."""
    names = own_names(model)
    sites = [reason for site in plan.sites if (reason := _layout_reason(plan, site) or layer_reason(model, site))]
    saved = _saved(plan)
    reasons = [*_plan_reasons(plan), *sites, *_saved_reasons(model, plan, saved, names)]
    if reasons:
        return None, reasons
    ranks = {site.name: (site.rank, site.scale) for site in plan.sites}
    transposed = any(site.geometry.kind == "conv1d_hf" for site in plan.sites)
    whole = _whole_heads(model, plan.config, saved)
    config = config_of(plan.config, ranks, names, dora=plan.config.variant == "dora", saved=whole)
    return {**config, "base_model_name_or_path": base_name, "fan_in_fan_out": transposed}, []


def config_of(
    config: LoraConfig, ranks: Mapping[str, tuple[int, float]], names: list[str], *, dora: bool, saved: list[str]
) -> dict[str, Any]:
    """Return PEFT's config for layers of these (rank, scale) in a model whose modules have these names."""
    r = Counter(rank for rank, _ in ranks.values()).most_common(1)[0][0]
    alphas = {name: scale * (math.sqrt(k) if config.use_rslora else k) for name, (k, scale) in ranks.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": config.task_type,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "use_dora": dora,
        "bias": config.bias,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "target_modules": _targets(list(ranks), names),
        "modules_to_save": saved or None,
        "rank_pattern": {_anchored(name): rank for name, (rank, _) in ranks.items() if rank != r},
        "alpha_pattern": {_anchored(name): a for name, a in alphas.items() if a != alpha},
    }


def layer_reason(model: nn.Module, site: Site) -> str | None:
    """Return why PEFT could not put any change on a layer, or None."""
    layer, kind = model.get_submodule(site.layer), site.geometry.kind
    if kind in ("bare", "conv_transpose"):
        return f"{site.name}: PEFT's LoRA has no {'bare parameters' if kind == 'bare' else own_class(layer).__name__}"
    if isinstance(layer, Adapted) and layer.mixin is not Branched and not _pads_itself(layer):
        return f"{site.name}: {own_class(layer).__name__} needs its changed weight, PEFT only adds to its output"
    if isinstance(layer, nn.modules.conv._ConvNd) and max(site.geometry.kernel) > 1:
        padded = layer.padding_mode != "zeros" and layer.padding not in (0, "valid") and set(layer.padding) != {0}
        if padded or set(layer.dilation) != {1}:
            return f"{site.name}: PEFT loses the dilation and padding mode of a convolution"
    return None


def own_names(model: nn.Module) -> list[str]:
    """Return the names of the modules inside a model without those of its adapters."""
    return [name for name in own_modules(model) if name]


def _layout_reason(plan: Plan, site: Site) -> str | None:
    """Return why the tensors as they are stored are not those that PEFT would read."""
    convert = "`visionlora convert --to peft` writes it so"
    if site.parts:
        return f"{site.name}: only the parts {', '.join(site.parts)} change, PEFT changes a layer as a whole; {convert}"
    if site.geometry.groups > 1:
        return f"{site.name}: PEFT stores the pairs of {site.geometry.groups} groups otherwise; {convert}"
    if site.geometry.kind == "embedding" and not _name(plan, f"{site.name}/weight/A").endswith("lora_embedding_A"):
        return f"{site.name}: PEFT has other names for the factors of an embedding; {convert}"
    return None


def _plan_reasons(plan: Plan) -> list[str]:
    reasons = []
    if not plan.sites:
        reasons.append("it changes no layer by low rank, and PEFT needs one")
    if plan.config.norm not in ("frozen", "affine"):
        reasons.append(f'norm="{plan.config.norm}": PEFT has no normalisation policy')
    if plan.config.variant not in _VARIANTS:
        reasons.append(f"its variant is {plan.config.variant}, not LoRA or DoRA; `visionlora convert --to peft` helps")
    return reasons


def _saved_reasons(model: nn.Module, plan: Plan, saved: list[str], names: list[str]) -> list[str]:
    reasons, convert = [], "`visionlora convert --to peft` writes them too"
    for name in saved:
        others = [n for n in names if n.endswith(name) and n not in saved and _state(model, n)]
        lacking = _state(model, name) - plan.values[name].keys() if name else set()
        if not name:
            reasons.append("the model's own parameters are trained in full, PEFT only saves modules inside it")
        elif others:
            reasons.append(f"{name}: PEFT would train {others[0]} in full as well, whose name ends alike")
        elif lacking:
            reasons.append(f"{name}: PEFT saves a module whole, {', '.join(sorted(lacking))} included; {convert}")
        elif not all(_name(plan, f"{name}/{a}/value").startswith(PEFT) for a in plan.values[name]):
            reasons.append(f"{name}: a normalisation layer, which PEFT knows under another name; {convert}")
    return reasons


def _saved(plan: Plan) -> list[str]:
    return [name for name, roles in plan.values.items() if set(roles.values()) != {"bias"}]


def _whole_heads(model: nn.Module, config: LoraConfig, saved: list[str]) -> list[str]:
    """Return the names of saved modules, those inside a head that PEFT saves by itself under the name of that head."""
    heads = [head for head in _OWN_HEADS.get(config.task_type or "", ()) if model._modules.get(head) is not None]
    for head in heads:
        inside = [name for name in saved if name.startswith(f"{head}.")]
        owned = {f"{head}.{key}" for key in _state(model, head)}
        if inside and all(key.rpartition(".")[0] in inside for key in owned):
            saved = [head, *(name for name in saved if name not in inside)]
    return saved


def _state(model: nn.Module, name: str) -> set[str]:
    """Return the names of what a module stores, without its adapters."""
    keys = model.get_submodule(name).state_dict()
    return {key for key in keys if not f".{key}".partition(".adapters.")[1]}


def _name(plan: Plan, key: str) -> str:
    return file_keys(plan, [key])[key]


def _targets(chosen: list[str], names: list[str]) -> list[str] | str:
    # PEFT takes an entry of a list as a name ending too: "conv1" would also be layer1.0.conv1
    if any(n.endswith(f".{c}") for c in chosen for n in names if n not in set(chosen)):
        return "|".join(re.escape(name) for name in sorted(chosen))
    return sorted(chosen)


def _anchored(name: str) -> str:
    return f"^{re.escape(name)}"


def _pads_itself(layer: nn.Module) -> bool:
    return any((c.__module__, c.__name__) == _PADS_ITSELF for c in own_class(layer).__mro__)
