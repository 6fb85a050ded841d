"""Backbones of text: what weights do not bring is head, a lost backbone is refused, embeddings grow and untie."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from text_toy import ENCODERS, FAMILIES, hub, pretrained, tokenizer
from torch.testing import assert_close
from transformers import AutoModel, AutoModelForCausalLM, BertForMaskedLM, RobertaModel

import visionlora as vl
from visionlora import LoraConfig
from visionlora.errors import ConfigError
from visionlora.targets import head_layers
from visionlora.text import create_backbone, untie

LABELS = ["bad", "good"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_starts_at_zero_whatever_was_drawn_before(family: str, tmp_path: Path) -> None:
    folder = str(hub(tmp_path, family))
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        nets.append(create_backbone(folder, "SEQ_CLS", label_names=LABELS))
    one, two = (net.state_dict() for net in nets)
    assert all(torch.equal(one[key], two[key]) for key in one)
    ids = torch.tensor([[5, 6, 7, 1], [9, 8, 7, 1]])  # T5 reads its classes where a text ends
    assert not nets[0](input_ids=ids).logits.any()
    assert nets[0].config.id2label == {0: "bad", 1: "good"}


def test_creating_a_backbone_draws_nothing(tmp_path: Path) -> None:
    folder = str(hub(tmp_path, "bert"))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    create_backbone(folder, "SEQ_CLS", label_names=LABELS)
    assert_close(torch.rand(3), expected)


def test_a_pooler_that_the_weights_do_not_bring_is_trained_and_saved(tmp_path: Path) -> None:
    tok = tokenizer("bert")
    whole = pretrained("bert", tok)
    BertForMaskedLM(whole.config).save_pretrained(tmp_path)
    net = create_backbone(str(tmp_path), "SEQ_CLS", label_names=LABELS)
    assert head_layers(net) == ["bert.pooler.dense", "classifier"]
    vl.apply_lora(net, LoraConfig(r=2))
    assert any("pooler" in name for name in vl.adapter_parameters(net, "default")["head"])
    again = create_backbone(str(tmp_path), "SEQ_CLS", label_names=LABELS)
    assert vl.fingerprint(again) == vl.fingerprint(net)


def test_a_head_for_other_labels_is_replaced(tmp_path: Path) -> None:
    folder = str(hub(tmp_path / "base", "distilbert"))
    create_backbone(folder, "SEQ_CLS", label_names=LABELS).save_pretrained(tmp_path / "tuned")
    net = create_backbone(str(tmp_path / "tuned"), "SEQ_CLS", label_names=["a", "b", "c"])
    assert net.classifier.out_features == 3


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_lost_backbone_is_refused_and_the_cure_works(family: str, tmp_path: Path) -> None:
    folder = hub(tmp_path / "base", family)
    with pytest.raises(ConfigError, match=r"does not bring \d+ tensor.*AutoModel.from_pretrained"):
        create_backbone(str(folder), "QUESTION_ANS")
    AutoModel.from_pretrained(folder).save_pretrained(tmp_path / "bare")
    net = create_backbone(str(tmp_path / "bare"), "QUESTION_ANS")
    kept = AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight
    assert torch.equal(net.transformer.embed_tokens.weight, kept)


def test_weights_of_another_depth_are_refused(tmp_path: Path) -> None:
    RobertaModel(pretrained("roberta").config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="does not bring"):
        create_backbone(str(tmp_path), "SEQ_CLS", label_names=LABELS, model_args={"num_hidden_layers": 3})


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("SEQ_CLS", {}, "needs label_names"),
        ("seq_cls", {}, 'did you mean "SEQ_CLS"'),
        ("SEQ_2_SEQ_LM", {}, "no model for SEQ_2_SEQ_LM"),
        ("QUESTION_ANS", {"model_args": {"no_such": 1}}, "check model_args"),
    ],
)
def test_bad_input_is_refused_with_a_cure(task: str, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        create_backbone(str(hub(tmp_path, "bert")), task, **options)


def test_a_name_that_is_nowhere_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no model 'no-such-folder'.*Give a name of the hub"):
        create_backbone("no-such-folder", "CAUSAL_LM")


def test_padding_is_known_to_models_whose_tokenizers_have_none(tmp_path: Path) -> None:
    net = create_backbone(str(hub(tmp_path, "gpt2")), "SEQ_CLS", label_names=LABELS)
    assert net.config.pad_token_id == net.config.eos_token_id
    assert net(input_ids=torch.tensor([[5, 6, 0], [5, 6, 7]])).logits.shape == (2, 2)


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", *ENCODERS])
def test_new_tokens_start_as_the_mean_of_all(family: str, tmp_path: Path) -> None:
    folder = str(hub(tmp_path, family))
    task = "SEQ_2_SEQ_LM" if family == "t5" else "TOKEN_CLS" if family in ENCODERS else "CAUSAL_LM"
    net = create_backbone(folder, task, label_names=LABELS, new_tokens=2)
    old = AutoModel.from_pretrained(folder).get_input_embeddings().weight
    rows = net.get_input_embeddings().weight
    assert rows.shape[0] == old.shape[0] + 2
    assert torch.equal(rows[:-2], old)
    assert_close(rows[-1], old.mean(0), atol=1e-6, rtol=0)
    out = net.get_output_embeddings()
    assert out is None or len(out.weight) == len(rows)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_an_untied_model_gives_the_same_and_is_saved_whole(family: str, tmp_path: Path) -> None:
    folder = str(hub(tmp_path / "base", family))
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    ids = torch.tensor([[5, 6, 7]])
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if family == "t5" else {})}
    net = create_backbone(folder, task)
    before = net(**inputs).logits
    if net.lm_head.weight is not net.get_input_embeddings().weight:
        with pytest.raises(ConfigError, match="no tied embeddings"):
            untie(net)
        return
    untie(net)
    other = create_backbone(folder, task)
    assert other.lm_head.weight is other.get_input_embeddings().weight  # no other model changed
    assert torch.equal(net(**inputs).logits, before)
    embedding = {"gpt2": "transformer.wte", "t5": "shared"}[family]
    if family == "gpt2":
        vl.apply_lora(net, LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=[embedding, "lm_head"]))
        with torch.no_grad():
            for parameter in vl.adapter_parameters(net, "default")["saved"].values():
                parameter.mul_(1.5)
        before = net(**inputs).logits
        vl.merge(net)
    net.save_pretrained(tmp_path / "untied")
    again = type(net).from_pretrained(tmp_path / "untied").eval()
    assert_close(again(**inputs).logits, before)


def test_text_without_transformers_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['transformers'] = None; import visionlora.text as t;"
        "from visionlora.errors import ConfigError\n"
        "try: t.create_backbone('gpt2', 'CAUSAL_LM')\n"
        "except ConfigError as e: assert 'pip install' in str(e) and 'visionlora[text]' in str(e)\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
