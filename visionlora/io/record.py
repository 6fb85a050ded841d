"""The record of an adapter: its closed schema, its text with a checksum, and its agreement with the tensors."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from visionlora.config import ADAPTER_NAME, LoraConfig
from visionlora.core.quantised import QUANTISED
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.io.keys import core_key
from visionlora.io.strict import (
    ByField,
    ListOf,
    MapOf,
    Maybe,
    Rule,
    Schema,
    check,
    is_finite,
    is_whole,
    parse_object,
    wrong,
)
from visionlora.variants import VARIANTS, LowRank

FORMAT_VERSION = 1
TEXT = "task_type"
"""Field of the record's data that texts have and images have not."""
STRUCTURE = "structure"
"""Field of the record's base that tells how it was built (`structure.structure`)."""
RECORD, RECORD_SUM = "visionlora", "visionlora_sha256"
"""Names in the metadata of the weights file."""

_HEX = re.compile(r"[0-9a-f]{64}")
_LAYER = re.compile(r"([A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)?")
_WORD = re.compile(r"[A-Za-z0-9_.+-]{0,128}")
_MODEL = re.compile(rf"{_WORD.pattern}|[A-Za-z0-9][A-Za-z0-9_.-]{{0,95}}/[A-Za-z0-9][A-Za-z0-9_.-]{{0,95}}")
_ARG = re.compile(r"[a-z][a-z0-9_]{0,63}")
# arguments of timm.create_model that fetch, read or replace something: a file may size a model, never do that
_FORBIDDEN_ARG = re.compile(
    r"(pretrained|checkpoint|cache|scriptable|exportable|model|hf_|repo).*|.*_(path|dir|file|url|cfg|id)"
)


def _text(pattern: re.Pattern[str], expected: str) -> Rule:
    return Rule(expected, lambda v: isinstance(v, str) and len(v) <= 512 and pattern.fullmatch(v) is not None)


def _whole(low: int, high: int) -> Rule:
    return Rule(f"a whole number from {low} to {high}", lambda v: is_whole(v) and low <= v <= high)


def _choice(*choices: str) -> Rule:
    return Rule(f"one of {', '.join(choices)}", lambda v: isinstance(v, str) and v in choices)


def _is_plain(value: object, depth: int = 4) -> bool:
    if isinstance(value, list):
        return depth > 0 and len(value) <= 100_000 and all(_is_plain(v, depth - 1) for v in value)
    if isinstance(value, dict):
        return depth > 0 and len(value) <= 1000 and all(_is_plain(v, depth - 1) for v in (*value, *value.values()))
    return (
        value is None
        or isinstance(value, bool)
        or is_finite(value)
        or (isinstance(value, str) and len(value) < 1 << 16)
    )


def _is_scalar(value: object) -> bool:
    return (
        value is None
        or isinstance(value, bool)
        or is_finite(value)
        or (isinstance(value, str) and _WORD.fullmatch(value) is not None)
    )


_FINITE = Rule("a finite number", is_finite)
_SHA256 = _text(_HEX, "64 hexadecimal digits")
_NAME = _text(_WORD, "a word of letters, digits and _ . + -")
_LAYER_NAME = _text(_LAYER, "a layer name like blocks.0.attn.qkv")
_ATTRIBUTE = _text(re.compile(r"[A-Za-z_][A-Za-z0-9_]*"), "an attribute name")
_LINE = Rule(
    "a line of printable text, at most 512 long", lambda v: isinstance(v, str) and 0 < len(v) <= 512 and v.isprintable()
)
_ARGUMENT = Rule(
    "a number, a word, true, false, null or a list of them",
    lambda v: _is_scalar(v) or (isinstance(v, list) and len(v) <= 64 and all(map(_is_scalar, v))),
)
_ARGUMENT_NAME = Rule(
    "the name of an argument that only sizes a model",
    lambda v: isinstance(v, str) and _ARG.fullmatch(v) is not None and _FORBIDDEN_ARG.fullmatch(v) is None,
)
_POSITIVE = Rule("a finite number above 0", lambda v: is_finite(v) and v > 0)

_PLAIN = Rule("numbers, texts, lists and objects of them", _is_plain)
_IMAGES: Schema = {
    "input_size": ListOf(_whole(1, 1 << 16), 3),
    "mean": ListOf(_FINITE, 64),
    "std": ListOf(_POSITIVE, 64),
    "interpolation": _NAME,
    "crop_pct": _POSITIVE,
    "crop_mode": _NAME,
}

_BASE: dict[str, Any] = {
    "name": Maybe(_text(_MODEL, "a word of letters, digits and _ . + -, or owner/name")),
    "tag": Maybe(_NAME),
    "args": MapOf(_ARGUMENT_NAME, _ARGUMENT, 64),
    "class": Maybe(_NAME),
    "dtype": Maybe(_NAME),
    "fingerprint": Maybe(_SHA256),
    "head_fingerprint": Maybe(_SHA256),
}


def _base(*fields: str) -> Schema:
    known = {**_BASE, **dict.fromkeys(fields, _SHA256)}
    return ByField(QUANTISED, present={**known, QUANTISED: _choice("int8", "nf4")}, absent=known)


_LAYER_ENTRY: Schema = {
    "attribute": _ATTRIBUTE,
    "rank": _whole(1, 1 << 30),
    "scale": _POSITIVE,
    "parts": MapOf(_ATTRIBUTE, ListOf(_whole(0, 1 << 30), 2), 16),
}
SCHEMA: Schema = {
    "format_version": Rule(
        f"{FORMAT_VERSION}, the format this version reads", lambda v: is_whole(v) and v == FORMAT_VERSION
    ),
    "name": _text(ADAPTER_NAME, "an adapter name, 1 to 64 of A-Z a-z 0-9 _ -"),
    # only an adapter trained on a quantised base says so: an older version, which knows no such field, refuses it
    # adapters of timm backbones tell how theirs was built; those of PEFT and of transformers' models do not
    "base": ByField(STRUCTURE, present=_base(STRUCTURE), absent=_base()),
    "plan": {
        "config": Rule("an object", lambda v: isinstance(v, dict)),
        "layers": MapOf(_LAYER_NAME, _LAYER_ENTRY, 20_000),
        "values": MapOf(_LAYER_NAME, MapOf(_ATTRIBUTE, _choice("head", "norm", "bias", "saved"), 64), 20_000),
    },
    "classes": Maybe(ListOf(_LINE, 100_000)),
    "data": Maybe(ByField(TEXT, present=MapOf(_ARGUMENT_NAME, _PLAIN, 64), absent=_IMAGES)),
    "metrics": MapOf(
        _LINE,
        Rule("a finite number, a line of text or null", lambda v: v is None or is_finite(v) or _LINE.holds(v)),
        1000,
    ),
    "versions": MapOf(_NAME, _NAME, 32),
    "created": Maybe(_text(re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"), "a time like 2025-01-31T12:00:00Z")),
    "tensors": Maybe(MapOf(Rule("a tensor name", lambda v: isinstance(v, str)), _SHA256, 20_000)),
}


def check_record(record: dict[str, Any]) -> None:
    """Raise AdapterFileError where a record does not hold to the schema."""
    try:
        check(record, SCHEMA, "record")
        LoraConfig.from_dict(plain_config(record["plan"]["config"]))
    except (AdapterFileError, ConfigError, TypeError) as e:
        raise AdapterFileError(
            f"{e} (written by visionlora {_writer(record)}, this is {versions()['visionlora']})"
        ) from None


def _writer(record: dict[str, Any]) -> str:
    named = record.get("versions")
    found = named.get("visionlora") if isinstance(named, dict) else None
    return found if isinstance(found, str) and _WORD.fullmatch(found) else "unknown"


def plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded config without its patterns: every layer's rank and scale are recorded, and a regular
    expression from a file must not even be compiled."""
    for name, schema in (("rank_pattern", _whole(1, 1 << 30)), ("alpha_pattern", _POSITIVE)):
        check(config.get(name, {}), MapOf(Rule("a text", lambda v: isinstance(v, str)), schema, 20_000), name)
    return {**config, "rank_pattern": {}, "alpha_pattern": {}}


def to_text(record: dict[str, Any]) -> str:
    """Return the record as one line of JSON, the same for equal records."""
    return json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def to_metadata(record: dict[str, Any]) -> dict[str, str]:
    """Return what the weights file carries as metadata."""
    text = to_text(record)
    return {"format": "pt", RECORD: text, RECORD_SUM: _digest(text)}


def from_metadata(metadata: dict[str, str]) -> dict[str, Any]:
    """Return the checked record of a weights file. Raises AdapterFileError."""
    text = metadata[RECORD]
    if metadata.keys() != {"format", RECORD, RECORD_SUM} or metadata["format"] != "pt":
        raise wrong("__metadata__", f"format=pt, {RECORD} and {RECORD_SUM}", sorted(metadata))
    if metadata.get(RECORD_SUM) != _digest(text):
        raise AdapterFileError("record: its checksum does not fit; it was changed after the adapter was saved")
    record = parse_object(text.encode(), "record")
    check_record(record)
    if record["tensors"] is None:
        raise AdapterFileError("record.tensors: expected the checksum of every tensor, found null")
    return record


def check_agreement(record: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise AdapterFileError where the plan and the tensors, {key in the file: shape}, contradict each other."""
    found = {core_key(key): shape for key, shape in shapes.items()}
    variant = VARIANTS[record["plan"]["config"].get("variant", "lora")]
    needed = {f"{n}/{a}/value" for n, attributes in record["plan"]["values"].items() for a in attributes}
    for site, entry in record["plan"]["layers"].items():
        owner = tensor_prefix(site, entry["attribute"])
        for prefix in [f"{owner}deltas.{part}." for part in entry["parts"]] or [owner]:
            leaves = next((t for t in variant.tensors if f"{prefix}{t[-1]}" in found), variant.tensors[-1])
            needed |= {f"{prefix}{leaf}" for leaf in leaves}
            if issubclass(variant, LowRank):
                _check_pair(f"plan.layers.{site}.rank", entry["rank"], found.get(f"{prefix}A"), found.get(f"{prefix}B"))
    starts = {f"{key.removesuffix('value')}start" for key in needed if key.endswith("/value")}
    _list_keys("is missing", needed - found.keys())
    _list_keys("has unexpected", found.keys() - needed - starts)
    _check_classes(record, found)


def tensor_prefix(site: str, attribute: str) -> str:
    """Return what the keys of adapter_state begin with for a recorded layer or bare parameter."""
    layer = site if attribute == "weight" else site.rpartition(".")[0]
    return f"{layer}/{attribute}/"


def _check_pair(field: str, rank: int, A: tuple[int, ...] | None, B: tuple[int, ...] | None) -> None:
    if A is None or B is None:
        return
    if len(A) < 2 or len(B) != len(A) or B[1] != rank or A[0] % rank:
        raise AdapterFileError(f"{field}: expected {rank} as recorded, found lora_A {A} and lora_B {B}")


def _check_classes(record: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    classes = record["classes"]
    heads = [layer for layer, attributes in record["plan"]["values"].items() if attributes.get("weight") == "head"]
    rows = {layer: (*shapes[f"{layer}/weight/value"][:1], 0)[0] for layer in heads}
    if classes is not None and rows and len(classes) not in rows.values():  # a head may have layers before its last
        found = ", ".join(f"{count} outputs of {layer}" for layer, count in rows.items())
        raise AdapterFileError(f"classes: {len(classes)} names for {found}")


def _list_keys(problem: str, keys: set[str]) -> None:
    if keys:
        shown = ", ".join(sorted(keys)[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")
        raise AdapterFileError(f"tensors: the file {problem} {len(keys)}: {shown}")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of the packages whose behaviour an adapter depends on."""
    found = {}
    for package in ("visionlora", "torch", "timm", *(["transformers"] if "transformers" in sys.modules else [])):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree, or without timm
            found[package] = "unknown"
    return found
