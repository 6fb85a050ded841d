"""The strategy "fsdp2": a sharded run whose checkpoints are those of any other run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_fabric.utilities.optimizer import _optimizer_to_device
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from visionlora.errors import ConfigError
from visionlora.training.gather import fill, gathered, like
from visionlora.training.record import kept_keys


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all processes; a checkpoint is one file of whole tensors that any number of processes resumes.

    Lightning's own writes a folder of shards, the frozen base among them, past the CheckpointIO. The base is left out
    here where the module says so, by `strict_loading = False`.
    """

    def setup_environment(self) -> None:
        if self._data_parallel_size == self._tensor_parallel_size == "auto":  # Lightning would split every layer
            self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        # the module is sharded before, in configure_model, and at on_fit_start the callbacks must know the checkpoint
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return whole tensors in the first process and nothing in the others; all must make the call."""
        module = self.lightning_module
        assert module is not None
        state = module.state_dict()
        keys = list(state) if module.strict_loading else kept_keys(module)
        return self._in_first({key: gathered(state[key]) for key in keys})

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        fill(self.lightning_module, checkpoint["state_dict"], strict=strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return whole tensors in the first process and nothing in the others; all must make the call."""
        inner: Optimizer = getattr(optimizer, "_optimizer", optimizer)  # Lightning's wrapper
        return self._in_first(gathered(inner.state_dict()))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {number: _cut(entry, parameters[number]) for number, entry in saved["state"].items()}
            optimizer.load_state_dict({**saved, "state": state})
            _optimizer_to_device(optimizer, self.root_device)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        super(ModelParallelStrategy, self).save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).load_checkpoint(checkpoint_path, weights_only)

    def _in_first(self, state: dict[str, Any]) -> dict[str, Any]:
        return state if self.is_global_zero else {}


StrategyRegistry.register("fsdp2", ShardedStrategy, description="FSDP2 over all processes", override=True)


def whole_checkpoints(strategy: ModelParallelStrategy) -> None:
    """Change a strategy that is set up, in place: its checkpoints are those of "fsdp2".

    Raises ConfigError for tensor parallelism, which our modules do not have: the processes would drift apart.
    """
    size = strategy.device_mesh["tensor_parallel"].size()
    if size > 1:
        raise ConfigError(
            f"{type(strategy).__name__} splits every layer over {size} processes (tensor_parallel_size), which the "
            "modules here do not do; --trainer.strategy fsdp2 shards over all processes, or set tensor_parallel_size 1"
        )
    if type(strategy) is ModelParallelStrategy:
        strategy.__class__ = ShardedStrategy


def _cut(entry: Mapping[str, Any], parameter: Tensor) -> dict[str, Any]:
    fits = {key for key, value in entry.items() if isinstance(value, Tensor) and value.shape == parameter.shape}
    return {key: like(value, parameter) if key in fits else value for key, value in entry.items()}
