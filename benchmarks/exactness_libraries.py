"""Four libraries behind one face: put an adapter on a model, run, merge, disable, save and load it.

Each is used the way its documentation says. `put` is the way meant for layers; `put_on_tensors` is the library's second
way, for single tensors of any module: PEFT's target_parameters, LyCORIS's parametrize.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import visionlora as vl
from visionlora.errors import TargetError
from visionlora.registry import adapted_layers

Verb = Callable[[], Any]


class NotOffered(Exception):
    """The library has no such thing to call."""


class Refused(Exception):
    """The library says no without an exception."""


@dataclass(frozen=True)
class Spot:
    """Where an adapter goes: names for visionlora, names of modules, names of tensors."""

    names: list[str]
    modules: list[str]
    tensors: list[str]


class Put:
    """An adapter on a model; every verb that a library lacks raises NotOffered."""

    def __init__(self, model: nn.Module, own: list[nn.Parameter], beside: nn.Module | None = None) -> None:
        self.model, self.own = model, own
        self.parts = [model] if beside is None else [model, beside]

    @contextmanager
    def disabled(self) -> Iterator[None]:
        raise NotOffered
        yield

    def ways(self) -> Sequence[tuple[Verb, Verb | None]]:
        """Return the documented pairs of merge and unmerge, the plain one first."""
        raise NotOffered

    def keys(self) -> set[str]:
        return set(self.model.state_dict())

    def base(self) -> dict[str, Tensor]:
        """Return the base's tensors under the names they had."""
        return {plain_name(key): tensor for key, tensor in self.model.state_dict().items()}

    def dense(self) -> dict[str, Tensor]:
        """Return the weights that the library says the adapter stands for, by their names in the base."""
        raise NotOffered

    def save(self, folder: Path) -> None:
        raise NotOffered

    def load(self, base: nn.Module, folder: Path) -> Put:
        raise NotOffered


def plain_name(key: str) -> str:
    key = key.removeprefix("base_model.model.")
    for inserted in ("base_layer.", "original_module.", "parametrizations."):
        key = key.replace(inserted, "")
    return key.removesuffix(".original").replace(".conv.", ".")


def owner_of(model: nn.Module, tensor: str) -> tuple[nn.Module, str]:
    path, _, attribute = tensor.rpartition(".")
    return model.get_submodule(path), attribute


class OnVisionLoRA(Put):
    def __init__(self, model: nn.Module) -> None:
        groups = vl.adapter_parameters(model, "default").values()
        super().__init__(model, [p for group in groups for p in group.values()])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with vl.disabled(self.model):
            yield

    def ways(self) -> Sequence[tuple[Verb, Verb | None]]:
        return [(lambda: vl.merge(self.model), lambda: vl.unmerge(self.model))]

    def base(self) -> dict[str, Tensor]:
        return vl.base_state_dict(self.model)

    def dense(self) -> dict[str, Tensor]:
        layers = adapted_layers(self.model).items()
        return {
            f"{name}.{a}": t for name, layer in layers for a in layer.changed if (t := layer.effective(a)) is not None
        }

    def save(self, folder: Path) -> None:
        vl.save_adapter(self.model, folder)

    def load(self, base: nn.Module, folder: Path) -> Put:
        vl.load_adapter(base, folder)
        return OnVisionLoRA(base)


class VisionLoRA:
    package, variants = "visionlora", ("lora", "dora", "loha", "lokr")

    def put(self, model: nn.Module, spot: Spot, variant: str, alpha: float = 4) -> Put:
        config = {"target_modules": spot.names, "variant": variant, "modules_to_save": "none"}
        try:
            vl.apply_lora(model, vl.LoraConfig(r=2, lora_alpha=alpha, **config))
        except TargetError:  # no rank above 1 has fewer parameters than the layer
            vl.apply_lora(model, vl.LoraConfig(r=1, lora_alpha=alpha / 2, **config))
        return OnVisionLoRA(model)


class OnPeft(Put):
    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        super().__init__(wrapped, [p for p in wrapped.parameters() if p.requires_grad])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        with self.wrapped.disable_adapter():
            yield

    def ways(self) -> Sequence[tuple[Verb, Verb | None]]:
        return [(self.wrapped.merge_adapter, self.wrapped.unmerge_adapter)]

    def keys(self) -> set[str]:
        return set(self.wrapped.get_base_model().state_dict())

    def dense(self) -> dict[str, Tensor]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        base, changed = self.base(), {}
        for name, layer in self.wrapped.get_base_model().named_modules():
            if isinstance(layer, BaseTunerLayer):
                own = layer.get_base_layer()
                grouped = hasattr(layer, "lora_A") and getattr(own, "groups", 1) > 1
                if grouped or getattr(layer, "use_dora", {}).get("default"):
                    raise NotOffered  # in groups the change has another shape than the weight; DoRA is no sum
                whole = "in_proj_weight" if isinstance(own, nn.MultiheadAttention) else "weight"
                key = plain_name(f"{name}.{getattr(layer, 'parameter_name', whole)}")
                changed[key] = base[key] + layer.get_delta_weight("default")
        return changed

    def save(self, folder: Path) -> None:
        self.wrapped.save_pretrained(folder)

    def load(self, base: nn.Module, folder: Path) -> Put:
        from peft import PeftModel

        return OnPeft(PeftModel.from_pretrained(base, folder).eval())


class Peft:
    package, variants = "peft", ("lora", "dora", "loha", "lokr")

    def put(self, model: nn.Module, spot: Spot, variant: str, alpha: float = 4, **options: Any) -> Put:
        import peft

        if not spot.modules:
            raise NotOffered
        if variant in ("loha", "lokr"):
            config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[variant]
            return OnPeft(peft.get_peft_model(model, config(r=2, alpha=alpha, target_modules=spot.modules)).eval())
        rank = math.lcm(2, *(getattr(model.get_submodule(name), "groups", 1) for name in spot.modules))
        options = {"r": rank, "lora_alpha": alpha * rank / 2, "use_dora": variant == "dora", **options}
        return OnPeft(peft.get_peft_model(model, peft.LoraConfig(target_modules=spot.modules, **options)).eval())

    def put_on_tensors(self, model: nn.Module, spot: Spot, variant: str, alpha: float = 4) -> Put:
        import peft

        if variant in ("loha", "lokr"):
            raise NotOffered
        options = {"target_parameters": spot.tensors, "use_dora": variant == "dora"}
        return OnPeft(
            peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=alpha, target_modules=[], **options)).eval()
        )
