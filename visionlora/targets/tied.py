"""The embeddings of language models: the layer that scores tokens, and weights that two layers share."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from visionlora.core.attach import own_modules
from visionlora.errors import TargetError
from visionlora.targets.heads import is_transformers


def output_layers(model: nn.Module) -> list[str]:
    """Return the layers that turn hidden states into scores of tokens. Keywords leave them alone."""
    found = [m.get_output_embeddings() for m in model.modules() if is_transformers(m)]  # type: ignore[operator]
    return [name for name, m in model.named_modules() if any(m is layer for layer in found if layer is not None)]


def check_untied(model: nn.Module, targets: Iterable[str], modules_to_save: str | list[str]) -> None:
    """Raise TargetError for a layer that shares its weight with an embedding: a change of one would lose the other."""
    owners: dict[int, list[str]] = {}
    modules = own_modules(model)
    for name, module in modules.items():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(name)
    saved = [] if isinstance(modules_to_save, str) else modules_to_save
    meant = {*targets, *(n for n in modules for entry in saved if f".{n}".endswith(f".{entry}"))}
    for names in owners.values():
        embedding = any(isinstance(modules[n], nn.Embedding) for n in names)
        wanted = [n for n in names if n in meant]
        if len(names) > 1 and embedding and wanted:
            raise TargetError(
                f"{wanted[0]} shares its weight with {', '.join(n for n in names if n != wanted[0])}: a change of one "
                "alone is lost when the merged model is saved. Untie them first (visionlora.text.untie(model)), then "
                "name both, or leave it out"
            )
