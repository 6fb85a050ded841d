"""Count what a forward pass keeps for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Return the bytes of all distinct storages that autograd keeps, without parameters, buffers and the input."""
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = net(x)
    own = {t.untyped_storage().data_ptr() for t in (*net.parameters(), *net.buffers(), x)}
    del y
    return sum(size for at, size in seen.items() if at not in own)
