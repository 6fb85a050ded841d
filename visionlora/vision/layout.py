"""How a network's kernels and images lie in memory: channels before positions, or behind them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from visionlora.config import did_you_mean
from visionlora.core.norms import batch_norms
from visionlora.errors import ConfigError

Layout = Literal["auto", "contiguous", "channels_last"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def set_layout(net: nn.Module, layout: Layout) -> torch.memory_format:
    """Change how the kernels of a network lie in memory, and return how its images should: the same numbers, faster.

    "auto" is channels_last for convolutional networks, known by their BatchNorm (docs/performance.md has the figures),
    and contiguous for others.
    """
    if layout not in ("auto", *LAYOUTS):
        near = did_you_mean(layout, ["auto", *LAYOUTS])
        raise ConfigError(f"memory_format must be auto, contiguous or channels_last, got {layout!r}{near}")
    chosen = layout if layout != "auto" else "channels_last" if batch_norms(net) else "contiguous"
    if chosen == "channels_last":
        net.to(memory_format=torch.channels_last)
    return LAYOUTS[chosen]


def laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Return images, or maps of features, as a network of this layout wants them; other tensors as they are."""
    return images.contiguous(memory_format=layout) if images.ndim == 4 else images
