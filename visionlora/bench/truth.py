"""The slow truth: LoRA written with dense weights and plain autograd. A fast wrong answer must never be timed."""

from __future__ import annotations

from collections.abc import Mapping
from math import hypot
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from visionlora.bench.contestants import Contestant, lora_config
from visionlora.bench.settings import Settings
from visionlora.bench.workload import Workload
from visionlora.errors import VisionLoRAError

SHARE = 0.1
"""Size of the change over that of the weight, while it is checked: well above rounding."""


class Tolerance(NamedTuple):
    """How far results may lie from the truth, relative, beyond what the truth itself moves when its input does."""

    loss: float
    gradient: float
    tensor: float
    """For each tensor of the gradient alone."""
    rounding: float
    """Of the input, which a network can blow up: a few ReLUs turned on or off are 6e-3 of ResNet-50's gradient."""


TOLERANCES = {
    ("cpu", "fp32"): Tolerance(1e-3, 2e-2, 1e-1, 1e-6),
    ("cuda", "fp32"): Tolerance(1e-3, 2e-2, 1e-1, 1e-3),  # cuDNN convolves in TF32
    ("cpu", "bf16"): Tolerance(2e-2, 0.15, 0.7, 4e-3),
    ("cuda", "bf16"): Tolerance(2e-2, 0.15, 0.7, 4e-3),
}
MANY = 10
"""Roundings that may add up."""


class WrongResult(VisionLoRAError):
    """A variant that does not compute what it is compared for."""


class Truth:
    """Loss and gradients of one adapter with numbers of its own, from dense weights."""

    def __init__(self, workload: Workload, settings: Settings, factors: Mapping[str, Tensor]) -> None:
        """The factors give the shapes: A, B of every layer, and the tensors of the head."""
        self.workload, self.settings = workload, settings
        self.scale = lora_config(settings).lora_alpha / settings.rank
        self.tensors = {key: t.detach().clone() for key, t in factors.items()}
        for key in [key for key in self.tensors if key.endswith("/B")]:
            self.tensors[key] = self._start(key.removesuffix("/B"))
        self.tolerance = TOLERANCES[settings.device, settings.dtype]
        self.loss, self.grads = self._dense(workload.inputs)
        moved_loss, moved = self._dense(tuple(_rounded(x, self.tolerance.rounding) for x in workload.inputs))
        self.loss_noise = MANY * abs(moved_loss - self.loss)
        self.noise = {key: MANY * _length(moved[key] - grad) for key, grad in self.grads.items()}

    def check(self, contestant: Contestant) -> float:
        """Give the contestant these numbers and return how far its gradient is off. Raises WrongResult."""
        if contestant.factors.keys() != self.tensors.keys():
            odd = sorted(contestant.factors.keys() ^ self.tensors.keys())[:3]
            raise WrongResult(f"{contestant.name} trains other tensors than a plain LoRA: {', '.join(odd)}")
        with torch.no_grad():
            for key, parameter in contestant.factors.items():
                if parameter.shape != self.tensors[key].shape:
                    raise WrongResult(f"{contestant.name}: {key} has another shape, {tuple(parameter.shape)}")
                parameter.copy_(self.tensors[key])
        loss = contestant.loss(self.workload, self.settings)
        loss.backward()
        grads = {key: p.grad for key, p in contestant.factors.items()}
        contestant.model.zero_grad(set_to_none=True)
        return self._compare(contestant.name, float(loss.detach()), grads)

    def check_base(self, contestant: Contestant) -> None:
        """Raise WrongResult unless the contestant gives the base's loss, as every one does before it is trained."""
        base, loss = (
            float(c.loss(self.workload, self.settings).detach())
            for c in (Contestant("", self.workload.model), contestant)
        )
        if not self._near(loss, base):
            raise WrongResult(f"{contestant.name} gives a loss of {loss}, its base {base}")

    def _dense(self, inputs: tuple[Tensor, ...]) -> tuple[float, dict[str, Tensor]]:
        leaves = {key: t.requires_grad_() for key, t in self.tensors.items()}
        own = dict(self.workload.model.named_parameters())
        weights: dict[str, Tensor] = {}
        for key, leaf in leaves.items():
            layer, _, leafname = key.rpartition("/")
            if leafname == "B":
                stored = _stored(layer, own)
                change = _product(leaf, leaves[f"{layer}/A"], own[stored].shape, self._flipped(layer))
                weights[stored] = own[stored].detach() + self.scale * change
            elif leafname != "A":
                weights[f"{layer}.{leafname}".removeprefix(".")] = leaf
        precision = torch.autocast(self.settings.device, torch.bfloat16, enabled=self.settings.dtype == "bf16")
        with precision:
            loss = self.workload.loss(functional_call(self.workload.model, weights, inputs))
        grads = torch.autograd.grad(loss, list(leaves.values()))
        return float(loss.detach()), dict(zip(leaves, grads, strict=True))

    def _start(self, layer: str) -> Tensor:
        own = dict(self.workload.model.named_parameters())
        weight, A, B = own[_stored(layer, own)].detach(), self.tensors[f"{layer}/A"], self.tensors[f"{layer}/B"]
        B = torch.randn_like(B)
        change = self.scale * _product(B, A, weight.shape, self._flipped(layer))
        return B * (SHARE * weight.norm() / change.norm())

    def _flipped(self, layer: str) -> bool:
        """Tell whether the layer stores its weight as (in, out): transformers' Conv1D does."""
        modules = dict(self.workload.model.named_modules())
        return layer in modules and type(modules[layer]).__name__ == "Conv1D"

    def _compare(self, name: str, loss: float, grads: dict[str, Tensor | None]) -> float:
        if not self._near(loss, self.loss):
            raise WrongResult(f"{name} gives a loss of {loss}, a plain LoRA with dense weights {self.loss}")
        errors = {}
        for key, true in self.grads.items():
            grad = grads[key]
            if grad is None:
                raise WrongResult(f"{name}: no gradient reaches {key}")
            errors[key] = _length(grad - true)
            if not errors[key] <= self.tolerance.tensor * _length(true) + self.noise[key]:
                raise WrongResult(f"{name}: the gradient of {key} is off by {errors[key]:.2g} of {_length(true):.2g}")
        error, size = hypot(*errors.values()), hypot(*map(_length, self.grads.values()))
        if not error <= self.tolerance.gradient * size + hypot(*self.noise.values()):
            raise WrongResult(f"{name}: the gradient is off by {error / size:.2g} of its length")
        return error / size

    def _near(self, loss: float, true: float) -> bool:
        return abs(loss - true) <= self.tolerance.loss * abs(true) + self.loss_noise


def _product(B: Tensor, A: Tensor, shape: torch.Size, flipped: bool) -> Tensor:
    """Return B @ A of every group in the shape of the weight: B is (out, r), A (groups * r, in, *kernel)."""
    rank = B.shape[1]
    groups = A.shape[0] // rank
    rows = [b @ a for b, a in zip(B.reshape(groups, -1, rank), A.reshape(groups, rank, -1), strict=True)]
    return torch.cat(rows).t() if flipped else torch.cat(rows).reshape(shape)


def _stored(layer: str, own: Mapping[str, Tensor]) -> str:
    return layer if layer in own else f"{layer}.weight"


def _rounded(x: Tensor, size: float) -> Tensor:
    return x * (1 + size * torch.randn_like(x)) if x.is_floating_point() else x


def _length(t: Tensor) -> float:
    return float(t.norm())
