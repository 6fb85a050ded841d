"""Where a measurement was made: processor, what it can do, how busy it was, versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from visionlora.bench.settings import Settings

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16")
"""Of all flags of a processor, those that decide which kernels run."""
PACKAGES = ("torch", "timm", "peft", "transformers", "visionlora")


def machine(settings: Settings) -> dict[str, Any]:
    """Return what is known of the processor, and of the GPU where one is measured."""
    info = _cpu_info()
    found: dict[str, Any] = {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in info.get("flags", info.get("Features", "")).split()],
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "system": f"{platform.system()} {platform.machine()}",
    }
    if settings.device == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def load() -> list[float] | None:
    """Return how many processes wanted a core in the last 1, 5 and 15 minutes, where the system tells."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str]:
    """Return the versions of the packages that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_info() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    lines = path.read_text().split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
