"""From a saved directory back to the model: adapters and whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import visionlora as vl
from visionlora.errors import AdapterFileError, BaseMismatchError, ConfigError
from visionlora.vision.full import save_full
from visionlora.vision.loading import load_model, load_transform, read_record
from visionlora.vision.module import ImageClassifier

CLASSES = ["car", "bus", "van"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "base.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=7, zero_init_last=False).state_dict(), path)
    return path


def trained(base: Path, mode: str = "lora", **settings: Any) -> ImageClassifier:
    """A classifier whose trainable tensors have moved."""
    module = ImageClassifier("test_resnet", 3, class_names=CLASSES, mode=mode, checkpoint=str(base), **settings)
    torch.manual_seed(2)
    with torch.no_grad():
        for group in module.trainable_groups().values():
            for p in group:
                p.add_(torch.randn_like(p) * 0.05)
    return module.eval()


def images() -> torch.Tensor:
    return torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mode", ["lora", "linear", "norm", "full"])
def test_a_loaded_model_is_the_trained_one(tmp_path, base, mode):
    module = trained(base, mode)
    module.save_adapter(tmp_path / "a")
    model = load_model(tmp_path / "a", **({} if mode == "full" else {"checkpoint": base}))
    assert not model.training
    assert model.class_names == CLASSES
    with torch.no_grad():
        assert torch.equal(model(images()), module(images()))
        assert module(images()).abs().max() > 0.05


def test_strength_scales_the_whole_change(tmp_path, base):
    module = trained(base)
    module.save_adapter(tmp_path / "a")
    with torch.no_grad():
        none = load_model(tmp_path / "a", checkpoint=base, strength=0.0)(images())
        some = load_model(tmp_path / "a", checkpoint=base, strength=0.5)(images())
        vl.activate(module.net, "default", 0.5)
        assert torch.equal(none, torch.zeros(4, 3))  # the head of new classes starts at zero
        assert torch.equal(some, module(images()))


def test_a_whole_model_is_a_plain_timm_checkpoint(tmp_path, base):
    module = trained(base, "full")
    module.save_adapter(tmp_path / "a")
    model = timm.create_model("test_resnet", num_classes=3, checkpoint_path=tmp_path / "a" / "model.safetensors").eval()
    with torch.no_grad():
        assert torch.equal(model(images()), module(images()))


def test_the_transform_is_that_of_training(tmp_path, base):
    data = {
        "input_size": [3, 48, 48],
        "mean": [0.1] * 3,
        "std": [0.2] * 3,
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    trained(base, data=data).save_adapter(tmp_path / "a")
    config = load_transform(tmp_path / "a").config
    assert config.to_dict() == {**data, "crop_mode": "center"}


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_without_given_data_timms_own_is_recorded(tmp_path, base, mode):
    trained(base, mode).save_adapter(tmp_path / "a")
    assert load_transform(tmp_path / "a").config.input_size == (3, 160, 160)


def test_other_weights_of_the_same_backbone_are_refused(tmp_path, base):
    trained(base).save_adapter(tmp_path / "a")
    torch.manual_seed(9)
    other = tmp_path / "other.safetensors"
    save_file(timm.create_model("test_resnet").state_dict(), other)
    with pytest.raises(BaseMismatchError, match="checkpoint=PATH"):
        load_model(tmp_path / "a", checkpoint=other)


def test_without_network_the_message_says_how_to_give_the_weights(tmp_path, base, monkeypatch):
    trained(base).save_adapter(tmp_path / "a")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be fetched.*load_model\(directory, checkpoint=PATH\)"):
        load_model(tmp_path / "a")


def test_a_model_without_a_timm_name_is_not_rebuilt(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Linear(8, 3))
    module = ImageClassifier.from_model(net, num_classes=3, lora=vl.LoraConfig(r=2, target_modules=["1"]))
    module.save_adapter(tmp_path / "a")
    with pytest.raises(ConfigError, match="without a timm name; build that model yourself"):
        load_model(tmp_path / "a")


def test_a_checkpoint_for_a_whole_model_is_refused(tmp_path, base):
    trained(base, "full").save_adapter(tmp_path / "a")
    for extra in ({"checkpoint": base}, {"strength": 0.5}):
        with pytest.raises(ConfigError, match="leave checkpoint and strength away"):
            load_model(tmp_path / "a", **extra)


def test_two_kinds_in_one_directory_are_refused(tmp_path, base):
    trained(base, "full").save_adapter(tmp_path / "a")
    trained(base).save_adapter(tmp_path / "a")
    with pytest.raises(AdapterFileError, match="of two runs"):
        load_model(tmp_path / "a")


def change_record(directory: Path, **changes: Any) -> None:
    path = directory / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        record = json.loads(file.metadata()["visionlora_model"])
    save_file(load_file(path), path, {"visionlora_model": json.dumps({**record, **changes})})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version: expected 1"),
        ({"surprise": 1}, "unknown field 'surprise'"),
        ({"classes": [3]}, r"classes\[0\]"),
        ({"base": {"name": "hf-hub:someone/x"}}, "base"),
    ],
)
def test_a_record_that_is_not_sound_is_refused(tmp_path, base, changes, message):
    trained(base, "full").save_adapter(tmp_path / "a")
    change_record(tmp_path / "a", **changes)
    with pytest.raises(AdapterFileError, match=message):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("key", ["conv1.0.weight", "fc.weight"])
def test_a_changed_weight_of_a_whole_model_is_found(tmp_path, base, key):
    trained(base, "full").save_adapter(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[key].view(-1)[0] += 1e-3
    save_file(tensors, path, metadata)
    with pytest.raises((BaseMismatchError, AdapterFileError), match=r"weights|damaged"):
        load_model(tmp_path / "a")


def test_a_truncated_whole_model_is_refused(tmp_path, base):
    trained(base, "full").save_adapter(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AdapterFileError, match=r"model\.safetensors"):
        load_model(tmp_path / "a")


def test_a_timm_checkpoint_without_record_is_told_apart(tmp_path, base):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model.safetensors").write_bytes(base.read_bytes())
    with pytest.raises(AdapterFileError, match="no record of visionlora"):
        read_record(tmp_path / "a")


def test_a_record_that_cannot_be_kept_is_refused_when_saving(tmp_path):
    net = timm.create_model("test_resnet", num_classes=2)
    with pytest.raises(ConfigError, match="cannot be saved"):
        save_full(net, tmp_path / "a", classes=["a\nb", "c"])
    assert not (tmp_path / "a").exists()
