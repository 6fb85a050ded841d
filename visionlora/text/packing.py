"""Several documents in one row without one seeing another: positions restart, and no attention mask is given.

transformers tells documents apart by positions that restart, and only where no attention mask and no cache is given
(masking_utils of 5.x). With a mask of ones, or with a cache, they see each other, without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from visionlora.errors import ConfigError
from visionlora.text.features import Features
from visionlora.text.settings import IGNORED

__all__ = ["PackedFeatures", "Packing", "bins", "check_packing", "collate_packed"]

Packing = Literal["none", "documents"]
LEAK = 1e-5
"""Share of the largest logit by which a document may change when another one in its row does."""
NEAR = 5e-2
"""Share of the largest logit by which a packed document may differ from a lone one, in any precision."""


def bins(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Return the places of lengths in rows of at most room: longest first, into the fullest row with space."""
    rows: list[list[int]] = []
    by_space: dict[int, list[int]] = {}
    spaces = 0  # bit n: there is a row with n left
    for at in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        n = lengths[at]
        fitting = spaces >> n
        if fitting:
            space = n + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            spaces ^= 0 if by_space[space] else 1 << space
        else:
            rows.append([])
            row, space = len(rows) - 1, max(room, n)
        rows[row].append(at)
        left = space - n
        by_space.setdefault(left, []).append(row)
        spaces |= 1 << left
    return rows


class PackedFeatures(Dataset[dict[str, Any]]):
    """Rows of whole documents (or pieces of long ones), each as input_ids, position_ids and labels."""

    def __init__(self, features: Features, room: int) -> None:
        self.features = features
        self.rows = bins(features.lengths.tolist(), room)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, list[int]]:
        row: dict[str, list[int]] = {"input_ids": [], "position_ids": [], "labels": []}
        for place in self.rows[at]:
            item = self.features[place]
            row["input_ids"] += item["input_ids"]
            row["position_ids"] += range(len(item["input_ids"]))
            # the token before belongs to another document: it must not learn to write this one
            row["labels"] += [IGNORED, *item["labels"][1:]]
        return row


def collate_packed(rows: Sequence[dict[str, list[int]]], padding: int) -> dict[str, Tensor]:
    """Return the rows as tensors (rows, tokens); padding is a document of its own that nothing is learned of."""
    width = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, values: Sequence[int]) -> Tensor:
        return torch.tensor([[*row[name], *values[: width - len(row[name])]] for row in rows])

    return {
        "input_ids": filled("input_ids", [padding] * width),
        "position_ids": filled("position_ids", range(width)),
        "labels": filled("labels", [IGNORED] * width),
    }


@torch.no_grad()
def check_packing(net: nn.Module) -> None:
    """Raise ConfigError if documents in one row see each other in a causal model, or do not begin at its start.

    Three forward passes of seven tokens: the second document must not change with the first, and must be near what
    it is alone.
    """
    kind = type(net).__name__
    refusal = f'{kind} cannot tell packed documents apart, so they would see each other: set packing to "none"'
    if "position_ids" not in signature(net.forward).parameters:
        raise ConfigError(f"{refusal} (it takes no position_ids)")
    device = next(net.parameters()).device
    first, other, second = ([1, 2, 3], [4, 5, 6], [7, 8, 9, 10])
    positions = [*range(len(first)), *range(len(second))]
    training = net.training
    net.eval()
    try:
        packed, changed = (_logits(net, head + second, positions, device)[len(first) :] for head in (first, other))
        alone = _logits(net, second, [*range(len(second))], device)
    finally:
        net.train(training)
    scale = float(alone.abs().max())
    leak, shift = float((packed - changed).abs().max()) / scale, float((packed - alone).abs().max()) / scale
    if not (leak <= LEAK and shift <= NEAR):
        raise ConfigError(f"{refusal} (by {leak:.1e} of the largest logit; placed elsewhere by {shift:.1e})")


def _logits(net: nn.Module, ids: list[int], positions: list[int], device: torch.device) -> Tensor:
    at = {"input_ids": ids, "position_ids": positions}
    logits: Tensor = net(**{k: torch.tensor([v], device=device) for k, v in at.items()}, use_cache=False).logits
    return logits[0].float()
