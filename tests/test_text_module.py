"""TextTask: every task learns in every mode, the base stays, files and checkpoints bring back what was learned."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_texts
import pytest
import pytorch_lightning as pl
import torch
import transformers
from distributed_texts import gradients
from safetensors.torch import load_file
from text_runs import SETUPS, TASKS, logits, task, trained
from text_toy import DECODERS, ENCODERS, FAMILIES, hub, sentences
from text_toy_data import LABELS, data, rows, trainer
from torch import Tensor
from torch.testing import assert_close

import visionlora as vl
from visionlora import LoraConfig
from visionlora.errors import ConfigError, DataError
from visionlora.targets import head_layers
from visionlora.text import TextData, TextTask, create_backbone, load_model, load_tokenizer
from visionlora.text.families import AUTO
from visionlora.training.checkpoint import AdapterCheckpoint
from visionlora.training.checkpoint_io import AtomicCheckpointIO
from visionlora.training.guards import CheckGradients, StopOnNonFinite
from visionlora.training.resume import ExactResume

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
MODES = ["lora", "full", "linear", "norm"]
PAIRS = [
    *((family, name) for family in FAMILIES for name in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")),
    *((family, "CAUSAL_LM") for family in DECODERS),
    ("t5", "SEQ_2_SEQ_LM"),
]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_learns_more_than_its_base_knows(name: str) -> None:
    run = trained(name)
    key, direction = run.module.monitor
    gain = run.after[key] - run.before[key]
    assert gain < -1 if direction == "min" else gain > 0.2
    assert run.after["val/loss"] < run.before["val/loss"]


@pytest.mark.parametrize("name", ["CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_a_language_task_writes_what_it_was_taught(name: str) -> None:
    assert trained(name).after["val/exact"] > 0.5 > trained(name).before["val/exact"]


@pytest.mark.parametrize("name", TASKS)
def test_the_base_stays_bit_for_bit(name: str) -> None:
    run = trained(name)
    fresh = task(run.base, name)
    assert run.module.fingerprint() == fresh.fingerprint() == vl.fingerprint(run.module.net)
    with vl.disabled(run.module.net), vl.disabled(fresh.net):
        fresh.net.eval()
        assert torch.equal(logits(run), logits(run, fresh.net))


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_every_part_of_an_adapter_gets_a_gradient(family: str, name: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    if family in ("llama", "qwen2") and name == "QUESTION_ANS":  # transformers finds such weights in bare models alone
        transformers.AutoModel.from_pretrained(hub(tmp_path / "causal", family)).save_pretrained(base)
        transformers.AutoTokenizer.from_pretrained(tmp_path / "causal").save_pretrained(base)
    else:
        hub(base, family)
    module = task(base, name, lora=LoraConfig(r=2))
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0, callbacks=[CheckGradients(), StopOnNonFinite()])
    run.fit(module, data(name, base, 8, 8))
    assert "B" in module.trainable_groups()
    assert ("head" in module.trainable_groups()) == bool(head_layers(module.net))
    assert module.fingerprint() == vl.fingerprint(module.net)


@pytest.mark.parametrize("name", ["SEQ_CLS", "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("mode", MODES[1:])
def test_other_modes_train_and_are_saved(mode: str, name: str, tmp_path: Path) -> None:
    if (mode, name) == ("linear", "SEQ_2_SEQ_LM"):
        with pytest.raises(ConfigError, match="mode linear trains a head"):
            task(hub(tmp_path / "base", "t5"), name, mode=mode)
        return
    run = trained(name, mode)
    assert run.after["val/loss"] < run.before["val/loss"]
    again = load_model(run.folder / "saved", **({} if mode == "full" else {"base": run.base}))
    assert_close(logits(run, again), logits(run), atol=1e-6, rtol=1e-6)
    groups = set(run.module.trainable_groups())
    assert (
        groups
        == {
            "full": {"head", "backbone"} if name == "SEQ_CLS" else {"backbone"},
            "linear": {"head"},
            "norm": {"head", "norm"} if name == "SEQ_CLS" else {"saved"},
        }[mode]
    )


@pytest.mark.parametrize("name", TASKS)
def test_a_saved_adapter_is_loaded_with_its_labels_and_its_tokenizer(name: str) -> None:
    run = trained(name)
    net = load_model(run.folder / "saved", base=run.base)
    assert net.label_names == LABELS.get(name)
    assert_close(logits(run, net), logits(run), atol=0, rtol=0)
    tokenizer = load_tokenizer(run.folder / "saved", base=run.base)
    assert tokenizer("the film was good")["input_ids"] == run.data.tokenizer("the film was good")["input_ids"]


def test_adapters_of_all_tasks_give_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    for name in TASKS:
        run = trained(name)
        batch = {k: v for k, v in next(iter(run.data.val_dataloader())).items() if isinstance(v, Tensor)}
        torch.save((batch, logits(run)), tmp_path / f"{name}.pt")
    places = {name: (str(trained(name).folder / "saved"), str(trained(name).base)) for name in TASKS}
    code = (
        "import sys, torch; from visionlora.text import load_model; from visionlora.text.tasks import task_of\n"
        "from visionlora.text.inputs import model_inputs\n"
        f"for name, (saved, base) in {places!r}.items():\n"
        f"    batch, expected = torch.load({str(tmp_path)!r} + '/' + name + '.pt')\n"
        "    net = load_model(saved, base=base)\n"
        "    with torch.no_grad(): found = task_of(name).logits(net(**model_inputs(net, batch))).flatten(1)\n"
        "    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=240)


@pytest.mark.parametrize("name", TASKS)
def test_a_merged_model_is_a_plain_model_of_transformers(name: str, tmp_path: Path) -> None:
    run = trained(name)
    expected, net = logits(run), copy.deepcopy(run.module.net)
    vl.merge(net)
    merged = logits(run, net)
    assert_close(merged, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
    net.save_pretrained(tmp_path)
    plain = getattr(transformers, AUTO[name]).from_pretrained(tmp_path).eval()
    assert type(plain).__module__.startswith("transformers.")
    assert torch.equal(logits(run, plain), merged)
    vl.unmerge(net)
    assert torch.equal(logits(run, net), expected)


@pytest.mark.parametrize("name", TASKS)
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(name: str, tmp_path: Path) -> None:
    family, sizes, _, lr = SETUPS[name]
    base = hub(tmp_path / "base", family, **sizes)

    def fit(folder: Path, ckpt: Path | None = None, *callbacks: pl.Callback) -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = task(base, name, lr=lr)
        monitor, mode = module.monitor
        kept = [AdapterCheckpoint(folder, monitor=monitor, mode=mode), ExactResume(), *callbacks]
        run = trainer(folder, max_epochs=3, callbacks=kept, plugins=[AtomicCheckpointIO()])
        run.fit(module, data(name, base, 32), ckpt_path=ckpt)
        return load_file(folder / "adapter" / "adapter_model.safetensors")

    whole = fit(tmp_path / "whole")
    with pytest.raises(KeyError, match="power cut"):
        fit(tmp_path / "parts", None, PowerCut())
    parts = fit(tmp_path / "parts", tmp_path / "parts" / "last.ckpt")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


class PowerCut(pl.Callback):
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if trainer.current_epoch == 1:
            raise KeyError("power cut")


def predicted(name: str, folder: Path) -> list[dict[str, Any]]:
    run = trained(name)
    asked = [
        {k: v for k, v in row.items() if k not in ("label", "tags", "answers", "response", "target")}
        for row in rows(name, 5, 3)
    ]
    source = folder / "asked.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in asked), encoding="utf-8")
    texts = data(name, run.base, predict_source=str(source), batch_size=2)
    return trainer(folder).predict(run.module, texts)  # type: ignore[return-value]


def test_predictions_name_the_class(tmp_path: Path) -> None:
    found = predicted("SEQ_CLS", tmp_path)
    assert sum(len(batch["classes"]) for batch in found) == 5
    assert {name for batch in found for name in batch["classes"]} <= {"bad", "good"}
    assert_close(found[0]["probabilities"].sum(-1), torch.ones(2))
    assert [row for batch in found for row in batch["rows"]] == list(range(5))


def test_predictions_tag_every_word(tmp_path: Path) -> None:
    found = [words for batch in predicted("TOKEN_CLS", tmp_path) for words in batch["classes"]]
    right = [row["tags"] for row in rows("TOKEN_CLS", 5, 3)]
    assert [[words[i] for i in range(len(tags))] for words, tags in zip(found, right, strict=True)] == right


def test_predictions_answer_with_words_of_the_context(tmp_path: Path) -> None:
    predicted("QUESTION_ANS", tmp_path)
    contexts = [row["context"] for row in rows("QUESTION_ANS", 5, 3)]
    answers = list(trained("QUESTION_ANS").module.answered.values())
    assert len(answers) == 5
    assert all(answer and answer in context for answer, context in zip(answers, contexts, strict=True))


@pytest.mark.parametrize(("name", "key"), [("CAUSAL_LM", "response"), ("SEQ_2_SEQ_LM", "target")])
def test_predictions_write(name: str, key: str, tmp_path: Path) -> None:
    texts = [text for batch in predicted(name, tmp_path) for text in batch["texts"]]
    right = [row[key] for row in rows(name, 5, 3)]
    assert sum(a == b for a, b in zip(texts, right, strict=True)) >= 3


def test_packed_texts_train(tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "llama", initializer_range=0.2)
    module = task(base, "CAUSAL_LM", lr=1e-2)
    texts = data("CAUSAL_LM", base, packing="documents")
    assert "attention_mask" not in next(iter(texts.train_dataloader()))
    before = trainer(tmp_path).validate(module, texts, verbose=False)[0]["val/ppl"]
    trainer(tmp_path, max_epochs=20, limit_val_batches=0).fit(module, texts)
    assert trainer(tmp_path).validate(module, texts, verbose=False)[0]["val/ppl"] < before / 2


@pytest.mark.parametrize("clip", [None, 0.5])
def test_small_batches_accumulated_are_one_large_batch(clip: float | None, tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "llama")
    together = gradients(base, tmp_path, 8, gradient_clip_val=clip)
    apart = gradients(base, tmp_path, 2, 4, gradient_clip_val=clip)
    assert_close(apart, together, atol=1e-6, rtol=1e-3)


@pytest.mark.slow
def test_small_batches_of_two_processes_are_one_large_batch(tmp_path: Path) -> None:
    base, out = hub(tmp_path / "base", "llama"), tmp_path / "gradients.pt"
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", distributed_texts.__file__, base, out]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, timeout=280)
    assert_close(torch.load(out), gradients(base, tmp_path, 8), atol=1e-6, rtol=1e-3)


def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "llama")
    gradients = []
    for on in (False, True):
        module = task(base, "CAUSAL_LM", gradient_checkpointing=on)
        batch = next(iter(data("CAUSAL_LM", base, 8, 8).train_dataloader()))
        with torch.no_grad():
            for parameter in module.trainable_groups()["B"]:
                parameter.fill_(0.01)
        module.loss(module.train()(batch), batch)[0].backward()
        gradients.append([p.grad for group in module.trainable_groups().values() for p in group])
    for one, two in zip(*gradients, strict=True):
        assert_close(one, two)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_numbers_and_several_labels_train(problem: str, tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "distilbert")
    label: Any = {"regression": float, "multi_label_classification": lambda good: ["good"] if good else ["bad", "sad"]}
    turned = [{**row, "label": label[problem](row["label"] == "good")} for row in rows("SEQ_CLS", 64)]
    texts = TextData.from_rows(
        {"train": turned, "validation": turned[:24]},
        model_name=str(base), task_type="SEQ_CLS", problem_type=problem, cache="none", batch_size=16, seed=0,
    )  # fmt: skip
    module = task(base, "SEQ_CLS", label_names=texts.label_names, problem_type=problem, lr=1e-2)
    key, _ = module.monitor
    before = trainer(tmp_path).validate(module, texts, verbose=False)[0]
    trainer(tmp_path, max_epochs=6, limit_val_batches=0).fit(module, texts)
    assert trainer(tmp_path).validate(module, texts, verbose=False)[0][key] > before[key] + 0.2
    module.save_adapter(tmp_path / "saved")
    assert load_model(tmp_path / "saved", base=base).num_labels == module.net.num_labels


def test_class_weights_come_from_the_data(tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "distilbert")
    module = task(base, "SEQ_CLS", class_weights="balanced")
    texts = data("SEQ_CLS", base, 16)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, texts)
    assert_close(module._class_weight, torch.tensor([16 / (2 * count) for count in texts.class_counts]))


def test_eva_starts_along_the_data(tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "distilbert", initializer_range=0.5)
    module = task(base, "SEQ_CLS", lora=LoraConfig(r=2, init_lora_weights="eva"))
    before = [p.clone() for p in module.trainable_groups()["A"]]
    varied = [{"text": text, "label": LABELS["SEQ_CLS"][len(text) % 2]} for text in sentences(64)]
    texts = TextData.from_rows({"train": varied}, model_name=str(base), task_type="SEQ_CLS", cache="none", seed=0)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, texts)
    after = module.trainable_groups()["A"]
    assert all((one - two).abs().max() > 0.01 for one, two in zip(before, after, strict=True))


def test_settings_are_plain_data_and_rebuild_the_task(tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "distilbert")
    module = task(base, "SEQ_CLS")
    run = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    run.fit(module, data("SEQ_CLS", base, 16))
    run.save_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    again = TextTask.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert again.hparams == module.hparams
    assert all(torch.equal(a, b) for a, b in zip(again.net.parameters(), module.net.parameters(), strict=True))


def test_a_ready_model_can_be_trained(tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "distilbert")
    net = create_backbone(str(base), "SEQ_CLS", label_names=LABELS["SEQ_CLS"])
    module = TextTask.from_model(net, task_type="SEQ_CLS", label_names=LABELS["SEQ_CLS"], mode="linear")
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data("SEQ_CLS", base, 16))
    with pytest.raises(ConfigError, match=r"no setting 'lable_names'.*label_names"):
        TextTask.from_model(net, task_type="SEQ_CLS", lable_names=["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "lora+"}, 'mode must be one of lora, .*did you mean "lora"'),
        ({"label_names": ["a", "a"]}, "label_names must all differ"),
        ({"lr": 0.0}, "lr must be a finite number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of at least 1"),
        ({"class_weights": [1.0]}, "class_weights needs 2 numbers"),
        ({"lora": LoraConfig(task_type="TOKEN_CLS")}, "leave lora.task_type away"),
        ({"task_type": "SEQ_CLASS"}, 'did you mean "SEQ_CLS"'),
        ({"problem_type": "regresion"}, "problem_type"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"task_type": "SEQ_CLS", "label_names": LABELS["SEQ_CLS"], **settings}
    with pytest.raises(ConfigError, match=message):
        TextTask(str(hub(tmp_path, "distilbert")), **given)


@pytest.mark.parametrize(
    ("settings", "other", "message"),
    [
        ({}, {"classes": ["good", "bad"]}, "the data have the labels"),
        ({}, {"task_type": "CAUSAL_LM"}, "the data are for CAUSAL_LM"),
        ({"data": {"tokenizer": {"name": "x", "fingerprint": "0" * 32}}}, {}, "was trained with the tokenizer"),
    ],
)
def test_data_of_another_task_are_refused(
    settings: dict[str, Any], other: dict[str, Any], message: str, tmp_path: Path
) -> None:
    base = hub(tmp_path / "base", "bert")
    texts = data(other.pop("task_type", "SEQ_CLS"), base, 8, **other)
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path, max_steps=1).fit(task(base, "SEQ_CLS", **settings), texts)


def test_the_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    texts = data("SEQ_CLS", hub(tmp_path / "other", "roberta"), 8)  # 400 pieces where DistilBERT here has 150 words
    with pytest.raises(ConfigError, match=r"tokenizer|vocabulary"):
        trainer(tmp_path, max_steps=1).fit(task(hub(tmp_path / "base", "distilbert"), "SEQ_CLS"), texts)


def test_labels_outside_the_classes_are_refused(tmp_path: Path) -> None:
    module = task(hub(tmp_path / "base", ENCODERS[0]), "SEQ_CLS")
    with pytest.raises(DataError, match="expected labels from 0 to 1, got 7"):
        module.training_step({"input_ids": torch.ones(1, 3, dtype=torch.long), "labels": torch.tensor([7])}, 0)
