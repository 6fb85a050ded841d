"""Layers whose owner reads their weight and never calls them: there the weight itself must show the change."""

from __future__ import annotations

from torch import nn

_READERS = {
    ("torch.nn.modules.activation", "MultiheadAttention"),
    ("torch.nn.modules.transformer", "TransformerEncoderLayer"),  # its fast path in eval mode
    ("timm.models.mobilevit", "LinearSelfAttention"),
    ("timm.models.naflexvit", "NaFlexEmbeds"),  # resizes it for patches of other sizes
    ("torchvision.models.swin_transformer", "ShiftedWindowAttention"),
}


def owner_reads_weight(owner: nn.Module, layer_name: str) -> bool:
    """Tell whether an adapter that only adds to the layer's output would be inert."""
    # BEiT, EVA and Swin-V2 of timm call F.linear(x, self.qkv.weight, bias). Their switch qkv_bias_separate makes them
    # call the layer, but then rounds differently as soon as a bias is not zero: the base would no longer be exact
    if layer_name == "qkv" and "qkv_bias_separate" in owner.__dict__:
        return True
    return any((c.__module__, c.__name__) in _READERS for c in type(owner).__mro__)
