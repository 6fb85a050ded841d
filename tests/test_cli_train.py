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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml
from cli_place import LAYERS, Errors, checkpoint_of, config_of
from safetensors.torch import load_file

from visionlora.cli import main
from visionlora.io import read_adapter


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
    words = ["fit", "--config", "tiny.yaml", "--run", "cam12", "--output", "out"]
    assert main([*words, "--trainer.fast_dev_run", "true"]) == 0
    assert not (here / "out").exists(), "a trial keeps nothing"
    assert main([*words, "--report", "false"]) == 0
    assert (here / "out" / "cam12" / "adapter").is_dir()


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


# faults


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
    assert "data/night/cat/3.png: the file is empty (0 bytes)" in (message := errors()[0])
    assert "on_error skip leaves such images out, visionlora doctor lists them" in message
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


@pytest.mark.parametrize("source", [["--source", "dat"], ["--source", "data/*.gif"], ["--source", ""], []])
def test_predict_without_images_is_misuse(source: list[str], run: Path, errors: Errors) -> None:
    assert main(["predict", "--adapter", str(run / "adapter"), *source]) == 2
    (message,) = errors()
    assert any(told in message for told in ("no image found", "did you mean", "--source", "got an empty text"))
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
    assert "go on with visionlora fit --ckpt_path runs/tiny/last.ckpt" in err
    assert "Traceback" not in err
    assert checkpoint_of(Path("runs/tiny"))["global_step"] > 0


def test_a_run_with_frozen_A_says_what_that_can_cost(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--model.memory", "lean", "--model.grad_checkpointing", "true"]) == 0
    told = capsys.readouterr()
    for text in (told.err, told.out):
        assert "A stays at its random start (memory lean)" in text
    assert read_adapter("runs/tiny/adapter").record["plan"]["config"]["variant"] == "fa"
