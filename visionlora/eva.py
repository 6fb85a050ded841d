"""Start an adapter along the directions its data takes, and spend ranks where they explain most (EVA)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from visionlora.config import LoraConfig
from visionlora.core.attach import own_class
from visionlora.core.delta import Parts
from visionlora.core.geometry import Geometry
from visionlora.errors import ConfigError, StateError, TargetError
from visionlora.registry import active_adapters, adapted_layers, adapter_plan
from visionlora.targets import Site, select
from visionlora.variants import VARIANTS, LowRank

_OVERSAMPLED = 16


def fit_to_data(
    model: nn.Module, batches: Iterable[Tensor], forward: Callable[[Tensor], object] | None = None
) -> dict[str, float]:
    """Change the active adapter in place: A becomes the main directions of what each layer sees. Return their share.

    One pass without labels or gradients; the output stays that of the base, because B is still zero. The share is the
    part of the activations' energy that the r directions hold, by layer (Paischer et al. 2024, arXiv:2410.07170).
    Raises StateError where the adapter was trained already or has no such layer.
    """
    name = _only_active(model)
    sites = list(adapter_plan(model, name).sites)
    layers = adapted_layers(model)
    fresh = {site.name: _untrained(layers[site.layer].adapters[name][site.attribute], site) for site in sites}  # type: ignore[index]
    shares = {}
    for site, sketch in _observe(model, sites, batches, forward or model, spread=1.0):
        values, directions = sketch.components()
        for delta in fresh[site.name]:
            with torch.no_grad():
                delta.A.view(site.geometry.groups, site.rank, -1).copy_(directions[:, : site.rank])
        shares[site.name] = float(values[:, : site.rank].sum() / sketch.energy.sum().clamp_min(1e-30))
    return shares


def allocate_ranks(
    model: nn.Module,
    config: LoraConfig,
    batches: Iterable[Tensor],
    forward: Callable[[Tensor], object] | None = None,
    *,
    budget: int | None = None,
    spread: float = 2.0,
) -> LoraConfig:
    """Return a config that spends a budget of parameters on the directions that explain most of the activations.

    The model stays as it is. Without a budget the new config costs what the given one does, at ranks from 0 to
    spread * r a layer; a layer of rank 0 is left out. Every layer keeps the scale it had.
    """
    if not issubclass(VARIANTS[config.variant], LowRank):
        raise ConfigError(f"ranks are allocated for variants lora, dora and fa, not {config.variant!r}")
    if not 1 <= spread <= 16 or (budget is not None and budget < 1):
        raise ConfigError(f"budget must be at least 1 parameter and spread from 1 to 16, got {budget!r}, {spread!r}")
    sites = select(model, config)
    if any(site.parts for site in sites):
        raise TargetError("ranks are allocated for whole layers; name them without parts in brackets")
    left = sum(_cost(site.geometry, config) * site.rank for site in sites) if budget is None else budget
    gains: list[tuple[float, int, Site]] = []
    for site, sketch in _observe(model, sites, batches, forward or model, spread):
        shares = sketch.components()[0].sum(0) / sketch.energy.sum().clamp_min(1e-30)
        largest = VARIANTS[config.variant].largest_rank(site.geometry, config)
        gains += [(-float(v), i, site) for i, v in enumerate(shares[: min(int(spread * site.rank), largest)])]
    ranks: dict[str, int] = {}
    for _, i, site in sorted(gains, key=lambda gain: gain[:2]):
        cost = _cost(site.geometry, config)
        if ranks.get(site.name, 0) == i and cost <= left:
            ranks[site.name], left = i + 1, left - cost
    return _with_ranks(config, [site for site in sites if site.name in ranks], ranks)


@dataclass
class _Sketch:
    """A random sketch of the second moment of a layer's patches: exact in its trace, near exact in its main directions.

    Nyström approximation of a positive matrix from a stream (Tropp et al. 2017, arXiv:1706.05736, algorithm 3).
    """

    geometry: Geometry
    test: Tensor
    """(groups * size, in, *kernel): the random test matrix of each group, as a kernel of the layer's own op."""
    moment: Tensor
    """The test matrix times the second moment, like `test`."""
    energy: Tensor
    """(groups): the trace."""

    def see(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].detach()
        with torch.enable_grad():
            kernel = self.test.detach().to(x.device, x.dtype).requires_grad_()
            seen = self.geometry.same(layer, x, kernel)
            # the gradient of a layer with respect to its weight is a sum over patches: no patch is ever formed
            self.moment += torch.autograd.grad(seen, kernel, seen.detach())[0].to(self.moment)
        ones = self.test.new_ones(self.geometry.groups, *self.test.shape[1:]).to(x.device, x.dtype)
        channels = self.geometry.same(layer, x.square(), ones).movedim(1 if self.geometry.kernel else -1, 0)
        self.energy += channels.flatten(1).sum(1).to(self.energy)

    def components(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues (groups, size) and eigenvectors (groups, size, in * kernel), largest first."""
        test, moment = (t.reshape(self.geometry.groups, -1, self.geometry.taps) for t in (self.test, self.moment))
        shift = torch.finfo(moment.dtype).eps * moment.norm(dim=(1, 2), keepdim=True).clamp_min(1e-300)
        moment = moment + shift * test
        core = moment @ test.mT
        # inputs may span fewer directions than the sketch has rows: no Cholesky factor, but eigenvalues of zero
        values, vectors = torch.linalg.eigh((core + core.mT) / 2)
        root = (vectors * values.clamp_min(shift.squeeze(-1)).rsqrt().unsqueeze(-2)).mT @ moment
        _, S, V = torch.linalg.svd(root, full_matrices=False)
        return (S.square() - shift.squeeze(-1)).clamp_min(0), V


def _observe(
    model: nn.Module, sites: list[Site], batches: Iterable[Tensor], forward: Callable[[Tensor], object], spread: float
) -> list[tuple[Site, _Sketch]]:
    sketches = {site.name: _sketch(model, site, spread) for site in sites}
    hooks = [model.get_submodule(s.layer).register_forward_pre_hook(sketches[s.name].see) for s in sites]
    seen = 0
    try:
        with torch.no_grad():
            for batch in batches:
                forward(batch)
                seen += len(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise StateError("no images to find directions from")
    idle = [name for name, sketch in sketches.items() if not sketch.energy.sum() > 0]
    if idle:
        raise StateError(f"nothing but zeros, or nothing at all, reached {', '.join(idle[:5])}; exclude these layers")
    return [(site, sketches[site.name]) for site in sites]


def _sketch(model: nn.Module, site: Site, spread: float) -> _Sketch:
    geo = site.geometry
    if not geo.known or geo.kind == "embedding":
        kind = own_class(model.get_submodule(site.layer)).__name__
        raise TargetError(
            f"{site.name}: a {kind} does not tell what its weight meets; leave it out (exclude_modules), or start "
            'with init_lora_weights="orthogonal"'
        )
    size = min(int(4 * spread * site.rank) + _OVERSAMPLED, geo.taps)
    generator = torch.Generator().manual_seed(0)
    test = torch.randn(geo.groups, size, geo.taps, generator=generator, dtype=torch.float64)
    test = torch.linalg.qr(test.mT)[0].mT.reshape(geo.groups * size, geo.in_, *geo.kernel)
    return _Sketch(geo, test, torch.zeros_like(test), torch.zeros(geo.groups, dtype=torch.float64))


def _untrained(change: object, site: Site) -> list[LowRank]:
    deltas = list(change.deltas.values()) if isinstance(change, Parts) else [change]
    found = [delta for delta in deltas if isinstance(delta, LowRank)]
    if len(found) != len(deltas) or any(delta.B.any() for delta in found):
        raise StateError(f"{site.name}: directions of the data can only start a low-rank change, before it is trained")
    return found


def _only_active(model: nn.Module) -> str:
    names = list(active_adapters(model))
    if len(names) != 1:
        raise StateError(f"one adapter must be active, {len(names)} are; call activate(model, name) first")
    return names[0]


def _cost(geometry: Geometry, config: LoraConfig) -> int:
    return VARIANTS[config.variant].size(geometry, 1, config)


def _with_ranks(config: LoraConfig, sites: list[Site], ranks: dict[str, int]) -> LoraConfig:
    if not sites:
        raise ConfigError("the budget does not pay for one direction of any layer; raise it")
    exact = {site.name: rf"^{re.escape(site.name)}" for site in sites}
    power = 0.5 if config.use_rslora else 1
    return replace(
        config,
        target_modules="|".join(re.escape(site.name) for site in sites),
        exclude_modules=[],
        rank_pattern={exact[site.name]: ranks[site.name] for site in sites},
        alpha_pattern={exact[site.name]: site.scale * ranks[site.name] ** power for site in sites},
    )
