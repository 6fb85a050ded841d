"""The training verbs on text: TextTask and TextData."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import LightningArgumentParser

from visionlora.commands.answers import WriteAnswers
from visionlora.commands.lightning import AdapterCLI
from visionlora.commands.recorded import text_record
from visionlora.errors import BaseMismatchError
from visionlora.report.head import has_new_head
from visionlora.report.texts import TextReport, scores_table
from visionlora.text.datamodule import TextData
from visionlora.text.layout import identity
from visionlora.text.loading import load_model
from visionlora.text.module import TextTask
from visionlora.training.checkpoint import AdapterCheckpoint

AUTO = "auto"
"""The metric that tells the best adapter of the task."""


class TextCLI(AdapterCLI):
    """An adapter of a language model."""

    VERBS: ClassVar = {
        "fit": "Train an adapter, keep the best, show what was gained and what was forgotten",
        "validate": "Measure a checkpoint or an adapter on the validation texts",
        "test": "Measure a checkpoint or an adapter on the test texts, domain by domain",
        "predict": "Answer every row of a file, a folder or a glob; write CSV and JSONL",
    }
    STRUCTURE = (
        *("model_name", "model_args", "task_type", "label_names", "problem_type", "mode", "lora", "adapter_name"),
        *("new_tokens", "untied"),
    )

    def __init__(self, configs: list[str], args: list[str]) -> None:
        super().__init__(configs, args, TextTask, TextData)

    def link_model_and_data(self, parser: LightningArgumentParser) -> None:
        for name in ("model_name", "task_type", "problem_type"):
            parser.link_arguments(f"model.{name}", f"data.{name}")
        parser.link_arguments("data.label_names", "model.label_names", apply_on="instantiate")
        parser.link_arguments("data.record", "model.data", apply_on="instantiate")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.set_defaults({"checkpoint.monitor": AUTO})

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        checkpoint = self._get(self.config_init, "checkpoint")
        if isinstance(checkpoint, AdapterCheckpoint) and checkpoint.monitor == AUTO:
            checkpoint.monitor, checkpoint.mode = self.model.monitor
        return super().instantiate_trainer(**kwargs)

    def after_instantiate_classes(self) -> None:
        adapter = self._get(self.config, "adapter")
        if adapter is None:
            return
        record, data = text_record(Path(adapter)), self.datamodule
        wanted = ((record or {}).get("data", {}).get("tokenizer") or {}).get("fingerprint")
        if wanted is not None and wanted != identity(data.tokenizer):
            raise BaseMismatchError(
                f"{adapter} was trained with another tokenizer than that of {data.model_name}; give --model.model_name "
                "or --data.tokenizer the folder of the one it was trained with"
            )
        name = self._get(self.config, "model").model_name
        self.model.net = load_model(adapter, base=name if Path(name).exists() and not _is_whole(adapter) else None)

    def ignorance(self) -> str:
        if not self._get(self.config, "model").pretrained:
            return "the weights are random"
        return "the model has no head for this task" if has_new_head(self.model.net) else ""

    def report(self) -> Callback:
        return TextReport()

    def prediction_writer(self) -> Callback:
        return WriteAnswers(self._get(self.config, "out"))

    def results_table(self) -> str:
        return scores_table(self.model.results)


def _is_whole(directory: str) -> bool:
    record = text_record(Path(directory))
    return record is not None and "plan" not in record


COMMAND = TextCLI
