"""Read the .pt files of Microsoft's loralib: Linear, Embedding, MergedLinear and the convolutions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from visionlora.config import did_you_mean
from visionlora.core.geometry import Geometry
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.io.formats.change import Imported, LayerChange
from visionlora.io.formats.factors import decompose
from visionlora.io.formats.layer import layer_geometry, own_value
from visionlora.io.formats.tensors import read_torch
from visionlora.io.strict import short, wrong

A, B = ".lora_A", ".lora_B"
PARTS = {2: ("k", "v"), 3: ("q", "k", "v")}
"""What the equal blocks of rows of a fused layer are called here, by their number."""
BIASES = (".conv.bias", ".bias")
"""Endings of a bias; loralib keeps a convolution, and so its bias, one level deeper."""


def looks_like_loralib(keys: list[str]) -> bool:
    """Tell whether tensors of these names are of this format."""
    return any(key.endswith(A) for key in keys) and any(key.endswith(B) for key in keys)


def read_loralib(model: nn.Module, path: Path, *, alpha: float, parts: tuple[str, ...] = ()) -> Imported:
    """Return the adapter of a file for a bare model.

    The file does not hold lora_alpha, the scale being alpha / r, nor which parts of a fused layer MergedLinear changed
    (`parts`: q and v, say). Raises AdapterFileError where file and model do not fit.
    """
    tensors = read_torch(path)
    try:
        return _imported(model, {k.removeprefix("module."): t for k, t in tensors.items()}, alpha, parts)
    except AdapterFileError as e:
        raise AdapterFileError(f"{path}: {e}") from None


def _imported(model: nn.Module, tensors: dict[str, Tensor], alpha: float, parts: tuple[str, ...]) -> Imported:
    names, left = dict(model.named_modules()), dict(tensors)
    layers, values = {}, {}  # type: dict[str, LayerChange], dict[str, dict[str, Tensor]]
    for key in [k for k in tensors if k.endswith(A)]:
        layer = key.removesuffix(A)
        down, up = left.pop(key), left.pop(layer + B, None)
        if layer not in names:
            near = did_you_mean(layer, list(names))
            raise AdapterFileError(f"{type(model).__name__} has no layer {short(layer)}, the file has one{near}")
        if up is None or up.ndim != 2 or down.ndim != 2:
            raise AdapterFileError(f"{layer}: expected the matrices lora_A and lora_B, found {_sizes(down, up)}")
        layers[layer] = _change(layer, layer_geometry(model, layer), _wide(down), _wide(up), alpha, parts)
    for key, tensor in left.items():
        ending = next((e for e in BIASES if key.endswith(e) and key.removesuffix(e) in names), None)
        if ending is None:
            raise AdapterFileError(
                f"{short(key)}: expected lora_A, lora_B and biases of layers of {type(model).__name__}; "
                "save the adapter alone: torch.save(loralib.lora_state_dict(model), path)"
            )
        layer = key.removesuffix(ending)
        own_value(model, layer, "bias")
        values[layer] = {"bias": _wide(tensor)}
    return Imported(layers, values)


def _change(layer: str, geo: Geometry, down: Tensor, up: Tensor, alpha: float, parts: tuple[str, ...]) -> LayerChange:
    if geo.kind == "conv":
        return _convolution(layer, geo, down, up, alpha)
    r = up.shape[1]
    if down.shape[1] != geo.in_ or len(down) % r or geo.out % (len(up) // (len(down) // r) or 1):
        raise wrong(
            f"{layer}: lora_A and lora_B", f"sizes for {geo.in_} inputs and {geo.out} outputs", _sizes(down, up)
        )
    if len(down) == r and len(up) == geo.out:
        return LayerChange("lora", r, alpha / r, {"A": down, "B": up})
    return _merged(layer, geo, down, up, alpha, parts)


def _merged(layer: str, geo: Geometry, down: Tensor, up: Tensor, alpha: float, parts: tuple[str, ...]) -> LayerChange:
    """Return the parts of a fused layer: loralib runs them as one convolution with a group for each."""
    r = up.shape[1]
    count, size = len(down) // r, len(up) // (len(down) // r)
    blocks = geo.out // size
    every = PARTS.get(blocks) or tuple(f"part{i}" for i in range(blocks))
    chosen = tuple(p for p in every if p in parts) if parts else every
    unknown = [p for p in parts if p not in every]
    if unknown or len(chosen) != count:
        raise ConfigError(
            f"{layer}: the file changes {count} of the {len(every)} parts {', '.join(every)} and does not say which; "
            f"name them as enable_lora did: --parts {','.join(every[:count])}"
        )
    tensors = {}
    for i, part in enumerate(chosen):
        tensors[f"deltas.{part}.A"] = down[i * r : (i + 1) * r]
        tensors[f"deltas.{part}.B"] = up[i * size : (i + 1) * size]
    rows = {part: (every.index(part) * size, (every.index(part) + 1) * size) for part in chosen}
    return LayerChange("lora", r, alpha / r, tensors, rows)


def _convolution(layer: str, geo: Geometry, down: Tensor, up: Tensor, alpha: float) -> LayerChange:
    """Return LoRA of another rank: loralib reads B @ A, of k * out rows and k * in columns, as the kernel itself."""
    k = geo.kernel[0]
    rows, columns = geo.out // geo.groups * k, geo.in_ * geo.groups * k
    r, over = divmod(len(down), k)
    fits = len(down) == up.shape[1] and down.shape[1] == columns and len(up) == rows
    if over or not fits or rows * columns != geo.out * geo.taps:
        raise wrong(f"{layer}: lora_A and lora_B", f"({k} * r, {columns}) and ({rows}, {k} * r)", _sizes(down, up))
    if geo.groups == 1 and r * k * k <= geo.max_rank:
        # a row of the kernel is k rows of B @ A side by side: k copies of A, each with its own column block of B
        A = torch.block_diag(*[down] * k).view(r * k * k, *geo.shape[1:])  # type: ignore[no-untyped-call]
        B = up.view(geo.out, r * k * k, *[1] * len(geo.kernel))
        return LayerChange("lora", r * k * k, alpha / r, {"A": A, "B": B})
    found = decompose(geo, (up.double() @ down.double()).view(geo.shape))
    return LayerChange("lora", found.rank, alpha / r, {"A": found.A, "B": found.B})


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sizes(*tensors: Tensor | None) -> str:
    return " and ".join("none" if t is None else str(tuple(t.shape)) for t in tensors)
