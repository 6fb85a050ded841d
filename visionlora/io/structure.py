"""How a timm model computes beyond its weights: strides, paddings, activations and pools, as one hash."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import nn

from visionlora.core.attach import own_class, own_modules
from visionlora.targets.heads import is_transformers

SETTINGS = (
    *("kernel_size", "stride", "padding", "dilation", "padding_mode", "ceil_mode", "output_size", "pool_type"),
    *("eps", "approximate", "negative_slope", "scale_factor"),
)
"""Attributes of layers that change what they compute and leave their weights alone."""
RANDOM = ("Identity", "Dropout", "Dropout2d", "DropPath", "PatchDropout", "PatchDropoutWithIndices")
"""Modules that differ between training and a later use, on purpose."""


def structure(model: nn.Module) -> str | None:
    """Return a SHA-256 over settings of layers and kinds of those without weights; None for transformers' models.

    Two builds of one architecture with the same weights and other arguments (padding, output stride, activation,
    pooling) differ in it. What only training uses (dropout, stochastic depth) does not count.
    """
    if is_transformers(model):
        return None
    digest = hashlib.sha256(f"global_pool {model.__dict__.get('global_pool')!r}".encode())
    modules = own_modules(model)
    owners = {name.rpartition(".")[0] for name in modules}
    for name, module in sorted(modules.items()):
        kind, bare = own_class(module).__name__, name not in owners and not _has_tensors(module)
        facts = {key: _plain(module.__dict__[key]) for key in SETTINGS if key in module.__dict__}
        if name and kind not in RANDOM and (bare or facts):
            digest.update(f"|{name} {kind if bare else ''} {sorted(facts.items())}".encode())
    return digest.hexdigest()


def _has_tensors(module: nn.Module) -> bool:
    return any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))


def _plain(value: Any) -> str:
    return repr(list(value) if isinstance(value, (list, tuple)) else value)
