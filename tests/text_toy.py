"""Tiny language models with their tokenizers, made on the fly and saved like folders of the hub: no network."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

GOOD = ("good", "fine", "great", "nice")
BAD = ("bad", "awful", "poor", "dull")
NAMES = ("anna", "bob", "carla", "dan")
PLACES = ("paris", "rome", "oslo", "lima")
WORDS = (
    *("the", "a", "cat", "dog", "bird", "sat", "ran", "flew", "on", "in", "under", "red", "blue", "green", "house"),
    *("tree", "film", "book", "song", "is", "was", "not", "very", "who", "where", "what", "lives", "and", "to"),
    *(*GOOD, *BAD, *NAMES, *PLACES),
)

_TOKENIZERS = {
    "gpt2": "GPT2Tokenizer",
    "bert": "BertTokenizer",
    "distilbert": "DistilBertTokenizer",
    "roberta": "RobertaTokenizer",
    "modernbert": "BertTokenizer",
    "t5": "T5Tokenizer",
    "llama": "LlamaTokenizer",
    "qwen2": "Qwen2Tokenizer",
}
_PRETRAINED = {
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertForPreTraining",
    "distilbert": "DistilBertForMaskedLM",
    "roberta": "RobertaForMaskedLM",
    "modernbert": "ModernBertForMaskedLM",
    "t5": "T5ForConditionalGeneration",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
FAMILIES = tuple(_TOKENIZERS)
ENCODERS = ("bert", "distilbert", "roberta", "modernbert")
DECODERS = ("gpt2", "llama", "qwen2")

_WIDE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
_SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    "bert": {**_WIDE, "max_position_embeddings": 128},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_position_embeddings": 128},
    "roberta": {**_WIDE, "max_position_embeddings": 130, "type_vocab_size": 1},
    "modernbert": {**_WIDE, "max_position_embeddings": 128, "local_attention": 16},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    "llama": {**_WIDE, "num_key_value_heads": 1, "max_position_embeddings": 128},
    "qwen2": {**_WIDE, "num_key_value_heads": 1, "max_position_embeddings": 128},
}


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return sentences of known words."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 9))) for _ in range(count)]


def tokenizer(family: str, *, vocab_size: int = 400) -> PreTrainedTokenizerBase:
    """Return a fresh tokenizer that knows the words; GPT-2's and Llama's have no padding token, as on the hub."""
    return deepcopy(_trained(family, vocab_size))


def config(family: str, tok: PreTrainedTokenizerBase, **sizes: Any) -> PretrainedConfig:
    """Return the config of a model of 32 channels and two layers for a tokenizer."""
    ids = {f"{name}_token_id": getattr(tok, f"{name}_token_id") for name in ("pad", "bos", "eos", "cls", "sep")}
    start = {"decoder_start_token_id": tok.pad_token_id} if family == "t5" else {}
    return AutoConfig.for_model(family, vocab_size=len(tok), **{**_SIZES[family], **ids, **start, **sizes})


def pretrained(
    family: str, tok: PreTrainedTokenizerBase | None = None, *, seed: int = 0, **sizes: Any
) -> PreTrainedModel:
    """Return a model as it leaves pretraining (random numbers in it): BertForPreTraining, GPT2LMHeadModel ..."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, _PRETRAINED[family])(config(family, tok or tokenizer(family), **sizes)).eval()


def hub(folder: Path, family: str, *, seed: int = 0, **sizes: Any) -> Path:
    """Save the pretrained model and its tokenizer to a folder that from_pretrained reads; return the folder."""
    tok = tokenizer(family)
    pretrained(family, tok, seed=seed, **sizes).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@cache
def _trained(family: str, vocab_size: int) -> PreTrainedTokenizerBase:
    blank = getattr(transformers, _TOKENIZERS[family])()
    corpus = [*sentences(300), *WORDS]
    tok = blank.train_new_from_iterator(corpus, vocab_size=vocab_size, show_progress=False)
    tok.model_max_length = 128
    if family == "modernbert":  # its own class of the hub makes no token types, which the model does not take
        tok.model_input_names = ["input_ids", "attention_mask"]
    return tok
