"""`visionlora doctor`: check a data set before training."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from PIL import Image

from visionlora.data.doctor import Report, examine_csv, examine_tree, render
from visionlora.errors import ConfigError


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Print what was found; 1 if a finding would stop or falsify a training run."""
    if options.task is not None:
        return _text(options)
    classes = _words(options.classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a finding, with the file's name
        if Path(options.data).suffix.lower() == ".csv":
            report = examine_csv(options.data, classes=classes, threads=options.threads)
        else:
            report = examine_tree(options.data, layout=options.layout, classes=classes, threads=options.threads)
    return _told(report, render(report, most=options.most))


def _text(options: argparse.Namespace) -> int:
    from visionlora.text.doctor import examine_text, render_text
    from visionlora.text.layout import ready_tokenizer

    report = examine_text(
        options.data,
        options.task,
        columns=_columns(options.columns),
        classes=_words(options.classes),
        header=_words(options.header),
        template=options.template,
        tokenizer=None if options.tokenizer is None else ready_tokenizer(options.tokenizer, options.task),
        max_length=options.max_length,
    )
    return _told(report, render_text(report, most=options.most))


def _told(report: Report, text: str) -> int:
    print(text)
    return 1 if report.count("error") else 0


def _words(text: str | None) -> list[str] | None:
    return text.split(",") if text else None


def _columns(text: str | None) -> dict[str, str]:
    pairs = [word.partition("=") for word in _words(text) or ()]
    for name, given, column in pairs:
        if not name or not given or not column:
            raise ConfigError(f"--columns is written text=sentence,label=sentiment, got {text!r}")
    return {name: column for name, _, column in pairs}
