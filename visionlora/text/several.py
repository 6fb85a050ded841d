"""One backbone, several tasks: models that share their layers, each with its own adapter and head."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.adapt import activate
from visionlora.config import did_you_mean
from visionlora.errors import BaseMismatchError, StateError
from visionlora.io import load_adapter, read_adapter
from visionlora.io.base import check_base
from visionlora.merging import base_state_dict
from visionlora.routing import route_all
from visionlora.text.extras import need
from visionlora.text.loading import build_base, place_of, read_record

__all__ = ["TaskModels"]


class TaskModels(nn.Module):
    """Adapters of several tasks on one backbone, which is held in memory once.

    >>> tasks = TaskModels(base="bert-base-uncased")  # doctest: +SKIP
    >>> tasks.add("adapters/sentiment"); tasks.add("adapters/names", name="ner")  # doctest: +SKIP
    >>> tasks("ner", input_ids=ids, attention_mask=mask).logits  # doctest: +SKIP
    >>> tasks.mixed(["ner", "sentiment", "ner"], input_ids=ids)["ner"].logits  # two rows  # doctest: +SKIP
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

    def mixed(self, names: Sequence[str], **inputs: Tensor) -> dict[str, Any]:
        """Return what each task gives for its samples of a batch, in their order; names tells the task of each sample.

        The batch goes through the backbone once, each sample with its task's adapter; then every head reads its own.
        """
        models = {name: self.task(name) for name in dict.fromkeys(names)}
        shapes = {key: tuple(t.shape) for key, t in inputs.items()}
        if not names or any(shape[0] != len(names) for shape in shapes.values()):
            raise StateError(f"{len(names)} tasks are named, one a sample; the inputs have the shapes {shapes}")
        first = next(iter(models.values()))
        if first.config.is_encoder_decoder:  # type: ignore[union-attr]
            raise StateError(
                "tasks are mixed in models that read a text once, not in encoder-decoders; call one a batch"
            )
        with route_all(list(models.values()), names):
            features = first.base_model(**inputs).last_hidden_state  # type: ignore[operator, union-attr]
        rows = {name: [row for row, own in enumerate(names) if own == name] for name in models}
        return {
            name: _headed(model, features[rows[name]], {key: t[rows[name]] for key, t in inputs.items()})
            for name, model in models.items()
        }

    def task(self, name: str) -> nn.Module:
        """Return the model of a task, its adapter active: the others' are off until they are asked for."""
        if name not in self.models:
            known = list(self.models)
            raise StateError(f"no task {name!r}{did_you_mean(name, known)}; there are {', '.join(known) or 'none'}")
        return activate(self.models[name], name)


class _Given(nn.Module):
    """Stands in for a backbone whose output is known."""

    def __init__(self, backbone: nn.Module, features: Tensor) -> None:
        super().__init__()
        self.pooler: nn.Module | None = getattr(backbone, "pooler", None)
        self.features = features

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        pooled = self.pooler(self.features) if self.pooler is not None else None
        kind = need("transformers.modeling_outputs").BaseModelOutputWithPoolingAndCrossAttentions
        return kind(last_hidden_state=self.features, pooler_output=pooled)


def _headed(model: nn.Module, features: Tensor, inputs: dict[str, Tensor]) -> Any:
    """Return what a model makes of the output of its backbone; the model is left as it is."""
    view, prefix = copy(model), model.base_model_prefix
    view._modules = {**model._modules, prefix: _Given(model.base_model, features)}  # type: ignore[dict-item, arg-type]
    return view(**inputs)


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
