"""Text files and data sets as loaders for training, validation, tests by domain, and prediction."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sized
from functools import cached_property, partial
from typing import Any

from torch.utils.data import DataLoader, Sampler

from visionlora.data.dataset import OnError
from visionlora.data.parts import Division, check_fractions
from visionlora.errors import ConfigError, DataError
from visionlora.text.caching import cache_folder
from visionlora.text.columns import TaskType, check_task
from visionlora.text.divided import DividedTexts
from visionlora.text.labels import ProblemType, check_problem
from visionlora.text.layout import fitting_length, identity, ready_tokenizer
from visionlora.text.loaders import Loaders
from visionlora.text.packing import Packing
from visionlora.text.prompts import Chat
from visionlora.text.reading import Documents, read_rows, rows_of
from visionlora.text.settings import Overlong, TokenSettings, check_choices
from visionlora.training.sampler import ResumableSampler

__all__ = ["TextData"]

logger = logging.getLogger(__name__)


class TextData(DividedTexts):
    """Text, divided, tokenised and batched for a model of transformers.

    The data set is a file (.csv, .tsv, .jsonl, .json, .parquet, .txt), a folder of such files, a folder written by
    save_to_disk, or a data set by its name on the Hugging Face hub. Columns: SEQ_CLS text[,text_pair],label;
    TOKEN_CLS tokens,tags; QUESTION_ANS question,context,answers (SQuAD's form, none means no answer); CAUSAL_LM text,
    or prompt,response, or messages; SEQ_2_SEQ_LM source,target; all of them [,domain][,split]. Tests come as several
    loaders, named by test_names: "target" first, then single domains, "source" last.

    Args:
        root: file, folder, glob or name of the data set.
        val_root: likewise, all of it for validation.
        test_root: likewise, all of it for the test.
        subset: of a data set of the hub that has several, such as sst2 of nyu-mll/glue.
        header: names of the columns of tables without a header line.
        documents: what is one document of a .txt file.
        columns: the data set's own column names by the task's: {text: sentence, label: sentiment}.
        train_domains: domains to train on; by default all that are neither tested nor the source.
        test_domains: domains that measure the target; by default examples held out of the training domains, and every
            other domain on its own.
        source_root: another data set like the base's own training, which measures forgetting.
        source_domains: domains of source_root, or of the data set itself, that measure forgetting.
        classes: labels or tags in the order of their numbers; by default the sorted ones of the training examples.
        val_fraction: share held out for validation, where the files name no validation split.
        test_fraction: share held out as target test, where the files name no split and there are no test_domains.
        split_seed: of held-out parts and shots.
        group_by: column whose equal values stay in one part; equal texts, and questions about one context, always do.
        shots: training examples of each label; by default all.
        template: how a row becomes a prompt (CAUSAL_LM) or a source (SEQ_2_SEQ_LM), with columns in braces:
            "Summarize: {dialogue}"; the response or the target keeps its column.
        chat: auto writes prompts as the tokenizer's chat template does, where it has one; off writes plain lines.
        seed: of the order of training examples; by default the run's seed_everything.
        model_name: model of transformers, a name or a folder, whose tokenizer is used.
        tokenizer: name or folder of another tokenizer, or a tokenizer; by default the model's own.
        task_type: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, CAUSAL_LM or SEQ_2_SEQ_LM.
        problem_type: of SEQ_CLS: one label, several labels (a list), or a number to predict.
        max_length: tokens of an input; by default 512, for questions 384, or what the tokenizer allows.
        max_target_length: tokens of what is to be written; 64, or a quarter of max_length where that is less.
        stride: tokens that two windows of one long context share; 128, or a quarter of max_length where that is less.
        overlong: what becomes of longer inputs: cut, split (TOKEN_CLS, QUESTION_ANS, documents of CAUSAL_LM) or raise;
            auto splits where that is possible and cuts elsewhere. A prompt that is cut loses its middle.
        packing: documents puts several training documents of CAUSAL_LM in one row; they do not see each other.
        batch_size: features in a batch, on each device.
        num_workers: processes that make batches; the tokens are ready, so one process is mostly enough.
        on_error: raise stops at an example that cannot be used, skip leaves it out, logs and counts it.
        train_sampler: makes a sampler for the training features; by default a ResumableSampler, which a run can resume.
        predict_source: file, folder or glob to predict on; labels are not needed there.
        cache: folder that keeps tokens for the next run; auto is the user's cache folder, none keeps nothing.
    """

    def __init__(
        self,
        root: str | None = None,
        *,
        val_root: str | None = None,
        test_root: str | None = None,
        subset: str | None = None,
        header: list[str] | None = None,
        documents: Documents = "line",
        columns: dict[str, str] | None = None,
        train_domains: list[str] | None = None,
        test_domains: list[str] | None = None,
        source_root: str | None = None,
        source_domains: list[str] | None = None,
        classes: list[str] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        split_seed: int = 0,
        group_by: str | None = None,
        shots: int | None = None,
        template: str | None = None,
        chat: Chat = "auto",
        seed: int | None = None,
        model_name: str | None = None,
        tokenizer: Any = None,
        task_type: TaskType | None = None,
        problem_type: ProblemType = "single_label_classification",
        max_length: int | None = None,
        max_target_length: int | None = None,
        stride: int | None = None,
        overlong: Overlong = "auto",
        packing: Packing = "none",
        batch_size: int = 32,
        num_workers: int = 0,
        on_error: OnError = "raise",
        train_sampler: Callable[[Sized], Sampler[int]] | None = None,
        predict_source: str | None = None,
        cache: str = "auto",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["train_sampler", "tokenizer"], logger=False)
        if task_type is None:
            raise ConfigError("task_type is needed: SEQ_CLS, TOKEN_CLS, QUESTION_ANS, CAUSAL_LM or SEQ_2_SEQ_LM")
        self.task_type = check_task(task_type)
        self.problem_type = check_problem(problem_type, self.task_type)
        check_choices(self.hparams, self.task_type)
        check_fractions(val_fraction, test_fraction)
        self.root, self.val_root, self.test_root, self.source_root = root, val_root, test_root, source_root
        self.predict_source, self.template, self.chat, self.packing = predict_source, template, chat, packing
        self.batch_size, self.num_workers, self.on_error, self.seed = batch_size, num_workers, on_error, seed
        self.train_sampler, self.model_name, self.cache = train_sampler, model_name, cache_folder(cache)
        self.columns = {**(columns or {}), **({"group": group_by} if group_by is not None else {})}
        self._read = partial(read_rows, subset=subset, header=header, documents=documents)
        self._classes, self._tokenizer = classes, tokenizer
        self._lengths = (max_length, max_target_length, stride, overlong)
        self._division = Division(
            train_domains, test_domains, source_domains, val_fraction, test_fraction, split_seed, None, shots
        )

    @classmethod
    def from_rows(cls, rows: Any, **settings: Any) -> TextData:
        """Return the data module of rows in memory: dicts, a pandas frame, a Dataset, or a dict of these by split."""
        data = cls("rows", **settings)
        data._rows = rows_of(rows)
        return data

    @property
    def record(self) -> dict[str, Any]:
        """What the texts go through, as plain data."""
        settings = self._settings().to_dict()
        name = self._tokenizer if isinstance(self._tokenizer, str) else self.model_name
        return {
            **{key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
            "tokenizer": {"name": name, "fingerprint": identity(self.tokenizer)},
            "columns": self.columns,
            "packing": self.packing,
        }

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer, padding on the right. Raises ConfigError where it cannot be had or cannot pad."""
        given = self._tokenizer if self._tokenizer is not None else self.model_name
        if given is None:
            raise ConfigError("no tokenizer: give model_name or tokenizer")
        return ready_tokenizer(given, self.task_type)

    def prepare_data(self) -> None:
        """Tokenise in one process of a node where there are several, which then read what it kept."""
        several = self.trainer is not None and self.trainer.world_size > 1
        if several and self.cache is not None and self.root is not None:
            for part, examples in self._by_part.items():
                if examples:
                    self._loaders.tokens(part, examples, self._settings())

    def train_dataloader(self) -> DataLoader[Any]:
        devices = self.trainer.world_size if self.trainer is not None else 1
        make = self.train_sampler or self._resumable
        return self._loaders.training(self.parts.train, self._settings(), self.packing, make, devices=devices)

    def val_dataloader(self) -> DataLoader[Any]:
        if not self.parts.val:
            raise DataError("no validation examples: set val_fraction above 0, or --trainer.limit_val_batches 0")
        return self._loaders.evaluation("val", self.parts.val, self._settings())

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [
            self._loaders.evaluation(f"test {name}", part, self._settings()) for name, part in self.parts.tests.items()
        ]

    def predict_dataloader(self) -> DataLoader[Any]:
        if self.predict_source is None:
            raise DataError("nothing to predict: give a file, folder or glob as --source (in Python: predict_source)")
        return self._loaders.evaluation("predict", self._to_predict, self._settings(answered=False))

    def statistics_dataloader(self) -> DataLoader[Any]:
        """Return the training examples as evaluation sees them, once and in order, to estimate statistics."""
        return self._loaders.evaluation("train", self.parts.train, self._settings())

    def teardown(self, stage: str) -> None:
        for name, places in self.skipped.items():
            logger.warning("%s: %d examples could not be used", name, len(places))

    @cached_property
    def _loaders(self) -> Loaders:
        return Loaders(self.tokenizer, self.cache, batch_size=self.batch_size, num_workers=self.num_workers)

    def _settings(self, *, answered: bool = True) -> TokenSettings:
        longest, target, stride, overlong = self._lengths
        length = fitting_length(self.tokenizer, longest, self.task_type)
        return TokenSettings(
            self.task_type, length, min(64, length // 4) if target is None else target,
            min(128, length // 4) if stride is None else stride, overlong, self.template, self.chat,
            self.problem_type, tuple(self.label_names or ()) if answered else (), answered,
        )  # fmt: skip

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """What was cut, split and dropped so far, by part."""
        return {part: features.counts for part, features in self._loaders.features.items()}

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", "0")) if self.seed is None else self.seed

    def _resumable(self, data: Sized) -> Sampler[int]:
        return ResumableSampler(len(data), seed=self._seed())
