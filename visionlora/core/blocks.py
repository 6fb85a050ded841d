"""Blocks whose activations are computed again in the backward pass instead of kept."""

from __future__ import annotations

from torch import Tensor, nn

from visionlora.core.folding import fold_norms
from visionlora.errors import ConfigError


def checkpoint_blocks(model: nn.Module, example: Tensor) -> None:
    """Change a timm model in place: keep the inputs of its blocks alone, at the price of one more forward pass.

    Norms are folded now, by a pass over the example: found between a block's first run and its second, the second would
    not be the first again. Raises ConfigError where the model's own `set_grad_checkpointing` is missing or refuses.
    """
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        raise ConfigError(
            f"{type(model).__name__} has no set_grad_checkpointing; train it with grad_checkpointing false"
        )
    fold_norms(model, example)
    try:
        switch(True)
    except AssertionError as e:
        raise ConfigError(
            f"{type(model).__name__} cannot recompute its blocks ({e or 'not supported'}); "
            "train it with grad_checkpointing false"
        ) from None


def can_checkpoint(model: nn.Module) -> bool:
    """Tell whether a model can compute its blocks again, by asking it: a switch on and off."""
    switch = getattr(model, "set_grad_checkpointing", None)
    if switch is None:
        return False
    try:
        switch(True)
    except AssertionError:
        return False
    switch(False)
    return True
