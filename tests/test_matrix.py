"""Every variant on every layer kind keeps the same promises."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from timm.layers import Conv2dSame, ScaledStdConv2d, StdConv2d
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.adapt import adapted_layers
from visionlora.core.attach import Branched, Materialised
from visionlora.variants import VARIANTS

IMAGE = (2, 8, 9, 7)  # odd sizes on purpose


class Unknown(nn.Linear):
    """A Linear subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, 2 * self.weight, self.bias)


class HalfPadded(nn.Conv2d):
    """A Conv2d subclass whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(nn.functional.pad(x, (1, 0, 1, 0)), self.weight, self.bias)


def conv(out: int = 12, kernel: int | tuple[int, int] = 3, **kwargs: object) -> nn.Conv2d:
    return nn.Conv2d(8, out, kernel, **kwargs)  # type: ignore[arg-type]


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], type]] = {
    "linear": (lambda: nn.Linear(8, 12), (2, 5, 8), Branched),
    "linear_no_bias": (lambda: nn.Linear(8, 12, bias=False), (3, 8), Branched),
    "linear_subclass": (lambda: Unknown(8, 12), (3, 8), Materialised),
    "conv_1x1": (lambda: conv(kernel=1), IMAGE, Branched),
    "conv_3x3": (lambda: conv(padding=1), IMAGE, Branched),
    "conv_stride": (lambda: conv(stride=2, padding=1), IMAGE, Branched),
    "conv_1x7": (lambda: conv(kernel=(1, 7), padding=(0, 3)), IMAGE, Branched),
    "conv_7x7_stem": (lambda: conv(kernel=7, stride=2, padding=3, bias=False), IMAGE, Branched),
    "conv_dilated": (lambda: conv(dilation=2, padding=2), IMAGE, Branched),
    "conv_dilated_same": (lambda: conv(dilation=2, padding="same"), IMAGE, Branched),
    "conv_valid": (lambda: conv(padding="valid"), IMAGE, Branched),
    "conv_reflect": (lambda: conv(padding=1, padding_mode="reflect"), IMAGE, Branched),
    "conv_circular": (lambda: conv(padding=2, padding_mode="circular", dilation=2), IMAGE, Branched),
    "conv_replicate": (lambda: conv(padding=1, padding_mode="replicate", stride=2), IMAGE, Branched),
    "conv_grouped": (lambda: conv(out=16, padding=1, groups=2), IMAGE, Branched),
    "conv_grouped_dilated": (lambda: conv(out=16, padding=2, dilation=2, groups=4), IMAGE, Branched),
    "conv_subclass": (lambda: HalfPadded(8, 12, 3), IMAGE, Materialised),
    "conv2d_same": (lambda: Conv2dSame(8, 12, 3, stride=2), IMAGE, Materialised),
    "std_conv2d": (lambda: StdConv2d(8, 12, 3, padding=1), IMAGE, Materialised),
    "scaled_std_conv2d": (lambda: ScaledStdConv2d(8, 12, 3, padding=1), IMAGE, Materialised),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), (2, 8, 9), Branched),
    "conv3d": (lambda: nn.Conv3d(8, 12, 3, padding=1), (2, 8, 4, 5, 3), Branched),
}
CASES = [(v, k) for v in VARIANTS for k in LAYERS]


def build(kind: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Tensor]:
    make, shape, _ = LAYERS[kind]
    return nn.Sequential(make()).to(dtype).eval(), torch.randn(shape, dtype=dtype)


def adapted(
    variant: str, kind: str, dtype: torch.dtype = torch.float64, **config: object
) -> tuple[nn.Sequential, Tensor]:
    model, x = build(kind, dtype)
    config = {"r": 2, "lora_alpha": 4, **config}
    vl.apply_lora(model, vl.LoraConfig(target_modules=["0"], variant=variant, **config))  # type: ignore[arg-type]
    return model, x


def stir(model: nn.Module, name: str = "default") -> None:
    """Give an adapter numbers that matter."""
    with torch.no_grad():
        for group in vl.adapter_parameters(model, name).values():
            for parameter in group.values():
                parameter += 0.3 * torch.randn_like(parameter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_attaching_changes_no_bit(variant: str, kind: str, dtype: torch.dtype) -> None:
    model, x = build(kind, dtype)
    keys, before = set(model.state_dict()), model(x)
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["0"], variant=variant))  # type: ignore[arg-type]
    assert torch.equal(model(x), before)
    assert keys == set(vl.base_state_dict(model))
    assert isinstance(model[0], LAYERS[kind][0]().__class__)


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_layers_take_the_way_that_is_right_for_them(variant: str, kind: str) -> None:
    model, _ = adapted(variant, kind)
    way = LAYERS[kind][2] if VARIANTS[variant].branched else Materialised
    assert isinstance(model[0], way)


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_merged_equals_unmerged_and_everything_can_be_undone(variant: str, kind: str) -> None:
    model, x = build(kind)
    base = model(x)
    plain, weights = model[0].__class__, copy.deepcopy(model.state_dict())
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["0"], variant=variant))  # type: ignore[arg-type]
    stir(model)
    changed = model(x)
    assert (changed - base).abs().max() > 1e-3, "the adapter has no effect: the rest of this test would be empty"
    with vl.disabled(model):
        assert torch.equal(model(x), base)
    vl.merge(model)
    assert model[0].__class__ is plain
    assert_close(model(x), changed)
    vl.unmerge(model)
    assert torch.equal(model(x), changed)
    vl.remove(model)
    assert model[0].__class__ is plain
    assert torch.equal(model(x), base)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_output_equals_the_layer_run_with_the_dense_weight(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    layer = adapted_layers(model)["0"]
    delta = layer.adapters["default"]["weight"]
    twin, _ = build(kind)
    twin.load_state_dict(vl.base_state_dict(model))
    with torch.no_grad():
        twin[0].weight += delta.change(twin[0].weight)
    assert_close(model(x), twin(x))


@pytest.mark.parametrize(("variant", "kind"), [(v, k) for v, k in CASES if v != "dora"])
def test_gradients_are_those_of_finite_differences(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    values = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(
        lambda *v: torch.func.functional_call(model, dict(zip(names, v, strict=True)), x), values
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_follows_its_formula_with_the_norm_held_constant(kind: str) -> None:
    model, x = adapted("dora", kind)
    stir(model)
    delta = adapted_layers(model)["0"].adapters["default"]["weight"]
    W, A, B, m = model[0]._parameters["weight"].detach(), delta.A, delta.B, delta.m
    r, groups = delta.rank, delta.geometry.groups
    product = torch.cat(
        [delta.scale * b.flatten(1) @ a.flatten(1) for a, b in zip(A.split(r), B.chunk(groups), strict=True)]
    )
    V = W + product.view_as(W)
    norm = V.detach().flatten(1).norm(dim=1).view(-1, *[1] * (W.ndim - 1))
    dense = m.view_as(norm) * V / norm
    twin, _ = build(kind)
    grads = torch.autograd.grad(
        torch.func.functional_call(twin, {**vl.base_state_dict(model), "0.weight": dense}, x).sum(), [A, B, m]
    )
    ours = torch.autograd.grad(model(x).sum(), [A, B, m])
    assert_close(model(x), torch.func.functional_call(twin, {**vl.base_state_dict(model), "0.weight": dense}, x))
    assert_close(ours, grads)


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_every_trainable_tensor_gets_a_gradient(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    model(x).square().mean().backward()
    vl.check_gradients(model)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trainable.values())


@pytest.mark.parametrize(("variant", "kind"), CASES)
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


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_strength_runs_between_base_and_adapter(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    full = adapted_layers(model)["0"].effective("weight")
    base = adapted_layers(model)["0"].base_tensor("weight")
    vl.activate(model, "default", strength=0.25)
    assert_close(adapted_layers(model)["0"].effective("weight"), base + 0.25 * (full - base))
    merged = vl.merge(copy.deepcopy(model))
    assert_close(merged(x), model(x))
    vl.activate(model, "default", strength=0)
    with vl.disabled(model):
        base_output = model(x)
    assert_close(model(x), base_output)


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_empty_batches_and_autocast_run(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, torch.float32)
    stir(model)
    if x.ndim == 4:
        assert_close(model(x.to(memory_format=torch.channels_last)), model(x))
    assert model(x[:0]).shape == (0, *model(x).shape[1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), model(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_dropout_thins_the_rank_in_training_only(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, lora_dropout=0.5)
    stir(model)
    assert torch.equal(model(x), model(x))
    model.train()
    torch.manual_seed(1)
    outputs = torch.stack([model(x) for _ in range(12)])
    assert outputs.std(0).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("variant", "kind"), CASES)
def test_lower_precision_stays_near_float64(variant: str, kind: str, dtype: torch.dtype) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    exact = model(x)
    y = model.to(dtype)(x.to(dtype)).double()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert (y - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("kind", ["linear", "conv_3x3"])
def test_a_small_change_to_a_bfloat16_weight_is_summed_in_float32(kind: str) -> None:
    model, _ = adapted("dora", kind, torch.bfloat16)
    layer = adapted_layers(model)["0"]
    delta = layer.adapters["default"]["weight"]
    stir(model)
    wide = layer.base_tensor("weight").float()
    assert torch.equal(layer.effective("weight"), (wide + delta.change(wide)).bfloat16())


@pytest.mark.parametrize(("variant", "kind"), [("lora", k) for k in LAYERS] + [("dora", "linear"), ("fa", "conv_3x3")])
def test_models_compile_without_graph_breaks_and_export(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, torch.float32)
    stir(model)
    with torch.no_grad():
        y = model(x)
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
        assert_close(torch.export.export(model, (x,)).module()(x), y)
    torch._dynamo.reset()


def test_a_base_checkpoint_loads_before_and_after_attaching() -> None:
    model, x = build("conv_3x3")
    other, _ = build("conv_3x3")
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["0"]))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))


def test_a_zero_row_gives_no_nan_under_dora() -> None:
    model, x = build("linear")
    with torch.no_grad():
        model[0].weight[0] = 0
    before = model(x)
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["0"], variant="dora"))
    assert torch.equal(model(x), before)
    model(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


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
