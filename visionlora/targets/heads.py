"""Find the classifier head: trained in full, never low-rank by accident."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from visionlora.core.attach import own_class, own_modules

_TOP_NAMES = ("fc", "classifier", "head", "heads")  # where torchvision and plain models keep their classifier
_TASK_NAMES = ("classifier", "score", "qa_outputs", "pre_classifier", "classification_head")  # where transformers does
_NEW = "_visionlora_new_layers"


def head_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that make up the classifier head; empty for a headless backbone.

    Of a transformers model these are all layers beside its backbone (none where they are its language-model head), and
    what declare_new told.
    """
    new = [model.get_submodule(name) for name in model.__dict__.get(_NEW, ())]
    heads = [*_classifiers(model), *new]
    found = [
        f"{name}.{leaf}" if leaf else name
        for name, module in own_modules(model).items()
        if any(module is head for head in heads)
        for leaf, layer in own_modules(module).items()
        if layer._parameters.get("weight") is not None
    ]
    return list(dict.fromkeys(found))


def declare_new(model: nn.Module, layers: Iterable[str]) -> None:
    """Change the model: remember which of its layers came without weights, so that they belong to the head."""
    model.__dict__[_NEW] = tuple(layers)


def is_transformers(model: nn.Module) -> bool:
    """Tell whether the model is one of transformers', which is never imported here."""
    known = ("transformers.modeling_utils", "PreTrainedModel")
    return any((c.__module__, c.__name__) == known for c in own_class(model).__mro__)


def _classifiers(model: nn.Module) -> list[nn.Module]:
    if is_transformers(model):
        return _beside_backbone(model)
    get_classifier = getattr(model, "get_classifier", None)  # timm's name; every timm model has it
    if callable(get_classifier):
        found = get_classifier()
        # VOLO adds the scores of a second classifier, which sees the patches; get_classifier leaves it out
        heads = [*(found if isinstance(found, (tuple, list)) else (found,)), model._modules.get("aux_head")]
        return [m for m in heads if isinstance(m, nn.Module)]
    for name in _TOP_NAMES:
        top = model._modules.get(name)
        if top is not None:
            dense: list[nn.Module] = [m for m in top.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
            return dense[-1:]
    return []


def _beside_backbone(model: nn.Module) -> list[nn.Module]:
    if model.get_output_embeddings() is not None:  # type: ignore[operator]
        return []  # a language-model head belongs to the base
    backbone = model.base_model
    if backbone is model:  # some models keep their layers beside the head
        return [m for name, m in model.named_children() if name in _TASK_NAMES]
    return [m for m in model.children() if m is not backbone]
