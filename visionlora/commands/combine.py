"""`visionlora combine`: make one adapter of several."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from visionlora.adapt import remove
from visionlora.commands.runs import weights_of_base
from visionlora.compose import Combination, combine
from visionlora.compose.files import check_bases, labelled, merged_classes, merged_input
from visionlora.compose.recipe import check_method
from visionlora.config import check_adapter_name
from visionlora.errors import ConfigError
from visionlora.io import AdapterFile, load_adapter, read_adapter, save_adapter
from visionlora.io.read import WEIGHTS
from visionlora.overview import readable_size
from visionlora.vision.loading import load_model


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Write the new adapter to OUT and show what was kept of every layer."""
    out, name = Path(options.out), check_adapter_name(options.name)
    if (out / WEIGHTS).exists() and not options.force:
        raise ConfigError(f"{out} holds an adapter; choose another folder or pass --force to replace it")
    check_method(options.method)
    paths = [Path(path) for path in options.adapters]
    files = labelled(paths, [read_adapter(path) for path in paths], taken=name)
    if options.weights is not None and len(options.weights) != len(files):
        raise ConfigError(
            f"{len(files)} adapters need {len(files)} weights, --weights has {len(options.weights)}; "
            f"in the order {', '.join(files)}"
        )
    report = combined(files, out, name, options)
    print(report)
    print(f"{out}: {readable_size((out / WEIGHTS).stat().st_size)}")
    return 0


def combined(files: Mapping[str, AdapterFile], out: Path, name: str, options: argparse.Namespace) -> Combination:
    """Write the combination of adapters of one base. Raises, nothing written, where they do not go together."""
    check_bases(files)
    classes, data = merged_classes(files, options.head), merged_input(files)
    model, base = _model(files, options.head, options.checkpoint)
    report = combine(
        model,
        list(files) if options.weights is None else dict(zip(files, options.weights, strict=True)),
        method=options.method,
        rank=options.rank,
        name=name,
        head=options.head,
        norm=options.norm,
        density=options.density,
        seed=options.seed,
    )
    metrics = {"combination": report.totals()[:512], "combination/error": report.error}
    known = {key: base.record["base"][key] for key in ("name", "tag", "args")}
    save_adapter(model, out, name=name, base=known, classes=classes, data=data, metrics=metrics)
    return report


def _model(files: Mapping[str, AdapterFile], head: str, checkpoint: str | None) -> tuple[nn.Module, AdapterFile]:
    """Return the base, built as for the adapter whose head is taken over, with all adapters, and that adapter."""
    named = [file for file in files.values() if file.record["base"]["name"]]  # PEFT records no base
    base = files.get(head) or next(iter(named), next(iter(files.values())))
    model = remove(load_model(base.path, checkpoint=checkpoint or weights_of_base(base.path.parent)))
    for name, file in files.items():
        load_adapter(model, file.path, name=name, allow_other_classes=True)
    return model, base
