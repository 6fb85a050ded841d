"""Run a layer of a known kind through the autograd functions, where they apply."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from visionlora.core.computed import computation
from visionlora.core.delta import Change, Delta
from visionlora.core.geometry import Geometry, materialisable, plain
from visionlora.core.maps import Op, autocast_dtype, compute_dtype
from visionlora.core.ops import ComputedOp, FrozenOp, LowRankOp, low_rank
from visionlora.core.orders import Order, choose
from visionlora.core.quantised import is_quantised, is_readable
from visionlora.core.quantised_op import QuantisedOp, quantised_linear

Active = Sequence[tuple[Change, float]]


def adapted_output(layer: nn.Module, x: Tensor, changes: Active, norm: Affine | None = None) -> Tensor | None:
    """Return the output of a layer of a known kind with changes of its weight, or None where only torch can tell.

    A norm that follows, given as its constant scale and shift for every channel, is folded in.
    """
    weight, recorded = layer._parameters["weight"], torch.is_grad_enabled()
    if is_quantised(weight):
        return _quantised(layer, x, changes)
    if not eager(x) or weight is None or weight.requires_grad or not _fits(x, weight):
        return None
    if not changes and not (recorded and x.requires_grad):
        return None
    op, x = _op_and_input(layer, x)
    deltas = [(change, strength) for change, strength in changes if isinstance(change, Delta)]
    if op is None or (op.dims and x.ndim != op.dims + 2) or len(deltas) != len(changes):
        return None
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    gain = None
    if norm is not None:
        gain, bias = norm.scale, norm.shift if bias is None else torch.addcmul(norm.shift, bias, norm.scale)
    if not deltas:
        return FrozenOp.apply(x, weight, bias, gain, op)  # type: ignore[no-any-return]
    canonical, factors = deltas[0][0].geometry.canonical(weight), _factors(deltas)
    if factors is None:
        return _computed(x, canonical, bias, deltas, gain, op)
    return _low_rank(x, canonical, bias, deltas[0][0].geometry, factors, gain, op)


class Affine(NamedTuple):
    """A constant scale and shift for every channel."""

    scale: Tensor
    shift: Tensor


def chosen_order(layer: nn.Module, x: Tensor, changes: Active, device: str, dtype: torch.dtype) -> Order | None:
    """Return the order a layer would take on this kind of device, None where its change is no product of factors."""
    deltas = [(change, strength) for change, strength in changes if isinstance(change, Delta)]
    factors = _factors(deltas)
    op, x = _op_and_input(layer, x)
    if op is None or factors is None:
        return None
    return _order(x, op, deltas[0][0].geometry, factors, device, dtype)


def _order(
    x: Tensor, op: Op, geometry: Geometry, factors: tuple[Tensor, Tensor, float], device: str, dtype: torch.dtype
) -> Order:
    A, B, _ = factors
    positions = x.shape[0] * prod(x.shape[2:]) if op.dims else x.shape[:-1].numel()
    for stride in op.stride:
        positions //= stride
    trained = torch.is_grad_enabled() and A.requires_grad
    return choose(geometry, B.shape[1], positions, device, dtype, frozen_A=not trained)


def eager(x: Tensor) -> bool:
    """Tell whether the autograd functions may run: a tracer or a transform would have to see through them."""
    return (
        plain(x)
        and x.is_floating_point()
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def _low_rank(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    factors: tuple[Tensor, Tensor, float],
    gain: Tensor | None,
    op: Op,
) -> Tensor:
    A, B, scale = factors
    dtype = compute_dtype(x)
    order = _order(x, op, geometry, factors, x.device.type, dtype)
    B = B.flatten(1)
    if torch.is_grad_enabled() and (x.requires_grad or A.requires_grad or B.requires_grad):
        return LowRankOp.apply(x, weight, bias, A, B, gain, scale, op, order)  # type: ignore[no-any-return]
    return low_rank(x.to(dtype), weight, bias, A, B, gain, scale, op, order)[0]


def _quantised(layer: nn.Module, x: Tensor, changes: Active) -> Tensor | None:
    deltas = [(change, strength) for change, strength in changes if isinstance(change, Delta)]
    factors = _factors(deltas) if deltas else (None, None, 1.0)
    weight: Any = layer._parameters["weight"]
    bias: Any = layer.bias
    if not eager(x) or not is_readable(layer) or factors is None or len(deltas) != len(changes):
        return None
    A, B, scale = factors
    trained = (x, A, B, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in trained):
        return QuantisedOp.apply(x, weight, bias, A, B, scale)  # type: ignore[no-any-return]
    return quantised_linear(x.to(compute_dtype(x)), weight, bias, A, B, scale)


def _computed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    deltas: list[tuple[Delta, float]],
    gain: Tensor | None,
    op: Op,
) -> Tensor | None:
    if not torch.is_grad_enabled():
        return None
    compute, tensors = computation(weight, deltas)
    return ComputedOp.apply(x, bias, gain, op, compute, *tensors)  # type: ignore[no-any-return]


def _factors(deltas: list[tuple[Delta, float]]) -> tuple[Tensor, Tensor, float] | None:
    """Return A, B and the scale of B @ A, several adapters' factors side by side; None where some have none."""
    found = [(delta.factors(), strength) for delta, strength in deltas]
    pairs = [(*factors, strength) for factors, strength in found if factors is not None]
    if len(pairs) != len(found):
        return None
    if len(pairs) == 1:
        A, B, scale, strength = pairs[0]
        return A, B, scale * strength
    if deltas[0][0].geometry.groups > 1:
        return None
    scaled = [B * (scale * strength) for _, B, scale, strength in pairs]
    return torch.cat([A for A, *_ in pairs]), torch.cat(scaled, dim=1), 1.0


def _fits(x: Tensor, weight: Tensor) -> bool:
    return materialisable(weight) and (x.dtype == weight.dtype or autocast_dtype(x.device.type) is not None)


def _op_and_input(layer: nn.Module, x: Tensor) -> tuple[Op | None, Tensor]:
    if not isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return None if isinstance(layer, nn.Embedding) or x.ndim < 2 else Op(), x
    dims, padding = len(layer.kernel_size), layer.padding
    if layer.padding_mode != "zeros":
        x, padding = F.pad(x, layer._reversed_padding_repeated_twice, layer.padding_mode), (0,) * dims
    elif isinstance(padding, str):
        sides = layer._reversed_padding_repeated_twice
        x, padding = F.pad(x, sides), (0,) * dims
    return Op(dims, tuple(layer.stride), tuple(padding), tuple(layer.dilation), layer.groups), x
