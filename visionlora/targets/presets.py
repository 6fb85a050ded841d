"""Which layers target_modules="auto" takes, by family."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from visionlora.core.attach import own_class
from visionlora.core.geometry import Geometry
from visionlora.targets.tied import output_layers

ATTENTION_AND_MLP = (
    *("qkv", "q", "k", "v", "kv", "q_proj", "k_proj", "v_proj", "qkv_proj", "proj", "out_proj", "attn"),
    *("fc1", "fc2", "fc1_g", "fc1_x", "w12", "w3", "w0", "w1", "w2", "in_proj", "attn_out_proj", "mlp_out_proj"),
)
"""Attention and both MLP layers: with the MLP left out LoRA trails by two points on VTAB-1k structured tasks."""

_TORCHVISION = ("in_proj_weight", "out_proj", "qkv", "proj", "mlp.0", "mlp.3", "mlp.linear_1", "mlp.linear_2")

_BERT = ("self.query", "self.key", "self.value", "intermediate.dense", "output.dense")
_T5 = ("q", "k", "v", "o", "wi", "wi_0", "wi_1", "wo")
_BART = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj")

_TEXT: dict[str, tuple[str, ...]] = {
    "gpt2": ("c_attn", "q_attn", "c_proj", "c_fc"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
    "modernbert": ("Wqkv", "Wo", "Wi"),
    **dict.fromkeys(("deberta", "deberta_v2"), ("query_proj", "key_proj", "value_proj", "in_proj", *_BERT[3:])),
    **dict.fromkeys(("bert", "roberta", "xlm_roberta", "camembert", "electra"), _BERT),
    **dict.fromkeys(("t5", "mt5", "umt5", "longt5"), _T5),
    **dict.fromkeys(("bart", "mbart", "marian", "pegasus"), _BART),
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "olmo2", "smollm3"), _LLAMA),
}

PRESETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        (
            *("vision_transformer", "vision_transformer_relpos", "vision_transformer_sam", "deit", "beit", "eva"),
            *("swin_transformer", "swin_transformer_v2", "swin_transformer_v2_cr", "volo", "xcit", "naflexvit"),
            *("cait", "hiera"),
        ),
        ATTENTION_AND_MLP,
    ),
    **dict.fromkeys(("torchvision.vision_transformer", "torchvision.swin_transformer"), _TORCHVISION),
    **{f"transformers.modeling_{name}": roles for name, roles in _TEXT.items()},
}
"""timm model module (others with their package) -> name endings. It holds for the layers inside that module's classes,
also where another model wraps them. Layers of a family that is not here are taken if they are a dense Linear or
convolution outside stem, squeeze-excite and gating blocks, position networks, auxiliary classifiers and head; in other
models of transformers, if they lie in a list of blocks and do not route tokens to experts."""

_LEFT_ALONE = {
    *("SqueezeExcite", "SqueezeExciteCl", "SqueezeExcitation", "SEModule", "EffectiveSEModule", "EseModule"),
    *("EcaModule", "CecaModule", "GatherExcite", "GlobalContext", "CbamModule", "LightCbamModule", "SpatialAttention"),
    *("SplitAttn", "SelectiveKernelAttn", "RelPosMlp", "ConvPosEnc", "PositionalEncodingFourier", "PosConv"),
    *("InceptionAux",),
}
_POSITION_OR_ROUTE = (
    "cpb_mlp",
    "meta_mlp",
    "rel_pos",
    "pos_embed",
    "pos_conv",
    "pos_proj",
    "conv_lambda",
    "routing_fn",
)
_ROUTERS = ("gate", "router", "shared_expert_gate")
_STEMS = ("stem", "stem_dct", "patch_embed", "conv_stem", "stem_conv", "conv1")


def family(module: nn.Module) -> str:
    """Return the preset a module's class, or the class it derives from, belongs to; else where its class comes from."""
    homes = [_home(cls) for cls in own_class(module).__mro__]
    return next((home for home in homes if home in PRESETS), homes[0])


def auto(model: nn.Module, candidates: dict[str, Geometry], heads: list[str]) -> list[str]:
    """Return the names of the layers "auto" takes."""
    modules = dict(model.named_modules())
    stems = _stems(model)
    kept = {*heads, *output_layers(model)}
    layers = {n: geo for n, geo in candidates.items() if geo.kind != "embedding" and n not in kept}
    names = [n for n, geo in layers.items() if not _is_stem(n, geo, stems)]
    return [n for n in names if _has_role(n, modules) and not _is_left_alone(n, modules)]


def _home(cls: type) -> str:
    package, leaf = cls.__module__.partition(".")[0], cls.__module__.rpartition(".")[2]
    return leaf if package == "timm" else f"{package}.{leaf}"


def _has_role(name: str, modules: dict[str, nn.Module]) -> bool:
    presets = (PRESETS.get(family(owner)) for owner in _owners(name, modules))
    roles = next((preset for preset in presets if preset is not None), None)
    if roles is None:
        return _in_block(name, modules)
    return any(f".{name}".endswith(f".{role}") for role in roles)


def _in_block(name: str, modules: dict[str, nn.Module]) -> bool:
    """Tell whether a layer of no known family is one that a model repeats; outside transformers every layer counts."""
    owners = list(_owners(name, modules))
    if not any(own_class(owner).__module__.startswith("transformers.") for owner in owners):
        return True
    listed = any(isinstance(owner, nn.ModuleList) for owner in owners)
    return listed and name.rpartition(".")[2] not in _ROUTERS


def _is_left_alone(name: str, modules: dict[str, nn.Module]) -> bool:
    inside = any(own_class(owner).__name__ in _LEFT_ALONE for owner in _owners(name, modules))
    return inside or any(part in _POSITION_OR_ROUTE for part in name.split("."))


def _owners(name: str, modules: dict[str, nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules a layer lies in, the nearest first."""
    path = name.split(".")
    yield from (modules[".".join(path[:i])] for i in range(len(path) - 1, -1, -1))


def _stems(model: nn.Module) -> tuple[str, ...]:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    first = cfg.get("first_conv") or ()
    return (first,) if isinstance(first, str) else tuple(first)


def _is_stem(name: str, geo: Geometry, stems: tuple[str, ...]) -> bool:
    top = name.partition(".")[0]
    sees_image = geo.kind == "conv" and geo.groups == 1 and geo.in_ <= 4 and geo.kernel != (1,) * len(geo.kernel)
    return name in stems or sees_image or (top in _STEMS and ("." in name or top != "conv1"))
