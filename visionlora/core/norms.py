"""Normalisation that never drifts: BatchNorm as a constant per-channel affine, its statistics part of the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from visionlora.config import Norm
from visionlora.core.attach import Adapted, own_class, own_modules
from visionlora.core.delta import Value
from visionlora.core.fast import Affine
from visionlora.errors import StateError

STATISTICS = ("running_mean", "running_var")
AFFINE = ("weight", "bias")

_TORCH_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm, _BatchNorm)
_TIMM_NORMS = ("timm.layers.norm", "timm.layers.norm_act", "timm.layers.evo_norm", "timm.layers.filter_response_norm")


class FrozenNorm(Adapted):
    """A BatchNorm that uses stored statistics in every mode, train() included."""

    @property
    def training(self) -> bool:
        return False

    @training.setter
    def training(self, mode: bool) -> None:
        self.__dict__["training"] = mode  # the flag train() set is there again once the adapters are off

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and getattr(x, "normed_by", None) is self:
            y = x  # the convolution that made x has normalised it already
        else:
            wanted = self.__dict__["training"] and torch.is_grad_enabled() and x.requires_grad
            constant = self.constant() if wanted else None
            if constant is None:
                return super().forward(x)  # type: ignore[no-any-return]
            y = _affine(x, *constant)
        return self.act(self.drop(y)) if _is_timm_act(self) else y  # type: ignore[operator]

    def constant(self) -> Affine | None:
        """Return the scale and shift of every channel, or None where they are trained or torch's own path is needed."""
        mean, var, weight, bias = (getattr(self, name) for name in (*STATISTICS, *AFFINE))
        trained = any(t is not None and t.requires_grad for t in (weight, bias))
        if trained or mean is None or weight is None or bias is None or not _is_plain(self):
            return None
        scale = weight * torch.rsqrt(var + self.eps)
        return Affine(scale, bias - mean * scale)


def is_norm(layer: nn.Module) -> bool:
    """Tell whether the layer is a normalisation with parameters of its own."""
    return isinstance(layer, _TORCH_NORMS) or own_class(layer).__module__ in _TIMM_NORMS


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers whose statistics would drift in training, by name."""
    return {n: m for n, m in own_modules(model).items() if isinstance(m, _BatchNorm)}


def norm_values(layer: nn.Module, policy: Norm) -> dict[str, Value]:
    """Return what an adapter owns of a normalisation layer: nothing, its statistics, its scale and shift."""
    values: dict[str, Value] = {}
    if policy == "frozen":
        return values
    if isinstance(layer, _BatchNorm) and policy in ("stats", "stats-affine"):
        values |= _values(layer._buffers, STATISTICS, trainable=False)
    if policy in ("affine", "stats-affine"):
        values |= _values(layer._parameters, AFFINE, trainable=True)
    return values


def estimate_statistics(model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], object]) -> int:
    """Change the active adapter's BatchNorm statistics to those of the batches; return the number of images seen.

    One pass without gradients. Mean and variance are exact over everything a layer has seen (Chan et al. 1983), and
    each layer normalises with its estimate so far, so that deeper layers see adapted inputs (AdaBN, Li et al. 2017).
    """
    moments = [_Moments(layer) for layer in batch_norms(model).values() if _own_statistics(layer)]
    if not moments:
        raise StateError(
            'the active adapter has no BatchNorm statistics of its own; attach it with norm="stats" or "stats-affine"'
        )
    images = 0
    try:
        with torch.no_grad():
            for batch in batches:
                forward(batch)
                images += len(batch)
    finally:
        for moment in moments:
            moment.hook.remove()
    if not images:
        raise StateError("no images to estimate BatchNorm statistics from")
    return images


class _Moments:
    """Running count, mean and sum of squared deviations of one layer's input, written to its adapter as they grow."""

    def __init__(self, layer: nn.Module) -> None:
        self.mean_value, self.var_value = _own_statistics(layer)
        self.count = 0
        self.mean = torch.zeros_like(self.mean_value, dtype=torch.float64, device="cpu")
        self.squares = torch.zeros_like(self.mean)
        self.hook = layer.register_forward_pre_hook(self.update)

    def update(self, layer: nn.Module, args: tuple[Tensor]) -> None:
        x = args[0].transpose(0, 1).flatten(1)  # (channels, batch * positions)
        var, mean = torch.var_mean(x.float(), dim=1, correction=0)
        var, mean, n = var.double().cpu(), mean.double().cpu(), x.shape[1]
        total, shift = self.count + n, mean - self.mean
        self.squares += var * n + shift**2 * (self.count * n / total)
        self.mean += shift * (n / total)
        self.count = total
        self.mean_value.copy_(self.mean)
        self.var_value.copy_(self.squares / max(total - 1, 1))


def _own_statistics(layer: nn.Module) -> list[Tensor]:
    found = (
        [change for name in STATISTICS for change, _ in layer.active_changes(name)]
        if isinstance(layer, Adapted)
        else []
    )
    return [change.value for change in found if isinstance(change, Value)]


def _values(tensors: Mapping[str, Tensor | None], names: tuple[str, ...], *, trainable: bool) -> dict[str, Value]:
    return {name: Value(t, trainable=trainable) for name in names if (t := tensors.get(name)) is not None}


def _affine(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    # autograd keeps the scale alone; F.batch_norm would keep x as well, though nothing needs it
    shape = (1, -1, *[1] * (x.ndim - 2))
    return torch.addcmul(shift.view(shape), x.to(scale.dtype), scale.view(shape)).to(x.dtype)


def _is_plain(layer: nn.Module) -> bool:
    return own_class(layer) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d) or _is_timm_act(layer)


def _is_timm_act(layer: nn.Module) -> bool:
    own = own_class(layer)
    return (own.__module__, own.__name__) == ("timm.layers.norm_act", "BatchNormAct2d")
