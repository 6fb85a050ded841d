"""The public names: a change here is a change for users."""

from __future__ import annotations

import inspect

import visionlora as vl

NAMES = {
    *(
        "LoraConfig",
        "VisionLoRAError",
        "apply_lora",
        "remove",
        "activate",
        "deactivate",
        "disabled",
        "merge",
        "unmerge",
        "summary",
    ),
    *("adapter_names", "active_adapters", "adapter_parameters", "check_gradients", "estimate_statistics"),
    *("base_state_dict", "fingerprint", "save_adapter", "load_adapter", "read_adapter", "load_model"),
    *("quantize_base", "dequantize_base", "merge_dequantized"),
    *("combine", "sweep", "fit_to_data", "allocate_ranks", "route"),
}


def test_the_public_names_are_pinned() -> None:
    assert set(vl.__all__) == NAMES
    assert set(dir(vl)) >= NAMES


def test_every_public_name_explains_itself() -> None:
    for name in NAMES:
        assert inspect.getdoc(getattr(vl, name)), name
