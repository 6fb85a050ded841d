"""Kronecker factors of a file in the sizes and the one decompose_factor of our own LoKr."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from visionlora.config import LoraConfig
from visionlora.core.geometry import Geometry
from visionlora.io.formats.change import LayerChange
from visionlora.variants import VARIANTS


def common_factor(layers: dict[str, LayerChange], geometries: dict[str, Geometry]) -> int | None:
    """Return the decompose_factor at which our w1 has the file's sizes in every layer, or None."""
    sides = {side for change in layers.values() for side in change.tensors["w1"].shape}
    for factor in (-1, *sorted(sides)):
        if all(_w1_shape(geometries[n], factor) == c.tensors["w1"].shape for n, c in layers.items()):
            return factor
    return None


def promoted(change: LayerChange, geometry: Geometry) -> LayerChange:
    """Return a change whose w2 is in full or low-rank as our LoKr of its rank has it, multiplied out where needed."""
    w1, tensors = change.tensors["w1"], change.tensors
    rows, columns = geometry.out // w1.shape[0], geometry.taps // w1.shape[1]
    full_from = ceil(rows * columns / (rows + columns))  # the rank at which factors no longer are a saving
    if "w2" in tensors:
        return replace(change, rank=max(change.rank, full_from))
    if change.rank < full_from:
        return change
    w2 = (tensors["w2_a"].double() @ tensors["w2_b"].double()).to(w1.dtype)
    block = (rows, geometry.in_ // w1.shape[1], *geometry.kernel)
    return replace(change, tensors={"w1": w1, "w2": w2.reshape(block)})


def kronecker(change: LayerChange, geometry: Geometry) -> Tensor:
    """Return the whole change in float64, whatever sizes its factors have."""
    w1, tensors = change.tensors["w1"].double(), {key: t.double() for key, t in change.tensors.items()}
    w2 = tensors["w2"] if "w2" in tensors else tensors["w2_a"] @ tensors["w2_b"]
    w2 = w2.reshape(geometry.out // w1.shape[0], geometry.in_ // w1.shape[1], *geometry.kernel)
    return change.scale * torch.kron(w1.view(*w1.shape, *[1] * len(geometry.kernel)), w2)


def _w1_shape(geometry: Geometry, factor: int) -> torch.Size:
    config = LoraConfig(r=1, variant="lokr", decompose_factor=factor)
    like = torch.empty(geometry.shape, device="meta")
    w1: Tensor = VARIANTS["lokr"](geometry, like, 1, 1.0, config).state_dict()["w1"]
    return w1.shape
