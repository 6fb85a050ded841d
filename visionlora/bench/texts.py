"""Language models as workloads: shapes of transformers' default configs, random weights, random tokens."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionlora.bench.settings import Settings
from visionlora.bench.workload import Workload, steady
from visionlora.errors import ConfigError

TEXTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "use_cache": False},
    ),
    "bert-base": (
        "BertConfig",
        "BertForSequenceClassification",
        {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    ),
    "t5-small": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"dropout_rate": 0.0, "use_cache": False, "decoder_start_token_id": 0},
    ),
}
"""Name -> config and model of transformers, and what the config sets beside its defaults, which have the shape."""


def text_workload(name: str, settings: Settings, **sizes: Any) -> Workload:
    """Return a language model with random weights, random texts of `size` tokens and the labels of its task.

    gpt2 writes on, bert-base tells two classes apart, t5-small writes a text for a text; sizes change the config.
    Raises ConfigError: no transformers, texts longer than the model reads.
    """
    transformers = _transformers()
    config_name, model_name, told = TEXTS[name]
    config = getattr(transformers, config_name)(**told, **sizes)
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and settings.size > most:
        raise ConfigError(f"{name} reads up to {most} tokens, --size is {settings.size}")
    torch.manual_seed(settings.seed)
    model = steady(getattr(transformers, model_name)(config)).to(settings.device)
    ids, labels = (
        torch.randint(config.vocab_size, (settings.batch, settings.size), device=settings.device) for _ in range(2)
    )
    if name == "t5-small":
        return Workload(name, model, (ids, torch.ones_like(ids), ids.roll(1, 0)), _of_tokens(labels))
    if name == "bert-base":
        return Workload(name, model, (ids,), lambda out: F.cross_entropy(out.logits, labels[:, 0] % 2))
    return Workload(name, model, (ids,), _of_tokens(labels))


def _of_tokens(labels: Tensor) -> Callable[[Any], Tensor]:
    return lambda out: F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ModuleNotFoundError:
        raise ConfigError('language models need transformers: pip install "visionlora[text]"') from None
