"""`visionlora info`: what is in an adapter, or what would be attached to a backbone."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from visionlora.adapt import apply_lora
from visionlora.commands.cost import told
from visionlora.commands.parser import ShortErrors
from visionlora.config import LoraConfig
from visionlora.errors import ConfigError, VisionLoRAError
from visionlora.io import read_adapter
from visionlora.io.read import AdapterFile
from visionlora.io.record import tensor_prefix
from visionlora.overview import readable_size, summary, table
from visionlora.targets.presets import PRESETS, family
from visionlora.vision.backbone import create_backbone
from visionlora.vision.recipe import suited


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Print the adapter in a directory, or the adapter that a LoraConfig means on a model."""
    if (options.adapter is None) == (options.model is None):
        raise ConfigError("expected the directory of an adapter or --model NAME\nvisionlora info --help shows both")
    if options.num_classes is not None and options.num_classes < 1:
        raise ConfigError(f"--num_classes must be at least 1, got {options.num_classes}")
    if options.cost:
        print(told(*_subject(options, rest), options))
        return 0
    if options.model is not None:
        print(would_be_attached(options.model, rest, options.num_classes))
        return 0
    if rest:
        raise ConfigError(f"{rest[0]} belongs to --model NAME; what is in an adapter is fixed")
    file = read_adapter(options.adapter)
    print("\n".join([*facts(file), "", *layers(file)]))
    return 0


def _subject(options: argparse.Namespace, rest: list[str]) -> tuple[str, nn.Module, LoraConfig]:
    """Return what costs are told of: a title, the backbone without its weights, the adapter."""
    if options.model is not None:
        net = create_backbone(options.model, pretrained=False, num_classes=options.num_classes)
        return options.model, net, _config_of_fit(rest, net)
    record = read_adapter(options.adapter).record
    base = record["base"]
    if base["name"] is None or "task_type" in (record["data"] or {}):
        raise ConfigError("costs are told of adapters of timm backbones that record their base; use --model NAME")
    args = dict(base["args"])
    net = create_backbone(base["name"], pretrained=False, num_classes=args.pop("num_classes", None), model_args=args)
    return f"{options.adapter} on {base['name']}", net, LoraConfig.from_dict(record["plan"]["config"])


def lora_config(words: list[str], prog: str = "visionlora info") -> LoraConfig:
    """Return the LoraConfig that `--lora.FIELD VALUE` flags mean."""
    parser = ShortErrors(prog=prog, allow_abbrev=False)
    parser.add_class_arguments(LoraConfig, "lora")
    config: LoraConfig = parser.instantiate(parser.parse_args(words)).lora
    return config


def _config_of_fit(words: list[str], net: nn.Module) -> LoraConfig:
    config = lora_config(words)
    return config if words else suited(config, net)


def would_be_attached(model_name: str, words: list[str], num_classes: int | None = None) -> str:
    """Return the table of an adapter on a backbone with random weights: nothing is downloaded."""
    net = create_backbone(model_name, pretrained=False, num_classes=num_classes)
    config = _config_of_fit(words, net)
    apply_lora(net, config, name="new")
    preset = family(net) if family(net) in PRESETS else "any backbone"
    chosen = f'target_modules="auto", preset of {preset}' if config.target_modules == "auto" else "targets as given"
    return f"{model_name} with {config.variant}, {chosen}\n\n{summary(net)}"


def facts(file: AdapterFile) -> list[str]:
    """Return what an adapter file says of itself, a line each."""
    record, plan, base, count = file.record, file.record["plan"], file.record["base"], parameters(file)
    ranks, scales = ([entry[key] for entry in plan["layers"].values()] for key in ("rank", "scale"))
    lines = {
        "adapter": f"{record['name']}  ({file.path})",
        "base": f"{_base_name(base)}  {_given(base['class'])}, weights {(base['fingerprint'] or 'unknown')[:12]}",
        "kind": f"{plan['config']['variant']}, {len(ranks)} layers, rank {_span(ranks)}, scale {_span(scales)}",
        "parameters": f"{count:,}{_share(base, count, record['data'])}",
        "in full": ", ".join(f"{role} {n:,}" for role, n in _in_full(file).items()) or "nothing",
        "norm": str(plan["config"]["norm"]),
        "file size": readable_size(file.path.stat().st_size),
        "classes": _classes(record["classes"]),
        "input": _input(record["data"]),
        "metrics": ", ".join(f"{key} {_number(value)}" for key, value in record["metrics"].items()) or "none recorded",
        "saved": f"{_given(record['created'])} with {_versions(record['versions'])}",
    }
    width = max(map(len, lines))
    return [f"{key:<{width}}  {text}" for key, text in lines.items()] + [f"notice: {text}" for text in file.notices]


def layers(file: AdapterFile) -> list[str]:
    """Return the table of the layers an adapter changes."""
    rows = []
    for name, entry in file.record["plan"]["layers"].items():
        parts = f"[{','.join(entry['parts'])}]" if entry["parts"] else ""
        rows.append(
            (
                name + parts,
                str(entry["rank"]),
                f"{entry['scale']:g}",
                f"{_count(file, tensor_prefix(name, entry['attribute'])):,}",
            )
        )
    return table(("layer", "rank", "scale", "parameters"), rows, right=(1, 2, 3))


def parameters(file: AdapterFile) -> int:
    """Return how many numbers an adapter has, starting values of a head left out."""
    return sum(tensor.numel() for key, tensor in file.tensors.items() if not key.endswith("/start"))


def _share(base: dict[str, Any], count: int, data: dict[str, Any] | None) -> str:
    """Return the share of the base's parameters, as far as the base can be built from its name alone."""
    if base["name"] is None or "task_type" in (data or {}):  # a language model would have to be fetched
        return ""
    args = dict(base["args"])
    try:
        with torch.device("meta"):  # shapes without memory
            net = create_backbone(
                base["name"], pretrained=False, num_classes=args.pop("num_classes", None), model_args=args
            )
    except VisionLoRAError:
        return f", base {base['name']} is not known here"
    total = sum(p.numel() for p in net.parameters())
    return f", {count / total:.2%} of the base's {total:,}"


def _count(file: AdapterFile, prefix: str) -> int:
    return sum(t.numel() for key, t in file.tensors.items() if key.startswith(prefix))


def _in_full(file: AdapterFile) -> dict[str, int]:
    found: dict[str, int] = {}
    for layer, roles in file.record["plan"]["values"].items():
        for attribute, role in roles.items():
            found[role] = found.get(role, 0) + file.tensors[f"{layer}/{attribute}/value"].numel()
    return found


def _span(values: list[Any]) -> str:
    if not values:
        return "-"
    least, most = min(values), max(values)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"


def _base_name(base: dict[str, Any]) -> str:
    return ".".join(part for part in (base["name"], base["tag"]) if part) or "not recorded"


def _classes(names: list[str] | None, most: int = 12) -> str:
    if names is None:
        return "not recorded"
    return f"{len(names)}: {', '.join(names[:most])}{', ...' if len(names) > most else ''}"


def _input(data: dict[str, Any] | None) -> str:
    if data is None:
        return "not recorded"
    if "input_size" not in data:
        return _text_input(data)
    size = " x ".join(map(str, data["input_size"]))
    return f"{size}, {data['interpolation']}, mean {_numbers(data['mean'])}, std {_numbers(data['std'])}"


def _text_input(data: dict[str, Any]) -> str:
    tokenizer = data.get("tokenizer") or {}
    told = [f"{data.get('task_type') or 'text'}", f"{data.get('max_length', '?')} tokens"]
    told += [f"tokenizer {_given(tokenizer.get('name'))} {str(tokenizer.get('fingerprint', ''))[:12]}".rstrip()]
    return ", ".join([*told, *([f"template {data['template']!r}"] if data.get("template") else [])])


def _numbers(values: Iterable[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _versions(known: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in known.items()) or "unknown versions"


def _given(text: str | None) -> str:
    return text or "not recorded"
