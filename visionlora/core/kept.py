"""What to keep of an input for the backward pass: itself, or the tensors autograd holds already that give it again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionlora.core.rows import NormalisedRows, Rows

Again = Callable[..., Tensor]


class Kept(NamedTuple):
    """An input, and how to get it back."""

    tensors: tuple[Tensor | None, ...]
    again: Again
    """Number by number, from tensors that broadcast to the input."""
    normalised: bool = False
    """A LayerNorm over the features made the input; the tensors are its own input, mean, rstd, weight and bias."""

    def recipe(self) -> Kept:
        """Return it without the tensors: a node that held them itself would outwit checkpointing."""
        return self._replace(tensors=())

    def get(self, tensors: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """Return the input from the tensors as they were saved."""
        with torch.no_grad():
            return self.again(*tensors).to(dtype)

    def rows(self, tensors: Sequence[Tensor | None], lead: torch.Size, dtype: torch.dtype) -> Rows:
        """Return the input row by row, given the tensors as they were saved and its shape without the features."""
        if self.normalised and all(t is None or t.dtype == dtype for t in tensors):
            return NormalisedRows(tensors, lead)
        return Rows(self.again, tensors, lead)


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
    return Kept(tensors, _normalised, normalised=over_features)


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    y = (x - mean).mul_(rstd)
    if weight is None:
        return y
    return y.mul_(weight) if bias is None else torch.addcmul(bias, y, weight)


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
