"""What to keep of an input for the backward pass: itself, or the tensors autograd holds already that give it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Again = Callable[..., Tensor]
PART = 2**18
"""Numbers that are computed again at a time on a CPU: with what they are made of they stay in its cache."""


class Kept(NamedTuple):
    """An input, and how to get it back."""

    tensors: tuple[Tensor | None, ...]
    again: Again
    """Number by number, from tensors of the input's shape or such that broadcast to it."""
    outer: Callable[..., Tensor] | None = None
    """A shorter way to `product`, called with dz and the tensors."""

    def recipe(self) -> Kept:
        """Return it without the tensors: a node that held them itself would outwit checkpointing."""
        return self._replace(tensors=())

    def get(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """Return the input from the tensors as they were saved."""
        with torch.no_grad():
            return self.again(*tensors).to(dtype)

    def product(self, dz: Tensor, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return dz' x summed over all rows, (r, features), for dz of (..., r) and an input x of (..., features).

        x is never there as a whole: on a CPU a part at a time is formed again and used while it is in the cache.
        """
        with torch.no_grad():
            dz, lead = dz.flatten(0, -2), dz.shape[:-1]
            if self.outer is not None and all(t is None or t.dtype == dz.dtype for t in tensors):
                return self.outer(dz, *tensors)
            whole = [t is None or t.ndim < 2 for t in tensors]
            split = all(w or t.shape[:-1] == lead for w, t in zip(whole, tensors, strict=True))  # type: ignore[union-attr]
            if self.again is _itself or dz.device.type != "cpu" or not split:
                return dz.t() @ self.again(*tensors).flatten(0, -2).to(dz.dtype)
            rows = [t if w else t.flatten(0, -2) for w, t in zip(whole, tensors, strict=True)]  # type: ignore[union-attr]
            return self._by_parts(dz, rows, whole)

    def _by_parts(self, dz: Tensor, tensors: list[Tensor | None], whole: list[bool]) -> Tensor:
        width = max(t.shape[-1] for t in tensors if t is not None)
        size, total = max(1, PART // width), None
        for start in range(0, len(dz), size):
            part = slice(start, start + size)
            x = self.again(*(t if w else t[part] for w, t in zip(whole, tensors, strict=True)))  # type: ignore[index]
            x, thin = x.to(dz.dtype), dz[part].t()
            total = thin @ x if total is None else total.addmm_(thin, x)
        assert total is not None
        return total


def keep(x: Tensor, dtype: torch.dtype) -> Kept:
    """Return what to save of x, which is used in the given type.

    LayerNorm and the activations keep their own input for the backward pass. An adapted layer behind one of them needs
    its output: computed once more from that input, it costs a pass over memory instead of a second copy. The node that
    made x is asked for what it saved, which PyTorch documents (notes/autograd, "Saved tensors").
    """
    if x.grad_fn is not None and not _moved_elsewhere():
        try:
            found = _made_by(x.grad_fn)
        except RuntimeError:  # what the node saved was changed in place since: its own backward pass will say so
            found = None
        if found is not None:
            return found
    return Kept((x.to(dtype),), _itself)


def _made_by(node: Any) -> Kept | None:
    source = _SOURCES.get(node.name())
    return None if source is None else source(node)


def _itself(x: Tensor) -> Tensor:
    return x


def _layer_norm(node: Any) -> Kept:
    x, mean = node._saved_input, node._saved_result1
    tensors = (x, mean, node._saved_result2, node._saved_weight, node._saved_bias)
    over_features = mean.shape == (*x.shape[:-1], 1)
    return Kept(tensors, _normalised, _outer_normalised if over_features else None)


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = (x - mean).mul_(rstd)
    if weight is None:
        return y
    return y.mul_(weight) if bias is None else torch.addcmul(bias, y, weight)


def _outer_normalised(
    dz: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    # dz' ((x - mean) rstd w + b): the scale of a row moves to dz, and what is the same in a row comes out of the sum
    scaled = dz * rstd.reshape(-1, 1)
    total = scaled.t() @ x.flatten(0, -2)
    total -= (scaled * mean.reshape(-1, 1)).sum(0)[:, None]
    if weight is not None:
        total *= weight
    return total if bias is None else total.add_(dz.sum(0)[:, None] * bias)


def _gelu(node: Any) -> Kept:
    approximate = node._saved_approximate
    return Kept((node._saved_self,), lambda x: F.gelu(x, approximate=approximate))


def _hardtanh(node: Any) -> Kept:
    low, high = node._saved_min_val, node._saved_max_val
    return Kept((node._saved_self,), lambda x: F.hardtanh(x, low, high))


def _leaky_relu(node: Any) -> Kept:
    slope = node._saved_negative_slope
    return Kept((node._saved_self,), lambda x: F.leaky_relu(x, slope))


def _product(node: Any) -> Kept | None:
    factors = (node._saved_self, node._saved_other)  # each kept only if the other one has a gradient
    if factors[0] is not None and factors[1] is not None:
        return Kept(factors, torch.mul)
    # a constant times something, as in the RMSNorm of T5 and Llama: weight * (x * rsqrt(mean square))
    constant, at = (factors[0], 1) if factors[0] is not None else (factors[1], 0)
    inner = node.next_functions[at][0]
    found = None if inner is None or constant is None else _made_by(inner)
    if found is None:
        return None
    again = found.again
    return Kept((constant, *found.tensors), lambda c, *tensors: c * again(*tensors))


def _pointwise(function: Again) -> Callable[[Any], Kept]:
    return lambda node: Kept((node._saved_self,), function)


_SOURCES: dict[str, Callable[[Any], Kept | None]] = {
    "NativeLayerNormBackward0": _layer_norm,
    "GeluBackward0": _gelu,
    "SiluBackward0": _pointwise(F.silu),
    "HardswishBackward0": _pointwise(F.hardswish),
    "MishBackward0": _pointwise(F.mish),
    "HardtanhBackward0": _hardtanh,
    "LeakyReluBackward0": _leaky_relu,
    "MulBackward0": _product,
}


def _moved_elsewhere() -> bool:
    # activation checkpointing and save_on_cpu take saved tensors away until the backward pass: asking for one now
    # would compute or copy it; hooks of anybody else see and return the tensors themselves
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__.startswith("torch.")
