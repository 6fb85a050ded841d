"""Rows of small language tasks that can be learned in seconds, as the data module reads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint
from text_toy import BAD, GOOD, NAMES, PLACES

from visionlora.text import TextData

LABELS = {"SEQ_CLS": ["bad", "good"], "TOKEN_CLS": ["B-LOC", "B-PER", "O"]}


def rows(task: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows of a task."""
    draw = random.Random(seed)
    return [_ROW[task](draw) for _ in range(count)]


def _sentiment(draw: random.Random) -> dict[str, Any]:
    good = draw.random() < 0.5
    thing = draw.choice(("film", "book", "song"))
    return {"text": f"the {thing} was {draw.choice(GOOD if good else BAD)}", "label": "good" if good else "bad"}


def _entities(draw: random.Random) -> dict[str, Any]:
    words = [draw.choice(NAMES), draw.choice(("sat", "ran", "lives")), "in", draw.choice(PLACES)]
    tags = ["B-PER", "O", "O", "B-LOC"]
    if draw.random() < 0.5:
        words, tags = ["the", *words[1:]], ["O", *tags[1:]]
    return {"tokens": words, "tags": tags}


def _question(draw: random.Random) -> dict[str, Any]:
    first, second = draw.sample(NAMES, 2)
    here, there = draw.sample(PLACES, 2)
    context = f"{first} lives in {here} and {second} lives in {there}"
    asked, answer = draw.choice(((first, here), (second, there)))
    start = context.index(answer)
    return {
        "question": f"where is {asked}",
        "context": context,
        "answers": {"text": [answer], "answer_start": [start]},
    }


def _prompt(draw: random.Random) -> dict[str, Any]:
    word = draw.choice((*NAMES, *PLACES))
    return {"prompt": f"the {word} is", "response": "red" if word in NAMES else "blue"}


def _rewritten(draw: random.Random) -> dict[str, Any]:
    word = draw.choice((*NAMES, *PLACES))
    return {"source": f"the {word}", "target": "red" if word in NAMES else "blue"}


_ROW = {
    "SEQ_CLS": _sentiment,
    "TOKEN_CLS": _entities,
    "QUESTION_ANS": _question,
    "CAUSAL_LM": _prompt,
    "SEQ_2_SEQ_LM": _rewritten,
}


def data(task: str, folder: Path, count: int = 64, batch_size: int = 16, **settings: Any) -> TextData:
    """Return the data module of a task for the tokenizer of a folder."""
    parts = {"train": rows(task, count), "validation": rows(task, 24, 1), "test": rows(task, 24, 2)}
    given = {"model_name": str(folder), "task_type": task, "max_length": 64, "cache": "none", "batch_size": batch_size}
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        given["max_target_length"] = 16
    return TextData.from_rows(parts, **{**given, "seed": 0, **settings})


def trainer(path: Path, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in options.get("callbacks", ())),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    settings = {"accelerator": "cpu", "devices": 1, "max_epochs": 3, **quiet, **options}
    return pl.Trainer(default_root_dir=path, **settings)
