"""PEFT's adapter_config.json, read as closed data: no pattern in it is compiled, no name in it is imported."""

from __future__ import annotations

import math
from typing import Any

from visionlora.config import LoraConfig
from visionlora.errors import AdapterFileError
from visionlora.io.keys import core_key
from visionlora.io.strict import is_finite, is_whole, short, wrong

_USED = frozenset({
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern"),
    *("bias", "modules_to_save", "init_lora_weights"),
})  # fmt: skip
_IGNORED = frozenset({
    # which layers: told by the tensors themselves
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # where it came from: never fetched, never imported
    *("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "task_type", "inference_mode"),
    # no effect on the sum of base and adapter
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "eva_config"),
})  # fmt: skip
_STARTS_THAT_KEEP_THE_BASE = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
MUTATED_STARTS = ("pissa", "olora")
"""Starts that take part of the base into the adapter, in a way that the base alone tells again."""

_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")
_ESCAPED = frozenset(".-_")


def plan_from_peft(config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """Return the plan part of a record for a config and the tensors, {key in the file: shape}, that PEFT wrote."""
    _check_fields(config)
    found = {core_key(key): shape for key, shape in shapes.items()}
    layers, values = {}, {}  # type: dict[str, Any], dict[str, dict[str, str]]
    for key in found:
        layer, attribute, tensor = key.split("/")
        if tensor == "value":
            biased = attribute == "bias" and config.get("bias", "none") != "none"
            values.setdefault(layer, {})[attribute] = "bias" if biased and not _is_saved(layer, config) else "saved"
        elif layer not in layers:
            rank, alpha = rank_and_alpha(config, layer)
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora", False) else rank)
            layers[layer] = {"attribute": "weight", "rank": rank, "scale": scale, "parts": {}}
    return {"config": _lora_config(config, list(layers)).to_dict(), "layers": layers, "values": values}


def rank_and_alpha(config: dict[str, Any], layer: str, alpha: str = "lora_alpha") -> tuple[int, float]:
    """Return the rank and the alpha of a layer. Raises AdapterFileError where the config holds no such numbers."""
    _check_rank("r", config.get("r", 8))
    _check_alpha(alpha, config.get(alpha, 8))
    rank = _resolve(_patterns(config, "rank_pattern"), layer, config.get("r", 8))
    return rank, _resolve(_patterns(config, "alpha_pattern"), layer, config.get(alpha, 8))


def check_known(config: dict[str, Any], known: frozenset[str]) -> None:
    """Raise AdapterFileError for a field that is on and whose maths we do not know."""
    for field, value in config.items():
        off = value is None or value is False or value in ({}, [])
        if field not in known and field not in _IGNORED and not off:
            raise AdapterFileError(
                f"{short(field)}: expected it to be off, found {short(value)}; we do not know its maths"
            )


def _check_fields(config: dict[str, Any]) -> None:
    check_known(config, _USED)
    if config.get("peft_type") != "LORA":
        raise wrong("peft_type", "LORA", config.get("peft_type"))
    _check_start(config)
    for field in ("use_rslora", "use_dora"):
        if not isinstance(config.get(field, False), bool):
            raise wrong(field, "true or false", config[field])
    if config.get("bias", "none") not in ("none", "lora_only", "all"):
        raise wrong("bias", "none, lora_only or all", config["bias"])
    if not all(isinstance(name, str) for name in _saved(config)):
        raise wrong("modules_to_save", "a list of module names", config["modules_to_save"])
    rank_and_alpha(config, "")
    dropout = config.get("lora_dropout", 0.0)
    if not is_finite(dropout) or not 0 <= dropout < 1:
        raise wrong("lora_dropout", "a number in [0, 1)", dropout)


def _check_start(config: dict[str, Any]) -> None:
    start = config.get("init_lora_weights", True)
    if start not in _STARTS_THAT_KEEP_THE_BASE:
        cure = "convert it in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        if start in MUTATED_STARTS:
            cure = "convert it for its base: visionlora convert FOLDER OUT --to visionlora --model NAME"
        raise AdapterFileError(
            f"init_lora_weights: {short(start)} changes the base weights too, which this file does not hold; {cure}"
        )


def _check_rank(field: str, rank: object) -> None:
    if not is_whole(rank) or not 1 <= rank <= 1 << 30:  # type: ignore[operator]
        raise wrong(field, "a whole number of at least 1", rank)


def _check_alpha(field: str, alpha: object) -> None:
    if not is_finite(alpha) or alpha <= 0:  # type: ignore[operator]
        raise wrong(field, "a finite number above 0", alpha)


def _patterns(config: dict[str, Any], field: str) -> dict[str, Any]:
    found = config.get(field) or {}
    if not isinstance(found, dict):
        raise wrong(field, "an object", found)
    for pattern, value in found.items():
        _literal(pattern, field)
        (_check_rank if field == "rank_pattern" else _check_alpha)(f"{field}.{pattern}", value)
    return found


def _resolve(patterns: dict[str, Any], layer: str, default: Any) -> Any:
    """Return the first pattern's value as PEFT's re.match(r"(.*\\.)?(pattern)$") would find it, without a regex."""
    for pattern, value in patterns.items():
        anchored, characters = _literal(pattern, "pattern")
        ending = layer[-len(characters) :]
        before = layer[: -len(characters)]
        same = len(ending) == len(characters) and all(c in (None, e) for c, e in zip(characters, ending, strict=True))
        if same and (not before or (before.endswith(".") and not anchored)):
            return value
    return default


def _literal(pattern: str, field: str) -> tuple[bool, list[str | None]]:
    """Return whether a pattern begins with ^, and its characters, None for the dot that matches any."""
    body = pattern.removeprefix("^")
    characters: list[str | None] = []
    rest = iter(body)
    for c in rest:
        plain = next(rest, "") if c == "\\" else c
        if plain not in (_ESCAPED if c == "\\" else _PLAIN):
            raise AdapterFileError(
                f"{field}: expected plain layer names, found the regular expression {short(pattern)}; "
                "patterns from files are never run, write the layer names out in adapter_config.json"
            )
        characters.append(None if c == "." else plain)
    if not characters:
        raise wrong(field, "a layer name", pattern)
    return body != pattern, characters


def _saved(config: dict[str, Any]) -> list[str]:
    found = config.get("modules_to_save") or []
    if not isinstance(found, list):
        raise wrong("modules_to_save", "a list of module names", found)
    return found


def _is_saved(layer: str, config: dict[str, Any]) -> bool:
    return any(f".{layer}.".find(f".{name}.") >= 0 for name in _saved(config))


def _lora_config(config: dict[str, Any], layers: list[str]) -> LoraConfig:
    return LoraConfig(
        r=config.get("r", 8),
        lora_alpha=config.get("lora_alpha", 8),
        lora_dropout=config.get("lora_dropout", 0.0),
        target_modules=layers or "none",
        variant="dora" if config.get("use_dora") else "lora",
        use_rslora=config.get("use_rslora", False),
        bias=config.get("bias", "none"),
        norm="frozen",
    )
