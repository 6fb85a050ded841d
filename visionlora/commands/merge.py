"""`visionlora merge`: fold an adapter into its base and write a plain timm checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from timm.models import model_entrypoint
from torch import Tensor, nn

from visionlora.atomic import atomic_path
from visionlora.commands.merge_text import merge_text, rounded
from visionlora.commands.recorded import text_record
from visionlora.commands.runs import weights_of_base
from visionlora.core.quantised import Quantised, quantised_base
from visionlora.errors import ConfigError, StateError
from visionlora.io import read_adapter
from visionlora.merging import base_state_dict, merge
from visionlora.overview import readable_size
from visionlora.quantising import merge_dequantized
from visionlora.vision.backbone import create_backbone, data_config
from visionlora.vision.loading import load_model

TOLERANCE = 1e-4
"""Largest accepted difference of an output, relative to the largest output."""


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Write OUT and tell how timm, or for text transformers, loads it."""
    out = Path(options.out)
    if text_record(Path(options.adapter)) is not None:
        return merge_text(Path(options.adapter), out, base=options.checkpoint, force=options.force)
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: expected a name that ends in .safetensors")
    if out.exists() and not options.force:
        raise ConfigError(f"{out} exists; choose another name or pass --force to replace it")
    adapter = Path(options.adapter)
    base = read_adapter(adapter).record["base"]
    done = write_merged(adapter, out, checkpoint=options.checkpoint or weights_of_base(adapter))
    print(f"{out}: {readable_size(out.stat().st_size)}, {done.classes} classes, outputs equal to {done.difference:.1e}")
    if done.quantised is not None:
        print(rounded(done.quantised))
    given = {**base["args"], "num_classes": done.classes}
    told = ", ".join(f"{key}={value!r}" for key, value in given.items())
    home = model_entrypoint(base["name"]).__module__
    if not home.startswith("timm."):
        print(f"import {home}  # timm then knows {base['name']}")
    print(f'timm.create_model("{base["name"]}", {told}, checkpoint_path="{out}")')
    return 0


class Written(NamedTuple):
    """What was merged."""

    difference: float
    """Largest difference of an output, relative to the largest output."""
    classes: int
    quantised: Quantised | None
    """How the base was rounded while the adapter was trained; that is in the merged weights."""


def write_merged(adapter: Path, out: Path, *, checkpoint: str | None = None) -> Written:
    """Write the merged base, a quantised one in full precision; return how far its outputs are from the adapter's.

    The file is read back into a plain timm model, without our code, and takes its name only if the outputs agree.
    Raises StateError if they do not.
    """
    model = load_model(adapter, checkpoint=checkpoint)
    images = torch.randn(4, *data_config(model)["input_size"], generator=torch.Generator().manual_seed(0))
    wanted, quantised = outputs(model, images), quantised_base(model)
    model = merge(model) if quantised is None else merge_dequantized(model).model
    classes = wanted.shape[-1]
    with atomic_path(out) as temporary:
        save_file({key: tensor.contiguous() for key, tensor in base_state_dict(model).items()}, temporary)
        plain = _plain(read_adapter(adapter).record["base"], temporary, classes)
        difference = float((outputs(plain, images) - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))
        if not difference <= TOLERANCE:
            raise StateError(
                f"the merged model gives other outputs (by {difference:.1e} of the largest, {TOLERANCE:g} is allowed); "
                f"{out} was not written"
            )
    return Written(difference, classes, quantised)


def _plain(base: dict[str, Any], weights: Path, classes: int) -> nn.Module:
    args = {key: value for key, value in base["args"].items() if key != "num_classes"}
    net = create_backbone(base["name"], pretrained=False, num_classes=classes, model_args=args)
    net.load_state_dict(load_file(weights))
    return net


@torch.inference_mode()
def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of a model in eval mode."""
    result: Tensor = model.eval()(images)
    return result
