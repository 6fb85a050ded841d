"""Read the safetensors files of kohya's tools and of LyCORIS: LoRA, Tucker, LoHa, LoKr, DoRA, full differences."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from visionlora.errors import AdapterFileError
from visionlora.io.formats.change import Imported, LayerChange
from visionlora.io.formats.layer import base_weight, layer_geometry, own_value
from visionlora.io.formats.lycoris_layer import Leaves, dora, loha, lokr, lora
from visionlora.io.formats.names import Layers
from visionlora.io.formats.tensors import read_safetensors
from visionlora.io.strict import short, wrong

FAMILIES: dict[str, frozenset[str]] = {
    "lora": frozenset({"lora_down.weight", "lora_up.weight", "lora_mid.weight"}),
    "loha": frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"}),
    "lokr": frozenset({"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
    "values": frozenset({"diff", "diff_b", "w_norm", "b_norm"}),
}
"""Endings of the keys of each kind of change."""

_READERS = {"lora": lora, "loha": loha, "lokr": lokr}
_FIRST = {"lora": "lora_up.weight", "loha": "hada_w1_a", "lokr": "lokr_w1"}
_BESIDE = frozenset({"alpha", "dora_scale", "scalar", "diff_b"})
_ALIASES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}  # as diffusers names them
_ENDINGS = sorted({*_ALIASES, *_BESIDE, *frozenset().union(*FAMILIES.values())}, key=len, reverse=True)
_VALUES = {"diff": "weight", "w_norm": "weight", "diff_b": "bias", "b_norm": "bias"}


def looks_like_lycoris(keys: list[str]) -> bool:
    """Tell whether tensors of these names are of this format."""
    leaves = tuple(f".{leaf}" for family in FAMILIES.values() for leaf in family)
    return any(key.endswith(leaves) for key in keys)


def read_lycoris(model: nn.Module, path: Path, *, prefix: str | None = None) -> Imported:
    """Return the adapter of a file for a bare model. Raises AdapterFileError where file and model do not fit."""
    tensors = read_safetensors(path)
    try:
        return _imported(model, tensors, Layers(model, prefix))
    except AdapterFileError as e:
        raise AdapterFileError(f"{path}: {e}") from None


def _imported(model: nn.Module, tensors: dict[str, Tensor], names: Layers) -> Imported:
    layers: dict[str, LayerChange] = {}
    values: dict[str, dict[str, Tensor]] = {}
    for written, own in _by_layer(tensors).items():
        layer, family = names.find(written), _family(written, own)
        if layer in layers or layer in values:
            raise AdapterFileError(f"{written}: {layer} is given twice, under two prefixes")
        if family != "values":
            layers[layer] = _change(model, layer, family, own)
        changed = {_VALUES[leaf]: t for leaf, t in own.items() if leaf in _VALUES}
        if "bias" in changed and "weight" in changed and not changed["weight"].count_nonzero():
            del changed["weight"]  # a bias alone: some readers look for it only beside a weight
        if changed:
            values[layer] = {a: _value(model, layer, a, t) for a, t in changed.items()}
    return Imported(layers, values)


def _by_layer(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        ending = next((e for e in _ENDINGS if key.endswith(f".{e}")), None)
        if ending is None:
            raise AdapterFileError(
                f"{short(key)}: expected a name that ends in a tensor of LoRA, LoHa, LoKr, DoRA or a difference "
                f"({', '.join(sorted(_ENDINGS))}); other algorithms of LyCORIS have no counterpart here"
            )
        found.setdefault(key.removesuffix(f".{ending}"), {})[_ALIASES.get(ending, ending)] = tensor
    return found


def _family(written: str, own: dict[str, Tensor]) -> str:
    families = [name for name, leaves in FAMILIES.items() if (leaves - _BESIDE) & own.keys()]
    if not families and "diff_b" in own:
        families = ["values"]
    if len(families) != 1:
        raise AdapterFileError(f"{short(written)}: expected one kind of change, found {', '.join(own)}")
    strange = own.keys() - FAMILIES[families[0]] - (_BESIDE if families[0] != "values" else set())
    if strange:
        raise AdapterFileError(
            f"{short(written)}: {', '.join(sorted(strange))} does not go with the rest, {', '.join(own)}"
        )
    return families[0]


def _change(model: nn.Module, layer: str, family: str, own: dict[str, Tensor]) -> LayerChange:
    geometry, leaves = layer_geometry(model, layer), Leaves(layer, own)
    scalar, first = leaves.number("scalar", 1.0), _FIRST[family]
    if scalar != 1 and first in own:  # older LyCORIS stores apart what newer versions multiply in
        own = {**own, first: own[first].float() * scalar}
        leaves = Leaves(layer, own)
    change = _READERS[family](geometry, leaves)
    return dora(geometry, leaves, change, base_weight(model, layer)) if "dora_scale" in own else change


def _value(model: nn.Module, layer: str, attribute: str, difference: Tensor) -> Tensor:
    base = own_value(model, layer, attribute)
    if base.shape != difference.shape:
        raise wrong(f"{layer}.{attribute}", f"a difference of shape {tuple(base.shape)}", tuple(difference.shape))
    dtype = torch.promote_types(base.dtype, torch.float32)
    return (base.double() + difference.double()).to(dtype)
