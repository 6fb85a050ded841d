"""A small CNN gets a larger adapter and a small backbone a higher rate, unless something else is asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
from test_vision_module import Data, classifier, trainer

from visionlora.config import LoraConfig
from visionlora.core.geometry import geometry_of
from visionlora.errors import ConfigError
from visionlora.vision.module import ImageClassifier


def test_a_small_cnn_gets_rank_and_scale_and_shift_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "visionlora"):
        module = classifier("test_resnet")
    assert module.config == LoraConfig(r=32, lora_alpha=64.0, norm="affine")
    assert module.hparams.lora == module.config.to_dict()
    assert "norm" in module.trainable_groups()
    assert "a small CNN: r 32" in caplog.text


def test_depthwise_kernels_of_a_small_cnn_are_trained_in_full() -> None:
    net = timm.create_model("mobilenetv3_small_050", num_classes=3)
    depthwise = {n for n, m in net.named_modules() if (geo := geometry_of(m)) and geo.depthwise}
    assert depthwise
    module = ImageClassifier.from_model(net, num_classes=3)
    assert set(module.config.modules_to_save) == depthwise
    saved = {id(p) for p in module.trainable_groups()["saved"]}
    shapes = [tuple(net.get_submodule(n).weight.shape) for n in sorted(depthwise)]
    trained = [p for p in module.parameters() if id(p) in saved]
    assert sorted(tuple(p.shape) for p in trained if p.ndim == 4) == sorted(shapes)
    assert "head" in module.trainable_groups()


@pytest.mark.parametrize(
    ("name", "settings", "rate"),
    [
        ("test_vit", {}, 3e-3),
        ("mobilenetv3_small_050", {}, 3e-3),  # 0.6 million weights
        ("mobilenetv3_small_100", {}, 1e-3),  # 1.5 million
        ("mobilenetv3_small_100", {"recipe": "none"}, 1e-3),
        ("mobilenetv3_small_100", {"mode": "norm"}, 3e-3),
        ("test_vit", {"mode": "linear"}, 1e-2),
        ("test_vit", {"mode": "full"}, 1e-3),
        ("mobilenetv3_small_100", {"lr": 4e-3}, 4e-3),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode")
def test_the_rate_of_an_adapter_fits_the_size_of_the_backbone(
    name: str, settings: dict[str, Any], rate: float, tmp_path: Path
) -> None:
    run = trainer(tmp_path, max_steps=1, max_epochs=1, limit_val_batches=0)
    run.fit(classifier(name, **settings), datamodule=Data())
    assert {group["initial_lr"] for group in run.optimizers[0].param_groups} == {rate}


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "none"},
        {"memory": "lean"},
        {"lora": LoraConfig(r=8)},
        {"lora": {"norm": "frozen", "lora_alpha": 16}},
        {"mode": "linear"},
    ],
)
def test_whatever_is_asked_for_is_taken_as_it_is(settings: dict[str, object]) -> None:
    module = classifier("test_resnet", **settings)
    assert module.config.r != 32
    assert "norm" not in module.trainable_groups()


@pytest.mark.parametrize("name", ["test_vit", "resnet18"])
def test_other_networks_get_the_defaults(name: str) -> None:
    assert classifier(name).config == LoraConfig()


def test_an_unknown_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="recipe must be auto or none, got 'non'; did you mean"):
        classifier("test_resnet", recipe="non")
