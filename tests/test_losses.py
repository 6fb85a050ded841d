"""Fifty steps of training give the losses of a LoRA written with dense weights, in every order of computation."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import visionlora as vl
from visionlora.core.orders import ORDERS, Order, forced

STEPS, RANK, ALPHA = 50, 4, 8
MODELS = {
    "test_resnet": {"zero_init_last": False},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_vit": {"img_size": 32},
}


def backbone(name: str) -> nn.Module:
    torch.manual_seed(3)
    net = timm.create_model(name, num_classes=3, **MODELS[name])
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # a pretrained net has statistics of its own
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(8) % 3
    found = []
    for _ in range(STEPS):
        x = 0.3 * torch.randn(8, 3, 32, 32, generator=generator)
        x[torch.arange(8), labels] += 0.5  # the class is the brightest channel
        found.append((x, labels))
    return found


def losses_of_dense_weights(net: nn.Module, adapted: nn.Module) -> list[float]:
    """Train what an adapted copy trains, from the same start, as W + s B A by plain autograd; BatchNorm is at rest."""
    for module in net.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    own = {key: p.detach() for key, p in net.named_parameters()}
    names = {key: p.detach().clone().requires_grad_() for key, p in adapted.named_parameters() if p.requires_grad}
    factors: dict[str, dict[str, Tensor]] = {}
    for key, leaf in names.items():
        layer, _, rest = key.partition(".adapters.default.")
        part, _, kind = rest.partition(".")
        factors.setdefault(f"{layer}.{part}", {})[kind] = leaf

    def weights() -> dict[str, Tensor]:
        found = {}
        for key, leaf in factors.items():
            if "value" in leaf:
                found[key] = leaf["value"]
            else:
                change = leaf["B"].flatten(1) @ leaf["A"].flatten(1)
                found[key] = own[key] + ALPHA / leaf["B"].shape[1] * change.view_as(own[key])
        return found

    return train(list(names.values()), lambda x: functional_call(net, own | weights(), (x,)))


def train(parameters: list[Tensor], model: Callable[[Tensor], Tensor]) -> list[float]:
    optimizer, losses = torch.optim.AdamW(parameters, lr=1e-3), []
    for x, y in batches():
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("order", [None, *ORDERS])
@pytest.mark.parametrize("name", MODELS)
def test_fifty_steps_have_the_losses_of_dense_weights(name: str, order: Order | None) -> None:
    adapted = vl.apply_lora(backbone(name), vl.LoraConfig(r=RANK, lora_alpha=ALPHA)).train()
    plain, start = backbone(name), copy.deepcopy(adapted)
    with forced(order):
        found = train([p for p in adapted.parameters() if p.requires_grad], adapted)
    true = losses_of_dense_weights(plain, start)
    assert true[-1] < 0.9 * true[0]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(true), rtol=1e-4, atol=0)
