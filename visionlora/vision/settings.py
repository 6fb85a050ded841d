"""What the settings of an image classifier may be, and which adapter a mode means."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

from visionlora.config import LoraConfig, check_adapter_name, did_you_mean
from visionlora.errors import ConfigError

Mode = Literal["lora", "full", "linear", "norm"]
Memory = Literal["exact", "lean"]
LEAN = (
    "A stays at its random start (memory lean): less to keep for the backward pass, at a price in accuracy (signs by "
    "night 96.6 % instead of 96.7, webcam 94.2 instead of 95.1; docs/performance.md)"
)
"""What a run with frozen A is told."""


def adapter_config(mode: str, lora: LoraConfig, memory: Memory = "exact") -> LoraConfig | None:
    """Return the adapter that a mode means; None trains the model in full. "lean" freezes A (variant "fa")."""
    if memory not in ("exact", "lean"):
        raise ConfigError(f"memory must be exact or lean, got {memory!r}{did_you_mean(str(memory), ['exact', 'lean'])}")
    if memory == "lean" and mode == "lora":
        lora = _lean(lora)
    modes = {
        "lora": lora,
        "linear": LoraConfig(target_modules="none", norm="frozen"),
        "norm": LoraConfig(target_modules="none", norm="stats-affine"),
        "full": None,
    }
    if mode not in modes:
        raise ConfigError(f"mode must be one of {', '.join(modes)}, got {mode!r}{did_you_mean(str(mode), list(modes))}")
    return modes[mode]


def _lean(lora: LoraConfig) -> LoraConfig:
    if lora.variant not in ("lora", "fa"):
        raise ConfigError(
            f'memory lean freezes A of plain LoRA, not of variant "{lora.variant}"; set memory exact or variant "lora"'
        )
    return replace(lora, variant="fa")


def check_settings(settings: dict[str, Any]) -> None:
    """Raise ConfigError for a setting that cannot work."""
    classes, names = settings["num_classes"], settings["class_names"]
    if not isinstance(classes, int) or classes < 2:
        raise ConfigError(f"num_classes must be a whole number of at least 2, got {classes!r}")
    if names is not None and (len(names) != classes or len(set(names)) != classes):
        raise ConfigError(f"class_names needs {classes} different names, one a class, got {list(names)}")
    for name in ("head_lr_factor", "lora_plus", *(("lr",) if settings["lr"] is not None else ())):
        _in_range(name, settings[name], above=0)
    _in_range("weight_decay", settings["weight_decay"])
    for name in ("warmup", "label_smoothing"):
        _in_range(name, settings[name], below=1)
    _one_of("recipe", settings["recipe"], ["auto", "none"])
    _one_of("memory_format", settings["memory_format"], ["auto", "contiguous", "channels_last"])
    _check_weights(settings["class_weights"], classes)
    check_adapter_name(settings["adapter_name"])
    _check_cache(settings)
    if settings["quantize"] != "none" and settings["mode"] == "full":
        raise ConfigError(f"mode full trains the weights that quantize: {settings['quantize']} rounds; use mode lora")


def _one_of(name: str, value: Any, choices: list[str]) -> None:
    if value not in choices:
        listed = f"{', '.join(choices[:-1])} or {choices[-1]}"
        raise ConfigError(f"{name} must be {listed}, got {value!r}{did_you_mean(str(value), choices)}")


def _check_cache(settings: dict[str, Any]) -> None:
    for name, wanted in (("mode", "full"), ("compile", True)) if settings["cache_prefix"] != "none" else ():
        if settings[name] == wanted:
            raise ConfigError(
                f"cache_prefix runs the network in two parts, of which the first never changes; with {name} {wanted} "
                "there are none: leave one of them away"
            )


def _check_weights(weights: Any, classes: int) -> None:
    if isinstance(weights, str):
        if weights not in ("none", "balanced"):
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
