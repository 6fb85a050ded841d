"""From a directory on disk to a model ready to use: the base by its timm name, checked, with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from visionlora.adapt import activate
from visionlora.data.transforms import InputConfig, Preprocess
from visionlora.errors import AdapterFileError, BaseMismatchError, ConfigError
from visionlora.io import load_adapter, read_adapter
from visionlora.io.base import BUILT_OTHERWISE, check_base
from visionlora.io.read import WEIGHTS as ADAPTER
from visionlora.merging import head_fingerprint
from visionlora.quantising import Scheme, quantised_as_recorded
from visionlora.vision.backbone import base_and_head, create_backbone
from visionlora.vision.full import WEIGHTS as FULL
from visionlora.vision.full import read_full
from visionlora.vision.hub import WeightsUnavailableError

__all__ = ["load_model", "load_transform", "read_record"]

OWN_WEIGHTS = (
    "If you have its weights as a file: load_model(directory, checkpoint=PATH); in test, validate and predict "
    "--model.checkpoint PATH, in merge, combine and convert --checkpoint PATH"
)


def load_model(
    directory: str | Path,
    *,
    checkpoint: str | Path | None = None,
    device: str | torch.device = "cpu",
    strength: float = 1.0,
    quantize: Scheme | Literal["recorded", "none"] = "recorded",
) -> nn.Module:
    """Return the model of a saved adapter, or of a directory trained in full, in eval mode.

    The base is built by its timm name with timm's weights, or with those of the local file `checkpoint`, and must be
    the very base the adapter was trained on; it is quantised as it was in training, or as `quantize` says.
    `model.class_names` lists the classes where they are recorded; `load_transform(directory)` gives what images must go
    through.
    Raises AdapterFileError, BaseMismatchError, and ConfigError where the base cannot be had.
    """
    directory = Path(directory)
    record = read_record(directory)
    if _is_full(directory):
        if checkpoint is not None or strength != 1.0:
            raise ConfigError(f"{directory} holds a whole model, no adapter: leave checkpoint and strength away")
        net = _whole(directory, record)
    else:
        net = quantised_as_recorded(_base(directory, record["base"], checkpoint), record["base"], quantize)
        activate(net, _adapted(net, directory), strength)
    net.class_names = record["classes"]
    return net.to(device).eval()


def load_transform(directory: str | Path) -> Preprocess:
    """Return the transform from a decoded picture to the model's input, as it was in validation."""
    data = read_record(directory)["data"]
    if data is None:
        raise AdapterFileError(f"{directory} does not record the input of its model")
    return Preprocess(InputConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in data.items()}))


def read_record(directory: str | Path) -> dict[str, Any]:
    """Return what a saved adapter or model records: base, classes, data, metrics, versions."""
    return read_full(directory) if _is_full(Path(directory)) else read_adapter(directory).record


def _is_full(directory: Path) -> bool:
    full, adapter = (directory / FULL).exists(), (directory / ADAPTER).exists()
    if full and adapter:
        raise AdapterFileError(f"{directory} holds {FULL} and {ADAPTER}, of two runs; move one of them away")
    return full


def _base(directory: Path, base: dict[str, Any], checkpoint: str | Path | None) -> nn.Module:
    name, args = _name(directory, base), dict(base["args"])
    try:
        classes = args.pop("num_classes", None)
        return base_and_head(name, checkpoint=checkpoint, num_classes=classes, model_args=args)[0]
    except WeightsUnavailableError as e:
        raise ConfigError(f"the base of {directory} cannot be built: {e}. {OWN_WEIGHTS}") from None
    except ConfigError as e:
        raise ConfigError(f"the base of {directory} cannot be built: {e}") from None


def _adapted(net: nn.Module, directory: Path) -> str:
    try:
        return load_adapter(net, directory)
    except BaseMismatchError as e:
        cure = "" if BUILT_OTHERWISE in str(e) else f". {OWN_WEIGHTS}"
        raise BaseMismatchError(f"{e}{cure}") from None


def _whole(directory: Path, record: dict[str, Any]) -> nn.Module:
    base = record["base"]
    args = {key: value for key, value in base["args"].items() if key != "num_classes"}
    try:
        net = create_backbone(_name(directory, base), checkpoint=directory / FULL, model_args=args)
    except ConfigError as e:
        raise AdapterFileError(str(e)) from None
    check_base(net, base)
    if base["head_fingerprint"] not in (None, head_fingerprint(net)):
        raise AdapterFileError(f"{directory / FULL} is damaged: its head is not the one that was saved")
    return net


def _name(directory: Path, base: dict[str, Any]) -> str:
    if base["name"] is None:
        raise ConfigError(
            f"{directory} was trained on a {base['class']} without a timm name; build that model yourself and call "
            "load_adapter(model, directory)"
        )
    return ".".join(part for part in (base["name"], base["tag"]) if part)
