"""One frozen backbone, many small adapters: LoRA for timm backbones, exact everywhere."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from visionlora.config import LoraConfig
from visionlora.errors import VisionLoRAError

if TYPE_CHECKING:
    from visionlora.adapt import activate as activate
    from visionlora.adapt import apply_lora as apply_lora
    from visionlora.adapt import check_gradients as check_gradients
    from visionlora.adapt import deactivate as deactivate
    from visionlora.adapt import disabled as disabled
    from visionlora.adapt import remove as remove
    from visionlora.compose import combine as combine
    from visionlora.compose import sweep as sweep
    from visionlora.core.norms import estimate_statistics as estimate_statistics
    from visionlora.eva import allocate_ranks as allocate_ranks
    from visionlora.eva import fit_to_data as fit_to_data
    from visionlora.io import load_adapter as load_adapter
    from visionlora.io import read_adapter as read_adapter
    from visionlora.io import save_adapter as save_adapter
    from visionlora.merging import base_state_dict as base_state_dict
    from visionlora.merging import fingerprint as fingerprint
    from visionlora.merging import merge as merge
    from visionlora.merging import unmerge as unmerge
    from visionlora.overview import summary as summary
    from visionlora.quantising import dequantize_base as dequantize_base
    from visionlora.quantising import merge_dequantized as merge_dequantized
    from visionlora.quantising import quantize_base as quantize_base
    from visionlora.registry import active_adapters as active_adapters
    from visionlora.registry import adapter_names as adapter_names
    from visionlora.registry import adapter_parameters as adapter_parameters
    from visionlora.routing import route as route
    from visionlora.vision.loading import load_model as load_model

__version__ = "0.1.0"

# names are looked up when they are first used, so that `visionlora --help` need not wait for torch
_WHERE = {
    "visionlora.adapt": ("activate", "apply_lora", "check_gradients", "deactivate", "disabled", "remove"),
    "visionlora.registry": ("active_adapters", "adapter_names", "adapter_parameters"),
    "visionlora.compose": ("combine", "sweep"),
    "visionlora.eva": ("allocate_ranks", "fit_to_data"),
    "visionlora.core.norms": ("estimate_statistics",),
    "visionlora.io": ("load_adapter", "read_adapter", "save_adapter"),
    "visionlora.merging": ("base_state_dict", "fingerprint", "merge", "unmerge"),
    "visionlora.overview": ("summary",),
    "visionlora.quantising": ("dequantize_base", "merge_dequantized", "quantize_base"),
    "visionlora.routing": ("route",),
    "visionlora.vision.loading": ("load_model",),
}
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = ["LoraConfig", "VisionLoRAError", *sorted(_MODULE_OF)]  # noqa: PLE0604  (all are names, computed from one table)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'visionlora' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
