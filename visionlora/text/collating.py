"""Batches: features padded by transformers' collators, with what evaluation needs beside the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from visionlora.text.columns import Example, TaskType
from visionlora.text.extras import need
from visionlora.text.prompts import answer_of
from visionlora.text.settings import TokenSettings

__all__ = ["Collate", "rows_of_stage"]

ASIDE = ("row", "prompt", "offsets", "word_ids")
"""Columns of features that are no input of a model."""
Items = list[dict[str, Any]]


class Collate:
    """Pads features to the longest of their batch, on the right; prompts to be continued on the left.

    Labels and masks follow the lengths, never the number of the padding token: where it is the end token too, as in
    GPT-2, the end of a text is learned all the same.
    """

    def __init__(self, tokenizer: Any, settings: TokenSettings, examples: Sequence[Example] | None = None) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.rows = None if examples is None else rows_of_stage(examples, settings.task)
        """The rows that evaluation compares with; None in training."""
        self._pad = _collator(tokenizer, settings.task)

    def __call__(self, items: Items) -> dict[str, Any]:
        """Return a batch: tensors, and in evaluation lists: rows, example_id, offset_mapping, word_ids, references."""
        inputs = [{k: v for k, v in item.items() if k not in ASIDE} for item in items]
        opened = self.settings.task == "CAUSAL_LM" and not self.settings.answered
        padded = self._left(item["input_ids"] for item in items) if opened else self._pad(inputs)
        batch = {name: value for name, value in padded.items() if value is not None}
        if self.settings.problem == "multi_label_classification" and "labels" in batch:
            batch["labels"] = batch["labels"].float()
        return batch if self.rows is None else {**batch, **self._aside(items, self.rows)}

    def _aside(self, items: Items, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        places = [item["row"] for item in items]
        found: dict[str, Any] = {"rows": places}
        if self.settings.task == "QUESTION_ANS":
            found["example_id"] = [rows[at]["id"] for at in places]
            found["offset_mapping"] = [_pairs(item["offsets"]) for item in items]
        if self.settings.task == "TOKEN_CLS":
            found["word_ids"] = [[None if n < 0 else n for n in item["word_ids"]] for item in items]
        if self.settings.answered and self.settings.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
            references = [rows[at].get("target") for at in places]
            if None not in references:
                found["references"] = references
        if self.settings.answered and self.settings.task == "CAUSAL_LM" and all(item["prompt"] for item in items):
            prompts = self._left(item["input_ids"][: item["prompt"]] for item in items)
            found |= {"prompt_ids": prompts["input_ids"], "prompt_mask": prompts["attention_mask"]}
        return found

    def _left(self, ids: Any) -> dict[str, Any]:
        padded = self.tokenizer.pad(
            {"input_ids": list(ids)},
            padding_side="left",
            return_attention_mask=True,
            return_tensors="pt",
            verbose=False,
        )
        return dict(padded)


def rows_of_stage(
    examples: Sequence[Example], task: TaskType, *, whole: bool = False, columns: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return the examples as rows: what the task reads of them, with the target where a text is to be written.

    With whole the columns that the task does not read come first: an id, a date.
    """
    rows, read = [], set((columns or {}).values())
    for example in examples:
        more = {name: cell for name, cell in example.cells.items() if name not in read} if whole else {}
        row = {**more, **example.fields}
        if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and (answer := answer_of(example)) is not None:
            row["target"] = answer
        rows.append(row)
    return rows


def _collator(tokenizer: Any, task: TaskType) -> Callable[[Items], Mapping[str, Any]]:
    kinds = {
        "TOKEN_CLS": "DataCollatorForTokenClassification",
        "CAUSAL_LM": "DataCollatorForSeq2Seq",  # pads labels beside the inputs
        "SEQ_2_SEQ_LM": "DataCollatorForSeq2Seq",
    }
    make: Any = getattr(need("transformers"), kinds.get(task, "DataCollatorWithPadding"))
    collator: Callable[[Items], Mapping[str, Any]] = make(tokenizer)
    return collator


def _pairs(offsets: Sequence[int]) -> list[tuple[int, int] | None]:
    return [None if a < 0 else (a, b) for a, b in zip(offsets[::2], offsets[1::2], strict=True)]
