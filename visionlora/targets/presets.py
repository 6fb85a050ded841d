"""Which layers target_modules="auto" takes, by family."""

from __future__ import annotations

from torch import nn

from visionlora.core.attach import own_class
from visionlora.core.geometry import Geometry

ATTENTION_AND_MLP = (
    *("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "qkv_proj", "proj", "out_proj"),
    *("fc1", "fc2", "fc1_g", "fc1_x", "w12", "w3"),
)
"""Attention and both MLP layers: with the MLP left out LoRA trails by two points on VTAB-1k structured tasks."""

PRESETS: dict[str, tuple[str, ...]] = dict.fromkeys(
    (
        *("vision_transformer", "vision_transformer_relpos", "vision_transformer_sam", "deit", "beit", "eva", "cait"),
        *("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "volo", "xcit", "naflexvit", "hiera"),
    ),
    ATTENTION_AND_MLP,
)
"""timm model module -> name endings. A family that is not here gets every dense Linear and convolution outside its
stem, its squeeze-excite and gating blocks, its position-bias networks and its head."""

_GATES = {
    *("SqueezeExcite", "SqueezeExciteCl", "SqueezeExcitation", "SEModule", "EffectiveSEModule", "EcaModule"),
    *("CecaModule", "GatherExcite", "GlobalContext", "CbamModule", "LightCbamModule", "SplitAttn"),
    *("SelectiveKernelAttn", "RelPosMlp", "ConvPosEnc"),
}
_BIAS_NETWORKS = ("cpb_mlp", "rel_pos", "pos_embed", "pos_conv")
_STEMS = ("stem", "patch_embed", "conv_stem", "stem_conv", "conv1")


def family(model: nn.Module) -> str:
    """Return the timm module a model comes from, or its package."""
    return own_class(model).__module__.rpartition(".")[2]


def auto(model: nn.Module, candidates: dict[str, Geometry], heads: list[str]) -> list[str]:
    """Return the names of the layers "auto" takes."""
    roles = PRESETS.get(family(model))
    modules = dict(model.named_modules())
    stems = _stems(model)
    layers = {n: geo for n, geo in candidates.items() if geo.kind != "embedding" and n not in heads}
    names = [n for n, geo in layers.items() if not _is_stem(n, geo, stems)]
    if roles is not None:
        names = [n for n in names if n.rpartition(".")[2] in roles]
    return [n for n in names if not _is_gate(n, modules)]


def _is_gate(name: str, modules: dict[str, nn.Module]) -> bool:
    path = name.split(".")
    owners = (modules[".".join(path[:i])] for i in range(1, len(path)))
    return any(part in _BIAS_NETWORKS for part in path) or any(type(o).__name__ in _GATES for o in owners)


def _stems(model: nn.Module) -> tuple[str, ...]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    first = cfg.get("first_conv") or ()
    return (first,) if isinstance(first, str) else tuple(first)


def _is_stem(name: str, geo: Geometry, stems: tuple[str, ...]) -> bool:
    top = name.partition(".")[0]
    sees_image = geo.kind == "conv" and geo.groups == 1 and geo.in_ <= 4 and geo.kernel != (1,) * len(geo.kernel)
    return name in stems or sees_image or (top in _STEMS and ("." in name or top != "conv1"))
