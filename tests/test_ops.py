"""The autograd functions of the fast path against the same map with a dense weight, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from kept import kept_bytes
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

import visionlora as vl
from visionlora.config import Variant
from visionlora.core.attach import Adapted
from visionlora.core.geometry import Geometry
from visionlora.core.maps import Op
from visionlora.core.ops import ComputedOp, FrozenOp, LowRankOp
from visionlora.core.orders import ORDERS, Order, choose, forced
from visionlora.errors import ConfigError

R, OUT, IN = 3, 6, 4
SAME = Op(2, (1, 1), (1, 1), (1, 1))
MAPS = {
    "linear": Op(),
    "conv1d": Op(1, (2,), (1,), (1,)),
    "1x1": Op(2, (1, 1), (0, 0), (1, 1)),
    "1x1 stride 2": Op(2, (2, 2), (0, 0), (1, 1)),
    "3x3": SAME,
    "3x3 stride 2 dilation 2": Op(2, (2, 2), (2, 2), (2, 2)),
    "3x3 channels last": SAME,
    "grouped": Op(2, (1, 1), (1, 1), (1, 1), 2),
}
KERNELS: dict[str, tuple[int, ...]] = {"linear": (), "conv1d": (3,), "1x1": (1, 1), "1x1 stride 2": (1, 1)}
EVERY = pytest.mark.parametrize("kind", MAPS)


def tensors(kind: str) -> tuple[Op, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the map, x, weight, bias, A, B and a gain, all but weight and gain to be differentiated."""
    op, kernel = MAPS[kind], KERNELS.get(kind, (3, 3))
    x = torch.randn(2, 5, IN) if not op.dims else torch.randn(2, IN, *[5] * op.dims)
    if kind == "3x3 channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(OUT, IN // op.groups, *kernel), torch.randn(OUT)
    A, B, gain = torch.randn(op.groups * R, IN // op.groups, *kernel), torch.randn(OUT, R), torch.rand(OUT) + 0.5
    x, weight, bias, A, B, gain = (t.double() for t in (x, weight, bias, A, B, gain))
    return op, x.requires_grad_(), weight, bias.requires_grad_(), A.requires_grad_(), B.requires_grad_(), gain


def dense(op: Op, x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, gain: Tensor, scale: float) -> Tensor:
    groups = op.groups if op.dims else 1
    pairs = zip(B.chunk(groups), A.flatten(1).chunk(groups), strict=True)
    change = torch.cat([up @ down for up, down in pairs]).view_as(weight)
    full = (weight + scale * change) * gain.view(-1, *[1] * (weight.ndim - 1))
    if not op.dims:
        return F.linear(x, full, bias)
    conv = {1: F.conv1d, 2: F.conv2d}[op.dims]
    return conv(x, full, bias, op.stride, op.padding, op.dilation, op.groups)


@EVERY
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_is_the_dense_map_and_has_its_gradients(kind: str, order: Order) -> None:
    op, x, weight, bias, A, B, gain = tensors(kind)
    if op.groups > 1 and order != "projected":
        return  # choose() never asks for it
    wanted = (x, bias, A, B)
    y = LowRankOp.apply(x, weight, bias, A, B, gain, 0.7, op, order)
    truth = dense(op, x, weight, bias, A, B, gain, 0.7)
    assert_close(y, truth, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    for found, true in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(truth, wanted, g), strict=True):
        assert_close(found, true, rtol=1e-11, atol=1e-11)


@EVERY
@pytest.mark.parametrize("order", ["factorised", "merged"])
def test_a_frozen_A_needs_no_input(kind: str, order: Order) -> None:
    op, x, weight, bias, A, B, gain = tensors(kind)
    if op.groups > 1:
        return
    A = A.detach()
    y = LowRankOp.apply(x * 1, weight, bias, A, B, gain, 0.7, op, order)
    truth = dense(op, x, weight, bias, A, B, gain, 0.7)
    g = torch.randn_like(y)
    for found, true in zip(torch.autograd.grad(y, (x, B), g), torch.autograd.grad(truth, (x, B), g), strict=True):
        assert_close(found, true, rtol=1e-11, atol=1e-11)


@EVERY
def test_a_computed_weight_has_the_gradients_of_its_numbers(kind: str) -> None:
    op, x, weight, bias, A, B, gain = tensors(kind)
    m = torch.rand_like(gain).requires_grad_()

    def compute(A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        groups = op.groups if op.dims else 1
        pairs = zip(B.chunk(groups), A.flatten(1).chunk(groups), strict=True)
        return (weight + torch.cat([b @ a for b, a in pairs]).view_as(weight)) * m.view(-1, *[1] * (weight.ndim - 1))

    y = ComputedOp.apply(x, bias, gain, op, compute, A, B, m)
    truth = dense(op, x, compute(A, B, m), bias, A * 0, B, gain, 1.0)
    g, wanted = torch.randn_like(y), (x, bias, A, B, m)
    for found, true in zip(torch.autograd.grad(y, wanted, g), torch.autograd.grad(truth, wanted, g), strict=True):
        assert_close(found, true, rtol=1e-11, atol=1e-11)


@EVERY
def test_a_frozen_map_passes_the_gradient_on(kind: str) -> None:
    op, x, weight, bias, A, B, gain = tensors(kind)
    y = FrozenOp.apply(x, weight, bias, gain, op)
    truth = dense(op, x, weight, bias, A * 0, B, gain, 1.0)
    g = torch.randn_like(y)
    for found, true in zip(torch.autograd.grad(y, (x, bias), g), torch.autograd.grad(truth, (x, bias), g), strict=True):
        assert_close(found, true, rtol=1e-11, atol=1e-11)


@EVERY
@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck(kind: str, order: Order) -> None:
    op, x, weight, bias, A, B, gain = tensors(kind)
    if op.groups == 1 or order == "projected":
        small = x[:1].detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, A, B: LowRankOp.apply(x, weight, bias, A, B, gain, 0.7, op, order), (small, A, B), fast_mode=True
        )


def test_double_backward_is_refused() -> None:
    op, x, weight, bias, A, B, gain = tensors("linear")
    y = LowRankOp.apply(x, weight, bias, A, B, gain, 0.7, op, "factorised")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


class Gate(nn.Module):
    """Squeeze and excite in its smallest form."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.mean(1, keepdim=True).sigmoid()


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


class RootMeanSquare(nn.Module):
    """The norm of T5 and Llama, as transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


BEHIND = {
    "layer norm": lambda: nn.LayerNorm(8),
    "layer norm without shift": lambda: nn.LayerNorm(8, bias=False),
    "layer norm without scale": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "gelu": nn.GELU,
    "gelu tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "mish": nn.Mish,
    "relu6": nn.ReLU6,
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "gate": Gate,
    "root mean square": RootMeanSquare,
    "torch's root mean square": lambda: nn.RMSNorm(8),
    "gelu, scaled": lambda: nn.Sequential(nn.GELU(), Twice()),
}


def stacked(function: nn.Module, variant: Variant = "lora") -> nn.Sequential:
    net = nn.Sequential(nn.Linear(8, 8), function, nn.Linear(8, 5)).double()
    for p in net.parameters():
        nn.init.normal_(p)
    net = vl.apply_lora(net, vl.LoraConfig(r=2, variant=variant, target_modules=["0", "2"], modules_to_save="none"))
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return net


@pytest.mark.parametrize("before", BEHIND)
def test_what_stands_before_a_layer_is_computed_again_and_not_kept(before: str) -> None:
    net, x = stacked(BEHIND[before]()), torch.randn(64, 8).double()
    y = net(x)
    assert_close(y, vl.merge(copy.deepcopy(net))(x), rtol=1e-11, atol=1e-11)
    middle = x.numel() * 8  # one activation; thin products and row statistics are smaller
    assert kept_bytes(net, x) < 1.8 * middle


@pytest.mark.parametrize("before", BEHIND)
def test_gradients_behind_a_recomputed_function_are_those_of_the_dense_weight(before: str) -> None:
    net, x = stacked(BEHIND[before]()), torch.randn(6, 8).double()
    net(x).square().sum().backward()
    layer = net[2]
    assert isinstance(layer, Adapted)
    delta = layer.adapters["default"]["weight"]  # type: ignore[index]
    with torch.no_grad():
        h = net[1](net[0](x))
        g = 2 * net(x)
        dW = g.t() @ h * delta.scale
    assert_close(delta.B.grad, dW @ delta.A.t(), rtol=1e-10, atol=1e-10)
    assert_close(delta.A.grad, delta.B.t() @ dW, rtol=1e-10, atol=1e-10)


def test_an_input_changed_in_place_after_its_function_is_kept_itself() -> None:
    class Shifted(nn.GELU):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).add_(1)

    net, x = stacked(Shifted()), torch.randn(6, 8).double()
    net(x).square().sum().backward()
    delta = net[2].adapters["default"]["weight"]  # type: ignore[index]
    found = delta.B.grad.clone()
    with torch.no_grad():
        dW = (2 * net(x)).t() @ net[1](net[0](x)) * delta.scale
    assert_close(found, dW @ delta.A.t(), rtol=1e-10, atol=1e-10)


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    net, x = stacked(nn.GELU()), torch.randn(6, 8).double()
    net(x).square().sum().backward()
    once = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    checkpoint(net, x, use_reentrant=False).square().sum().backward()
    for name, parameter in net.named_parameters():
        if name in once:
            assert_close(parameter.grad, once[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", ORDERS)
def test_autocast_runs_in_its_type_and_gives_gradients_in_float32(order: Order) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 8, 3, padding=1))
    net = vl.apply_lora(net, vl.LoraConfig(r=2, target_modules=["0", "2"]))
    for p in net.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 4, 6, 6)
    with forced(order):
        net(x).float().square().mean().backward()
        exact = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x)
        assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
    for name, parameter in net.named_parameters():
        if name in exact:
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad - exact[name]).norm() < 0.1 * exact[name].norm()


@pytest.mark.parametrize("order", ["merged", "projected"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_change_far_below_the_spacing_of_bfloat16_is_seen_under_autocast(kind: str, order: Order) -> None:
    torch.manual_seed(0)
    base, x = (nn.Linear(64, 64), torch.randn(256, 64)) if kind == "linear" else (nn.Conv2d(64, 64, 3), None)
    net, x = nn.Sequential(base), torch.randn(4, 64, 8, 8) if x is None else x
    vl.apply_lora(net, vl.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], modules_to_save="none"))
    delta, weight = base.adapters["default"]["weight"], base.base_tensor("weight")  # type: ignore[operator, union-attr]
    with torch.no_grad():
        nn.init.normal_(delta.B)
        delta.B.mul_(5e-4 * weight.norm() / delta.change(weight).norm())  # bfloat16 keeps 2e-3 to 4e-3 apart
        exact = net(x)
        with vl.disabled(net):
            exact = exact - net(x)
        with forced(order), torch.autocast("cpu", torch.bfloat16):
            seen = net(x).float()
            with vl.disabled(net):
                seen = seen - net(x).float()
    assert (seen * exact).sum() / exact.square().sum() > 0.9  # its share; the rest is rounding


def test_a_fresh_adapter_on_a_transposed_layer_changes_no_bit() -> None:
    for seed in range(8):  # another order in memory is another order of summing: most draws show it
        torch.manual_seed(seed)
        net, x = nn.Sequential(Conv1D(7, 6)).double(), torch.randn(3, 2, 6).double()
        y = net(x)
        vl.apply_lora(net, vl.LoraConfig(r=1, target_modules=["0"], modules_to_save="none"))
        for order in ORDERS:
            with forced(order):
                assert torch.equal(net(x), y), (seed, order)


@pytest.mark.parametrize("variant", ["lora", "dora", "fa", "lokr", "ia3"])
def test_a_vector_alone_is_mapped(variant: Variant) -> None:
    net, x = stacked(nn.Tanh(), variant), torch.randn(8).double()
    wanted = [p for p in net.parameters() if p.requires_grad]
    y, rows = net(x), net(x[None])
    assert_close(y, rows[0])
    assert_close(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(rows.sum(), wanted))


def test_orders_follow_the_sizes_of_a_layer() -> None:
    def order(out: int, in_: int, positions: int, *kernel: int, groups: int = 1, frozen: bool = False) -> Order:
        return choose(Geometry("conv", out, in_, groups, kernel), 8, positions, "cpu", torch.float32, frozen_A=frozen)

    assert order(256, 256, 8 * 14 * 14, 3, 3) == "merged"
    assert order(512, 512, 8 * 7 * 7, 3, 3) == "factorised"
    assert order(96, 16, 8 * 112 * 112, 1, 1) == "projected"
    assert order(96, 16, 8 * 112 * 112, 1, 1, frozen=True) == "merged"
    assert order(32, 1, 100, 3, 3, groups=32) == "projected"
    with forced("factorised"):
        assert order(256, 256, 8 * 14 * 14, 3, 3) == "factorised"
    with pytest.raises(ConfigError, match="factorised, merged, projected"), forced("fast"):  # type: ignore[arg-type]
        pass
