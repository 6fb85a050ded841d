"""What a resumable checkpoint holds beside Lightning's own entries, and whether it fits the run that resumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from torch import nn

from visionlora.core.delta import Change
from visionlora.errors import ConfigError, ResumeError

FORMAT = 1
SETTINGS = ("hyper_parameters", "datamodule_hyper_parameters")
SHOWN = 8
DIVISION = ("val_fraction", "test_fraction", "split_seed", "group_by", "shots", "train_domains", "test_domains")
"""Settings of a data module that decide which part an example belongs to."""
OF_DATA = (*DIVISION, "root", "csv", "batch_size", "augment", "seed", "on_error", "packing")
"""Settings of a data module whose change is told; what examples go through is in the model's."""


def kept_keys(module: nn.Module) -> list[str]:
    """Return the state-dict keys of everything but the frozen base: adapters (their frozen parts too) and buffers."""
    frozen = {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    changes = [(prefix, m) for prefix, m in module.named_modules() if isinstance(m, Change)]
    owned = {f"{prefix}.{name}" for prefix, change in changes for name, _ in change.named_parameters()}
    return [key for key in module.state_dict() if key not in frozen or key in owned]


def filter_frozen(checkpoint: dict[str, Any], module: nn.Module) -> None:
    """Change the checkpoint: take the frozen base out of its state dict."""
    state = checkpoint["state_dict"]
    checkpoint["state_dict"] = {key: state[key] for key in kept_keys(module) if key in state}


def plain_settings(checkpoint: dict[str, Any]) -> None:
    """Change the checkpoint: hyper-parameters become numbers, text, lists and dicts. Raises ConfigError for others."""
    for name in SETTINGS:
        if name in checkpoint:
            checkpoint[name] = _plain(checkpoint[name], name)


def make_record(module: Any, fingerprint: str) -> dict[str, Any]:
    """Return the entry that check_fits compares; `module` is a `protocol.Trainable`."""
    return {"format": FORMAT, "fingerprint": fingerprint, "groups": _groups(module)}


def check_fits(checkpoint: dict[str, Any], module: Any, fingerprint: str, fixed: Sequence[str]) -> None:
    """Raise ResumeError with the differences when the checkpoint was made by another run; change nothing."""
    record = checkpoint.get("visionlora")
    if record is None:
        raise ResumeError("this checkpoint was not written by AdapterCheckpoint; load its weights instead of resuming")
    if record["format"] != FORMAT:
        raise ResumeError(f"the checkpoint has format {record['format']}, this version reads {FORMAT}")
    settings = _settings_diff(checkpoint, module)
    problems = [line for name, line in settings if any(name == f or name.startswith(f + ".") for f in fixed)]
    if record["fingerprint"] != fingerprint:
        problems.append(
            f"base weights: fingerprint {record['fingerprint'][:12]} in the checkpoint, {fingerprint[:12]} now"
        )
    # a run that goes on with other parts is validated and tested on what it was trained on before
    problems += [line for name, line in _data_diff(checkpoint, module) if name in DIVISION]
    problems += _groups_diff(record["groups"], _groups(module))
    problems += _tensor_diff(checkpoint["state_dict"], module)
    if problems:
        raise ResumeError(_refusal(problems, [line for _, line in settings]))


def changed_settings(checkpoint: dict[str, Any], module: Any) -> list[str]:
    """Return one line for every setting of model and data that is another than when the checkpoint was made."""
    return [line for _, line in [*_settings_diff(checkpoint, module), *_data_diff(checkpoint, module)]]


def _refusal(problems: list[str], settings: list[str]) -> str:
    others = [line for line in settings if line not in problems]
    text = "the checkpoint does not fit this run:\n  " + "\n  ".join(problems)
    if others:
        text += "\nsettings that differ:\n  " + "\n  ".join(others)
    return text + "\nresume with the old settings, or start a new run (without a checkpoint) with the new ones"


def _groups(module: Any) -> dict[str, int]:
    return {name: sum(p.numel() for p in ps) for name, ps in module.trainable_groups().items() if ps}


def _groups_diff(then: dict[str, int], now: dict[str, int]) -> list[str]:
    return [
        f"parameters of group {name}: {then.get(name, 0):,} in the checkpoint, {now.get(name, 0):,} now"
        for name in dict.fromkeys([*then, *now])
        if then.get(name, 0) != now.get(name, 0)
    ]


def _tensor_diff(then: Mapping[str, Any], module: nn.Module) -> list[str]:
    state = module.state_dict()
    now = {key: state[key] for key in kept_keys(module)}
    lines = [f"{key}: missing in the checkpoint" for key in now if key not in then]
    lines += [f"{key}: only in the checkpoint" for key in then if key not in now]
    lines += [
        f"{key}: {tuple(then[key].shape)} in the checkpoint, {tuple(now[key].shape)} now"
        for key in now
        if key in then and then[key].shape != now[key].shape
    ]
    return lines[:SHOWN] + ([f"and {len(lines) - SHOWN} more tensors"] if len(lines) > SHOWN else [])


def _settings_diff(checkpoint: dict[str, Any], module: Any) -> list[tuple[str, str]]:
    then = _flat(checkpoint.get("hyper_parameters", {}))
    now = _flat(_plain(dict(module.hparams), "hyper_parameters"))
    return _diff(then, now)


def _diff(then: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[tuple[str, str]]:
    names, missing = [name for name in dict.fromkeys([*then, *now]) if not name.startswith("_")], "not set"
    return [
        (name, f"{where}{name}: {then.get(name, missing)} in the checkpoint, {now.get(name, missing)} now")
        for name in names
        if then.get(name, missing) != now.get(name, missing)
    ]


def _data_diff(checkpoint: dict[str, Any], module: Any) -> list[tuple[str, str]]:
    data = getattr(module.trainer, "datamodule", None) if module.trainer.training else None
    then, now = checkpoint.get("datamodule_hyper_parameters"), getattr(data, "hparams", None)
    if not then or not now:
        return []
    now = _plain({key: now[key] for key in OF_DATA if key in now}, "datamodule_hyper_parameters")
    return _diff({key: then[key] for key in now if key in then}, now, "data.")


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _plain(value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Enum):
        return _plain(value.value, where)
    if isinstance(value, Path):
        return str(value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise ConfigError(
        f"{where} is a {type(value).__name__}; a checkpoint keeps numbers, text, lists and dicts only: leave it out "
        "with save_hyperparameters(ignore=[...])"
    )
