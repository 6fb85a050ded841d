"""The variants of a model that are compared: each a copy of one base with its own choice of what is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from visionlora.adapt import apply_lora
from visionlora.bench.sentinel import start_gradients
from visionlora.bench.settings import ORDERS, Settings
from visionlora.bench.workload import Workload
from visionlora.config import LoraConfig
from visionlora.core.orders import forced
from visionlora.errors import VisionLoRAError
from visionlora.registry import adapted_layers, adapter_plan
from visionlora.targets import head_layers

NAME = "default"


class Skipped(VisionLoRAError):
    """A variant that cannot be measured on this model. The message says why."""


@dataclass
class Contestant:
    """A model ready for training steps."""

    name: str
    model: nn.Module
    ranks: dict[str, int] = field(default_factory=dict)
    """Adapted layer -> rank, which is lower than asked for where the weight is small."""
    factors: dict[str, nn.Parameter] = field(default_factory=dict)
    """What an adapter trains, by the base's names: "blocks.0.attn.qkv/A", ".../B", "head/weight"."""
    around: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered for every forward pass."""

    @property
    def layers(self) -> frozenset[str]:
        """Names of the layers that carry an adapter."""
        return frozenset(self.ranks)

    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def loss(self, workload: Workload, settings: Settings) -> Tensor:
        """Return the loss of a forward pass."""
        precision = torch.autocast(settings.device, torch.bfloat16, enabled=settings.dtype == "bf16")
        with self.around(), precision:
            return workload.loss(self.model(*workload.inputs))


def lora_config(settings: Settings) -> LoraConfig:
    """Return the adapter that every variant with adapters carries."""
    return LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank)


def ours(workload: Workload, settings: Settings, name: str = "ours") -> Contestant:
    """Return the base with an adapter of this library; the name of an order forces that order."""
    model = apply_lora(deepcopy(workload.model), lora_config(settings), name=NAME).train()  # norms stay frozen
    layers, plan = adapted_layers(model), adapter_plan(model, NAME)
    factors: dict[str, nn.Parameter] = {}
    for site in plan.sites:
        change = layers[site.layer].adapters[NAME][site.attribute]  # type: ignore[index]
        factors |= {f"{site.name}/{n}": p for n, p in change.named_parameters()}
    for layer, attributes in plan.values.items():
        own = layers[layer].adapters[NAME]
        factors |= {f"{layer}/{a}": p for a in attributes for p in own[a].parameters()}  # type: ignore[index]
    return Contestant(name, model, {site.name: site.rank for site in plan.sites}, factors, _order(name))


def full(workload: Workload) -> Contestant:
    """Return the base with all of it trained."""
    return Contestant("full", deepcopy(workload.model).requires_grad_(True))


def linear(workload: Workload) -> Contestant:
    """Return the base with its head trained: a linear probe, forward pass alone but for the head.

    Raises Skipped for a language model, whose scores of tokens are no head.
    """
    if not head_layers(workload.model):
        raise Skipped("the model has no head of its own to train")
    return Contestant("linear", _with_head(workload))


def floor(workload: Workload, layers: Iterable[str]) -> Contestant:
    """Return the base doing what no adapter on these layers can avoid.

    The forward pass, the gradients of activations down to the first adapted layer, a trained head, no gradient of any
    other weight.
    """
    model = _with_head(workload)
    start_gradients(model, layers, workload.inputs)
    return Contestant("floor", model)


def _with_head(workload: Workload) -> nn.Module:
    model = deepcopy(workload.model).requires_grad_(False)
    for head in head_layers(model):
        model.get_submodule(head).requires_grad_(True)
    return model


def _order(name: str) -> Callable[[], AbstractContextManager[object]]:
    return (lambda: forced(name)) if name in ORDERS else nullcontext
