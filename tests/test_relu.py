"""A packed ReLU: the same numbers and gradients from a bit each, in every memory format."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.core.relu import PackedReLU, packed, unpacked


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    seen: dict[int, int] = {}
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}

    def pack(t: Tensor) -> Tensor:
        seen[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(size for key, size in seen.items() if key not in own)


@pytest.mark.parametrize("numel", [1, 7, 8, 64, 83])
def test_a_packed_mask_comes_back(numel: int) -> None:
    mask = torch.rand(numel) > 0.5
    bits = packed(mask)
    assert bits.numel() == -(-numel // 8)
    assert torch.equal(unpacked(bits, mask.shape, mask.stride()), mask)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "transposed"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", [nn.ReLU, nn.ReLU6])
def test_numbers_and_gradients_are_those_of_torch(kind: type[nn.Module], inplace: bool, layout: str) -> None:
    x = 6 * torch.randn(2, 5, 3, 7, dtype=torch.float64)
    x[0, 0, 0, :3] = torch.tensor([0.0, 6.0, float("nan")])
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x
    x = x.transpose(1, 3) if layout == "transposed" else x
    net = nn.Sequential(nn.Conv2d(x.shape[1], 4, 1), kind(inplace=inplace)).double()
    fast = vl.apply_lora(copy.deepcopy(net), vl.LoraConfig(r=1, variant="fa", target_modules=["0"]))
    assert isinstance(fast[1], PackedReLU)
    weight = torch.randn(x.shape, dtype=torch.float64)
    grads = []
    for layer in (kind(inplace=inplace), fast[1].train()):
        leaf = x.clone().requires_grad_()
        y = layer(leaf * 1)
        (y * weight).nansum().backward()
        grads.append((y.detach(), leaf.grad))
    assert_close(grads[0], grads[1], rtol=0, atol=0, equal_nan=True)


def test_a_frozen_a_keeps_bits_for_a_relu() -> None:
    x = torch.randn(2, 3, 64, 64)
    model = timm.create_model("resnet18", num_classes=4)
    saved = {}
    for variant in ("lora", "fa"):
        adapted = vl.apply_lora(copy.deepcopy(model), vl.LoraConfig(r=2, variant=variant)).train()  # type: ignore[arg-type]
        adapted(x)
        saved[variant] = saved_bytes(adapted, x)
    assert saved["fa"] < 0.3 * saved["lora"]


def test_the_base_gets_its_relu_back() -> None:
    base = timm.create_model("resnet10t", num_classes=4).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        y = base(x)
        model = vl.apply_lora(base, vl.LoraConfig(r=2, variant="fa"))
        assert torch.equal(model(x), y)
        twin = pickle.loads(pickle.dumps(model))
        assert torch.equal(twin(x), y)
    vl.remove(model)
    assert not any(isinstance(layer, PackedReLU) for layer in model.modules())
    assert type(model.act1) is nn.ReLU
