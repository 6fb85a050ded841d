"""Heads, biases and statistics of combined adapters, and an adapter at several strengths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from io_toy import Net, assert_same, look, timm_model
from layer_kinds import stir
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.compose import combine, sweep
from visionlora.compose.averages import average, mixture
from visionlora.errors import StateError, VisionLoRAError
from visionlora.registry import adapter_state


def net(classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Net(classes=classes).double().eval()


def pair(model: nn.Module, **config: Any) -> nn.Module:
    """Return the model with two adapters that are not the same."""
    for name in ("one", "two"):
        vl.apply_lora(model, vl.LoraConfig(**{"r": 2, "target_modules": ["hidden"], **config}), name=name)
        stir(model, name)
    return model


def values(model: nn.Module, key: str) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(adapter_state(model, name)[key] for name in ("one", "two", "combined"))  # type: ignore[return-value]


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (1.0, -0.5)])
@pytest.mark.parametrize(
    ("config", "key"),
    [
        ({}, "fc/weight"),
        ({}, "fc/bias"),
        ({"bias": "all"}, "stem/bias"),
        ({"modules_to_save": ["mix"]}, "mix/weight"),
    ],
)
def test_tensors_owned_in_full_are_the_base_and_weighted_differences(
    weights: tuple[float, float], config: dict[str, Any], key: str
) -> None:
    model = pair(net(), **config)
    combine(model, {"one": weights[0], "two": weights[1]})
    one, two, made = values(model, f"{key}/value")
    base = vl.base_state_dict(model)[key.replace("/", ".")]
    assert (made - base).abs().max() > 1e-3
    assert_close(made, base + weights[0] * (one - base) + weights[1] * (two - base))


def test_an_adapter_without_a_tensor_of_its_own_counts_as_the_base() -> None:
    model = net()
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["hidden"], bias="lora_only"), name="one")
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["mix"], modules_to_save="none"), name="two")
    for name in ("one", "two"):
        stir(model, name)
    combine(model, {"one": 0.25, "two": 0.75})
    for key in ("fc/weight", "hidden/bias"):
        base = vl.base_state_dict(model)[key.replace("/", ".")]
        one, made = (adapter_state(model, name)[f"{key}/value"] for name in ("one", "combined"))
        assert_close(made, base + 0.25 * (one - base))
    assert "mix/bias/value" not in adapter_state(model, "combined")


@pytest.mark.parametrize("what", ["head", "norm"])
@pytest.mark.parametrize("choice", ["first", "two", "base"])
def test_head_and_norm_can_be_taken_over_or_left_away(what: str, choice: str) -> None:
    model = pair(net(), norm="stats-affine")
    combine(model, {"one": 0.5, "two": 0.5}, **{what: choice})
    keys = {"head": ("fc/weight/value", "fc/bias/value"), "norm": ("bn/weight/value", "bn/running_var/value")}
    state = adapter_state(model, "combined")
    for key in keys[what]:
        if choice == "base":
            assert key not in state
        else:
            assert torch.equal(state[key], adapter_state(model, {"first": "one"}.get(choice, choice))[key])
    one, two, made = values(model, keys["norm" if what == "head" else "head"][0])
    assert_close(made, (one + two) / 2)


def test_a_head_from_an_adapter_that_has_none_is_the_base_head() -> None:
    model = net()
    for name, saved in (("one", "auto"), ("two", "none")):
        vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["hidden"], modules_to_save=saved), name=name)
        stir(model, name)
    combine(model, ["one", "two"], head="two")
    assert not any(key.startswith("fc/") for key in adapter_state(model, "combined"))


@pytest.fixture
def of_other_starts(tmp_path: Path) -> nn.Module:
    """Return a model with two adapters whose heads began at other random values."""
    model = net(seed=0)
    for name, seed in (("one", 1), ("two", 2)):
        other = net(seed=0)
        torch.manual_seed(seed)
        other.fc = nn.Linear(16, 3).double()
        vl.apply_lora(other, vl.LoraConfig(r=2, target_modules=["hidden"]), name=name)
        stir(other, name)
        vl.save_adapter(other, tmp_path / name, name=name)
        vl.load_adapter(model, tmp_path / name)
    return model


def test_heads_of_other_starts_have_an_average(of_other_starts: nn.Module) -> None:
    combine(of_other_starts, {"one": 0.7, "two": 0.3})
    for leaf in ("value", "start"):
        one, two, made = values(of_other_starts, f"fc/weight/{leaf}")
        assert_close(made, 0.7 * one + 0.3 * two)


def test_heads_of_other_starts_have_no_sum(of_other_starts: nn.Module) -> None:
    before = look(of_other_starts)
    with pytest.raises(StateError, match=r"must sum to 1, and sum to 2.*head=\"one\" takes one over"):
        combine(of_other_starts, {"one": 1.0, "two": 1.0})
    assert_same(look(of_other_starts), before)
    combine(of_other_starts, {"one": 1.0, "two": 1.0}, head="two")
    assert torch.equal(*values(of_other_starts, "fc/weight/value")[1:])


def test_a_head_whose_start_is_lost_stays_so(tmp_path: Path) -> None:
    wide = 70_000  # elements: more than an adapter keeps the start of
    torch.manual_seed(0)
    trained = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, wide // 8)).double()
    trained.get_classifier = lambda: trained[1]
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, wide // 8)).double()
    model.get_classifier = lambda: model[1]
    model[0].load_state_dict(trained[0].state_dict())
    for name in ("one", "two"):
        vl.apply_lora(trained, vl.LoraConfig(r=2, target_modules=["0"]), name=name)
        stir(trained, name)
        vl.save_adapter(trained, tmp_path / name, name=name)
        vl.load_adapter(model, tmp_path / name)
    combine(model, ["one", "two"])
    one, two, made = values(model, "1/weight/value")
    assert_close(made, (one + two) / 2)
    assert "1/weight/start" not in adapter_state(model, "combined")
    vl.activate(model, "combined", strength=0.5)
    with pytest.raises(StateError, match="strength"):
        model(torch.randn(1, 8).double())
    with pytest.raises(StateError, match="must sum to 1"):
        combine(model, {"one": 1.0, "two": 1.0}, name="sum")
    combine(model, ["one", "two"], name="taken", head="two")
    vl.activate(model, "taken", strength=0.5)
    with pytest.raises(StateError, match="strength"):
        model(torch.randn(1, 8).double())


def of_other_sizes(tmp_path: Path) -> nn.Module:
    model = net(classes=3)
    for name, classes in (("one", 3), ("two", 5)):
        other = net(classes=3)
        torch.manual_seed(1)
        other.fc = nn.Linear(16, classes).double()
        vl.apply_lora(other, vl.LoraConfig(r=2, target_modules=["hidden"]), name=name)
        stir(other, name)
        vl.save_adapter(other, tmp_path / name, name=name)
        vl.load_adapter(model, tmp_path / name, allow_other_classes=True)
    return model


def test_heads_of_other_sizes_have_no_average(tmp_path: Path) -> None:
    model = of_other_sizes(tmp_path)
    before = look(model)
    with pytest.raises(StateError, match=r'fc of different sizes \(one 3, two 5 outputs\).*head="one"'):
        combine(model, ["one", "two"])
    assert_same(look(model), before)
    combine(model, ["one", "two"], head="two")
    vl.activate(model, "combined")
    assert model(torch.randn(2, 3, 5, 5).double()).shape == (2, 5)


def test_statistics_become_those_of_the_images_of_both() -> None:
    rng = np.random.default_rng(0)
    domains = {
        "one": rng.normal(0, 1, (300, 4)),
        "two": rng.normal(3, 2, (100, 4)),
        "base": rng.normal(-1, 3, (600, 4)),
    }
    means, variances = (
        {name: torch.from_numpy(moment(images, axis=0)) for name, images in domains.items()}
        for moment in (np.mean, np.var)
    )
    base = (means.pop("base"), variances.pop("base"))
    mean, variance = mixture(means, variances, {"one": 0.3, "two": 0.1}, base)
    everything = np.concatenate(list(domains.values()))
    np.testing.assert_allclose(mean.numpy(), everything.mean(axis=0))
    np.testing.assert_allclose(variance.numpy(), everything.var(axis=0))
    both = np.concatenate([domains["one"], domains["two"]])
    mean, variance = mixture(means, variances, {"one": 3.0, "two": 1.0}, base)
    np.testing.assert_allclose(mean.numpy(), both.mean(axis=0))
    np.testing.assert_allclose(variance.numpy(), both.var(axis=0))


def test_mixed_statistics_are_on_the_model() -> None:
    model = pair(net(), norm="stats")
    combine(model, {"one": 0.5, "two": 0.25})
    base = vl.base_state_dict(model)
    m1, m2, mean = values(model, "bn/running_mean/value")
    v1, v2, variance = values(model, "bn/running_var/value")
    m0, v0 = base["bn.running_mean"], base["bn.running_var"]
    assert_close(mean, 0.5 * m1 + 0.25 * m2 + 0.25 * m0)
    second = 0.5 * (v1 + m1**2) + 0.25 * (v2 + m2**2) + 0.25 * (v0 + m0**2)
    assert_close(variance, second - mean**2)
    vl.activate(model, "combined")
    assert_close(model.bn.running_var, variance)


def test_statistics_cannot_be_subtracted() -> None:
    model = pair(net(), norm="stats")
    before = look(model)
    with pytest.raises(StateError, match=r'running_mean of bn.*negative weight.*norm="one" takes one over'):
        combine(model, {"one": 1.0, "two": -0.5})
    assert_same(look(model), before)
    combine(model, {"one": 1.0, "two": -0.5}, norm="base")
    assert "bn/running_var/value" not in adapter_state(model, "combined")


def test_nothing_left_to_combine_is_refused() -> None:
    model = pair(net(), target_modules="none")
    with pytest.raises(StateError, match="nothing is left"):
        combine(model, ["one", "two"], head="base")


def test_an_average_keeps_a_common_start() -> None:
    start = torch.randn(3).double()
    ends = {"one": start + 1, "two": start - 3}
    found = average(ends, dict.fromkeys(ends, start), {"one": 2.0, "two": 1.0})
    assert_close(found.value, start - 1)
    assert found.start is start


@torch.no_grad()  # layers may compute in another order where they are trained
def score(model: nn.Module) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    y = model(torch.randn(2, 3, 5, 5, generator=generator).double())
    return {"target": y.mean().item(), "source": -y.square().mean().item()}


def test_sweep_measures_every_strength_and_leaves_the_model_as_it_was() -> None:
    model = pair(net())
    vl.activate(model, "two", strength=0.5)
    with vl.disabled(model):
        base = score(model)
    found = sweep(model, "one", [0, 0.5, 1, 1.5], score)
    assert vl.active_adapters(model) == {"two": 0.5}
    assert found.rows[0] == (0, base)
    for strength, metrics in found.rows:
        vl.activate(model, "one", strength)
        assert metrics == score(model)
    largest = max(found.rows, key=lambda row: row[1]["target"])[0]
    assert found.best("target") == largest
    lines = str(found).splitlines()
    assert lines[0].split() == ["strength", "of", "one", "target", "source"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "0.5", "1", "1.5"]


def test_sweep_takes_one_number_and_prefers_the_smaller_of_equal_strengths() -> None:
    model = pair(net())
    vl.deactivate(model)
    found = sweep(model, "one", [1, 0.25, 0.5], lambda net: 1.0)
    assert found.best("metric") == 0.25
    assert vl.active_adapters(model) == {}
    assert not any(p.requires_grad for p in model.parameters())


def test_a_combination_equals_the_adapters_run_at_once_and_a_sweep_puts_them_back() -> None:
    model = net()
    for name, variant in (("one", "lora"), ("two", "dora")):
        config = vl.LoraConfig(r=2, target_modules=["hidden", "mix"], variant=variant, modules_to_save="none")
        vl.apply_lora(model, config, name=name)
        stir(model, name)
    weights = {"one": 0.7, "two": 0.3}
    combine(model, weights)
    at_once = score(vl.activate(model, weights))
    before = look(model)
    found = sweep(model, "combined", [1], score)
    assert found.rows[0][1] == pytest.approx(at_once)
    assert vl.active_adapters(model) == weights
    assert_same(look(model), before)


def broken(model: nn.Module) -> float:
    raise OSError("no images")


@pytest.mark.parametrize(
    ("name", "strengths", "evaluate", "message"),
    [
        ("on", [1], score, 'did you mean "one"'),
        ("one", [], score, "at least one strength"),
        ("one", [0.5, float("nan")], score, "finite number"),
        ("one", [0.5, -1], score, "at least 0"),
        ("one", [0.5], broken, "no images"),
    ],
)
def test_a_sweep_that_fails_leaves_the_model_as_it_was(
    name: str, strengths: list[float], evaluate: Callable[[nn.Module], Any], message: str
) -> None:
    model = pair(net())
    vl.activate(model, "two", strength=0.5)
    before = look(model)
    with pytest.raises((VisionLoRAError, OSError), match=message):
        sweep(model, name, strengths, evaluate)
    assert_same(look(model), before)
    assert vl.active_adapters(model) == {"two": 0.5}


def test_an_unknown_metric_names_the_nearest() -> None:
    model = pair(net())
    with pytest.raises(VisionLoRAError, match='did you mean "target"'):
        sweep(model, "one", [1], score).best("traget")


def test_a_backbone_with_batch_norm_combines_whole() -> None:
    model = timm_model("test_resnet").double()
    for name, norm in (("one", "stats"), ("two", "stats-affine")):
        vl.apply_lora(model, vl.LoraConfig(r=2, norm=norm), name=name)
        stir(model, name)
    report = combine(model, {"one": 0.6, "two": 0.4}, method="svd", rank=3)
    assert report.owned.keys() == {"head", "norm"}
    vl.activate(model, "combined")
    assert model(torch.randn(1, 3, 32, 32).double()).isfinite().all()
