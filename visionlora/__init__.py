"""One frozen backbone, many small adapters."""

from __future__ import annotations

from visionlora.adapt import (
    activate,
    active_adapters,
    adapter_names,
    adapter_parameters,
    apply_lora,
    check_gradients,
    deactivate,
    disabled,
    remove,
)
from visionlora.config import LoraConfig
from visionlora.merging import base_state_dict, fingerprint, merge, unmerge

__version__ = "0.1.0"
