"""From a directory on disk to a model ready to use: the base by its name, checked, with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from visionlora.adapt import activate
from visionlora.errors import AdapterFileError, BaseMismatchError, ConfigError
from visionlora.io import load_adapter, read_adapter
from visionlora.io.read import WEIGHTS as ADAPTER
from visionlora.io.record import TEXT
from visionlora.quantising import Scheme, quantised_as_recorded
from visionlora.text.columns import check_task
from visionlora.text.families import create_backbone
from visionlora.text.full import MIRROR, read_full
from visionlora.text.full import WEIGHTS as FULL
from visionlora.text.layout import identity, ready_tokenizer

__all__ = ["build_base", "load_model", "load_tokenizer", "place_of", "read_record"]

_SIZES = ("new_tokens", "untied", "problem_type")
"""What of the recorded arguments builds the base; a file can set nothing else."""


def load_model(
    directory: str | Path,
    *,
    base: str | Path | None = None,
    device: str | torch.device = "cpu",
    strength: float = 1.0,
    quantize: Scheme | Literal["recorded", "none"] = "recorded",
) -> nn.Module:
    """Return the model of a saved adapter, or of a directory trained in full, in eval mode.

    The base is built by its name on the hub, or from the folder `base`, and must be the very base the adapter was
    trained on; it is quantised as it was in training, or as `quantize` says. `model.label_names` lists the labels where
    they are recorded; `load_tokenizer(directory)` gives the tokenizer.
    Raises AdapterFileError, BaseMismatchError, and ConfigError where the base cannot be had.
    """
    directory = Path(directory)
    record = read_record(directory)
    if _is_full(directory):
        if base is not None or strength != 1.0:
            raise ConfigError(f"{directory} holds a whole model, no adapter: leave base and strength away")
        net = build_base(directory, record, str(directory))
    else:
        net = build_base(directory, record, place_of(directory, record, base))
        quantised_as_recorded(net, record["base"], quantize)
        activate(net, _adapted(net, directory), strength)
    net.label_names = record["classes"]
    return net.to(device).eval()


def load_tokenizer(directory: str | Path, *, base: str | Path | None = None) -> Any:
    """Return the tokenizer that the texts of a saved adapter or model went through, from its base or the folder `base`.

    Raises BaseMismatchError for a tokenizer of another vocabulary, ConfigError where it cannot be had.
    """
    directory = Path(directory)
    record = read_record(directory)
    told = record["data"].get("tokenizer")
    recorded: dict[str, Any] = told if isinstance(told, dict) else {}
    name = recorded.get("name")
    if not isinstance(name, str) or Path(name).exists():  # a path in a file is never followed
        name = place_of(directory, record, base)
    tokenizer = ready_tokenizer(str(base) if base is not None else name, record["data"][TEXT])
    wanted = recorded.get("fingerprint")
    if wanted is not None and identity(tokenizer) != wanted:
        raise BaseMismatchError(
            f"{directory} was trained with a tokenizer of fingerprint {str(wanted)[:12]}, that of {base or name} has "
            f"{identity(tokenizer)[:12]}; give the folder of the one it was trained with as base"
        )
    return tokenizer


def read_record(directory: str | Path) -> dict[str, Any]:
    """Return what a saved adapter or model records: base, classes, data, metrics, versions."""
    directory = Path(directory)
    record = read_full(directory) if _is_full(directory) else read_adapter(directory).record
    data = record["data"] or {}
    if TEXT not in data and record.get("plan", {}).get("config", {}).get(TEXT) is None:
        raise AdapterFileError(f"{directory} holds no adapter of a text model; load images with visionlora.load_model")
    task = data.get(TEXT) or record["plan"]["config"][TEXT]
    return {**record, "data": {**data, TEXT: check_task(task)}}


def _is_full(directory: Path) -> bool:
    full, adapter = (directory / FULL).exists() and (directory / MIRROR).exists(), (directory / ADAPTER).exists()
    if full and adapter:
        raise AdapterFileError(f"{directory} holds {FULL} and {ADAPTER}, of two runs; move one of them away")
    return full


def build_base(directory: Path, record: dict[str, Any], name: str) -> nn.Module:
    """Return the model that a record describes, from a name or a folder."""
    known = record["base"]["args"]
    sizes = {key: known[key] for key in _SIZES if key in known} if not _is_full(directory) else {}
    tag = record["base"]["tag"]
    args = {"revision": tag} if tag and not Path(name).exists() else {}
    labels = record["classes"]
    try:
        return create_backbone(name, record["data"][TEXT], label_names=labels, model_args=args, **sizes)
    except ConfigError as e:
        hint = "" if Path(name).exists() else ". If you have it: load_model(directory, base=FOLDER)"
        raise ConfigError(f"the base of {directory} cannot be built: {e}{hint}") from None


def place_of(directory: Path, record: dict[str, Any], base: str | Path | None) -> str:
    """Return where the base is: as given, else the recorded name on the hub. A path in a file is never followed."""
    if base is not None:
        return str(base)
    name: str | None = record["base"]["name"]
    if name is None or Path(name).exists():
        raise ConfigError(
            f"{directory} was trained on a {record['base']['class']} of a folder; give that folder: "
            "load_model(directory, base=FOLDER)"
        )
    return name


def _adapted(net: nn.Module, directory: Path) -> str:
    try:
        return load_adapter(net, directory)
    except BaseMismatchError as e:
        raise BaseMismatchError(f"{e}. A base of your own is loaded with base=FOLDER") from None
