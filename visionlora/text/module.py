"""A transformers model that learns a language task: by LoRA, by its head, by norms, or in full, on one code path."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
from torch import nn
from torch.distributed.fsdp import FSDPModule

from visionlora.adapt import apply_lora
from visionlora.config import LoraConfig, did_you_mean
from visionlora.errors import ConfigError
from visionlora.io import save_adapter
from visionlora.io.base import remember_base
from visionlora.merging import fingerprint
from visionlora.quantising import quantize_base
from visionlora.registry import adapter_parameters
from visionlora.text.columns import TaskType
from visionlora.text.families import checkpoint_activations, create_backbone
from visionlora.text.full import save_full
from visionlora.text.labels import ProblemType
from visionlora.text.loops import class_weight, full_groups, planned_steps, see_data, seeded
from visionlora.text.modes import RATES, Mode, adapter_config, check_settings
from visionlora.text.steps import TaskSteps
from visionlora.text.suits import check_data
from visionlora.text.tasks import task_of
from visionlora.training.ema import AdapterEMA
from visionlora.training.optim import adamw, warmup_cosine
from visionlora.training.sharding import shard

__all__ = ["Mode", "TextTask"]

_LORA = LoraConfig()


class TextTask(TaskSteps):
    """Train a transformers model for a task: classes of texts or words, answers in a context, texts to write.

    "lora" trains what the LoraConfig says, "linear" the head alone, "norm" head and normalisation, "full" every weight.
    In all but "full" the base stays as it is and what was learned is an adapter.

    Args:
        model_name: transformers' name of the model on the hub, or a folder.
        task_type: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, CAUSAL_LM or SEQ_2_SEQ_LM.
        label_names: labels or tags in the order of their numbers, stored in the adapter; the command takes the data's.
        problem_type: of SEQ_CLS: one label, several labels, or a number to predict.
        mode: what is trained.
        lora: the adapter of mode "lora"; the other modes do not read it.
        pretrained: start from the model's weights (fetched when they are not on this machine), else from random ones.
        new_tokens: rows added to the embeddings, for tokens added to the tokenizer.
        untied: give the scores of tokens a weight of their own, so that they and the embeddings can be adapted.
        model_args: further arguments of from_pretrained.
        lr: learning rate of AdamW; by default 1e-3, for "linear" 1e-2, "norm" 3e-3, "full" 5e-5.
        head_lr_factor: multiplies the rate of the head.
        lora_plus: multiplies the rate of B (LoRA+, Hayou et al. 2024); 1 is plain LoRA.
        weight_decay: of all tensors with two dimensions or more.
        warmup: share of all steps in which the rate rises; then it falls to 0 along a cosine.
        label_smoothing: share of a label spread over all others while training.
        class_weights: weights of the classes in the loss: "none", "balanced" (inverse frequency) or a list.
        max_answer_tokens: length of an answer of QUESTION_ANS.
        null_threshold: how much no answer must score above the best one; by default every question is answered.
        max_new_tokens: length of a written text.
        num_beams: of the search for a written text; 1 takes the likeliest token each time.
        generate_batches: batches of a validation set whose texts are written; a test set is written whole.
        gradient_checkpointing: compute activations twice instead of keeping them.
        ema_decay: average what is trained over steps, validate and ship the average; 0.999 is usual.
        compile: compile the model in place with torch.compile.
        quantize: store the frozen base in fewer bits (extra "quant"): int8, a quarter of the memory, or nf4, an eighth.
        adapter_name: name of the adapter on the model and in its file.
        data: what the texts went through (tokenizer, lengths ...), stored in the adapter.
        seed: of the starting values of the adapter.
    """

    def __init__(
        self,
        model_name: str,
        task_type: TaskType,
        *,
        label_names: list[str] | None = None,
        problem_type: ProblemType = "single_label_classification",
        mode: Mode = "lora",
        lora: LoraConfig = _LORA,
        pretrained: bool = True,
        new_tokens: int = 0,
        untied: bool = False,
        model_args: dict[str, Any] | None = None,
        lr: float | None = None,
        head_lr_factor: float = 1.0,
        lora_plus: float = 1.0,
        weight_decay: float = 0.01,
        warmup: float = 0.05,
        label_smoothing: float = 0.0,
        class_weights: Literal["none", "balanced"] | list[float] = "none",
        max_answer_tokens: int = 30,
        null_threshold: float | None = None,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        generate_batches: int = 8,
        gradient_checkpointing: bool = False,
        ema_decay: float | None = None,
        compile: bool = False,
        quantize: Literal["none", "int8", "nf4"] = "none",
        adapter_name: str = "default",
        data: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        settings = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        check_settings(settings)
        net = create_backbone(
            model_name, task_type, pretrained=pretrained, label_names=label_names, problem_type=problem_type,
            new_tokens=new_tokens, untied=untied, model_args=model_args,
        )  # fmt: skip
        self._start(net, settings)

    @classmethod
    def from_model(cls, net: nn.Module, *, task_type: TaskType, **settings: Any) -> TextTask:
        """Return a task around a ready transformers model, changed in place; settings are those of the class.

        Its checkpoints resume, but load_from_checkpoint and load_model cannot build the model again.
        """
        known = {name: p.default for name, p in signature(cls.__init__).parameters.items() if name != "self"}
        for name in settings:
            if name not in known:
                raise ConfigError(f"TextTask has no setting {name!r}{did_you_mean(name, list(known))}")
        module = cls.__new__(cls)
        settings = {**known, "model_name": "", "task_type": task_type, **settings}
        check_settings(settings)
        module._start(net, settings)
        return module

    def _start(self, net: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__()
        lora = settings["lora"]
        config = LoraConfig.from_dict(dict(lora)) if isinstance(lora, Mapping) else lora
        self.config = adapter_config(settings["mode"], config, net, settings["task_type"])
        self.save_hyperparameters({**settings, "lora": config.to_dict()})
        h = self.hparams
        self.net = net.train()
        self._base = fingerprint(net)
        self.label_names = list(h.label_names or [])
        self.task = task_of(
            h.task_type, label_names=tuple(self.label_names), problem_type=h.problem_type,
            most_tokens=h.max_answer_tokens, null_threshold=h.null_threshold,
        )  # fmt: skip
        if self.config is None:
            net.requires_grad_(True)
        else:
            if h.quantize != "none":
                quantize_base(net, h.quantize)
            with seeded(h.seed):
                apply_lora(net, self.config, name=h.adapter_name)
            remember_base(net, self._base)
        if h.gradient_checkpointing:
            checkpoint_activations(net)
        if h.compile:
            net.compile()

    def configure_model(self) -> None:
        if self.device_mesh is not None and not isinstance(self.net, FSDPModule):  # ModelParallelStrategy asks for it
            shard(self.net, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[pl.Callback]:
        return [] if self.hparams.ema_decay is None else [AdapterEMA(self.hparams.ema_decay)]

    def configure_optimizers(self) -> dict[str, Any]:
        h, groups = self.hparams, self.trainable_groups()
        lr = RATES[h.mode] if h.lr is None else h.lr
        factors = {"head": h.head_lr_factor, "B": h.lora_plus}
        optimizer = adamw(groups, self.trainer, lr=lr, weight_decay=h.weight_decay, factors=factors)
        total = planned_steps(self.trainer)
        schedule = warmup_cosine(optimizer, warmup_steps=int(h.warmup * total), total_steps=total)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def setup(self, stage: str) -> None:
        check_data(self.net, self.hparams, self.trainer)

    def on_fit_start(self) -> None:
        classes = len(self.label_names)
        self._class_weight = class_weight(self.hparams.class_weights, self.trainer, classes, self.device)
        if self.config is not None and self.trainer.ckpt_path is None:  # a resumed run has it in its checkpoint
            see_data(self.net, self.hparams.adapter_name, self.trainer)

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters to train, by the name of their group: A, B, m, head, norm, bias, saved or backbone."""
        if self.config is None:
            return full_groups(self.net)
        found = adapter_parameters(self.net, self.hparams.adapter_name)
        groups = {name: [p for p in group.values() if p.requires_grad] for name, group in found.items()}
        return {name: group for name, group in groups.items() if group}

    def save_adapter(self, directory: str | Path) -> None:
        """Write the adapter, or in mode "full" the whole model, to a directory that text.load_model reads."""
        h = self.hparams
        sizes = {key: h[key] for key in ("new_tokens", "untied", "problem_type") if h[key]}
        hub = h.model_name and not Path(h.model_name).exists()  # a file names no place on another machine
        metrics = {f"{where}/{key}": v for where, r in self.results.items() for key, v in r.scalars().items()}
        record = {
            "base": {"name": h.model_name if hub else None, "tag": (h.model_args or {}).get("revision"), "args": sizes},
            "classes": self.label_names or None,
            "data": {**(h.data or {}), "task_type": h.task_type},
            "metrics": metrics,
        }
        if self.config is None:
            save_full(self.net, directory, **record)
        else:
            save_adapter(self.net, directory, name=h.adapter_name, **record)

    def fingerprint(self) -> str:
        """Return the hash of the base weights as they were before training."""
        return self._base
