"""Work of one forward and backward pass as PyTorch's operations see it: their number, bytes moved, multiplications."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

_ALLOCATE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
"""They move nothing."""
_UNREAD = {"zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_zeros", "new_ones", "new_full"}
_UNREAD |= {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_"}
"""Their first tensor gives a shape or is overwritten, and is not read."""


@dataclass
class Work:
    """What operations did. Views and allocations are not operations."""

    operations: int = 0
    moved_bytes: int = 0
    """Tensors read plus tensors written, each whole, by every operation."""
    flops: int = 0
    """Of products and convolutions: two for each multiplication and addition."""


def work(forward: Callable[[], Tensor]) -> Work:
    """Return the work of a forward and backward pass."""
    with _Counting() as counting:
        forward().backward()
    return counting.work


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        body = _body(func)
        if body is not None:  # an operation written in Python: count what it is made of
            with self:
                return body(*args, **kwargs)
        out = func(*args, **kwargs)
        moved = _moved(func, args, kwargs, out)
        if moved:
            self.work.operations += 1
            self.work.moved_bytes += moved
            self.work.flops += _flops(func, args, kwargs, out)
        return out


def _body(func: Any) -> Callable[..., Any] | None:
    if func.namespace in ("aten", "prims", "prim", "torchvision"):
        return None
    operator = OPDEFS.get(f"{func.namespace}::{func._opname}")
    return None if operator is None else operator._init_fn


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    name = func._schema.name.partition("::")[2]
    if name in _ALLOCATE:
        return 0
    inputs, outputs = list(_tensors((args, kwargs))), list(_tensors(out))
    mutated = list(_mutated(func, args, kwargs))
    known = {_address(t) for t in inputs}
    written = mutated + [t for t in outputs if _address(t) not in known]
    if not written:  # a view
        return 0
    read = _read(func, args, inputs[1:] if name in _UNREAD else inputs)
    return sum(_size(t) for t in _distinct(read)) + sum(_size(t) for t in _distinct(written))


def _read(func: Any, args: Any, inputs: list[Tensor]) -> list[Tensor]:
    if func._overloadpacket is not aten.convolution_backward:
        return inputs
    (grad, x, weight), (for_x, for_weight, _) = args[:3], args[10]
    return [grad, *([x] if for_weight else []), *([weight] if for_x else [])]


def _mutated(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[position] if position < len(args) else kwargs.get(argument.name))


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    if packet is aten.convolution_backward:
        return _convolution_backward_flops(args)
    formula = flop_registry.get(packet)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _convolution_backward_flops(args: Any) -> int:
    # PyTorch's own formula takes a grouped weight gradient for a dense one: 21 times too much for EfficientNet-B0
    grad, x, weight, transposed, (for_x, for_weight, _) = args[0], args[1], args[2], args[7], args[10]
    positions = x if transposed else grad
    forward = 2 * positions.shape[0] * prod(positions.shape[2:]) * weight.numel()
    return forward * (int(for_x) + int(for_weight))


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({(_address(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _size(t: Tensor) -> int:
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())  # an expanded tensor is read once


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
