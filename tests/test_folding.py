"""Folding a frozen BatchNorm into the convolution before it: found by proof, exact, in training only."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.core.folding import fold_norms


def folded(model: nn.Module) -> int:
    return sum(bool(getattr(layer, "followed", ())) for layer in model.modules())


def trained_once(model: nn.Module, size: int = 32) -> nn.Module:
    """Return the model after a first training pass, which finds the norms to fold."""
    first = next(model.parameters())
    model.train()(torch.randn(2, 3, size, size, dtype=first.dtype))
    return model


def stirred(model: nn.Module) -> nn.Module:
    """Return the model with norms and adapters that are far from doing nothing, in float64."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.1)
    return model.double()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def unfolded(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in model.modules():
        if getattr(layer, "followed", ()):
            layer.followed = ()
    return model


@pytest.mark.parametrize("norm", ["frozen", "stats"])
@pytest.mark.parametrize("variant", ["lora", "dora", "fa"])
@pytest.mark.parametrize("name", ["resnet10t", "test_efficientnet", "mobilenetv3_small_050"])
def test_training_with_folded_norms_is_training_without(name: str, variant: str, norm: str) -> None:
    model = timm.create_model(name, num_classes=4, drop_path_rate=0.0, drop_rate=0.0)
    model = stirred(vl.apply_lora(model, vl.LoraConfig(r=2, variant=variant, norm=norm)))  # type: ignore[arg-type]
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    trained_once(model)
    assert folded(model) > 5
    assert_close(model(x), unfolded(model)(x), rtol=1e-10, atol=1e-10)
    truth = gradients(unfolded(model), x)
    for key, grad in gradients(model, x).items():
        assert_close(grad, truth[key], rtol=1e-8, atol=1e-9)


def test_no_bit_changes_outside_training() -> None:
    base = timm.create_model("resnet10t", num_classes=4).eval()
    x, y = torch.randn(2, 3, 32, 32), None
    y = base(x)
    model = trained_once(vl.apply_lora(base, vl.LoraConfig(r=2))).eval()
    assert folded(model)
    assert torch.equal(model(x), y)


class Two(nn.Module):
    """A convolution and its norm, put together in several ways."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.way = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def read_twice(net: nn.Module, x: Tensor) -> Tensor:
    y = net.conv(x)
    return net.norm(y) + y


def changed_between(net: nn.Module, x: Tensor) -> Tensor:
    return net.norm(net.conv(x).add_(1))


def normed_twice(net: nn.Module, x: Tensor) -> Tensor:
    return net.norm(net.norm(net.conv(x)))


def called_twice(net: nn.Module, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) + net.conv(x)


def also_returned(net: nn.Module, x: Tensor) -> list[Tensor]:
    y = net.conv(x)
    return [y, net.norm(y)]


@pytest.mark.parametrize("way", [read_twice, changed_between, normed_twice, called_twice, also_returned])
def test_a_convolution_that_others_read_is_left_alone(way: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = vl.apply_lora(Two(way), vl.LoraConfig(r=2, target_modules=["conv"]))
    assert fold_norms(model, torch.randn(1, 3, 8, 8)) == 0


def test_any_model_is_folded_with_an_example() -> None:
    model = vl.apply_lora(Two(lambda net, x: net.norm(net.conv(x))), vl.LoraConfig(r=2, target_modules=["conv"]))
    assert folded(model) == 0
    assert fold_norms(model, torch.randn(1, 3, 8, 8)) == 1
    assert model.training
    assert model.conv.followed == (model.norm,)


@pytest.mark.parametrize("way", [read_twice, changed_between, normed_twice, called_twice, also_returned])
def test_a_training_pass_leaves_it_alone_too(way: Callable[[nn.Module, Tensor], Tensor]) -> None:
    model = trained_once(vl.apply_lora(Two(way), vl.LoraConfig(r=2, target_modules=["conv"])), 8)
    assert folded(model) == 0


def test_the_first_training_pass_finds_the_norms() -> None:
    model = vl.apply_lora(timm.create_model("resnet10t"), vl.LoraConfig(r=2)).eval()
    x = torch.randn(2, 3, 32, 32)
    model(x)
    assert folded(model) == 0
    with torch.no_grad():
        model.train()(x)
    assert folded(model) == 0
    draw = torch.random.get_rng_state()
    model(x)
    assert folded(model) > 5
    assert torch.equal(torch.random.get_rng_state(), draw)
    assert not model._forward_pre_hooks
    assert not model._forward_pre_hooks_with_kwargs
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_first_training_pass_that_fails_leaves_no_watcher_behind() -> None:
    model = vl.apply_lora(timm.create_model("resnet10t"), vl.LoraConfig(r=2)).train()
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.randn(2, 5, 32, 32))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
    assert folded(model) == 0


def test_a_resumed_step_is_bit_for_bit_the_step_of_a_run_that_went_on() -> None:
    base = stirred(timm.create_model("resnet10t", num_classes=4)).float()
    images = torch.randn(3, 2, 3, 32, 32)

    def trained(model: nn.Module, *batches: Tensor) -> dict[str, Tensor]:
        for batch in batches:
            gradients(model.train(), batch)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.01 * parameter.grad
        return copy.deepcopy(model.state_dict())

    model, resumed = (vl.apply_lora(copy.deepcopy(base), vl.LoraConfig(r=2)) for _ in range(2))
    resumed.load_state_dict(trained(model, *images[:2]))
    truth, found = trained(model, images[2]), trained(resumed, images[2])
    assert all(torch.equal(tensor, truth[key]) for key, tensor in found.items())


@pytest.mark.parametrize("steps", [1, 3])
def test_a_checkpointed_block_runs_twice_alike(steps: int) -> None:
    model = stirred(vl.apply_lora(timm.create_model("resnet10t"), vl.LoraConfig(r=2)))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    truth = gradients(copy.deepcopy(model).train(), x)
    model.set_grad_checkpointing(True)
    for _ in range(steps):
        for key, grad in gradients(model.train(), x).items():
            assert_close(grad, truth[key], rtol=1e-8, atol=1e-9)


def test_a_base_that_is_given_back_keeps_no_hook() -> None:
    model = vl.apply_lora(timm.create_model("resnet10t"), vl.LoraConfig(r=2))
    vl.remove(model)
    assert not model._forward_pre_hooks


def test_a_hook_on_the_convolution_sees_its_own_output() -> None:
    model = trained_once(stirred(vl.apply_lora(timm.create_model("resnet10t"), vl.LoraConfig(r=2))))
    x, seen = torch.randn(2, 3, 32, 32, dtype=torch.float64), []
    layer = model.layer1[0].conv1
    layer.register_forward_hook(lambda module, args, out: seen.append(out.detach().clone()))
    y = model(x)
    assert_close(y, unfolded(model)(x), rtol=1e-10, atol=1e-10)
    assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-10)  # the copy was hooked as well


def test_a_folded_model_is_copied_pickled_merged_and_stripped() -> None:
    model = trained_once(stirred(vl.apply_lora(timm.create_model("resnet10t"), vl.LoraConfig(r=2))))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    y, count = model(x).detach(), folded(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        norms = {id(layer) for layer in twin.modules()}
        assert all(id(layer.followed[0]) in norms for layer in twin.modules() if getattr(layer, "followed", ()))
        assert folded(twin) == count
        assert_close(twin(x), y, rtol=1e-10, atol=1e-10)
    vl.unmerge(vl.merge(model))
    assert folded(model) == count
    assert folded(vl.remove(model)) == 0


def test_a_norm_that_is_trained_is_not_folded() -> None:
    model = stirred(vl.apply_lora(timm.create_model("resnet10t"), vl.LoraConfig(r=2, norm="affine")))
    trained_once(model)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    truth = gradients(unfolded(model), x)
    for key, grad in gradients(model, x).items():
        assert_close(grad, truth[key], rtol=1e-10, atol=1e-10)
