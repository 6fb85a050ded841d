"""Parts of a fused layer: the rows of qkv that are q, k and v."""

from __future__ import annotations

import re

from torch import nn

from visionlora.config import did_you_mean
from visionlora.core.attach import own_class
from visionlora.core.geometry import Geometry
from visionlora.errors import TargetError

_FUSED: dict[str, tuple[str, ...]] = {"qkv": ("q", "k", "v"), "c_attn": ("q", "k", "v"), "kv": ("k", "v")}
_FUSED |= {"Wqkv": ("q", "k", "v")}  # of ModernBERT
_FUSED |= {"in_proj_weight": ("q", "k", "v")}  # of nn.MultiheadAttention

# owners that view their qkv as (..., 3, heads, dim): q, k and v are whole blocks of rows. Others interleave by head.
_BLOCKED = {
    *("timm.layers.attention", "timm.models.vision_transformer", "timm.models.vision_transformer_relpos"),
    *("timm.models.vision_transformer_sam", "timm.models.beit", "timm.models.eva", "timm.models.swin_transformer"),
    *("timm.models.swin_transformer_v2", "timm.models.swin_transformer_v2_cr", "timm.models.convit"),
    *("timm.models.cait", "timm.models.xcit", "timm.models.volo", "timm.models.davit", "timm.models.metaformer"),
    *("timm.models.mvitv2", "timm.models.nest", "timm.models.edgenext", "timm.models.fastvit"),
    *("transformers.models.gpt2.modeling_gpt2", "transformers.models.modernbert.modeling_modernbert"),
    "torch.nn.modules.activation",
}

_ENTRY = re.compile(r"(?P<name>[^\[\]]+)(\[(?P<parts>[^\[\]]+)\])?")


def split_entry(entry: str) -> tuple[str, tuple[str, ...]]:
    """Return ("attn.qkv", ("q", "v")) for "attn.qkv[q,v]"."""
    match = _ENTRY.fullmatch(entry)
    if match is None:
        raise TargetError(f'target "{entry}" is not a layer name with parts in brackets, like "attn.qkv[q,v]"')
    parts = tuple(part.strip() for part in (match["parts"] or "").split(",")) if match["parts"] else ()
    return match["name"], parts


def split_rows(model: nn.Module, name: str, geo: Geometry, parts: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Return the row range of each part. Raises TargetError where the layout of the rows is not known."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    known = _FUSED.get(leaf)
    if known is None:
        raise TargetError(f"{name} is not a fused layer we know the parts of ({', '.join(_FUSED)}); target it whole")
    for part in parts:
        if part not in known:
            raise TargetError(
                f"{name} has the parts {', '.join(known)}, not {part!r}{did_you_mean(part, list(known), 0.1)}"
            )
    if own_class(owner).__module__ not in _BLOCKED or geo.out % len(known) or geo.groups > 1:
        raise TargetError(
            f"the rows of {name} in {own_class(owner).__name__} are no known blocks {', '.join(known)}; target it whole"
        )
    size = geo.out // len(known)
    return {part: (i * size, (i + 1) * size) for i, part in enumerate(known) if part in parts}
