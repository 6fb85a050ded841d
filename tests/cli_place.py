"""A small place to train at through the command: images of two domains, a base, a config, and one finished run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from visionlora.cli import main

LAYERS = ("layer1.0.conv1", "layer2.0.conv1")
Errors = Callable[[], list[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images of two domains and two classes, and the weights of a base."""
    root = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for domain, shift in (("day", 0), ("night", -40)):
        for name, grey in (("cat", 90), ("dog", 170)):
            folder = root / "data" / domain / name
            folder.mkdir(parents=True)
            for i in range(12):
                pixels = np.clip(rng.normal(grey + shift, 20, (24, 24, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=2, zero_init_last=False)  # else no conv has a gradient
    save_file(base.state_dict(), root / "base.safetensors")
    config = {
        "model": {
            "model_name": "test_resnet",
            "checkpoint": "base.safetensors",
            "lora": {"r": 2, "target_modules": list(LAYERS)},
        },
        "data": {
            "root": "data",
            "train_domains": ["night"],
            "source_domains": ["day"],
            "batch_size": 8,
            "num_workers": 0,
            "image_size": 32,
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (root / "tiny.yaml").write_text(yaml.safe_dump(config))
    return root


@pytest.fixture(scope="module")
def trained(place: Path) -> Path:
    """The folder of one finished run; tests must not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert main(["fit", "--config", "tiny.yaml"]) == 0
    return place / "runs" / "tiny"


@pytest.fixture
def here(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own with the same images, base and config."""
    for name in ("data", "base.safetensors", "tiny.yaml"):
        (tmp_path / name).symlink_to(place / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path, trained: Path) -> Path:
    """A copy of the finished run that a test may change."""
    shutil.copytree(trained, here / "runs" / "tiny")
    return Path("runs/tiny")


@pytest.fixture
def errors(capsys: pytest.CaptureFixture[str]) -> Errors:
    """Return the lines of the message that the command ended with."""

    def lines() -> list[str]:
        text = capsys.readouterr().err
        at = text.find("visionlora: ")
        return text[at:].splitlines() if at >= 0 else []

    return lines


def config_of(run: Path, name: str = "config.yaml") -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((run / name).read_text())
    return found


def checkpoint_of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(run / "last.ckpt", weights_only=True)
    return found
