"""Spread a frozen base with its adapters over processes by FSDP2, block by block."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from visionlora.core.attach import Adapted, Materialised
from visionlora.core.delta import Delta
from visionlora.errors import ConfigError
from visionlora.registry import adapted_layers


def shard(net: nn.Module, mesh: DeviceMesh) -> None:
    """Change the network in place: each process keeps a part of every parameter and gathers a block while it runs.

    Raises ConfigError where a layer computes its weight: FSDP2 would take the computed weight for the parameter.
    """
    computed = [name for name, layer in adapted_layers(net).items() if _computes_weight(layer)]
    if computed:
        shown = ", ".join(computed[:5]) + (f" and {len(computed) - 5} more" if len(computed) > 5 else "")
        raise ConfigError(
            f"{shown}: these layers compute their weight from the adapter and cannot be sharded by FSDP2; exclude them "
            "(lora.exclude_modules), use variant lora, or train with --trainer.strategy ddp"
        )
    for block in blocks(net):
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)


def blocks(net: nn.Module) -> list[nn.Module]:
    """Return the innermost repeated modules: the blocks of a ViT, the residual blocks of a CNN."""
    rows = [m for m in net.modules() if isinstance(m, (nn.ModuleList, nn.Sequential))]
    inside = [child for row in rows for child in row if any(True for _ in child.children())]
    return [block for block in inside if not any(other is not block and other in inside for other in block.modules())]


def _computes_weight(layer: Adapted) -> bool:
    deltas = [adapter["weight"] for adapter in layer.adapters.values() if "weight" in adapter]  # type: ignore[operator, index]
    return any(isinstance(d, Delta) and (isinstance(layer, Materialised) or not d.branched) for d in deltas)
