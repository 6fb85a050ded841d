"""The layout of kernels and images in memory changes neither what is learned nor what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from test_vision_module import Data, backbone, classifier, images, trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.vision.layout import layout_for
from visionlora.vision.module import ImageClassifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
MODES = ["lora", "linear", "norm", "full"]


class Watch(pl.Callback):
    """Which kernels lie as channels_last while a network is trained."""

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.found = set(channels_last(module.net))


def channels_last(net: nn.Module) -> list[bool]:
    kernels = [p for p in net.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return [p.is_contiguous(memory_format=torch.channels_last) for p in kernels]


def trained(
    path: Path, name: str = "test_resnet", layout: str = "auto", **options: Any
) -> tuple[ImageClassifier, Watch]:
    mode, watch = options.pop("mode", "lora"), Watch()
    module = classifier(name, mode=mode, memory_format=layout, lr=1e-3)
    trainer(path, callbacks=[watch], **options).fit(module, datamodule=Data())
    assert not any(channels_last(module.net))
    return module, watch


@pytest.mark.parametrize(("name", "wanted"), [("test_resnet", True), ("test_vit", False)])
def test_auto_is_channels_last_where_the_network_has_batch_norm(tmp_path: Path, name: str, wanted: bool) -> None:
    module, watch = trained(tmp_path, name, max_epochs=1)
    assert watch.found == {wanted}
    assert vl.fingerprint(module.net) == module.fingerprint()


@pytest.mark.parametrize("mode", MODES)
def test_both_layouts_learn_the_same(tmp_path: Path, mode: str) -> None:
    # AdamW blows rounding up wherever a gradient is next to nothing
    a, b = (
        trained(tmp_path, layout=layout, mode=mode, precision="64-true")[0]
        for layout in ("contiguous", "channels_last")
    )
    x = images(seed=9)[0].double()
    with torch.no_grad():
        torch.testing.assert_close(a.double().eval()(x), b.double().eval()(x), rtol=1e-7, atol=1e-7)


def test_an_adapter_trained_channels_last_is_the_same_bits_on_a_base_of_its_own(tmp_path: Path) -> None:
    module, watch = trained(tmp_path)
    assert watch.found == {True}
    module.save_adapter(tmp_path / "adapter")
    net = backbone().eval()
    vl.load_adapter(net, tmp_path / "adapter")
    x = images(seed=9)[0]
    with torch.no_grad():
        assert torch.equal(net(x), module.eval()(x))


def test_several_processes_stay_contiguous_unless_asked() -> None:
    assert layout_for(backbone(), "auto", processes=2) is torch.contiguous_format
    assert layout_for(backbone(), "channels_last", processes=2) is torch.channels_last


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_a_run_resumes_in_the_other_layout(tmp_path: Path, mode: str) -> None:
    def run(layout: str, epochs: int, ckpt: Path | None = None) -> ImageClassifier:
        module = classifier(mode=mode, memory_format=layout, lr=1e-3)
        fitting = trainer(tmp_path, max_epochs=epochs, precision="64-true")
        module.lr_scheduler_step = lambda *_: None  # a schedule that does not know how long it is
        loader = DataLoader(TensorDataset(*images()), batch_size=16)  # the same order in every epoch
        fitting.fit(module, loader, loader, ckpt_path=ckpt, weights_only=False)
        fitting.save_checkpoint(tmp_path / "last.ckpt")
        return module

    whole = run("contiguous", 2)
    run("contiguous", 1)
    resumed = run("channels_last", 2, tmp_path / "last.ckpt")
    for (name, a), b in zip(whole.net.named_parameters(), resumed.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=name)


def test_an_unknown_layout_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"auto, contiguous or channels_last, .*did you mean \"channels_last\""):
        classifier(memory_format="chanels_last")  # type: ignore[arg-type]


def test_gradients_are_clipped_under_mixed_precision(tmp_path: Path) -> None:
    run = trainer(tmp_path, precision="bf16-mixed", gradient_clip_val=0.1, max_epochs=1)
    module = classifier()
    run.fit(module, datamodule=Data())  # Lightning refuses to clip for a fused optimiser here
    assert run.global_step == 3
