"""The README is short, and every command in it runs. (.ci/run runs its two install commands in fresh clones.)"""

from __future__ import annotations

import functools
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import visionlora as vl
from visionlora.__main__ import main
from visionlora.data.scenes import write_scenes

README = Path(__file__).parent.parent / "README.md"
SMALL = ["--model.model_name", "scenes_resnet", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("sh")).splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("visionlora ")]


def without_hub(create: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Stand in for a hub: the weights of a name are random, but always the same."""

    @functools.wraps(create)
    def make(name: str, pretrained: bool = False, **kwargs: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return create(name, pretrained=False, **{**kwargs, "num_classes": kwargs.get("num_classes", 1000)})

    return make


def test_the_readme_is_short_and_complete() -> None:
    text = README.read_text()
    assert len(text.splitlines()) < 250
    assert not re.search(r"[A-Z]+_TABLE", text), "a placeholder was left"


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        assert (README.parent / target).exists() or target.startswith("https://"), target


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(timm, "create_model", without_hub(timm.create_model))
    monkeypatch.setattr("visionlora.vision.hub.in_reach", lambda: True)  # the stand-in is
    first, second = blocks("python")
    names: dict[str, Any] = {}
    exec(compile(first, "README.md", "exec"), names)
    vl.apply_lora(names["model"], vl.LoraConfig(r=4), name="cam13")
    vl.save_adapter(names["model"], "adapters/cam13", name="cam13")
    exec(compile(second, "README.md", "exec"), names)
    assert vl.adapter_names(names["model"]) == ["cam12", "cam13", "both"]


@pytest.mark.slow
def test_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "scenes", domains=["night", "night_test"], per_class=8, test_per_class=4, size=64)
    crops = tmp_path / "crops"
    crops.mkdir()
    (tmp_path / "scenes" / "night").rename(crops / "train")
    (tmp_path / "scenes" / "night_test").rename(crops / "test")
    found = commands()
    assert [words[1] for words in found] == ["doctor", "fit", "test", "predict", "info", "merge", "combine", "convert"]
    for words in found:
        if words[1] == "combine":  # two cameras that were trained before
            for camera in ("night", "rain"):
                shutil.copytree("runs/cnn_folder/adapter", f"runs/{camera}/adapter")
        assert main(words[1:] + (SMALL if words[1] == "fit" else [])) == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "merged.safetensors").is_file()
    assert (tmp_path / "predictions.csv").is_file()
    assert (tmp_path / "crops.safetensors").is_file()
    assert (tmp_path / "runs" / "both" / "adapter_model.safetensors").is_file()
    run = tmp_path / "runs" / "cnn_folder"
    shown = re.search(r"runs/cnn_folder/\n(.*?)```", README.read_text(), re.DOTALL)
    assert shown is not None
    for name in re.findall(r"[\w.]+\.(?:yaml|csv|json|png|ckpt)|adapter(?=/)|tensorboard(?=/)", shown[1]):
        assert (run / name).exists(), name
