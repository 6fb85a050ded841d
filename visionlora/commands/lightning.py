"""`visionlora fit | validate | test | predict`: LightningCLI around an adapter, its data and a Trainer."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.plugins.io import CheckpointIO

from visionlora import __version__
from visionlora.commands import runs, words
from visionlora.commands.console import quiet
from visionlora.commands.outputs import SaveStageConfig, loggers, save_results
from visionlora.commands.parser import ShortErrors
from visionlora.commands.recorded import with_recorded_settings
from visionlora.commands.trainer import check_trainer, refusals_told
from visionlora.errors import ConfigError
from visionlora.training.checkpoint import AdapterCheckpoint
from visionlora.training.checkpoint_io import AtomicCheckpointIO
from visionlora.training.failures import ExplainFailures, explained
from visionlora.training.guards import CheckGradients, StopOnNonFinite
from visionlora.training.quiet import ParameterSummary, TellIdle, progress_bar
from visionlora.training.resume import ExactResume
from visionlora.training.signals import StopOnSignal

TRAINER = {f"trainer.{key}" for key in ("max_epochs", "accelerator", "devices", "precision", "accumulate_grad_batches")}
"""Settings of the Trainer that help shows."""


class TrainParser(ShortErrors, LightningArgumentParser):
    """LightningCLI's parser with short errors and without guessed abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {
            "allow_abbrev": False,
            "dump_header": [f"visionlora=={__version__}"],
            "usage": "%(prog)s --SETTING VALUE ...",
        }
        super().__init__(*args, **kwargs)

    def format_help(self, formatter: Any = None) -> str:
        """Return the help without most of the Trainer's settings, which --print_config lists with their values."""
        hidden = {a: a.help for a in self._actions if a.dest.startswith("trainer.") and a.dest not in TRAINER}
        for action in hidden:
            action.help = argparse.SUPPRESS
        try:
            text: str = super().format_help(formatter)
        finally:
            for action, help_text in hidden.items():
                action.help = help_text
        return f"{text}\n--print_config shows every setting with its value, those of Lightning's Trainer too.\n"


def main(args: list[str]) -> int:
    """Run one of the four verbs, on images or on text, and return its exit code."""
    verb, *rest = args
    configs, flags = words.split_configs(rest)
    with quiet():
        if not {"-h", "--help"} & set(flags):
            configs, flags = with_recorded_settings(verb, configs, flags)
        # a model with a task type is one of language; only the side that runs is imported
        kind = "images" if words.model_setting("task_type", configs, flags) is None else "texts"
        command = import_module(f"visionlora.commands.{kind}").COMMAND
        command(configs, [verb, *(w for config in configs for w in ("--config", config)), *flags])
    return 0


class AdapterCLI(LightningCLI, ABC):
    """One adapter, its data and a Trainer, built from flags and configs; a subclass says of what kind."""

    VERBS: ClassVar[dict[str, str]]
    STRUCTURE: ClassVar[tuple[str, ...]]
    """Settings that make the tensors of a checkpoint what they are; a resumed run cannot change them."""

    def __init__(self, configs: list[str], args: list[str], model: Any, data: Any) -> None:
        self.configs, self.args = configs, args
        told = {verb: {"description": f"{text}."} for verb, text in self.VERBS.items()}
        super().__init__(
            model,
            data,
            args=args,
            parser_class=TrainParser,
            parser_kwargs={"prog": "visionlora", **told},
            save_config_callback=SaveStageConfig,
            seed_everything_default=0,
            # LightningCLI's own --optimizer would be given the frozen weights too and ignore --lr_scheduler
            auto_configure_optimizers=False,
            trainer_defaults={"max_epochs": 20, "log_every_n_steps": 1, "num_sanity_val_steps": 0},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # our checkpoints are plain data and are read as such
        return {verb: {*skip, "weights_only"} for verb, skip in LightningCLI.subcommands().items()}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = super().init_parser(**kwargs)
        _explain(parser, "config", "a file, or the name of a shipped config; flags win over it wherever it stands")
        return parser

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.usage = f"visionlora {subcommand} [--config CONFIG] [--SETTING VALUE ...]"
        _explain(parser, "checkpoint.fixed", argparse.SUPPRESS)
        _explain(parser, "ckpt_path", 'a checkpoint file, a run\'s folder, or "last"; what is typed beside it wins')
        _explain(parser, "seed_everything", "seed of the run")
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # our own table replaces Lightning's
        fit = subcommand == "fit"  # the others read the config of a run too
        told = "compare before and after, draw pictures" if fit else argparse.SUPPRESS
        parser.add_argument("--report", type=bool, default=True, help=told)
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False, "trainer.devices": 1})
            parser.add_argument("--source", type=str | None, default=None, help="file, folder or glob to predict on")
            parser.add_argument("--out", type=str, default="predictions", help="OUT.csv and OUT.jsonl are written")
            parser.link_arguments("source", "data.predict_source")
            self.add_prediction_arguments(parser)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        self.link_model_and_data(parser)
        parser.add_lightning_class_args(AdapterCheckpoint, "checkpoint")
        parser.set_defaults({"checkpoint.fixed": list(self.STRUCTURE)})
        parser.add_argument(
            "--run", type=str | None, default=None, help="name of the run's folder (default: the config's)"
        )
        parser.add_argument("--output", type=str, default="runs", help="folder of all runs")
        parser.add_argument("--adapter", type=str | None, default=None, help="adapter to measure or to predict with")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)
        check_trainer(self.config[self.config.subcommand])

    def _parse_ckpt_path(self) -> None:
        """Do nothing: LightningCLI would let the checkpoint's settings win over what was typed, without a word."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        if words.is_typed("trainer.default_root_dir", self.args):
            raise ConfigError("a run is written to the folder OUTPUT/RUN: give --output FOLDER, --run NAME or both")
        if config.checkpoint.directory is not None:  # two runs would share it
            raise ConfigError("checkpoint.directory is the run's folder: give --output FOLDER, --run NAME or both")
        folder = _folder(str(self.subcommand), config, self.configs)
        if folder is None:
            self.save_config_callback = None
        else:
            config.trainer.default_root_dir = str(folder)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self._get(self.config_init, "trainer")
        if config.logger in (None, True):
            config.logger = loggers(Path(config.default_root_dir)) if self.subcommand == "fit" else False
        config.plugins = _plugins(config.plugins)
        config.callbacks = [*_list(config.callbacks), *self._callbacks(config.enable_progress_bar is not False)]
        with refusals_told():
            return super().instantiate_trainer(**kwargs)

    @abstractmethod
    def link_model_and_data(self, parser: LightningArgumentParser) -> None:
        """Declare what the model takes from the data, and the data from the model."""

    def add_prediction_arguments(self, parser: LightningArgumentParser) -> None:
        """Declare further flags of predict."""

    @abstractmethod
    def ignorance(self) -> str:
        """Return why the model without an adapter cannot tell the classes, or nothing."""

    @abstractmethod
    def report(self) -> Callback:
        """Return what compares before and after when training ends."""

    @abstractmethod
    def prediction_writer(self) -> Callback:
        """Return what writes predictions."""

    @abstractmethod
    def results_table(self) -> str:
        """Return the scores of every set as a table."""

    def _callbacks(self, bar: bool) -> list[Callback]:
        checkpoint = self._get(self.config_init, "checkpoint")
        callbacks: list[Callback] = [
            CheckGradients(),
            StopOnNonFinite(),
            ExactResume(),
            ExplainFailures(),
            StopOnSignal(checkpoint, resume_with="visionlora fit --ckpt_path"),
        ]
        callbacks += [ParameterSummary(), TellIdle(), *([progress_bar()] if bar else [])]
        if self.subcommand == "fit" and self._get(self.config, "report"):
            callbacks.append(self.report())
        if self.subcommand == "predict":
            callbacks.append(self.prediction_writer())
        return callbacks

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "fit":
            self._check_trained(subcommand)
        with explained(self.trainer), refusals_told():
            super()._run_subcommand(subcommand)
        if subcommand in ("validate", "test") and self.trainer.is_global_zero:
            print(self.results_table())
            if self.save_config_callback is not None:
                save_results(Path(self.trainer.default_root_dir, f"{subcommand}.json"), self.model.results)

    def _check_trained(self, verb: str) -> None:
        """Raise ConfigError where what would be measured has learned nothing: neither adapter nor checkpoint."""
        config = self.config[verb]
        reason = "" if config.adapter or config.ckpt_path else self.ignorance()
        if reason:
            name = config.run or runs.default_name(self.configs, config.model.model_name)
            last = runs.newest(Path(config.output), name)
            near = f", such as {last / 'adapter'}" if last is not None else ""
            raise ConfigError(
                f"{reason}, there is nothing to {verb}: give --adapter DIRECTORY{near}, or --ckpt_path RUN"
            )


def _explain(parser: LightningArgumentParser, setting: str, text: str) -> None:
    next(action for action in parser._actions if action.dest == setting).help = text


def _folder(verb: str, config: Any, configs: list[str]) -> Path | None:
    """Return where this call writes; None where a measurement belongs to no run."""
    source = config.get("ckpt_path") or config.adapter
    if config.run is None and source is not None and (run := runs.run_of(Path(source))) is not None:
        return run
    if config.run is None and verb != "fit":
        return None
    name = runs.default_name(configs, config.model.model_name) if config.run is None else config.run
    return runs.next_free(Path(config.output), name)


def _plugins(given: Any) -> list[Any]:
    plugins = _list(given)
    return plugins if any(isinstance(p, CheckpointIO) for p in plugins) else [*plugins, AtomicCheckpointIO()]


def _list(given: Any) -> list[Any]:
    if given is None:
        return []
    return list(given) if isinstance(given, (list, tuple)) else [given]
