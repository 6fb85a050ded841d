"""The README is short, and every command in it runs. (.ci/run runs its two install commands in fresh clones.)"""

from __future__ import annotations

import csv
import functools
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from text_toy import hub
from text_toy_data import rows as text_rows
from torch import nn

import visionlora as vl
from visionlora.__main__ import main
from visionlora.data.scenes import write_scenes

README = Path(__file__).parent.parent / "README.md"
SMALL = ["--model.model_name", "scenes_resnet", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def commands(language: str = "sh") -> list[list[str]]:
    lines = "\n".join(blocks(language)).splitlines()
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
    verbs = ["doctor", "fit", "test", "predict", "info", "plan", "merge", "combine", "convert"]
    assert [words[1] for words in found] == verbs
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


def write_table(path: str, items: list[dict[str, Any]]) -> None:
    with Path(path).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(items[0]))
        writer.writeheader()
        writer.writerows(items)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_commands_on_text_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_table("reviews.csv", text_rows("SEQ_CLS", 60))
    write_table("new.csv", [{"text": row["text"]} for row in text_rows("SEQ_CLS", 4, 1)])
    write_table("pairs.csv", text_rows("SEQ_2_SEQ_LM", 60))
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in text_rows("CAUSAL_LM", 60)))
    asked = [
        {**row, "id": str(at), "answers": [spelt(row["answers"])]}
        for at, row in enumerate(text_rows("QUESTION_ANS", 60))
    ]
    paragraphs = [{"context": row.pop("context"), "qas": [row]} for row in asked]
    Path("squad.json").write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    families = {"text_sentiment": "bert", "text_qa": "bert", "text_generate": "gpt2", "text_summarize": "t5"}
    found = commands("bash")
    assert [words[1] for words in found] == ["fit"] * 4 + ["predict", "merge"]
    for words in found:
        more: list[str] = []
        if words[1] == "fit":
            family = families.pop(words[words.index("--config") + 1])
            if not Path(family).exists():
                hub(tmp_path / family, family)
            short = {
                "data.max_length": "64",
                "data.cache": "none",
                "model.max_new_tokens": "4",
                "trainer.max_epochs": "1",
            }
            more = ["--model.model_name", family, "--trainer.accelerator", "cpu"]
            more += [word for key, value in short.items() for word in (f"--{key}", value)]
            if family in ("gpt2", "t5"):
                more += ["--data.max_target_length", "16"]
            if words[3] == "text_qa":
                more += ["--data.stride", "8"]
        if words[1] == "merge":  # the base is a folder here, on the hub it is found by its name
            more = ["--checkpoint", "bert"]
        assert main(words[1:] + more) == 0, (words, capsys.readouterr().err)
    assert not families
    assert len(Path("predictions.jsonl").read_text().splitlines()) == 4
    assert Path("merged/config.json").is_file()


def spelt(answers: dict[str, list[Any]]) -> dict[str, Any]:
    """Return an answer as SQuAD's files have it."""
    return {"text": answers["text"][0], "answer_start": answers["answer_start"][0]}
