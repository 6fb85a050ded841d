"""Weights stored in fewer bits: which they are, and the numbers they stand for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionlora.errors import StateError

QUANTISED = "quantized"
"""Field of an adapter's record that tells what its base was quantised to."""
LIBRARIES = ("torchao", "bitsandbytes")
"""Their tensors are known by name: neither is imported here."""


@dataclass
class Quantised:
    """What a model remembers of its base as it was before it was quantised. `str(quantised)` tells what was gained."""

    scheme: str
    linear_layers: int
    """Linear layers of the model, quantised or left alone."""
    originals: dict[str, bytes] = field(default_factory=dict)
    """State-dict key -> digest of the tensor that was there."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """State-dict key -> digest of the tensor that took its place."""
    errors: dict[str, float] = field(default_factory=dict)
    """State-dict key -> what rounding changed, relative to the norm of the weight."""
    squares: tuple[float, float] = (0.0, 0.0)
    """Sums over all of these weights: squared rounding error, squared weight."""
    bytes_before: int = 0
    bytes_after: int = 0

    @property
    def error(self) -> float:
        """What rounding changed in all quantised weights together, relative to their norm."""
        return float((self.squares[0] / self.squares[1]) ** 0.5) if self.squares[1] else 0.0

    def __str__(self) -> str:
        before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
        return (
            f"{self.scheme}: {len(self.stored)} of {self.linear_layers} linear layers, {before:.1f} -> {after:.1f} "
            f"MiB, weights rounded by {self.error:.2%}"
        )


def quantised_base(model: nn.Module) -> Quantised | None:
    """Return what a model remembers of its quantised base; None where quantize_base did nothing to it."""
    found: Quantised | None = model.__dict__.get("_visionlora_quantised")
    return found


def is_quantised(tensor: Tensor | None) -> bool:
    """Tell whether the tensor is stored in fewer bits by a library whose storage we can read."""
    return type(tensor).__module__.partition(".")[0] in LIBRARIES


def is_readable(layer: nn.Module) -> bool:
    """Tell whether the layer is a Linear that means x W' + b with a quantised W whose numbers can be read from it.

    A layer of torchao is torch's own. That of bitsandbytes has a forward pass which, on a CPU with AVX512-BF16,
    rearranges W at its first call in eval mode and from then on passes no gradient to x.
    """
    weight = layer._parameters.get("weight")
    if not isinstance(layer, nn.Linear) or not is_quantised(weight):
        return False
    return type(weight).__name__ in ("Int8Tensor", "NF4Tensor", "Params4bit")


def dequantised(tensor: Tensor) -> Tensor:
    """Return the numbers a quantised tensor stands for, in the type it was quantised from."""
    kind = type(tensor).__name__
    if kind == "Int8Tensor":
        return tensor.dequantize()
    if kind == "NF4Tensor":
        return _nf4(tensor)
    if kind == "Params4bit" and tensor.quant_state is not None:  # type: ignore[attr-defined]
        return _four_bits(tensor)
    raise StateError(
        f"the numbers in a {kind} cannot be read without its layer; quantise the base with "
        'visionlora.quantize_base(model, "int8") instead, or stay with the variant "lora", which needs no weight'
    )


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """Return the plain tensors a quantised one is made of."""
    if type(tensor).__name__ == "Params4bit":
        state = tensor.quant_state  # type: ignore[attr-defined]
        nested = [state.offset, state.state2.absmax] if state.nested else []
        return [tensor.data, state.absmax, *nested]
    names, _ = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return [inner for name in names if (inner := getattr(tensor, name)) is not None]


def _four_bits(tensor: Any) -> Tensor:
    state = tensor.quant_state
    if state.__dict__.get("packing_format_for_cpu"):
        raise StateError(
            "bitsandbytes has rearranged this weight for inference in bfloat16, which loses its numbers; build the "
            "model again and put the adapter on before it runs in eval mode"
        )
    plain: Tensor = sys.modules["bitsandbytes.functional"].dequantize_4bit(tensor.data, state)
    return plain


def _nf4(tensor: Any) -> Tensor:
    # torchao's own get_original_weight gives the same bits in 10 times the time on a CPU: it looks up each half byte
    # by a 64-bit index and interleaves; here one lookup gives the two numbers of a byte
    codes = torch.arange(256, device=tensor.device)
    pairs = tensor.nf4[torch.stack([codes >> 4, codes & 15], dim=1)]
    numbers = F.embedding(tensor.quantized_data.int(), pairs)
    scalers = tensor.dequantize_scalers(
        tensor.quantized_scalers,
        tensor.quantization_factor,
        tensor.scaler_block_size,
    )
    return numbers.view(len(scalers), -1).mul_(scalers.unsqueeze(1)).view(tensor.shape)
