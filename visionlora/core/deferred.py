"""A tensor that is formed when an operation first needs its numbers: many readers of a weight only ask for its type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from visionlora.core.maps import as_given
from visionlora.errors import StateError


class Deferred(Tensor):
    """What a function makes of some tensors, with its shape, type and device known before it is called.

    torch's dispatcher sees an ordinary tensor until an operation arrives here, below autograd, where the numbers take
    its place. They are formed once. Whoever goes around the dispatcher (NumPy, a pickle, a kernel that asks for the
    address) gets them too.

    Raises StateError where a source was changed in between: the numbers of the time of reading are gone.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    _form: Callable[..., Tensor]
    _sources: Sequence[Tensor]
    _versions: list[int]
    _formed: Tensor | None

    @staticmethod
    def __new__(cls, form: Callable[..., Tensor], sources: Sequence[Tensor], like: Tensor) -> Deferred:
        """Defer form(*sources), which has the shape, strides, type and device of `like`, itself a source."""
        deferred: Deferred = Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )
        deferred._form, deferred._sources, deferred._formed = form, (*sources, like), None
        deferred._versions = _versions(deferred._sources)
        return deferred

    def formed(self) -> Tensor:
        """Return the numbers, a plain tensor without gradient."""
        if self._formed is None:
            if _versions(self._sources) != self._versions:
                raise StateError(
                    "a weight was read before its adapter or its base changed, and used after; read it again, or "
                    "write .weight.clone() where it is read"
                )
            with torch.no_grad(), as_given(self.device.type):
                self._formed = self._form(*(source.detach() for source in self._sources[:-1]))
            self._sources = ()
        return self._formed

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map_only(Deferred, Deferred.formed, (args, kwargs or {}))
        return func(*args, **kwargs)


def _from_numbers(name: str) -> Callable[..., Any]:
    def ask(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.formed(), name)(*args, **kwargs)

    return ask


for _name in ("data_ptr", "untyped_storage", "numpy", "tolist", "__dlpack__", "__deepcopy__", "__reduce_ex__"):
    setattr(Deferred, _name, _from_numbers(_name))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]
