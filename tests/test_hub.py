"""A hub out of reach costs no minute: weights come from its cache, or a message comes at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from visionlora.errors import ConfigError
from visionlora.text import create_backbone as create_model
from visionlora.text.layout import ready_tokenizer
from visionlora.vision.backbone import create_backbone


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub whose name nobody knows."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_weights_that_are_nowhere_are_told_at_once(cache: Path) -> None:
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"hub\.invalid is out of reach.*--model\.checkpoint PATH"):
        create_backbone("test_resnet")
    assert time.monotonic() - start < 30  # five tries of each file take a minute


def test_weights_of_an_earlier_download_are_used(cache: Path) -> None:
    torch.manual_seed(3)
    net = timm.create_model("test_resnet").eval()
    hub_id = timm.get_pretrained_cfg("test_resnet").hf_hub_id
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(net.state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    ours = create_backbone("test_resnet").eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(ours(x), net(x))


def test_weights_in_the_package_need_no_hub(cache: Path) -> None:
    assert create_backbone("scenes_resnet").num_classes == 8


def test_a_language_model_that_is_nowhere_is_told_at_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    start = time.monotonic()
    with pytest.raises(ConfigError, match=r"no model 'bert-base-uncased': hub\.invalid is out of reach"):
        create_model("bert-base-uncased", "SEQ_CLS", label_names=["bad", "good"])
    with pytest.raises(ConfigError, match="no tokenizer 'bert-base-uncased'"):
        ready_tokenizer("bert-base-uncased", "SEQ_CLS")
    assert time.monotonic() - start < 15  # each is tried for 45 s otherwise
