"""Work of one forward and backward pass as PyTorch's operations see it: their number, bytes moved, multiplications.

It is counted on tensors with numbers or without (FakeTensor) alike.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

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


_IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
"""Products that PyTorch's registry of FLOPs leaves out."""


class Operation(NamedTuple):
    """One operation that is no view and no allocation."""

    name: str
    flops: int
    """Of products and convolutions: two for each multiplication and addition."""
    moved_bytes: int
    """Tensors read plus tensors written, each whole."""


@dataclass
class Work:
    """What operations did."""

    each: list[Operation] = field(default_factory=list)
    peak_bytes: int = 0
    """The most that results of operations took at once; not what an operation needs inside."""

    @property
    def operations(self) -> int:
        return len(self.each)

    @property
    def moved_bytes(self) -> int:
        return sum(operation.moved_bytes for operation in self.each)

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.each)


def work(forward: Callable[[], Tensor]) -> Work:
    """Return the work of a forward and backward pass."""
    counting = _Counting()
    with counting:
        torch.autograd.backward(forward())
    return counting.work


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.work = Work()
        self._live: dict[int, int] = {}
        """Bytes of results that are still held, by the address of their storage."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        body = _body(func)
        if body is not None:  # an operation written in Python: count what it is made of
            with self:
                return body(*args, **kwargs)
        out = func(*args, **kwargs)
        self._note(_tensors((args, kwargs)), _tensors(out))
        moved = _moved(func, args, kwargs, out)
        if moved:
            self.work.each.append(Operation(func._opname, _flops(func, args, kwargs, out), moved))
        return out

    def _note(self, inputs: Iterator[Tensor], outputs: Iterator[Tensor]) -> None:
        known = {_address(t) for t in inputs}
        for t in outputs:
            storage, address = t.untyped_storage(), _address(t)
            if address not in known and address not in self._live:
                self._live[address] = storage.nbytes()
                weakref.finalize(storage, self._live.pop, address, None)
        self.work.peak_bytes = max(self.work.peak_bytes, sum(self._live.values()))


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
    formula = flop_registry.get(_IN_PLACE.get(packet, packet))
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _convolution_backward_flops(args: Any) -> int:
    # PyTorch's own formula takes a grouped weight gradient for a dense one: 21 times too much for EfficientNet-B0
    grad, x, weight, transposed, (for_x, for_weight, _) = args[0], args[1], args[2], args[7], args[10]
    positions = x if transposed else grad
    forward: int = 2 * positions.shape[0] * prod(positions.shape[2:]) * weight.numel()
    return forward * (int(for_x) + int(for_weight))


def _distinct(tensors: list[Tensor]) -> list[Tensor]:
    return list({(_address(t), t.storage_offset(), t.shape, t.stride()): t for t in tensors}.values())


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _size(t: Tensor) -> int:
    return min(t.numel() * t.element_size(), t.untyped_storage().nbytes())  # an expanded tensor is read once


def _address(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)  # tensors without numbers have no data_ptr
