"""From a config and a model to a list of layers, ranks and scales; every typo is an error."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from visionlora.config import LoraConfig, compile_pattern, did_you_mean
from visionlora.core.attach import own_class, own_modules
from visionlora.core.geometry import Geometry, bare_geometry, geometry_of
from visionlora.core.norms import is_norm
from visionlora.errors import TargetError
from visionlora.targets.heads import head_layers
from visionlora.targets.parts import split_entry, split_rows
from visionlora.targets.presets import auto
from visionlora.targets.tied import check_untied, output_layers
from visionlora.variants import VARIANTS, LowRank, Variant

KEYWORDS: dict[str, Callable[[Geometry], bool]] = {
    "all-linear": lambda geo: geo.kind in ("linear", "conv1d_hf", "bare"),
    "all-conv": lambda geo: geo.kind in ("conv", "conv_transpose") and not geo.depthwise,
    "all": lambda geo: geo.kind != "embedding" and not geo.depthwise,
}
"""Keyword -> which of the candidates it takes. Bare parameters are candidates where they are attention projections."""


@dataclass(frozen=True)
class Site:
    """One layer that changes: where, by which rank, how strongly."""

    name: str
    geometry: Geometry
    rank: int
    scale: float
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Row ranges of a fused layer that change, by part name; empty: the whole layer."""

    @property
    def layer(self) -> str:
        """Name of the module that owns the tensor."""
        return self.name.rpartition(".")[0] if self.geometry.kind == "bare" else self.name

    @property
    def attribute(self) -> str:
        """What the module calls the tensor."""
        return self.name.rpartition(".")[2] if self.geometry.kind == "bare" else "weight"


def select(model: nn.Module, config: LoraConfig) -> list[Site]:
    """Return the layers the config means, in model order. Raises TargetError for no match, a typo, a rank too large."""
    candidates = layers_and_projections(model)
    known = {**candidates, **_bare_parameters(model)}
    chosen = _chosen(model, config, candidates, known)
    excluded = _matches(config.exclude_modules, known, model, "exclude_modules") if config.exclude_modules else {}
    if part := next((name for name, parts in excluded.items() if parts), None):
        raise TargetError(f"exclude_modules leaves out whole layers, not parts of {part}; name the others as targets")
    chosen = {name: parts for name, parts in chosen.items() if name not in excluded}
    if not chosen and config.target_modules != "none":
        raise TargetError(
            f"target_modules={config.target_modules!r} leaves no layer of {own_class(model).__name__} to adapt"
        )
    check_untied(model, chosen, config.modules_to_save)
    _check_patterns(config.rank_pattern, chosen, "rank_pattern")
    _check_patterns(config.alpha_pattern, chosen, "alpha_pattern")
    by_name = not _is_keyword(config.target_modules)
    sites = [_site(n, known[n], parts, model, config, by_name) for n in known if (parts := chosen.get(n)) is not None]
    sites = [site for site in sites if site.rank]
    if not by_name and not config.rank_pattern and issubclass(VARIANTS[config.variant], LowRank):
        _check_against_all(sites, config.r)
    return sites


def _check_against_all(sites: list[Site], r: int) -> None:
    # a keyword caps ranks in small layers; a rank that no layer has is a mistake, and alpha / r next to nothing
    if sites and r > max(site.geometry.max_rank for site in sites):
        widest = max(sites, key=lambda site: site.geometry.max_rank)
        raise TargetError(
            f"r={r} is more than any layer has; {widest.name} has the most, a matrix of rank "
            f"{widest.geometry.max_rank}: choose a smaller r"
        )


def layers_and_projections(model: nn.Module) -> dict[str, Geometry]:
    """Return what a keyword may take: layers with a weight, and the weights an attention keeps as bare parameters."""
    found: dict[str, Geometry] = {}
    for name, module in own_modules(model).items():
        geometry = geometry_of(module) if name else None
        if geometry is not None:
            found[name] = geometry
        elif isinstance(module, nn.MultiheadAttention):
            weights = {a: geo for a, geo in _bare(module).items() if a.endswith("proj_weight")}
            found |= {f"{name}.{a}" if name else a: geo for a, geo in weights.items()}
    return found


def _bare_parameters(model: nn.Module) -> dict[str, Geometry]:
    """Return the matrices that modules read themselves, by path: a position embedding, a stack of experts."""
    return {
        f"{name}.{attribute}" if name else attribute: geometry
        for name, module in own_modules(model).items()
        if geometry_of(module) is None and not is_norm(module)
        for attribute, geometry in _bare(module).items()
    }


def _bare(module: nn.Module) -> dict[str, Geometry]:
    own = {a: bare_geometry(p) for a, p in module._parameters.items() if p is not None}
    return {attribute: geometry for attribute, geometry in own.items() if geometry is not None}


def _is_keyword(targets: str | list[str]) -> bool:
    return isinstance(targets, str) and (targets in KEYWORDS or targets in ("auto", "none"))


def _chosen(
    model: nn.Module, config: LoraConfig, candidates: dict[str, Geometry], known: dict[str, Geometry]
) -> dict[str, tuple[str, ...]]:
    targets, heads = config.target_modules, head_layers(model)
    if targets == "none":
        return {}
    if isinstance(targets, str) and _is_keyword(targets):
        # a depthwise kernel has no channel matrix: only the variant that looks for low rank elsewhere takes it
        fit = {n: geo for n, geo in candidates.items() if not geo.depthwise or config.variant == "spatial"}
        if targets == "auto":
            return dict.fromkeys(auto(model, fit, heads), ())
        alone = {*heads, *output_layers(model)}
        return {n: () for n, geo in fit.items() if n not in alone and KEYWORDS[targets](geo)}
    found = _matches(targets, candidates if isinstance(targets, str) else known, model, "target_modules")
    named = [split_entry(entry)[0] for entry in targets] if not isinstance(targets, str) else []
    kept = {n: parts for n, parts in found.items() if n not in heads or n in named}
    if found and not kept:
        raise TargetError(
            f"target_modules={targets!r} matches only the classifier head {', '.join(found)}, which is trained "
            "in full; to make it low-rank all the same, give its whole name in a list"
        )
    return kept


def _matches(
    targets: str | Iterable[str], candidates: dict[str, Geometry], model: nn.Module, where: str
) -> dict[str, tuple[str, ...]]:
    if isinstance(targets, str):
        pattern = compile_pattern(targets, where)
        found: dict[str, tuple[str, ...]] = {n: () for n in candidates if pattern.fullmatch(n)}
        ends = [] if found else [n for n in candidates if n.endswith(f".{targets}")]
        if ends:
            raise TargetError(
                f'{where}: a text is a regular expression over whole names, and "{targets}" is the end of {len(ends)} '
                f'of them ({ends[0]}); write ["{targets}"]'
            )
        return found or _no_match(targets, candidates, model, where)
    found = {}
    for entry in targets:
        name, parts = split_entry(entry)
        hits = [n for n in candidates if n == name or n.endswith(f".{name}")]
        if not hits:
            _no_match(name, candidates, model, where)
        for n in hits:  # no parts means the whole, which holds every part
            whole = not parts or found.get(n) == ()
            found[n] = () if whole else tuple(dict.fromkeys((*found.get(n, ()), *parts)))
    return found


def _no_match(name: str, candidates: dict[str, Geometry], model: nn.Module, where: str) -> dict[str, tuple[str, ...]]:
    model_name = own_class(model).__name__
    others = [n for n in own_modules(model) if n and (n == name or n.endswith(f".{name}"))]
    if others:
        kind = type(model.get_submodule(others[0])).__name__
        if is_norm(model.get_submodule(others[0])):
            cure = 'its scale and shift are trained by norm="affine"'
        elif inside := next((n for n in candidates if n.startswith(f"{others[0]}.")), None):
            cure = f'name the layers inside, e.g. "{inside}"'
        else:
            cure = "leave it out"
        raise TargetError(
            f'{where}: "{name}" is {len(others)} module(s) of class {kind}, which owns no weight we can adapt; {cure}'
        )
    vectors = [n for n, p in model.named_parameters() if (n == name or n.endswith(f".{name}")) and p.ndim < 2]
    if vectors:
        raise TargetError(
            f'{where}: "{name}" is a vector, which has no low rank; train it in full with modules_to_save=["{name}"]'
        )
    endings: dict[str, int] = {}
    for candidate in candidates:
        path = candidate.split(".")
        for i in range(len(path)):
            ending = ".".join(path[i:])
            endings[ending] = endings.get(ending, 0) + 1
    told = f'{where}: no layer matches "{name}" in {model_name}'
    near = did_you_mean(name, [*endings, *KEYWORDS])
    if not near:
        raise TargetError(f"{told}; visionlora info --model lists its {len(candidates)} layers")
    layers = endings.get(near.split(chr(34))[1])
    raise TargetError(told + near + (f" ({layers} layer{'s' if layers > 1 else ''})" if layers else ""))


def pattern_value(patterns: dict[str, float], name: str) -> float | None:
    """Return the value of the first pattern that matches a layer name's ending, as PEFT reads patterns."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), None)


def _check_patterns(patterns: dict[str, float] | dict[str, int], names: Iterable[str], where: str) -> None:
    names = list(names)
    for pattern in patterns:
        if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in names):
            endings = sorted({n.rpartition(".")[2] for n in names})
            raise TargetError(f'{where}: no adapted layer matches "{pattern}"{did_you_mean(pattern, endings + names)}')


def _site(
    name: str, geo: Geometry, parts: tuple[str, ...], model: nn.Module, config: LoraConfig, by_name: bool
) -> Site:
    variant = VARIANTS[config.variant]
    asked = pattern_value(dict(config.rank_pattern), name)
    rank = config.r if asked is None else int(asked)
    scale = config.scale(rank, pattern_value(dict(config.alpha_pattern), name)) if variant.scaled else 1.0
    rows = split_rows(model, name, geo, parts) if parts else {}
    smallest = geo.rows(min(stop - start for start, stop in rows.values())) if rows else geo
    largest = variant.largest_rank(smallest, config)
    if not variant.ranked:
        rank = 1
    if by_name or asked is not None:
        _check_rank(name, smallest, rank, largest, variant)
    # a keyword meets layers of every width: small ones get the largest rank that still is a saving, at the same scale
    return Site(name, geo, min(rank, largest), scale, rows)


def _check_rank(name: str, geo: Geometry, rank: int, largest: int, variant: type[Variant]) -> None:
    shape = "x".join(map(str, geo.shape)) + (f", {geo.groups} groups" if geo.groups > 1 else "")
    if reason := variant.unfit(geo):
        raise TargetError(f"{variant.__name__} does not fit {name}: {reason}; leave it out or choose another variant")
    if not largest:
        kind = "low-rank change" if issubclass(variant, LowRank) else f"change of variant {variant.__name__}"
        other = ', or take variant "spatial", which shares filters among channels' if geo.depthwise else ""
        raise TargetError(
            f"{name} ({shape}) has so few weights that every {kind} is larger than the layer; "
            f'leave it out (exclude_modules=["{name}"]) or train it in full (modules_to_save=["{name}"]){other}'
        )
    if issubclass(variant, LowRank) and rank > geo.max_rank:
        raise TargetError(
            f"{name} ({shape}) is a matrix of rank {geo.max_rank} at most, r={rank} is larger; "
            f'set rank_pattern={{"{name}": {largest}}} or a smaller r'
        )
    if rank > largest:
        raise TargetError(
            f"{name} ({shape}): at r={rank} the change has more parameters than the weight; "
            f'set rank_pattern={{"{name}": {largest}}} or a smaller r'
        )
