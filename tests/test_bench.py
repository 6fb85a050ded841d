"""The contestants of a measurement, the slow truth they are held against, and what is made of their times."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from visionlora.bench import peft_contestant
from visionlora.bench.compare import compare, comparison
from visionlora.bench.contestants import Contestant, Skipped, floor, full, linear, ours
from visionlora.bench.counts import count
from visionlora.bench.measure import Result, build, measure
from visionlora.bench.record import new_record, read_record, write_record
from visionlora.bench.sentinel import start_gradients
from visionlora.bench.settings import ORDERS, Settings
from visionlora.bench.spread import ratio
from visionlora.bench.table import markdown
from visionlora.bench.truth import Truth, WrongResult
from visionlora.bench.verbs import imports, verbs
from visionlora.bench.workload import Workload, image_workload
from visionlora.core import orders
from visionlora.errors import ConfigError, TargetError

SETTINGS = Settings(batch=2, size=64, rank=2, rounds=1)
MODELS = ("test_vit", "test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_byobnet")


@pytest.fixture(scope="module")
def vit() -> Workload:
    return image_workload("test_vit", SETTINGS)


def grads(contestant: Contestant, workload: Workload) -> set[str]:
    contestant.loss(workload, SETTINGS).backward()
    return {name for name, p in contestant.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_every_variant_is_checked_and_counted(name: str) -> None:
    result = measure(name, SETTINGS, timed=False)
    assert {"floor", "full", "linear", "ours"} <= result.counts.keys()
    assert result.errors["ours"] < 2e-2
    assert result.counts.keys() | result.skipped.keys() == {"floor", "full", "linear", "ours", "peft"}
    flops = {variant: counts.flops for variant, counts in result.counts.items()}
    assert flops["linear"] < flops["floor"] < flops["ours"]
    assert flops["floor"] < flops["full"]


def test_the_base_is_left_as_it_was() -> None:
    workload = image_workload("test_resnet", SETTINGS)
    before = copy.deepcopy(workload.model.state_dict())
    grads_before = [p.requires_grad for p in workload.model.parameters()]
    build(workload, SETTINGS)
    assert [p.requires_grad for p in workload.model.parameters()] == grads_before
    assert all(torch.equal(before[key], tensor) for key, tensor in workload.model.state_dict().items())
    assert all(p.grad is None for p in workload.model.parameters())


def test_a_fresh_model_gets_branches_with_an_effect() -> None:
    model = image_workload("test_resnet", SETTINGS).model
    norms = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(weight.abs().min() > 0 for weight in norms)
    assert model.training
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_every_variant_is_in_train_mode_with_still_statistics() -> None:
    workload = image_workload("test_resnet", SETTINGS)
    for contestant in build(workload, SETTINGS)[0]:
        assert contestant.model.training
        before = {k: v.clone() for k, v in contestant.model.state_dict().items() if "running" in k or "tracked" in k}
        contestant.loss(workload, SETTINGS)
        assert before
        assert all(torch.equal(contestant.model.state_dict()[k], v) for k, v in before.items())


def test_nothing_is_dropped() -> None:
    workload = image_workload("swin_tiny_patch4_window7_224", replace(SETTINGS, batch=1))
    assert torch.equal(workload.model(*workload.inputs), workload.model(*workload.inputs))


def test_the_floor_trains_the_head_alone(vit: Workload) -> None:
    layers = ours(vit, SETTINGS).ranks
    assert grads(floor(vit, layers), vit) == {"head.weight", "head.bias"} == grads(linear(vit), vit)


def test_gradients_start_at_the_first_adapted_layers_and_not_below() -> None:
    workload = image_workload("test_resnet", SETTINGS)
    model = copy.deepcopy(workload.model).requires_grad_(False)
    assert start_gradients(model, ["layer2.0.conv1", "layer2.0.downsample.0", "layer3.0.conv1"], workload.inputs) == [
        "layer2.0.conv1",
        "layer2.0.downsample.0",
    ]
    wanted: dict[str, bool] = {}
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer3.0.conv1"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda m, a, y, name=name: wanted.__setitem__(name, y.requires_grad))
    model(*workload.inputs).sum().backward()
    assert wanted == {
        "layer1.0.conv1": False,
        "layer2.0.conv1": True,
        "layer2.0.downsample.0": True,
        "layer3.0.conv1": True,
    }


def test_an_in_place_activation_may_follow_the_first_adapted_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)).requires_grad_(False)
    x = torch.randn(2, 3, 5, 5)
    before = model(x)
    start_gradients(model, ["0"], (x,))
    after = model(x)
    after.sum().backward()
    assert torch.equal(before, after)


def test_a_floor_without_a_called_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3)).requires_grad_(False)
    model.append(nn.Linear(3, 3))
    with pytest.raises(TargetError, match="calls none"):
        start_gradients(model, [], (torch.randn(1, 3),))


def test_the_floor_computes_forward_and_input_gradients_alone() -> None:
    workload = image_workload("test_resnet", SETTINGS)
    layers = ours(workload, SETTINGS).ranks
    found = {c.name: count(c, workload, SETTINGS).flops for c in (floor(workload, layers), full(workload))}
    shapes: dict[str, int] = {}
    for name, module in workload.model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(
                lambda m, a, y, name=name: shapes.__setitem__(name, 2 * m.weight[0].numel() * y.numel())
            )
    workload.model(*workload.inputs)
    firsts = set(start_gradients(copy.deepcopy(workload.model).requires_grad_(False), layers, workload.inputs))
    below = {name for name in shapes if name not in layers} - {"fc"}  # the stem
    inputs = sum(flops for name, flops in shapes.items() if name not in firsts | below)
    assert found["floor"] == sum(shapes.values()) + inputs + shapes["fc"]
    first = next(iter(shapes))
    assert found["full"] == 3 * sum(shapes.values()) - shapes[first]  # the image needs no gradient


@pytest.mark.parametrize("wrong", ["scale", "no gradient for A", "other loss"])
def test_a_fast_wrong_answer_is_not_timed(wrong: str, vit: Workload) -> None:
    contestant = ours(vit, SETTINGS)
    truth = Truth(vit, SETTINGS, contestant.factors)
    layer = contestant.model.get_submodule("blocks.1.mlp.fc1")
    if wrong == "scale":
        layer.adapters["default"]["weight"].scale *= 1.5  # type: ignore[index, union-attr]
    elif wrong == "no gradient for A":
        layer.adapters["default"]["weight"].A.register_hook(torch.zeros_like)  # type: ignore[index, union-attr]
    else:
        layer.register_forward_hook(lambda m, a, y: y + 0.5)
    with pytest.raises(WrongResult):
        truth.check(contestant)


def test_another_function_of_the_base_is_noticed(vit: Workload) -> None:
    contestant = linear(vit)
    contestant.model.get_submodule("blocks.0").register_forward_hook(lambda m, a, y: y.roll(1, -1))
    with pytest.raises(WrongResult, match="base"):
        Truth(vit, SETTINGS, ours(vit, SETTINGS).factors).check_base(contestant)


def test_every_order_computes_the_same(vit: Workload) -> None:
    result = build(vit, replace(SETTINGS, variants=ORDERS))[1]
    assert result.errors.keys() == {*ORDERS}
    assert max(result.errors.values()) < 1e-4


def test_the_orders_are_those_of_the_core() -> None:
    assert orders.ORDERS == ORDERS


@pytest.mark.parametrize(("name", "rank"), [("test_vit", 2), ("test_resnet", 2), ("ghostnet_050", 8)])
def test_peft_has_the_same_layers_and_numbers(name: str, rank: int) -> None:
    pytest.importorskip("peft")
    settings = replace(SETTINGS, rank=rank)
    workload = image_workload(name, settings)
    mine = ours(workload, settings)
    theirs = peft_contestant.peft(workload, settings, mine.ranks)
    assert {k: p.shape for k, p in theirs.factors.items()} == {k: p.shape for k, p in mine.factors.items()}
    assert sum(p.numel() for p in theirs.trained()) == sum(p.numel() for p in mine.trained())
    assert Truth(workload, settings, mine.factors).check(theirs) < 2e-2


def test_peft_is_optional(vit: Workload, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_contestant, "find_spec", lambda name: None)
    result = build(vit, SETTINGS)[1]
    assert result.skipped == {"peft": "not installed (pip install peft)"}


def test_what_peft_cannot_adapt_is_skipped_with_its_reason() -> None:
    pytest.importorskip("peft")
    workload = image_workload("test_resnet", SETTINGS)
    with pytest.raises(Skipped, match="BatchNorm2d"):
        peft_contestant.peft(workload, SETTINGS, {"bn1": 2})


def test_channels_last_reaches_every_weight() -> None:
    workload = image_workload("test_resnet", replace(SETTINGS, channels_last=True))
    for contestant in build(workload, replace(SETTINGS, channels_last=True))[0]:
        kernels = [p for p in contestant.model.parameters() if p.ndim == 4]
        assert kernels
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_mixed_precision_runs_and_agrees() -> None:
    settings = replace(SETTINGS, dtype="bf16")
    assert measure("test_vit", settings, timed=False).errors["ours"] < 0.15


@pytest.mark.slow
def test_the_floor_compiles_and_keeps_its_backward_pass() -> None:
    settings = replace(SETTINGS, compile=True, variants=("floor",))
    result = measure("test_resnet", settings)
    assert result.samples.keys() == {"floor"}
    assert not result.skipped


def test_rounds_hold_one_sample_of_every_variant(vit: Workload) -> None:
    settings = replace(SETTINGS, rounds=3, steps=2, variants=("full", "ours"))
    result = measure("test_vit", settings)
    assert {name: len(samples) for name, samples in result.samples.items()} == {"floor": 3, "full": 3, "ours": 3}
    assert all(s.forward > 0 and s.backward > 0 and s.optimiser > 0 for s in result.samples["ours"])


def test_a_ratio_is_taken_inside_each_round() -> None:
    slow_second_round = ratio([2.0, 20.0, 2.2], [1.0, 10.0, 1.0])
    assert slow_second_round.median == 2.0
    assert slow_second_round.low <= slow_second_round.median <= slow_second_round.high
    assert slow_second_round.of_minima == 2.0
    assert ratio([1.0, 2.0], [1.0, 1.0]).noisy
    assert not ratio([1.0, 1.02], [1.0, 1.0]).noisy


def test_verbs_are_timed() -> None:
    found = verbs("test_vit", SETTINGS)
    assert found.keys() == {"attach", "load", "switch"}
    assert all(value > 0 for values in found.values() for value in values)


@pytest.mark.slow
def test_imports_are_timed_in_fresh_processes() -> None:
    assert all(value > 0 for values in imports(repeats=1).values() for value in values)


def recorded(ours_ms: float, saved: int = 100) -> dict[str, Any]:
    counts = {"saved_bytes": 100, "peak_bytes": 9, "operations": 9, "moved_bytes": 9, "flops": 9, "trainable": 9}
    rounds = [{"forward": 1.0, "backward": 1.0, "optimiser": 0.1}] * 5
    mine = [{"forward": ours_ms, "backward": 1.0, "optimiser": 0.1}] * 5
    result = Result("a_model", 3).plain()
    result["samples"] = {"floor": rounds, "ours": mine}
    result["counts"] = {"floor": counts, "ours": counts | {"saved_bytes": saved}}
    return new_record(SETTINGS) | {"models": [result]}


def test_a_record_survives_its_file(tmp_path: Any) -> None:
    record = recorded(1.3)
    write_record(tmp_path / "a.json", record)
    assert read_record(tmp_path / "a.json") == record
    shown = markdown(record)
    assert "| ours | 1.3 | 1.0 | 0.1 | 1.150 |" in shown
    assert f"torch {torch.__version__.split('+')[0]}" in shown


@pytest.mark.parametrize("text", ["{", "[]", '{"schema": 99}', '{"schema": 1}'])
def test_a_file_that_is_no_record_is_refused(text: str, tmp_path: Any) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=r"a\.json"):
        read_record(tmp_path / "a.json")


def test_a_comparison_finds_what_became_slower_or_larger() -> None:
    assert not any(c.regressed for c in compare(recorded(1.3), recorded(1.3)))
    assert not any(c.regressed for c in compare(recorded(1.3), recorded(1.0, saved=50)))
    slower = [c for c in compare(recorded(1.3), recorded(1.6)) if c.regressed]
    assert [(c.variant, c.figure) for c in slower] == [("ours", "time / floor")]
    larger = [c for c in compare(recorded(1.3), recorded(1.3, saved=120)) if c.regressed]
    assert [(c.variant, c.figure) for c in larger] == [("ours", "saved_bytes")]
    assert "**worse**" in comparison(larger)


def test_records_of_other_settings_are_not_compared() -> None:
    other = recorded(1.3)
    other["settings"]["batch"] = 7
    with pytest.raises(ConfigError, match="batch is 2 in the first and 7 in the second"):
        compare(recorded(1.3), other)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"variants": ("flor",)}, 'did you mean "floor"'),
        ({"batch": 0}, "at least 1"),
        ({"threads": 2}, "--clock wall"),
    ],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SETTINGS, **wrong)
