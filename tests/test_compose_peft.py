"""Combined adapters against PEFT's add_weighted_adapter, on a ViT and a ResNet of timm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from io_toy import adapted, images, timm_model
from torch import nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.compose import combine
from visionlora.registry import adapted_layers, adapter_plan

peft = pytest.importorskip("peft")


def vit() -> nn.Module:
    return timm_model("test_vit", img_size=64)


def resnet() -> nn.Module:
    return timm_model("test_resnet")


@pytest.fixture(params=[vit, resnet], ids=["vit", "resnet"])
def both(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Any]:
    """Return a model with two adapters, ours and PEFT's of the same files."""
    make = request.param
    targets = ["attn.qkv", "fc1"] if make is vit else ["layer1.0.conv1", "layer2.0.conv2"]
    common = {"target_modules": targets, "r": 3, "modules_to_save": "none"}
    own = {"one": {"lora_alpha": 6.0}, "two": {"lora_alpha": 4.0, "use_rslora": True}}
    for seed, (name, config) in enumerate(own.items()):
        model = adapted(make(), name=name, **common, **config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in vl.adapter_parameters(model, name)["B"].values():
                p.normal_(std=0.1, generator=generator)
        vl.save_adapter(model, tmp_path / name, name=name)
    ours = make()
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "one", adapter_name="one")
    theirs.load_adapter(tmp_path / "two", "two")
    for name in ("one", "two"):
        vl.load_adapter(ours, tmp_path / name)
    return ours, theirs


CASES: list[tuple[str, dict[str, Any], tuple[float, float]]] = [
    *(("concat", {}, weights) for weights in ((0.7, 0.3), (1.0, -0.5))),
    *(("svd", {"rank": 4}, weights) for weights in ((0.7, 0.3), (1.0, -0.5))),
    *(("ties", {"rank": 4, "density": 0.4}, weights) for weights in ((0.7, 0.3), (1.0, 1.0))),
    ("magnitude_prune", {"rank": 4, "density": 0.4}, (1.0, -0.5)),
]
PEFT_NAMES = {"concat": "cat", "svd": "svd", "ties": "ties_svd", "magnitude_prune": "magnitude_prune_svd"}


@pytest.mark.parametrize(("method", "options", "weights"), CASES)
def test_peft_makes_the_same_weights(
    both: tuple[nn.Module, Any], method: str, options: dict[str, Any], weights: tuple[float, float]
) -> None:
    ours, theirs = both
    combine(ours, {"one": weights[0], "two": weights[1]}, method=method, **options)
    known = {{"rank": "svd_rank"}.get(key, key): value for key, value in options.items()}
    theirs.add_weighted_adapter(["one", "two"], list(weights), "combined", PEFT_NAMES[method], **known)
    vl.activate(ours, "combined")
    theirs.set_adapter("combined")
    for site in adapter_plan(ours, "combined").sites:
        layer = adapted_layers(ours)[site.name]
        delta = layer.adapters["combined"]["weight"]
        wanted = theirs.base_model.model.get_submodule(site.name).get_delta_weight("combined")
        assert wanted.abs().max() > 1e-3
        assert_close(delta.change(layer.base_tensor("weight")), wanted, atol=1e-6, rtol=1e-4)
    with torch.no_grad():
        assert_close(ours(images()), theirs.eval()(images()), atol=1e-4, rtol=1e-4)
