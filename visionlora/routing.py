"""Several adapters in one batch, one for each sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from visionlora.core.attach import Adapted
from visionlora.core.bank import routed
from visionlora.errors import StateError
from visionlora.registry import adapted_layers, check_known_name, registry_of
from visionlora.targets.heads import is_transformers


@contextmanager
def route(model: nn.Module, names: Sequence[str | None]) -> Iterator[nn.Module]:
    """Run each sample of a batch through its own adapter (None: the base) inside the with block.

    Weights, biases, statistics and heads are those of the sample's adapter at strength 1. A layer's own output is
    computed once for the whole batch where its adapters add to it (LoRA, DoRA), else for each adapter's samples. Where
    heads have different numbers of classes, the scores that a narrower one lacks are -inf. For prediction: it changes
    nothing of what is trained. Not for concurrent threads on one model.
    Raises StateError: no such adapter, another number of samples, a layer whose weight its owner reads (BEiT's qkv).

    >>> import torch
    >>> from visionlora import LoraConfig, apply_lora
    >>> net = nn.Sequential(nn.Linear(8, 8))
    >>> for camera in ("day", "night"):
    ...     _ = apply_lora(net, LoraConfig(r=2, target_modules=["0"]), name=camera)
    >>> with route(net, ["night", None, "day"]):
    ...     net(torch.ones(3, 8)).shape
    torch.Size([3, 8])
    """
    with route_all([model], names), _counted(model, len(names)):
        yield model


@contextmanager
def _counted(model: nn.Module, samples: int) -> Iterator[None]:
    """Refuse a batch of another size at the model's door; inside, windows of one sample lie behind each other."""

    def check(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if batch is not None and (not batch.ndim or len(batch) != samples):
            raise StateError(
                f"{samples} adapters are named, one a sample, and the batch has shape {tuple(batch.shape)}"
            )

    if is_transformers(model):  # beams of one text lie behind each other already here
        yield
        return
    hook = model.register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def route_all(models: Sequence[nn.Module], names: Sequence[str | None]) -> Iterator[None]:
    """Route like `route` over models that share layers, each with adapters of its own."""
    if isinstance(names, str) or not names:
        raise StateError(f"expected a list with the name of an adapter, or None, for each sample, got {names!r}")
    registries = [registry_of(model) for model in models]
    for name in {name for name in names if name is not None}:
        if not any(name in registry.plans for registry in registries):
            check_known_name(models[0], name)
    layers: dict[int, Adapted] = {id(m): m for model in models for m in adapted_layers(model).values()}
    with ExitStack() as stack:
        for registry in registries:
            registry.routed = True
            stack.callback(setattr, registry, "routed", False)
        stack.enter_context(routed(layers.values(), names))
        yield
