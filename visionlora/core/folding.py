"""Find the convolutions whose output goes through one frozen BatchNorm and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.core.attach import Branched
from visionlora.core.norms import FrozenNorm

_Calls = dict[Any, list[tuple[Tensor, Any]]]
"""Layer -> the tensor of each call, and the node that had made it at that moment."""


def fold_norms(model: nn.Module, example: Tensor | None = None) -> int:
    """Change the model in place: let training fold every such norm into the convolution before it; return their number.

    One forward pass on the example, in eval mode with gradients recorded, shows which tensor a norm reads; autograd's
    graph of that pass shows that nothing else reads it. Without an example, zeros of the size a timm model names are
    taken (apply_lora does so). It changes what a training step costs; in eval mode no bit of the output changes.
    """
    convs = {
        n: m for n, m in model.named_modules() if isinstance(m, Branched) and isinstance(m, nn.modules.conv._ConvNd)
    }
    norms = [m for m in model.modules() if isinstance(m, FrozenNorm)]
    for conv in convs.values():
        conv.followed = ()
    example = _small_input(model) if example is None and convs and norms else example
    if not convs or not norms or example is None:
        return 0
    with _eval(model), torch.enable_grad(), _watched(convs.values(), norms) as (made, read):
        outputs = model(example)
        uses = _uses(outputs)
        found = [
            (conv, norm)
            for norm, calls in read.items()
            if len(calls) == 1
            for conv, outs in made.items()
            if len(outs) == 1 and calls[0][0] is outs[0][0] and _alone(calls[0][1], outs[0][1], uses)
        ]
    for conv, norm in found:
        conv.followed = (norm,)
    return len(found)


def _small_input(model: nn.Module) -> Tensor | None:
    settings = getattr(model, "pretrained_cfg", None)
    first = next(model.parameters())
    if not settings or "input_size" not in settings or first.is_meta or not first.is_floating_point():
        return None
    channels, *size = settings["input_size"]
    size = size if settings.get("fixed_input_size") else [max(64, side // 4) for side in size]
    return torch.zeros(1, channels, *size, dtype=first.dtype, device=first.device)


@contextmanager
def _watched(convs: Any, norms: Any) -> Iterator[tuple[_Calls, _Calls]]:
    made: _Calls = {}
    read: _Calls = {}
    hooks = [
        c.register_forward_hook(lambda m, _, out: made.setdefault(m, []).append((out, out.grad_fn))) for c in convs
    ]
    hooks += [
        n.register_forward_pre_hook(lambda m, x: read.setdefault(m, []).append((x[0], x[0].grad_fn))) for n in norms
    ]
    try:
        yield made, read
    finally:
        for hook in hooks:
            hook.remove()


def _uses(outputs: Any) -> Counter[Any]:
    """Return how many times each node of the graph is read, by other nodes or as an output."""
    start = [t.grad_fn for t in _tensors(outputs) if t.grad_fn is not None]
    uses, seen, todo = Counter(start), set(start), list(start)
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is not None:
                uses[node] += 1
                if node not in seen:
                    seen.add(node)
                    todo.append(node)
    return uses


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, (list, tuple)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


@contextmanager
def _eval(model: nn.Module) -> Iterator[None]:
    modes = {m: m.__dict__["training"] for m in model.modules()}  # a FrozenNorm shows another flag than it was given
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _alone(read: Any, made: Any, uses: Counter[Any]) -> bool:
    return made is not None and read is made and uses[made] == 1  # not the same node: changed in place between the two
