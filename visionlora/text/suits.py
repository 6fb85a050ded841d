"""Whether data and model belong together: task, labels, tokenizer, packing."""

from __future__ import annotations

from typing import Any

from pytorch_lightning import Trainer
from torch import nn

from visionlora.errors import ConfigError
from visionlora.text.layout import check_vocabulary
from visionlora.text.packing import check_packing

__all__ = ["check_data"]


def check_data(net: nn.Module, settings: Any, trainer: Trainer) -> None:
    """Raise ConfigError where the data module of a run is for another task, other labels or another tokenizer."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is None or not hasattr(data, "tokenizer"):
        return
    if data.task_type != settings.task_type:
        raise ConfigError(f"the data are for {data.task_type}, the model for {settings.task_type}; give both one task")
    given, known = list(settings.label_names or []), list(data.label_names or [])
    if known and given != known:
        raise ConfigError(f"the data have the labels {known[:8]}, the model {given[:8]}; pass label_names of the data")
    check_vocabulary(data.tokenizer, net.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    _check_padding(net, data.tokenizer)
    _check_record(settings.data, data)
    if getattr(data, "packing", "none") != "none":
        check_packing(net)


def _check_padding(net: nn.Module, tokenizer: Any) -> None:
    config: Any = net.config
    if tokenizer.pad_token_id is not None and _is_settable(config, tokenizer.pad_token_id):
        config.pad_token_id = tokenizer.pad_token_id


def _is_settable(config: Any, pad: int) -> bool:
    """Tell whether the model reads the padding number from its config: GPT-2 and Llama do, to find a text's end."""
    return config.pad_token_id != pad and not config.is_encoder_decoder


def _check_record(recorded: dict[str, Any] | None, data: Any) -> None:
    before, now = (recorded or {}).get("tokenizer"), data.record.get("tokenizer") if hasattr(data, "record") else None
    if before is not None and now is not None and before != now:
        raise ConfigError(f"the adapter was trained with the tokenizer {before}, the data use {now}; use the same one")
