"""The thin gradients of a linear map, a part of the rows at a time: each row is read once, for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PART = 2**19
"""Numbers of x and g of one part: what is made of them stays in the cache of a core."""


class Rows:
    """The rows of an input x, formed from tensors that give it number by number and broadcast to it."""

    def __init__(self, again: Callable[..., Tensor], tensors: Sequence[Tensor | None], lead: torch.Size) -> None:
        """Lead is the shape of x without its features."""
        split = [t is not None and t.ndim > 1 for t in tensors]
        if all(t.shape[:-1] == lead for t, rows in zip(tensors, split, strict=True) if t is not None and rows):
            self.again = again
            self.tensors = [
                t.flatten(0, -2) if rows and t is not None else t for t, rows in zip(tensors, split, strict=True)
            ]
            self.split = split
        else:  # something broadcasts over rows: x is formed as a whole
            self.again, self.split = (lambda x: x), [True]
            self.tensors = [again(*tensors).flatten(0, -2)]

    @staticmethod
    def of(x: Tensor) -> Rows:
        """Return the rows of an x that is there, (rows, features)."""
        return Rows(lambda x: x, (x,), x.shape[:-1])

    def part(self, at: slice, dtype: torch.dtype) -> Tensor:
        """Return some rows, (rows, features)."""
        return self.again(
            *(t[at] if s and t is not None else t for t, s in zip(self.tensors, self.split, strict=True))
        ).to(dtype)

    def down(self, x: Tensor, A: Tensor, at: slice) -> Tensor:
        """Return x A' of a part."""
        return x @ A.t()

    def weighed(self, dz: Tensor, at: slice) -> Tensor:
        """Return what a part is multiplied with in place of dz."""
        return dz

    def finished(self, total: Tensor, dz: Tensor) -> Tensor:
        """Return dz' x, given the sum over parts of weighed' part."""
        return total


class NormalisedRows(Rows):
    """The output of a LayerNorm over the features, (x - mean) rstd w + b, which is never formed.

    What belongs to a row moves to the thin factor, what belongs to a feature comes out of the sum.
    """

    def __init__(self, tensors: Sequence[Tensor | None], lead: torch.Size) -> None:
        x, mean, rstd, self.weight, self.bias = tensors
        assert mean is not None
        assert rstd is not None
        super().__init__(lambda x: x, (x,), lead)
        self.mean, self.rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)

    def down(self, x: Tensor, A: Tensor, at: slice) -> Tensor:
        scaled = A if self.weight is None else A * self.weight
        z = (x @ scaled.t()).addcmul_(self.mean[at], scaled.sum(1), value=-1).mul_(self.rstd[at])
        return z if self.bias is None else z.add_((A * self.bias).sum(1))

    def weighed(self, dz: Tensor, at: slice) -> Tensor:
        return dz * self.rstd[at]

    def finished(self, total: Tensor, dz: Tensor) -> Tensor:
        total = total - (dz * self.rstd * self.mean).sum(0)[:, None]
        if self.weight is not None:
            total = total * self.weight
        return total if self.bias is None else total.addcmul_(dz.sum(0)[:, None], self.bias)


def thin_gradients(
    g: Tensor, x: Rows | None, z: Tensor | None, A: Tensor, B: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return dz = g B, dA = dz' x and dB = g' z of y = (x A') B', where wanted.

    g is (rows, out), A is (r, in), B is (out, r), and z = x A' is (rows, r) or, not given, formed from x.
    """
    wants_dz, wants_dA, wants_dB = needs
    size = max(1, PART // (A.shape[1] + B.shape[0])) if g.device.type == "cpu" else len(g)
    dz = g.new_empty(len(g), B.shape[1]) if wants_dz or wants_dA else None
    dA = g.new_zeros(A.shape) if wants_dA else None
    dB = g.new_zeros(B.shape[::-1]) if wants_dB else None
    for start in range(0, len(g), size):
        at = slice(start, start + size)
        here = x.part(at, g.dtype) if x is not None and (wants_dA or z is None) else None
        if dz is not None:
            torch.mm(g[at], B, out=dz[at])
        if dA is not None and x is not None and here is not None and dz is not None:
            dA.addmm_(x.weighed(dz[at], at).t(), here)
        if dB is not None:
            thin = z[at] if z is not None else x.down(here, A, at)  # type: ignore[union-attr, arg-type]
            dB.addmm_(thin.t(), g[at])  # few rows, not columns: half the time
    if dA is not None and x is not None and dz is not None:
        dA = x.finished(dA, dz)
    return dz, dA, None if dB is None else dB.t()
