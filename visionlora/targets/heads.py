"""Find the classifier head: trained in full, never low-rank by accident."""

from __future__ import annotations

from torch import nn

_TOP_NAMES = ("fc", "classifier", "head", "heads")  # where torchvision and plain models keep their classifier


def head_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that make up the classifier head; empty for a headless backbone."""
    heads = _classifiers(model)
    return [
        f"{name}.{leaf}" if leaf else name
        for name, module in model.named_modules()
        if any(module is head for head in heads)
        for leaf, layer in module.named_modules()
        if layer._parameters.get("weight") is not None
    ]


def _classifiers(model: nn.Module) -> list[nn.Module]:
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
