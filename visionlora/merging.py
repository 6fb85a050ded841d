"""Fold the active adapters into the weights, and give the stored base back."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.core.attach import STATE, Adapted, strip
from visionlora.core.digest import known_digest, tensor_digest
from visionlora.core.quantised import is_quantised, quantised_base
from visionlora.errors import StateError
from visionlora.plan import base_tensor
from visionlora.registry import Registry, adapted_layers, registry_of
from visionlora.targets import head_layers


@dataclass
class Stashed:
    """One layer as it was before the merge."""

    layer: nn.Module
    adapted: type[Adapted]
    attributes: dict[str, Any]
    tensors: dict[str, Tensor]
    sizes: dict[str, int]


def merge(model: nn.Module) -> nn.Module:
    """Change the model in place: fold the active adapters into the weights, which then belong to plain layers.

    Outputs stay, the cost of the adapters goes. The base is kept aside for unmerge. Raises StateError, the model
    untouched, where nothing is active or a merged weight would not be finite.
    """
    registry = registry_of(model)
    if not registry.active:
        raise StateError("no adapter is active; call activate first")
    check_whole_base(model)
    layers = adapted_layers(model)
    with torch.no_grad():
        merged = {name: {a: layer.effective(a) for a in layer.changed} for name, layer in layers.items()}
    for name, tensors in merged.items():
        for attribute, tensor in tensors.items():
            if tensor is not None and not torch.isfinite(tensor).all():
                raise StateError(f"the merged {attribute} of {name} is not finite; the adapter is damaged, remove it")
    registry.merged = [_fold(layer, merged[name]) for name, layer in layers.items()]
    _tell_classes(model)
    return model


def check_whole_base(model: nn.Module) -> None:
    """Raise StateError where the base is quantised: a weight of few bits has no room for a small change."""
    layers = adapted_layers(model)
    hidden = [name for name, layer in layers.items() if is_quantised(base_tensor(layer, "weight"))]
    if hidden:
        raise StateError(
            f"the base is quantised ({hidden[0]} and {len(hidden) - 1} more layers) and rounding would lose the "
            "adapter; visionlora.merge_dequantized(model) folds it into a copy in full precision, "
            "visionlora.dequantize_base(model) before merge(model) does so in place"
        )


def unmerge(model: nn.Module) -> nn.Module:
    """Change the model in place: put the stored base and its adapters back, bit for bit. Nothing is subtracted."""
    registry: Registry | None = model.__dict__.get("_visionlora")
    if registry is None or registry.merged is None:
        raise StateError("nothing is merged; call merge first")
    for stashed in registry.merged:
        _unfold(stashed)
    registry.merged = None
    _tell_classes(model)
    return model


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the model's own tensors under the keys timm and transformers gave them; merged ones after merge."""
    own = _base_tensors(model)
    return {key: tensor.detach() if isinstance(tensor, Tensor) else tensor for key, tensor in own.items()}


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    # a module that the model holds under two names shows its adapters under both
    modules = model.named_modules(remove_duplicate=False)
    inside = tuple(f"{name}.adapters.".removeprefix(".") for name, m in modules if isinstance(m, Adapted))
    state = model.state_dict(keep_vars=True)
    return {key: tensor for key, tensor in state.items() if not (inside and key.startswith(inside))}


def fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 of the base: names, types, shapes and bytes, without the head, which every adapter replaces.

    A weight that quantize_base stored in fewer bits counts as the one it was made from.
    """
    return _fingerprint(model, tensor_digest)


def known_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint from the digests of tensors that nobody has written to since they were computed."""
    return _fingerprint(model, known_digest)


def head_fingerprint(model: nn.Module) -> str:
    """Return a SHA-256 over the base's own head."""
    own = {
        f"{name}.{key}".removeprefix("."): tensor
        for name in head_layers(model)
        for key, tensor in _base_tensors(model.get_submodule(name)).items()
    }
    return hashlib.sha256(b"".join(tensor_digest(key, tensor) for key, tensor in sorted(own.items()))).hexdigest()


def _fingerprint(model: nn.Module, digest_of: Callable[[str, Tensor], bytes]) -> str:
    if "_visionlora" in model.__dict__:
        registry_of(model)
    heads = tuple(f"{name}." for name in head_layers(model))
    quantised = quantised_base(model)
    originals, stored = (quantised.originals, quantised.stored) if quantised else ({}, {})
    tables = tuple(f"{key}." for key in originals)  # bitsandbytes stores scales beside its weights
    digest = hashlib.sha256()
    for key, tensor in sorted(_base_tensors(model).items()):
        if key.startswith((*heads, *tables)) or key.endswith("num_batches_tracked"):
            continue
        own = digest_of(key, tensor)
        digest.update(originals[key] if own == stored.get(key) else own)
    return digest.hexdigest()


def _fold(layer: Adapted, merged: dict[str, Tensor | None]) -> Stashed:
    base = {a: t for a in merged if (t := base_tensor(layer, a)) is not None}
    kept = {key: layer.__dict__.get(key, layer._modules.get(key)) for key in STATE}
    stashed = Stashed(layer, type(layer), kept, base, _sizes(layer))
    strip(layer)
    for attribute, tensor in merged.items():
        if tensor is not None:
            _set(layer, attribute, tensor)
    return stashed


def _unfold(stashed: Stashed) -> None:
    layer = stashed.layer
    for attribute, tensor in stashed.tensors.items():
        current = base_tensor(layer, attribute)
        assert current is not None
        stashed.attributes["adapters"].to(current.device)
        _restore(layer, attribute, tensor, current)
    layer.__class__ = stashed.adapted
    for key, value in stashed.attributes.items():
        setattr(layer, key, value)
    for key, size in stashed.sizes.items():
        setattr(layer, key, size)


def _set(layer: nn.Module, attribute: str, tensor: Tensor) -> None:
    if attribute in layer._parameters:
        layer._parameters[attribute] = nn.Parameter(tensor.detach().clone(), requires_grad=False)
    else:
        layer._buffers[attribute] = tensor.detach().clone()
    if attribute == "weight" and isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = tensor.shape
    elif attribute == "weight" and isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed:
        layer.out_channels = tensor.shape[0]


def _restore(layer: nn.Module, attribute: str, tensor: Tensor, current: Tensor) -> None:
    # the very same Parameter object comes back; a model that was moved or cast in between takes its base along
    tensor.data = tensor.data.to(current.device, current.dtype)
    if isinstance(tensor, nn.Parameter):
        layer._parameters[attribute] = tensor
    else:
        layer._buffers[attribute] = tensor


def _sizes(layer: nn.Module) -> dict[str, int]:
    names = ("in_features", "out_features", "out_channels")
    return {name: layer.__dict__[name] for name in names if name in layer.__dict__}


def _tell_classes(model: nn.Module) -> None:
    heads = [model.get_submodule(name) for name in head_layers(model)]
    if "num_classes" in model.__dict__ and len(heads) == 1 and isinstance(heads[0], nn.Linear):
        model.num_classes = heads[0].out_features  # type: ignore[assignment]
