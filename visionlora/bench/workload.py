"""What is trained: a model with random weights, a batch and a loss, made from a name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropBlock2d, DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from visionlora.bench.settings import Settings
from visionlora.errors import ConfigError
from visionlora.targets import head_layers
from visionlora.vision.backbone import create_backbone, data_config


@dataclass(frozen=True)
class Workload:
    """A base model as a training step finds it (see steady), what it is called with, and the loss of its output."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    loss: Callable[[Any], Tensor]


Factory = Callable[[str, Settings], Workload]
"""From a name to a workload; other kinds of models bring their own."""


def image_workload(name: str, settings: Settings) -> Workload:
    """Return a timm model with random weights, random images and labels. Raises ConfigError for an unknown name."""
    torch.manual_seed(settings.seed)
    model = steady(_backbone(name, settings.size)).to(settings.device)
    images = torch.randn(settings.batch, _channels(model), settings.size, settings.size, device=settings.device)
    if settings.channels_last:
        model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    _waken(model, images)
    labels = torch.randint(_classes(name, model, images), (settings.batch,), device=settings.device)
    return Workload(name, model, (images,), lambda logits: F.cross_entropy(logits, labels))


def steady(model: nn.Module) -> nn.Module:
    """Change a model in place: in train mode, but nothing is dropped and BatchNorm keeps its statistics. Return it."""
    model.train()
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, (DropPath, DropBlock2d)):
            module.drop_prob = 0.0
        elif isinstance(module, _BatchNorm):
            module.eval()
    return model


def _backbone(name: str, size: int) -> nn.Module:
    model = _sized(name, size)
    if head_layers(model):
        return model
    model = _sized(name, size, num_classes=1000)  # weights of this name are published without a classifier
    if not head_layers(model):
        raise ConfigError(f"{name} has no classifier to train; name a model with one")
    return model


def _sized(name: str, size: int, num_classes: int | None = None) -> nn.Module:
    resized: dict[str, Any] = {"img_size": size} if data_config(name)["input_size"][-1] != size else {}
    for args in ({**resized, "drop_rate": 0.0}, {"drop_rate": 0.0}, resized):
        with suppress(ConfigError):  # a model that takes images of any size has no img_size
            return create_backbone(name, pretrained=False, num_classes=num_classes, model_args=args)
    return create_backbone(name, pretrained=False, num_classes=num_classes)


def _channels(model: nn.Module) -> int:
    return int(data_config(model)["input_size"][0])


@torch.no_grad()
def _classes(name: str, model: nn.Module, images: Tensor) -> int:
    first, again = model(images), model(images)
    if not isinstance(first, Tensor):
        raise ConfigError(f"{name} gives {type(first).__name__} in training, expected the scores of classes")
    if not torch.equal(first, again):
        raise ConfigError(f"{name} draws random numbers in training, so that two variants cannot be compared")
    return int(first.shape[-1])


@torch.no_grad()
def _waken(model: nn.Module, images: Tensor) -> None:
    """Change a fresh model in place: every branch has an effect and activations have the size of a trained model's.

    timm starts the last norm of a residual block at zero and LayerScale at 1e-6: no gradient would reach the block and
    no check of it could fail. BatchNorm's fresh statistics let activations die out, and tiny numbers are slow.
    """
    for parameter in model.parameters():
        if parameter.ndim == 1 and parameter.abs().max() < 1e-2 and not _is_bias(model, parameter):
            parameter.fill_(0.5)
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
        assert norm.running_var is not None
        # two images can agree in a channel, and dividing by next to nothing blows rounding up
        norm.running_var.clamp_(min=0.1 * norm.running_var.mean().item())


def _is_bias(model: nn.Module, parameter: nn.Parameter) -> bool:
    return any(module._parameters.get("bias") is parameter for module in model.modules())
