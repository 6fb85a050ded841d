"""Read PEFT's LoHa and LoKr, whose tensors have the names that LyCORIS gives them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from visionlora.io.formats.change import Imported, LayerChange
from visionlora.io.formats.layer import known_layer, layer_geometry
from visionlora.io.formats.lycoris_layer import Leaves, loha, lokr
from visionlora.io.formats.lycoris_read import FAMILIES
from visionlora.io.keys import PEFT
from visionlora.io.peft_config import check_known, rank_and_alpha
from visionlora.io.strict import wrong

READERS = {"LOHA": loha, "LOKR": lokr}

_KNOWN = frozenset({
    *("peft_type", "r", "alpha", "rank_pattern", "alpha_pattern", "modules_to_save"),
    # of training and of starting values alone, or told by the tensors themselves
    *("rank_dropout", "module_dropout", "rank_dropout_scale", "init_weights", "use_effective_conv2d"),
    *("decompose_both", "decompose_factor"),
})  # fmt: skip


def read_products(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> Imported:
    """Return the adapter of a config of type LOHA or LOKR for a bare model."""
    check_known(config, _KNOWN)
    family = config["peft_type"]
    own: dict[str, dict[str, Tensor]] = {}
    values: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        layer, _, leaf = key.removeprefix(PEFT).rpartition(".")
        (own if leaf in FAMILIES[family.lower()] else values).setdefault(known_layer(model, layer), {})[leaf] = tensor
    return Imported({n: _change(model, n, leaves, config) for n, leaves in own.items()}, values)


def _change(model: nn.Module, layer: str, leaves: dict[str, Tensor], config: dict[str, Any]) -> LayerChange:
    change = READERS[config["peft_type"]](layer_geometry(model, layer), Leaves(layer, leaves))
    rank, alpha = rank_and_alpha(config, layer, alpha="alpha")
    low_rank = config["peft_type"] == "LOHA" or "w2_b" in change.tensors
    if low_rank and change.rank != rank:
        raise wrong(f"{layer}: rank", f"{rank} as configured", change.rank)
    return replace(change, scale=alpha / rank)  # PEFT scales LoKr of whole matrices too, which LyCORIS does not
