"""Short trainings of every task on tiny models, made once and looked at by several tests."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from text_toy import hub
from text_toy_data import LABELS, data, trainer

from visionlora import LoraConfig
from visionlora.text import TextData, TextTask

STRONG = {"initializer_range": 0.2}  # random weights of the usual size hardly change what a tiny model says
SETUPS: dict[str, tuple[str, dict[str, float], int, float]] = {
    "SEQ_CLS": ("bert", {}, 7, 1e-2),
    "TOKEN_CLS": ("distilbert", {"initializer_range": 0.1}, 4, 1e-2),
    "QUESTION_ANS": ("bert", {"initializer_range": 0.1}, 12, 5e-3),
    "CAUSAL_LM": ("llama", STRONG, 8, 1e-2),
    "SEQ_2_SEQ_LM": ("t5", {"initializer_factor": 2.0, "dropout_rate": 0.0}, 15, 1e-2),
}
"""Task -> family, sizes, epochs, learning rate."""
TASKS = list(SETUPS)


@dataclass
class Run:
    """A finished training."""

    folder: Path
    base: Path
    module: TextTask
    data: TextData
    before: dict[str, float]
    after: dict[str, float]


def task(base: Path, task_type: str, **settings: Any) -> TextTask:
    """Return a task on a saved tiny model."""
    given = {"label_names": LABELS.get(task_type), "max_new_tokens": 4, "lora": LoraConfig(r=4)}
    return TextTask(str(base), task_type, **{**given, **settings})  # type: ignore[arg-type]


@cache
def trained(task_type: str, mode: str = "lora") -> Run:
    """Return a training that was done once for all tests; leave it as it is."""
    family, sizes, epochs, lr = SETUPS[task_type]
    folder = Path(tempfile.mkdtemp(prefix="visionlora-test-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    base, texts = hub(folder / "base", family, **sizes), None
    torch.manual_seed(0)
    texts = data(task_type, base)
    module = task(base, task_type, mode=mode, lr=lr)
    before = trainer(folder).validate(module, texts, verbose=False)[0]
    trainer(folder, max_epochs=epochs, limit_val_batches=0).fit(module, texts)
    after = trainer(folder).validate(module, texts, verbose=False)[0]
    module.save_adapter(folder / "saved")
    return Run(folder, base, module.eval(), texts, before, after)


def logits(run: Run, net: torch.nn.Module | None = None) -> torch.Tensor:
    """Return what a model says to the validation set, padded batches end to end."""
    module = run.module
    own, module.net = module.net, net if net is not None else module.net
    try:
        with torch.no_grad():
            return torch.cat([module.eval()(batch).flatten(1) for batch in run.data.val_dataloader()][:1])
    finally:
        module.net = own
