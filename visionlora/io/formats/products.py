"""Hadamard and Kronecker products of thin matrices as one thin product, without forming the weight they change."""

from __future__ import annotations

import torch
from torch import Tensor

from visionlora.core.delta import Delta
from visionlora.variants.loha import LoHa
from visionlora.variants.lokr import LoKr

NUMERIC = 1e-10
"""Singular values below this share of the largest are rounding of the float32 factors."""


def thin(delta: Delta) -> tuple[Tensor, Tensor] | None:
    """Return B (out, r) and A (r, in * taps) with change = scale * B @ A in float64, or None where there are none."""
    if delta.geometry.groups > 1:
        return None
    with torch.no_grad():
        if isinstance(delta, LoHa) and delta.rank**2 <= delta.geometry.max_rank:
            return _hadamard(*(factor.double() for factor in (delta.w1_a, delta.w1_b, delta.w2_a, delta.w2_b)))
        if isinstance(delta, LoKr):
            w2 = delta.w2.double() if delta.w2 is not None else delta.w2_a.double() @ delta.w2_b.double()
            return _kronecker(delta.w1.double(), w2.flatten(1))
    return None


def _hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    # an entry is a sum over i times a sum over j: one sum over all pairs (i, j)
    return (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1), (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)


def _kronecker(w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
    (B1, A1), (B2, A2) = _split(w1), _split(w2)
    return torch.kron(B1, B2), torch.kron(A1, A2)


def _split(matrix: Tensor) -> tuple[Tensor, Tensor]:
    U, S, V = torch.linalg.svd(matrix, full_matrices=False)
    r = max(1, int((NUMERIC * S.max() < S).sum()))
    root = S[:r].sqrt()
    return U[:, :r] * root, root.unsqueeze(1) * V[:r]
