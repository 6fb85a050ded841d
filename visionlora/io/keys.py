"""Names of an adapter's tensors in its file: PEFT's where PEFT has one, the core's own behind a prefix elsewhere."""

from __future__ import annotations

from torch import Tensor

from visionlora.core.norms import STATISTICS
from visionlora.plan import Plan
from visionlora.targets import Site
from visionlora.variants import VARIANTS, LowRank

PEFT = "base_model.model."
OURS = "visionlora."

_PEFT_NAMES = {
    ("weight", "A"): "lora_A.weight",
    ("weight", "B"): "lora_B.weight",
    ("weight", "m"): "lora_magnitude_vector",
    ("weight", "value"): "weight",
    ("bias", "value"): "bias",
}
"""(attribute, tensor) of adapter_state -> PEFT's ending. The one table of both directions."""

_PEFT_EMBEDDING = {("weight", "A"): "lora_embedding_A", ("weight", "B"): "lora_embedding_B"}
"""PEFT's endings of the factors of an embedding, which it keeps as bare parameters."""

_ADAPTED_BIAS = "base_layer.bias"  # PEFT wraps an adapted layer, so its trained bias lies one level deeper


def file_keys(plan: Plan, keys: list[str]) -> dict[str, str]:
    """Return {key of adapter_state: key in the file}."""
    low_rank = issubclass(VARIANTS[plan.config.variant], LowRank)
    adapted = {site.name: site for site in plan.sites if low_rank and site.attribute == "weight"}
    return {key: _peft_key(plan, adapted, key) or OURS + key for key in keys}


def core_key(key: str) -> str:
    """Return the key of adapter_state for a key in a file; the inverse of file_keys."""
    if key.startswith(OURS):
        return key.removeprefix(OURS)
    path = key.removeprefix(PEFT)
    rows = (*_PEFT_NAMES.items(), *_PEFT_EMBEDDING.items(), (("bias", "value"), _ADAPTED_BIAS))
    for (attribute, tensor), ending in rows:
        if tensor != "value" or ending == _ADAPTED_BIAS:
            layer = path.removesuffix(f".{ending}")
            if layer != path:
                return f"{layer}/{attribute}/{tensor}"
    layer, _, attribute = path.rpartition(".")
    return f"{layer}/{attribute}/value"


def as_stored(key: str, tensor: Tensor, kernel_dims: int) -> Tensor:
    """Return a tensor of adapter_state in the type and shape it has in the file: float32 or wider."""
    wide = tensor.float() if tensor.itemsize < 4 else tensor
    if key.endswith(f".{_PEFT_NAMES['weight', 'm']}") and kernel_dims:
        wide = wide.view(1, -1, *[1] * kernel_dims)
    return wide.cpu().contiguous()


def as_used(key: str, tensor: Tensor) -> Tensor:
    """Return a tensor of a file as adapter_state has it; the inverse of as_stored."""
    wide = tensor.float() if tensor.itemsize < 4 else tensor
    return wide.flatten() if key.endswith("/weight/m") else wide


def is_peft_pair(site: Site | None) -> bool:
    """Tell whether PEFT has names for the low-rank factors of a layer: one pair for the whole weight."""
    kinds = ("linear", "conv1d_hf", "embedding", "conv")
    return site is not None and not site.parts and site.geometry.groups == 1 and site.geometry.kind in kinds


def _peft_key(plan: Plan, adapted: dict[str, Site], key: str) -> str | None:
    layer, attribute, tensor = key.split("/")
    role = plan.values.get(layer, {}).get(attribute)
    statistics = bool(plan.values.get(layer, {}).keys() & STATISTICS)  # PEFT knows no normalisation policy
    if (tensor == "value" and (role is None or (role == "norm" and statistics))) or (
        tensor != "value" and not is_peft_pair(adapted.get(layer))
    ):
        return None
    site = adapted.get(layer)
    names = _PEFT_NAMES if site is None or site.geometry.kind != "embedding" else _PEFT_NAMES | _PEFT_EMBEDDING
    ending = names.get((attribute, tensor), attribute if tensor == "value" else None)
    if ending is None:
        return None
    if role == "bias" and layer in adapted:
        ending = _ADAPTED_BIAS
    name = f"{PEFT}{layer}.{ending}"
    # a layer that is itself called lora_A, say, would be read back as something else
    return name if layer and core_key(name) == key else None
