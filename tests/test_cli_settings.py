"""What the user types wins or is refused, and what is refused is told in words: settings of the training verbs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from cli_place import Errors, checkpoint_of, config_of
from safetensors.torch import save_file

from visionlora.cli import main
from visionlora.io import read_adapter


def test_a_flag_wins_over_a_config_that_comes_after_it(here: Path) -> None:
    assert main(["fit", "--model.lr", "0.5", "--trainer.max_epochs", "2", "--config", "tiny.yaml"]) == 0
    config = config_of(here / "runs" / "tiny")
    assert (config["model"]["lr"], config["trainer"]["max_epochs"]) == (0.5, 2)


def test_a_resumed_run_trains_with_the_rate_that_is_typed(run: Path) -> None:
    assert main(["fit", "--ckpt_path", str(run / "last.ckpt"), "--model.lr", "0.5", "--trainer.max_epochs", "2"]) == 0
    group = checkpoint_of(run)["optimizer_states"][0]["param_groups"][0]
    assert group["initial_lr"] == 0.5
    assert checkpoint_of(run)["hyper_parameters"]["lr"] == 0.5


def test_a_resumed_run_trains_with_what_its_first_call_said(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--seed_everything", "7", "--trainer.max_epochs", "2", "--trainer.accumulate_grad_batches", "2"]
    assert main(["fit", "--config", "tiny.yaml", "--checkpoint.monitor", "val/loss", "--report", "false", *words]) == 0
    run, first = Path("runs/tiny"), config_of(Path("runs/tiny"))
    assert main(["fit", "--ckpt_path", "runs/tiny"]) == 0
    assert "2 epochs are done and max_epochs is 2" in capsys.readouterr().err
    assert main(["fit", "--ckpt_path", "runs/tiny", "--trainer.max_epochs", "3"]) == 0
    again = config_of(run)
    assert again["trainer"].pop("max_epochs") == 3
    assert first["trainer"].pop("max_epochs") == 2
    assert {key: again[key] for key in ("seed_everything", "trainer", "checkpoint", "report")} == {
        key: first[key] for key in ("seed_everything", "trainer", "checkpoint", "report")
    }


def test_what_changed_since_the_checkpoint_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--trainer.max_epochs", "2", "--data.batch_size", "4", "--model.weight_decay", "0.5"]
    assert main(["fit", "--ckpt_path", str(run), *words]) == 0
    told = capsys.readouterr().err
    assert "changed since the checkpoint: data.batch_size: 8 in the checkpoint, 4 now" in told
    assert "changed since the checkpoint: weight_decay: 0.01 in the checkpoint, 0.5 now" in told
    assert told.count("changed since the checkpoint") == 2
    assert "changed since the run's last call: trainer.max_epochs: 1 then, 2 now" in told


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
    assert (data["split_seed"], data["train_domains"]) == (3, None), "these images have no domains"
    shutil.copytree(Path("data").resolve(), "moved")
    assert main([*words, "moved"]) == 0
    data = config_of(run, "config.test.yaml")["data"]
    assert (data["root"], data["split_seed"], data["train_domains"]) == ("moved", 3, ["night"])
    weights = str(run / "adapter" / "adapter_model.safetensors")
    assert main(["test", "--adapter", weights]) == 0
    assert config_of(run, "config.test.yaml")["data"]["split_seed"] == 3, "the file lies in the run as well"


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


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--trainer.accumulate_grad_batches", "0"], "trainer.accumulate_grad_batches must be at least 1"),
        (["--trainer.gradient_clip_val", "-1"], "trainer.gradient_clip_val must be at least 0"),
        (["--trainer.strategy", "foo"], "invalid strategy name"),
        (["--trainer.accelerator", "gppu"], "Available names are"),
        (["--trainer.max_epochs", "-5"], "max_epochs"),
        (["--seed_everything", "-1"], "seed_everything must be a whole number from 0"),
    ],
)
def test_settings_that_cannot_run_are_told_before_a_run_has_a_folder(
    words: list[str], hint: str, here: Path, errors: Errors
) -> None:
    assert main(["fit", "--config", "tiny.yaml", *words]) == 2
    assert hint in "\n".join(errors())
    assert not Path("runs").exists()


@pytest.mark.parametrize("flag", ["--model.model_name=test_vit", "--model.mode=full", "--model.lora.r=4"])
def test_an_adapter_is_not_measured_as_what_it_is_not(flag: str, run: Path, errors: Errors) -> None:
    assert main(["test", "--adapter", str(run / "adapter"), flag]) == 2
    assert flag.split(".")[1].partition("=")[0] in errors()[0]
    assert main(["test", "--adapter", str(run / "adapter"), "--model.model_name", "test_resnet"]) == 0


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_what_has_learned_nothing_is_not_measured(verb: str, run: Path, errors: Errors) -> None:
    words = ["--source", "data/day"] if verb == "predict" else []
    fresh = ["--model.checkpoint", "null", "--model.pretrained", "false"]
    assert main([verb, "--config", "tiny.yaml", *fresh, *words]) == 2
    assert f"the weights are random, there is nothing to {verb}: give --adapter DIRECTORY" in errors()[0]
    torch.manual_seed(0)
    save_file(timm.create_model("test_resnet", num_classes=5).state_dict(), "five.safetensors")
    assert main([verb, "--config", "tiny.yaml", "--model.checkpoint", "five.safetensors", *words]) == 2
    assert "no head for these classes" in (message := errors()[0])
    assert "--adapter DIRECTORY, such as runs/tiny/adapter" in message
    assert main([verb, "--config", "tiny.yaml", *words]) == 0, "this base knows the classes"


def test_a_config_does_not_change_what_an_adapter_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["test", "--adapter", str(run / "adapter")]
    assert main(words) == 0
    table = capsys.readouterr().out
    given = config_of(run)
    given["model"] |= {"mode": "full", "pretrained": True, "checkpoint": "base.safetensors", "quantize": "int8"}
    Path("full.yaml").write_text(yaml.safe_dump(given))
    assert main([*words, "--config", str(run / "config.yaml")]) == 0
    assert capsys.readouterr().out == table
    assert main([*words, "--config", "full.yaml"]) == 0
    assert capsys.readouterr().out == table


def test_a_wrong_adapter_is_refused_before_scenes_are_drawn(here: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "quickstart", "--data.root", "drawn", "--model.lora.r", "0"]) == 2
    assert "r must be a whole number" in errors()[0]
    assert not Path("drawn").exists()


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "levit_128s"])
def test_images_of_a_size_the_backbone_is_not_built_for(name: str, here: Path, errors: Errors) -> None:
    model = ["--model.model_name", name, "--model.checkpoint", "null", "--model.pretrained", "false"]
    lora = ["--model.lora.target_modules", "auto"]
    assert main(["fit", "--config", "tiny.yaml", *model, *lora, "--data.image_size", "96"]) == 2
    assert "the model does not take the images of training batch 0, (8, 3, 96, 96)" in (message := errors()[0])
    assert "model.model_args.img_size" in message


def test_a_metric_that_is_not_logged_is_a_message(here: Path, errors: Errors) -> None:
    words = ["--trainer.callbacks", "EarlyStopping", "--trainer.callbacks.monitor", "val/ac"]
    assert main(["fit", "--config", "tiny.yaml", "--report", "false", *words]) == 2
    assert "`val/acc`" in errors()[0]


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
        (["--model.lr", "fast"], "model.lr: expected a number or null, got fast"),
        (["--data.batch_size", "x"], "data.batch_size: expected a whole number, got x"),
        (["--trainer.precision", "bf16mixed"], 'null, got bf16mixed; did you mean "bf16-mixed"?'),
        (["--run.name", "x"], "there is no setting run.name"),
        (["--model.num_classes", "3"], "num_classes"),
        (["--model.model_name", "test_resnt"], 'did you mean "test_resnet"?'),
        (["--data.root", "dat"], 'did you mean "data"?'),
        (["--data.train_domains", "[nigth]"], 'did you mean "night"?'),
        (["--model.lora.r", "0"], "r must be a whole number"),
        (["--model.lora.target_modules", "[layer1.0.convv1]"], "layer1.0.conv1"),
        (["--scenes.size", "32", "--data.root", "null"], "data.root"),
        (["--data.val_fraction", "1.5"], "val_fraction must be at least 0 and below 1, got 1.5"),
        (["--data.val_fraction", "0.6", "--data.test_fraction", "0.4"], "leave nothing to train on"),
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


def test_a_config_of_bytes_is_a_message(here: Path, errors: Errors) -> None:
    Path("bytes.yaml").write_bytes(b"\x7fELF\xff\x00")
    assert main(["fit", "--config", "bytes.yaml"]) == 2
    assert "no text (UTF-8)" in errors()[0]


def test_a_run_needs_a_model(here: Path, errors: Errors) -> None:
    assert main(["fit", "--data.root", "data"]) == 2
    assert "no model: give --model.model_name NAME" in errors()[0]


def test_an_unknown_config_is_named_with_the_shipped_ones(here: Path, errors: Errors) -> None:
    assert main(["fit", "--config", "quickstrat"]) == 2
    assert 'did you mean "quickstart"?' in errors()[0]


def test_a_config_needs_a_value(here: Path, errors: Errors) -> None:
    assert main(["fit", "--config"]) == 2
    assert "--config needs a value" in errors()[0]
