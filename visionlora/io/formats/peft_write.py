"""Write an adapter as PEFT itself would have saved it: nothing of ours, and PEFT's layouts where they differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry
from visionlora.io.formats.factors import Factors, decompose, dense_change, factors_of, is_smaller
from visionlora.io.formats.written import Written, deltas, refuse, values
from visionlora.io.keys import PEFT
from visionlora.io.peft_mirror import config_of, layer_reason, own_names
from visionlora.merging import base_state_dict
from visionlora.plan import Plan
from visionlora.registry import adapter_plan


def peft_tensors(model: nn.Module, name: str, *, base_name: str | None = None, rank: int | None = None) -> Written:
    """Return the content of a folder for an adapter of a model.

    A change that is neither LoRA nor DoRA is written as LoRA where low-rank factors hold it, or with `rank` as the
    nearest factors of at most that rank. Raises ConfigError for what PEFT cannot hold.
    """
    plan, names = adapter_plan(model, name), own_names(model)
    saved, more = _saved(model, plan, names)
    refuse("PEFT", _reasons(model, plan, more))
    factors = _factors(model, name, rank)
    geometries = {site.name: site.geometry for site in plan.sites}
    tensors = {f"{n}.{leaf}": t for n, f in factors.items() for leaf, t in _leaves(geometries[n], f).items()}
    state = base_state_dict(model) | {f"{n}.{a}": value for n, a, value, _ in values(model, name)}
    tensors |= {key: t for key, t in state.items() if key.rpartition(".")[0] in (*saved, *more)}
    biases = [n for n, roles in plan.values.items() if set(roles.values()) == {"bias"}]
    tensors |= {f"{n}.base_layer.bias" if n in geometries else f"{n}.bias": state[f"{n}.bias"] for n in biases}
    ranks = {n: (f.rank * geometries[n].groups, f.scale) for n, f in factors.items()}
    dora = any(f.m is not None for f in factors.values())
    plain = LoraConfig(lora_dropout=plan.config.lora_dropout, task_type=plan.config.task_type)
    config = config_of(plain, ranks, names, dora=dora, saved=saved)
    config |= {"base_model_name_or_path": base_name, "bias": _bias(biases, geometries)}
    config |= {"fan_in_fan_out": any(geo.kind == "conv1d_hf" for geo in geometries.values())}
    decomposed = {n: f for n, f in factors.items() if f.norm}
    return Written({PEFT + k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}, config, decomposed)


def _saved(model: nn.Module, plan: Plan, names: list[str]) -> tuple[list[str], list[str]]:
    """Return the modules saved whole, and those that PEFT would then save too, because their names end alike."""
    saved = [n for n, roles in plan.values.items() if set(roles.values()) != {"bias"}]
    alike = [n for n in names if n not in saved and any(n.endswith(s) for s in saved if s)]
    return saved, [n for n in alike if model.get_submodule(n).state_dict()]


def _reasons(model: nn.Module, plan: Plan, more: list[str]) -> list[str]:
    adapted = {site.name for site in plan.sites}
    reasons = [reason for site in plan.sites if (reason := layer_reason(model, site))]
    if not plan.sites:
        reasons.append("it changes no layer by low rank, and PEFT needs one")
    if "" in plan.values:
        reasons.append("the model's own parameters are trained in full, PEFT only saves modules inside it")
    for name in more:
        inside = [n for n, _ in model.get_submodule(name).named_children() if n != "adapters"]
        if name in adapted or inside:
            reasons.append(
                f"{name}: its name ends like that of a module trained in full, PEFT would take it for one too"
            )
    return reasons


def _factors(model: nn.Module, name: str, rank: int | None) -> dict[str, Factors]:
    """Return every layer's change in factors. Raises ConfigError where those would be larger than the weight."""
    # PEFT's DoRA measures the rows of a grouped convolution in another order than they lie in, and one adapter of
    # PEFT is either DoRA everywhere or nowhere
    dora = all(site.geometry.groups == 1 for site in adapter_plan(model, name).sites)
    found, reasons = {}, []
    for site, delta, weight in deltas(model, name):
        factors = factors_of(delta, weight, dora=dora)
        if factors.norm and not is_smaller(site.geometry, factors):
            if rank is None:
                reasons.append(
                    f"{site.name}: its change is no LoRA there and of rank {factors.rank}, so that factors would be "
                    "larger than the weight (--approximate RANK keeps the nearest factors of a rank)"
                )
            else:
                factors = decompose(site.geometry, dense_change(delta, weight), rank)
        found[site.name] = factors
    refuse("PEFT", reasons)
    return found


def _leaves(geo: Geometry, factors: Factors) -> dict[str, Tensor]:
    A = factors.A
    if geo.groups > 1:
        # PEFT's lora_A sees the channels of all groups, of which a group's rows use their own
        own = A.new_zeros(geo.groups, factors.rank, geo.groups, geo.in_, *geo.kernel)
        own[torch.arange(geo.groups), :, torch.arange(geo.groups)] = A.view(
            geo.groups, factors.rank, geo.in_, *geo.kernel
        )
        A = own.view(-1, geo.groups * geo.in_, *geo.kernel)
    if geo.kind == "embedding":
        leaves = {"lora_embedding_A": A, "lora_embedding_B": factors.B}
    else:
        leaves = {"lora_A.weight": A, "lora_B.weight": factors.B}
    if factors.m is not None:
        shape = (1, -1, *[1] * len(geo.kernel)) if geo.kernel else (-1,)
        leaves["lora_magnitude_vector"] = factors.m.view(shape)
    return leaves


def _bias(biases: list[str], adapted: dict[str, Geometry]) -> str:
    if not biases:
        return "none"
    return "lora_only" if set(biases) <= adapted.keys() else "all"
