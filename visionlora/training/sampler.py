"""A sampler whose order is a pure function of seed and epoch, so that a run can stop and go on anywhere in an epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
from torch.utils.data import DistributedSampler

from visionlora.errors import ConfigError

SEED_STRIDE = 1_000_003  # a prime, so that (seed, epoch) and (seed + 1, epoch - 1) do not share an order


class ResumableSampler(DistributedSampler[int]):
    """Yield the indices of `size` samples in an order that depends on seed and epoch alone.

    `keys="unrolled"` yields `epoch * size + index` instead of `index`: a dataset that takes `key % size` as the index
    and seeds its random transforms with the key gives the same pixels whichever worker or resumed run asks.

    Ranks take turns (rank, rank + world, ...), so the k-th global batch is the same set of samples for every number of
    devices; a short last round is filled from the beginning. Lightning leaves a DistributedSampler alone.
    """

    def __init__(
        self, size: int, *, seed: int = 0, shuffle: bool = True, keys: Literal["index", "unrolled"] = "index"
    ) -> None:
        if size < 1:
            raise ConfigError(f"a sampler needs at least one sample, got size {size}")
        distributed = dist.is_available() and dist.is_initialized()
        replicas, rank = (dist.get_world_size(), dist.get_rank()) if distributed else (1, 0)
        super().__init__(range(size), num_replicas=replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size, self.keys = size, keys
        self.position = 0
        """Samples of this rank drawn by the newest iteration."""
        self._start = 0

    def order(self, epoch: int) -> list[int]:
        """Return the indices of this rank in an epoch; the same for every call, process and machine."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + epoch)
            indices = torch.randperm(self.size, generator=generator).tolist()
        else:
            indices = list(range(self.size))
        rounds = -(-self.total_size // self.size)
        return (indices * rounds)[self.rank : self.total_size : self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        start, self._start = self._start, 0
        self.position = start
        offset = self.epoch * self.size if self.keys == "unrolled" else 0
        return self._draw(self.order(self.epoch)[start:], offset)

    def _draw(self, indices: list[int], offset: int) -> Iterator[int]:
        for index in indices:
            self.position += 1
            yield offset + index

    def set_epoch(self, epoch: int) -> None:
        """Change the epoch; another epoch starts at its first sample."""
        if epoch != self.epoch:
            self.epoch, self._start = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Return where this sampler stands. With workers that read ahead the position is ahead of what was consumed."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Change the epoch and the place in it where the next iteration, and only that, starts."""
        self.epoch, self.position, self._start = state["epoch"], state["position"], state["position"]
