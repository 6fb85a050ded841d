"""Several adapters on one model: switched, summed, deleted."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import timm
import torch
from layer_kinds import CASES, RANKS, adapted, config_of, seat, stir
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import visionlora as vl
from visionlora.errors import StateError
from visionlora.registry import adapted_layers

NAMES = [f"cam{i}" for i in range(12)]  # more than torch's limit of eight compilations of one function


def fleet(names: list[str], **config: object) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.Flatten(1), nn.Linear(96, 5))
    for name in names:
        config = {"target_modules": ["0", "2", "4"], "modules_to_save": "none", **config}
        vl.apply_lora(model.eval(), vl.LoraConfig(r=2, **config), name=name)  # type: ignore[arg-type]
        stir(model, name)
    return model, torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_two_active_adapters_add_up(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    path, layer, first = seat(model)
    vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind]), name="second")
    stir(model, "second")
    vl.activate(model, {"default": 1.0, "second": 0.5})
    second = layer.adapters["second"][path.rpartition(".")[2]]
    base, geometry = vl.base_state_dict(model)[path], first.geometry
    weight = geometry.canonical(base)
    dense = base + geometry.stored(first.change(weight) + 0.5 * second.change(weight))
    twin = vl.remove(copy.deepcopy(model))
    y = model(x)
    assert_close(y, torch.func.functional_call(twin, {path: dense}, x))
    vl.merge(model)
    assert_close(model(x), y)
    vl.unmerge(model)
    vl.remove(model)
    assert torch.equal(model.state_dict()[path], base)


def test_biases_and_scales_of_two_adapters_add_up() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).double()
    for name in ("a", "b"):
        vl.apply_lora(model, vl.LoraConfig(r=1, target_modules=["0", "2"], norm="affine", bias="all"), name=name)
        stir(model, name)
    base = vl.base_state_dict(model)
    vl.activate(model, {"a": 1.0, "b": 0.5})
    for key in ("0.bias", "1.weight", "1.bias"):
        layer, attribute = adapted_layers(model)[key[0]], key[2:]
        a, b = (layer.adapters[name][attribute].value for name in ("a", "b"))
        assert_close(getattr(layer, attribute), base[key] + (a - base[key]) + 0.5 * (b - base[key]))


def test_switching_and_summing_compile_once() -> None:
    model, x = fleet(NAMES)
    counter = CompileCounterWithBackend("eager")
    fast = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for name in NAMES * 2:
            vl.activate(model, name)
            assert_close(fast(x), model(x), rtol=2e-5, atol=1e-5)
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_every_switch_gives_what_the_adapter_gives_alone() -> None:
    model, x = fleet(NAMES[:3])
    alone = []
    for name in NAMES[:3]:
        twin = copy.deepcopy(model)
        for other in NAMES[:3]:
            if other != name:
                vl.remove(twin, other)
        vl.activate(twin, name)
        alone.append(twin(x))
    for name, y in zip(NAMES[:3], alone, strict=True):
        assert torch.equal(vl.activate(model, name)(x), y)
    assert not torch.equal(alone[0], alone[1])


def test_only_active_adapters_train() -> None:
    model, _ = fleet(NAMES[:3])
    vl.activate(model, NAMES[:2])
    trained = {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(NAMES[:2])


@torch.no_grad()  # a graph would hold on to the parameters
def test_deletion_leaves_nothing_behind() -> None:
    model, x = fleet(NAMES[:2])
    vl.activate(model, NAMES[:2])
    both = model(x)
    refs = [weakref.ref(p) for group in vl.adapter_parameters(model, "cam0").values() for p in group.values()]
    vl.remove(model, "cam0")
    gc.collect()
    assert all(ref() is None for ref in refs)
    assert vl.adapter_names(model) == ["cam1"]
    assert vl.active_adapters(model) == {"cam1": 1.0}
    assert not any("cam0" in key for key in model.state_dict())
    assert not torch.equal(model(x), both)
    vl.remove(model)
    assert not adapted_layers(model)
    assert "_visionlora" not in model.__dict__


@pytest.mark.parametrize(
    ("names", "strength", "message"),
    [
        ("cam9", 1.0, 'no adapter .cam9. on this model; did you mean "cam'),
        (["cam0", "cam9"], 1.0, "no adapter .cam9."),
        (["cam0", "cam0"], 1.0, "named twice"),
        ([], 1.0, "deactivate"),
        ({"cam0": -1.0}, 1.0, "at least 0"),
        ({"cam0": float("nan")}, 1.0, "at least 0"),
        ({"cam0": True}, 1.0, "at least 0"),
        ({"cam0": 1.0}, 0.5, "not both"),
    ],
)
def test_a_wrong_choice_changes_nothing(names: object, strength: float, message: str) -> None:
    model, x = fleet(NAMES[:2])
    vl.activate(model, "cam1")
    before = model(x)
    with pytest.raises(StateError, match=message):
        vl.activate(model, names, strength)  # type: ignore[arg-type]
    assert vl.active_adapters(model) == {"cam1": 1.0}
    assert torch.equal(model(x), before)


def test_two_heads_at_once_are_refused_and_nothing_changes() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    for name in ("a", "b"):
        vl.apply_lora(model, vl.LoraConfig(r=2), name=name)
    with pytest.raises(StateError, match=r"a and b both own the head head\.(weight|bias)"):
        vl.activate(model, ["a", "b"])
    assert vl.active_adapters(model) == {"b": 1.0}
