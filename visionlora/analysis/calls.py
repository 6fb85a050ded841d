"""Which adapted layers a forward pass calls, with which sizes, and how each of them computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visionlora.analysis.cost import Way
from visionlora.analysis.layer import LayerCost, Setting
from visionlora.analysis.saved import Keeping
from visionlora.analysis.sizes import Sizes
from visionlora.core.attach import Adapted, Branched
from visionlora.core.delta import Delta
from visionlora.core.fast import chosen_order
from visionlora.core.geometry import Geometry
from visionlora.core.kept import keep
from visionlora.core.orders import forced
from visionlora.registry import adapted_layers


@dataclass(frozen=True)
class Call:
    """One call of an adapted layer, as it was seen."""

    name: str
    layer: Adapted
    sizes: Sizes
    way: Way
    saved: int
    """Bytes kept for the backward pass."""


class _Input(NamedTuple):
    size: int
    keeps: bool
    """Nobody else keeps it."""
    again: int
    """Numbers moved to compute it once more from what somebody else keeps."""
    needs_grad: bool


def adapted_weights(net: nn.Module) -> dict[str, Adapted]:
    """Return the layers with active changes of a tensor that a low-rank product can reach, by name."""
    return {
        name: layer
        for name, layer in adapted_layers(net).items()
        if any(isinstance(change, Delta) for changes in layer.running.values() for change, _ in changes)
    }


def watch(net: nn.Module, setting: Setting, keeping: Keeping) -> list[Call]:
    """Change a model for good: every call of an adapted layer is written down, and takes the order of the setting.

    Hooks would not do: a convolution with a hook is not folded with the norm behind it.
    """
    calls: list[Call] = []
    for name, layer in adapted_weights(net).items():
        if "weight" in layer.running and not isinstance(layer, nn.Embedding):
            layer.forward = _watched(name, layer, setting, keeping, calls)
    return calls


def layer_cost(call: Call, setting: Setting) -> LayerCost:
    """Return what a call costs."""
    deltas, geometry = _deltas(call.layer)
    change = (0, 0) if call.way not in ("computed", "materialised") else _change_flops(deltas, call.layer)
    return LayerCost(call.name, _what(call.layer, geometry), call.sizes, call.way, setting.itemsize, call.saved, change)


def _watched(name: str, layer: Adapted, setting: Setting, keeping: Keeping, calls: list[Call]) -> Callable[..., Tensor]:
    own = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given, before = _input(layer, x, setting, keeping), keeping.bytes
        with forced(setting.order):
            way = _way(layer, x, setting)
        with forced(way if way in ("factorised", "merged", "projected") else None):
            y: Tensor = own(x, *args, **kwargs)
        calls.append(Call(name, layer, _sizes(layer, given, y), way, keeping.bytes - before))
        return y

    return forward


def _input(layer: nn.Module, x: Tensor, setting: Setting, keeping: Keeping) -> _Input:
    size, grad = _padded(layer, x), x.requires_grad
    source = keep(x, x.dtype).tensors
    if size == x.numel() and not (len(source) == 1 and source[0] is x):
        return _Input(size, False, sum(t.numel() for t in source if t is not None) + size, grad)
    # padding and a change of type make a tensor that nobody else can keep
    fresh = size != x.numel() or (setting.dtype == "bf16" and x.dtype != setting.computed_in)
    return _Input(size, fresh or x not in keeping, 0, grad)


def _padded(layer: nn.Module, x: Tensor) -> int:
    """Return how many numbers the input has where the layer pads it itself, before it is multiplied."""
    if not isinstance(layer, nn.modules.conv._ConvNd) or not isinstance(layer, Branched):
        return x.numel()
    if layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return x.numel()
    sides = layer._reversed_padding_repeated_twice
    size = x.shape[0] * x.shape[1]
    for axis, length in enumerate(reversed(x.shape[2:])):
        size *= length + sides[2 * axis] + sides[2 * axis + 1]
    return size


def _deltas(layer: Adapted) -> tuple[list[Delta], Geometry]:
    deltas = [change for change, _ in layer.running["weight"] if isinstance(change, Delta)]
    return deltas, deltas[0].geometry


def _sizes(layer: Adapted, given: _Input, y: Tensor) -> Sizes:
    deltas, geometry = _deltas(layer)
    pairs = [pair for delta in deltas if (pair := delta.factors()) is not None]
    transposed = geometry.kind == "conv_transpose"
    return Sizes(
        positions=given.size // (geometry.in_ * geometry.groups) if transposed else y.numel() // geometry.out,
        out=geometry.out // geometry.groups if transposed else geometry.out,
        taps=geometry.taps * geometry.groups if transposed else geometry.taps,
        x=given.size,
        y=y.numel(),
        rank=sum(B.shape[1] for _, B, _ in pairs),
        groups=geometry.groups,
        conv=geometry.kind == "conv",
        trains_A=len(pairs) < len(deltas) or any(A.requires_grad for A, _, _ in pairs),
        needs_input=given.needs_grad,
        keeps_input=given.keeps,
        folded=hasattr(y, "normed_by"),
        again=given.again,
    )


def _way(layer: Adapted, x: Tensor, setting: Setting) -> Way:
    if not isinstance(layer, Branched):
        return "materialised"
    order = chosen_order(layer, x, layer.running["weight"], setting.device.partition(":")[0], setting.computed_in)
    return "computed" if order is None else order


def _change_flops(deltas: list[Delta], layer: Adapted) -> tuple[int, int]:
    """Return the FLOPs to form the changes, and to pull a gradient back through them."""
    weight = layer.base_tensor("weight")
    assert weight is not None
    base = deltas[0].geometry.canonical(weight).detach().float()
    with torch.enable_grad(), FlopCounterMode(display=False) as forming:
        total = sum((delta.change(base) for delta in deltas), torch.zeros_like(base))
    with FlopCounterMode(display=False) as pulling:
        torch.autograd.backward(total.sum())
    layer.zero_grad(set_to_none=True)
    return forming.get_total_flops(), pulling.get_total_flops()


def _what(layer: Adapted, geometry: Geometry) -> str:
    if not geometry.kernel:
        return f"linear {geometry.in_} -> {geometry.out}"
    kernel, stride = ("x".join(map(str, sizes)) for sizes in (geometry.kernel, layer.stride))  # type: ignore[arg-type]
    stepped = f" /{stride.partition('x')[0]}" if set(stride) - {"1", "x"} else ""
    grouped = f", {geometry.groups} groups" if geometry.groups > 1 else ""
    kind = "transposed conv" if geometry.kind == "conv_transpose" else "conv"
    return f"{kind} {kernel}{stepped}, {geometry.in_ * geometry.groups} -> {geometry.out}{grouped}"
