"""A weight change as a product of two thin matrices: exactly, or the nearest one of a given rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Factors:
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

    def times(self, number: float) -> Factors:
        """Return a multiple of the change."""
        return Factors(number * self.B, self.A)

    def square(self) -> float:
        """Return the squared Frobenius norm of the change."""
        return float(((self.B.mT @ self.B) * (self.A @ self.A.mT)).sum())

    def widened(self, rank: int) -> Factors:
        """Return the same change at a larger rank, filled up with zeros."""
        more = rank - self.rank
        return Factors(torch.nn.functional.pad(self.B, (0, more)), torch.nn.functional.pad(self.A, (0, 0, 0, more)))


@dataclass(frozen=True)
class Cut:
    """What a truncation kept, and the squares of the singular values that tell what it lost."""

    factors: Factors
    dropped: float
    total: float


def joined(summands: Sequence[Factors]) -> Factors:
    """Return the sum of products as one product, exactly; the ranks add up."""
    return Factors(torch.cat([s.B for s in summands], dim=2), torch.cat([s.A for s in summands], dim=1))


def cut(change: Factors | Tensor, rank: int) -> Cut:
    """Return the nearest change of this rank in every group (Eckart and Young 1936); of its own rank, if that is lower.

    A dense change is (groups, out / groups, in * taps).
    """
    U, S, Vh = _svd(change)
    kept, root = S[:, :rank], S[:, :rank].sqrt()
    r = max(1, int((kept > _noise(S, change)).sum(dim=1).max()))
    factors = Factors(U[:, :, :r] * root[:, None, :r], root[:, :r, None] * Vh[:, :r])
    return Cut(factors, float(S[:, r:].square().sum()), float(S.square().sum()))


def _svd(change: Factors | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(change, Tensor):
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        return U, S, Vh
    # of thin factors: the small matrix between their orthonormal parts has the same singular values
    Q_out, R_out = torch.linalg.qr(change.B)
    Q_in, R_in = torch.linalg.qr(change.A.mT)
    U, S, Vh = torch.linalg.svd(R_out @ R_in.mT, full_matrices=False)
    return Q_out @ U, S, Vh @ Q_in.mT


def _noise(S: Tensor, change: Factors | Tensor) -> Tensor:
    """Return below which a singular value is rounding, as torch.linalg.matrix_rank counts."""
    sides = (change.B.shape[1], change.A.shape[2]) if isinstance(change, Factors) else change.shape[1:]
    return S.max() * max(sides) * torch.finfo(S.dtype).eps
