"""A weight that is read without being used is not formed; used in any way, it is the effective one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import visionlora as vl
from visionlora.errors import StateError


def adapted(dtype: torch.dtype = torch.float64, **config: Any) -> nn.Linear:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).to(dtype)
    vl.apply_lora(net, vl.LoraConfig(r=2, target_modules=["0"], modules_to_save=[], **config))
    with torch.no_grad():
        for parameter in net[0].adapters.parameters():
            parameter.normal_()
    return net[0]


def truth(layer: nn.Linear) -> Tensor:
    return layer(torch.eye(6, dtype=layer.weight.dtype)).mT - layer.bias[:, None]


@pytest.mark.parametrize("gradients", [True, False])
def test_who_asks_for_the_type_pays_nothing(gradients: bool) -> None:
    layer = adapted(torch.bfloat16)
    with torch.set_grad_enabled(gradients), FlopCounterMode(display=False) as counted:
        weight = layer.weight
        assert (weight.dtype, weight.shape, weight.device.type) == (torch.bfloat16, (5, 6), "cpu")
        assert isinstance(weight, Tensor)
        assert weight.requires_grad == gradients
        assert weight.is_contiguous()
        assert weight.stride() == (6, 1)
        assert len(weight) == 5
    assert counted.get_total_flops() == 0
    assert_close(weight.detach().double(), truth(layer).double(), atol=2e-2, rtol=2e-2)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x


@pytest.mark.parametrize("variant", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("use", [F.linear, Product.apply, lambda x, w: torch.einsum("bi,oi->bo", x, w)])
def test_gradients_pass_through_what_was_read(variant: str, use: Callable[..., Tensor]) -> None:
    layer = adapted(variant=variant)
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    trained = [p for p in layer.adapters.parameters() if p.requires_grad]
    expected, found = layer(x) - layer.bias, use(x, layer.weight)
    assert_close(found, expected)
    g = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad(found, [x, *trained], g), torch.autograd.grad(expected, [x, *trained], g), strict=True
    ):
        assert_close(a, b)


def saved(weight: Tensor) -> Tensor:
    torch.save(weight, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "way",
    [
        lambda w: torch.from_numpy(w.numpy()),
        lambda w: torch.tensor(w.tolist(), dtype=w.dtype),
        lambda w: torch.stack(list(w)),
        torch.from_dlpack,
        copy.deepcopy,
        lambda w: pickle.loads(pickle.dumps(w)),
        saved,
        lambda w: w.detach(),
        lambda w: w.data,
        lambda w: torch.empty(0, dtype=w.dtype).set_(w.untyped_storage(), 0, w.shape),
    ],
    ids=["numpy", "tolist", "iter", "dlpack", "deepcopy", "pickle", "save", "detach", "data", "storage"],
)
def test_ways_around_the_dispatcher_see_the_numbers(way: Callable[[Tensor], Tensor]) -> None:
    layer = adapted()
    with torch.no_grad():
        assert_close(way(layer.weight), truth(layer))
        assert layer.weight.data_ptr() != 0
        assert f"{layer.weight[0, 0].item():.4f}" in repr(layer.weight)


def test_a_weight_read_before_its_adapter_changed_is_refused() -> None:
    layer = adapted()
    before, early = layer.weight, layer.weight.clone()
    A = next(iter(layer.adapters.parameters()))
    with torch.no_grad():
        A += 1
    assert_close(layer.weight, truth(layer))
    assert not torch.equal(early, layer.weight)
    with pytest.raises(StateError, match="read it again"):
        before.sum()


def test_a_weight_used_before_its_adapter_changed_stays() -> None:
    layer = adapted()
    before = layer.weight
    early = before.clone()
    with torch.no_grad():
        next(iter(layer.adapters.parameters())).zero_()
    assert torch.equal(before, early)


def test_inference_mode_and_autocast() -> None:
    layer = adapted(torch.float32, lora_dropout=0.5).train()
    with torch.inference_mode():
        assert layer.weight.sum().isfinite()
    layer.eval()
    whole = layer.weight.clone()
    with torch.autocast("cpu", torch.bfloat16):
        weight = layer.weight
        assert weight.dtype == torch.float32
        assert F.linear(torch.ones(1, 6), weight).dtype == torch.bfloat16
        assert torch.equal(weight, whole)
