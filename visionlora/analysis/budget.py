"""From a budget of parameters, memory or time to the layers that are adapted, their rank, and how memory is saved."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from visionlora.adapt import remove
from visionlora.analysis.layer import Setting
from visionlora.analysis.model import ModelCost, hollow_copy, model_cost
from visionlora.analysis.speed import Speed, calibrated
from visionlora.config import LoraConfig
from visionlora.core.blocks import can_checkpoint
from visionlora.core.delta import Delta, Value
from visionlora.errors import ConfigError
from visionlora.plan import build, make_plan
from visionlora.registry import adapted_layers
from visionlora.targets import select

MOST = 64
"""The largest rank that a budget of parameters is spent on."""
MIB = 2**20


@dataclass(frozen=True)
class Budget:
    """What a training run may cost at most; None: as much as it takes."""

    parameters: int | None = None
    """Trained numbers, the head's too."""
    memory: int | None = None
    """Bytes of ModelCost.memory: weights, AdamW's moments, the peak of activations and gradients."""
    milliseconds: float | None = None
    """Estimated time of a forward and backward pass on this machine."""

    def __post_init__(self) -> None:
        limits = {"parameters": self.parameters, "memory": self.memory, "milliseconds": self.milliseconds}
        if all(limit is None for limit in limits.values()):
            raise ConfigError("a budget needs a limit: parameters, memory or milliseconds")
        for name, limit in limits.items():
            if limit is not None and limit <= 0:
                raise ConfigError(f"{name} must be above 0, got {limit}")


class Saving(NamedTuple):
    """How memory is saved."""

    lean: bool = False
    """A frozen: less accuracy."""
    checkpoint: bool = False
    """Blocks computed again: more time."""


@dataclass(frozen=True)
class Proposal:
    """An adapter that fits a budget."""

    config: LoraConfig
    saving: Saving
    blocks: tuple[int, int]
    """How many of how many blocks are adapted: the last ones of the model."""
    cost: ModelCost
    milliseconds: float | None
    """Estimated; None where no time was asked for."""


def plan(
    model: nn.Module,
    budget: Budget,
    *,
    config: LoraConfig | None = None,
    setting: Setting | None = None,
    speed: Speed | None = None,
) -> Proposal:
    """Return the largest adapter in a budget, as the config means it otherwise; the model stays as it is.

    A budget of parameters is spent on rank, 64 at most, in all layers the config takes. Where memory or time are short,
    what costs least accuracy is tried first: blocks computed again, then A frozen (variant "fa"), then the last blocks
    alone. The strength lora_alpha / r stays. Raises ConfigError with the smallest that works where nothing fits.
    """
    if budget.milliseconds is not None and speed is None:
        speed = calibrated((setting or Setting()).device)
    search = _Search(model, budget, config or LoraConfig(), setting or Setting(), speed)
    for saving in search.savings:
        if found := search.fitting(search.count, saving):
            return found
    fewer = _largest(search.count - 1, search.any_fits)
    found = next((p for saving in search.savings if (p := search.fitting(fewer, saving))), None) if fewer else None
    if found is None:
        raise ConfigError(search.smallest())
    return found


def _largest(high: int, fits: object) -> int:
    """Return the largest number up to `high` that fits, where every smaller one fits too; 0 where none does."""
    assert callable(fits)
    low = 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


class _Search:
    def __init__(
        self, model: nn.Module, budget: Budget, config: LoraConfig, setting: Setting, speed: Speed | None
    ) -> None:
        self.budget, self.config, self.setting, self.speed = budget, config, setting, speed
        with FakeTensorMode(allow_non_fake_inputs=True):
            self.net = hollow_copy(model)
            if adapted_layers(self.net):
                remove(self.net)
            names = [site.name for site in make_plan(self.net, config).sites]
        self.blocks = list(dict.fromkeys(map(_block, names)))
        self._found: dict[tuple[int, Saving], Proposal] = {}

    @property
    def count(self) -> int:
        return len(self.blocks)

    @cached_property
    def savings(self) -> list[Saving]:
        again = self.budget.memory is not None and can_checkpoint(self.net)
        lean = self.config.variant == "lora" and self.config.init_lora_weights not in ("pissa", "olora", "soma")
        wanted = self.budget.memory is not None or self.budget.milliseconds is not None
        lean_too = (False, True) if lean and wanted else (False,)
        return [Saving(lean, checkpoint) for lean in lean_too for checkpoint in ((False, True) if again else (False,))]

    def any_fits(self, count: int) -> bool:
        return any(self.fitting(count, saving) for saving in reversed(self.savings))

    def fitting(self, count: int, saving: Saving) -> Proposal | None:
        """Return the adapter of the last `count` blocks if it fits the budget."""
        rank = self._rank(count, saving)
        if not rank:
            return None
        if (count, saving) not in self._found:
            self._found[count, saving] = self._proposal(count, saving, rank)
        proposal, budget = self._found[count, saving], self.budget
        small = budget.memory is None or proposal.cost.memory <= budget.memory
        quick = budget.milliseconds is None or (proposal.milliseconds or 0) <= budget.milliseconds
        return proposal if small and quick else None

    def smallest(self) -> str:
        """Return the message that nothing fits."""
        least = [self._proposal(1, saving, 1) for saving in self.savings]
        needs = []
        if self.budget.parameters is not None:
            needs.append(f"--parameters {min(p.cost.trained for p in least)}")
        if self.budget.memory is not None:
            needs.append(f"--memory {-(-min(p.cost.memory for p in least) // MIB)}MiB")
        if self.budget.milliseconds is not None:
            needs.append(f"--milliseconds {min(p.milliseconds or 0 for p in least):.1f}")
        what = f"{self.blocks[-1]} alone at rank 1, head trained in full"
        smaller = "; a smaller --batch or --size takes less" if self.budget.parameters is None else ""
        return f"no adapter fits this budget; the smallest ({what}) needs {' '.join(needs)}{smaller}"

    def _rank(self, count: int, saving: Saving) -> int:
        """Return the rank that the budget of parameters allows, 0 for none; without one that of the config."""
        limit = self.budget.parameters
        if limit is None:
            return self.config.r
        sites = select(self.net, self._config(count, saving, 1))
        most = min(MOST, max((site.geometry.max_rank for site in sites), default=0))
        return _largest(most, lambda rank: self._trained(self._config(count, saving, rank)) <= limit)

    def _trained(self, config: LoraConfig) -> int:
        with FakeTensorMode(allow_non_fake_inputs=True):
            changes = build(self.net, make_plan(self.net, config))
        return sum(
            parameter.numel()
            for own in changes.values()
            for change in own.values()
            if isinstance(change, (Delta, Value))
            for parameter in change.parameters()
        )

    def _proposal(self, count: int, saving: Saving, rank: int) -> Proposal:
        config = self._config(count, saving, rank)
        cost = model_cost(self.net, self.setting, config=config, checkpoint=saving.checkpoint)
        time = None if self.speed is None else cost.milliseconds(self.speed)
        return Proposal(config, saving, (count, self.count), cost, time)

    def _config(self, count: int, saving: Saving, rank: int) -> LoraConfig:
        config, left_out = self.config, self.blocks[: self.count - count]
        return replace(
            config,
            r=rank,
            lora_alpha=config.lora_alpha if config.use_rslora else config.lora_alpha * rank / config.r,
            variant="fa" if saving.lean else config.variant,
            exclude_modules=_without(config.exclude_modules, left_out) if left_out else config.exclude_modules,
        )


def _block(layer: str) -> str:
    """Return the block a layer lies in: its name up to the last number, or the whole name."""
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[: numbers[-1] + 1]) if numbers else layer


def _without(excluded: str | list[str], blocks: Iterable[str]) -> str:
    own = [excluded] if isinstance(excluded, str) else [rf"(.*\.)?{re.escape(entry)}" for entry in excluded]
    inside = "|".join(map(re.escape, blocks))
    return "|".join([*filter(None, own), rf"({inside})(\..*)?"])
