"""What each task asks of a model: its loss, its scores, its answers.

A batch is a dict as transformers' collators make it: the tensors input_ids, attention_mask, token_type_ids, and labels
(start_positions and end_positions for QUESTION_ANS); packed texts have position_ids and no attention_mask. What is no
tensor never reaches the model: `rows` (place of each feature's example in the data module's `examples[stage]`),
`word_ids` (TOKEN_CLS), `example_id` and `offset_mapping` (QUESTION_ANS). The prompts that a causal model writes on from
are `prompt_ids` and `prompt_mask`, padded on the left; in prediction they may be input_ids themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from visionlora.errors import DataError
from visionlora.text.inputs import Batch
from visionlora.text.metrics import AnswerScores, ClassScores, LanguageScores, TagScores, ValueScores
from visionlora.text.scores import IGNORED, Scores, checked
from visionlora.text.spans import best_answers, candidates

__all__ = ["TASK", "Batch", "Task", "task_of"]

Examples = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Task(ABC):
    """One task with its labels. A task is a value: it holds no model and no scores."""

    label_names: tuple[str, ...] = ()
    problem_type: str = "single_label_classification"
    most_tokens: int = 30
    """Length of an answer in a context."""
    null_threshold: float | None = None
    """How much no answer must score above the best span; None answers every question."""

    writes: ClassVar[bool] = False
    """The model writes texts."""
    many_labels: ClassVar[bool] = False
    """A text has a label for each token, so that batches of as many texts hold different numbers of labels."""

    @property
    @abstractmethod
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        """Metric that tells the best adapter, and its direction."""

    def logits(self, outputs: Any) -> Tensor:
        """Return the scores in what the model gave."""
        return outputs.logits  # type: ignore[no-any-return]

    @abstractmethod
    def loss(self, logits: Tensor, batch: Batch, weight: Tensor | None, smoothing: float) -> tuple[Tensor, int]:
        """Return the training loss and the number of labels that it is the mean of."""

    @abstractmethod
    def scores(self, examples: Examples, device: torch.device | str, *, shared: bool = True) -> Scores:
        """Return fresh scores of one set."""

    @abstractmethod
    def answers(self, logits: Tensor, batch: Batch, examples: Examples) -> dict[str, Any]:
        """Return what prediction gives for a batch."""


class SequenceClassification(Task):
    """One class of a text, several, or a number."""

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        return {"regression": "r2", "multi_label_classification": "f1"}.get(self.problem_type, "acc"), "max"

    def loss(self, logits: Tensor, batch: Batch, weight: Tensor | None, smoothing: float) -> tuple[Tensor, int]:
        logits, labels = logits.float(), batch["labels"]
        if self.problem_type == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.float()), len(labels)
        if self.problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.float(), pos_weight=weight), len(labels)
        return F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing), len(labels)

    def scores(self, examples: Examples, device: torch.device | str, *, shared: bool = True) -> Scores:
        if self.problem_type == "regression":
            return ValueScores(device, shared=shared)
        several = self.problem_type == "multi_label_classification"
        return ClassScores(len(self.label_names), device, several=several, shared=shared)

    def answers(self, logits: Tensor, batch: Batch, examples: Examples) -> dict[str, Any]:
        logits = checked(logits).cpu()
        if self.problem_type == "regression":
            return {"values": logits.squeeze(-1).tolist()}
        if self.problem_type == "multi_label_classification":
            chosen = [[self.label_names[i] for i in row.nonzero().flatten().tolist()] for row in logits > 0]
            return {"probabilities": logits.sigmoid(), "classes": chosen}
        return {"probabilities": logits.softmax(-1), "classes": [self.label_names[i] for i in logits.argmax(-1)]}


class TokenClassification(Task):
    """A class of each word."""

    many_labels = True

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        return "f1", "max"

    def loss(self, logits: Tensor, batch: Batch, weight: Tensor | None, smoothing: float) -> tuple[Tensor, int]:
        return _token_loss(logits, batch["labels"], weight, smoothing)

    def scores(self, examples: Examples, device: torch.device | str, *, shared: bool = True) -> Scores:
        return TagScores(self.label_names, device, shared=shared)

    def answers(self, logits: Tensor, batch: Batch, examples: Examples) -> dict[str, Any]:
        found = checked(logits).argmax(-1).tolist()
        words = batch.get("word_ids") or [range(int(mask.sum())) for mask in batch["attention_mask"]]
        tagged = [
            {int(word): self.label_names[tag] for tag, word in zip(tags, row, strict=False) if word is not None}
            for tags, row in zip(found, words, strict=True)
        ]
        return {"classes": [{word: tag for word, tag in row.items() if word >= 0} for row in tagged]}


class QuestionAnswering(Task):
    """The span of a context that answers a question."""

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        return "f1", "max"

    def logits(self, outputs: Any) -> Tensor:
        return torch.stack([outputs.start_logits, outputs.end_logits], -1)  # (batch, tokens, 2)

    def loss(self, logits: Tensor, batch: Batch, weight: Tensor | None, smoothing: float) -> tuple[Tensor, int]:
        sides = torch.stack([batch["start_positions"], batch["end_positions"]], -1)  # (batch, 2)
        return F.cross_entropy(logits.float(), sides, label_smoothing=smoothing), len(sides)

    def scores(self, examples: Examples, device: torch.device | str, *, shared: bool = True) -> Scores:
        most, null = self.most_tokens, self.null_threshold
        return AnswerScores(examples, most_words=most, null_threshold=null, shared=shared)

    def answers(self, logits: Tensor, batch: Batch, examples: Examples) -> dict[str, Any]:
        found = candidates(checked(logits), batch, most_tokens=self.most_tokens)
        return {"candidates": found, "answers": best_answers(found, _contexts(examples), self.null_threshold)}


class CausalLanguage(Task):
    """Write on from a text."""

    writes = many_labels = True
    shifted: ClassVar[bool] = True
    """The scores at a token are those of the next one."""

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        return "ppl", "min"

    def loss(self, logits: Tensor, batch: Batch, weight: Tensor | None, smoothing: float) -> tuple[Tensor, int]:
        labels = batch["labels"]
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return _token_loss(logits, labels, None, smoothing)

    def scores(self, examples: Examples, device: torch.device | str, *, shared: bool = True) -> Scores:
        return LanguageScores(device, shifted=self.shifted, shared=shared)

    def answers(self, logits: Tensor, batch: Batch, examples: Examples) -> dict[str, Any]:
        raise AssertionError("a language model writes its answers")

    def prompt(self, batch: Batch, *, predicting: bool = False) -> tuple[Tensor, Tensor] | None:
        """Return numbers and mask of what to write on from; None where the batch has no prompts."""
        if "prompt_ids" in batch:
            return batch["prompt_ids"], batch["prompt_mask"]
        if not predicting:
            return None
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
        if not mask[:, -1].all():
            raise DataError("prompts of a causal model are padded on the left: set tokenizer.padding_side = 'left'")
        return batch["input_ids"], mask

    def written(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        """Return what was written, without the prompt that a causal model repeats."""
        return tokens[:, prompt.shape[1] :]


class SequenceToSequence(CausalLanguage):
    """Write a text for a text."""

    shifted = False

    @property
    def monitor(self) -> tuple[str, Literal["min", "max"]]:
        return "rougeL", "max"

    def prompt(self, batch: Batch, *, predicting: bool = False) -> tuple[Tensor, Tensor] | None:
        ids = batch["input_ids"]
        return ids, batch.get("attention_mask", torch.ones_like(ids))

    def written(self, tokens: Tensor, prompt: Tensor) -> Tensor:
        return tokens


TASK: dict[str, type[Task]] = {
    "SEQ_CLS": SequenceClassification,
    "TOKEN_CLS": TokenClassification,
    "QUESTION_ANS": QuestionAnswering,
    "CAUSAL_LM": CausalLanguage,
    "SEQ_2_SEQ_LM": SequenceToSequence,
}


def task_of(task_type: str, **settings: Any) -> Task:
    """Return the task of a type as the field writes it."""
    return TASK[task_type](**settings)


def _token_loss(logits: Tensor, labels: Tensor, weight: Tensor | None, smoothing: float) -> tuple[Tensor, int]:
    logits, labels = logits.flatten(0, -2).float(), labels.flatten()
    counts = labels != IGNORED
    total = F.cross_entropy(
        logits, labels, weight=weight, ignore_index=IGNORED, label_smoothing=smoothing, reduction="sum"
    )
    # a batch whose labels were all cut off has no loss, not NaN
    weights = counts.sum() if weight is None else weight[labels.clamp_min(0)][counts].sum()
    return total / weights.clamp_min(1e-12 if weight is not None else 1), int(counts.sum())


def _contexts(examples: Examples) -> dict[str, str]:
    return {example["id"]: example["context"] for example in examples}
