"""LyCORIS and loralib behind the face of exactness_libraries."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from exactness_libraries import NotOffered, Put, Refused, Spot, Verb, owner_of
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D


class OnLycoris(Put):
    def __init__(self, model: nn.Module, network: Any) -> None:
        network.apply_to()
        self.network = network
        super().__init__(model, list(network.parameters()), network)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self.network.restore()
        yield
        self.network.apply_to()

    def ways(self) -> Sequence[tuple[Verb, Verb | None]]:
        network = self.network

        def merging(merge: Callable[..., None], *args: float, **kwargs: bool) -> Verb:
            return lambda: (network.restore(), merge(*args, **kwargs))

        def unmerging(unmerge: Callable[..., None], *args: float, **kwargs: bool) -> Verb:
            return lambda: (unmerge(*args, **kwargs), network.apply_to())

        return [
            (merging(network.merge_to, 1.0), unmerging(network.merge_to, -1.0)),
            (merging(network.merge_to, 1.0, precise=True), unmerging(network.merge_to, -1.0, precise=True)),
            (merging(network.onfly_merge, 1.0), unmerging(network.onfly_restore)),
        ]

    def dense(self) -> dict[str, Tensor]:
        names = {module: f"{name}.weight" for name, module in self.model.named_modules()}
        layers = [(lora, lora.org_module[0]) for lora in self.network.loras]
        return {names[own]: lora.get_merged_weight(1.0, own.weight.shape)[0] for lora, own in layers}

    def save(self, folder: Path) -> None:
        self.network.save_weights(str(folder / "adapter.safetensors"), torch.float32, {})

    def load(self, base: nn.Module, folder: Path) -> Put:
        from lycoris import create_lycoris_from_weights

        return OnLycoris(base, create_lycoris_from_weights(1.0, str(folder / "adapter.safetensors"), base)[0])


class OnLycorisTensors(Put):
    """LyCORIS's parametrizations of single tensors: merged and taken off with torch.nn.utils.parametrize."""

    def __init__(self, model: nn.Module, tensors: list[str], variant: str, alpha: float) -> None:
        from lycoris.modules import locon, loha, lokr

        kinds = {"loha": loha.LohaModule, "lokr": lokr.LokrModule}
        own = {"lora_dim": 2, "alpha": alpha, "weight_decompose": variant == "dora"}
        self.variant, self.alpha, self.tensors = variant, alpha, tensors
        self.changes = [kinds.get(variant, locon.LoConModule).parametrize(*owner_of(model, t), **own) for t in tensors]
        super().__init__(model, [p for change in self.changes for p in change.parameters()])

    @contextmanager
    def disabled(self) -> Iterator[None]:
        owners = [owner_of(self.model, t) for t in self.tensors]
        for owner, attribute in owners:
            parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
        yield
        for (owner, attribute), change in zip(owners, self.changes, strict=True):
            parametrize.register_parametrization(owner, attribute, change)

    def ways(self) -> Sequence[tuple[Verb, Verb | None]]:
        owners = [owner_of(self.model, t) for t in self.tensors]
        return [(lambda: [parametrize.remove_parametrizations(o, a) for o, a in owners], None)]

    def dense(self) -> dict[str, Tensor]:
        return {t: getattr(*owner_of(self.model, t)) for t in self.tensors}

    def save(self, folder: Path) -> None:
        torch.save([change.state_dict() for change in self.changes], folder / "adapter.pt")

    def load(self, base: nn.Module, folder: Path) -> Put:
        put = OnLycorisTensors(base, self.tensors, self.variant, self.alpha)
        for change, state in zip(put.changes, torch.load(folder / "adapter.pt"), strict=True):
            change.load_state_dict(state)
        return put


class Lycoris:
    package, variants = "lycoris-lora", ("lora", "dora", "loha", "lokr")

    def __init__(self) -> None:
        import lycoris

        logging.getLogger("LyCORIS").handlers = [logging.NullHandler()]  # it prints to stdout
        assert lycoris

    def put(self, model: nn.Module, spot: Spot, variant: str, alpha: float = 4) -> Put:
        import lycoris

        if not spot.modules:
            raise NotOffered
        model.requires_grad_(False)
        names = [f"{re.escape(name)}$" for name in spot.modules]
        lycoris.LycorisNetwork.apply_preset({"target_module": [], "target_name": names})
        options = {"algo": "lora" if variant == "dora" else variant, "dora_wd": variant == "dora"}
        network = lycoris.create_lycoris(model, 1.0, linear_dim=2, linear_alpha=alpha, **options)
        if not network.loras:
            raise Refused  # it logs the warning "No LyCORIS modules were created."
        return OnLycoris(model, network)

    def put_on_tensors(self, model: nn.Module, spot: Spot, variant: str, alpha: float = 4) -> Put:
        model.requires_grad_(False)
        return OnLycorisTensors(model, spot.tensors, variant, alpha)


class OnLoralib(Put):
    def __init__(self, model: nn.Module, modules: list[str], alpha: float) -> None:
        import loralib

        self.modules, self.alpha = modules, alpha
        for name in modules:
            owner, attribute = owner_of(model, name)
            setattr(owner, attribute, counterpart(getattr(owner, attribute), 2, int(alpha)))
        loralib.mark_only_lora_as_trainable(model)
        super().__init__(model.train(), [p for p in model.parameters() if p.requires_grad])

    def ways(self) -> Sequence[tuple[Verb, Verb | None]]:
        return [(self.model.eval, self.model.train)]

    def save(self, folder: Path) -> None:
        import loralib

        torch.save(loralib.lora_state_dict(self.model), folder / "adapter.pt")

    def load(self, base: nn.Module, folder: Path) -> Put:
        put = OnLoralib(base, self.modules, self.alpha)
        put.model.load_state_dict(torch.load(folder / "adapter.pt"), strict=False)
        return put


def counterpart(layer: nn.Module, r: int, alpha: int) -> nn.Module:
    """Return the layer of loralib that replaces this one, with its weights."""
    import loralib

    own = {"r": r, "lora_alpha": alpha}
    new: nn.Module
    if type(layer) is nn.Linear:
        new = loralib.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, **own)
    elif type(layer) is Conv1D:
        new = loralib.Linear(layer.nx, layer.nf, fan_in_fan_out=True, **own)
    elif type(layer) is nn.Embedding:
        new = loralib.Embedding(layer.num_embeddings, layer.embedding_dim, padding_idx=layer.padding_idx, **own)
    elif type(layer) in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
        square = len(set(layer.kernel_size)) == 1
        options = {key: getattr(layer, key) for key in ("stride", "padding", "dilation", "groups", "padding_mode")}
        size = layer.kernel_size[0] if square else layer.kernel_size
        new = getattr(loralib, type(layer).__name__)(
            layer.in_channels, layer.out_channels, size, bias=layer.bias is not None, **options, **own
        )
        new.conv.load_state_dict(layer.state_dict())
        return new
    else:
        raise NotOffered
    new.load_state_dict(layer.state_dict(), strict=False)
    return new


class Loralib:
    package, variants = "loralib", ("lora",)

    def put(self, model: nn.Module, spot: Spot, variant: str, alpha: float = 4) -> Put:
        if not spot.modules:
            raise NotOffered
        return OnLoralib(model, spot.modules, alpha)
