"""Starting values of A, written in place on the (r, in * kernel) rows of one group; B starts at zero."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

from torch import Tensor, nn


def kaiming(rows: Tensor) -> None:
    """Kaiming uniform with a = sqrt(5), the starting value of nn.Linear and of PEFT's LoRA."""
    nn.init.kaiming_uniform_(rows, a=sqrt(5))


def gaussian(rows: Tensor) -> None:
    """Normal with variance 1 / r, the starting value of Hu et al. 2021, section 4.1."""
    nn.init.normal_(rows, std=1 / sqrt(len(rows)))


def orthogonal(rows: Tensor) -> None:
    """Orthonormal rows: no direction of the rank is spent twice."""
    nn.init.orthogonal_(rows)


STARTS: dict[str, Callable[[Tensor], None]] = {"default": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}
