"""What a language task does with a batch, whatever is trained: loss, scores, answers, written texts."""

from __future__ import annotations

from typing import Any, Literal

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from visionlora.errors import DataError
from visionlora.text.inputs import Batch, check_labels, model_inputs
from visionlora.text.loops import examples_of, set_names
from visionlora.text.metrics import LanguageScores, Result, Scores
from visionlora.text.spans import Candidate, best_answers
from visionlora.text.tasks import CausalLanguage, Task
from visionlora.text.writing import write

__all__ = ["TaskSteps"]

USUAL = 1024
"""Labels of a batch by which its loss is scaled, so that float16 gradients keep their size."""


class TaskSteps(pl.LightningModule):
    """The steps of a task on a model."""

    net: nn.Module
    task: Task
    label_names: list[str]
    _class_weight: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, Result] = {}
        """Newest result of each set of texts: "val", "test" or "test/<name>"."""
        self.answered: dict[str, str] = {}
        """Answers of QUESTION_ANS by example, over all windows, after a prediction."""
        self._scores: dict[str, Scores] = {}
        self._candidates: list[Candidate] = []
        self._counted = 0
        """Labels since the last step of the optimiser."""
        self.register_buffer("_class_weight", None, persistent=False)

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Metric that tells the best adapter, "val/acc" say, and its direction."""
        name, mode = self.task.monitor
        unwritten = name == "rougeL" and not self.hparams.generate_batches
        return ("val/loss", "min") if unwritten else (f"val/{name}", mode)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits: (batch, classes), (batch, tokens, classes or words), (batch, tokens, start and end)."""
        return self.task.logits(self.net(**model_inputs(self.net, batch)))

    def loss(self, logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
        """Return the training loss, with class weights and label smoothing, and the labels it is the mean of."""
        return self.task.loss(logits, batch, self._class_weight, self.hparams.label_smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self._check_labels(batch)
        loss, size = self.loss(self(batch), batch)
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=size)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=size, sync_dist=True)
        if not self._weighs():
            return loss
        self._counted += size
        return loss * (size / USUAL)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Make the gradient that of the mean over all labels of all batches of a step, as of one large batch."""
        if not self._weighs():
            return
        total, processes = torch.tensor(float(self._counted), device=self.device), self.trainer.world_size
        if processes > 1:
            dist.all_reduce(total)
        self._counted = 0
        factor = self.trainer.accumulate_grad_batches * processes * USUAL / total.clamp_min(1)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

    def _weighs(self) -> bool:
        # Lightning and DDP average the means of batches, which hold different numbers of labels
        return self.task.many_labels and self.trainer.accumulate_grad_batches * self.trainer.world_size > 1

    def on_validation_epoch_start(self) -> None:
        run = self.trainer
        stage, batches = ("test", run.num_test_batches) if run.testing else ("val", run.num_val_batches)
        names = set_names(stage, len(batches), run)
        self._scores = {name: self.task.scores(examples_of(run, name), self.device) for name in names}

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._check_labels(batch)
        scores = list(self._scores.values())[dataloader_idx]
        scores.update(self(batch), batch)
        wanted = self.trainer.testing or batch_idx < self.hparams.generate_batches
        if isinstance(scores, LanguageScores) and wanted and "references" in batch:
            texts = self.write(batch)
            if texts is not None:
                scores.add_texts(texts, batch["references"])

    def on_validation_epoch_end(self) -> None:
        for name, scores in self._scores.items():
            result = self.results[name] = scores.compute()
            shown = self.task.monitor[0]
            for key, value in result.scalars().items():
                self.log(f"{name}/{key}", value, prog_bar=key == shown, sync_dist=True, add_dataloader_idx=False)

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step
    on_test_epoch_end = on_validation_epoch_end

    def on_predict_epoch_start(self) -> None:
        self._candidates, self.answered = [], {}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return what the task answers, and "rows", the places of the examples.

        SEQ_CLS: {"probabilities", "classes"}; TOKEN_CLS: {"classes": {word: tag} of each feature}; QUESTION_ANS:
        {"answers": {id: text}} of these windows, while `answered` holds the best over all of them when prediction ends;
        CAUSAL_LM and SEQ_2_SEQ_LM: {"texts"}.
        """
        rows = {"rows": batch["rows"]} if "rows" in batch else {}
        if self.task.writes:
            return {"texts": self.write(batch, predicting=True), **rows}
        found = self.task.answers(self(batch), batch, examples_of(self.trainer, "predict"))
        self._candidates += found.pop("candidates", [])
        return {**found, **rows}

    def on_predict_epoch_end(self) -> None:
        if self._candidates:
            contexts = {e["id"]: e["context"] for e in examples_of(self.trainer, "predict")}
            self.answered = best_answers(self._candidates, contexts, self.hparams.null_threshold)

    def write(self, batch: Batch, *, predicting: bool = False) -> list[str] | None:
        """Return what the model writes for each prompt of a batch; None where the batch has no prompts."""
        assert isinstance(self.task, CausalLanguage)
        tokenizer = getattr(self.trainer.datamodule, "tokenizer", None)  # type: ignore[attr-defined]
        if tokenizer is None:
            raise DataError("texts are written with the tokenizer of a data module; pass datamodule=TextData(...)")
        h = self.hparams
        return write(
            self.net, self.task, batch, tokenizer,
            most=h.max_new_tokens, beams=h.num_beams, predicting=predicting,
        )  # fmt: skip

    def _check_labels(self, batch: Batch) -> None:
        if self.label_names and self.hparams.problem_type == "single_label_classification":
            check_labels(batch, len(self.label_names))
