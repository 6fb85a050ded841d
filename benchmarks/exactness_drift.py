"""Training behind a frozen base: do the statistics of its BatchNorms move, and does the adapter's file hold them?"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from exactness_libraries import NotOffered, Put, Spot
from torch import Tensor, nn

STEPS, BATCH, SIZE = 20, 16, 64
COLUMNS = {
    "moved": "running means of the base moved by, in standard deviations",
    "off": "adapter off: distance from the base's output, as a share of its largest logit",
    "effect": "adapter on: the same",
    "file": "saved adapter on a fresh base: distance from the trained model's output, likewise",
}


def settled_resnet() -> nn.Module:
    """Return a ResNet-18 whose statistics are those of the images it has seen, and whose every block has an effect."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10, zero_init_last=False)
    norms = batch_norms(model).values()
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        norm.momentum = None
    with torch.no_grad():
        for _ in range(STEPS):
            model(torch.randn(BATCH, 3, SIZE, SIZE))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def batch_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}


def target(seed: int) -> Tensor:
    """Return images of another domain: brighter, with less contrast."""
    return 0.5 * torch.randn(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) + 1


def drift(place: Callable[[nn.Module, Spot], Put]) -> dict[str, float | None]:
    """Return what training in train() mode did to the base, each output error as a share of the largest logit."""
    base = settled_resnet()
    convs = [name for name, m in base.named_modules() if isinstance(m, nn.Conv2d)]
    put = place(copy.deepcopy(base), Spot(convs, convs, []))
    train(put)
    put.model.eval()
    images, before = target(99), base.state_dict()
    now = put.base()
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        y, z = base(images), put.model(images)
        found = {
            "moved": max(
                float(((now[k] - before[k]).abs() / before[k.replace("mean", "var")].sqrt()).max())
                for k in before
                if k.endswith("running_mean")
            )
        }
        found["effect"] = share(z, y)
        try:
            with put.disabled():
                found["off"] = share(put.model(images), y)
        except NotOffered:
            found["off"] = None
        put.save(Path(folder))
        found["file"] = share(put.load(copy.deepcopy(base), Path(folder)).model.eval()(images), z)
    return found


def train(put: Put) -> None:
    optimizer = torch.optim.AdamW(put.own, lr=1e-3)
    labels = torch.randint(10, (BATCH,), generator=torch.Generator().manual_seed(0))
    put.model.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(put.model(target(step)), labels).backward()
        optimizer.step()


def share(y: Tensor, z: Tensor) -> float:
    return float((y - z).abs().max() / z.abs().max())
