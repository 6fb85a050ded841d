"""The promises of an adapter, each checked on one model with real numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import visionlora as vl
from visionlora.adapt import attach_plan
from visionlora.core.attach import Branched
from visionlora.core.geometry import Geometry, geometry_of
from visionlora.registry import adapted_layers, adapter_plan, adapter_state

CONFIG = vl.LoraConfig(r=4, lora_alpha=4)


@dataclass(frozen=True)
class Evidence:
    """What was measured while the promises were checked."""

    layers: int
    branched: int
    effect: float
    """Largest change of an output by a random adapter, over the largest output."""
    error: float
    """Largest difference of merged and unmerged output, over the largest change."""


def prove(model: nn.Module, x: Tensor, config: vl.LoraConfig = CONFIG, tolerance: float = 1e-10) -> Evidence:
    """Return the evidence. Raises AssertionError, saying which promise is broken, in float64 unless x is narrower."""
    model = model.to(x.dtype).eval().requires_grad_(False)
    wake(model, x)
    keys, stored = list(model.state_dict()), {k: t.clone() for k, t in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    base = outputs(model, x)

    vl.apply_lora(model, config)
    assert set(vl.base_state_dict(model)) == set(keys), "attaching changes the keys of the base"
    assert same(outputs(model, x), base), "a fresh adapter changes the output"
    stir(model)
    changed = outputs(model, x)
    change = largest(difference(changed, base))
    assert change > 1e-3 * largest(base), (
        "a random adapter hardly changes the output: nothing else here would be proven"
    )
    check_layers_act(model, x)
    with vl.disabled(model):
        assert same(outputs(model, x), base), "disabled is not the base"
    evidence = _counted(model, change / largest(base), _check_merge(model, x, changed, change, tolerance))

    outputs(model.train(), x)
    assert all(torch.equal(t, stored[k]) for k, t in vl.base_state_dict(model.eval()).items()), (
        "training moves the base"
    )

    plan, state = adapter_plan(model, "default"), {k: t.clone() for k, t in adapter_state(model, "default").items()}
    vl.remove(model)
    assert same(outputs(model, x), base), "after remove the output is not the base's"
    assert list(model.state_dict()) == keys, "remove leaves other keys"
    assert all(torch.equal(t, stored[k]) for k, t in model.state_dict().items()), "remove leaves other weights"
    assert {name: type(module) for name, module in model.named_modules()} == classes, "remove leaves other classes"
    attach_plan(model, plan, state, trainable=True)
    vl.activate(model, "default")
    assert same(outputs(model, x), changed), "the tensors of an adapter, attached again, give another output"
    return evidence


def check_layers_act(model: nn.Module, x: Tensor) -> None:
    """Raise AssertionError where a tensor of the adapter has no say in the output."""
    model.zero_grad()
    y = flat(model(x.clone().requires_grad_()))
    torch.manual_seed(1)
    torch.autograd.backward([(t * torch.randn_like(t)).sum() for t in y])
    vl.check_gradients(model)
    groups = vl.adapter_parameters(model, "default")
    # of the biases this would ask too much: that of keys has no effect, softmax being blind to it
    tensors = {name: p for group in ("A", "B", "head") for name, p in groups.get(group, {}).items()}
    still = [name for name, p in tensors.items() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still, f"these have no effect: {still[:5]}"
    model.zero_grad()


def check_choice(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return the output; raise AssertionError where an adapter sits on the stem, a gate or what sees no image.

    Told by what the layers are given, not by their names: the first one called has the image, a gate works on one
    number a channel in the middle of the network, a network of positions has an input that no image changes.
    """
    calls, y = _calls(model, x)
    adapted = {site.name for site in adapter_plan(model, "default").sites}
    first = next(call.name for call in calls if call.sees_image)
    assert first not in adapted, f"the stem {first} is adapted"
    latent = {f"{n}.q" for n, m in model.named_modules() if type(m).__name__ == "AttentionPoolLatent"}
    blind = [c.name for c in calls if c.name in adapted - latent and not c.sees_image]
    assert not blind, f"no image reaches these: {blind[:5]}"
    last = max((i for i, call in enumerate(calls) if call.pixels > 1), default=0)
    gates = [call.name for call in calls[:last] if call.pixels == 1 and call.name in adapted]
    assert not gates, f"these are gates: {gates[:5]}"
    return y


def wake(model: nn.Module, x: Tensor) -> None:
    """Change the model in place: numbers for what starts at zero and would hide a layer, BatchNorm statistics of x."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not p.numel() or p.abs().max() > 1e-2:
                continue
            if p.numel() > max(p.shape, default=1):
                p.normal_(std=1 / math.sqrt(p[0].numel()))
            elif name.endswith("bias"):
                p.normal_(std=0.1)
            else:  # layer scale, the last norm of a block, a gate
                p.uniform_(0.5, 1.5)
        norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        momenta = [m.momentum for m in norms]
        for norm in norms:
            norm.train().momentum = 1.0
        if norms:
            model(x)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
            norm.running_var += norm.running_var.mean() / 4  # type: ignore[operator, union-attr]


def stir(model: nn.Module, name: str = "default") -> None:
    """Change the model in place: numbers that matter for B and the head."""
    torch.manual_seed(2)
    with torch.no_grad():
        for group, parameters in vl.adapter_parameters(model, name).items():
            for parameter in parameters.values():
                if group != "A":
                    parameter += 0.1 * torch.randn_like(parameter)


def flat(y: Any) -> list[Tensor]:
    """Return the tensors of a model's output, whatever holds them."""
    if isinstance(y, Tensor):
        return [y] if y.is_floating_point() else []
    inside = y.values() if isinstance(y, dict) else y if isinstance(y, (list, tuple)) else ()
    return [t for item in inside for t in flat(item)]


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Return what the model answers, without gradients."""
    return flat(model(x))


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    """Tell whether two outputs agree in every bit."""
    return len(a) == len(b) and all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


def difference(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    """Return a - b."""
    return [s - t for s, t in zip(a, b, strict=True)]


def largest(tensors: list[Tensor]) -> float:
    """Return the largest number, sign aside."""
    return max(float(t.abs().max()) for t in tensors)


def _check_merge(model: nn.Module, x: Tensor, changed: list[Tensor], change: float, tolerance: float) -> float:
    vl.merge(model)
    error = largest(difference(outputs(model, x), changed)) / change
    assert error <= tolerance, f"merged and unmerged differ by {error:.1e} of what the adapter changes"
    vl.unmerge(model)
    assert same(outputs(model, x), changed), "unmerge does not give the adapter back"
    return error


@dataclass(frozen=True)
class _Call:
    name: str
    sees_image: bool
    pixels: int
    """Positions of a map of features; 0 for any other input."""


def _calls(model: nn.Module, x: Tensor) -> tuple[list[_Call], list[Tensor]]:
    """Return the calls of all layers that could be adapted, in the order of one forward pass, and its output."""
    calls: list[_Call] = []

    def watch(name: str, geometry: Geometry) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
            spatial = args[0].shape[2:] if geometry.kind == "conv" else args[0].shape[1:-1]
            calls.append(_Call(name, args[0].requires_grad, spatial.numel() if len(spatial) == 2 else 0))

        return note

    layers = {name: (m, geo) for name, m in model.named_modules() if (geo := geometry_of(m)) is not None}
    hooks = [m.register_forward_pre_hook(watch(name, geo)) for name, (m, geo) in layers.items()]
    with torch.enable_grad():
        y = flat(model(x.clone().requires_grad_()))
    for hook in hooks:
        hook.remove()
    return calls, y


def _counted(model: nn.Module, effect: float, error: float) -> Evidence:
    layers = adapted_layers(model)
    sites = {site.layer for site in adapter_plan(model, "default").sites}
    return Evidence(len(sites), sum(isinstance(layers[n], Branched) for n in sites), effect, error)
