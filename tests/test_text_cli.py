"""The verbs work on text as on images: fit, go on, measure, predict, show, merge."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from text_toy import hub
from text_toy_data import rows

from visionlora.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
FAMILY = {
    "SEQ_CLS": "bert",
    "TOKEN_CLS": "distilbert",
    "QUESTION_ANS": "bert",
    "CAUSAL_LM": "gpt2",
    "SEQ_2_SEQ_LM": "t5",
}
SHORT = [
    "--model.max_new_tokens",
    "4",
    "--data.max_length",
    "40",
    "--data.max_target_length",
    "8",
    "--data.stride",
    "8",
]
FEW = [*SHORT, "--data.cache", "none", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


def write(path: Path, items: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def fit(here: Path, task: str = "SEQ_CLS", *flags: str, epochs: int = 1) -> int:
    if not (here / "base").exists():
        hub(here / "base", FAMILY[task])
    write(here / "train.jsonl", rows(task, 60))
    words = ["--model.model_name", "base", "--model.task_type", task, "--data.root", "train.jsonl", "--run", "run"]
    return main(["fit", *words, *FEW, "--trainer.max_epochs", str(epochs), *flags])


@pytest.mark.parametrize("task", FAMILY)
def test_every_task_is_trained_measured_and_predicted(
    task: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(here, task) == 0
    shown = capsys.readouterr().out
    assert "the base, bit for bit" in shown
    assert ("there are no scores before" in shown) == (task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"))
    after = json.loads(Path("runs/run/summary.json").read_text())["after"]["target"]["values"]
    assert main(["test", "--adapter", "runs/run/adapter", *FEW[-6:]]) == 0
    measured = json.loads(Path("runs/run/test.json").read_text())
    (found,) = measured.values()
    assert found["values"] == pytest.approx(after, abs=1e-5)
    source = write(here / "new.jsonl", [{**row, "number": at} for at, row in enumerate(rows(task, 5, 9))])
    assert main(["predict", "--adapter", "runs/run/adapter", "--source", source, "--out", "found", *FEW[-6:]]) == 0
    lines = [json.loads(line) for line in Path("found.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == [0, 1, 2, 3, 4]
    answer = {"SEQ_CLS": "label", "TOKEN_CLS": "tags", "QUESTION_ANS": "answer"}.get(task, "written")
    assert all(answer in line for line in lines)
    with Path("found.csv").open(newline="") as file:
        assert len([*csv.DictReader(file)]) == 5


@pytest.mark.parametrize(("task", "code"), [("SEQ_CLS", 2), ("CAUSAL_LM", 0)])
def test_what_has_no_head_is_not_measured(task: str, code: int, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub(here / "base", FAMILY[task])
    words = [
        "--model.model_name",
        "base",
        "--model.task_type",
        task,
        "--data.root",
        write(here / "t.jsonl", rows(task, 60)),
    ]
    assert main(["test", *words, *FEW]) == code
    told = "the model has no head for this task, there is nothing to test: give --adapter DIRECTORY"
    assert (told in capsys.readouterr().err) == (code == 2)


def test_predictions_are_those_of_the_model(here: Path) -> None:
    assert fit(here, "SEQ_CLS", epochs=2) == 0
    texts = [row["text"] for row in rows("SEQ_CLS", 6, 5)]
    source = write(here / "new.jsonl", [{"text": text} for text in texts])
    assert main(["predict", "--adapter", "runs/run/adapter", "--source", source, *FEW[-6:]]) == 0
    assert main(["merge", "runs/run/adapter", "merged", "--checkpoint", "base"]) == 0
    net = transformers.AutoModelForSequenceClassification.from_pretrained("merged").eval()
    tok = transformers.AutoTokenizer.from_pretrained("merged")
    with torch.no_grad():
        best, at = net(**tok(texts, return_tensors="pt", padding=True)).logits.softmax(-1).max(-1)
    for line, probability, number in zip(Path("predictions.jsonl").read_text().splitlines(), best, at, strict=True):
        found = json.loads(line)
        assert found["label"] == net.config.id2label[int(number)]
        assert found["probability"] == pytest.approx(float(probability), abs=1e-4)


def test_answers_do_not_replace_files_of_the_user(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(here, "SEQ_CLS") == 0
    source = write(here / "new.jsonl", rows("SEQ_CLS", 3, 5))
    words = ["predict", "--adapter", "runs/run/adapter", "--source", source, *FEW[-6:]]
    before = Path(source).read_bytes()
    assert main([*words, "--out", "new"]) == 2
    assert "new.jsonl exists and holds no answers" in capsys.readouterr().err
    assert Path(source).read_bytes() == before
    assert main([*words, "--out", "found.csv"]) == 0
    assert main([*words, "--out", "found.csv"]) == 0, "their own are"
    assert sorted(path.name for path in here.glob("found*")) == ["found.csv", "found.jsonl"]


@pytest.mark.parametrize("task", FAMILY)
def test_a_merged_model_loads_in_plain_transformers(task: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(here, task) == 0
    assert main(["merge", "runs/run/adapter", "merged", "--checkpoint", "base"]) == 0
    assert "outputs equal to" in capsys.readouterr().out
    assert main(["merge", "runs/run/adapter", "merged", "--checkpoint", "base"]) == 2
    assert "merged exists" in capsys.readouterr().err
    assert main(["merge", "runs/run/adapter", "merged", "--checkpoint", "base", "--force"]) == 0
    assert main(["merge", "runs/run/adapter", "m.safetensors", "--checkpoint", "base"]) == 2
    assert "is written to a folder" in capsys.readouterr().err
    assert not [path for path in here.iterdir() if path.name.startswith(".merging")]


def test_a_run_goes_on_where_it_stopped(here: Path) -> None:
    assert fit(here) == 0
    assert main(["fit", "--ckpt_path", "runs/run", "--trainer.max_epochs", "3", *FEW[-6:]]) == 0
    assert json.loads(Path("runs/run/summary.json").read_text())["epochs"] == 3
    assert main(["validate", "--ckpt_path", "runs/run", *FEW[-6:]]) == 0


def test_info_tells_task_and_tokenizer(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(here) == 0
    capsys.readouterr()
    assert main(["info", "runs/run/adapter"]) == 0
    shown = capsys.readouterr().out
    assert "BertForSequenceClassification" in shown
    assert "2: bad, good" in shown
    assert "SEQ_CLS, 40 tokens, tokenizer base" in shown


@pytest.mark.parametrize("mode", ["full", "linear", "norm"])
def test_the_other_modes(mode: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(here, "SEQ_CLS", "--model.mode", mode) == 0
    assert f"(mode {mode})" in capsys.readouterr().out
    assert main(["test", "--adapter", "runs/run/adapter", *FEW[-6:]]) == 0


def test_a_full_language_model_has_a_before(here: Path) -> None:
    assert fit(here, "CAUSAL_LM", "--model.mode", "full") == 0
    summary = json.loads(Path("runs/run/summary.json").read_text())
    assert summary["before"]["target"]["values"]["ppl"] > summary["after"]["target"]["values"]["ppl"]
    assert summary["base_unchanged"] is None


def test_the_best_adapter_is_chosen_by_the_metric_of_the_task(here: Path) -> None:
    assert fit(here, "CAUSAL_LM") == 0
    assert "monitor: auto" in Path("runs/run/config.yaml").read_text()
    assert fit(here, "CAUSAL_LM", "--checkpoint.monitor", "val/loss", "--checkpoint.mode", "min") == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.task_type", "SEQ_CLASS"], 'did you mean "SEQ_CLS"'),
        (["--data.rot", "train.jsonl"], 'there is no setting data.rot; did you mean "data.root"'),
        (["--data.root", "trian.jsonl"], "trian.jsonl does not exist"),
        (["--data.columns", '{"text": "txt"}'], "'txt'"),
        (["--data.max_length", "4000"], "max_length 4000 is more than the"),
        (["--model.model_name", "./nothing"], "./nothing"),
    ],
)
def test_mistakes_end_with_2_and_a_cure(
    flags: list[str], message: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit(here, "SEQ_CLS", *flags) == 2
    assert message in capsys.readouterr().err
    assert not Path("runs/run/last.ckpt").exists()


def test_an_adapter_of_another_tokenizer_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit(here) == 0
    hub(here / "other", "roberta")
    words = ["--adapter", "runs/run/adapter", "--model.model_name", "base", "--data.tokenizer", "other", *FEW[-6:]]
    assert main(["test", *words]) == 2
    assert "was trained with another tokenizer" in capsys.readouterr().err


def test_help_of_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--model.task_type", "SEQ_CLS", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--data.max_length" in shown
    assert "--data.augment" not in shown
