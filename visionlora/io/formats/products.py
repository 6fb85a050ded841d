"""Hadamard and Kronecker products of thin matrices as one thin product, without forming the weight they change."""

from __future__ import annotations

import torch
from torch import Tensor

from visionlora.core.delta import Delta
from visionlora.core.thin import Thin, cut
from visionlora.variants.loha import LoHa
from visionlora.variants.lokr import LoKr

NUMERIC = 1e-10
"""Singular values below this share of the largest are rounding of the float32 factors."""


def thin(delta: Delta) -> Thin | None:
    """Return what a change is without its scale, in float64, or None where it has no thin factors."""
    if delta.geometry.groups > 1:
        return None
    with torch.no_grad():
        if isinstance(delta, LoHa) and delta.rank**2 <= delta.geometry.max_rank:
            return _hadamard(*(factor.double() for factor in (delta.w1_a, delta.w1_b, delta.w2_a, delta.w2_b)))
        if isinstance(delta, LoKr):
            w2 = delta.w2.double() if delta.w2 is not None else delta.w2_a.double() @ delta.w2_b.double()
            return _kronecker(delta.w1.double(), w2.flatten(1))
    return None


def _hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Thin:
    # an entry is a sum over i times a sum over j: one sum over all pairs (i, j)
    B, A = (a1.unsqueeze(2) * a2.unsqueeze(1)).flatten(1), (b1.unsqueeze(1) * b2.unsqueeze(0)).flatten(0, 1)
    return Thin(B.unsqueeze(0), A.unsqueeze(0))


def _kronecker(w1: Tensor, w2: Tensor) -> Thin:
    one, two = (cut(matrix.unsqueeze(0), noise=NUMERIC).factors for matrix in (w1, w2))
    return Thin(torch.kron(one.B, two.B), torch.kron(one.A, two.A))
