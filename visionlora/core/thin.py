"""A product of two thin matrices in place of a weight change: exactly, or the nearest one of a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Thin:
    """B @ A for each group of a layer: a change that is not formed."""

    B: Tensor
    """(groups, out / groups, r)"""
    A: Tensor
    """(groups, r, in * taps)"""

    @property
    def rank(self) -> int:
        return self.B.shape[2]

    def dense(self) -> Tensor:
        """Return the change as (groups, out / groups, in * taps)."""
        return self.B @ self.A

    def times(self, number: float) -> Thin:
        """Return a multiple of the change."""
        return Thin(number * self.B, self.A)

    def square(self) -> float:
        """Return the squared Frobenius norm of the change."""
        return float(((self.B.mT @ self.B) * (self.A @ self.A.mT)).sum())

    def widened(self, rank: int) -> Thin:
        """Return the same change at a larger rank, filled up with zeros."""
        more = rank - self.rank
        return Thin(torch.nn.functional.pad(self.B, (0, more)), torch.nn.functional.pad(self.A, (0, 0, 0, more)))


@dataclass(frozen=True)
class Cut:
    """What a truncation kept, and the squares of the singular values that tell what it lost."""

    factors: Thin
    dropped: float
    total: float


def joined(summands: Sequence[Thin]) -> Thin:
    """Return the sum of products as one product, exactly; the ranks add up."""
    return Thin(torch.cat([s.B for s in summands], dim=2), torch.cat([s.A for s in summands], dim=1))


def cut(change: Thin | Tensor, rank: int | None = None, *, noise: float | None = None) -> Cut:
    """Return the nearest change of at most this rank in every group (Eckart and Young 1936), without one all of it.

    A dense change is (groups, out / groups, in * taps). Singular values below the share `noise` of the largest are
    rounding and left out; by default those that torch.linalg.matrix_rank does not count either.
    """
    U, S, Vh = _svd(change)
    share = _rounding(S, change) if noise is None else noise
    own = max(1, int((share * S.max() < S).sum(dim=1).max()))
    r = own if rank is None else min(rank, own)
    root = S[:, :r].sqrt()
    factors = Thin(U[:, :, :r] * root.unsqueeze(1), root.unsqueeze(2) * Vh[:, :r])
    return Cut(factors, float(S[:, r:].square().sum()), float(S.square().sum()))


def _svd(change: Thin | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(change, Tensor):
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        return U, S, Vh
    # of thin factors: the small matrix between their orthonormal parts has the same singular values
    Q_out, R_out = torch.linalg.qr(change.B)
    Q_in, R_in = torch.linalg.qr(change.A.mT)
    U, S, Vh = torch.linalg.svd(R_out @ R_in.mT, full_matrices=False)
    return Q_out @ U, S, Vh @ Q_in.mT


def _rounding(S: Tensor, change: Thin | Tensor) -> float:
    sides = (change.B.shape[1], change.A.shape[2]) if isinstance(change, Thin) else change.shape[1:]
    return max(sides) * torch.finfo(S.dtype).eps
