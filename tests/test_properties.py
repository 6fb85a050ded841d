"""What holds for every layer holds for layers that nobody thought of: sizes, strides, padding, groups are drawn."""

from __future__ import annotations

import tempfile

import pytest
import torch
from drawn_layers import SPLITS, Case, Layer, adapters, cases, largest_rank, layers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layer_kinds import stir
from slow_truth import changed_weight
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.errors import TargetError
from visionlora.registry import adapted_layers
from visionlora.variants import VARIANTS

pytestmark = [
    # torch warns that such a convolution pads its input by a copy
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths"),
]
EVERY = pytest.mark.parametrize("variant", VARIANTS)


def drawn(examples: int) -> settings:
    """Return settings under which the same examples come on every machine and in every run."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip


def put_on(case: Case) -> nn.Sequential:
    """Return a model with the adapters of a case, all of them active, with numbers that matter."""
    model = case.layer.model()
    for i, adapter in enumerate(case.adapters):
        vl.apply_lora(model, adapter.config, name=f"a{i}")
        stir(model, f"a{i}")
    return vl.activate(model, {f"a{i}": adapter.strength for i, adapter in enumerate(case.adapters)})


def numbers(model: nn.Sequential, name: str) -> dict[str, Tensor]:
    """Return all tensors of an adapter, frozen ones included."""
    delta = adapted_layers(model)["0"].adapters[name]["weight"]
    return {**dict(delta.named_parameters()), **dict(delta.named_buffers())}


@EVERY
@given(data=st.data())
@drawn(20)
def test_attaching_changes_no_bit(variant: str, data: st.DataObject) -> None:
    case = data.draw(cases(variant))
    model, x = case.layer.model(), case.layer.x
    with torch.no_grad():
        before = model(x)
        for i, adapter in enumerate(case.adapters):
            vl.apply_lora(model, adapter.config, name=f"a{i}")
            assert torch.equal(model(x), before)
    assert vl.base_state_dict(model).keys() == case.layer.model().state_dict().keys()


@EVERY
@given(data=st.data())
@drawn(40)
def test_output_and_gradients_are_those_of_the_dense_weight(variant: str, data: st.DataObject) -> None:
    case = data.draw(cases(variant))
    model, twin = put_on(case), case.layer.model()
    x = case.layer.x.clone().requires_grad_(case.layer.x.is_floating_point())
    found = [numbers(model, f"a{i}") for i in range(len(case.adapters))]
    base = vl.base_state_dict(model)["0.weight"].detach()
    dense = changed_weight(case.layer, base, list(zip(case.adapters, found, strict=True)))
    truth, y = torch.func.functional_call(twin, {"0.weight": dense}, x), model(x)
    assert_close(y, truth, rtol=1e-10, atol=1e-10)
    wanted = [t for own in found for t in own.values() if t.requires_grad] + [x] * x.requires_grad
    pull = torch.randn_like(y)
    expected = torch.autograd.grad(truth, wanted, pull, materialize_grads=True)
    assert_close(torch.autograd.grad(y, wanted, pull), expected, rtol=1e-9, atol=1e-9)


@EVERY
@given(data=st.data())
@drawn(25)
@torch.no_grad()
def test_merged_equals_unmerged_and_the_base_comes_back(variant: str, data: st.DataObject) -> None:
    case = data.draw(cases(variant))
    x, plain, model = case.layer.x, case.layer.model(), put_on(case)
    base, changed = plain(x), model(x)
    with vl.disabled(model):
        assert torch.equal(model(x), base)
    vl.merge(model)
    assert type(model[0]) is type(plain[0])
    assert_close(model(x), changed, rtol=1e-10, atol=1e-10)
    vl.unmerge(model)
    assert torch.equal(model(x), changed)
    vl.remove(model)
    assert torch.equal(model(x), base)
    assert_equal_states(model, plain)


@EVERY
@given(data=st.data())
@drawn(10)
@torch.no_grad()
def test_strided_inputs_and_odd_sizes_give_what_copies_give(variant: str, data: st.DataObject) -> None:
    case = data.draw(cases(variant))
    model, x = put_on(case), case.layer.x
    strided = torch.stack((x, x), -1)[..., 0]  # every other number of a tensor twice as large
    assert not strided.is_contiguous() or strided.numel() < 2
    assert_close(model(strided), model(x), rtol=1e-10, atol=1e-10)


@EVERY
@given(data=st.data())
@drawn(8)
@torch.no_grad()
def test_a_file_gives_back_every_number(variant: str, data: st.DataObject) -> None:
    case = data.draw(cases(variant))
    model, twin = put_on(case), case.layer.model()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(len(case.adapters)):
            vl.load_adapter(twin, vl.save_adapter(model, f"{folder}/a{i}", name=f"a{i}"))
    vl.activate(twin, vl.active_adapters(model))
    if any(adapter.config.init_lora_weights in SPLITS for adapter in case.adapters):
        assert_close(twin(case.layer.x), model(case.layer.x), rtol=1e-10, atol=1e-10)  # written as plain LoRA
    else:
        assert_equal_states(twin, model)
        assert torch.equal(twin(case.layer.x), model(case.layer.x))


@EVERY
@given(layer=layers(), more=st.integers(1, 3))
@drawn(15)
def test_a_change_larger_than_its_weight_is_refused(variant: str, layer: Layer, more: int) -> None:
    largest = largest_rank(variant, layer)
    config = vl.LoraConfig(r=largest + more, variant=variant, target_modules=["0"], modules_to_save="none")
    model = layer.model()
    if not VARIANTS[variant].ranked and largest:
        vl.apply_lora(model, config)  # any rank means the same
    else:
        with pytest.raises(TargetError):
            vl.apply_lora(model, config)
        assert not vl.adapter_names(model)
        assert_equal_states(model, layer.model())


@EVERY
@given(data=st.data())
@drawn(15)
def test_no_change_has_more_numbers_than_its_weight(variant: str, data: st.DataObject) -> None:
    layer = data.draw(layers().filter(lambda layer: largest_rank(variant, layer)))
    model = layer.model()
    vl.apply_lora(model, data.draw(adapters(variant, layer)).config)
    groups = vl.adapter_parameters(model, "default")
    assert sum(p.numel() for group in groups.values() for p in group.values()) <= layer.module.weight.numel()


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
