"""Read what PEFT saved for a bare model, also what only that model makes readable: PiSSA, OLoRA, grouped layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.core.geometry import Geometry
from visionlora.errors import AdapterFileError
from visionlora.io.formats.change import Imported, LayerChange
from visionlora.io.formats.layer import base_weight, known_layer, layer_geometry, own_value
from visionlora.io.formats.lycoris_layer import Leaves
from visionlora.io.formats.peft_products import READERS, read_products
from visionlora.io.formats.tensors import read_safetensors
from visionlora.io.header import open_inside
from visionlora.io.keys import PEFT, core_key
from visionlora.io.peft_config import MUTATED_STARTS, plan_from_peft
from visionlora.io.read import PEFT_CONFIG, WEIGHTS
from visionlora.io.strict import parse_object, wrong

_MAX_JSON = 8 << 20  # bytes
_WRAPPED = ".base_layer.weight"
_SLACK = 1e-3
"""Largest share of the weight by which the starting factors may differ between two machines' decompositions."""


def read_peft(model: nn.Module, source: Path) -> Imported:
    """Return the adapter of PEFT's folder for a bare model. Raises AdapterFileError where they do not fit."""
    path = source / WEIGHTS if source.is_dir() else source
    tensors = read_safetensors(path)
    config = _config(path.parent / PEFT_CONFIG)
    try:
        read = read_products if config.get("peft_type") in READERS else _imported
        return read(model, config, _relevant(model, tensors))
    except AdapterFileError as e:
        raise AdapterFileError(f"{path.parent}: {e}") from None


def _config(path: Path) -> dict[str, Any]:
    try:
        with open_inside(path) as file:
            text = file.read(_MAX_JSON + 1)
        if len(text) > _MAX_JSON:
            raise wrong("size", f"at most {_MAX_JSON} bytes", "more")
        return parse_object(text, path.name)
    except AdapterFileError as e:
        raise AdapterFileError(f"{path}: {e}") from None


def _relevant(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without step counters, second copies of saved biases and the table of an embedding."""
    found = {}
    for key, tensor in tensors.items():
        if not key.startswith(PEFT):
            raise wrong("a tensor name", f"{PEFT}<layer>.<tensor>", key)
        if key.endswith(_WRAPPED):  # PEFT saves the table itself beside an adapted input embedding
            _check_same(model, key.removeprefix(PEFT).removesuffix(_WRAPPED), tensor)
            continue
        twin = key.replace(".modules_to_save.", ".").replace(".original_module.", ".")
        if not key.endswith(".num_batches_tracked") and (twin == key or twin not in tensors):
            found[key] = tensor
    return found


def _check_same(model: nn.Module, layer: str, tensor: Tensor) -> None:
    base = own_value(model, known_layer(model, layer), "weight")
    if base.shape != tensor.shape or not torch.equal(base, tensor.to(base.dtype)):
        raise AdapterFileError(
            f"{layer}: the file brings the table it was trained on, and this model has another "
            f"({tuple(tensor.shape)} there, {tuple(base.shape)} here): resize or load that base first"
        )


def _imported(model: nn.Module, config: dict[str, Any], tensors: dict[str, Tensor]) -> Imported:
    start = config.get("init_lora_weights")
    mutated = start if isinstance(start, str) and start in MUTATED_STARTS else None
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    plan = plan_from_peft({**config, "init_lora_weights": True} if mutated else config, shapes)
    own: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in tensors.items():
        layer, attribute, leaf = core_key(key).split("/")
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        own.setdefault(known_layer(model, layer), {}).setdefault(attribute, {})[leaf] = wide
    layers, notes = {}, []
    for layer, entry in plan["layers"].items():
        change = _change(layer, layer_geometry(model, layer), own[layer]["weight"], entry)
        layers[layer] = change if mutated is None else _on_the_whole_base(model, layer, change, mutated)
    if mutated:
        notes.append(f"{mutated} had moved part of the base into the adapter; that part was taken out again, rank x 2")
    values = {n: {a: own[n][a]["value"] for a in attributes} for n, attributes in plan["values"].items()}
    return Imported(layers, values, notes)


def _change(layer: str, geo: Geometry, own: dict[str, Tensor], entry: dict[str, Any]) -> LayerChange:
    leaves, r, ones = Leaves(layer, own), entry["rank"], [1] * len(geo.kernel)
    if r % geo.groups:
        raise wrong(f"{layer}: rank", f"a multiple of its {geo.groups} groups", r)
    A = leaves.take("A", r, geo.in_ * geo.groups, *geo.kernel)
    B = leaves.take("B", geo.out, r // geo.groups, *ones)
    A = A if geo.groups == 1 else _own_channels(layer, geo, A)
    tensors = {"A": A, "B": B}
    if "m" not in own:
        return LayerChange("lora", r // geo.groups, entry["scale"], tensors)
    if geo.groups > 1:
        raise AdapterFileError(f"{layer}: DoRA of PEFT on a convolution of {geo.groups} groups has no counterpart here")
    if own["m"].numel() != geo.out:
        raise wrong(f"{layer}.lora_magnitude_vector", f"{geo.out} numbers", tuple(own["m"].shape))
    return LayerChange("dora", r, entry["scale"], {**tensors, "m": own["m"].flatten()})


def _own_channels(layer: str, geo: Geometry, A: Tensor) -> Tensor:
    """Return the channels that each group sees of a lora_A that sees all."""
    blocks = A.view(geo.groups, -1, geo.groups, geo.in_, *geo.kernel)
    every = torch.arange(geo.groups)
    own = blocks[every, :, every]
    if int(blocks.count_nonzero()) != int(own.count_nonzero()):
        raise AdapterFileError(
            f"{layer}: PEFT let every one of its {geo.groups} groups see the channels of all; no weight of this layer "
            "can do that, here or merged. Train it again without this layer, or with one group"
        )
    return own.reshape(-1, geo.in_, *geo.kernel)


def _on_the_whole_base(model: nn.Module, layer: str, change: LayerChange, start: str) -> LayerChange:
    """Return the change of the base as it is; the file's is one of the base without PEFT's starting factors."""
    geo, weight = layer_geometry(model, layer), base_weight(model, layer).double()
    if geo.kernel or (start == "olora" and geo.kind != "linear") or geo.kind == "embedding":
        raise AdapterFileError(f"{layer}: PEFT has no {start} for a {type(model.get_submodule(layer)).__name__}")
    r, A, B = change.rank, change.tensors["A"], change.tensors["B"]
    up, down = _pissa(layer, weight, r) if start == "pissa" else _olora(weight, r, change.scale)
    tensors = {"A": torch.cat([A, down.to(A.dtype)]), "B": torch.cat([B, (up / -change.scale).to(B.dtype)], dim=1)}
    return LayerChange(change.variant, 2 * r, change.scale, {**change.tensors, **tensors})


def _pissa(layer: str, weight: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the principal part of a weight as two factors (Meng et al. 2024, arXiv:2404.02948)."""
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    gap = float(S[r - 1] - S[r]) if r < len(S) else float(S[r - 1])
    if torch.finfo(torch.float32).eps * float(S[0]) > _SLACK * gap:
        raise AdapterFileError(
            f"{layer}: singular values {r} and {r + 1} of the base are so near that its principal part cannot be told "
            "again; convert in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    root = S[:r].sqrt()
    return U[:, :r] * root, root.unsqueeze(1) * V[:r]


def _olora(weight: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """Return the part of a weight that its first columns span, scaled (Buyukakyuz 2024, arXiv:2406.01775)."""
    Q, R = torch.linalg.qr(weight)
    return scale * Q[:, :r], R[:r]
