"""Bytes that autograd keeps from a forward pass for the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class Keeping(saved_tensors_hooks):
    """Watch what is kept inside the with block, beyond the owned tensors: parameters, buffers, inputs.

    A storage counts once and whole, however many views of it are kept. Works on tensors without numbers too.
    """

    def __init__(self, owned: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, _itself)
        self._own = {_address(t): t for t in owned}
        self._kept: dict[int, Any] = {}
        """Held inside the block, so that no address is used twice, and let go behind it."""
        self.bytes = 0

    def __exit__(self, *args: object) -> None:
        super().__exit__(*args)
        self._kept.clear()

    def __contains__(self, t: Tensor) -> bool:
        """Tell whether a tensor is kept already, or owned."""
        return _address(t) in self._kept or _address(t) in self._own

    def _pack(self, t: Tensor) -> Tensor:
        if t not in self:
            storage = self._kept[_address(t)] = t.untyped_storage()
            self.bytes += storage.nbytes()
        return t


def _itself(t: Tensor) -> Tensor:
    return t


def _address(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)
