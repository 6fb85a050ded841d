"""Where gradients of activations begin on the floor: at the first adapted layers, and nowhere below."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.errors import TargetError


class Start(torch.autograd.Function):
    """A tensor that wants its gradient, made in place from one that does not.

    The gradient is looked at: torch.compile would drop a backward pass whose results nobody uses.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, switch: Tensor) -> Tensor:
        ctx.mark_dirty(out)  # neither a leaf nor a view: an in-place activation may follow
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad[(0,) * grad.ndim].float()


def start_gradients(model: nn.Module, layers: Iterable[str], inputs: tuple[Tensor, ...]) -> list[str]:
    """Change a frozen model in place so that gradients flow down to the given layers; return where they start.

    They start at every layer whose input depends on no other one of them. Raises TargetError where the model calls
    none of the layers in its forward pass.
    """
    switch = torch.zeros((), device=inputs[0].device, requires_grad=True)
    modules = {name: _owner(model, name) for name in layers}
    reached: list[str] = []
    trial = [m.register_forward_hook(partial(_try, switch, reached, name)) for name, m in modules.items()]
    model(*inputs)
    for hook in trial:
        hook.remove()
    if not reached:
        raise TargetError("the model calls none of the adapted layers in its forward pass: it has no floor")
    for name in dict.fromkeys(reached):
        modules[name].register_forward_hook(partial(_start, switch))
    return list(dict.fromkeys(reached))


def _owner(model: nn.Module, name: str) -> nn.Module:
    """Return the layer of that name, or the module that owns the parameter of that name."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return model.get_submodule(name.rpartition(".")[0])


def _try(switch: Tensor, reached: list[str], name: str, module: nn.Module, args: Any, out: Any) -> Any:
    if _first(out).requires_grad:
        return None
    reached.append(name)
    return _start(switch, module, args, out)


def _start(switch: Tensor, module: nn.Module, args: Any, out: Any) -> Any:
    started = Start.apply(_first(out), switch)
    return started if isinstance(out, Tensor) else (started, *out[1:])


def _first(out: Any) -> Tensor:
    first: Tensor = out if isinstance(out, Tensor) else out[0]
    return first
