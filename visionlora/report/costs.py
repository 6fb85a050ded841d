"""What a run cost, of images and of texts: the second half of the closing table."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import nn

from visionlora.io.read import FULL
from visionlora.io.read import WEIGHTS as ADAPTER
from visionlora.merging import base_state_dict
from visionlora.overview import readable_size
from visionlora.training.checkpoint import AdapterCheckpoint, save_in_first_process

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

__all__ = ["Costs", "costs_of", "peak_memory", "saved_adapter"]


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What a finished run cost."""

    mode: str
    trainable: int
    """Parameters that were trained."""
    base: int
    """Parameters of the model without adapters."""
    saved: str
    """Where the adapter (or, in mode full, the model) lies."""
    size: int
    """Bytes of its weights file."""
    seconds: float
    """Training and validation; for a resumed run the sum."""
    epochs: int
    steps: int
    memory: int | None
    """Peak in bytes: of the GPU, else of the process; None where the system does not tell."""
    memory_of: str
    base_unchanged: bool | None
    """Whether the base, adapter off, has the very weights it came with; None in mode full."""

    def cost_lines(self) -> list[str]:
        """Return the costs, a line each."""
        share = self.trainable / self.base if self.base else 0.0
        memory = "not told by this system" if self.memory is None else readable_size(self.memory)
        rows = {
            "trained": f"{self.trainable:,} parameters, {share:.2%} of the model's {self.base:,} (mode {self.mode})",
            "model" if self.mode == "full" else "adapter": f"{readable_size(self.size)} in {self.saved}",
            "time": f"{_duration(self.seconds)} for {_count(self.epochs, 'epoch')}, {_count(self.steps, 'step')}",
            "peak memory": f"{memory} ({self.memory_of})",
        }
        if self.base_unchanged is not None:
            rows["adapter off"] = "the base, bit for bit" if self.base_unchanged else "NOT the base any more"
        width = max(map(len, rows))
        return [f"{name:<{width}}  {value}" for name, value in rows.items()]


Memory = tuple[int | None, str]
"""Bytes, and of what."""


def costs_of(
    trainer: Trainer, module: Any, saved: Path, *, seconds: float, memory: Memory, unchanged: bool | None
) -> dict[str, Any]:
    """Return the fields of Costs for a run that ends; `module` is one of ours, for images or for texts."""
    return {
        "mode": module.hparams.mode,
        "trainable": sum(p.numel() for group in module.trainable_groups().values() for p in group),
        "base": _parameters(module.net),
        "saved": str(saved),
        "size": (saved / (FULL if module.config is None else ADAPTER)).stat().st_size,
        "seconds": seconds,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "memory": memory[0],
        "memory_of": memory[1],
        "base_unchanged": unchanged,
    }


def saved_adapter(trainer: Trainer, module: Any, folder: Path) -> Path:
    """Return where the adapter of this run lies; it is written now if no callback kept the best."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, AdapterCheckpoint) and (callback.best is not None or callback.monitor is None):
            return callback.adapter_path
    save_in_first_process(trainer, module, folder / "adapter")
    return folder / "adapter"


def _parameters(net: nn.Module) -> int:
    own = {name for name, _ in net.named_parameters()}
    return sum(tensor.numel() for key, tensor in base_state_dict(net).items() if key in own)


def peak_memory(device: torch.device) -> Memory:
    """Return the peak so far: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "GPU"
    if resource is None:
        return None, "process"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024), "process"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
