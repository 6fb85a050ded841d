"""`visionlora convert`: an adapter from the files of one library to those of another."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from math import hypot
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from visionlora.adapt import activate, remove
from visionlora.atomic import atomic_path, write_atomic
from visionlora.commands.runs import weights_of_base
from visionlora.config import check_adapter_name
from visionlora.errors import ConfigError, StateError
from visionlora.io import load_adapter, save_adapter
from visionlora.io.card import GENERATED
from visionlora.io.formats import (
    Format,
    Imported,
    Written,
    detect,
    difference,
    lycoris_tensors,
    peft_tensors,
    put_on,
    read_loralib,
    read_lycoris,
    read_peft,
)
from visionlora.io.formats.factors import Factors
from visionlora.io.read import CARD, MIRROR, PEFT_CONFIG, WEIGHTS
from visionlora.overview import readable_size, table
from visionlora.registry import adapter_names, adapter_plan
from visionlora.vision.backbone import create_backbone, data_config
from visionlora.vision.loading import load_model

TOLERANCE = 1e-5
"""Largest accepted difference of a layer's change where nothing was approximated, relative to the change."""


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Write OUT and tell what it holds, and how far it is from SOURCE."""
    source, out = Path(options.source), Path(options.out)
    found: Format = detect(source) if options.from_ == "auto" else options.from_
    _check_options(options, found, out)
    model, notes, read_so = opened(source, found, options)
    name = adapter_names(model)[0]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=out.parent) as temporary:
        written = Path(temporary) / out.name
        content = write(model, name, written, options)
        lost, shares = difference(model, name, _read_back(model, written, options), name)
        _check_equal(shares, content.decomposed, out)
        size = _place(written, out)
    notices = [f"notice: {note}" for note in (*notes, *content.notes)]
    told = [*notices, *_report("read", read_so), *_report("written", content.decomposed)]
    print("\n".join([*told, _summary(model, name, found, options.to)]))
    print(f"{out}: {readable_size(size)}, the change of the weights equal to {hypot(lost, _share(read_so)):.1e}")
    return 0


def opened(source: Path, found: Format, options: argparse.Namespace) -> tuple[nn.Module, list[str], dict[str, Factors]]:
    """Return the base with the adapter of SOURCE on it, notes on the reading, and what had to be decomposed for it."""
    if found == "visionlora" and options.model is None:
        return load_model(source, checkpoint=options.checkpoint or weights_of_base(source), quantize="none"), [], {}
    if options.model is None:
        raise ConfigError(f"{source} ({found}) does not say for which model it is: name it with --model NAME")
    args = {} if options.img_size is None else {"img_size": options.img_size}
    net = create_backbone(
        options.model, checkpoint=options.checkpoint, num_classes=options.num_classes, model_args=args
    ).eval()
    if found == "visionlora":
        activate(net, load_adapter(net, source))
        return net, [], {}
    imported = read(net, source, found, options)
    decomposed = put_on(net, imported, name=options.name, rank=_rank(options))
    notes = [f"its input is recorded as timm has it for {options.model}"] if options.to == "visionlora" else []
    return net.eval(), [*imported.notes, *notes], decomposed


def read(model: nn.Module, source: Path, found: Format, options: argparse.Namespace) -> Imported:
    """Return the adapter of another library's file."""
    if found == "peft":
        return read_peft(model, source)
    if found == "kohya":
        return read_lycoris(model, source, prefix=options.prefix)
    if options.alpha is None:
        raise ConfigError(f"{source}: loralib's files lack lora_alpha, and with it the strength; give it with --alpha")
    parts = tuple(part for part in (options.parts or "").replace(" ", "").split(",") if part)
    return read_loralib(model, source, alpha=options.alpha, parts=parts)


def write(model: nn.Module, name: str, out: Path, options: argparse.Namespace) -> Written:
    """Write a file or a folder that does not exist yet; return what it holds where that is not ours."""
    if options.to == "visionlora":
        save_adapter(
            model,
            out,
            name=name,
            data=data_config(model, model_args={"img_size": options.img_size} if options.img_size else None),
        )
        return Written({})
    if options.to == "kohya":
        content = lycoris_tensors(model, name, prefix=options.prefix or "lycoris", rank=_rank(options))
        save_file(content.tensors, out)
        return content
    content = peft_tensors(model, name, base_name=options.model or _base_name(model), rank=_rank(options))
    out.mkdir()
    write_atomic(out / PEFT_CONFIG, json.dumps(content.config, indent=2) + "\n")
    with atomic_path(out / WEIGHTS) as temporary:
        save_file(content.tensors, temporary, {"format": "pt"})
    return content


def _check_options(options: argparse.Namespace, found: Format, out: Path) -> None:
    check_adapter_name(options.name)
    if found == options.to:
        raise ConfigError(f"{options.source} is in the format {found} already")
    if options.approximate is not None and options.approximate < 1:
        raise ConfigError(f"--approximate must be a rank of at least 1, got {options.approximate}")
    if options.alpha is not None and not 0 < options.alpha < float("inf"):
        raise ConfigError(f"--alpha must be a number above 0, got {options.alpha:g}")
    is_file = options.to == "kohya"
    if is_file and out.suffix != ".safetensors":
        raise ConfigError(f"{out}: expected a name that ends in .safetensors")
    if not is_file and out.is_file():
        raise ConfigError(f"{out} is a file, expected a folder to write to")
    if out.exists() and not (options.force or (out.is_dir() and not any(out.iterdir()))):
        raise ConfigError(f"{out} exists; choose another name or pass --force to replace what it holds")
    if options.to == "peft" and (out / MIRROR).exists():
        raise ConfigError(f"{out} holds one of our adapters; choose another folder")


def _read_back(model: nn.Module, written: Path, options: argparse.Namespace) -> nn.Module:
    """Return the base with the written adapter on it, read as anyone would read it."""
    name, base = adapter_names(model)[0], remove(copy.deepcopy(model))
    if options.to == "visionlora":
        load_adapter(base, written, name=name)
    elif options.to == "kohya":
        put_on(base, read_lycoris(base, written, prefix=options.prefix or "lycoris"), name=name)
    else:
        put_on(base, read_peft(base, written), name=name)
    return base


def _check_equal(shares: Mapping[str, float], decomposed: Mapping[str, Factors], out: Path) -> None:
    for layer, share in shares.items():
        if layer not in decomposed and not share <= TOLERANCE:
            raise StateError(
                f"{layer}: what was written changes the layer otherwise, by {share:.1e} of its change "
                f"({TOLERANCE:g} is allowed); {out} was not written"
            )


def _place(written: Path, out: Path) -> int:
    """Give a complete file or folder its name; return its size in bytes."""
    files = [written] if written.is_file() else sorted(written.iterdir())
    size = sum(path.stat().st_size for path in files)
    if written.is_dir() and not out.exists():
        written.rename(out)
        return size
    if written.is_file():
        _copied(written, out)
        return size
    (out / PEFT_CONFIG).unlink(missing_ok=True)  # a kill in between must not leave an old alpha beside new weights
    for path in sorted(files, key=lambda p: p.name == PEFT_CONFIG):
        if path.name != CARD or _is_generated(out / CARD):
            _copied(path, out / path.name)
    return size


def _is_generated(card: Path) -> bool:
    return not card.exists() or GENERATED in card.read_text(encoding="utf-8", errors="replace")


def _copied(path: Path, out: Path) -> None:
    with atomic_path(out, need=path.stat().st_size) as temporary:
        shutil.copyfile(path, temporary)


def _report(done: str, decomposed: Mapping[str, Factors]) -> list[str]:
    """Return a line for every layer that lost something, one for those that only look otherwise."""
    shares = {layer: _share({layer: factors}) for layer, factors in decomposed.items()}
    rows = [(n, str(f.rank), f"{shares[n]:.1%}") for n, f in decomposed.items() if shares[n] > TOLERANCE]
    same = [f.rank for n, f in decomposed.items() if shares[n] <= TOLERANCE]
    lines = table((f"layer {done} nearly", "rank", "lost"), rows, right=(1, 2)) if rows else []
    return lines + ([f"{len(same)} layers {done} as low-rank factors of rank {_span(same)}, equal"] if same else [])


def _share(decomposed: Mapping[str, Factors]) -> float:
    """Return how much of the change of these layers was lost."""
    whole = hypot(*(factors.norm for factors in decomposed.values()))
    return hypot(*(factors.error for factors in decomposed.values())) / whole if whole else 0.0


def _summary(model: nn.Module, name: str, found: str, to: str) -> str:
    plan = adapter_plan(model, name)
    count = len(plan.sites)
    ranks = f"{plan.config.variant}, rank {_span(site.rank for site in plan.sites)}" if plan.sites else "no low rank"
    return f"{found} to {to}: {count} layer{'s'[: count != 1]} ({ranks})" + (
        f", {len(plan.values)} in full" if plan.values else ""
    )


def _span(ranks: Iterable[int]) -> str:
    known = sorted(ranks)
    return str(known[0]) if known[0] == known[-1] else f"{known[0]} to {known[-1]}"


def _base_name(model: nn.Module) -> str | None:
    cfg = getattr(model, "pretrained_cfg", None) or {}
    return cfg.get("architecture")


def _rank(options: argparse.Namespace) -> int | None:
    rank: int | None = options.approximate
    return rank
