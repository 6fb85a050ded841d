"""Every variant on every layer kind keeps the same promises."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_kinds import CASES, LAYERS, RANKS, adapted, build, cast, config_of, seat, stir
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.errors import TargetError
from visionlora.variants import VARIANTS

EVERY = pytest.mark.parametrize(("variant", "kind"), CASES)
REFUSED = [(v, k) for v in VARIANTS for k in LAYERS if (v, k) not in RANKS]


@EVERY
@torch.no_grad()  # attention takes another way where a parameter wants a gradient
def test_attaching_changes_no_bit(variant: str, kind: str) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model, x = build(kind, dtype)
        keys, own, before = set(model.state_dict()), [type(m) for m in model.modules()], model(x)
        vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind]))
        assert torch.equal(model(x), before), dtype
        assert keys == set(vl.base_state_dict(model))
        assert all(any(isinstance(m, cls) for m in model.modules()) for cls in own)


@pytest.mark.parametrize(("variant", "kind"), [(v, k) for v, k in CASES if "attention" not in k])
def test_attaching_changes_no_bit_of_a_training_pass(variant: str, kind: str) -> None:
    model, x = build(kind, torch.float32)
    model.requires_grad_(False).train()

    def outputs() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            narrow = model(x)
        return [model(x), narrow]

    before = outputs()
    vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind], lora_dropout=0.5))
    for y, wanted in zip(outputs(), before, strict=True):
        assert y.dtype == wanted.dtype
        assert torch.equal(y, wanted)


@pytest.mark.parametrize(("variant", "kind"), REFUSED)
def test_a_change_that_would_be_larger_than_the_layer_is_refused(variant: str, kind: str) -> None:
    model, _ = build(kind)
    with pytest.raises(TargetError, match=r"modules_to_save|choose another variant"):
        vl.apply_lora(model, config_of(variant, kind, r=1))
    assert not vl.adapter_names(model)


def test_the_variants_meet_the_layer_kinds() -> None:
    # a matrix with holes proves little: these are the only combinations in which no rank saves anything
    assert {v for v, _ in REFUSED} <= {"lora", "dora", "fa", "loha", "tucker", "up", "spatial", "lokr", "ia3"}
    small = {"conv_depthwise", "conv_channel_multiplier", "conv_32_groups"}
    assert {k for v, k in REFUSED if v not in ("spatial", "ia3")} <= small
    assert all("std_conv" in k for v, k in REFUSED if v == "ia3")
    flat = ("linear", "conv_1x1", "attention", "bare", "embedding", "conv1d_of")
    assert all(k.startswith(flat) for v, k in REFUSED if v == "spatial")


@EVERY
def test_layers_take_the_way_that_is_right_for_them(variant: str, kind: str) -> None:
    model, _ = adapted(variant, kind)
    way = LAYERS[kind].way
    assert isinstance(seat(model)[1], way)


@EVERY
@torch.no_grad()
def test_merged_equals_unmerged_and_everything_can_be_undone(variant: str, kind: str) -> None:
    model, x = build(kind)
    base = model(x)
    classes, weights = [type(m) for m in model.modules()], copy.deepcopy(model.state_dict())
    vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind]))
    stir(model)
    changed = model(x)
    assert (changed - base).abs().max() > 1e-3, "the adapter has no effect: the rest of this test would be empty"
    with vl.disabled(model):
        assert torch.equal(model(x), base)
    vl.merge(model)
    assert [type(m) for m in model.modules()] == classes
    assert_close(model(x), changed)
    vl.unmerge(model)
    assert torch.equal(model(x), changed)
    vl.remove(model)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), base)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert all(p.requires_grad for p in model.parameters())


@EVERY
def test_output_equals_the_layer_run_with_the_dense_weight(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    path, _, delta = seat(model)
    base = vl.base_state_dict(model)[path]
    geometry = delta.geometry
    dense = base + geometry.stored(delta.change(geometry.canonical(base)))
    twin = vl.remove(copy.deepcopy(model))
    assert_close(model(x), torch.func.functional_call(twin, {path: dense}, x))


@EVERY
def test_whoever_reads_the_weight_sees_the_change(variant: str, kind: str) -> None:
    # timm's fusing passes and some attentions never call the layer
    model, _ = adapted(variant, kind)
    stir(model)
    path, layer, delta = seat(model)
    base, attribute = vl.base_state_dict(model)[path], path.rpartition(".")[2]
    geometry = delta.geometry
    assert_close(getattr(layer, attribute), base + geometry.stored(delta.change(geometry.canonical(base))))
    with vl.disabled(model):
        assert torch.equal(getattr(layer, attribute), base)


@pytest.mark.parametrize("kind", LAYERS)
def test_stored_and_canonical_weights_are_each_others_inverse(kind: str) -> None:
    variant = next(v for v in VARIANTS if (v, kind) in RANKS)
    model, _ = adapted(variant, kind)
    path, _, delta = seat(model)
    weight = vl.base_state_dict(model)[path]
    canonical = delta.geometry.canonical(weight)
    assert canonical.shape == delta.geometry.shape
    assert torch.equal(delta.geometry.stored(canonical), weight)


@pytest.mark.parametrize(("variant", "kind"), [(v, k) for v, k in CASES if v != "dora"])
def test_gradients_are_those_of_finite_differences(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda *v: torch.func.functional_call(model, dict(zip(names, v, strict=True)), x), values, fast_mode=True
    )


@pytest.mark.parametrize("kind", [k for v, k in CASES if v == "dora" and "parts" not in k])
def test_dora_follows_its_formula_with_the_norm_held_constant(kind: str) -> None:
    model, x = adapted("dora", kind)
    stir(model)
    path, _, delta = seat(model)
    geometry = delta.geometry
    W = geometry.canonical(vl.base_state_dict(model)[path].detach())
    A, B, m, r, groups = delta.A, delta.B, delta.m, delta.rank, geometry.groups
    product = torch.cat(
        [delta.scale * b.flatten(1) @ a.flatten(1) for a, b in zip(A.split(r), B.chunk(groups), strict=True)]
    )
    V = W + product.view_as(W)
    norm = V.detach().flatten(1).norm(dim=1).view(-1, *[1] * (W.ndim - 1))
    twin = vl.remove(copy.deepcopy(model))
    dense = torch.func.functional_call(twin, {path: geometry.stored(m.view_as(norm) * V / norm)}, x)
    grads = torch.autograd.grad(dense.sum(), [A, B, m], retain_graph=True)
    ours = torch.autograd.grad(model(x).sum(), [A, B, m])
    assert_close(model(x), dense)
    assert_close(ours, grads)


@EVERY
def test_every_trainable_tensor_gets_a_gradient(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    model(x).square().mean().backward()
    vl.check_gradients(model)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())


@EVERY
def test_copies_and_pickles_are_independent(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        stir(twin)
        assert not torch.equal(twin(x), y)
        assert torch.equal(model(x), y)
        vl.remove(twin)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    assert torch.equal(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)(x), y)


@EVERY
def test_strength_runs_between_base_and_adapter(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    path, layer, _ = seat(model)
    attribute = path.rpartition(".")[2]
    full, base = layer.effective(attribute), layer.base_tensor(attribute)
    vl.activate(model, "default", strength=0.25)
    assert_close(layer.effective(attribute), base + 0.25 * (full - base))
    merged = vl.merge(copy.deepcopy(model))
    assert_close(merged(x), model(x))
    vl.activate(model, "default", strength=0)
    with vl.disabled(model):
        base_output = model(x)
    assert_close(model(x), base_output)


@EVERY
def test_empty_batches_run_and_have_no_gradient(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, torch.float32, lora_dropout=0.5)
    y = model(x)
    for mode in (True, False):
        none = model.train(mode)(x[:0])
        assert none.shape == (0, *y.shape[1:])
        none.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@EVERY
def test_inputs_of_another_type_are_taken_or_refused_as_the_base_does(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, torch.float32)
    stir(model)
    for dtype in (torch.float16, torch.float64, torch.uint8):
        for mode in (True, False):
            with vl.disabled(model.train(mode)):
                base = type_or_error(model, x.to(dtype))
            assert type_or_error(model, x.to(dtype)) == base


def type_or_error(model: nn.Module, x: Tensor) -> object:
    try:
        return model(x).dtype
    except (RuntimeError, TypeError) as e:
        return type(e)


@EVERY
def test_autocast_stays_near_float32(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, torch.float32)
    stir(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    exact = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    tables = ("embedding", "bare_parameter")  # autocast leaves a look-up and a sum in the type of the weight
    assert y.dtype == (torch.float32 if kind in tables else torch.bfloat16)
    assert (y.float() - exact).abs().max() <= 0.05 * exact.abs().max()
    wide, narrow = (torch.autograd.grad(t.float().square().mean(), parameters) for t in (exact, y))
    assert all(grad.dtype == torch.float32 for grad in narrow)
    # of all tensors together: the length of a row means nothing to a standardised layer, its gradient is rounding
    wide, narrow = (torch.cat([grad.flatten() for grad in grads]) for grads in (wide, narrow))
    assert (narrow - wide).norm() <= 0.1 * wide.norm()


@pytest.mark.parametrize(("variant", "kind"), [(v, k) for v, k in CASES if len(LAYERS[k].shape) == 4])
def test_channels_last_means_the_same(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    wanted = [p for p in model.parameters() if p.requires_grad]
    y = model(x.requires_grad_())
    grads = torch.autograd.grad(y.square().sum(), [*wanted, x])
    for net in (model, model.to(memory_format=torch.channels_last)):  # the weights as well
        last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        again = net(last)
        assert_close(again, y)
        assert again.is_contiguous(memory_format=torch.channels_last)
        assert_close(torch.autograd.grad(again.square().sum(), [*wanted, last]), grads)


@EVERY
def test_dropout_thins_the_rank_in_training_only(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, lora_dropout=0.5)
    stir(model)
    assert torch.equal(model(x), model(x))
    model.train()
    first = model(x)
    assert any((model(x) - first).abs().max() > 1e-3 for _ in range(12))


@pytest.mark.parametrize(("variant", "kind"), [(v, k) for v, k in CASES if "attention" not in k])  # which draws thrice
def test_dropout_has_the_gradients_of_what_it_left(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, lora_dropout=0.5)
    stir(model)
    path, _, delta = seat(model.train())
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    y = model(x)
    torch.manual_seed(0)
    base, geometry = vl.base_state_dict(model)[path].detach(), delta.geometry
    dense = base + geometry.stored(delta.change(geometry.canonical(base)))
    truth = torch.func.functional_call(vl.remove(copy.deepcopy(model)), {path: dense}, x)
    assert_close(y, truth)
    grads = (torch.autograd.grad(t.square().sum(), parameters, allow_unused=True) for t in (y, truth))
    for ours, exact in zip(*grads, strict=True):
        assert_close(ours, exact)


@EVERY
def test_lower_precision_stays_near_float64(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    exact = model(x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-2)):  # from one to the next: rounded once
        y = model.to(dtype)(cast(x, dtype)).double()
        assert (y - exact).abs().max() <= tolerance * exact.abs().max(), dtype


@pytest.mark.parametrize("kind", ["linear", "conv_3x3"])
def test_a_small_change_to_a_bfloat16_weight_is_summed_in_float32(kind: str) -> None:
    model, _ = adapted("dora", kind, torch.bfloat16)
    _, layer, delta = seat(model)
    stir(model)
    wide = layer.base_tensor("weight").float()
    assert torch.equal(layer.effective("weight"), (wide + delta.change(wide)).bfloat16())


def test_a_base_checkpoint_loads_before_and_after_attaching() -> None:
    model, x = build("conv_3x3")
    other, _ = build("conv_3x3")
    vl.apply_lora(model, config_of("lora", "conv_3x3", r=2))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("kind", [k for v, k in CASES if v == "dora"])
def test_a_zero_row_gives_no_nan_under_dora(kind: str) -> None:
    path, _, delta = seat(adapted("dora", kind)[0])
    model, x = build(kind)
    rows = delta.geometry.canonical(model.state_dict()[path])
    rows[::3] = 0
    model.state_dict()[path].copy_(delta.geometry.stored(rows))
    before = model.requires_grad_(False)(x)
    vl.apply_lora(model, config_of("dora", kind, r=RANKS["dora", kind]))
    assert_close(model(x), before, rtol=0, atol=1e-15)
    for _ in range(2):  # fresh, and with numbers that give the row a direction
        y = model(x)
        y.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        assert_close(vl.merge(model)(x), y)
        stir(vl.unmerge(model))


def test_training_moves_only_the_adapter() -> None:
    model, x = adapted("lora", "conv_3x3")
    before = {k: v.clone() for k, v in vl.base_state_dict(model).items()}
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    first = model(x).square().mean()
    for _ in range(3):
        optimiser.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimiser.step()
    assert loss < first
    assert all(torch.equal(v, before[k]) for k, v in vl.base_state_dict(model).items())
