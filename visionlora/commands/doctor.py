"""`visionlora doctor`: check a data set before training."""

from __future__ import annotations

import argparse
from pathlib import Path

from visionlora.data.doctor import examine_csv, examine_tree, render


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Print what was found; 1 if a finding would stop or falsify a training run."""
    classes = options.classes.split(",") if options.classes else None
    if Path(options.data).suffix.lower() == ".csv":
        report = examine_csv(options.data, classes=classes, threads=options.threads)
    else:
        report = examine_tree(options.data, layout=options.layout, classes=classes, threads=options.threads)
    print(render(report, most=options.most))
    return 1 if report.count("error") else 0
