"""Adapters of text models and PEFT's, both ways; several tasks on one backbone; adapters that belong elsewhere."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from text_runs import TASKS, logits, trained
from text_toy import FAMILIES, hub, tokenizer
from text_toy_data import LABELS, data, trainer
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora import LoraConfig
from visionlora.errors import AdapterFileError, BaseMismatchError, ConfigError, StateError
from visionlora.text import TaskModels, TextTask, create_backbone, load_model, load_tokenizer
from visionlora.text.families import AUTO

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),  # read by PEFT
]


def plain(base: Path, name: str) -> nn.Module:
    """Return the model of a task as transformers builds it."""
    labels = {"num_labels": len(LABELS[name])} if name in LABELS else {}
    torch.manual_seed(7)
    net: nn.Module = getattr(transformers, AUTO[name]).from_pretrained(base, **labels).eval()
    if net.config.pad_token_id is None:
        net.config.pad_token_id = net.config.eos_token_id
    return net


def stir(net: nn.Module) -> None:
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.requires_grad or "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def said(net: nn.Module, base: Path, name: str) -> Tensor:
    batch = next(iter(data(name, base, 8, 8).train_dataloader()))
    inputs = {k: v for k, v in batch.items() if k in ("input_ids", "attention_mask", "token_type_ids")}
    if name == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = inputs["input_ids"]
    with torch.no_grad():
        out = net(**inputs)
    return torch.stack([out.start_logits, out.end_logits], -1) if name == "QUESTION_ANS" else out.logits


@pytest.mark.parametrize("name", TASKS)
def test_peft_reads_what_was_trained(name: str) -> None:
    run = trained(name)
    net = peft.PeftModel.from_pretrained(plain(run.base, name), run.folder / "saved").eval()
    assert net.peft_config["default"].task_type == name
    # rounding of float32 alone is above 1e-5 where a language model has many scores
    assert_close(
        logits(run, net.base_model.model.double()),
        logits(run, copy.deepcopy(run.module.net).double()),
        atol=1e-9,
        rtol=1e-9,
    )


PAIRS = [
    *((family, "SEQ_CLS") for family in FAMILIES if family != "t5"),  # whose classes PEFT neither trains nor saves
    *((family, "TOKEN_CLS") for family in ("bert", "roberta", "modernbert", "gpt2")),
    *((family, "QUESTION_ANS") for family in ("bert", "distilbert", "gpt2")),
    *((family, "CAUSAL_LM") for family in ("gpt2", "llama", "qwen2")),
    ("t5", "SEQ_2_SEQ_LM"),
]
NAMES = {
    "gpt2": ["c_attn", "c_fc"],
    "distilbert": ["q_lin", "lin1"],
    "modernbert": ["Wqkv", "Wi"],
    "t5": ["q", "v", "wo"],
    **{family: ["query", "intermediate.dense"] for family in ("bert", "roberta")},
    **{family: ["q_proj", "down_proj"] for family in ("llama", "qwen2")},
}


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_what_peft_wrote_is_read(family: str, name: str, tmp_path: Path) -> None:
    base = hub(tmp_path / "base", family)
    config = peft.LoraConfig(
        r=2, task_type=name, target_modules=NAMES[family], init_lora_weights=False, fan_in_fan_out=family == "gpt2"
    )
    theirs = peft.get_peft_model(plain(base, name), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = plain(base, name)  # its random head is the one PEFT had: the adapter brings what PEFT trained of it
    vl.load_adapter(ours, tmp_path / "theirs")
    # PEFT's own forward of QUESTION_ANS drops the token types
    truth = said(theirs.base_model.model.double(), base, name)
    assert_close(said(ours.eval().double(), base, name), truth, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_what_we_wrote_peft_reads(family: str, name: str, tmp_path: Path) -> None:
    base = hub(tmp_path / "base", family)
    ours = vl.apply_lora(plain(base, name), LoraConfig(r=2, task_type=name)).eval()
    stir(ours)
    vl.save_adapter(ours, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(plain(base, name), tmp_path / "ours").eval().double()
    assert_close(said(theirs.base_model.model, base, name), said(ours.double(), base, name), atol=1e-9, rtol=1e-9)


def encoder_runs(tmp_path: Path, family: str) -> tuple[Path, dict[str, TextTask]]:
    base, modules = hub(tmp_path / "base", family), {}
    for name in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"):
        module = TextTask(str(base), name, label_names=LABELS.get(name), lora=LoraConfig(r=2), adapter_name=name)
        stir(module.net)
        module.save_adapter(tmp_path / name)
        modules[name] = module.eval()
    return base, modules


@pytest.mark.parametrize("family", ["bert", "distilbert", "modernbert"])
def test_one_backbone_serves_several_tasks(family: str, tmp_path: Path) -> None:
    base, modules = encoder_runs(tmp_path, family)
    tasks = TaskModels(base=base)
    for name in modules:
        assert tasks.add(tmp_path / name) == name
    ids = torch.tensor([[2, 30, 40, 50, 3]])
    for name in (*modules, *reversed(modules)):  # back and forth
        out = tasks(name, input_ids=ids, attention_mask=torch.ones_like(ids))
        expected = modules[name]({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        assert_close(modules[name].task.logits(out), expected, atol=1e-5, rtol=1e-5)
    shared = {id(p) for p in tasks.task("SEQ_CLS").base_model.parameters()}
    own = [p for p in tasks.task("TOKEN_CLS").base_model.parameters() if id(p) not in shared]
    assert not own


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "modernbert", "gpt2"])
def test_tasks_are_mixed_in_one_batch(family: str, tmp_path: Path) -> None:
    base, modules = encoder_runs(tmp_path, family)
    tasks, calls = TaskModels(base=base), list[int]()
    names = ["SEQ_CLS", "TOKEN_CLS", "SEQ_CLS", "QUESTION_ANS"]
    for name in modules:
        tasks.add(tmp_path / name)
    ids = torch.randint(10, 60, (len(names), 7))
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    hook = tasks.task("SEQ_CLS").base_model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        mixed = tasks.mixed(names, input_ids=ids, attention_mask=mask)
    hook.remove()
    assert len(calls) == 1  # the backbone ran once
    for name in dict.fromkeys(names):
        rows = [row for row, own in enumerate(names) if own == name]
        with torch.no_grad():
            alone = tasks(name, input_ids=ids[rows], attention_mask=mask[rows])
        task = modules[name].task
        assert_close(task.logits(mixed[name]), task.logits(alone), atol=1e-5, rtol=1e-4)
    with pytest.raises(StateError, match="1 tasks are named, one a sample"):
        tasks.mixed(["SEQ_CLS"], input_ids=ids, attention_mask=mask)


def test_a_task_of_another_backbone_is_refused(tmp_path: Path) -> None:
    base, _ = encoder_runs(tmp_path / "one", "bert")
    other = hub(tmp_path / "other", "bert", seed=1)
    module = TextTask(str(other), "TOKEN_CLS", label_names=LABELS["TOKEN_CLS"])
    module.save_adapter(tmp_path / "ner")
    tasks = TaskModels(base=base)
    tasks.add(tmp_path / "one" / "SEQ_CLS")
    with pytest.raises(BaseMismatchError):
        tasks.add(tmp_path / "ner")
    tasks.base = other
    with pytest.raises(BaseMismatchError, match="other weights"):
        tasks.add(tmp_path / "ner")
    assert list(tasks.models) == ["SEQ_CLS"]
    with pytest.raises(StateError, match="there already"):
        tasks.add(tmp_path / "one" / "SEQ_CLS")
    with pytest.raises(StateError, match="no task 'seq_cls'"):
        tasks("seq_cls")


@pytest.mark.parametrize("pair", [("SEQ_CLS", "TOKEN_CLS"), ("TOKEN_CLS", "SEQ_CLS"), ("QUESTION_ANS", "SEQ_CLS")])
def test_an_adapter_of_another_task_is_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    base, _ = encoder_runs(tmp_path, "distilbert")
    net = create_backbone(str(base), pair[1], label_names=["a", "b", "c"])
    before = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    with pytest.raises(BaseMismatchError, match=r"was trained on a DistilBertFor\w+, this model is a DistilBertFor"):
        vl.load_adapter(net, tmp_path / pair[0])
    assert all(torch.equal(before[key], tensor) for key, tensor in net.state_dict().items())


def test_the_base_must_be_given_and_must_be_the_right_one(tmp_path: Path) -> None:
    encoder_runs(tmp_path, "bert")
    with pytest.raises(ConfigError, match="give that folder: load_model"):
        load_model(tmp_path / "SEQ_CLS")
    other = hub(tmp_path / "other", "bert", seed=1)
    with pytest.raises(BaseMismatchError, match="base=FOLDER"):
        load_model(tmp_path / "SEQ_CLS", base=other)
    deeper = hub(tmp_path / "deeper", "bert", num_hidden_layers=3)
    with pytest.raises(BaseMismatchError):
        load_model(tmp_path / "SEQ_CLS", base=deeper)


def test_an_adapter_of_images_is_no_adapter_of_texts(tmp_path: Path) -> None:
    net = vl.apply_lora(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=1, target_modules=["0"]))
    vl.save_adapter(net, tmp_path)
    with pytest.raises(AdapterFileError, match="no adapter of a text model"):
        load_model(tmp_path)


def test_the_tokenizer_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "bert")
    texts = data("SEQ_CLS", base, 16)
    module = TextTask(str(base), "SEQ_CLS", label_names=LABELS["SEQ_CLS"], data=texts.record)
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, texts)
    module.save_adapter(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved", base=base).get_vocab() == texts.tokenizer.get_vocab()
    other = tokenizer("bert")
    other.add_tokens(["zebra"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(BaseMismatchError, match="trained with a tokenizer of fingerprint"):
        load_tokenizer(tmp_path / "saved", base=tmp_path / "other")


def test_a_record_can_set_nothing_but_sizes(tmp_path: Path) -> None:
    net = create_backbone(str(hub(tmp_path / "base", "bert")), "SEQ_CLS", label_names=LABELS["SEQ_CLS"])
    vl.apply_lora(net, LoraConfig(r=1, task_type="SEQ_CLS"))
    described: dict[str, Any] = {"name": "../elsewhere", "args": {}}
    with pytest.raises(ConfigError, match="owner/name"):
        vl.save_adapter(net, tmp_path / "saved", base=described)
    described = {"name": "org/model", "args": {"trust_remote_code": True}}
    vl.save_adapter(net, tmp_path / "saved", base=described, classes=LABELS["SEQ_CLS"])
    loaded = load_model(tmp_path / "saved", base=tmp_path / "base")  # the argument in the file is passed over
    assert type(loaded).__module__.startswith("transformers.models.bert")


def test_new_tokens_and_their_embeddings_are_saved_and_loaded(tmp_path: Path) -> None:
    base = hub(tmp_path / "base", "llama")
    lora = LoraConfig(r=2, modules_to_save=["embed_tokens", "lm_head"])
    module = TextTask(str(base), "CAUSAL_LM", new_tokens=3, lora=lora).eval()
    stir(module.net)
    module.save_adapter(tmp_path / "saved")
    ids = torch.tensor([[5, module.net.get_input_embeddings().num_embeddings - 1]])
    again = load_model(tmp_path / "saved", base=base)
    assert_close(again(ids).logits, module.net(ids).logits, atol=1e-5, rtol=1e-5)
