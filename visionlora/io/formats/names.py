"""Flattened layer names, lycoris_blocks_0_attn_qkv, taken back to the names a model's own modules have."""

from __future__ import annotations

from torch import nn

from visionlora.config import did_you_mean
from visionlora.core.attach import own_modules
from visionlora.errors import AdapterFileError, ConfigError

PREFIXES = ("lycoris", "lora_unet", "lora_te", "lora_te1", "lora_te2", "lora_transformer", "lora")
"""What LyCORIS and kohya's tools put before a layer's name."""


def flat(prefix: str, layer: str) -> str:
    """Return a layer's name as these files have it."""
    return "_".join(part for part in (prefix, layer.replace(".", "_")) if part)


class Layers:
    """The layers of one model by their flattened names."""

    def __init__(self, model: nn.Module, prefix: str | None = None) -> None:
        self.model_name, self.prefix = type(model).__name__, prefix
        self.found: dict[str, list[str]] = {}
        for name, module in own_modules(model).items():
            if name and any(p is not None for p in module._parameters.values()):
                self.found.setdefault(flat("", name), []).append(name)

    def find(self, written: str) -> str:
        """Return the layer that a file means. Raises AdapterFileError for none and for more than one."""
        key = written.replace(".", "_")
        prefixes = ("", *PREFIXES) if self.prefix is None else (self.prefix,)
        tails = dict.fromkeys(tail for p in prefixes if (tail := _tail(key, p)) is not None)
        hits = [name for tail in tails for name in self.found.get(tail, [])]
        if len(hits) > 1:
            raise AdapterFileError(
                f"{written}: {' and '.join(hits)} of {self.model_name} are both written like this; "
                "rename the layer in the file or give the prefix with --prefix"
            )
        if not hits:
            nearest = did_you_mean(next(reversed(tails), key), list(self.found))
            known = "a known prefix" if self.prefix is None else f"the prefix {self.prefix!r}"
            raise AdapterFileError(
                f"{written}: {self.model_name} has no layer of this name after {known}{nearest}; "
                "it is for another model, or its prefix is another (--prefix)"
            )
        return hits[0]

    def write(self, layer: str) -> str:
        """Return the flattened name of a layer. Raises ConfigError where a reader could not tell it from another."""
        name = flat("", layer)
        others = [other for other in self.found.get(name, []) if other != layer]
        if others:
            raise ConfigError(f"{layer} and {others[0]} are both written {name}: this format cannot tell them apart")
        return flat(self.prefix or "", layer)


def _tail(key: str, prefix: str) -> str | None:
    if not prefix:
        return key
    return key.removeprefix(f"{prefix}_") if key.startswith(f"{prefix}_") else None
