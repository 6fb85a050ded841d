"""One step of a language model by one process or several, and its gradients; test_text_module.py runs this."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch
from text_runs import task
from text_toy import sentences
from text_toy_data import trainer

from visionlora.text import TextData


def gradients(base: Path, folder: Path, batch_size: int, accumulated: int = 1, **options: object) -> list[torch.Tensor]:
    """Return the gradients of a step over 8 texts of three to nine words: batches hold different numbers of tokens."""
    module = task(base, "CAUSAL_LM")
    with torch.no_grad():
        for parameter in module.trainable_groups()["B"]:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    texts = TextData.from_rows(
        {"train": [{"text": text} for text in sentences(8)]},
        model_name=str(base), task_type="CAUSAL_LM", max_length=64, cache="none", batch_size=batch_size, seed=0,
        val_fraction=0.0,
    )  # fmt: skip
    settings = {"max_steps": 1, "limit_val_batches": 0, "accumulate_grad_batches": accumulated, **options}
    trainer(folder, **settings).fit(module, texts)
    return [p.grad.clone() for group in module.trainable_groups().values() for p in group]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    base, out = map(Path, sys.argv[1:])
    found = gradients(base, out.parent, 2, 2, devices=2, strategy="ddp")
    if os.environ["RANK"] == "0":
        torch.save(found, out)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # a process that ends with its connections open may abort
