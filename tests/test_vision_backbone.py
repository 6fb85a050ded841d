"""timm backbones by name: names, local weights, heads, input settings."""

from __future__ import annotations

import logging
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.vision.backbone import check_model_name, create_backbone, data_config


def weights_of(name: str, path: Path, **args: object) -> nn.Module:
    torch.manual_seed(1)
    net = timm.create_model(name, **args)
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    save_file(state, path) if path.suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    return net.eval()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_local_checkpoint_gives_the_model_it_was_saved_from(tmp_path, suffix):
    path = tmp_path / f"w{suffix}"
    net = weights_of("test_resnet", path, num_classes=7)
    ours = create_backbone("test_resnet", checkpoint=path).eval()
    x = torch.randn(2, 3, 32, 32)
    assert ours.num_classes == 7
    assert torch.equal(ours(x), net(x))


def test_a_head_for_other_classes_is_dropped_and_said(tmp_path, caplog):
    net = weights_of("test_resnet", tmp_path / "w.safetensors", num_classes=7)
    with caplog.at_level(logging.INFO, "visionlora"):
        ours = create_backbone("test_resnet", checkpoint=tmp_path / "w.safetensors", num_classes=3).eval()
    assert "w.safetensors: a new head for 3 classes (the weights know 7)" in caplog.text
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(ours.forward_features(x), net.forward_features(x))
    assert torch.equal(ours(x), torch.zeros(2, 3))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "levit_128s"])
def test_a_new_head_starts_at_zero_and_can_learn(tmp_path, name):
    weights_of(name, tmp_path / "w.safetensors", num_classes=4)
    net = create_backbone(name, checkpoint=tmp_path / "w.safetensors", num_classes=3)
    y = net(torch.randn(2, *timm.get_pretrained_cfg(name).input_size))
    assert torch.equal(y, torch.zeros_like(y))
    y[0, 0].backward()  # not the sum: the inputs of a BatchNorm head sum to zero over the batch
    head = net.get_classifier()
    head = head[-1] if isinstance(head, tuple) else head
    assert any(p.grad is not None and p.grad.any() for n, p in head.named_parameters() if n.endswith("weight"))


def test_weights_without_a_head_are_taken(tmp_path):
    net = weights_of("test_vit", tmp_path / "w.safetensors", num_classes=0)
    ours = create_backbone("test_vit", checkpoint=tmp_path / "w.safetensors", num_classes=3)
    assert vl.fingerprint(ours) == vl.fingerprint(net)


def test_the_position_embedding_is_resampled_as_timm_does(tmp_path):
    weights_of("test_vit", tmp_path / "w.safetensors", num_classes=4)
    ours = create_backbone("test_vit", checkpoint=tmp_path / "w.safetensors", model_args={"img_size": 64})
    assert ours(torch.zeros(1, 3, 64, 64)).shape == (1, 4)


def test_the_weights_are_not_kept_a_second_time(tmp_path):
    weights_of("test_resnet", tmp_path / "w.safetensors")
    ours = create_backbone("test_resnet", checkpoint=tmp_path / "w.safetensors")
    assert "state_dict" not in ours.pretrained_cfg


def test_weights_of_another_model_are_refused_with_the_keys(tmp_path):
    weights_of("test_vit", tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"does not fit test_resnet.*[Mm]issing key.*conv1"):
        create_backbone("test_resnet", checkpoint=tmp_path / "w.safetensors")


def test_one_missing_tensor_is_refused(tmp_path):
    net = timm.create_model("test_resnet", num_classes=5)
    state = net.state_dict()
    del state["layer2.0.conv1.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"layer2\.0\.conv1\.weight"):
        create_backbone("test_resnet", checkpoint=tmp_path / "w.pth", num_classes=3)


def test_nan_in_the_weights_is_refused(tmp_path):
    net = timm.create_model("test_resnet")
    net.conv1[0].weight.data[0] = float("nan")
    torch.save(net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"NaN.*conv1.0.weight"):
        create_backbone("test_resnet", checkpoint=tmp_path / "w.pth")


class Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_is_refused_unexecuted(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"state_dict": Payload(str(tmp_path / "executed"))}, protocol=2))
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        create_backbone("test_resnet", checkpoint=tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a file of tensors", b"\xff" * 64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_file_is_refused(tmp_path, content, suffix):
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="not a readable checkpoint"):
        create_backbone("test_resnet", checkpoint=path)


def test_a_missing_file_is_named_with_its_neighbour(tmp_path):
    (tmp_path / "weights.pth").touch()
    with pytest.raises(ConfigError, match=r"no checkpoint at .*; did you mean \"weights.pth\""):
        create_backbone("test_resnet", checkpoint=tmp_path / "weigths.pth")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet81", 'no model .*did you mean "resnet18"'),
        ("resnet18.a1_in1", 'has no weights .*did you mean "a1_in1k"'),
        ("hf-hub:someone/something", "is a place"),
        ("../resnet18", "is a place"),
    ],
)
def test_a_wrong_name_is_an_error_with_a_suggestion(name, message):
    with pytest.raises(ConfigError, match=message):
        check_model_name(name)


def test_without_network_the_message_says_how_to_give_a_file(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"could not be fetched.*--model.checkpoint PATH"):
        create_backbone("test_resnet")


def test_a_model_without_published_weights_says_so():
    with pytest.raises(ConfigError, match=r"no usable weights for .*pretrained: false"):
        create_backbone(_without_weights())


def _without_weights() -> str:
    pretrained = {name.partition(".")[0] for name in timm.list_pretrained()}
    return next(name for name in timm.list_models("vit_tiny*") + timm.list_models("resnet*") if name not in pretrained)


def test_an_unknown_model_argument_is_named():
    with pytest.raises(ConfigError, match=r"imgsize.*model_args"):
        create_backbone("test_resnet", pretrained=False, model_args={"imgsize": 3})


def test_data_config_is_plain_data_and_the_same_by_name_and_by_model():
    net = timm.create_model("test_vit")
    assert data_config("test_vit") == data_config(net)
    assert data_config("test_vit")["input_size"] == [3, 160, 160]
    assert data_config("test_vit", model_args={"img_size": 64})["input_size"] == [3, 64, 64]
