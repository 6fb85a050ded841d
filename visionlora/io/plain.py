"""An adapter that started from the base's own weights, written as plain LoRA against the original base."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from visionlora.plan import Plan
from visionlora.targets import Site
from visionlora.variants.init import SPLITS
from visionlora.variants.lora import plain


def as_plain(plan: Plan, state: dict[str, Tensor]) -> tuple[Plan, dict[str, Tensor]]:
    """Return plan and tensors of the same change as a reader without our starting values knows it: twice the rank."""
    if plan.config.init_lora_weights not in SPLITS:
        return plan, state
    config = replace(plan.config, init_lora_weights="default")
    owners = tuple(f"{site.layer}/{site.attribute}/" for site in plan.sites)
    tensors = {key: tensor for key, tensor in state.items() if not key.startswith(owners)}
    for site in plan.sites:
        for prefix in _prefixes(site):
            own = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
            tensors |= {f"{prefix}{name}": t for name, t in plain(site.geometry, own).items()}
    return Plan(config, tuple(replace(site, rank=2 * site.rank) for site in plan.sites), plan.values), tensors


def _prefixes(site: Site) -> list[str]:
    owner = f"{site.layer}/{site.attribute}/"
    return [f"{owner}deltas.{part}." for part in site.parts] or [owner]
