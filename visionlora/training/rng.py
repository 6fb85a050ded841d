"""The random number generators of a process, as plain data."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def rng_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's global generators; numbers, lists and tensors only."""
    version, words, gauss = random.getstate()
    generator: Any = np.random.get_state(legacy=False)
    keys = torch.from_numpy(generator["state"]["key"].astype(np.int64))
    state: dict[str, Any] = {
        "python": [version, list(words), gauss],
        "numpy": [keys, int(generator["state"]["pos"]), int(generator["has_gauss"]), float(generator["gauss"])],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Change the global generators to a state that rng_state returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
