"""Which layers of language models change: by family, by part, and never a head or a tied embedding by accident."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from text_toy import DECODERS, ENCODERS, FAMILIES, config, pretrained, tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import visionlora as vl
from visionlora import LoraConfig
from visionlora.errors import TargetError
from visionlora.targets import head_layers, select
from visionlora.targets.heads import declare_new

_BERT = (
    *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
    *("intermediate.dense", "output.dense"),
)
_LLAMA = (*(f"self_attn.{n}_proj" for n in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
ROLES = {
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "bert": {*_BERT},
    "roberta": {*_BERT},
    "distilbert": {*(f"attention.{n}_lin" for n in ("q", "k", "v", "out")), "ffn.lin1", "ffn.lin2"},
    "modernbert": {"attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"},
    "t5": {
        *(f"layer.0.SelfAttention.{n}" for n in "qkvo"),
        *(f"layer.1.EncDecAttention.{n}" for n in "qkvo"),
        *(f"layer.{i}.DenseReluDense.{n}" for i in (1, 2) for n in ("wi", "wo")),
    },
    "llama": {*_LLAMA},
    "qwen2": {*_LLAMA},
}
TASKS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
HEADS = {
    ("gpt2", "SEQ_CLS"): ["score"],
    ("gpt2", "CAUSAL_LM"): [],
    ("bert", "SEQ_CLS"): ["classifier"],
    ("bert", "QUESTION_ANS"): ["qa_outputs"],
    ("distilbert", "SEQ_CLS"): ["pre_classifier", "classifier"],
    ("roberta", "SEQ_CLS"): ["classifier.dense", "classifier.out_proj"],
    ("modernbert", "TOKEN_CLS"): ["head.dense", "head.norm", "classifier"],
    ("t5", "SEQ_CLS"): ["classification_head.dense", "classification_head.out_proj"],
    ("t5", "QUESTION_ANS"): ["qa_outputs"],
    ("t5", "SEQ_2_SEQ_LM"): [],
    ("llama", "SEQ_CLS"): ["score"],
    ("llama", "QUESTION_ANS"): ["qa_outputs"],
    ("qwen2", "CAUSAL_LM"): [],
}


def model_of(family: str, task: str, **sizes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return getattr(transformers, TASKS[task]).from_config(config(family, tokenizer(family), **sizes)).eval()


def chosen(model: nn.Module, **settings: Any) -> list[str]:
    return [site.name for site in select(model, LoraConfig(r=2, **settings))]


def in_block(name: str) -> str:
    """Return the part of a layer's name behind the number of its block."""
    parts = name.split(".")
    first = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[first + 1 :])


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_takes_attention_and_mlp_of_every_block(family: str) -> None:
    model = pretrained(family)
    names = chosen(model)
    assert {in_block(n) for n in names} == ROLES[family]
    blocks = 4 if family == "t5" else 2
    linear = [n for n, m in model.named_modules() if type(m).__name__ in ("Linear", "Conv1D")]
    inside = [n for n in linear if any(part.isdigit() for part in n.split("."))]
    assert sorted(names) == sorted(inside)
    assert len({n[: len(n) - len(in_block(n))] for n in names}) == blocks


@pytest.mark.parametrize(("family", "task"), list(HEADS))
def test_the_head_is_what_lies_beside_the_backbone(family: str, task: str) -> None:
    assert head_layers(model_of(family, task)) == HEADS[family, task]


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_keyword_takes_head_or_pooler(family: str, task: str) -> None:
    model = model_of(family, task)
    heads = head_layers(model)
    assert heads
    assert not set(chosen(model, target_modules="all-linear")) & set(heads)
    found = {in_block(n) for n in chosen(model)}
    assert found == ROLES[family] or (family == "t5" and found < ROLES[family])  # its encoder alone tells tokens apart


@pytest.mark.parametrize("targets", ["auto", "all-linear", "all"])
@pytest.mark.parametrize("family", [*DECODERS, "t5", *ENCODERS])
def test_the_language_model_head_is_left_alone_and_stays_tied(family: str, targets: str) -> None:
    model = pretrained(family)
    out = model.get_output_embeddings()
    vl.apply_lora(model, LoraConfig(r=2, target_modules=targets))
    assert type(out) is nn.Linear
    tied = out.weight is model.get_input_embeddings().weight
    vl.merge(model)
    assert (out.weight is model.get_input_embeddings().weight) == tied


def test_gpt2_is_tied_and_llama_is_not() -> None:  # so that the test above sees both
    tied = {f: m.lm_head.weight is m.get_input_embeddings().weight for f in DECODERS if (m := pretrained(f))}
    assert tied == {"gpt2": True, "llama": False, "qwen2": False}


@pytest.mark.parametrize("settings", [{"target_modules": ["wte"]}, {"modules_to_save": ["lm_head"]}])
def test_one_of_two_tied_layers_is_refused_with_the_cure(settings: dict[str, Any]) -> None:
    with pytest.raises(TargetError, match=r"shares its weight with .*untie"):
        vl.apply_lora(pretrained("gpt2"), LoraConfig(r=2, **settings))


def test_an_untied_embedding_can_be_adapted() -> None:
    model = model_of("bert", "SEQ_CLS")
    assert chosen(model, target_modules=["word_embeddings"]) == ["bert.embeddings.word_embeddings"]


@pytest.mark.parametrize(("family", "layer"), [("gpt2", "h.0.attn.c_attn"), ("modernbert", "layers.0.attn.Wqkv")])
def test_parts_of_a_fused_layer_are_its_blocks_of_rows(family: str, layer: str) -> None:
    model = model_of(family, "SEQ_CLS")
    vl.apply_lora(model, LoraConfig(r=2, target_modules=[f"{layer}[q,v]"], modules_to_save="none"))
    name, fused = next((n, m) for n, m in model.named_modules() if n.endswith(layer))
    base = fused.base_tensor("weight").detach().clone()
    with torch.no_grad():
        for parameter in vl.adapter_parameters(model, "default")["B"].values():
            parameter.normal_()
    change = fused.effective("weight").detach() - base
    rows = change.T if family == "gpt2" else change
    q, k, v = rows.chunk(3)
    assert q.abs().sum() > 0
    assert v.abs().sum() > 0
    assert not k.any(), name


def test_queries_of_a_fused_layer_move_queries_alone() -> None:
    model = model_of("modernbert", "SEQ_CLS").base_model
    ids = torch.tensor([[2, 30, 40, 50, 3]])
    seen: dict[str, torch.Tensor] = {}
    attention = model.layers[0].attn
    hook = attention.Wqkv.register_forward_hook(lambda m, x, y: seen.update(y=y.detach().view(1, 5, 3, -1)))
    model(ids)
    before = seen["y"]
    vl.apply_lora(model, LoraConfig(r=2, target_modules=["layers.0.attn.Wqkv[q]"]))
    with torch.no_grad():
        for parameter in vl.adapter_parameters(model, "default")["B"].values():
            parameter.normal_()
    model(ids)
    hook.remove()
    moved = (seen["y"] - before).abs().sum((0, 1, 3)) > 0
    assert moved.tolist() == [True, False, False]  # (tokens, 3, heads * dim) is how ModernBertAttention views it


def test_an_unknown_transformers_model_gives_the_layers_of_its_blocks() -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", vocab_size=50, **sizes))
    roles = {in_block(n) for n in chosen(model)}
    assert roles == {"attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}


def test_layers_declared_new_belong_to_the_head() -> None:
    model = model_of("bert", "SEQ_CLS")
    before = vl.fingerprint(model)
    declare_new(model, ["bert.pooler.dense"])
    assert head_layers(model) == ["bert.pooler.dense", "classifier"]
    assert vl.fingerprint(model) != before
    nn.init.normal_(model.bert.pooler.dense.weight)
    declared = vl.fingerprint(model)
    nn.init.normal_(model.bert.pooler.dense.weight)
    assert vl.fingerprint(model) == declared
