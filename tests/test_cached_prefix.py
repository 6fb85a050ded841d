"""A frozen prefix that runs once for each image: the same training, bit for bit, or a refusal."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import timm
import torch
from PIL import Image
from torch import Tensor, nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.vision.datamodule import ImageFolderData
from visionlora.vision.features import FeatureBatch, FeatureDataset
from visionlora.vision.module import ImageClassifier
from visionlora.vision.prefix import cut

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* module.s. in eval mode"),  # BatchNorm that never drifts
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
LATE = {
    "test_resnet": r"layer4\..*",
    "test_vit": r"blocks\.[4-9]\..*",
    "test_convnext": r"stages\.3\..*fc.",
}
"""The layers that are adapted: a network's last part."""
every_family = pytest.mark.parametrize("name", LATE)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    noise = torch.randint(0, 256, (2, 12, 40, 40, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for kind, pictures in zip(("bus", "car"), noise, strict=True):
        (folder / kind).mkdir()
        for i, pixels in enumerate(pictures.numpy()):
            Image.fromarray(pixels).save(folder / kind / f"{i:02}.png")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VISIONLORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def data(root: Path, **options: Any) -> ImageFolderData:
    return ImageFolderData(str(root), image_size=64, augment=options.pop("augment", "none"), batch_size=8, **options)


def classifier(name: str, **settings: Any) -> ImageClassifier:
    torch.manual_seed(0)
    extra = {"zero_init_last": False} if name == "test_resnet" else {"img_size": 64} if name == "test_vit" else {}
    net = timm.create_model(name, num_classes=2, **{**extra, **settings.pop("model_args", {})})
    with torch.no_grad():
        for module in net.modules():  # fresh ConvNeXt blocks are all but skipped
            if isinstance(module, nn.Module) and "gamma" in module._parameters and module.gamma is not None:
                module.gamma.fill_(0.5)
    lora = vl.LoraConfig(r=2, target_modules=settings.pop("targets", LATE.get(name)), **settings.pop("lora", {}))
    return ImageClassifier.from_model(net, num_classes=2, lora=lora, lr=1e-2, **settings)


class Seen(pl.Callback):
    """What training saw and lost."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.kinds: set[str] = set()

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())
        self.kinds.add(type(batch).__name__)


def fit(module: ImageClassifier, images: ImageFolderData, tmp_path: Path, **options: Any) -> Seen:
    seen = Seen()
    run = pl.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0, callbacks=[seen], **options,
    )  # fmt: skip
    run.fit(module, datamodule=images)
    return seen


@every_family
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_training_is_the_same_bit_for_bit(root, tmp_path, name, where):
    plain, cached = classifier(name), classifier(name, cache_prefix=where)
    images = data(root)
    expected, found = fit(plain, data(root), tmp_path), fit(cached, images, tmp_path)
    assert (expected.kinds, found.kinds) == ({"Batch"}, {"FeatureBatch"})
    assert found.losses == expected.losses
    assert found.losses[-1] != found.losses[0]
    for (key, a), b in zip(plain.state_dict().items(), cached.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert {k: v.scalars()["acc"] for k, v in plain.results.items()} == {
        k: v.scalars()["acc"] for k, v in cached.results.items()
    }
    assert not images.features  # after the run the data module gives images again
    assert type(next(iter(images.train_dataloader()))).__name__ == "Batch"


@every_family
def test_the_prefix_runs_once_for_each_image(root, tmp_path, name):
    module, counted = classifier(name, cache_prefix="memory"), 0

    def count(*_: Any) -> None:
        nonlocal counted
        counted += 1

    first = cut(module.net).frozen[0].modules[0]
    first.register_forward_pre_hook(count)
    images = data(root)
    fit(module, images, tmp_path)
    batches = [-(-len(part) // 8) for part in (images.parts.train, images.parts.val)]
    assert counted == sum(batches) + 2  # and the check of the cut on each set's first


def test_the_cut_lies_before_the_first_changed_layer():
    names = [step.name for step in cut(classifier("test_resnet").net).frozen]
    assert names[0] == "conv1"
    assert names[-1].startswith("layer3")
    head = cut(classifier("test_vit", mode="linear").net)
    assert head.frozen[-1].name == "blocks.5"
    assert [step.name for step in head.rest.steps] == ["norm"]


@pytest.mark.parametrize("precision", ["bf16-mixed", "32-true"])
def test_a_file_is_used_again_and_another_base_makes_another(root, tmp_path, cache, precision):
    def run(**settings: Any) -> Seen:
        return fit(classifier("test_vit", cache_prefix="disk", **settings), data(root), tmp_path, precision=precision)

    first = run()
    files = sorted(cache.glob("*.npy"))
    assert len(files) == 2  # training and validation
    times = [file.stat().st_mtime_ns for file in files]
    assert run().losses == first.losses
    assert [file.stat().st_mtime_ns for file in sorted(cache.glob("*.npy"))] == times
    other = classifier("test_vit", cache_prefix="disk")
    with torch.no_grad():
        other.net.blocks[0].mlp.fc1.weight.add_(0.01)
    other._base = vl.fingerprint(other.net)
    fit(other, data(root), tmp_path, precision=precision)
    assert len(list(cache.glob("*.npy"))) == 4
    assert not list(cache.glob("*.vltmp"))


def test_a_changed_image_makes_another_file(root, tmp_path, cache):
    fit(classifier("test_vit", cache_prefix="disk"), data(root), tmp_path)
    victim = Path(data(root).parts.train[0].path)
    before = victim.stat()
    try:
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
        fit(classifier("test_vit", cache_prefix="disk"), data(root), tmp_path)
    finally:
        os.utime(victim, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert len(list(cache.glob("*.npy"))) == 3  # the validation images are the same


@pytest.mark.parametrize(
    ("settings", "options", "told"),
    [
        ({}, {"augment": "light"}, "--data.augment none"),
        ({"targets": r"conv1.*"}, {}, r"--model.lora.target_modules 'layer4"),
        ({"lora": {"norm": "stats"}}, {}, "norm frozen"),
        ({"lora": {"bias": "all"}}, {}, "bias none"),
        ({"model_args": {"drop_path_rate": 0.5}}, {}, "at random"),
    ],
)
def test_what_would_not_be_exact_is_refused(root, tmp_path, settings, options, told):
    with pytest.raises(ConfigError, match=told):
        fit(classifier("test_resnet", cache_prefix="memory", **settings), data(root, **options), tmp_path)


def test_other_families_and_other_data_are_refused(root, tmp_path):
    unknown = classifier("test_efficientnet", targets=r"blocks\.4\..*conv_pw", cache_prefix="memory")
    with pytest.raises(ConfigError, match=r"EfficientNet is none of them"):
        fit(unknown, data(root), tmp_path)
    with pytest.raises(ConfigError, match="mode full"):
        classifier("test_vit", mode="full", cache_prefix="memory")
    with pytest.raises(ConfigError, match="compile"):
        classifier("test_vit", compile=True, cache_prefix="memory")


def test_features_that_memory_cannot_hold_are_refused(monkeypatch, root, tmp_path):
    sizes = {"SC_AVPHYS_PAGES": 1, "SC_PAGE_SIZE": 4096}
    real = os.sysconf
    monkeypatch.setattr(os, "sysconf", lambda name: sizes.get(name) or real(name))
    with pytest.raises(ConfigError, match="cache_prefix disk"):
        fit(classifier("test_vit", cache_prefix="memory"), data(root), tmp_path)


def test_keys_of_later_epochs_give_the_same_features():
    class Images:
        labels = (0, 1, 1)

    features: Tensor = torch.randn(3, 4)
    dataset = FeatureDataset(features, Images())  # type: ignore[arg-type]
    found, label, at = dataset[3 * 7 + 2]
    assert torch.equal(found, features[2])
    assert (label, at) == (1, 2)
    assert FeatureBatch._fields == ("images", "labels", "indices")
