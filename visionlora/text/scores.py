"""What scores of every task have in common: a count, a result, and a look at the predictions before they count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from visionlora.errors import DataError, NonFiniteError

__all__ = ["IGNORED", "Result", "Scores", "checked", "from_all"]

IGNORED = -100
"""Label of a token that does not count, as transformers' collators write it."""


@dataclass(frozen=True)
class Result:
    """What a set of examples says about a model."""

    count: int
    """Texts; for TOKEN_CLS and the two language models tokens, for QUESTION_ANS questions."""
    values: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """Return the numbers that are logged."""
        return self.values


class Scores(ABC):
    """Running scores of one set of examples, reduced over all processes when computed (unless not `shared`)."""

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.count = 0

    @abstractmethod
    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        """Count a batch. Raises NonFiniteError for NaN or infinite predictions, which torchmetrics would score."""

    @abstractmethod
    def values(self) -> dict[str, float]:
        """Return the scores so far."""

    def compute(self) -> Result:
        """Return the result so far. Raises DataError where nothing was counted."""
        count = sum(from_all([self.count])) if self.shared else self.count
        if not count:
            raise DataError("no example was scored; the set is empty or limit_*_batches is 0")
        return Result(count, self.values())


def checked(logits: Tensor) -> Tensor:
    """Return predictions in float32. Raises NonFiniteError unless every one of them is a finite number."""
    if not torch.isfinite(logits).all():
        bad = (~torch.isfinite(logits).flatten(1).all(-1)).sum()
        raise NonFiniteError(
            f"{int(bad)} of {len(logits)} predictions of a batch are NaN or infinite; the weights are damaged, or the "
            "precision is too low (try 32-true or bf16-mixed)"
        )
    return logits.float()


def from_all(items: list[Any]) -> list[Any]:
    """Return what all processes hold together."""
    if not (dist.is_available() and dist.is_initialized()):
        return items
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
