"""What the callbacks ask of a LightningModule that trains an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import nn


class Trainable(Protocol):
    """A LightningModule whose network is frozen but for an adapter (or trained in full)."""

    net: nn.Module
    """The network that carries the adapter."""

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters to train, by the name of their group: A, B, head, norm."""

    def save_adapter(self, directory: Path) -> None:
        """Write what is shipped to users to a directory, replacing what is there."""

    def fingerprint(self) -> str:
        """Return a hash of the base weights as they were before training."""
