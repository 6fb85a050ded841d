"""Weights from timm's hub where the hub is out of reach: from this machine at once, or not at all."""

from __future__ import annotations

from typing import Any

import timm
from huggingface_hub import constants, try_to_load_from_cache
from timm.models import PretrainedCfg

from visionlora.errors import ConfigError
from visionlora.hub import host, in_reach

__all__ = ["WeightsUnavailableError", "without_hub"]

FILES = ("model.safetensors", "pytorch_model.bin")


class WeightsUnavailableError(ConfigError):
    """Published weights that cannot be had; a caller adds how to give one's own."""


def without_hub(model_name: str) -> dict[str, Any]:
    """Return arguments of timm.create_model that spare it a hub out of reach; none where it need not be spared.

    Raises WeightsUnavailableError where the weights are neither here nor to be had: timm would try for a minute.
    """
    config = timm.get_pretrained_cfg(model_name, allow_unregistered=True)
    if config is None or not config.hf_hub_id or config.file or in_reach():
        return {}
    path = _downloaded_before(config)
    if path is None:
        raise WeightsUnavailableError(
            f"the weights of {model_name} could not be fetched: {host()} is out of reach, and its cache lacks them"
        )
    return {"pretrained_cfg_overlay": {"file": path}}


def _downloaded_before(config: PretrainedCfg) -> str | None:
    repository, _, revision = config.hf_hub_id.partition("@")
    for name in (config.hf_hub_filename,) if config.hf_hub_filename else FILES:
        path = try_to_load_from_cache(repository, name, cache_dir=constants.HF_HUB_CACHE, revision=revision or None)
        if isinstance(path, str):
            return path
    return None
