"""What the settings of a text task may be, and which adapter a mode means."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import nn

from visionlora.config import LoraConfig, check_adapter_name, did_you_mean
from visionlora.core.attach import own_class
from visionlora.core.norms import is_norm
from visionlora.errors import ConfigError
from visionlora.targets import head_layers
from visionlora.text.columns import check_task
from visionlora.text.labels import check_problem

__all__ = ["RATES", "Mode", "adapter_config", "check_settings"]

Mode = Literal["lora", "full", "linear", "norm"]
RATES: dict[str, float] = {"lora": 1e-3, "linear": 1e-2, "norm": 3e-3, "full": 5e-5}
"""Learning rates of AdamW that suit the modes."""


def adapter_config(mode: str, lora: LoraConfig, net: nn.Module, task_type: str) -> LoraConfig | None:
    """Return the adapter that a mode means on a model; None trains the model in full. Raises ConfigError."""
    if mode not in RATES:
        raise ConfigError(f"mode must be one of {', '.join(RATES)}, got {mode!r}{did_you_mean(str(mode), list(RATES))}")
    if mode == "full":
        return None
    if lora.task_type not in (None, task_type):
        raise ConfigError(f"lora.task_type is {lora.task_type}, the task is {task_type}; leave lora.task_type away")
    kind = type(net).__name__
    if mode == "lora":
        return replace(lora, task_type=task_type)
    if mode == "linear":
        if not head_layers(net):
            raise ConfigError(f"mode linear trains a head and {kind} has none of its own; use mode lora or norm")
        return LoraConfig(target_modules="none", norm="frozen", task_type=task_type)
    own = _own_norms(net)
    if not own and not any(is_norm(m) for m in net.modules()):
        raise ConfigError(f"{kind} has no normalisation to train; use mode linear or lora")
    return LoraConfig(target_modules="none", norm="affine", modules_to_save=own or "auto", task_type=task_type)


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that cannot work."""
    check_task(settings["task_type"])
    check_problem(settings["problem_type"], settings["task_type"])
    names = settings["label_names"]
    if names is not None and len(set(names)) != len(names):
        raise ConfigError(f"label_names must all differ, got {list(names)}")
    for name in ("head_lr_factor", "lora_plus", *(("lr",) if settings["lr"] is not None else ())):
        _in_range(name, settings[name], above=0)
    _in_range("weight_decay", settings["weight_decay"])
    for name in ("warmup", "label_smoothing"):
        _in_range(name, settings[name], below=1)
    for name, least in (("max_new_tokens", 1), ("num_beams", 1), ("generate_batches", 0), ("max_answer_tokens", 1)):
        if not isinstance(settings[name], int) or settings[name] < least:
            raise ConfigError(f"{name} must be a whole number of at least {least}, got {settings[name]!r}")
    _check_weights(settings["class_weights"], len(names or ()), settings["task_type"], settings["problem_type"])
    check_adapter_name(settings["adapter_name"])
    if settings["quantize"] != "none" and settings["mode"] == "full":
        raise ConfigError(f"mode full trains the weights that quantize: {settings['quantize']} rounds; use mode lora")


def _own_norms(net: nn.Module) -> list[str]:
    """Return the normalisation layers of transformers' own classes: LlamaRMSNorm, T5LayerNorm."""
    return [
        name
        for name, m in net.named_modules()
        if own_class(m).__name__.endswith("Norm") and not is_norm(m) and set(m._parameters) <= {"weight", "bias"}
    ]


def _check_weights(weights: Any, classes: int, task_type: str, problem_type: str) -> None:
    if weights == "none":
        return
    if task_type not in ("SEQ_CLS", "TOKEN_CLS") or problem_type == "regression":
        raise ConfigError(f"class_weights belong to classes; {task_type} ({problem_type}) has none")
    if isinstance(weights, str):
        if weights != "balanced":
            near = did_you_mean(weights, ["none", "balanced"])
            raise ConfigError(f"class_weights must be none, balanced or a list of numbers, got {weights!r}{near}")
        return
    if len(weights) != classes or not any(weights):
        raise ConfigError(f"class_weights needs {classes} numbers, one a class and not all 0, got {list(weights)}")
    for weight in weights:
        _in_range("a class weight", weight)


def _in_range(name: str, value: Any, *, above: float | None = None, below: float = math.inf) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < below or (above is not None and value <= above):
        low = f"above {above:g}" if above is not None else "of at least 0"
        high = f" and below {below:g}" if below < math.inf else ""
        raise ConfigError(f"{name} must be a finite number {low}{high}, got {value!r}")
