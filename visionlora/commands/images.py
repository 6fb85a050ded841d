"""The training verbs on images: ImageClassifier and ImageFolderData."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import ClassVar

from pytorch_lightning import Callback
from pytorch_lightning.cli import LightningArgumentParser

from visionlora.commands import words
from visionlora.commands.lightning import AdapterCLI
from visionlora.commands.outputs import WritePredictions, results_table
from visionlora.commands.scenes import Scenes, draw
from visionlora.config import LoraConfig
from visionlora.errors import ConfigError
from visionlora.report.run import RunReport, ignorance
from visionlora.vision.datamodule import ImageFolderData
from visionlora.vision.loading import load_model
from visionlora.vision.module import ImageClassifier

log = logging.getLogger(__name__)


class ImageCLI(AdapterCLI):
    """An adapter of an image classifier."""

    VERBS: ClassVar = {
        "fit": "Train an adapter, keep the best, show what was gained and what was forgotten",
        "validate": "Measure a checkpoint or an adapter on the validation images",
        "test": "Measure a checkpoint or an adapter on the test images, domain by domain",
        "predict": "Classify a file, a folder or a glob; write CSV and JSONL",
    }
    STRUCTURE = ("model_name", "model_args", "num_classes", "class_names", "mode", "memory", "lora", "adapter_name")

    def __init__(self, configs: list[str], args: list[str]) -> None:
        lora_is_given = words.is_typed("model.lora", args) or words.model_setting("lora", configs, []) is not None
        # what is asked for is what is trained, be it the defaults by name
        self._as_it_is = lora_is_given and words.model_setting("recipe", configs, args) is None
        super().__init__(configs, args, ImageClassifier, ImageFolderData)

    def link_model_and_data(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.model_name", "data.model_name")
        parser.link_arguments("model.model_args", "data.model_args")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.class_names", "model.class_names", apply_on="instantiate")
        parser.link_arguments("data.record", "model.data", apply_on="instantiate")
        parser.add_argument("--scenes", type=Scenes | None, default=None, help="draw scenes into data.root beforehand")

    def add_prediction_arguments(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--top", type=int, default=5, help="likeliest classes listed for each image")

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if self._as_it_is:
            config.model.recipe = "none"
        if config.scenes is not None:
            LoraConfig.from_dict(config.model.lora.as_dict())  # what it refuses, it refuses before hundreds are drawn
            if config.data.root is None:
                raise ConfigError("scenes are drawn into data.root: set it to a folder")
            draw(Path(config.data.root), Scenes(**config.scenes))
        self.checkpoint = config.model.checkpoint
        if config.adapter is not None:
            config.model.checkpoint = None  # its weights go into the adapted network, which replaces the one made first
        super().before_instantiate_classes()

    def after_instantiate_classes(self) -> None:
        adapter = self._get(self.config, "adapter")
        if self.subcommand == "fit" and self._drawn() and self._get(self.config, "model").mode != "full":
            log.warning(
                "pretrained: false without a checkpoint: the base is random and lies in no file, so that its adapter "
                "cannot be loaded again; mode full keeps the whole model"
            )
        if adapter is not None:
            self._get(self.config, "model").checkpoint = self.checkpoint
            self.model.net = load_model(adapter, checkpoint=self.checkpoint)

    def ignorance(self) -> str:
        return "the weights are random" if self._drawn() else ignorance(self.model)

    def _drawn(self) -> bool:
        model = self._get(self.config, "model")
        return not model.pretrained and model.checkpoint is None

    def report(self) -> Callback:
        return RunReport()

    def prediction_writer(self) -> Callback:
        return WritePredictions(self._get(self.config, "out"), top=self._get(self.config, "top"))

    def results_table(self) -> str:
        return results_table(self.model.results)


COMMAND = ImageCLI
