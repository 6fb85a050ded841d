"""The shipped configs: found by name, readable, honest about their command, and the quickstart does what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import text_toy
import text_toy_data
import yaml
from transformers import AutoTokenizer

from visionlora.cli import main
from visionlora.commands.words import config_folders, find_config
from visionlora.errors import ConfigError

TEXTS = ("text_generate", "text_qa", "text_sentiment", "text_summarize")
NAMES = ("cnn_folder", "cnn_small", "quickstart", *TEXTS, "vit_folder")


def test_all_shipped_configs_are_known_here() -> None:
    assert sorted(path.stem for folder in config_folders() for path in folder.glob("*.yaml")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_begins_with_its_command_time_and_result(name: str) -> None:
    lines = Path(find_config(name)).read_text().splitlines()
    assert lines[0].startswith(f"# visionlora fit --config {name}")
    assert lines[1].startswith("# time: ")
    assert lines[2].startswith("# result: ")


@pytest.mark.parametrize("name", NAMES)
def test_a_config_is_accepted(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", name, "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    given = yaml.safe_load(Path(find_config(name)).read_text())
    assert shown["model"]["model_name"] == given["model"]["model_name"]
    assert shown["model"]["lora"] == {**shown["model"]["lora"], **given["model"]["lora"]}


@pytest.mark.parametrize("name", ["cnn_folder", "cnn_small", "vit_folder"])
def test_a_config_for_folders_asks_for_the_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", name]) == 2
    assert "give a folder as root or a CSV as csv" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_of_text_trains_a_tiny_model_of_its_kind(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(Path(find_config(name)).read_text())
    family = next(key for key in ("bert", "gpt2", "t5") if key in config["model"]["model_name"])
    text_toy.hub(tmp_path / "base", family, **({} if family == "t5" else {"max_position_embeddings": 512}))
    tokenizer = AutoTokenizer.from_pretrained("base")
    tokenizer.model_max_length = 512
    tokenizer.save_pretrained("base")
    rows = text_toy_data.rows(config["model"]["task_type"], 60)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["fit", "--config", name]) == 2  # no data
    words = ["--data.root", "rows.jsonl", "--data.cache", "none", "--model.model_name", "base"]
    few = ["--trainer.max_epochs", "1", *QUICKER, "--model.max_new_tokens", "4"]
    assert main(["fit", "--config", name, *words, *few]) == 0
    assert "the base, bit for bit" in capsys.readouterr().out
    assert Path(f"runs/{name}/adapter").is_dir()


def test_a_file_of_the_working_folder_comes_before_a_shipped_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("quickstart")).parent.name == "configs"
    Path("quickstart").write_text("model: {}")
    assert find_config("quickstart") == "quickstart"
    with pytest.raises(ConfigError, match="no config file none"):
        find_config("none")


QUICKER = ["--trainer.enable_progress_bar", "false", "--trainer.logger", "false", "--data.num_workers", "0"]


def test_the_quickstart_runs_on_a_few_scenes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    few = ["--scenes.per_class", "8", "--scenes.test_per_class", "3", "--trainer.max_epochs", "1", *QUICKER]
    assert main(["fit", "--config", "quickstart", *few, "--data.val_fraction", "0.25"]) == 0
    shown = capsys.readouterr().out
    assert "target" in shown
    assert "the base, bit for bit" in shown
    assert {path.name for path in Path("runs/quickstart").iterdir()} >= {"adapter", "samples.png", "summary.json"}


@pytest.mark.slow
def test_the_quickstart_gains_what_its_config_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "quickstart", *QUICKER]) == 0
    sets = json.loads(Path("runs/quickstart/summary.json").read_text())["sets"]
    gain = sets["target"]["after"]["acc"] - sets["target"]["before"]["acc"]
    assert gain > 0.25
    assert sets["source"]["before"]["acc"] > 0.9
