"""What a tired engineer does to the training verbs: nothing is passed over, nothing of theirs is overwritten."""

from __future__ import annotations

import json
import logging
import shutil
import stat
from pathlib import Path

import pytest
import torch
import yaml
from cli_place import Errors, config_of

import visionlora as vl
from visionlora.cli import main
from visionlora.io import read_adapter

SHORT = ["fit", "--config", "tiny.yaml", "--report", "false"]


def test_the_best_of_a_loss_is_its_lowest(here: Path) -> None:
    words = ["--model.lr", "1.0", "--model.warmup", "0", "--trainer.max_epochs", "4", "--data.val_fraction", "0.4"]
    assert main([*SHORT, "--checkpoint.monitor", "val/loss", *words]) == 0
    rows = [line.split(",") for line in Path("runs/tiny/metrics.csv").read_text().splitlines()]
    column = rows[0].index("val/loss")
    seen = [float(row[column]) for row in rows[1:] if row[column]]
    assert len(set(seen)) > 1, "else every epoch is the best"
    kept = read_adapter("runs/tiny/adapter").record["metrics"]["val/loss"]
    assert kept == pytest.approx(min(seen), abs=1e-6)


def test_a_direction_that_contradicts_the_metric_is_refused(here: Path, errors: Errors) -> None:
    assert main([*SHORT, "--checkpoint.mode", "min"]) == 2
    assert "the best val/acc is its max, not its min" in errors()[0]


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_an_adapter_of_a_run_in_another_type_loads(precision: str, here: Path) -> None:
    assert main(["fit", "--config", "tiny.yaml", "--trainer.precision", precision]) == 0
    assert main(["test", "--adapter", "runs/tiny/adapter"]) == 0
    assert main(["merge", "runs/tiny/adapter", "merged.safetensors"]) == 0
    net = vl.load_model("runs/tiny/adapter", checkpoint="base.safetensors")
    assert next(net.parameters()).dtype == torch.float32


def test_a_run_without_validation_leaves_the_adapter_of_its_last_step(here: Path) -> None:
    assert main([*SHORT, "--data.val_fraction", "0", "--trainer.limit_val_batches", "0"]) == 0
    assert read_adapter("runs/tiny/adapter").record["classes"] == ["cat", "dog"]


def test_a_model_trained_in_full_is_measured_by_its_folder(here: Path, errors: Errors) -> None:
    assert main([*SHORT, "--model.mode", "full"]) == 0
    assert main(["test", "--adapter", "runs/tiny/adapter"]) == 0
    assert main(["predict", "--adapter", "runs/tiny/adapter", "--source", "data/day"]) == 0
    assert main(["info", "runs/tiny/adapter"]) == 2
    assert "timm.create_model(..., checkpoint_path='runs/tiny/adapter/model.safetensors')" in errors()[0]


def test_predictions_do_not_replace_files_of_the_user(run: Path, errors: Errors) -> None:
    Path("labels.csv").write_text("path,label\na.png,cat\n")
    words = ["predict", "--adapter", str(run / "adapter"), "--source", "data/day", "--out"]
    for name in ("labels", "labels.csv"):
        assert main([*words, name]) == 2
        assert "labels.csv exists and holds no predictions" in errors()[0]
    assert Path("labels.csv").read_text() == "path,label\na.png,cat\n"
    assert main([*words, "found.csv"]) == 0
    assert main([*words, "found.csv"]) == 0, "their own are"
    assert sorted(path.name for path in Path().glob("found*")) == ["found.csv", "found.jsonl"]


def test_unreadable_images_may_fill_a_batch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(Path("data/day").resolve(), "broken")
    for i in range(12):
        Path(f"broken/cat/{i}.png").write_bytes(b"")
    words = ["--adapter", str(run / "adapter"), "--data.on_error", "skip", "--data.batch_size", "4"]
    assert main(["predict", *words, "--source", "broken"]) == 0
    assert "12 images: predictions.csv" in capsys.readouterr().out
    Path("data").unlink()
    shutil.move("broken", "data/day")
    assert main(["test", *words, "--data.root", "data", "--data.train_domains", "null"]) == 2, "a class is gone"


@pytest.mark.parametrize("verb", ["fit", "test"])
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_worker_says_it_in_one_line(verb: str, run: Path, errors: Errors) -> None:
    shutil.copytree(Path("data").resolve(), "own")
    for path in Path("own").glob("night/*/*.png"):
        path.write_bytes(path.read_bytes()[:60])
    words = ["--config", "tiny.yaml"] if verb == "fit" else ["--adapter", str(run / "adapter")]
    assert main([verb, *words, "--data.root", "own", "--data.num_workers", "1"]) == 2
    (line,) = errors()
    assert line.startswith("visionlora: own/night/")
    assert "on_error skip leaves such images out" in line


def test_a_section_that_stands_twice_is_refused(here: Path, errors: Errors) -> None:
    text = Path("tiny.yaml").read_text()
    Path("twice.yaml").write_text(text + "data:\n  augment: none\n")
    assert main(["fit", "--config", "twice.yaml"]) == 2
    assert "data stands twice" in errors()[0]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--data.mean", "[123, 116, 103]"], "mean is of channels in 0..1, got [123.0, 116.0, 103.0]: divide by 255"),
        (["--data.in_chans", "1"], "model.model_args.in_chans 1"),
        (["--model.model_args.num_classes", "7"], "model_args cannot have num_classes"),
        (["--model.num_classes", "7"], "counted in the data"),
        (["--trainer.val_check_interval", "100"], "val_check_interval"),
        (["--trainer.strategy", "ddp_spawn"], "take ddp"),
        (["--checkpoint.directory", "elsewhere"], "--output FOLDER"),
        (["--data.train_domains", "night"], "write [night]"),
        (["--data.csv", "data", "--data.root", "null"], "data is a folder, expected a CSV file"),
        (["data"], "data are given by --data.root data"),
    ],
)
def test_what_cannot_be_is_told(words: list[str], told: str, here: Path, errors: Errors) -> None:
    assert main([*SHORT, *words]) == 2
    assert told in "\n".join(errors())


def test_files_that_are_no_weights_of_a_base_are_told(run: Path, errors: Errors) -> None:
    words = [*SHORT, "--model.checkpoint"]
    assert main([*words, str(run / "adapter" / "adapter_model.safetensors")]) == 2
    assert "is an adapter, expected the weights of a base" in errors()[0]
    assert main([*words, str(run / "last.ckpt")]) == 2
    assert "is the state of a training" in errors()[0]


def test_a_run_that_is_done_says_what_to_give(run: Path, errors: Errors) -> None:
    assert main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "3"]) == 0
    last = (run / "last.ckpt").read_bytes()
    assert main(["fit", "--ckpt_path", str(run), "--trainer.max_epochs", "1"]) == 2
    assert "max_epochs 1 lies before the checkpoint, which is of epoch 3: give more to go on" in errors()[0]
    assert (run / "last.ckpt").read_bytes() == last


def test_last_needs_to_know_of_what(here: Path, errors: Errors) -> None:
    assert main(["fit", "--ckpt_path", "last"]) == 2
    assert "newest run of a --config or of a --run" in errors()[0]


def test_data_that_are_not_where_they_were_are_asked_for(
    run: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, errors: Errors
) -> None:
    place = run.resolve()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    assert main(["test", "--adapter", str(place / "adapter")]) == 2
    assert f"data, the data of {place / 'config.yaml'}, is not here: give its place, --data.root PATH" in errors()[0]


def test_an_adapter_outside_a_run_says_what_is_not_known(
    run: Path, caplog: pytest.LogCaptureFixture, errors: Errors
) -> None:
    shutil.copytree(run / "adapter", "shipped")
    with caplog.at_level(logging.INFO, "visionlora"):
        words = ["--data.root", "data", "--model.checkpoint", "base.safetensors", "--data.test_domains", "[day]"]
        assert main(["test", "--adapter", "shipped", *words]) == 0
    assert "shipped lies in no run" in caplog.text


def test_others_may_read_what_is_written(run: Path) -> None:
    assert main(["merge", str(run / "adapter"), "merged.safetensors"]) == 0
    plain = Path("plain")
    plain.touch()
    modes = {stat.S_IMODE(Path(name).stat().st_mode) for name in ("merged.safetensors", str(plain))}
    assert len(modes) == 1


def test_a_resumed_run_tells_its_own_time(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ["--trainer.max_epochs", "3", "--checkpoint.every_n_steps", "1"]
    assert main([*SHORT, "--run", "steps", *words, "--trainer.max_steps", "3"]) == 0
    with caplog.at_level(logging.INFO, "visionlora"):
        more = ["--trainer.max_steps", "-1", "--trainer.enable_progress_bar", "true"]
        assert main(["fit", "--ckpt_path", "runs/steps", *more]) == 0
    seconds = [float(r.getMessage().split()[4]) for r in caplog.records if r.getMessage().startswith("epoch ")]
    assert seconds
    assert max(seconds) < 600
    assert config_of(Path("runs/steps"))["trainer"]["max_steps"] == -1


def test_a_base_that_is_random_is_told(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--model.checkpoint", "null", "--model.pretrained", "false"]) == 0
    assert "the base is random and lies in no file" in capsys.readouterr().err
    assert main([*SHORT]) == 0
    assert "the base is random" not in capsys.readouterr().err


def test_class_names_in_any_script(here: Path) -> None:
    shutil.copytree(Path("data").resolve(), "own")
    for domain in ("day", "night"):
        Path(f"own/{domain}/cat").rename(f"own/{domain}/車")
    assert main(["fit", "--config", "tiny.yaml", "--data.root", "own"]) == 0
    assert json.loads(Path("runs/tiny/summary.json").read_text())["classes"] == 2
    assert yaml.safe_load(Path("tiny.yaml").read_text())
