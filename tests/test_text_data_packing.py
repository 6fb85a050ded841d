"""Packed documents do not see each other: their logits and their loss are those of lone documents."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from text_toy import DECODERS, pretrained, sentences, tokenizer
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, BloomConfig, GPTNeoXConfig, MistralConfig, OPTConfig, Phi3Config

from visionlora.errors import ConfigError
from visionlora.text.features import Features, FeatureWriter
from visionlora.text.layout import ready_tokenizer
from visionlora.text.packing import PackedFeatures, bins, check_packing, collate_packed
from visionlora.text.settings import IGNORED


def documents(*lengths: int, seed: int = 0) -> Features:
    draw, writer = random.Random(seed), FeatureWriter()
    for row, n in enumerate(lengths):
        ids = [draw.randrange(3, 140) for _ in range(n)]
        writer.add(row, input_ids=ids, labels=ids, prompt=0)
    return writer.features()


def packed_batch(features: Features, room: int) -> tuple[PackedFeatures, dict[str, torch.Tensor]]:
    packed = PackedFeatures(features, room)
    return packed, collate_packed([packed[at] for at in range(len(packed))], padding=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", DECODERS)
def test_packed_logits_are_those_of_lone_documents(family: str, attention: str) -> None:
    net = pretrained(family, attn_implementation=attention)
    features = documents(5, 1, 9, 3, 7, 2)
    packed, batch = packed_batch(features, 12)
    assert "attention_mask" not in batch
    with torch.no_grad():
        logits = net(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, places in enumerate(packed.rows):
            at = 0
            for place in places:
                ids = torch.tensor([features[place]["input_ids"]])
                alone = net(ids, use_cache=False).logits[0]
                torch.testing.assert_close(logits[row, at : at + len(alone)], alone, atol=1e-5, rtol=1e-5)
                at += len(alone)


@pytest.mark.parametrize("family", DECODERS)
def test_the_loss_of_packed_documents_is_that_of_lone_ones(family: str) -> None:
    net = pretrained(family)
    features = documents(5, 9, 3, 7)
    _, batch = packed_batch(features, 14)
    found = net(**batch, use_cache=False).loss
    losses = []
    for one in features:
        ids = torch.tensor([one["input_ids"]])
        logits = net(ids, use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
    torch.testing.assert_close(found, sum(losses) / sum(n - 1 for n in (5, 9, 3, 7)))


def test_a_mask_or_a_cache_lets_them_leak() -> None:
    """What the module must not do; where this test fails, transformers has become safer."""
    net = pretrained("llama")
    _, batch = packed_batch(documents(5, 5), 10)
    inputs = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        right = net(**inputs, use_cache=False).logits
        masked = net(**inputs, attention_mask=torch.ones_like(batch["input_ids"]), use_cache=False).logits
        cached = net(**inputs, use_cache=True).logits
    for wrong in (masked, cached):
        assert (wrong[:, 5:] - right[:, 5:]).abs().max() > 1e-3


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}


@pytest.mark.parametrize(
    "config",
    [
        MistralConfig(**SMALL, num_key_value_heads=1), GPTNeoXConfig(**SMALL),
        Phi3Config(**SMALL, num_key_value_heads=1, pad_token_id=0),
    ],
    ids=lambda config: str(config.model_type),
)  # fmt: skip
def test_models_that_tell_documents_apart_pass(config: Any) -> None:
    net = AutoModelForCausalLM.from_config(config).train()
    check_packing(net)
    assert net.training


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_families_we_ship_pass_in_any_precision(family: str, dtype: torch.dtype) -> None:
    check_packing(pretrained(family).to(dtype))


def test_a_model_that_cannot_tell_documents_apart_is_refused() -> None:
    bloom = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(
        ConfigError, match=r"BloomForCausalLM cannot tell packed documents apart.*takes no position_ids"
    ):
        check_packing(bloom)


class Leaky(torch.nn.Module):
    """A model that takes positions and looks at every token before, whatever document it is of."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return self.net(input_ids, position_ids=position_ids, attention_mask=torch.ones_like(input_ids))


def test_a_model_that_leaks_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Leaky cannot tell packed documents apart.*by \d\.\de-0\d of the largest"):
        check_packing(Leaky(pretrained("gpt2")))


def test_opt_is_passed_or_refused_by_what_it_does() -> None:
    config = OPTConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, ffn_dim=64,
                       word_embed_proj_dim=32, max_position_embeddings=64)  # fmt: skip
    net = AutoModelForCausalLM.from_config(config).eval()
    ids, positions = torch.tensor([[5, 6, 7, 8, 9, 10]]), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        packed = net(ids, position_ids=positions, use_cache=False).logits[0, 3:]
        alone = net(ids[:, 3:], position_ids=positions[:, 3:], use_cache=False).logits[0]
    if torch.allclose(packed, alone, atol=1e-4):
        check_packing(net)
    else:
        with pytest.raises(ConfigError, match="cannot tell packed documents apart"):
            check_packing(net)


def test_the_first_token_of_a_document_is_not_learned_from_the_one_before() -> None:
    packed, batch = packed_batch(documents(5, 4, 3), 12)
    assert len(packed) == 1
    starts = batch["position_ids"][0] == 0
    assert starts.sum() == 3
    assert batch["labels"][0, starts].eq(IGNORED).all()
    assert batch["labels"][0, ~starts].eq(batch["input_ids"][0, ~starts]).all()


def test_padding_is_a_document_that_is_not_learned() -> None:
    _, batch = packed_batch(documents(8, 3), 8)
    assert batch["position_ids"][1].tolist() == [0, 1, 2, 0, 1, 2, 3, 4]
    assert batch["labels"][1, 3:].eq(IGNORED).all()


def test_bins_hold_everything_once_and_little_air() -> None:
    draw = random.Random(1)
    lengths = [draw.randint(1, 128) for _ in range(2000)]
    rows = bins(lengths, 128)
    assert sorted(at for row in rows for at in row) == [*range(2000)]
    assert max(sum(lengths[at] for at in row) for row in rows) <= 128
    assert len(rows) < 1.02 * sum(lengths) / 128
    assert bins(lengths, 128) == rows
    assert bins([], 8) == []


def test_packing_saves_padding() -> None:
    tok = ready_tokenizer(tokenizer("gpt2"), "CAUSAL_LM")
    writer = FeatureWriter()
    for row, text in enumerate(sentences(200)):
        ids = tok(text)["input_ids"]
        writer.add(row, input_ids=ids, labels=ids, prompt=0)
    features = writer.features()
    assert len(PackedFeatures(features, 64)) * 64 < 1.05 * int(features.lengths.sum())
