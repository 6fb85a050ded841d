"""The SHA-256 of a named tensor, computed or remembered from the last time."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from visionlora.core.quantised import inner_tensors, is_quantised

_SEEN: Any = WeakIdKeyDictionary()
"""Tensor -> how it looked when its digest was computed, and that digest. An entry goes with its tensor."""
_SAMPLES = 64


def tensor_digest(key: str, tensor: Tensor) -> bytes:
    """Return the SHA-256 of a named tensor: name, type, shape and bytes."""
    digest = hashlib.sha256(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    for plain in inner_tensors(tensor) if is_quantised(tensor) else [tensor]:
        digest.update(_bytes(plain.contiguous().flatten()))
    return digest.digest()


def known_digest(key: str, tensor: Tensor) -> bytes:
    """Return the digest, the one of before where the tensor is the same object and nothing was written to it since.

    PyTorch counts writes; those it does not count (through `.data` or numpy) show in 64 numbers spread over the tensor.
    """
    if tensor.is_inference() or tensor.is_meta or is_quantised(tensor):  # no count of writes, or nothing to look at
        return tensor_digest(key, tensor)
    looks = (key, tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, tensor.stride(), _sample(tensor))
    known = _SEEN.get(tensor)
    if known is not None and known[0] == looks:
        return known[1]  # type: ignore[no-any-return]
    digest = tensor_digest(key, tensor)
    _SEEN[tensor] = (looks, digest)
    return digest


def _sample(tensor: Tensor) -> bytes:
    flat = tensor.detach().as_strided((tensor.numel(),), (1,)) if tensor.is_contiguous() else tensor.detach().flatten()
    return bytes(_bytes(flat[:: max(1, len(flat) // _SAMPLES)].contiguous()))


def _bytes(flat: Tensor) -> Any:
    return flat.detach().cpu().view(torch.uint8).numpy().data
