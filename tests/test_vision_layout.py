"""The layout of kernels and images in memory changes neither what is learned nor what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_vision_module import Data, backbone, classifier, images, trainer
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.vision.module import ImageClassifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
MODES = ["lora", "linear", "norm", "full"]


def trained(path: Path, layout: str, mode: str = "lora", **options: Any) -> ImageClassifier:
    module = classifier(mode=mode, memory_format=layout, lr=1e-3)
    run = trainer(path, **options)
    run.fit(module, datamodule=Data())
    run.test(module, datamodule=Data(), verbose=False)
    return module


def channels_last(net: nn.Module) -> list[bool]:
    kernels = [p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return [p.is_contiguous(memory_format=torch.channels_last) for p in kernels]


@pytest.mark.parametrize(("name", "wanted"), [("test_resnet", True), ("test_vit", False)])
def test_auto_is_channels_last_where_the_network_has_batch_norm(name: str, wanted: bool) -> None:
    found = channels_last(classifier(name).net)
    assert found
    assert set(found) == {wanted}


@pytest.mark.parametrize("mode", MODES)
def test_both_layouts_learn_the_same(tmp_path: Path, mode: str) -> None:
    # AdamW blows rounding up wherever a gradient is next to nothing
    a, b = (trained(tmp_path, layout, mode, precision="64-true") for layout in ("contiguous", "channels_last"))
    assert not any(channels_last(a.net))
    assert all(channels_last(b.net))
    x = images(seed=9)[0].double()
    with torch.no_grad():
        torch.testing.assert_close(a.double().eval()(x), b.double().eval()(x), rtol=1e-7, atol=1e-7)


def test_an_adapter_trained_channels_last_runs_on_a_contiguous_base(tmp_path: Path) -> None:
    module = trained(tmp_path, "channels_last")
    module.save_adapter(tmp_path / "adapter")
    net = backbone().eval()
    vl.load_adapter(net, tmp_path / "adapter")
    x = images(seed=9)[0]
    with torch.no_grad():
        torch.testing.assert_close(net(x), module.eval()(x), rtol=1e-5, atol=1e-5)


def test_the_base_keeps_its_fingerprint_in_either_layout() -> None:
    a, b = (classifier(memory_format=layout) for layout in ("contiguous", "channels_last"))
    assert a.fingerprint() == b.fingerprint() == vl.fingerprint(b.net)


def test_an_unknown_layout_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"auto, contiguous or channels_last, .*did you mean \"channels_last\""):
        classifier(memory_format="chanels_last")  # type: ignore[arg-type]


def test_gradients_are_clipped_under_mixed_precision(tmp_path: Path) -> None:
    run = trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=0.1, max_epochs=1)
    module = classifier()
    run.fit(module, datamodule=Data())  # Lightning refuses to clip for a fused optimiser here
    assert run.global_step == 3
