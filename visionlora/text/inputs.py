"""What a model reads of a batch, and whether the labels in it can be counted."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.core.attach import own_class
from visionlora.errors import DataError
from visionlora.text.scores import IGNORED

__all__ = ["Batch", "check_labels", "model_inputs"]

Batch = Mapping[str, Any]
_TARGETS = ("labels", "start_positions", "end_positions")


def model_inputs(net: nn.Module, batch: Batch) -> dict[str, Any]:
    """Return what the model's forward takes of a batch, without the labels; nothing is cached between tokens."""
    accepted = inspect.signature(own_class(net).forward).parameters
    inputs = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k in accepted and k not in _TARGETS}
    if "use_cache" in accepted:
        inputs["use_cache"] = False  # with a cache transformers does not keep packed texts apart
    if "decoder_input_ids" in accepted and "labels" in batch and "decoder_input_ids" not in inputs and _writes(net):
        inputs["decoder_input_ids"] = _shifted_right(batch["labels"], net.config)
    return inputs


def check_labels(batch: Batch, classes: int) -> None:
    """Raise DataError unless every label is a class number: on a GPU a wrong one ends the process without a word."""
    labels = batch["labels"]
    if labels.is_floating_point():
        return
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= classes))]
    if len(wrong):
        shown = ", ".join(map(str, sorted(set(wrong.tolist()))[:5]))
        raise DataError(f"expected labels from 0 to {classes - 1}, got {shown}; label_names must be those of the data")


def _writes(net: nn.Module) -> bool:
    return net.get_output_embeddings() is not None  # type: ignore[operator]


def _shifted_right(labels: Tensor, config: Any) -> Tensor:
    """Return what the decoder reads: the start token, then the labels but for the last."""
    start = config.decoder_start_token_id
    ids = torch.cat([labels.new_full((len(labels), 1), start), labels[:, :-1]], 1)
    return ids.masked_fill(ids == IGNORED, config.pad_token_id)
