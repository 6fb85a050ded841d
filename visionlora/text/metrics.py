"""Scores of a language task over one set of examples, by torchmetrics, and the checks without which they would lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric, MeanSquaredError, MetricCollection, R2Score
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassF1Score,
    MultilabelAccuracy,
    MultilabelF1Score,
)
from torchmetrics.text import BLEUScore, Perplexity, ROUGEScore, SQuAD

from visionlora.text.entities import entity_f1
from visionlora.text.scores import IGNORED, Result, Scores, checked, from_all
from visionlora.text.spans import Candidate, best_answers, candidates

__all__ = ["AnswerScores", "ClassScores", "LanguageScores", "Result", "Scores", "TagScores", "ValueScores"]


class ClassScores(Scores):
    """One class, or any number of classes, of each text."""

    def __init__(self, classes: int, device: torch.device | str = "cpu", *, several: bool, shared: bool = True) -> None:
        super().__init__(shared)
        self.several = several
        options: dict[str, Any] = {"sync_on_compute": shared, "validate_args": False}  # we check, with better words
        if several:
            options["num_labels"] = classes
            metrics = {
                "acc": MultilabelAccuracy(average="micro", **options),
                "f1": MultilabelF1Score(average="macro", **options),
            }
        else:
            options["num_classes"] = classes
            metrics = {
                "acc": MulticlassAccuracy(average="micro", **options),
                "f1": MulticlassF1Score(average="macro", **options),
                "ece": MulticlassCalibrationError(n_bins=15, norm="l1", **options),
            }
        self.metrics = MetricCollection(metrics).to(device)  # type: ignore[arg-type]
        self.loss = MeanMetric(sync_on_compute=shared).to(device)

    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        logits, labels = checked(logits), batch["labels"]
        loss = F.binary_cross_entropy_with_logits if self.several else F.cross_entropy
        self.metrics.update(logits.sigmoid() if self.several else logits.softmax(-1), labels.long())
        self.loss.update(loss(logits, labels.float() if self.several else labels), weight=len(labels))
        self.count += len(labels)

    def values(self) -> dict[str, float]:
        return {"loss": float(self.loss.compute())} | {k: float(v) for k, v in self.metrics.compute().items()}


class ValueScores(Scores):
    """A number for each text."""

    def __init__(self, device: torch.device | str = "cpu", *, shared: bool = True) -> None:
        super().__init__(shared)
        self.mse = MeanSquaredError(sync_on_compute=shared).to(device)
        self.r2 = R2Score(sync_on_compute=shared).to(device)

    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        found, labels = checked(logits).squeeze(-1), batch["labels"].float()
        self.mse.update(found, labels)
        self.r2.update(found, labels)
        self.count += len(labels)

    def values(self) -> dict[str, float]:
        mse = float(self.mse.compute())
        return {"loss": mse, "mse": mse} | ({"r2": float(self.r2.compute())} if self.count > 1 else {})


class TagScores(Scores):
    """A class of each word: right words, F1 of classes, F1 of whole entities where the classes are B-, I- and O."""

    def __init__(self, names: Sequence[str], device: torch.device | str = "cpu", *, shared: bool = True) -> None:
        super().__init__(shared)
        self.names = list(names)
        options: dict[str, Any] = {"num_classes": len(names), "sync_on_compute": shared, "validate_args": False}
        self.metrics = MetricCollection(
            {
                "acc": MulticlassAccuracy(average="micro", **options),
                "token_f1": MulticlassF1Score(average="macro", **options),
            }
        ).to(device)
        self.loss = MeanMetric(sync_on_compute=shared).to(device)
        self._tags: list[tuple[int, int, int, int]] = []
        """(row, word, right tag, found tag)"""

    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        counts = batch["labels"] != IGNORED
        labels, logits = batch["labels"][counts], checked(logits)
        found = logits[counts]
        if not len(labels):
            return
        self.metrics.update(found.argmax(-1), labels)
        self.loss.update(F.cross_entropy(found, labels), weight=len(labels))
        rows = batch.get("rows") or range(self.count, self.count + len(counts))
        where = counts.nonzero().tolist()
        words = [_word(batch, i, t) for i, t in where]
        places = [rows[i] for i, _ in where]
        self._tags += zip(places, words, labels.tolist(), found.argmax(-1).tolist(), strict=True)
        self.count += len(labels)

    def values(self) -> dict[str, float]:
        values = {"loss": float(self.loss.compute())} | {k: float(v) for k, v in self.metrics.compute().items()}
        entities = any(name[:2] in ("B-", "I-", "S-", "E-") for name in self.names)
        # a row may come in several windows, of several processes
        tags = sorted(set(from_all(self._tags) if self.shared else self._tags))
        return {**values, "f1": entity_f1(tags, self.names) if entities else values["token_f1"]}


class AnswerScores(Scores):
    """A span of each context: exact matches and F1 of words, as SQuAD counts them."""

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        *,
        most_words: int,
        null_threshold: float | None,
        shared: bool = True,
    ) -> None:
        super().__init__(shared)
        self.examples = {example["id"]: example for example in examples}
        self.most_tokens, self.null_threshold = most_words, null_threshold
        self._found: list[Candidate] = []
        self._losses: list[float] = []

    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        logits = checked(logits)
        self._found += candidates(logits, batch, most_tokens=self.most_tokens)
        if "start_positions" in batch:
            ends = torch.stack([batch["start_positions"], batch["end_positions"]], -1)  # (batch, 2)
            self._losses.append(float(F.cross_entropy(logits, ends)) * len(logits))
        self.count += len(logits)

    def compute(self) -> Result:
        result = super().compute()
        return Result(int(result.values.pop("questions")), result.values)

    def values(self) -> dict[str, float]:
        found = from_all(self._found) if self.shared else self._found
        texts = best_answers(found, {k: e["context"] for k, e in self.examples.items()}, self.null_threshold)
        metric = SQuAD(sync_on_compute=False)
        for key, text in texts.items():
            answers = self.examples[key]["answers"]
            given = answers["text"] or [""]  # a question without an answer
            target = {"id": key, "answers": {"text": list(given), "answer_start": list(answers["answer_start"] or [0])}}
            metric.update([{"id": key, "prediction_text": text}], [target])
        scores = metric.compute()
        losses, counts = (from_all(v) if self.shared else v for v in (self._losses, [self.count]))
        loss = {"loss": sum(losses) / sum(counts)} if losses else {}
        em, f1 = float(scores["exact_match"]) / 100, float(scores["f1"]) / 100
        return {**loss, "em": em, "f1": f1, "questions": len(texts)}


class LanguageScores(Scores):
    """The next token everywhere: perplexity; and where texts were written, how near they come to the references."""

    def __init__(self, device: torch.device | str = "cpu", *, shifted: bool, shared: bool = True) -> None:
        super().__init__(shared)
        self.shifted = shifted
        self.perplexity = Perplexity(ignore_index=IGNORED, sync_on_compute=shared).to(device)
        self._texts: list[tuple[str, str]] = []

    def update(self, logits: Tensor, batch: Mapping[str, Any]) -> None:
        labels, logits = batch["labels"], checked(logits)
        if self.shifted:
            logits, labels = logits[:, :-1], labels[:, 1:]
        self.perplexity.update(logits, labels)
        self.count += int((labels != IGNORED).sum())

    def add_texts(self, written: Sequence[str], references: Sequence[str]) -> None:
        """Count what was written for each prompt and what should have been."""
        self._texts += zip(written, references, strict=True)

    def values(self) -> dict[str, float]:
        perplexity = self.perplexity.compute()
        values = {"loss": float(perplexity.log()), "ppl": float(perplexity)}
        texts = from_all(self._texts) if self.shared else self._texts
        return values | (_closeness(texts) if texts else {})


def _closeness(texts: Sequence[tuple[str, str]]) -> dict[str, float]:
    written, references = (list(column) for column in zip(*texts, strict=True))  # a tuple is read letter by letter
    # its other keys ask for data that nltk would download
    rouge = ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL"), sync_on_compute=False)(written, references)
    bleu = BLEUScore(sync_on_compute=False)(written, [[reference] for reference in references])
    exact = sum(a.strip() == b.strip() for a, b in texts) / len(texts)
    named = {name: float(rouge[f"{name}_fmeasure"]) for name in ("rouge1", "rouge2", "rougeL")}
    return {"exact": exact, "bleu": float(bleu), **named}


def _word(batch: Mapping[str, Any], row: int, token: int) -> int:
    words = batch.get("word_ids")
    word = words[row][token] if words is not None else None
    return token if word is None else int(word)
