"""The verbs: put adapters on a model, choose among them, take them off. All change the model in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.attach import Adapted, attach, detach, own_modules, set_active
from visionlora.core.delta import Value
from visionlora.core.folding import fold_when_trained, forget_folding
from visionlora.core.norms import STATISTICS
from visionlora.errors import ConfigError, InertAdapterError, StateError, TargetError
from visionlora.plan import Changes, Plan, build, make_plan, mixin_of
from visionlora.registry import (
    Registry,
    adapted_layers,
    adapter_parameters,
    check_known_name,
    check_new_name,
    registry_of,
)


def apply_lora(model: nn.Module, config: LoraConfig | None = None, *, name: str = "default") -> nn.Module:
    """Change the model in place: freeze it and attach a fresh adapter, active and trainable. Return the model.

    The output is bit for bit that of the base until the adapter is trained. Raises TargetError where the config does
    not fit the model, StateError where the name is taken; the model is then as it was before.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> net = apply_lora(net, LoraConfig(r=2, target_modules=["0"]))
    >>> [n for n, p in net.named_parameters() if p.requires_grad]
    ['0.adapters.default.weight.A', '0.adapters.default.weight.B']
    """
    _check_types(model, config)
    check_new_name(model, name)
    plan = make_plan(model, config or LoraConfig())
    put_on(model, name, plan, build(model, plan), trainable=True)
    activate(model, name)
    fold_when_trained(model)
    return model


def _check_types(model: object, config: object) -> None:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"expected a model, got {model!r}; build it first, e.g. timm.create_model(NAME)")
    if not isinstance(config, LoraConfig | None):
        raise ConfigError(f"expected a LoraConfig, got the {type(config).__name__} {config!r}: LoraConfig(r=16, ...)")


def put_on(model: nn.Module, name: str, plan: Plan, changes: Changes, *, trainable: bool) -> None:
    """Change the model in place: attach built changes as an inactive adapter, all of them or none."""
    registry = _registry_or_new(model)
    done: list[str] = []
    try:
        for layer_name, layer_changes in changes.items():
            layer = model.get_submodule(layer_name)
            attach(layer, name, layer_changes, mixin_of(model, layer_name))
            done.append(layer_name)
    except TypeError as e:  # a class that cannot be subclassed or reassigned: a scripted module, say
        for finished in done:
            detach(adapted_layers(model)[finished], name)
        if not registry.plans:
            del model._visionlora
        raise TargetError(f"layer {layer_name} of class {type(layer).__name__} cannot be adapted: {e}") from None
    registry.plans[name], registry.trainable[name] = plan, trainable
    _set_grads(own_modules(model).values(), registry, {name})


def remove(model: nn.Module, name: str | None = None) -> nn.Module:
    """Change the model in place: take one adapter off, or all. The last one gives back the base, bit for bit."""
    registry = registry_of(model)
    for gone in [check_known_name(model, name)] if name is not None else list(registry.plans):
        for layer in adapted_layers(model).values():
            if gone in layer.adapters:
                detach(layer, gone)
        for book in (registry.plans, registry.trainable, registry.active):
            book.pop(gone, None)
    if not registry.plans:
        forget_folding(model)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(registry.grads.get(parameter_name, parameter.requires_grad))
        del model._visionlora
    return model


def activate(model: nn.Module, name: str | list[str] | dict[str, float], strength: float = 1.0) -> nn.Module:
    """Change the model in place: run this adapter and no other, its whole change scaled by the strength.

    Strength 0 is the base, 1 the adapter, between them a mix that often keeps the target and regains the rest
    (Wortsman et al. 2022, arXiv:2109.01903). Weights, head and normalisation scale together.

    Several names, or several {name: strength}, run at once: their changes of weights and biases add up. Only one of
    them may own a head or BatchNorm statistics; combine such adapters into one instead.

    >>> net = nn.Sequential(nn.Linear(8, 8))
    >>> for camera in ("night", "rain"):
    ...     _ = apply_lora(net, LoraConfig(r=2, target_modules=["0"]), name=camera)
    >>> active_adapters(activate(net, {"night": 1.0, "rain": 0.5}))
    {'night': 1.0, 'rain': 0.5}
    """
    registry = registry_of(model)
    chosen = _chosen(model, name, strength)
    _check_owners(registry, chosen)
    _switch(model, registry, chosen)
    return model


def deactivate(model: nn.Module) -> nn.Module:
    """Change the model in place: run the base. Adapters stay attached."""
    _switch(model, registry_of(model), {})
    return model


@contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base, bit for bit, inside the with block. Not for concurrent threads on one model."""
    registry = registry_of(model)
    before = dict(registry.active)
    _set_active(model, registry, {})
    try:
        yield model
    finally:
        _set_active(model, registry, before)


def attach_plan(
    model: nn.Module, plan: Plan, tensors: dict[str, Tensor], *, name: str = "default", trainable: bool = False
) -> nn.Module:
    """Change the model in place: attach an adapter with the given numbers, inactive. The inverse of adapter_state.

    Raises TargetError, the model untouched, where a tensor is missing, unexpected or of another shape.
    """
    check_new_name(model, name)
    _fill(build_like(model, plan, tensors), tensors, model, plan, name, trainable)
    return model


def build_like(model: nn.Module, plan: Plan, tensors: dict[str, Tensor]) -> Changes:
    """Return changes whose values have the shapes of the tensors: a head may have other classes than the base's."""
    changes = build(model, plan)
    for layer_name, layer_changes in changes.items():
        for attribute, change in layer_changes.items():
            if isinstance(change, Value):
                key = f"{layer_name}/{attribute}"
                value, start = tensors.get(f"{key}/value"), tensors.get(f"{key}/start")
                if value is not None and (
                    value.shape != change.value.shape or (start is None) != (change.start is None)
                ):
                    layer_changes[attribute] = Value(
                        change.value.new_zeros(value.shape, dtype=value.dtype),
                        trainable=change.trainable,
                        additive=change.additive,
                        start=None if start is None else change.value.new_zeros(start.shape, dtype=start.dtype),
                    )
    return changes


def check_gradients(model: nn.Module) -> None:
    """Raise InertAdapterError if, after a backward pass, a trainable adapter tensor has no gradient."""
    inert: list[str] = []
    for name in registry_of(model).active:
        groups = adapter_parameters(model, name)
        inert += [n for group in groups.values() for n, p in group.items() if p.requires_grad and p.grad is None]
    if inert:
        layers = sorted({n.partition(".adapters.")[0] for n in inert})
        shown = ", ".join(layers[:5]) + (f" and {len(layers) - 5} more" if len(layers) > 5 else "")
        raise InertAdapterError(
            f"no gradient reached the adapters of {shown}: the model does not call these layers in its forward pass, "
            "or reads their weight directly, or the pass was cut (no_grad, detach); exclude them with "
            f"exclude_modules={layers[:5]}"
        )


def _fill(
    changes: Changes, tensors: dict[str, Tensor], model: nn.Module, plan: Plan, name: str, trainable: bool
) -> None:
    slots = {
        f"{layer}/{attribute}/{key}": slot
        for layer, attributes in changes.items()
        for attribute, change in attributes.items()
        for key, slot in change.state_dict(keep_vars=True).items()
    }
    _check_tensors(slots, tensors)
    with torch.no_grad():
        for key, slot in slots.items():
            slot.copy_(tensors[key])
    put_on(model, name, plan, changes, trainable=trainable)


def _check_tensors(slots: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    for problem, keys in (("lacks", slots.keys() - tensors.keys()), ("has unexpected", tensors.keys() - slots.keys())):
        if keys:
            shown = ", ".join(sorted(keys)[:10]) + (f" and {len(keys) - 10} more" if len(keys) > 10 else "")
            raise TargetError(f"the adapter {problem} {len(keys)} tensor(s): {shown}")
    for key, slot in slots.items():
        if slot.shape != tensors[key].shape:
            raise TargetError(f"{key}: expected shape {tuple(slot.shape)}, got {tuple(tensors[key].shape)}")


def _registry_or_new(model: nn.Module) -> Registry:
    if "_visionlora" not in model.__dict__:
        model._visionlora = Registry({n: p.requires_grad for n, p in model.named_parameters()})  # type: ignore[assignment]
    return registry_of(model)


def _chosen(model: nn.Module, names: str | list[str] | dict[str, float], strength: float) -> dict[str, float]:
    if isinstance(names, dict):
        if strength != 1:
            raise StateError("give the strengths in {name: strength} or as one number beside names, not both")
        strengths = dict(names)
    else:
        listed = [names] if isinstance(names, str) else list(names)
        strengths = dict.fromkeys(listed, strength)
        if len(strengths) != len(listed):
            raise StateError(f"an adapter is named twice in {listed}; double its strength instead")
    if not strengths:
        raise StateError("no adapter named; deactivate(model) runs the base")
    for name, value in strengths.items():
        check_known_name(model, name)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < float("inf"):
            raise StateError(f"strength must be a number of at least 0, got {value!r}")
    return {name: float(value) for name, value in strengths.items()}


def _check_owners(registry: Registry, names: Iterable[str]) -> None:
    owner: dict[tuple[str, str], str] = {}
    for name in names:
        for layer, attributes in registry.plans[name].values.items():
            for attribute, role in attributes.items():
                if role != "head" and attribute not in STATISTICS:
                    continue  # differences from the base, which add up
                other = owner.setdefault((layer, attribute), name)
                if other != name:
                    raise StateError(
                        f"{other} and {name} both own the {role} {f'{layer}.{attribute}'.removeprefix('.')}; activate "
                        "one of them, combine them into one adapter, or load one with with_head=False"
                    )


def _set_active(model: nn.Module, registry: Registry, active: dict[str, float]) -> None:
    registry.active = active
    for layer in adapted_layers(model).values():
        set_active(layer, active)


def _switch(model: nn.Module, registry: Registry, active: dict[str, float]) -> None:
    touched = {*registry.active, *active}
    registry.active = active
    modules = own_modules(model)  # walked once: a switch is a matter of two milliseconds
    for module in modules.values():
        if isinstance(module, Adapted):
            set_active(module, active)
    _set_grads(modules.values(), registry, touched)


def _set_grads(modules: Iterable[nn.Module], registry: Registry, names: set[str]) -> None:
    """Freeze the base, and these adapters but those that are active and trainable."""
    for module in modules:
        _require(module, False)
        if isinstance(module, Adapted):
            for name in names & module.adapters._modules.keys():
                wanted = name in registry.active and registry.trainable[name]
                _require_all(module.adapters[name], wanted)


def _require_all(module: nn.Module, wanted: bool) -> None:
    _require(module, wanted)
    for below in module._modules.values():
        if below is not None:
            _require_all(below, wanted)


def _require(module: nn.Module, wanted: bool) -> None:
    for parameter in module._parameters.values():
        if parameter is not None and parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)
