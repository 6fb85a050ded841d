"""A timm backbone that learns new images: by LoRA, by its head, by its normalisation, or in full, on one code path."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from visionlora.adapt import apply_lora
from visionlora.config import LoraConfig, did_you_mean
from visionlora.core.blocks import checkpoint_blocks
from visionlora.errors import ConfigError
from visionlora.io import save_adapter
from visionlora.io.base import remember_base
from visionlora.merging import fingerprint
from visionlora.quantising import quantize_base
from visionlora.registry import adapter_parameters
from visionlora.training.ema import AdapterEMA
from visionlora.training.optim import adamw, warmup_cosine
from visionlora.training.sharding import shard
from visionlora.vision.backbone import create_backbone
from visionlora.vision.caching import cache_prefix, drop_cache
from visionlora.vision.full import save_full
from visionlora.vision.layout import Layout, layout_for
from visionlora.vision.loops import (
    class_weight,
    example_of,
    full_groups,
    input_of,
    planned_steps,
    see_data,
    seeded,
)
from visionlora.vision.recipe import Recipe, rates_of, suited
from visionlora.vision.settings import LEAN, Memory, Mode, adapter_config, check_settings
from visionlora.vision.steps import ImageSteps

__all__ = ["ImageClassifier", "Mode"]

log = logging.getLogger(__name__)

_LORA = LoraConfig()


class ImageClassifier(ImageSteps):
    """Train a timm backbone to tell classes of images apart.

    "lora" trains what the LoraConfig says, "linear" the head alone, "norm" head and normalisation, "full" every weight
    with stock BatchNorm. In all but "full" the base stays as it is and what was learned is an adapter.

    Args:
        model_name: timm's name of the backbone, with or without the tag of its weights.
        num_classes: classes of the data; with the command it comes from the data.
        class_names: their names in the order of their numbers, stored in the adapter.
        mode: what is trained.
        lora: the adapter of mode "lora"; the other modes do not read it.
        recipe: "auto" takes a larger adapter for a CNN with fewer than a million weights, where lora is left at its
            defaults and memory at "exact"; it is told in the log. "none" takes lora as it is.
        pretrained: start from timm's weights (fetched when they are not on this machine).
        checkpoint: start from a local file with weights of this backbone instead.
        model_args: further arguments of timm.create_model.
        lr: learning rate of AdamW; by default 1e-3, for "linear" and "norm" 3e-3, for "full" 1e-4, and on a backbone of
            fewer than a million weights 3e-3, 1e-2 and 1e-3.
        head_lr_factor: multiplies the rate of the head.
        lora_plus: multiplies the rate of B (LoRA+, Hayou et al. 2024); 1 is plain LoRA.
        weight_decay: of all tensors with two dimensions or more.
        warmup: share of all steps in which the rate rises; then it falls to 0 along a cosine.
        label_smoothing: share of a label spread over all classes while training.
        class_weights: weights of the classes in the loss: "none", "balanced" (inverse frequency) or a list.
        ema_decay: average what is trained over steps, validate and ship the average; 0.999 is usual.
        compile: compile the backbone in place with torch.compile.
        memory: "lean" keeps A of every layer at its random start (variant "fa"): inputs of layers need not be kept for
            the backward pass. Accuracy can be lower (docs/performance.md). "exact" trains what the LoraConfig says.
        grad_checkpointing: keep the inputs of blocks alone and compute blocks again in the backward pass (timm's
            set_grad_checkpointing): the same numbers but for rounding, less memory, one more forward pass.
        cache_prefix: run what lies before the first adapted layer once for each image and keep its output, in memory or
            on disk; needs data.augment none.
        memory_format: how kernels and images lie in memory during fit; "auto" is channels_last for CNNs with BatchNorm
            in one process.
        quantize: store the frozen base in fewer bits (extra "quant"): int8, a quarter of the memory, or nf4, an eighth.
        adapter_name: name of the adapter on the model and in its file.
        data: what the images went through (input_size, mean, std ...), stored in the adapter; by default timm's own.
        seed: of the starting values of the adapter.
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        *,
        class_names: list[str] | None = None,
        mode: Mode = "lora",
        lora: LoraConfig = _LORA,
        recipe: Recipe = "auto",
        pretrained: bool = True,
        checkpoint: str | None = None,
        model_args: dict[str, Any] | None = None,
        lr: float | None = None,
        head_lr_factor: float = 1.0,
        lora_plus: float = 1.0,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        label_smoothing: float = 0.0,
        class_weights: Literal["none", "balanced"] | list[float] = "none",
        ema_decay: float | None = None,
        compile: bool = False,
        memory: Memory = "exact",
        grad_checkpointing: bool = False,
        cache_prefix: Literal["none", "memory", "disk"] = "none",
        memory_format: Layout = "auto",
        quantize: Literal["none", "int8", "nf4"] = "none",
        adapter_name: str = "default",
        data: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        settings = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        with seeded(seed):
            net = create_backbone(
                model_name, pretrained=pretrained, checkpoint=checkpoint, num_classes=num_classes, model_args=model_args
            )
        self._start(net, settings)

    @classmethod
    def from_model(cls, net: nn.Module, *, num_classes: int, **settings: Any) -> ImageClassifier:
        """Return a classifier around a ready network, changed in place; settings are those of the class.

        Its checkpoints resume, but load_from_checkpoint and load_model cannot build the network again.
        """
        known = {name: p.default for name, p in signature(cls.__init__).parameters.items() if name != "self"}
        for name in settings:
            if name not in known:
                raise ConfigError(f"ImageClassifier has no setting {name!r}{did_you_mean(name, list(known))}")
        module = cls.__new__(cls)
        module._start(net, {**known, "model_name": "", "num_classes": num_classes, **settings})
        return module

    def _start(self, net: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        lora = settings["lora"]
        config = LoraConfig.from_dict(dict(lora)) if isinstance(lora, Mapping) else lora
        check_settings(settings)
        if (settings["mode"], settings["recipe"], settings["memory"]) == ("lora", "auto", "exact"):
            config = suited(config, net)
        self.save_hyperparameters({**settings, "lora": config.to_dict()})
        self.net, self.config = net.train(), adapter_config(self.hparams.mode, config, self.hparams.memory)
        self._base, self._rates = fingerprint(net), rates_of(net)
        self.class_names = list(self.hparams.class_names or map(str, range(self.hparams.num_classes)))
        if self.config is None:
            net.requires_grad_(True)
        else:
            if self.hparams.quantize != "none":
                quantize_base(net, self.hparams.quantize)
            with seeded(self.hparams.seed):
                apply_lora(net, self.config, name=self.hparams.adapter_name)
            remember_base(net, self._base)
        if self.hparams.mode == "norm" and "norm" not in self.trainable_groups():
            raise ConfigError(f"{type(net).__name__} has no normalisation to train; use mode linear or lora")
        if self.hparams.grad_checkpointing:
            checkpoint_blocks(net, example_of(net, input_of(self.hparams)))
        if self.hparams.compile:
            net.compile()

    def setup(self, stage: str) -> None:
        if stage == "fit" and self.device_mesh is None and not self.hparams.compile:  # Inductor lays out by itself
            processes = self.trainer.world_size
            self._layout = layout_for(self.net, self.hparams.memory_format, processes=processes)
            self.net.to(memory_format=self._layout)

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self._layout is not torch.contiguous_format:
            self._layout = torch.contiguous_format
            self.net.to(memory_format=self._layout)

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):  # ModelParallelStrategy asks for it
            shard(self.net, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[pl.Callback]:
        return [] if self.hparams.ema_decay is None else [AdapterEMA(self.hparams.ema_decay)]

    def configure_optimizers(self) -> dict[str, Any]:
        h, groups = self.hparams, self.trainable_groups()
        lr = self._rates[h.mode] if h.lr is None else h.lr
        factors = {"head": h.head_lr_factor, "B": h.lora_plus}
        optimizer = adamw(groups, self.trainer, lr=lr, weight_decay=h.weight_decay, factors=factors)
        total = planned_steps(self.trainer)
        schedule = warmup_cosine(optimizer, warmup_steps=int(h.warmup * total), total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_fit_start(self) -> None:
        if self.config is not None and self.config.variant == "fa":
            log.info(LEAN)
        self._class_weight = class_weight(
            self.hparams.class_weights, self.trainer, self.hparams.num_classes, self.device
        )
        if self.config is not None and self.trainer.ckpt_path is None:  # a resumed run has it in its checkpoint
            see_data(self.net, self.hparams.adapter_name, self.trainer)
        if self.hparams.cache_prefix != "none":
            self._cut = cache_prefix(self.net, self.trainer, self.hparams.cache_prefix, self._base, self._layout)

    def on_fit_end(self) -> None:
        if self._cut is not None:
            self._cut = None
            drop_cache(self.trainer)

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters to train, by the name of their group: A, B, m, head, norm, bias, saved or backbone."""
        if self.config is None:
            return full_groups(self.net)
        found = adapter_parameters(self.net, self.hparams.adapter_name)
        groups = {name: [p for p in group.values() if p.requires_grad] for name, group in found.items()}
        return {name: group for name, group in groups.items() if group}

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapter, or in mode "full" the whole model, to a directory that visionlora.load_model reads."""
        h = self.hparams
        name, _, tag = h.model_name.partition(".")
        given = {"name": name, "args": h.model_args or {}} | ({"tag": tag} if tag else {})
        metrics = {f"{where}/{key}": v for where, r in self.results.items() for key, v in r.scalars().items()}
        record = {"base": given if name else None, "classes": h.class_names, "data": input_of(h), "metrics": metrics}
        if self.config is None:
            save_full(self.net, directory, **record)
        else:
            save_adapter(self.net, directory, name=h.adapter_name, **record)

    def fingerprint(self) -> str:
        """Return the hash of the base weights as they were before training."""
        return self._base
