"""Combine attached adapters into a new one: sums, differences, averages and merges of what they change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from visionlora.adapt import attach_plan
from visionlora.compose.pieces import Piece, Rows, as_tensors, blocks, each, pieces, within
from visionlora.compose.recipe import Recipe, check_method, check_number, make_recipe
from visionlora.compose.report import Combination, Layer, layer_of
from visionlora.compose.values import Owned, merged_values
from visionlora.config import Bias, LoraConfig, Norm
from visionlora.core.attach import Adapted
from visionlora.core.delta import Delta, Value
from visionlora.errors import ConfigError, StateError
from visionlora.plan import Plan
from visionlora.registry import adapted_layers, adapter_plan, check_known_name, check_new_name
from visionlora.targets import Site
from visionlora.variants import VARIANTS

Sites = dict[str, dict[str, Site]]
"""Name of a changed weight -> adapter -> what that adapter changes there."""


def combine(
    model: nn.Module,
    adapters: Mapping[str, float] | Sequence[str],
    *,
    method: str = "concat",
    rank: int | None = None,
    name: str = "combined",
    head: str = "average",
    norm: str = "average",
    density: float | None = None,
    seed: int = 0,
) -> Combination:
    """Change the model in place: attach a new adapter made of others, inactive. Return how well it holds them.

    `adapters` are names with weights, {"night": 0.7, "rain": 0.3}; names alone are averaged. A weight below 0 subtracts
    an adapter. The result is a plain "lora" adapter, whatever the variants were.

    "concat" is the exact weighted sum: the ranks of a layer add up. "svd" is the nearest change of `rank` to that sum.
    "magnitude_prune" and "dare_linear" keep a share `density` of the entries of every change, sum them and cut to
    `rank`; "ties" and "dare_ties" take the mean of the entries that agree in sign: there the usual weight is 1.

    Tensors owned in full become the base's plus the weighted differences to it, BatchNorm statistics those of the
    adapters' images mixed in proportion to the weights. `head` and `norm` may name the adapter whose tensors are taken
    over instead (or "first"), or be "base". That heads of one size mean the same classes is the caller's to know: only
    the files record it.

    Raises StateError or ConfigError, the model untouched.
    """
    check_new_name(model, name)
    weights = _weights(model, adapters, averages=check_method(method).averages)
    recipe = make_recipe(method, list(weights.values()), rank, density, seed)
    sites = _sites(model, weights)
    _check_rank(model, sites, recipe)
    shares = {n: weight / len(weights) for n, weight in weights.items()} if recipe.method.averages else weights
    owned = merged_values(model, shares, head=head, norm=norm)
    _check_apart(sites, owned)
    made = [_merge(model, changes, weights, recipe) for changes in sites.values()]
    plan = Plan(_config(model, weights, [site for site, _, _ in made], owned), tuple(m[0] for m in made), owned.roles)
    _attach(model, name, plan, {key: t for _, tensors, _ in made for key, t in tensors.items()}, owned)
    return Combination(name, method, weights, tuple(layer for _, _, layer in made), _sizes(owned))


def _weights(model: nn.Module, adapters: Mapping[str, float] | Sequence[str], *, averages: bool) -> dict[str, float]:
    names = [adapters] if isinstance(adapters, str) else list(adapters)
    for name in names:
        check_known_name(model, name)
    if len(set(names)) < len(names):
        raise ConfigError(f"an adapter is named twice in {', '.join(names)}; give it one weight")
    equal = 1.0 if averages else 1 / max(len(names), 1)
    given = adapters if isinstance(adapters, Mapping) else dict.fromkeys(names, equal)
    weights = {name: check_number(f"the weight of {name!r}", given[name]) for name in names}
    weights = {name: weight for name, weight in weights.items() if weight}
    if not weights:
        raise ConfigError("expected at least one adapter with a weight other than 0")
    return weights


def _sites(model: nn.Module, weights: Mapping[str, float]) -> Sites:
    """Return the changed weights in model order."""
    found: Sites = {}
    for name in weights:
        for site in adapter_plan(model, name).sites:
            found.setdefault(site.name, {})[name] = site
    order = {layer: i for i, layer in enumerate(adapted_layers(model))}
    return dict(sorted(found.items(), key=lambda item: order[next(iter(item[1].values())).layer]))


def _check_rank(model: nn.Module, sites: Sites, recipe: Recipe) -> None:
    largest = {name: next(iter(changes.values())).geometry.max_rank for name, changes in sites.items()}
    widest = max(largest, key=largest.__getitem__, default="")
    if recipe.rank is not None and sites and recipe.rank > largest[widest]:
        raise ConfigError(
            f"rank {recipe.rank} is more than any layer can have; {widest} has the most, {largest[widest]}"
        )
    names = {name for changes in sites.values() for name in changes}
    unranked = [v for name in sorted(names) if not VARIANTS[v := adapter_plan(model, name).config.variant].ranked]
    if recipe.rank is None and recipe.name != "concat" and unranked:
        raise ConfigError(f"the variant {unranked[0]} has no rank that {recipe.name} could keep to; give one: rank=8")


def _check_apart(sites: Sites, owned: Owned) -> None:
    for name, changes in sites.items():
        site = next(iter(changes.values()))
        if site.attribute in owned.roles.get(site.layer, {}):
            raise StateError(
                f"one adapter changes {name} by low rank and another owns it in full; these two have no sum"
            )


def _merge(
    model: nn.Module, sites: dict[str, Site], weights: Mapping[str, float], recipe: Recipe
) -> tuple[Site, dict[str, Tensor], Layer]:
    site = next(iter(sites.values()))
    found = {adapter: _pieces(model, adapter, sites[adapter], recipe) for adapter in sites}
    rank = recipe.rank or max(site.rank for site in sites.values())
    parts, cuts = blocks(list(sites.values())), {}
    for part, rows in parts.items():
        changes = {a: piece for a in found if (piece := within(rows, found[a])) is not None}
        cuts[part] = recipe.merged(list(changes.values()), [weights[a] for a in changes], rank)
    rank = max(cut.factors.rank for cut in cuts.values())
    tensors = {
        f"{site.layer}/{site.attribute}/{f'deltas.{part}.' if part else ''}{key}": tensor
        for part, cut in cuts.items()
        for key, tensor in as_tensors(cut.factors.widened(rank), site.geometry).items()
    }
    made = Site(site.name, site.geometry, rank, 1.0, {part: rows for part, rows in parts.items() if part})
    return made, tensors, layer_of(_target(made), list(sites), rank, list(cuts.values()))


def _pieces(model: nn.Module, adapter: str, site: Site, recipe: Recipe) -> dict[Rows, Piece]:
    layer = model.get_submodule(site.layer)
    assert isinstance(layer, Adapted)
    delta, base = layer.adapters[adapter][site.attribute], layer.base_tensor(site.attribute)  # type: ignore[index]
    assert isinstance(delta, Delta)
    assert base is not None
    found = pieces(delta, site, base)
    return found if recipe.method.keep is None else each(found, recipe.thinned)


def _target(site: Site) -> str:
    """Return a site as target_modules writes it."""
    return site.name + (f"[{','.join(site.parts)}]" if site.parts else "")


def _norm(configs: Sequence[LoraConfig]) -> Norm:
    names = {config.norm for config in configs}
    affine, stats = (bool(names & {policy, "stats-affine"}) for policy in ("affine", "stats"))
    if affine:
        return "stats-affine" if stats else "affine"
    return "stats" if stats else "frozen"


def _config(model: nn.Module, weights: Mapping[str, float], sites: list[Site], owned: Owned) -> LoraConfig:
    """Return the config that describes the result; its ranks and scales are those of the plan."""
    configs = [adapter_plan(model, name).config for name in weights]
    roles = {role for attributes in owned.roles.values() for role in attributes.values()}
    biases: list[Bias] = ["none", "lora_only", "all"]
    saved = [layer for layer, attributes in owned.roles.items() if "saved" in attributes.values()]
    r = Counter(site.rank for site in sites).most_common(1)[0][0] if sites else 1
    return LoraConfig(
        r=r,
        lora_alpha=float(r),
        target_modules=[_target(site) for site in sites] or "none",
        norm=_norm(configs) if "norm" in roles else "frozen",
        bias=max((c.bias for c in configs), key=biases.index) if "bias" in roles else "none",
        modules_to_save=saved or ("auto" if "head" in roles else "none"),
        task_type=configs[0].task_type,
    )


def _attach(model: nn.Module, name: str, plan: Plan, changed: dict[str, Tensor], owned: Owned) -> None:
    if not plan.sites and not plan.values:
        raise StateError(
            "nothing is left of these adapters: they change no layer and their head and norm are left away"
        )
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda" and p.device.index is not None}
    with torch.random.fork_rng(devices=sorted(devices)):  # fresh changes draw numbers that are overwritten
        attach_plan(model, plan, {**changed, **owned.tensors}, name=name)
    for layer, attribute in owned.unanchored:
        value = adapted_layers(model)[layer].adapters[name][attribute]  # type: ignore[index]
        assert isinstance(value, Value)
        value.anchored = False


def _sizes(owned: Owned) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for layer, attributes in owned.roles.items():
        for attribute, role in attributes.items():
            sizes[role] = sizes.get(role, 0) + owned.tensors[f"{layer}/{attribute}/value"].numel()
    return sizes
