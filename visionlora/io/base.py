"""Which base an adapter was trained on: described when it is saved, compared when it is loaded."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import nn

from visionlora.core.attach import own_class, own_tensors
from visionlora.core.quantised import QUANTISED, quantised_base
from visionlora.errors import BaseMismatchError, ConfigError
from visionlora.io.record import STRUCTURE
from visionlora.io.structure import structure
from visionlora.merging import fingerprint, head_fingerprint, known_fingerprint
from visionlora.registry import registry_of
from visionlora.targets.heads import is_transformers

log = logging.getLogger(__name__)
BUILT_OTHERWISE = (
    "the adapter was trained on these weights in a model built otherwise: padding, stride, activation or pooling of a "
    "layer differ. Build the model with the arguments of timm.create_model it was trained with and call load_adapter; "
    'load_model knows them where the adapter was saved with base={"args": {...}}. To load it all the same: '
    "allow_other_base=True"
)
UNTRAINED = "untrained"
"""timm's tag for an architecture without published weights, which names none."""


def describe_base(
    model: nn.Module, given: dict[str, Any] | None, print_of: Callable[[nn.Module], str] = fingerprint
) -> dict[str, Any]:
    """Return the record's part on the base: what the caller knows (name, tag, args), what timm and the model tell."""
    given, known, quantised = given or {}, _timm_name(model), quantised_base(model)
    original = _before_cast(model)
    for field in given:
        if field not in ("name", "tag", "args"):
            raise ConfigError(f"base has the fields name, tag and args, not {field!r}")
    return {
        "name": given.get("name", known.get("architecture")),
        "tag": given.get("tag", known.get("tag")),
        "args": {**_timm_args(model), **given.get("args", {})} if known else dict(given.get("args", {})),
        "class": own_class(model).__name__,
        "dtype": original.get("dtype", _dtype(model)),
        "fingerprint": original.get("fingerprint") or print_of(model),
        "head_fingerprint": original.get("head_fingerprint") or head_fingerprint(model),
        **({QUANTISED: quantised.scheme} if quantised is not None else {}),
        **({STRUCTURE: built} if (built := structure(model)) is not None else {}),
    }


def remember_base(model: nn.Module, fingerprint: str) -> None:
    """Change what the model remembers of its adapters: the base as it is, before a run casts it to another type.

    Adapters that are saved afterwards name the base that can be built again, not its rounded copy.
    """
    original = {"dtype": _dtype(model), "fingerprint": fingerprint, "head_fingerprint": head_fingerprint(model)}
    registry_of(model).original = original


def _before_cast(model: nn.Module) -> dict[str, Any]:
    original: dict[str, Any] = registry_of(model).original if "_visionlora" in model.__dict__ else {}
    return {} if original.get("dtype") == _dtype(model) else original


def check_base(model: nn.Module, recorded: dict[str, Any]) -> None:
    """Raise BaseMismatchError unless the model is the very base the adapter was trained on."""
    came = describe_base(model, None, known_fingerprint)
    if is_transformers(model) and recorded["class"] not in (None, came["class"]):
        raise BaseMismatchError(
            f"the adapter was trained on a {recorded['class']}, this model is a {came['class']}: another task or "
            "architecture. Build that model, or load both tasks on one backbone with visionlora.text.TaskModels"
        )
    if recorded["fingerprint"] in (None, came["fingerprint"]):
        if recorded.get(STRUCTURE, built := came.get(STRUCTURE)) != built:
            raise BaseMismatchError(BUILT_OTHERWISE)
        return
    cure = "load that base, or pass allow_other_base=True if its weights may differ"
    if recorded["class"] not in (None, came["class"]):
        cure = "load the adapter on that architecture"
    elif recorded["dtype"] != came["dtype"] and None not in (recorded["dtype"], came["dtype"]):
        cure = (
            f"the types differ: load the adapter while the model is in {recorded['dtype']} and cast the model "
            f"afterwards (model.to(torch.{came['dtype']})), or pass allow_other_base=True"
        )
    raise BaseMismatchError(
        f"the adapter was trained on {base_text(recorded)}; this model is {base_text(came)}. To go on: {cure}"
    )


def tell_quantised(model: nn.Module, recorded: dict[str, Any]) -> None:
    """Log where adapter and model differ in what the base was rounded to: the outputs then differ by that rounding."""
    quantised = quantised_base(model)
    now, then = quantised.scheme if quantised is not None else None, recorded.get(QUANTISED)
    if then not in (None, now):
        log.warning(
            'the adapter was trained on this base quantised to %s; visionlora.quantize_base(model, "%s") gives the '
            "outputs it was trained with",
            then, then,
        )  # fmt: skip


def base_text(base: dict[str, Any]) -> str:
    """Return a base in words."""
    name = ".".join(part for part in (base["name"], base["tag"]) if part) or "a model"
    weights = f"weights {base['fingerprint'][:12]}" if base["fingerprint"] else "unknown weights"
    return f"{name} ({', '.join(part for part in (base['class'], base['dtype'], weights) if part)})"


def _timm_name(model: nn.Module) -> dict[str, Any]:
    cfg = model.__dict__.get("pretrained_cfg")
    if not isinstance(cfg, dict):
        return {}
    return cfg if cfg.get("tag") != UNTRAINED else {**cfg, "tag": None}


def _timm_args(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of create_model that the model itself tells, as far as they are not its defaults."""
    args: dict[str, Any] = {}
    if isinstance(model.__dict__.get("num_classes"), int):
        args["num_classes"] = model.num_classes
    patches = model._modules.get("patch_embed")
    size = patches.__dict__.get("img_size") if patches is not None else None
    if size is not None and tuple(size) != tuple(_timm_name(model).get("input_size", ()))[1:]:
        args["img_size"] = list(size)
    return args


def _dtype(model: nn.Module) -> str | None:
    dtype = next((t.dtype for t in own_tensors(model) if t.is_floating_point()), None)
    return None if dtype is None else str(dtype).removeprefix("torch.")
