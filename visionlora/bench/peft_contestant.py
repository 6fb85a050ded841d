"""PEFT on the same layers, rank, scale and layout, as its users run it. It stays optional."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from copy import deepcopy
from importlib.util import find_spec

from torch import nn

from visionlora.bench.contestants import Contestant, Skipped, lora_config
from visionlora.bench.settings import Settings
from visionlora.bench.workload import Workload, steady
from visionlora.targets import head_layers

NAME = "default"


def peft(workload: Workload, settings: Settings, ranks: Mapping[str, int]) -> Contestant:
    """Return the base with PEFT's LoRA on these layers, each at its rank, and a trained head.

    Raises Skipped where PEFT is not installed or cannot do it.
    """
    if find_spec("peft") is None:
        raise Skipped("not installed (pip install peft)")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _adapted(workload, settings, ranks)


def _adapted(workload: Workload, settings: Settings, ranks: Mapping[str, int]) -> Contestant:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    heads, ours = head_layers(workload.model), lora_config(settings)
    lower = {name: rank for name, rank in ranks.items() if rank != ours.r}
    scale = ours.lora_alpha / ours.r
    config = LoraConfig(
        r=ours.r,
        lora_alpha=ours.lora_alpha,
        target_modules="|".join(re.escape(name) for name in sorted(ranks)),  # a pattern must match the whole name
        rank_pattern={f"^{re.escape(name)}$": rank for name, rank in lower.items()},
        alpha_pattern={f"^{re.escape(name)}$": scale * rank for name, rank in lower.items()},
        modules_to_save=heads,
    )
    try:
        model = get_peft_model(deepcopy(workload.model), config)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as e:
        raise Skipped(f"PEFT cannot adapt this model: {' '.join(str(e).split())[:200]}") from None
    steady(model)
    inner = model.base_model.model
    adapted = {name: m for name, m in inner.named_modules() if isinstance(m, LoraLayer)}
    if adapted.keys() != ranks.keys():
        missing, extra = sorted(ranks.keys() - adapted.keys())[:3], sorted(adapted.keys() - ranks.keys())[:3]
        raise Skipped(f"PEFT adapts other layers: without {missing}, with {extra} beside them")
    factors: dict[str, nn.Parameter] = {}
    for name, layer in adapted.items():
        factors |= {f"{name}/A": layer.lora_A[NAME].weight, f"{name}/B": layer.lora_B[NAME].weight}
    for head in heads:
        saved = inner.get_submodule(head).modules_to_save[NAME]
        factors |= {f"{head}/{n}": p for n, p in saved.named_parameters()}
    return Contestant("peft", model, dict(ranks), factors)
