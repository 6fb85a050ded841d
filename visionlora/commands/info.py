"""`visionlora info`: what is in an adapter, or what would be attached to a backbone."""

from __future__ import annotations

import argparse

from visionlora.adapt import apply_lora
from visionlora.commands.parser import ShortErrors
from visionlora.config import LoraConfig
from visionlora.errors import ConfigError
from visionlora.summary import summary
from visionlora.targets.presets import PRESETS, family
from visionlora.vision import scenes_backbone  # noqa: F401  (timm then knows the embedded backbone)
from visionlora.vision.backbone import create_backbone


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Print the adapter in a directory, or the adapter that a LoraConfig means on a model."""
    if (options.adapter is None) == (options.model is None):
        raise ConfigError("expected the directory of an adapter or --model NAME\nvisionlora info --help shows both")
    if options.model is not None:
        print(would_be_attached(options.model, lora_config(rest), options.num_classes))
    return 0


def lora_config(words: list[str]) -> LoraConfig:
    """Return the LoraConfig that `--lora.FIELD VALUE` flags mean."""
    parser = ShortErrors(prog="visionlora info", allow_abbrev=False)
    parser.add_class_arguments(LoraConfig, "lora")
    config: LoraConfig = parser.instantiate(parser.parse_args(words)).lora
    return config


def would_be_attached(model_name: str, config: LoraConfig, num_classes: int | None = None) -> str:
    """Return the table of an adapter on a backbone with random weights: nothing is downloaded."""
    net = create_backbone(model_name, pretrained=False, num_classes=num_classes)
    apply_lora(net, config, name="new")
    preset = family(net) if family(net) in PRESETS else "any backbone"
    chosen = f'target_modules="auto", preset of {preset}' if config.target_modules == "auto" else "targets as given"
    return f"{model_name} with {config.variant}, {chosen}\n\n{summary(net)}"
