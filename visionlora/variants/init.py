"""Starting values: of A alone, written in place, or of A and B from the weight itself."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import torch
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


STARTS: dict[str, Callable[[Tensor], None]] = {
    "default": kaiming,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "eva": kaiming,  # until the data were seen
}
"""Name -> what fills the (r, in * kernel) rows of A of one group; B starts at zero."""


def principal(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """PiSSA: the largest singular components of the weight (Meng et al. 2024, arXiv:2404.02948)."""
    return _components(weight, slice(0, rank))


def minor(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """SoMA: the smallest ones, so that what the base knows stays put (Yun et al. 2025, arXiv:2412.04077)."""
    last = min(weight.shape)
    return _components(weight, slice(last - rank, last))


def triangular(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """OLoRA: the first orthonormal columns of a QR decomposition (Büyükakyüz 2024, arXiv:2406.01775)."""
    Q, R = torch.linalg.qr(weight)
    return Q[:, :rank], R[:rank]


def _components(weight: Tensor, which: slice) -> tuple[Tensor, Tensor]:
    U, S, V = torch.linalg.svd(weight, full_matrices=False)
    root = S[which].sqrt()
    return U[:, which] * root, root[:, None] * V[which]


SPLITS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "pissa": principal,
    "olora": triangular,
    "soma": minor,
}
"""Name -> (B, A) of the (out, in * kernel) weight of one group, whose product is trained in place of that part."""
