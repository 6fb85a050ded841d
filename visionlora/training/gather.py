"""Whole tensors out of a module that FSDP2 has sharded, and whole tensors back into its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from visionlora.core.attach import whole


def is_sharded(module: nn.Module) -> bool:
    """Tell whether every process holds only a part of the module, so that a forward pass needs all of them."""
    return any(isinstance(m, FSDPModule) for m in module.modules())


def reshard(module: nn.Module) -> None:
    """Change the module: its parameters are the stored parts again.

    After a forward pass without gradients FSDP2 leaves the outermost parameters gathered; what is written to those is
    lost, and what is written to the parts is not seen.
    """
    for inner in module.modules():
        if isinstance(inner, FSDPModule):
            inner.reshard()


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor, the same in every process, cut and placed as the other one is."""
    if not isinstance(other, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor, which may have no elements; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def fill(module: nn.Module, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
    """Change the module: load a state dict of whole tensors, or of parts as they are."""
    own: dict[str, Tensor] = module.state_dict()
    cut = {key: like(tensor, own[key]) if key in own else tensor for key, tensor in state.items()}
    module.load_state_dict(cut, strict=strict)


def gathered(value: Any) -> Any:
    """Return plain data with every tensor in it whole and on the CPU; every process must make the call."""
    if isinstance(value, Tensor):
        return whole(value.detach()).cpu()
    if isinstance(value, Mapping):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(gathered(item) for item in value)
    return value


@contextmanager
def whole_in_first_process(module: nn.Module) -> Iterator[None]:
    """Let the parameters of a sharded module be whole, on the CPU, in the first process, to be read and written.

    Every process must enter the block; inside it the module must not run.
    """
    reshard(module)
    parts: list[tuple[nn.Module, str, Any]] = [
        (owner, name, p)
        for owner in module.modules()
        for name, p in owner._parameters.items()
        if isinstance(p, DTensor)
    ]
    try:
        for owner, name, part in parts:
            tensor = whole(part.detach())
            if dist.get_rank() == 0:
                owner._parameters[name] = nn.Parameter(tensor.cpu(), requires_grad=part.requires_grad)
        yield
    finally:
        for owner, name, part in parts:
            owner._parameters[name] = part
