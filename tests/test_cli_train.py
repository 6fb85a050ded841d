"""fit, validate, test and predict through the command, with every trap of LightningCLI that is known to bite."""

from __future__ import annotations

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from visionlora.cli import main
from visionlora.io import read_adapter

LAYERS = ("layer1.0.conv1", "layer2.0.conv1")


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


Errors = Callable[[], list[str]]


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


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Let the disk be full for every file above a size."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)


def own_images(run: Path, broken: str) -> None:
    """Give a test images of its own, one of them an empty file."""
    shared = Path("data").resolve()
    Path("data").unlink()
    shutil.copytree(shared, "data")
    Path(broken).write_bytes(b"")


# what a run leaves


def test_fit_leaves_adapter_checkpoint_metrics_and_config(trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert names >= {"adapter", "last.ckpt", "metrics.csv", "tensorboard", "config.yaml"}
    record = read_adapter(trained / "adapter").record
    assert record["classes"] == ["cat", "dog"]
    assert record["data"]["input_size"] == [3, 32, 32]
    assert set(record["plan"]["layers"]) == set(LAYERS)
    rows = list(csv.DictReader((trained / "metrics.csv").read_text().splitlines()))
    assert any(row["val/acc"] for row in rows)


def test_the_checkpoint_holds_plain_data_and_no_frozen_weight(trained: Path) -> None:
    checkpoint = checkpoint_of(trained)  # weights_only=True refuses a pickled dataclass
    assert checkpoint["hyper_parameters"]["lora"]["r"] == 2
    base = sum(t.numel() for t in load_file(trained.parent.parent / "base.safetensors").values())
    assert sum(t.numel() for t in checkpoint["state_dict"].values()) < 0.2 * base
    assert checkpoint["optimizer_states"]


def test_a_second_run_gets_a_folder_of_its_own(here: Path, run: Path) -> None:
    before = (run / "last.ckpt").read_bytes()
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    assert (here / "runs" / "tiny-2" / "last.ckpt").is_file()
    assert (run / "last.ckpt").read_bytes() == before


def test_run_and_output_choose_the_folder(here: Path) -> None:
    assert (
        main(["fit", "--config", "tiny.yaml", "--run", "cam12", "--output", "out", "--trainer.fast_dev_run=true"]) == 0
    )
    assert (here / "out" / "cam12").is_dir()


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".."])
def test_a_run_is_named_by_one_folder_name(name: str, here: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--run", name]) == 2
    assert "a run's name" in errors()[0]
    assert not list(here.glob("runs/*"))


def test_the_saved_config_starts_the_same_run_again(here: Path, run: Path) -> None:
    assert main(["fit", "--config", str(run / "config.yaml")]) == 0
    again = here / "runs" / "tiny-2"
    first, second = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert config_of(again)["model"] == config_of(run)["model"]


# what the user types wins, or is refused


def test_a_flag_wins_over_a_config_that_comes_after_it(here: Path) -> None:
    assert main(["fit", "--model.lr", "0.5", "--trainer.max_epochs", "2", "--config", "tiny.yaml"]) == 0
    config = config_of(here / "runs" / "tiny")
    assert (config["model"]["lr"], config["trainer"]["max_epochs"]) == (0.5, 2)


def test_a_resumed_run_trains_with_the_rate_that_is_typed(run: Path) -> None:
    assert main(["fit", "--ckpt_path", str(run / "last.ckpt"), "--model.lr", "0.5", "--trainer.max_epochs", "2"]) == 0
    group = checkpoint_of(run)["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == 0.5
    assert checkpoint_of(run)["hyper_parameters"]["lr"] == 0.5


def test_a_resumed_run_goes_on_in_its_folder_and_file(run: Path) -> None:
    before = (run / "metrics.csv").read_text()
    assert main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2"]) == 0
    assert checkpoint_of(run)["epoch"] == 1
    assert (run / "metrics.csv").read_text().startswith(before)
    assert len((run / "metrics.csv").read_text()) > len(before)
    assert not Path("runs/tiny-2").exists()


def test_last_resumes_the_newest_run_or_starts_the_first(here: Path) -> None:
    words = ["fit", "--config", "tiny.yaml", "--ckpt_path", "last", "--trainer.max_epochs"]
    assert main([*words, "1"]) == 0
    assert main([*words, "2"]) == 0
    assert checkpoint_of(here / "runs" / "tiny")["epoch"] == 1
    assert not (here / "runs" / "tiny-2").exists()


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--model.lora.r", "3"),
        ("--model.mode", "linear"),
        ("--model.lora.lora_alpha", "5"),
        ("--model.adapter_name", "x"),
    ],
)
def test_a_resumed_run_with_another_structure_is_refused(flag: str, value: str, run: Path, errors: Errors) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert main(["fit", "--ckpt_path", str(run), flag, value, "--trainer.max_epochs", "2"]) == 2
    text = "\n".join(errors())
    assert flag.removeprefix("--model.") in text
    assert "in the checkpoint" in text
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("flag", ["--data.split_seed", "--data.shots"])
def test_a_resumed_run_with_another_division_is_refused(flag: str, run: Path, errors: Errors) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert main(["fit", "--ckpt_path", str(run), flag, "5", "--trainer.max_epochs", "2"]) == 2
    text = "\n".join(errors())
    assert flag.removeprefix("--") in text
    assert "in the checkpoint, 5 now" in text
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_the_images_of_a_run_are_divided_as_in_the_run(run: Path, errors: Errors) -> None:
    recorded = config_of(run)
    recorded["data"]["split_seed"] = 3
    (run / "config.yaml").write_text(yaml.safe_dump(recorded))
    words = ["test", "--adapter", str(run / "adapter"), "--data.root"]
    assert main([*words, str(Path("data").resolve())]) == 0
    data = config_of(run, "config.test.yaml")["data"]
    assert (data["split_seed"], data["train_domains"]) == (3, ["night"]), "else it is tested on what it was trained on"
    assert main([*words, "data/night"]) == 0
    data = config_of(run, "config.test.yaml")["data"]
    assert (data["split_seed"], data["train_domains"]) == (0, None), "other images are divided as asked for"


def test_lora_settings_that_are_typed_are_those_trained(here: Path) -> None:
    config = yaml.safe_load(Path("tiny.yaml").read_text())
    del config["model"]["lora"]
    Path("plain.yaml").write_text(yaml.safe_dump(config))
    for words, rank in (
        ([], 32),
        (["--model.lora.r", "16"], 16),
        (["--model.lora.r", "16", "--model.recipe", "auto"], 32),
        (["--model.lora_plus=4"], 32),
    ):
        assert main(["fit", "--config", "plain.yaml", "--report", "false", "--run", f"r{len(words)}", *words]) == 0
        assert read_adapter(f"runs/r{len(words)}/adapter").record["plan"]["config"]["r"] == rank


def test_a_call_that_trains_nothing_says_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "1"]) == 0
    assert "nothing was trained: 1 epochs are done and max_epochs is 1" in capsys.readouterr().err


def test_another_folder_is_asked_for_by_its_own_flag(here: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--trainer.default_root_dir", "mine"]) == 2
    assert "--output FOLDER" in "\n".join(errors())


def test_settings_lightning_cannot_run_are_a_message(here: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--trainer.enable_checkpointing", "false"]) == 2
    assert "enable_checkpointing" in "\n".join(errors())


def test_a_checkpoint_is_tested_with_its_own_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--ckpt_path", str(run)]) == 0
    assert "test/target" in capsys.readouterr().out
    config = config_of(run, "config.test.yaml")
    assert config["model"]["lora"]["r"] == 2
    assert config["data"]["root"] == "data"


def test_a_checkpoint_is_not_tested_with_other_settings(run: Path, errors: Errors) -> None:
    assert main(["test", "--ckpt_path", str(run), "--model.lora.r", "3"]) == 2
    assert "lora.r: 2 in the checkpoint, 3 now" in "\n".join(errors())


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_a_checkpoint_is_refused_on_another_base(verb: str, run: Path, errors: Errors) -> None:
    save_file(timm.create_model("test_resnet", num_classes=2).state_dict(), "other.safetensors")
    assert main([verb, "--ckpt_path", str(run), "--model.checkpoint", "other.safetensors"]) == 2
    assert "base weights: fingerprint" in "\n".join(errors())


def test_averaged_weights_do_not_bring_the_base_into_the_checkpoint(here: Path) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--model.ema_decay", "0.9"]) == 0
    run = Path("runs/tiny")
    assert (run / "last.ckpt").stat().st_size < 0.2 * Path("base.safetensors").stat().st_size
    assert main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2"]) == 0
    assert checkpoint_of(run)["epoch"] == 1


@pytest.mark.parametrize("given", ["none.ckpt", "best", "data"])
def test_a_checkpoint_that_is_none_is_named(given: str, here: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--ckpt_path", given]) == 2
    assert len(errors()) == 1


def test_the_optimizer_is_not_to_be_replaced(here: Path, errors: Errors) -> None:
    for flag in ("--optimizer", "--lr_scheduler"):
        assert main(["fit", "--config", "tiny.yaml", flag, "SGD"]) == 2
        assert f"there is no setting {flag[2:]}" in errors()[0]


def test_only_what_is_trainable_is_optimised_and_it_moves(trained: Path) -> None:
    groups = checkpoint_of(trained)["optimizer_states"][0]["param_groups"]
    assert {group["name"].split()[0] for group in groups} == {"A", "B", "head"}
    tensors = read_adapter(trained / "adapter").tensors
    assert all(t.abs().sum() > 0 for key, t in tensors.items() if key.endswith("/B"))


# the config file of a stage


def test_a_later_test_leaves_the_config_of_fit_alone(run: Path) -> None:
    before = (run / "config.yaml").read_text()
    assert main(["test", "--ckpt_path", str(run)]) == 0
    assert (run / "config.yaml").read_text() == before
    assert "verbose" in config_of(run, "config.test.yaml")


def test_a_later_test_leaves_the_metrics_of_fit_alone_and_writes_its_own(run: Path) -> None:
    before = (run / "metrics.csv").read_text()
    assert main(["test", "--ckpt_path", str(run)]) == 0
    assert (run / "metrics.csv").read_text() == before
    results = json.loads((run / "test.json").read_text())
    assert set(results) == {"test/target", "test/source"}
    assert results["test/source"]["images"] == 24


# errors


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--data.roo", "x"], 'did you mean "data.root"?'),
        (["--model.model_nam=x"], 'did you mean "model.model_name"?'),
        (["--model.lora.rr", "3"], 'did you mean "model.lora.r"?'),
        (["--lr", "0.1"], 'did you mean "model.lr"?'),
        (["--trainer.max_epoch", "3"], 'did you mean "trainer.max_epochs"?'),
        (["--model.mode", "lorra"], 'did you mean "lora"?'),
        (["--model.lora.variant=doraa"], 'did you mean "dora"?'),
        (["--model.lr", "fast"], "model.lr"),
        (["--model.num_classes", "3"], "num_classes"),
        (["--model.model_name", "test_resnt"], 'did you mean "test_resnet"?'),
        (["--data.root", "dat"], 'did you mean "data"?'),
        (["--data.train_domains", "[nigth]"], 'did you mean "night"?'),
        (["--model.lora.r", "0"], "r must be a whole number"),
        (["--model.lora.target_modules", "[layer1.0.convv1]"], "layer1.0.conv1"),
        (["--scenes.size", "32", "--data.root", "null"], "data.root"),
    ],
)
def test_a_wrong_word_gets_two_lines_and_the_right_one(words: list[str], hint: str, here: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "tiny.yaml", *words]) == 2
    lines = errors()
    assert hint in "\n".join(lines)
    assert len(lines) <= 2
    assert not list(here.glob("runs/*"))


def test_a_wrong_word_leads_to_the_help_of_its_verb(here: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--data.roo", "x"]) == 2
    assert errors()[1] == "visionlora fit --help shows the options"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("model: {modell_name: x}", 'did you mean "model.model_name"?'),
        ("model: {lora: {rank: 3}}", "lora"),
        ("date: {root: x}", 'did you mean "data.root"?'),
        ("[1, 2]", "expected settings"),
        ("model: {", "not YAML"),
    ],
)
def test_a_wrong_config_gets_two_lines(text: str, hint: str, here: Path, errors: Errors) -> None:
    (here / "wrong.yaml").write_text(text)
    assert main(["fit", "--config", "tiny.yaml", "--config", "wrong.yaml"]) == 2
    lines = errors()
    assert hint in "\n".join(lines)
    assert len(lines) <= 2


def test_an_unknown_config_is_named_with_the_shipped_ones(here: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "quickstrat"]) == 2
    assert 'did you mean "quickstart"?' in errors()[0]


def test_a_config_needs_a_value(here: Path, errors: Errors) -> None:
    assert main(["fit", "--config"]) == 2
    assert "--config needs a value" in errors()[0]


def test_a_loss_that_is_not_finite_ends_with_3_and_keeps_the_last_good_adapter(
    run: Path, errors: Errors, caplog: pytest.LogCaptureFixture
) -> None:
    good, last = contents(run / "adapter"), (run / "last.ckpt").read_bytes()
    words = ["--model.lr", "1e30", "--trainer.max_epochs", "4", "--model.warmup", "0"]
    assert main(["fit", "--ckpt_path", str(run), *words]) == 3
    assert "stopped at step 4, epoch 1; kept from before: runs/tiny/adapter, runs/tiny/last.ckpt" in caplog.text
    assert "nan" in errors()[0].lower()
    assert contents(run / "adapter") == good
    assert (run / "last.ckpt").read_bytes() == last


def test_an_image_that_cannot_be_read_stops_the_run_by_its_name(run: Path, errors: Errors) -> None:
    good = contents(run / "adapter")
    own_images(run, broken="data/night/cat/3.png")
    assert main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2"]) == 2
    assert "data/night/cat/3.png: the file is empty" in errors()[0]
    assert contents(run / "adapter") == good


def test_images_that_cannot_be_read_may_be_skipped_and_are_counted(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_images(run, broken="data/night/cat/3.png")
    skip = ["--data.on_error", "skip"]
    assert main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2", *skip]) == 0
    assert "1 of " in capsys.readouterr().err
    source = ["--source", "data/night/cat", "--out", "cats"]
    assert main(["predict", "--adapter", str(run / "adapter"), *source, *skip]) == 0
    paths = [row["path"] for row in csv.DictReader(Path("cats.csv").read_text().splitlines())]
    assert sorted(paths) == sorted(f"data/night/cat/{i}.png" for i in range(12) if i != 3)


def test_a_full_disk_ends_the_run_with_1_and_keeps_what_was(run: Path, errors: Errors) -> None:
    before = {**contents(run / "adapter"), **contents(run)}
    with no_file_above((run / "last.ckpt").stat().st_size // 2):
        assert main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2"]) == 1
    assert "cannot write runs/tiny/last.ckpt" in errors()[0]
    after = {**contents(run / "adapter"), **contents(run)}
    assert all(after[name] == before[name] for name in ("last.ckpt", "adapter_model.safetensors"))


def test_a_cut_checkpoint_goes_on_from_the_one_before(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2"]) == 0
    whole = (run / "last.ckpt").read_bytes()
    (run / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    good = (run / "previous.ckpt").read_bytes()
    capsys.readouterr()
    again = ["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "2"]
    with no_file_above(len(whole) // 2):
        assert main(again) == 1
    assert (run / "previous.ckpt").read_bytes() == good, "the cut file took the place of the good one"
    assert main(again) == 0
    assert "previous.ckpt" in capsys.readouterr().err
    assert checkpoint_of(run)["global_step"] == 4


# adapters


def test_an_adapter_is_measured_on_the_images_of_its_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["test", "--adapter", str(run / "adapter")]) == 0
    assert "test/source" in capsys.readouterr().out
    by_adapter = json.loads((run / "test.json").read_text())
    assert main(["test", "--ckpt_path", str(run)]) == 0
    by_checkpoint = json.loads((run / "test.json").read_text())  # one epoch: last and best are the same
    assert by_adapter["test/target"]["confusion"] == by_checkpoint["test/target"]["confusion"]
    assert by_adapter["test/target"]["loss"] == pytest.approx(by_checkpoint["test/target"]["loss"], abs=1e-5)


def test_an_adapter_is_measured_on_other_images(here: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained / "adapter", here / "shipped")
    base, data = ["--model.checkpoint", "base.safetensors"], ["--data.root", "data", "--data.train_domains", "[day]"]
    assert main(["validate", "--adapter", "shipped", *base, *data, "--trainer.accelerator", "cpu"]) == 0
    assert "val " in capsys.readouterr().out
    assert not list(here.glob("runs/*"))
    assert not list(here.glob("*.json"))


def test_an_adapter_does_not_go_with_fit_or_a_checkpoint(run: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--adapter", str(run / "adapter")]) == 2
    assert "--adapter does not go with fit" in errors()[0]
    assert main(["test", "--ckpt_path", str(run), "--adapter", str(run / "adapter")]) == 2
    assert "--adapter does not go with --ckpt_path" in errors()[0]


def test_the_log_shows_no_advertising_and_no_noise(
    trained: Path, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    shown = capsys.readouterr()
    text = shown.out + shown.err
    assert not [word for word in ("Tip:", "litlogger", "TPU", "weights_only", "LeafSpec", "v_num") if word in text]
    assert "2 classes" in text


def test_predict_writes_csv_and_jsonl(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "--adapter", str(run / "adapter"), "--source", "data/day", "--out", "out/day", "--top", "1"]
    assert main(words) == 0
    assert "24 images" in capsys.readouterr().out
    rows = list(csv.DictReader(Path("out/day.csv").read_text().splitlines()))
    lines = [json.loads(line) for line in Path("out/day.jsonl").read_text().splitlines()]
    assert [row["path"] for row in rows] == sorted(str(path) for path in Path("data/day").glob("*/*.png"))
    assert [row["label"] for row in rows] == [line["label"] for line in lines]
    assert {row["label"] for row in rows} <= {"cat", "dog"}


def test_predict_speaks_of_predictions_only(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = next(Path("data/day").glob("*/*.png"))
    assert main(["predict", "--adapter", str(run / "adapter"), "--source", str(source)]) == 0
    shown = capsys.readouterr()
    assert shown.out == "1 image: predictions.csv, predictions.jsonl\n"
    assert not [line for line in shown.err.splitlines() if "head" in line or "training" in line]


def test_predict_with_an_adapter_and_with_its_checkpoint_agree(run: Path) -> None:
    source = ["--source", "data/night/cat/*.png", "--out"]
    assert main(["predict", "--adapter", str(run / "adapter"), *source, "by_adapter"]) == 0
    assert main(["predict", "--ckpt_path", str(run), *source, "by_checkpoint"]) == 0
    first, second = (Path(f"by_{name}.jsonl").read_text().splitlines() for name in ("adapter", "checkpoint"))
    for a, b in zip(first, second, strict=True):
        assert json.loads(a)["probability"] == pytest.approx(json.loads(b)["probability"], abs=1e-5)


@pytest.mark.parametrize("source", [["--source", "dat"], ["--source", "data/*.gif"], []])
def test_predict_without_images_is_misuse(source: list[str], run: Path, errors: Errors) -> None:
    assert main(["predict", "--adapter", str(run / "adapter"), *source]) == 2
    (message,) = errors()
    assert "no image found" in message or "did you mean" in message or "--source" in message
    assert not Path("predictions.csv").exists()


def test_a_failed_prediction_leaves_what_was_there(run: Path, errors: Errors) -> None:
    words = ["predict", "--adapter", str(run / "adapter"), "--out", "p", "--source"]
    assert main([*words, "data/day"]) == 0
    before = [Path(f"p.{kind}").read_bytes() for kind in ("csv", "jsonl")]
    Path("bad").mkdir()
    shutil.copy(next(Path("data/day").glob("*/*.png")), "bad/1.png")
    Path("bad/2.png").write_bytes(b"no image")
    assert main([*words, "bad"]) == 2
    assert "2.png" in "\n".join(errors())
    assert [Path(f"p.{kind}").read_bytes() for kind in ("csv", "jsonl")] == before
    assert not list(Path().glob(".*vltmp"))


# the end of a run


def test_fit_ends_with_the_closing_table_and_the_pictures(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "tiny.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "target" in shown
    assert "source" in shown
    assert "the base, bit for bit" in shown
    names = {path.name for path in Path("runs/tiny").iterdir()}
    assert names >= {"summary.json", "confusion_matrix.png", "samples.png"}


def test_scenes_are_drawn_into_the_data_folder(here: Path) -> None:
    scenes = "{domains: [day, night], per_class: 5, size: 32}"
    words = [
        "--scenes",
        scenes,
        "--data.root",
        "drawn",
        "--data.train_domains",
        "[night]",
        "--data.source_domains",
        "[day]",
    ]
    assert main(["fit", "--config", "tiny.yaml", *words, "--data.val_fraction", "0.2"]) == 0
    assert len(list(Path("drawn").glob("*/*/*.jpg"))) == 2 * 8 * 5
    assert len(read_adapter("runs/tiny/adapter").record["classes"]) == 8
    assert config_of(Path("runs/tiny"))["scenes"]["per_class"] == 5


@pytest.mark.parametrize("verb", ["fit", "validate", "test", "predict"])
def test_help_is_about_our_settings(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: visionlora {verb} ")
    assert "--model.lora.r " in shown
    assert "--trainer.barebones" not in shown
    assert "flags win" in shown


def test_print_config_shows_every_setting(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--print_config"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["trainer"]["barebones"] is False
    assert shown["model"]["lora"]["r"] == 2


# signals


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_with_its_code(number: signal.Signals, code: int, here: Path) -> None:
    words = [sys.executable, "-m", "visionlora", "fit", "--config", "tiny.yaml", "--trainer.max_epochs", "100000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=env) as process:
        deadline = time.monotonic() + 240
        while not Path("runs/tiny/last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "go on from runs/tiny/last.ckpt" in err
    assert "Traceback" not in err
    assert checkpoint_of(Path("runs/tiny"))["global_step"] > 0


def test_a_run_with_frozen_A_says_what_that_can_cost(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--model.memory", "lean", "--model.grad_checkpointing", "true"]) == 0
    told = capsys.readouterr()
    for text in (told.err, told.out):
        assert "A stays at its random start (memory lean)" in text
    assert read_adapter("runs/tiny/adapter").record["plan"]["config"]["variant"] == "fa"
