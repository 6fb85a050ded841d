"""The data module gives the batches each task needs, the same order for the same seed, and clear errors."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from text_toy import hub, sentences, tokenizer
from torch.utils.data import DataLoader, SequentialSampler

import visionlora
from visionlora.errors import ConfigError, DataError
from visionlora.text.datamodule import TextData

TEXTS = sorted({*sentences(60)})[:50]
CLASSES: list[dict[str, Any]] = [{"text": t, "label": ["bad", "good"][at % 2]} for at, t in enumerate(TEXTS)]
TAGS = [{"tokens": t.split(), "tags": ["B" if len(w) > 3 else "O" for w in t.split()]} for t in TEXTS]
ASKED = [
    {"question": "where", "context": f"{t} paris", "answers": {"text": ["paris"], "answer_start": [len(t) + 1]}}
    if at % 3
    else {"question": "where", "context": t, "answers": {"text": [], "answer_start": []}}
    for at, t in enumerate(TEXTS)
]
PROMPTS = [{"prompt": t, "response": t.split()[0]} for t in TEXTS]
PAIRS = [{"source": t, "target": t.split()[0]} for t in TEXTS]
DATA = {
    "SEQ_CLS": ("bert", CLASSES), "TOKEN_CLS": ("roberta", TAGS), "QUESTION_ANS": ("bert", ASKED),
    "CAUSAL_LM": ("gpt2", PROMPTS), "SEQ_2_SEQ_LM": ("t5", PAIRS),
}  # fmt: skip


def data(rows: Any = CLASSES, task: str = "SEQ_CLS", **options: Any) -> TextData:
    tok = options.pop("tokenizer", None) or tokenizer(DATA[task][0])
    return TextData.from_rows(
        rows, **{"task_type": task, "tokenizer": tok, "cache": "none", "batch_size": 4, **options}
    )


def ids(loader: DataLoader[Any], epoch: int = 0) -> list[list[int]]:
    if hasattr(loader.sampler, "set_epoch"):
        loader.sampler.set_epoch(epoch)
    return [batch["input_ids"][:, :6].flatten().tolist() for batch in loader]


@pytest.mark.parametrize("task", DATA)
def test_every_task_has_its_batches(task: str) -> None:
    module = data(DATA[task][1], task)
    wanted = {
        "SEQ_CLS": {"labels"}, "TOKEN_CLS": {"labels"}, "QUESTION_ANS": {"start_positions", "end_positions"},
        "CAUSAL_LM": {"labels"}, "SEQ_2_SEQ_LM": {"labels"},
    }[task]  # fmt: skip
    aside = {
        "SEQ_CLS": set(), "TOKEN_CLS": {"word_ids"}, "QUESTION_ANS": {"example_id", "offset_mapping"},
        "CAUSAL_LM": {"prompt_ids", "prompt_mask", "references"}, "SEQ_2_SEQ_LM": {"references"},
    }[task]  # fmt: skip
    for loader in (module.train_dataloader(), module.val_dataloader(), *module.test_dataloader()):
        assert isinstance(loader, DataLoader)
        batch = next(iter(loader))
        training = loader.dataset is module.train_dataloader().dataset
        assert set(batch) - {"token_type_ids"} == {"input_ids", "attention_mask"} | wanted | (
            set() if training else aside | {"rows"}
        )
        inputs = {k: v for k, v in batch.items() if isinstance(v, torch.Tensor) and not k.startswith("prompt")}
        assert {len(value) for value in inputs.values()} == {4}
        assert all(value.dtype == torch.int64 for value in inputs.values())


@pytest.mark.parametrize("task", DATA)
def test_rows_tell_which_example_a_feature_comes_of(task: str) -> None:
    module = data(DATA[task][1], task, max_length=20, max_target_length=8, stride=2)
    rows = module.examples["val"]
    tok = module.tokenizer
    for batch in module.val_dataloader():
        for at, row in enumerate(batch["rows"]):
            text = tok.decode(batch["input_ids"][at], skip_special_tokens=True)
            if task == "QUESTION_ANS":
                assert batch["example_id"][at] == rows[row]["id"]
                assert all(word in rows[row]["context"] for word in text.removeprefix("where").split())
            else:
                whole = rows[row].get("text") or rows[row].get("prompt") or rows[row].get("source") or " ".join(
                    rows[row].get("tokens", ()))  # fmt: skip
                assert text.split()[0] == whole.split()[0]


def test_labels_and_parts_are_known_before_a_loader_is_made() -> None:
    module = data()
    assert (module.label_names, module.num_labels, module.class_counts) == (["bad", "good"], 2, [18, 18])
    assert module.test_names == ["target"]
    assert set(module.examples) == {"val", "test", "test/target"}
    assert data(ASKED, "QUESTION_ANS").label_names is None
    assert (module.task_type, module.problem_type) == ("SEQ_CLS", "single_label_classification")


def test_the_record_is_plain_data() -> None:
    record = data().record
    assert json.loads(json.dumps(record)) == record
    assert (record["task"], record["max_length"], record["names"]) == ("SEQ_CLS", 128, ["bad", "good"])
    assert len(record["tokenizer"]["fingerprint"]) == 32


def test_training_order_is_a_function_of_seed_and_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    orders = [ids(data(seed=s).train_dataloader(), e) for s, e in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert ids(data().train_dataloader()) == orders[3]
    assert isinstance(data().val_dataloader().sampler, SequentialSampler)
    assert isinstance(data().statistics_dataloader().sampler, SequentialSampler)


def test_several_labels_and_numbers_are_floats() -> None:
    several = [{"text": t, "label": ["a", "b"][: at % 3]} for at, t in enumerate(TEXTS)]
    batch = next(iter(data(several, problem_type="multi_label_classification").train_dataloader()))
    assert batch["labels"].shape == (4, 2)
    assert batch["labels"].dtype == torch.float32
    numbers = data([{"text": t, "label": at / 7} for at, t in enumerate(TEXTS)], problem_type="regression")
    batch = next(iter(numbers.train_dataloader()))
    assert (batch["labels"].shape, batch["labels"].dtype) == ((4,), torch.float32)
    assert (numbers.label_names, numbers.num_labels) == (None, 1)


def test_packed_training_and_plain_evaluation() -> None:
    module = data([{"text": t} for t in TEXTS], "CAUSAL_LM", packing="documents", max_length=32, max_target_length=8)
    batch = next(iter(module.train_dataloader()))
    assert set(batch) == {"input_ids", "position_ids", "labels"}
    assert set(next(iter(module.val_dataloader()))) == {"input_ids", "attention_mask", "labels", "rows"}
    packed = sum(int((b["labels"] != -100).sum()) for b in module.train_dataloader())
    assert packed <= sum(n - 1 for n in module.train_dataloader().dataset.features.lengths.tolist())


def test_a_folder_of_a_model_gives_the_tokenizer(tmp_path: Path) -> None:
    module = data(tokenizer=str(hub(tmp_path / "bert", "bert")))
    assert module.record["tokenizer"]["name"] == str(tmp_path / "bert")
    named = TextData.from_rows(CLASSES, model_name=str(tmp_path / "bert"), task_type="SEQ_CLS", cache="none")
    assert ids(named.val_dataloader()) == ids(data(tokenizer=str(tmp_path / "bert"), batch_size=32).val_dataloader())
    with pytest.raises(ConfigError, match="no tokenizer: give model_name or tokenizer"):
        _ = TextData.from_rows(CLASSES, task_type="SEQ_CLS").tokenizer


def test_files_for_each_part(tmp_path: Path) -> None:
    for name, rows in (("a", CLASSES[:30]), ("b", CLASSES[30:40]), ("c", CLASSES[40:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    a, b, c = (str(tmp_path / f"{name}.jsonl") for name in "abc")
    module = TextData(a, val_root=b, test_root=c, task_type="SEQ_CLS", tokenizer=tokenizer("bert"), cache="none")
    parts = module.parts
    assert [len(p) for p in (parts.train, parts.val, parts.tests["target"])] == [30, 10, 10]
    module = TextData(a, test_root=c, source_root=b, task_type="SEQ_CLS", tokenizer=tokenizer("bert"), cache="none")
    assert {name: len(p) for name, p in module.parts.tests.items()} == {"target": 10, "source": 10}
    assert len(module.parts.val) == 2


@pytest.mark.parametrize("task", DATA)
def test_prediction_needs_no_answers(task: str, tmp_path: Path) -> None:
    answers = ("label", "tags", "answers", "response", "target")
    rows = [{k: v for k, v in row.items() if k not in answers} for row in DATA[task][1][:5]]
    (tmp_path / "new.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = {"classes": ["B", "O"]} if task == "TOKEN_CLS" else {"classes": ["x", "y"]} if task == "SEQ_CLS" else {}
    tok, source = tokenizer(DATA[task][0]), str(tmp_path / "new.jsonl")
    module = TextData(task_type=task, tokenizer=tok, cache="none", predict_source=source, **given)
    (batch,) = module.predict_dataloader()
    assert not {"labels", "start_positions"} & set(batch)
    assert batch["rows"] == [0, 1, 2, 3, 4]
    assert len(module.examples["predict"]) == 5
    (tmp_path / "new.txt").write_text("\n".join(TEXTS[:3]))
    if task != "QUESTION_ANS":
        source = str(tmp_path / "new.txt")
        again = TextData(task_type=task, tokenizer=tok, cache="none", predict_source=source, **given)
        (batch,) = again.predict_dataloader()
        assert len(batch["input_ids"]) == 3


def test_skipped_examples_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    module = data([*CLASSES, {"text": " ", "label": "good"}], on_error="skip")
    assert len(module.parts.train) == 36
    assert module.skipped == {"data": ["rows, number 51: the text is empty"]}
    module.teardown("fit")
    assert "data: 1 examples could not be used" in caplog.text


def test_what_is_cut_is_said(caplog: pytest.LogCaptureFixture) -> None:
    module = data(max_length=6)
    with caplog.at_level(logging.WARNING):
        module.train_dataloader()
        module.train_dataloader()
    assert caplog.text.count("are longer than 6 tokens and lose") == 1
    assert module.counts["train"]["cut"] > 0


def test_batches_are_the_same_with_worker_processes() -> None:
    assert ids(data(num_workers=2, seed=3).train_dataloader()) == ids(data(seed=3).train_dataloader())


def test_tokens_are_made_once_on_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = ids(data(cache="auto", seed=0).train_dataloader())
    monkeypatch.setattr("visionlora.text.caching.tokenise", None)
    assert ids(data(cache="auto", seed=0).train_dataloader()) == first
    assert len([*(tmp_path / "visionlora" / "tokens").iterdir()]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task_type": None}, "task_type is needed"),
        ({"task_type": "SEQ_CLASS"}, 'task_type must be one of .* did you mean "SEQ_CLS"'),
        ({"packing": "documents"}, "packing belongs to CAUSAL_LM"),
        ({"packing": "document"}, 'packing must be one of none, documents, .* did you mean "documents"'),
        ({"template": "{a}"}, "template writes prompts of CAUSAL_LM and SEQ_2_SEQ_LM"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"documents": "lines"}, 'documents must be one of .* did you mean "line"'),
        ({"on_error": "ignore"}, "on_error must be one of raise, skip"),
        ({"problem_type": "regression", "task_type": "TOKEN_CLS"}, "problem_type regression belongs to SEQ_CLS"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        data(**options)


def test_data_that_cannot_work() -> None:
    tok = tokenizer("bert")
    with pytest.raises(DataError, match="no data: give a file"):
        _ = TextData(task_type="SEQ_CLS", tokenizer=tok).parts
    with pytest.raises(DataError, match="nothing to predict"):
        data().predict_dataloader()
    with pytest.raises(DataError, match="no validation examples"):
        data(val_fraction=0.0).val_dataloader()
    odd = {"train": CLASSES, "test": [{"text": "a", "label": "goood"}]}
    with pytest.raises(DataError, match=r"the target part has labels .*'goood' .*did you mean .good"):
        _ = data(odd).label_names
    with pytest.raises(ConfigError, match="max_length 500 is more than the 128 tokens"):
        data(max_length=500).train_dataloader()


def test_the_command_line_knows_the_settings() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TextData, "data")
    words = ["--data.task_type", "SEQ_CLS", "--data.columns", '{"text": "sentence"}', "--data.shots", "4"]
    made = parser.instantiate(parser.parse_args(words)).data
    assert made.columns == {"text": "sentence"}
    assert made.hparams.shots == 4


def test_the_text_room_gives_the_data_module() -> None:
    from visionlora import text

    assert text.TextData is TextData
    assert visionlora.text is text
