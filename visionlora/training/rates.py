"""A resumed optimiser runs with the settings typed for this run, not with those in the checkpoint."""

from __future__ import annotations

import logging
from typing import Any

from pytorch_lightning import Trainer

from visionlora.errors import ResumeError

log = logging.getLogger(__name__)

Groups = list[list[dict[str, Any]]]


class Rates:
    """Learning rates and other optimiser settings of the checkpoint and of this run.

    Lightning restores both optimiser and schedule, learning rate included, and says nothing.
    """

    def __init__(self) -> None:
        self._then: Groups | None = None
        self._now: Groups = []

    def remember_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._then = [state["param_groups"] for state in checkpoint.get("optimizer_states", [])]

    def remember_configured(self, trainer: Trainer) -> None:
        """Note the settings of the fresh optimisers. Raises ResumeError if their groups are not the checkpoint's."""
        self._now = [[_settings(group) for group in optimizer.param_groups] for optimizer in trainer.optimizers]
        if self._then is None:
            return
        then, now = [_names(groups) for groups in self._then], [_names(o.param_groups) for o in trainer.optimizers]
        if then != now:
            raise ResumeError(
                "the optimiser of the checkpoint has other parameter groups than this run:\n"
                f"  in the checkpoint: {then}\n  now: {now}\nresume with the old settings, or start a new run"
            )

    def apply(self, trainer: Trainer) -> None:
        """Change the restored optimisers and schedules to this run's settings; say what changed."""
        if self._then is None:
            return
        self._then = None
        for optimizer, configured in zip(trainer.optimizers, self._now, strict=True):
            for index, (group, settings) in enumerate(zip(optimizer.param_groups, configured, strict=True)):
                _configure(group, settings, str(group.get("name", index)))
        for entry in trainer.lr_scheduler_configs:
            groups = entry.scheduler.optimizer.param_groups
            if all("initial_lr" in group for group in groups):
                entry.scheduler.base_lrs = [group["initial_lr"] for group in groups]


def _configure(group: dict[str, Any], settings: dict[str, Any], name: str) -> None:
    for key, value in settings.items():
        if key in ("lr", "initial_lr") or group.get(key) == value:
            continue
        log.warning(
            "%s of parameter group %s: %s as configured; the checkpoint had %s", key, name, value, group.get(key)
        )
        group[key] = value
    wanted = settings.get("initial_lr", settings["lr"])
    had = group.get("initial_lr", group["lr"])
    if wanted == had:
        return
    log.warning("learning rate of parameter group %s: %g as configured; the checkpoint had %g", name, wanted, had)
    scheduled = "initial_lr" in settings and "initial_lr" in group and had != 0
    group["lr"] = group["lr"] * (wanted / had) if scheduled else settings["lr"]
    if "initial_lr" in settings:
        group["initial_lr"] = wanted


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _names(groups: list[dict[str, Any]]) -> list[str]:
    return [f"{group.get('name', index)} ({len(group['params'])} tensors)" for index, group in enumerate(groups)]
