"""What an adapter on a model costs in a training step, from one forward pass on the meta device."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from visionlora.adapt import apply_lora, remove
from visionlora.analysis.calls import adapted_weights, calls
from visionlora.analysis.cost import Cost, extra_steps
from visionlora.analysis.layer import LayerCost, Setting
from visionlora.analysis.speed import Speed
from visionlora.config import LoraConfig
from visionlora.core.folding import fold_norms
from visionlora.registry import adapted_layers

_NAME = "cost"


@dataclass(frozen=True)
class ModelCost:
    """What an adapter on a model costs in a training step."""

    setting: Setting
    layers: tuple[LayerCost, ...]
    uncounted: tuple[str, ...]
    """Adapted layers that were not called: their owner reads the weight."""
    folded: int
    """Norms that training folds into the convolution before them."""

    @cached_property
    def floor(self) -> Cost:
        """Forward pass and gradients of inputs, of the adapted layers alone."""
        return sum((layer.floor for layer in self.layers), Cost(0, 0, 0))

    @cached_property
    def extra(self) -> Cost:
        return sum((layer.extra for layer in self.layers), Cost(0, 0, 0))

    def milliseconds(self, speed: Speed) -> float:
        """Return an estimate of the time the adapters add to a step."""
        steps = [step for layer in self.layers for step in extra_steps(layer.sizes, layer.way, layer.change)]
        return 1000 * sum(speed.seconds(step, self.setting.itemsize) for step in steps)


def model_cost(model: nn.Module, setting: Setting, config: LoraConfig | None = None) -> ModelCost:
    """Return what an adapter costs: one of this config, or without a config the active ones.

    The model is copied to the meta device and stays as it is. Layers called twice are listed twice.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = _hollow(model)
        if config is not None:
            net = apply_lora(remove(net) if adapted_layers(net) else net, config, name=_NAME)
        images = torch.empty(setting.batch, setting.channels, setting.height, setting.width)
        folded = fold_norms(net, images[:1])
        layers = calls(net.train(), images, setting)
    called = {layer.name for layer in layers}
    return ModelCost(setting, tuple(layers), tuple(n for n in adapted_weights(net) if n not in called), folded)


def _hollow(model: nn.Module) -> nn.Module:
    """Return a copy of the model without numbers: shapes, types and settings alone, as of a model on the CPU."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return deepcopy(model, memo)
