"""Whether the base of a model can answer without an adapter."""

from __future__ import annotations

from torch import nn

from visionlora.core.attach import whole
from visionlora.merging import base_state_dict
from visionlora.targets import head_layers


def has_new_head(net: nn.Module) -> bool:
    """Tell whether the head was made anew, which starts it at zero: the weights knew other classes or none."""
    state = base_state_dict(net)
    heads = [state[key] for name in head_layers(net) for key in (f"{name}.weight",) if key in state]
    return bool(heads) and not bool(whole(heads[-1]).any())
