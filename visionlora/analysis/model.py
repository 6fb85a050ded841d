"""What a training step of a model with an adapter costs, from one step on tensors without numbers."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from visionlora.adapt import apply_lora, remove
from visionlora.analysis.calls import adapted_weights, layer_cost, watch
from visionlora.analysis.cost import Cost, extra_steps
from visionlora.analysis.layer import LayerCost, Setting
from visionlora.analysis.saved import Keeping
from visionlora.analysis.speed import Speed
from visionlora.analysis.work import Work, work
from visionlora.config import LoraConfig
from visionlora.core.blocks import checkpoint_blocks
from visionlora.core.folding import fold_norms
from visionlora.registry import adapted_layers, registry_of

_NAME = "cost"
_ADAM = 2
"""Moments that AdamW keeps for every trained number."""


@dataclass(frozen=True)
class ModelCost:
    """What a training step costs: forward and backward pass, without the optimiser."""

    setting: Setting
    layers: tuple[LayerCost, ...]
    """Every call of an adapted layer, in order."""
    uncounted: tuple[str, ...]
    """Adapted layers that were not called: their owner reads the weight. The totals have them."""
    folded: int
    """Norms that training folds into the convolution before them."""
    work: Work
    """All that PyTorch's operations do in the step, whatever layer they belong to."""
    saved: int
    """Bytes kept for the backward pass by the whole model, beyond its parameters, buffers and input."""
    weights: int
    """Bytes of all parameters and buffers, those of the adapter too."""
    trained: int
    """Trained numbers, the head's too."""

    @cached_property
    def floor(self) -> Cost:
        """Forward pass and gradients of inputs, of the adapted layers alone."""
        return sum((layer.floor for layer in self.layers), Cost(0, 0, 0))

    @cached_property
    def extra(self) -> Cost:
        """What the adapters add to the floor."""
        return sum((layer.extra for layer in self.layers), Cost(0, 0, 0))

    @property
    def memory(self) -> int:
        """Bytes a training run takes: weights, AdamW's moments, and the peak of activations and gradients."""
        return self.weights + 4 * _ADAM * self.trained + self.work.peak_bytes

    def milliseconds(self, speed: Speed) -> float:
        """Return an estimate of the time of a step."""
        return 1000 * sum(speed.seconds(each.flops, each.moved_bytes) for each in self.work.each)

    def extra_milliseconds(self, speed: Speed) -> float:
        """Return an estimate of the time the adapters add to a step."""
        size = self.setting.itemsize
        steps = [step for layer in self.layers for step in extra_steps(layer.sizes, layer.way, layer.change)]
        return 1000 * sum(speed.seconds(step.flops, size * step.moved) for step in steps)


def model_cost(
    model: nn.Module, setting: Setting | None = None, *, config: LoraConfig | None = None, checkpoint: bool = False
) -> ModelCost:
    """Return what a training step costs with an adapter of this config, or without a config with the active ones.

    Everything is counted on a copy without numbers: nothing is allocated and the model stays as it is. A layer called
    twice is listed twice. `checkpoint` recomputes blocks in the backward pass (a timm model's set_grad_checkpointing).
    """
    setting = setting or Setting()
    with FakeTensorMode(allow_non_fake_inputs=True):
        net = hollow_copy(model)
        if config is not None:
            net = apply_lora(remove(net) if adapted_layers(net) else net, config, name=_NAME)
        registry_of(net)
        images = torch.empty(setting.batch, setting.channels, setting.height, setting.width)
        folded = fold_norms(net, images[:1])
        if checkpoint:
            checkpoint_blocks(net, images[:1])
        return _counted(net.train(), images, setting, folded)


def _counted(net: nn.Module, images: Tensor, setting: Setting, folded: int) -> ModelCost:
    keeping = Keeping([*net.parameters(), *net.buffers(), images])
    calls = watch(net, setting, keeping)

    def forward() -> Tensor:
        mixed = torch.autocast("cpu", torch.bfloat16, enabled=setting.dtype == "bf16")
        with keeping, mixed:
            outputs = [t for t in tree_leaves(net(images)) if isinstance(t, Tensor) and t.requires_grad]
        return torch.stack([t.float().sum() for t in outputs]).sum()

    done, called = work(forward), {call.name for call in calls}
    return ModelCost(
        setting,
        tuple(layer_cost(call, setting) for call in calls),
        tuple(name for name in adapted_weights(net) if name not in called),
        folded,
        done,
        keeping.bytes,
        weights=sum(t.nbytes for t in (*net.parameters(), *net.buffers())),
        trained=sum(p.numel() for p in net.parameters() if p.requires_grad),
    )


def hollow_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model without numbers: shapes, types and settings alone, as of a model on the CPU."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return deepcopy(model, memo)
