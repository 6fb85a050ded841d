"""Normalisation: nothing drifts, statistics belong to the adapter, and the constant affine is exact."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from io_toy import images, timm_model
from layer_kinds import stir
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.core.norms import batch_norms
from visionlora.errors import StateError, TargetError


def resnet(name: str = "resnet10t") -> nn.Module:
    return timm.create_model(name, num_classes=4, zero_init_last=False).eval()


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in vl.base_state_dict(model).items() if "running" in k or "num_batches" in k}


def train_steps(model: nn.Module, steps: int = 3) -> None:
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimiser.zero_grad()
        model(3 + 2 * torch.randn(4, 3, 32, 32)).square().mean().backward()
        optimiser.step()
    model.eval()


@pytest.mark.parametrize("norm", ["frozen", "affine", "stats", "stats-affine"])
@pytest.mark.parametrize("name", ["resnet10t", "efficientnet_b0"])
def test_training_never_moves_the_base_statistics(name: str, norm: str) -> None:
    model = timm.create_model(name, num_classes=4).eval()
    x, before = torch.randn(2, 3, 32, 32), buffers(model)
    with torch.no_grad():
        base = model(x)
    vl.apply_lora(model, vl.LoraConfig(r=2, norm=norm))
    train_steps(model)
    assert before
    assert all(torch.equal(v, before[k]) for k, v in buffers(model).items())
    with torch.no_grad(), vl.disabled(model):
        assert torch.equal(model(x), base)
    vl.remove(model)
    assert torch.equal(model(x).detach(), base)
    model.train()
    model(x)
    assert not all(torch.equal(v, before[k]) for k, v in buffers(model).items()), "train() means train() again"


def test_train_mode_equals_eval_mode_for_batch_norm_and_keeps_its_gradients() -> None:
    model, x = resnet().double(), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    vl.apply_lora(model, vl.LoraConfig(r=2))
    for m in batch_norms(model).values():
        m._buffers["running_mean"].normal_()
        m._buffers["running_var"].uniform_(0.5, 2)
    results = []
    for mode in (model.eval, model.train):
        mode()
        model.zero_grad()
        y = model(x)
        y.square().mean().backward()
        results.append((y.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]))
    assert_close(results[0], results[1])
    plain = copy.deepcopy(model)
    for m in batch_norms(plain).values():
        assert m.training is False
    vl.merge(plain)
    assert_close(plain.eval()(x), results[0][0])


def test_a_frozen_batch_norm_keeps_no_activation_for_backward() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))
    vl.apply_lora(model, vl.LoraConfig(r=1, target_modules=["0", "2"], modules_to_save="none", norm="frozen"))
    model.train()
    x = torch.randn(64, 8)
    h = model[0](x)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        model[1](h)
    assert max(kept, default=0) < h.numel()


def test_statistics_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = 5 + 2 * torch.randn(40, 3, 6, 6)
    vl.apply_lora(model, vl.LoraConfig(target_modules="none", norm="stats", modules_to_save="none"))
    assert vl.estimate_statistics(model, x.split(7), model) == 40
    flat = x.double().transpose(0, 1).flatten(1)
    assert_close(model[0].running_mean, flat.mean(1).float())
    assert_close(model[0].running_var, flat.var(1).float())
    with torch.no_grad():
        y = model(x)
    assert y.mean().abs() < 0.1
    assert (y.std() - 1).abs() < 0.1
    with vl.disabled(model):
        assert torch.equal(model[0].running_mean, torch.zeros(3))


def test_statistics_switch_with_the_adapter_and_scale_with_its_strength() -> None:
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    for name, shift in (("day", 1.0), ("night", -3.0)):
        vl.apply_lora(model, vl.LoraConfig(target_modules="none", norm="stats"), name=name)
        vl.estimate_statistics(model, [shift + torch.randn(8, 3, 32, 32)], model)
    bn = model.bn1
    night = bn.running_mean
    vl.activate(model, "day")
    day = bn.running_mean
    with torch.no_grad():
        y = model(x)
    assert not torch.equal(day, night)
    vl.activate(model, "day", strength=0.5)
    assert_close(bn.running_mean, (day + bn.base_tensor("running_mean")) / 2)
    vl.activate(model, "night")
    vl.activate(model, "day")
    with torch.no_grad():
        assert torch.equal(model(x), y)


def test_affine_trains_scale_and_shift_of_every_kind_of_norm() -> None:
    for name, suffix in (("resnet10t", "bn1"), ("vit_tiny_patch16_224", "norm1")):
        kwargs = {"img_size": 32, "depth": 1} if "vit" in name else {}
        model = timm.create_model(name, num_classes=4, **kwargs)
        vl.apply_lora(model, vl.LoraConfig(target_modules="none", norm="affine", bias="none"))
        groups = vl.adapter_parameters(model, "default")
        assert set(groups) == {"norm", "head"}
        layer = next(n for n, _ in model.named_modules() if n.endswith(suffix))
        assert {f"{layer}.adapters.default.{a}.value" for a in ("weight", "bias")} <= set(groups["norm"])
        train_steps(model, 1)
        vl.check_gradients(model)


def test_statistics_of_a_model_without_batch_norm_are_refused() -> None:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with pytest.raises(TargetError, match='has no BatchNorm; use norm="frozen"'):
        vl.apply_lora(vit, vl.LoraConfig(norm="stats"))
    assert vl.adapter_names(vit) == []


def test_statistics_need_an_adapter_that_owns_them_and_images() -> None:
    model = resnet()
    vl.apply_lora(model, vl.LoraConfig(r=2))
    with pytest.raises(StateError, match="no BatchNorm statistics of its own"):
        vl.estimate_statistics(model, [torch.randn(2, 3, 32, 32)], model)
    vl.remove(model)
    vl.apply_lora(model, vl.LoraConfig(r=2, norm="stats"))
    with pytest.raises(StateError, match="no images"):
        vl.estimate_statistics(model, [], model)


def test_bfloat16_and_channels_last_keep_the_constant_affine_exact() -> None:
    bn = nn.BatchNorm2d(8)
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), bn)
    vl.apply_lora(model, vl.LoraConfig(r=1, target_modules=["0"]))
    x = torch.randn(4, 3, 6, 6).to(memory_format=torch.channels_last)
    model.train()
    trained = model(x)
    model.eval()
    with torch.no_grad():
        assert_close(trained, model(x))
    assert trained.is_contiguous(memory_format=torch.channels_last)
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype == torch.bfloat16
    assert_close(y.float(), trained, atol=0.05, rtol=0.05)


WITHOUT_DELTAS: dict[str, dict[str, Any]] = {
    "biases": {"bias": "all"},
    "norms": {"norm": "affine"},
    "both": {"norm": "affine", "bias": "all"},
}


@pytest.mark.parametrize("what", WITHOUT_DELTAS)
@pytest.mark.parametrize(("name", "small"), [("test_vit", {"img_size": 64}), ("test_resnet", {})])
def test_an_adapter_without_deltas_keeps_every_promise(
    name: str, small: dict[str, int], what: str, tmp_path: Path
) -> None:
    model, x = timm_model(name, **small).requires_grad_(False), images()
    weights, base = copy.deepcopy(model.state_dict()), model(x)
    vl.apply_lora(model, vl.LoraConfig(target_modules="none", modules_to_save="none", **WITHOUT_DELTAS[what]))
    groups = [n.replace(".adapters.default", "") for n, p in model.named_parameters() if p.requires_grad]
    trained = {name.removesuffix(".value") for name in groups}
    norms = {n for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))}
    of_norms = {f"{n}.{a}" for n in norms for a in ("weight", "bias")}
    biases = {key for key in weights if key.endswith("bias")}  # the head's too
    assert trained == {"biases": biases, "norms": of_norms, "both": biases | of_norms}[what]
    assert torch.equal(model(x), base)
    stir(model)
    changed = model(x)
    changed.square().sum().backward()
    vl.check_gradients(model)
    assert (changed - base).abs().max() > 1e-2
    with vl.disabled(model):
        assert torch.equal(model(x), base)
    assert_close(vl.merge(model)(x), changed)
    assert torch.equal(vl.unmerge(model)(x), changed)
    vl.save_adapter(model, tmp_path)
    again = timm_model(name, **small)
    vl.load_adapter(again, tmp_path)
    with torch.no_grad():
        assert_close(again(x), changed, rtol=0, atol=1e-6)
    vl.remove(model)
    assert all(torch.equal(t, weights[key]) for key, t in model.state_dict().items())
