"""Which adapted layers a forward pass calls, with which sizes, and how each of them computes."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from visionlora.analysis.cost import Way
from visionlora.analysis.layer import LayerCost, Setting
from visionlora.analysis.sizes import Sizes
from visionlora.core.attach import Adapted, Branched
from visionlora.core.delta import Delta
from visionlora.core.geometry import Geometry
from visionlora.core.kept import keep
from visionlora.core.orders import choose, forced
from visionlora.registry import adapted_layers


class _Input(NamedTuple):
    x: Tensor
    keeps: bool
    """Nobody else keeps it."""
    again: int
    """Numbers moved to compute it once more from what somebody else keeps."""


def adapted_weights(net: nn.Module) -> dict[str, Adapted]:
    """Return the layers with active changes of a tensor that a low-rank product can reach, by name."""
    return {
        name: layer
        for name, layer in adapted_layers(net).items()
        if any(isinstance(change, Delta) for changes in layer.running.values() for change, _ in changes)
    }


def calls(net: nn.Module, images: Tensor, setting: Setting) -> list[LayerCost]:
    """Return every call of an adapted layer in one forward pass, in order."""
    seen: dict[str, _Input] = {}
    found: list[LayerCost] = []
    held: dict[int, Any] = {}
    """Storages kept for the backward pass: an input among them costs nothing."""

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        held.setdefault(storage._cdata, storage)
        return t

    def watch(name: str, layer: Adapted) -> list[Any]:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = _input(args[0], held)

        def after(_: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            found.append(_layer_cost(name, layer, seen.pop(name), y, setting))

        return [layer.register_forward_pre_hook(before), layer.register_forward_hook(after)]

    layers = {n: layer for n, layer in adapted_weights(net).items() if "weight" in layer.running}
    hooks = [
        hook for name, layer in layers.items() if not isinstance(layer, nn.Embedding) for hook in watch(name, layer)
    ]
    try:
        with torch.enable_grad(), saved_tensors_hooks(pack, lambda t: t):
            net(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _input(x: Tensor, held: dict[int, Any]) -> _Input:
    source = keep(x, x.dtype).tensors
    if len(source) == 1 and source[0] is x:
        return _Input(x, x.untyped_storage()._cdata not in held, 0)
    return _Input(x, False, sum(t.numel() for t in source if t is not None) + x.numel())


def _layer_cost(name: str, layer: Adapted, given: _Input, y: Tensor, setting: Setting) -> LayerCost:
    deltas = [(change, strength) for change, strength in layer.running["weight"] if isinstance(change, Delta)]
    geometry = deltas[0][0].geometry
    factors = [factors for delta, _ in deltas if (factors := delta.factors()) is not None]
    low_rank = isinstance(layer, Branched) and len(factors) == len(deltas)
    trains_A = not low_rank or any(A.requires_grad for A, _, _ in factors)
    rank = sum(B.shape[1] for _, B, _ in factors)
    transposed = geometry.kind == "conv_transpose"
    sizes = Sizes(
        positions=given.x.numel() // (geometry.in_ * geometry.groups) if transposed else y.numel() // geometry.out,
        out=geometry.out // geometry.groups if transposed else geometry.out,
        taps=geometry.taps * geometry.groups if transposed else geometry.taps,
        x=given.x.numel(),
        y=y.numel(),
        rank=rank,
        groups=geometry.groups,
        conv=geometry.kind == "conv",
        trains_A=trains_A,
        needs_input=given.x.requires_grad,
        keeps_input=given.keeps,
        again=given.again,
    )
    way = _way(layer, geometry, given.x, sizes, low_rank, setting)
    change = (0, 0) if low_rank else _change_flops([delta for delta, _ in deltas], layer)
    return LayerCost(name, _what(layer, geometry), sizes, way, setting.itemsize, change)


def _way(layer: Adapted, geometry: Geometry, x: Tensor, sizes: Sizes, low_rank: bool, setting: Setting) -> Way:
    if not isinstance(layer, Branched):
        return "materialised"
    if not low_rank:
        return "computed"
    # as core.fast counts them: of an odd-sized convolution they are not quite the positions of its output
    positions = x.shape[0] * prod(x.shape[2:]) if sizes.conv else x.shape[:-1].numel()
    for stride in layer.stride if sizes.conv else ():  # type: ignore[union-attr]
        positions //= stride
    with forced(setting.order):
        kind = setting.device.partition(":")[0]
        return choose(geometry, sizes.rank, positions, kind, setting.computed_in, frozen_A=not sizes.trains_A)


def _change_flops(deltas: list[Delta], layer: Adapted) -> tuple[int, int]:
    """Return the FLOPs to form the changes, and to pull a gradient back through them."""
    weight = layer.base_tensor("weight")
    assert weight is not None
    base = deltas[0].geometry.canonical(weight).detach().float()
    with torch.enable_grad(), FlopCounterMode(display=False) as forming:
        total = sum((delta.change(base) for delta in deltas), torch.zeros_like(base))
    with FlopCounterMode(display=False) as pulling:
        total.sum().backward()
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
