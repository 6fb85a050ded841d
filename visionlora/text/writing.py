"""Texts that a language model writes, one token after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from visionlora.text.inputs import Batch
from visionlora.text.tasks import CausalLanguage

__all__ = ["write"]


@torch.no_grad()
def write(
    net: nn.Module,
    task: CausalLanguage,
    batch: Batch,
    tokenizer: Any,
    *,
    most: int,
    beams: int = 1,
    predicting: bool = False,
) -> list[str] | None:
    """Return what the model writes for each prompt of a batch, without sampling; None where there are no prompts."""
    prompt = task.prompt(batch, predicting=predicting)
    if prompt is None:
        return None
    ids, mask = prompt
    training = net.training
    net.eval()
    try:
        tokens = net.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            num_beams=beams,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    finally:
        net.train(training)
    texts: list[str] = tokenizer.batch_decode(task.written(tokens, ids), skip_special_tokens=True)
    return [text.strip() for text in texts]
