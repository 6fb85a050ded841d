"""Token numbers of many examples in few flat tensors, as the data set that loaders draw from."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["FeatureWriter", "Features"]

ENDS = ".ends"
"""Suffix of the tensor that says where each list of a ragged column ends."""


class Features(Dataset[dict[str, Any]]):
    """Features by place, each a dict of lists and numbers, as transformers' collators take them.

    tensors holds ragged columns as flat values with their ends beside them (input_ids, input_ids.ends), and columns
    with one number a feature (row, label) as they are.
    """

    def __init__(self, tensors: Mapping[str, Tensor], counts: Mapping[str, int] | None = None) -> None:
        self.tensors = dict(tensors)
        self.counts = dict(counts or {})
        """What was cut, split and dropped while they were made."""
        self._lists = [name for name in self.tensors if name + ENDS in self.tensors]
        self._numbers = [n for n in self.tensors if n not in self._lists and not n.endswith(ENDS)]

    def __len__(self) -> int:
        return len(self.tensors["row"])

    def __getitem__(self, at: int) -> dict[str, Any]:
        found: dict[str, Any] = {name: self._list(name, at) for name in self._lists}
        return found | {name: self.tensors[name][at].item() for name in self._numbers}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[at] for at in range(len(self)))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each feature."""
        ends = self.tensors["input_ids" + ENDS]
        return ends.diff(prepend=ends.new_zeros(1))

    def _list(self, name: str, at: int) -> list[int]:
        ends = self.tensors[name + ENDS]
        start = int(ends[at - 1]) if at else 0
        values: list[int] = self.tensors[name][start : int(ends[at])].tolist()
        return values


class FeatureWriter:
    """Collects features in compact arrays."""

    def __init__(self) -> None:
        self._lists: dict[str, array[int]] = {}
        self._ends: dict[str, array[int]] = {}
        self._numbers: dict[str, array[float]] = {}
        self.counts: dict[str, int] = {}

    def add(self, row: int, **columns: Sequence[int] | float) -> None:
        """Append one feature of a row; every feature has the same columns."""
        for name, value in {"row": row, **columns}.items():
            if isinstance(value, (int, float)):
                self._numbers.setdefault(name, array("d" if isinstance(value, float) else "q")).append(value)
            else:
                values = self._lists.setdefault(name, array("i"))
                values.extend(value)
                self._ends.setdefault(name, array("q")).append(len(values))

    def count(self, what: str, by: int = 1) -> None:
        """Add to one of the counts."""
        self.counts[what] = self.counts.get(what, 0) + by

    def features(self) -> Features:
        """Return what was collected."""
        tensors: dict[str, Tensor] = {"row": torch.zeros(0, dtype=torch.int64)}
        for name, values in self._lists.items():
            tensors[name] = torch.from_numpy(np.array(values, dtype=np.int32))
            tensors[name + ENDS] = torch.from_numpy(np.array(self._ends[name], dtype=np.int64))
        for name, found in self._numbers.items():
            kind = np.float32 if found.typecode == "d" else np.int64
            tensors[name] = torch.from_numpy(np.array(found, dtype=kind))
        return Features(tensors, self.counts)
