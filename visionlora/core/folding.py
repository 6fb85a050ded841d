"""Find the convolutions whose output goes through one frozen BatchNorm and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.core.attach import Branched, cuda_devices, is_fully_sharded
from visionlora.core.norms import FrozenNorm

_Calls = dict[Any, list[tuple[Tensor, Any]]]
"""Layer -> the tensor of each call, and the node that had made it at that moment."""


def fold_when_trained(model: nn.Module) -> None:
    """Change the model in place: before its first training pass it makes one like it, to find the norms to fold.

    So every step of a run, and the first one after a resume, is computed alike. Random numbers are drawn as if that
    pass had not been. Not under FSDP2, where no norm is folded.
    """
    if _before_training not in model._forward_pre_hooks.values() and all(_layers(model)):
        model.register_forward_pre_hook(_before_training, with_kwargs=True)


def fold_norms(model: nn.Module, example: Tensor) -> int:
    """Change the model in place: let training fold every such norm into the convolution before it; return their number.

    One forward pass on the example, in eval mode with gradients recorded, shows which tensor a norm reads; autograd's
    graph of that pass shows that nothing else reads it. It changes what a training step costs; in eval mode no bit of
    the output changes.
    """
    forget_folding(model)
    with _eval(model), torch.enable_grad():
        return _look(model, (example,), {})


def forget_folding(model: nn.Module) -> None:
    """Change the model in place: no norm is folded, and none will be."""
    for conv in _layers(model)[0]:
        conv.followed = ()
    _drop_hook(model)


def _before_training(model: nn.Module, args: Any, kwargs: Any) -> None:
    if torch.compiler.is_compiling() or not (model.training and torch.is_grad_enabled()):
        return
    _drop_hook(model)
    if any(is_fully_sharded(module) for module in model.modules()):  # a pass inside a pass would shard its weights
        return
    with torch.random.fork_rng(cuda_devices(model)):
        _look(model, args, kwargs)


def _look(model: nn.Module, args: Any, kwargs: Any) -> int:
    watch = _Watch(model)
    try:
        return watch.fold(model(*args, **kwargs))
    finally:
        watch.stop()


def _drop_hook(model: nn.Module) -> None:
    for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _before_training]:
        del model._forward_pre_hooks[key]
        model._forward_pre_hooks_with_kwargs.pop(key, None)


def _layers(model: nn.Module) -> tuple[Sequence[Branched], Sequence[FrozenNorm]]:
    branched = [m for m in model.modules() if isinstance(m, Branched)]
    convs = [m for m in branched if isinstance(m, nn.modules.conv._ConvNd)]
    return convs, [m for m in model.modules() if isinstance(m, FrozenNorm)]


class _Watch:
    """What the convolutions made and the norms read in one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.made: _Calls = {}
        self.read: _Calls = {}
        convs, norms = _layers(model)
        self.hooks = [conv.register_forward_hook(self._after) for conv in convs]
        self.hooks += [norm.register_forward_pre_hook(self._before) for norm in norms]

    def _after(self, conv: nn.Module, _: Any, out: Tensor) -> None:
        self.made.setdefault(conv, []).append((out, out.grad_fn))

    def _before(self, norm: nn.Module, args: tuple[Tensor]) -> None:
        self.read.setdefault(norm, []).append((args[0], args[0].grad_fn))

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def fold(self, outputs: Any) -> int:
        """Let every norm that alone reads a convolution be folded into it; return their number."""
        uses = _uses(outputs)
        once = {id(calls[0][0]): (conv, calls[0][1]) for conv, calls in self.made.items() if len(calls) == 1}
        folded = 0
        for norm, calls in self.read.items():
            conv, made = once.get(id(calls[0][0]), (None, None)) if len(calls) == 1 else (None, None)
            if conv is not None and _alone(calls[0][1], made, uses):
                conv.followed = (norm,)
                folded += 1
        return folded


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
