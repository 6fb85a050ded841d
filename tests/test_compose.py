"""Adapters made of adapters: exact sums, nearest changes of a rank, merges of entries, and what is refused."""

from __future__ import annotations

import copy
from typing import Any, get_args

import numpy as np
import pytest
import torch
from io_toy import Net, assert_same, images, look, timm_model
from layer_kinds import CASES, RANKS, build, config_of, stir
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.compose import combine
from visionlora.compose.methods import METHODS, disjoint_mean, drop, trim
from visionlora.config import Init
from visionlora.core.thin import Thin, cut
from visionlora.errors import VisionLoRAError
from visionlora.registry import adapted_layers, adapter_plan, adapter_state

EVERY = pytest.mark.parametrize(("variant", "kind"), CASES)


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double().eval()


def put(model: nn.Module, name: str, **config: Any) -> None:
    vl.apply_lora(model, vl.LoraConfig(**{"r": 2, "lora_alpha": 3.0, **config}), name=name)
    stir(model, name)


def seats(model: nn.Module, *names: str) -> set[tuple[str, str]]:
    """Return (layer, attribute) of every weight one of the adapters changes."""
    return {(site.layer, site.attribute) for name in names for site in adapter_plan(model, name).sites}


def change(model: nn.Module, name: str, layer: str, attribute: str) -> Tensor:
    """Return what an adapter adds to a stored tensor; nothing where it does not change it."""
    vl.activate(model, name)
    owner = adapted_layers(model)[layer]
    with torch.no_grad():
        return owner.effective(attribute) - owner.base_tensor(attribute)


def changes(model: nn.Module, weights: dict[str, float], layer: str, attribute: str) -> Tensor:
    return sum(w * change(model, name, layer, attribute) for name, w in weights.items())  # type: ignore[return-value]


def of_kind(variant: str, kind: str) -> nn.Module:
    """Return a layer with two adapters of other ranks, scales and sometimes variants."""
    model, _ = build(kind)
    vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind], lora_alpha=4), name="one")
    other = "lora" if ("lora", kind) in RANKS else variant
    vl.apply_lora(model, config_of(other, kind, r=1, lora_alpha=3, use_rslora=True), name="two")
    stir(model, "one")
    stir(model, "two")
    return model


@EVERY
def test_the_sum_is_exact_whatever_the_variant(variant: str, kind: str) -> None:
    model, weights = of_kind(variant, kind), {"one": 0.7, "two": -0.4}
    x = build(kind)[1]
    ((layer, attribute),) = seats(model, "one")
    wanted = changes(model, weights, layer, attribute)
    assert wanted.abs().max() > 1e-3, "no effect: the comparison would be empty"
    largest = adapter_plan(model, "one").sites[0].geometry.max_rank
    for method, rank in (("concat", None), ("svd", largest)):
        report = combine(model, weights, method=method, rank=rank, name=method)
        assert_close(change(model, method, layer, attribute), wanted, rtol=1e-9, atol=1e-9)
        assert report.error < 1e-7
        assert adapter_plan(model, method).config.variant == "lora"
    y = vl.activate(model, "concat")(x)
    assert_close(vl.merge(model)(x), y)


@pytest.mark.parametrize("kind", [k for v, k in CASES if v == "lora"])
def test_ranks_of_plain_adapters_add_up(kind: str) -> None:
    model = of_kind("lora", kind)
    one, two = (adapter_plan(model, name).sites[0] for name in ("one", "two"))
    combine(model, ["one", "two"])
    (made,) = adapter_plan(model, "combined").sites
    assert made.rank == min(one.rank + two.rank, one.geometry.max_rank)
    assert (made.parts, made.scale) == (one.parts, 1)


@pytest.mark.parametrize("start", get_args(Init))
def test_the_sum_is_exact_whatever_the_start(start: str) -> None:
    model = nn.Sequential(nn.Linear(8, 12)).double()
    for name in ("one", "two"):
        vl.apply_lora(model, config_of("lora", "linear", r=2, init_lora_weights=start), name=name)
        stir(model, name)
    combine(model, ["one", "two"])
    wanted = changes(model, {"one": 0.5, "two": 0.5}, "0", "weight")
    assert_close(change(model, "combined", "0", "weight"), wanted)


@pytest.mark.parametrize("kind", ["linear", "conv_3x3", "conv_grouped", "conv_transpose_grouped"])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_cut_loses_the_dropped_singular_values_and_no_more(kind: str, rank: int) -> None:
    model, weights = of_kind("lora", kind), {"one": 1.0, "two": -2.0}
    report = combine(model, weights, method="svd", rank=rank)
    ((layer, attribute),) = seats(model, "one")
    geometry = adapter_plan(model, "one").sites[0].geometry
    wanted, got = (
        geometry.canonical(dense).reshape(geometry.groups, geometry.out // geometry.groups, -1).numpy()
        for dense in (changes(model, weights, layer, attribute), change(model, "combined", layer, attribute))
    )
    values = np.linalg.svd(wanted, compute_uv=False)
    dropped = (values[:, rank:] ** 2).sum()
    assert dropped > 1e-3
    np.testing.assert_allclose(((wanted - got) ** 2).sum(), dropped, rtol=1e-9)
    np.testing.assert_allclose(report.error, np.sqrt(dropped / (values**2).sum()), rtol=1e-9)
    assert report.layers[0].rank == rank
    assert all(np.linalg.matrix_rank(matrix) == rank for matrix in got)


def test_thin_factors_are_cut_like_the_dense_change() -> None:
    thin = Thin(torch.randn(2, 7, 5).double(), torch.randn(2, 5, 9).double())
    for rank in (1, 3, 5, 7):
        ours, truth = cut(thin, rank), cut(thin.dense(), rank)
        assert_close(ours.factors.dense(), truth.factors.dense())
        assert ours.factors.rank == truth.factors.rank == min(rank, 5)
        assert ours.dropped == pytest.approx(truth.dropped, abs=1e-12)
        assert ours.total == pytest.approx(truth.total)


def test_an_adapter_takes_no_more_rank_than_its_change_has() -> None:
    model = of_kind("loha", "linear")
    combine(model, {"two": 1.0}, method="svd", rank=8)
    assert [site.rank for site in adapter_plan(model, "combined").sites] == [1]


def vit(dtype: torch.dtype = torch.float64) -> nn.Module:
    return timm_model("test_vit", img_size=64).to(dtype)


PARTS = {
    "same parts": (["attn.qkv[q,v]"], ["attn.qkv[q,v]"], ["q", "v"]),
    "other parts": (["attn.qkv[q]"], ["attn.qkv[v,k]"], ["q", "k", "v"]),
    "overlapping parts": (["attn.qkv[q,k]"], ["attn.qkv[k,v]"], ["q", "k", "v"]),
    "a part and the whole": (["attn.qkv[q,v]"], ["attn.qkv"], []),
    "the whole and a part": (["attn.qkv"], ["attn.qkv[k]"], []),
    "other layers": (["attn.qkv[q]", "mlp.fc1"], ["mlp.fc1", "blocks.1.mlp.fc2"], ["q"]),
}


@pytest.mark.parametrize("variants", [("lora", "lora"), ("dora", "lora"), ("loha", "ia3")], ids="+".join)
@pytest.mark.parametrize("case", PARTS)
def test_parts_and_layers_of_some_adapters_alone_add_up(case: str, variants: tuple[str, str]) -> None:
    model, weights = vit(), {"one": 0.7, "two": 0.3}
    for name, targets, variant in zip(weights, PARTS[case], variants, strict=False):
        put(model, name, target_modules=targets, variant=variant, modules_to_save="none")
    report = combine(model, weights)
    assert seats(model, "combined") == seats(model, "one", "two")
    for layer, attribute in seats(model, "one", "two"):
        wanted = changes(model, weights, layer, attribute)
        assert_close(change(model, "combined", layer, attribute), wanted, rtol=1e-9, atol=1e-9)
    made = {site.name: list(site.parts) for site in adapter_plan(model, "combined").sites}
    assert made["blocks.0.attn.qkv"] == PARTS[case][2]
    assert [layer.name.partition("[")[0] for layer in report.layers] == list(made)


def test_patterns_and_rslora_are_numbers_of_each_layer() -> None:
    model = vit()
    put(model, "one", rank_pattern={"fc1": 5}, alpha_pattern={"blocks.0.attn.qkv": 9.0}, modules_to_save="none")
    put(model, "two", r=4, use_rslora=True, modules_to_save="none")
    combine(model, ["one", "two"])
    for layer, attribute in seats(model, "one"):
        wanted = changes(model, {"one": 0.5, "two": 0.5}, layer, attribute)
        assert_close(change(model, "combined", layer, attribute), wanted)


def test_dropout_and_training_leave_the_sum_alone() -> None:
    model = net().train()
    put(model, "one", target_modules=["hidden", "mix"], lora_dropout=0.5)
    put(model, "two", target_modules=["hidden"], lora_dropout=0.5, variant="loha")
    combine(model, ["one", "two"])
    model.eval()
    wanted = changes(model, {"one": 0.5, "two": 0.5}, "hidden", "weight")
    assert_close(change(model, "combined", "hidden", "weight"), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_lower_precision_are_added_in_float64(dtype: torch.dtype) -> None:
    model = vit(dtype)
    for name, variant in (("one", "lora"), ("two", "dora")):
        put(model, name, variant=variant, target_modules=["fc1"], modules_to_save="none")
    twin = copy.deepcopy(model).double()
    wanted = changes(twin, {"one": 0.5, "two": 0.5}, "blocks.0.mlp.fc1", "weight")
    combine(model, ["one", "two"])
    assert adapter_state(model, "combined")["blocks.0.mlp.fc1/weight/A"].dtype == torch.float32
    assert_close(change(model.double(), "combined", "blocks.0.mlp.fc1", "weight"), wanted, rtol=1e-5, atol=1e-5)


def slow_trim(change: np.ndarray, density: float) -> np.ndarray:
    order = sorted(range(change.size), key=lambda i: -abs(change.flat[i]))
    kept = np.zeros_like(change)
    for i in order[: int(density * change.size)]:
        kept.flat[i] = change.flat[i]
    return kept


def slow_ties(changes: list[np.ndarray], weights: list[float]) -> np.ndarray:
    merged = np.zeros_like(changes[0])
    for at in np.ndindex(merged.shape):
        entries = [c[at] for c in changes]
        sign = 1 if sum(entries) >= 0 else -1
        agree = [w * e for w, e in zip(weights, entries, strict=True) if np.sign(e) == sign]
        merged[at] = sum(agree) / len(agree) if agree else 0
    return merged


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_trim_and_disjoint_mean_follow_the_paper_entry_by_entry(density: float) -> None:
    stack = [torch.randn(2, 5, 7).double() for _ in range(3)]
    kept = [trim(change, density, torch.Generator()) for change in stack]
    slow = [slow_trim(change.numpy(), density) for change in stack]
    assert_close([k.numpy() for k in kept], slow)
    weights = [1.0, 0.6, 1.3]
    np.testing.assert_allclose(disjoint_mean(kept, weights).numpy(), slow_ties(slow, weights), atol=1e-12)


def test_dare_drops_at_random_scales_up_and_is_the_change_on_average() -> None:
    change = torch.randn(2, 60, 70).double()
    kept = drop(change, 0.3, torch.Generator().manual_seed(0))
    numbers = torch.rand(change.shape, dtype=change.dtype, generator=torch.Generator().manual_seed(0)).numpy()
    np.testing.assert_allclose(kept.numpy(), np.where(numbers < 0.3, change.numpy() / 0.3, 0))
    assert (kept != 0).double().mean() == pytest.approx(0.3, abs=0.02)
    random = torch.Generator().manual_seed(0)
    mean = sum(drop(change, 0.3, random) for _ in range(400)) / 400
    assert (mean - change).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("method", [name for name, known in METHODS.items() if known.keep])
@pytest.mark.parametrize("kind", ["linear", "conv_grouped", "attention_in_parts"])
def test_a_merge_is_the_slow_one_cut_by_svd(method: str, kind: str) -> None:
    model, weights = of_kind("lora", kind), {"one": 1.0, "two": 0.6}
    ((layer, attribute),) = seats(model, "one")
    site = adapter_plan(model, "one").sites[0]
    random, kept = torch.Generator().manual_seed(3), {}
    blocks = list(site.parts.values()) or [(0, site.geometry.out)]
    for name in weights:
        dense = site.geometry.canonical(change(model, name, layer, attribute))
        for rows in blocks:
            piece = dense[slice(*rows)].reshape(site.geometry.groups, -1, site.geometry.taps)
            thin = slow_trim(piece.numpy(), 0.4)
            if method.startswith("dare"):
                draw = torch.rand(piece.shape, dtype=piece.dtype, generator=random).numpy()
                thin = np.where(draw < 0.4, piece.numpy() / 0.4, 0)
            kept[name, rows] = thin
    report = combine(model, weights, method=method, rank=2, density=0.4, seed=3)
    got = site.geometry.canonical(change(model, "combined", layer, attribute)).numpy()
    lost = total = 0.0
    for rows in blocks:
        both = [kept[name, rows] for name in weights]
        merged = slow_ties(both, [1.0, 0.6]) if METHODS[method].averages else both[0] + 0.6 * both[1]
        U, S, Vh = np.linalg.svd(merged, full_matrices=False)
        wanted = (U[:, :, :2] * S[:, None, :2]) @ Vh[:, :2]
        np.testing.assert_allclose(got[slice(*rows)].reshape(wanted.shape), wanted, atol=1e-9)
        lost, total = lost + (S[:, 2:] ** 2).sum(), total + (S**2).sum()
    assert report.error == pytest.approx(np.sqrt(lost / total))


def test_random_merges_depend_on_the_seed_alone() -> None:
    model = vit()
    put(model, "one")
    put(model, "two")
    before = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        combine(model, ["one", "two"], method="dare_linear", name=name, seed=seed)
        torch.rand(3)
    a, b, c = (adapter_state(model, name)["blocks.0.attn.qkv/weight/A"] for name in "abc")
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    torch.set_rng_state(before)
    combine(model, ["one", "two"], name="d")
    assert torch.equal(torch.get_rng_state(), before)


def test_names_alone_are_averaged() -> None:
    model = vit()
    put(model, "one", target_modules=["fc1"])
    put(model, "two", target_modules=["fc1"])
    assert combine(model, ["one", "two"], name="sum").weights == {"one": 0.5, "two": 0.5}
    assert combine(model, ["one", "two"], name="ties", method="ties").weights == {"one": 1, "two": 1}
    halves = changes(model, {"one": 0.5, "two": 0.5}, "head", "weight")
    assert_close(change(model, "sum", "head", "weight"), halves)
    assert_close(change(model, "ties", "head", "weight"), halves)


def test_a_weight_of_zero_leaves_an_adapter_out() -> None:
    model = vit()
    put(model, "one", target_modules=["fc1"])
    put(model, "two", target_modules=["fc2"])
    assert combine(model, {"one": 1.0, "two": 0.0}).weights == {"one": 1}
    assert seats(model, "combined") == seats(model, "one")


def test_subtracting_an_adapter_from_itself_leaves_the_base() -> None:
    model = vit()
    put(model, "one")
    base = vl.deactivate(model)(images().double())
    combine(model, {"one": 1.0}, name="copy")
    combine(model, {"one": 1.0, "copy": -1.0}, name="nothing")
    vl.activate(model, "nothing")
    assert_close(model(images().double()), base)


def test_the_new_adapter_is_inactive_and_the_others_are_as_they_were() -> None:
    model = vit()
    put(model, "one", variant="dora")
    put(model, "two")
    states = {name: adapter_state(model, name) for name in ("one", "two")}
    states = copy.deepcopy(states)
    vl.activate(model, "one", strength=0.5)
    y, grads = model(images().double()), {n: p.requires_grad for n, p in model.named_parameters()}
    combine(model, ["one", "two"], method="ties")
    assert vl.adapter_names(model) == ["one", "two", "combined"]
    assert vl.active_adapters(model) == {"one": 0.5}
    assert torch.equal(model(images().double()), y)
    assert {n: p.requires_grad for n, p in model.named_parameters() if n in grads} == grads
    for name, state in states.items():
        assert all(torch.equal(adapter_state(model, name)[key], tensor) for key, tensor in state.items())
    vl.remove(model, "combined")


def test_strength_scales_the_new_adapter_as_a_whole() -> None:
    model = net()
    put(model, "one", target_modules=["hidden", "mix"], bias="all")
    put(model, "two", target_modules=["hidden", "stem"], variant="dora")
    combine(model, {"one": 0.7, "two": 0.3}, name="whole")
    combine(model, {"one": 0.35, "two": 0.15}, name="less")
    x = torch.randn(2, 3, 9, 9).double()
    vl.activate(model, "less")
    wanted = model(x)
    vl.activate(model, "whole", strength=0.5)
    assert_close(model(x), wanted)


def test_the_new_adapter_saves_loads_merges_and_trains(tmp_path: Any) -> None:
    model = vit(torch.float32)
    put(model, "one", target_modules=["attn.qkv[q,v]", "fc1"], bias="lora_only")
    put(model, "two", variant="loha", norm="stats-affine")
    combine(model, {"one": 0.7, "two": 0.3})
    vl.activate(model, "combined")
    y = model(images())
    vl.save_adapter(model, tmp_path, name="combined")
    fresh = vit(torch.float32)
    vl.load_adapter(fresh, tmp_path, trainable=True)
    assert_close(fresh(images()), y)
    fresh(images()).square().mean().backward()
    vl.check_gradients(fresh)
    assert_close(vl.merge(model)(images()), y, rtol=1e-4, atol=1e-4)


def test_the_report_shows_layers_weights_and_error() -> None:
    model = vit()
    put(model, "one", target_modules=["attn.qkv[q,v]", "fc1"])
    put(model, "two", target_modules=["fc1"])
    report = combine(model, {"one": 1.0, "two": -0.5}, method="svd", rank=2)
    text = str(report)
    assert "blocks.0.attn.qkv[q,v]  1 of 2" in text
    assert "(head, in full)" in text
    assert "combined = +1 one -0.5 two by svd" in text
    assert f"{report.error:.2%}" in text
    assert 0 < report.error < 1


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "unknown name": (["on", "two"], {}, 'did you mean "one"'),
    "no name": ([], {}, "at least one adapter"),
    "weights of zero": ({"one": 0.0}, {}, "other than 0"),
    "named twice": (["one", "one"], {}, "named twice"),
    "a weight that is no number": ({"one": float("nan")}, {}, "finite number"),
    "an infinite weight": ({"one": float("inf")}, {}, "finite number"),
    "a weight of text": ({"one": "1"}, {}, "finite number"),
    "a name that is taken": (["one"], {"name": "two"}, "already attached"),
    "a name that is none": (["one"], {"name": "a/b"}, "adapter name"),
    "unknown method": (["one"], {"method": "tie"}, 'did you mean "ties"'),
    "rank 0": (["one"], {"method": "svd", "rank": 0}, "at least 1"),
    "rank 2.5": (["one"], {"method": "svd", "rank": 2.5}, "whole number"),
    "rank of ia3": (["three"], {"method": "svd"}, "has no rank"),
    "rank too large": (["one"], {"method": "svd", "rank": 999}, "more than any layer can have"),
    "rank of concat": (["one"], {"rank": 2}, 'method="svd"'),
    "density 0": (["one"], {"method": "ties", "density": 0.0}, "above 0"),
    "density above 1": (["one"], {"method": "dare_ties", "density": 1.5}, "at most 1"),
    "density of svd": (["one"], {"method": "svd", "density": 0.5}, "keeps every entry"),
    "negative ties": ({"one": 1.0, "two": -1.0}, {"method": "ties"}, "must be positive"),
    "unknown head": (["one", "two"], {"head": "twoo"}, 'did you mean "two"'),
    "unknown norm": (["one", "two"], {"norm": "avrage"}, 'did you mean "average"'),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_and_changes_nothing(case: str) -> None:
    adapters, options, message = BAD[case]
    model = vit()
    put(model, "one", target_modules=["fc1"])
    put(model, "two", target_modules=["fc1"])
    put(model, "three", target_modules=["fc1"], variant="ia3")
    before = look(model)
    with pytest.raises(VisionLoRAError, match=message):
        combine(model, adapters, **options)
    assert_same(look(model), before)
    assert vl.adapter_names(model) == ["one", "two", "three"]


def test_a_weight_changed_by_low_rank_and_in_full_is_refused() -> None:
    model = net()
    put(model, "one", target_modules=["hidden"])
    put(model, "two", target_modules=["mix"], modules_to_save=["hidden"])
    before = look(model)
    for order in (["one", "two"], ["two", "one"]):
        with pytest.raises(VisionLoRAError, match="in full"):
            combine(model, order)
    assert_same(look(model), before)


def test_a_merged_model_is_refused() -> None:
    model = vit()
    put(model, "one")
    vl.merge(model)
    with pytest.raises(VisionLoRAError, match="unmerge"):
        combine(model, ["one"])
