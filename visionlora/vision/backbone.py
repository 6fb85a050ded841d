"""timm backbones by name, with weights from the hub or from a local file."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import timm
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import get_arch_name, load_state_dict, split_model_name_tag
from torch import Tensor, nn

from visionlora.config import did_you_mean
from visionlora.errors import ConfigError
from visionlora.targets import head_layers
from visionlora.vision import scenes_backbone  # noqa: F401  (timm then knows the embedded backbone)
from visionlora.vision.hub import WeightsUnavailableError, without_hub

__all__ = ["check_model_name", "create_backbone", "data_config"]

log = logging.getLogger(__name__)

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
HEADS = ("head", "head.fc", "fc", "classifier", "heads.head", "last_linear")  # where checkpoints keep their classifier
RESERVED = {
    "num_classes": "the classes of the data decide",
    "pretrained": "it is a setting of its own",
    "checkpoint_path": "the setting checkpoint does that",
    "pretrained_cfg": "the name says which weights",
    "pretrained_cfg_overlay": "the name says which weights",
}
"""Arguments of timm.create_model that are not for model_args, and why."""
_NO_NETWORK = (OSError, URLError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled)


def create_backbone(
    model_name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    model_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Return a timm model: `timm.create_model` with weights from timm's own source, from a local file, or random.

    `checkpoint` (safetensors, or a PyTorch file that holds plain data) wins over `pretrained`; every tensor of it must
    fit, only a head for another number of classes is dropped. A new head on pretrained weights starts at zero: its
    outputs do not depend on a seed, so that an adapter of strength below 1 is the same wherever it is loaded.
    `num_classes` None keeps the head of the weights. `model_args` go to timm unchanged.
    Raises ConfigError: unknown name, weights that cannot be had or do not fit.
    """
    try:
        net, replaced = base_and_head(
            model_name, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes, model_args=model_args
        )
    except WeightsUnavailableError as e:
        raise ConfigError(
            f"{e}. Give a file you have with --model.checkpoint PATH, or start from random weights: pretrained: false"
        ) from None
    if replaced is not None:
        log.info("%s: a new head for %s classes (the weights know %s)", checkpoint or model_name, num_classes, replaced)
    return net


def base_and_head(
    model_name: str,
    *,
    pretrained: bool = True,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    model_args: dict[str, Any] | None = None,
) -> tuple[nn.Module, int | None]:
    """Return what create_backbone does, and how many classes its weights knew if their head gave way to a new one.

    Raises WeightsUnavailableError, without the advice to give a file, for weights that cannot be had.
    """
    check_model_name(model_name)
    args = dict(model_args or {})
    for key in RESERVED.keys() & args.keys():
        raise ConfigError(f"model_args cannot have {key}: {RESERVED[key]}")
    if checkpoint is None and not pretrained:
        return _build(model_name, pretrained=False, num_classes=num_classes, **args), None
    if checkpoint is None:
        net, known = _downloaded(model_name, num_classes, args)
    else:
        net, known = _from_file(model_name, Path(checkpoint), num_classes, args)
    if num_classes in (None, known):
        return net, None
    _zero_head(net, num_classes)
    return net, known


def check_model_name(model_name: str) -> str:
    """Return the name of a model that timm has registered, with or without a tag. Raises ConfigError."""
    if ":" in model_name or "/" in model_name:
        raise ConfigError(
            f"{model_name!r} is a place, expected the name of a timm model; to use your own weights give the name of "
            "the architecture and the file: --model.checkpoint PATH"
        )
    if not timm.is_model(model_name):
        near = did_you_mean(get_arch_name(model_name), timm.list_models())
        raise ConfigError(f"timm {timm.__version__} has no model {model_name!r}{near or '; see timm.list_models()'}")
    name, tag = split_model_name_tag(model_name)
    tags = [split_model_name_tag(known)[1] for known in timm.list_pretrained(f"{name}.*")]
    if tag and tag not in tags:
        raise ConfigError(f"{name} has no weights {tag!r}{did_you_mean(tag, tags)}; it has {', '.join(tags) or 'none'}")
    return model_name


def data_config(model: str | nn.Module, *, model_args: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what images a backbone wants, as plain data, of a timm model or by its name without building it.

    Keys: input_size (channels, height, width), interpolation, mean, std, crop_pct, crop_mode.
    """
    if isinstance(model, str):
        found = timm.get_pretrained_cfg(check_model_name(model), allow_unregistered=True)
        cfg = found.to_dict() if found is not None else {}
    else:
        cfg = getattr(model, "pretrained_cfg", None) or {}
    wanted = {key: value for key, value in (model_args or {}).items() if key in ("img_size", "in_chans")}
    config = resolve_data_config(wanted, pretrained_cfg=cfg, verbose=False)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def _build(model_name: str, **args: Any) -> nn.Module:
    try:
        return timm.create_model(model_name, **{key: value for key, value in args.items() if value is not None})
    except TypeError as e:  # an argument the model does not take, in model_args
        raise ConfigError(f"timm cannot build {model_name}: {e}; check --model.model_args") from None


def _downloaded(model_name: str, num_classes: int | None, args: dict[str, Any]) -> tuple[nn.Module, int | None]:
    here = without_hub(model_name)
    try:
        net = _build(model_name, pretrained=True, num_classes=num_classes, **here, **args)
    except _NO_NETWORK as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0].rstrip(".")
        raise WeightsUnavailableError(f"the weights of {model_name} could not be fetched: {reason}") from None
    except RuntimeError as e:
        raise WeightsUnavailableError(f"no usable weights for {model_name}: {_short(str(e))}") from None
    return net, net.pretrained_cfg.get("num_classes")


def _from_file(model_name: str, path: Path, num_classes: int | None, args: dict[str, Any]) -> tuple[nn.Module, int]:
    weights = _read(path)
    _refuse_ours(path, weights)
    known = _class_count(model_name, weights)
    try:
        # timm renames keys of older files, resamples position embeddings and adapts the first convolution
        overlay = {"state_dict": weights, "num_classes": known, "label_offset": 0}
        net = _build(model_name, pretrained=True, num_classes=known, pretrained_cfg_overlay=overlay, **args)
    except (RuntimeError, KeyError, ValueError) as e:
        raise ConfigError(f"{path} does not fit {model_name}: {_short(str(e))}") from None
    net.pretrained_cfg.pop("state_dict")
    net.pretrained_cfg["tag"] = (
        split_model_name_tag(model_name)[1] or None
    )  # a file is not what timm publishes by default
    if num_classes not in (None, known):
        net.reset_classifier(num_classes)
    return net, known


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: expected a checkpoint ({' '.join(SUFFIXES)})")
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ConfigError(f"no checkpoint at {path}{did_you_mean(path.name, beside)}")
    try:
        weights = load_state_dict(str(path), weights_only=True)
    except (SafetensorError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as e:
        raise ConfigError(f"{path} is not a readable checkpoint of plain tensors: {_short(str(e))}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ConfigError(f"{path} does not hold a state dict (text keys, tensors)")
    bad = [key for key, value in weights.items() if value.is_floating_point() and not torch.isfinite(value).all()]
    if bad:
        raise ConfigError(f"{path} holds NaN or infinite values in {', '.join(bad[:5])}")
    return weights


def _refuse_ours(path: Path, weights: dict[str, Tensor]) -> None:
    if any(key.startswith(("base_model.model.", "visionlora.")) for key in weights):
        raise ConfigError(f"{path} is an adapter, expected the weights of a base; adapters are given by --adapter")
    if any(".adapters." in key for key in weights):
        raise ConfigError(
            f"{path} is the state of a training, expected the weights of a base; to go on with it: --ckpt_path {path}"
        )


def _class_count(model_name: str, weights: dict[str, Tensor]) -> int:
    found = timm.get_pretrained_cfg(model_name, allow_unregistered=True)
    own = (found.classifier if found is not None else None) or ()
    for name in (*((own,) if isinstance(own, str) else own), *HEADS):
        for leaf in ("weight", "bias"):
            if f"{name}.{leaf}" in weights:
                return len(weights[f"{name}.{leaf}"])
    return 0  # a backbone saved without its head


def _zero_head(net: nn.Module, num_classes: int | None) -> None:
    for name in head_layers(net):
        layer = net.get_submodule(name)
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and len(layer.weight) == num_classes:
            _zero(p for p in (layer.weight, layer.bias) if p is not None)


@torch.no_grad()
def _zero(tensors: Iterable[Tensor]) -> None:
    for tensor in tensors:
        tensor.zero_()


def _short(text: str, most: int = 600) -> str:
    """Return the message in one line; lists of keys are cut."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + " ..."
