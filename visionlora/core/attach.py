"""Put changes on a layer and take them off, in place: the only file that knows PyTorch's object model."""

from __future__ import annotations

import copyreg
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visionlora.core.computed import computed_weight
from visionlora.core.delta import Change, Delta
from visionlora.core.fast import adapted_output, eager
from visionlora.core.geometry import hollow, materialisable, own_output, widened
from visionlora.errors import StateError


class Adapted(nn.Module):
    """A layer whose tensors are read through its active adapters.

    The class of an adapted layer is a cached subclass of (this class, the layer's own class): keys, attributes and
    isinstance checks stay as they were. `adapters[name][attribute]` is one adapter's change of one attribute.
    """

    adapters: nn.ModuleDict
    active: dict[str, float]
    running: dict[str, list[tuple[Change, float]]]
    """What `active` means: attribute -> changes and strengths. torch.compile guards on what a forward pass reads:
    lists of changes look alike whoever owns them; with names, every switch would compile anew."""
    mixin: type[Adapted]
    followed: tuple[Any, ...] = ()
    """The norm that alone reads the output of this convolution (see core.folding), which may be folded into it."""
    changed: ClassVar[frozenset[str]] = frozenset()

    def base_tensor(self, attribute: str) -> Tensor | None:
        """Return the stored tensor, whatever is active."""
        if attribute in self._parameters:
            return self._parameters[attribute]
        return self._buffers.get(attribute)

    def effective(self, attribute: str, *, deferred: bool = False) -> Tensor | None:
        """Return the tensor as the layer's own forward sees it: the base with every active change.

        Deferred, a weight is formed when an operation first needs it, where there is nothing in the way of that.
        """
        base = self.base_tensor(attribute)
        changes = self.active_changes(attribute)
        if base is None or not changes:
            return base
        if is_sharded(base):
            return self._sharded(attribute, base, changes)
        deltas = [(change, strength) for change, strength in changes if isinstance(change, Delta)]
        deferred = deferred and not hollow(base)
        if len(deltas) == len(changes) and (deferred or torch.is_grad_enabled()) and eager(base):
            return computed_weight(base, deltas, deferred=deferred)
        wide = widened(base)
        total = wide
        for change, strength in changes:
            total = change.onto(total, wide, strength)
        return total.to(base.dtype) if base.is_floating_point() else total

    def _sharded(self, attribute: str, base: Tensor, changes: list[tuple[Change, float]]) -> Tensor:
        # FSDP2 asks the layer for its sharded parameter between forward passes and must get the stored one; inside a
        # pass the parameters are whole, plain tensors. A computed weight would be taken for the parameter's new value
        if any(isinstance(change, Delta) for change, _ in changes):
            raise StateError(
                f"the {attribute} of a {own_class(self).__name__} is computed from its adapter and cannot be sharded "
                "by FSDP2; leave such layers out (exclude_modules) or train with DDP"
            )
        return base

    def seen(self, attribute: str) -> Tensor | None:
        """Return the tensor as whoever reads the attribute sees it."""
        return self.effective(attribute)

    def active_changes(self, attribute: str) -> list[tuple[Change, float]]:
        return self.running.get(attribute, [])

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the class was made at run time: pickle must rebuild it from the importable classes it is made of
        state = super().__reduce_ex__(2)
        mixin, own = type(self).__bases__
        return (_rebuild, (mixin, own, self.changed), *state[2:])


class Materialised(Adapted):
    """A layer that runs its own forward on the effective tensors: slower, always right."""


class Branched(Adapted):
    """A layer of a known kind, whose output with changes of its weight is reached in the cheapest way, proven equal.

    Whoever reads its weight instead of calling it (an attention, a fusing pass) sees the effective one.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        stored, changes = self._parameters["weight"], self.active_changes("weight")
        assert stored is not None
        if args or kwargs:
            return self._plain(x, stored, changes, *args, **kwargs)
        norm = self._norm_to_fold()
        y = adapted_output(self, x, changes, norm.constant() if norm is not None else None)
        if y is None:
            return self._plain(x, stored, changes)
        if norm is not None:
            y.normed_by = norm  # type: ignore[attr-defined]  # read by that norm, which then has nothing left to do
        return y

    def _norm_to_fold(self) -> Any:
        # only in training: a forward pass without gradients gives the base's output bit for bit
        if not (self.followed and self.training and torch.is_grad_enabled()) or self._forward_hooks:
            return None
        return self.followed[0] if self.followed[0].constant() is not None else None

    def _plain(
        self, x: Tensor, stored: Tensor, changes: list[tuple[Change, float]], *args: Any, **kwargs: Any
    ) -> Tensor:
        """Return the output as torch computes it: what tracers see, and every layer the fast path does not know."""
        if not all(isinstance(change, Delta) and change.branched for change, _ in changes):
            effective = self.effective("weight")
            assert effective is not None
            return own_output(self, x, effective)
        if materialisable(stored):
            base: Tensor = own_output(self, x, stored)
        else:
            found = None if args or kwargs else adapted_output(self, x, ())
            base = super().forward(x, *args, **kwargs) if found is None else found
        y = base
        for delta, strength in changes:
            assert isinstance(delta, Delta)
            branch = delta.branch(self, x, base)
            y = y + (branch if strength == 1 else strength * branch)
        return y

    def seen(self, attribute: str) -> Tensor | None:
        stored = self.base_tensor(attribute)
        # a quantised weight has no effective form, and FSDP2 asks for its shard between forward passes
        hidden = attribute == "weight" and stored is not None and not materialisable(stored)
        return stored if hidden else self.effective(attribute, deferred=True)


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether the tensor is spread over processes (a DTensor)."""
    # to import torch.distributed.tensor costs more than torch itself; a DTensor exists only where somebody did
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_fully_sharded(module: nn.Module) -> bool:
    """Tell whether FSDP2 manages the module's parameters."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor sharded over processes in one piece (all of them must ask), any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


STATE = ("adapters", "active", "running", "mixin", "followed")
"""Attributes that an adapted layer has and its own class has not."""

_CLASSES: dict[tuple[type, type, frozenset[str]], type] = {}


def adapted_class(mixin: type[Adapted], own: type[nn.Module], changed: frozenset[str]) -> type[Adapted]:
    """Return the cached class of layers of class `own` whose `changed` attributes are read through adapters."""
    key = (mixin, own, changed)
    if key not in _CLASSES:
        namespace: dict[str, Any] = {"changed": changed, "__module__": __name__}
        namespace |= {attribute: _reader(attribute) for attribute in changed}
        _CLASSES[key] = type(f"{mixin.__name__}{own.__name__}", (mixin, own), namespace)
    return _CLASSES[key]


def own_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class timm or transformers gave the layer."""
    return type(layer).__bases__[1] if isinstance(layer, Adapted) else type(layer)


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's modules by name, without those that adapters brought along."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    todo: list[tuple[str, nn.Module]] = [("", model)]
    while todo:  # in the order of named_modules, which also looks at every part of every adapter
        name, module = todo.pop()
        if id(module) not in seen:
            seen.add(id(module))
            found[name] = module
            hidden = "adapters" if isinstance(module, Adapted) else None
            below = [(key, m) for key, m in module._modules.items() if m is not None and key != hidden]
            todo += [(f"{name}.{key}" if name else key, m) for key, m in reversed(below)]
    return found


def own_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yield the parameters and buffers that adapters did not bring along."""
    for module in own_modules(model).values():
        yield from (t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)


def cuda_devices(model: nn.Module) -> list[int]:
    """Return the GPUs the model lies on."""
    devices = {t.device for t in own_tensors(model)}
    return sorted({d.index for d in devices if d.type == "cuda" and d.index is not None})


def attach(layer: nn.Module, name: str, changes: dict[str, Change], mixin: type[Adapted]) -> None:
    """Change the layer in place: give it an adapter, inactive. Raises TypeError, nothing done, for a scripted layer."""
    if not isinstance(layer, Adapted):
        layer.__class__ = adapted_class(mixin, type(layer), frozenset())
        assert isinstance(layer, Adapted)
        layer.adapters, layer.active, layer.running, layer.mixin = nn.ModuleDict(), {}, {}, mixin
        layer.followed = ()
    layer.adapters[name] = nn.ModuleDict(changes)
    layer.adapters.train(layer.training)
    _refresh_class(layer)


def set_active(layer: Adapted, active: dict[str, float]) -> None:
    """Change the layer in place: run these of its adapters, each at its strength; names of others are passed over."""
    adapters = layer.adapters._modules
    own = {name: strength for name, strength in active.items() if name in adapters}
    running: dict[str, list[tuple[Change, float]]] = {}
    for name, strength in own.items():
        for attribute, change in adapters[name]._modules.items():
            running.setdefault(attribute, []).append((change, strength))  # type: ignore[arg-type]
    layer.__dict__.update(active=own, running=running)  # no tensors: nn.Module need not look at them


def detach(layer: Adapted, name: str) -> None:
    """Change the layer in place: take an adapter off; the last one leaves the layer as it was."""
    del layer.adapters[name]
    set_active(layer, layer.active)
    if len(layer.adapters):
        _refresh_class(layer)
        return
    strip(layer)


def strip(layer: Adapted) -> None:
    """Change the layer in place: give it its own class and drop its adapters."""
    own = own_class(layer)
    for key in STATE:
        delattr(layer, key)
    layer.__class__ = own  # type: ignore[assignment]


def _refresh_class(layer: Adapted) -> None:
    changed = frozenset(attribute for adapter in layer.adapters.values() for attribute in adapter)  # type: ignore[attr-defined]
    layer.__class__ = adapted_class(layer.mixin, own_class(layer), changed)


def _reader(attribute: str) -> property:
    def read(self: Adapted) -> Tensor | None:
        try:
            return self.seen(attribute)
        except AttributeError as e:
            # nn.Module.__getattr__ would answer an AttributeError with the base tensor: a silent wrong result
            raise RuntimeError(f"{attribute} of {type(self).__name__}: {e}") from e

    return property(read)


def _rebuild(mixin: type[Adapted], own: type[nn.Module], changed: frozenset[str]) -> Any:
    return copyreg.__newobj__(adapted_class(mixin, own, changed))  # type: ignore[attr-defined]
