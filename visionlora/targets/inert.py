"""Layers whose owner reads their weight and never calls them: an adapter that only changes forward would do nothing."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

_READERS = {
    ("torch.nn.modules.activation", "MultiheadAttention"),
    ("torch.nn.modules.transformer", "TransformerEncoderLayer"),  # its fast path in eval mode
    ("timm.models.mobilevit", "LinearSelfAttention"),
}


@dataclass(frozen=True)
class Cure:
    """A switch of an owner that makes it call its layer; the output stays bit-identical."""

    owner: nn.Module
    attribute: str
    before: bool

    def undo(self) -> None:
        setattr(self.owner, self.attribute, self.before)


def cure(owner: nn.Module, layer_name: str) -> Cure | None:
    """Change the owner so that it calls its layer, and return how to undo that; None where nothing is to cure."""
    # BEiT, EVA and Swin-V2 of timm call F.linear(x, self.qkv.weight, bias) unless told to add the bias separately
    if layer_name == "qkv" and owner.__dict__.get("qkv_bias_separate") is False:
        found = Cure(owner, "qkv_bias_separate", False)
        owner.qkv_bias_separate = True  # type: ignore[assignment]
        return found
    return None


def owner_reads_weight(owner: nn.Module | None) -> bool:
    """Tell whether the owner reads the weights of its layers, so that they must show the changed weight."""
    return owner is not None and any((c.__module__, c.__name__) in _READERS for c in type(owner).__mro__)
