"""One backbone, several tasks: models that share their layers, each with its own adapter and head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from visionlora.adapt import activate
from visionlora.config import did_you_mean
from visionlora.errors import BaseMismatchError, StateError
from visionlora.io import load_adapter, read_adapter
from visionlora.io.base import check_base
from visionlora.merging import base_state_dict
from visionlora.text.loading import build_base, place_of, read_record

__all__ = ["TaskModels"]


class TaskModels(nn.Module):
    """Adapters of several tasks on one backbone, which is held in memory once.

    >>> tasks = TaskModels(base="bert-base-uncased")  # doctest: +SKIP
    >>> tasks.add("adapters/sentiment"); tasks.add("adapters/names", name="ner")  # doctest: +SKIP
    >>> tasks("ner", input_ids=ids, attention_mask=mask).logits  # doctest: +SKIP
    """

    def __init__(self, *, base: str | Path | None = None) -> None:
        super().__init__()
        self.base = base
        self.models = nn.ModuleDict()

    def add(self, directory: str | Path, *, name: str | None = None) -> str:
        """Load the adapter of a directory with the model of its task, and return its name.

        Raises BaseMismatchError where its backbone is not the one held already; then nothing is added.
        """
        directory = Path(directory)
        record = read_record(directory)
        name = read_adapter(directory).record["name"] if name is None else name
        if name in self.models:
            raise StateError(f"a task {name!r} is there already; give another name")
        model = build_base(directory, record, place_of(directory, record, self.base))
        check_base(model, record["base"])
        if len(self.models):
            _share(next(iter(self.models.values())), model, directory)
        load_adapter(model, directory, name=name, allow_other_base=True)  # checked above, before layers were shared
        model.label_names = record["classes"]
        self.models[name] = model.eval()
        return name

    def forward(self, name: str, **inputs: Any) -> Any:
        """Return what the model of a task gives, with its own adapter and head."""
        return self.task(name)(**inputs)

    def task(self, name: str) -> nn.Module:
        """Return the model of a task, its adapter active: the others' are off until they are asked for."""
        if name not in self.models:
            known = list(self.models)
            raise StateError(f"no task {name!r}{did_you_mean(name, known)}; there are {', '.join(known) or 'none'}")
        return activate(self.models[name], name)


def _share(first: nn.Module, model: nn.Module, directory: Path) -> None:
    """Change the model: its backbone's layers become those of the first one, where their weights are the same."""
    held, own = first.base_model, model.base_model
    stored, mine = base_state_dict(held), own.state_dict()  # type: ignore[arg-type, union-attr]
    for name, child in list(own.named_children()):  # type: ignore[union-attr]
        keys = [key for key in mine if key.startswith(f"{name}.")]
        twin = held._modules.get(name)  # type: ignore[union-attr]
        if twin is None or not keys:
            continue
        same = type(twin) is type(child) and all(k in stored and torch.equal(mine[k], stored[k]) for k in keys)
        if not same and name != "pooler":  # which weights may lack, so that it belongs to the head
            raise BaseMismatchError(f"{directory} was trained on other weights of {name} than the tasks held already")
        if same:
            setattr(own, name, twin)
