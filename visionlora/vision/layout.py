"""How a network's kernels and images lie in memory: channels before positions, or behind them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from visionlora.core.norms import batch_norms

Layout = Literal["auto", "contiguous", "channels_last"]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def layout_for(net: nn.Module, layout: Layout, *, processes: int = 1) -> torch.memory_format:
    """Return how kernels and images should lie in memory while a network is trained.

    "auto" is channels_last for convolutional networks, known by their BatchNorm (docs/performance.md has the figures),
    and contiguous for others and for several processes: DDP warns of every 1 x 1 kernel, whose strides mean nothing.
    """
    if layout == "auto":
        return torch.channels_last if batch_norms(net) and processes == 1 else torch.contiguous_format
    return LAYOUTS[layout]


def laid_out(images: Tensor, layout: torch.memory_format) -> Tensor:
    """Return images, or maps of features, as a network of this layout wants them; other tensors as they are."""
    return images.contiguous(memory_format=layout) if images.ndim == 4 else images
