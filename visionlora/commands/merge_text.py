"""Folding an adapter of a language model into its base: a folder that plain transformers loads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionlora.core.attach import own_class
from visionlora.core.quantised import Quantised, quantised_base
from visionlora.errors import ConfigError, StateError
from visionlora.merging import base_state_dict, merge
from visionlora.quantising import merge_dequantized
from visionlora.text.extras import need
from visionlora.text.loading import load_model, load_tokenizer

TOLERANCE = 1e-4
"""Largest accepted difference of an output, relative to the largest output."""


def merge_text(adapter: Path, out: Path, *, base: str | None = None, force: bool = False) -> int:
    """Write the merged model with its tokenizer to a folder and tell how transformers loads it.

    The folder is read back by transformers alone, and takes its name only if the outputs agree.
    """
    if out.suffix == ".safetensors":
        raise ConfigError(f"{out}: a language model is written to a folder, with its config and tokenizer")
    if out.exists() and (not force or not out.is_dir()):
        raise ConfigError(f"{out} exists; choose another name or pass --force to replace a folder")
    model = load_model(adapter, base=base)
    kind, wanted, quantised = own_class(model), outputs(model), quantised_base(model)
    model = merge(model) if quantised is None else merge_dequantized(model).model
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merging-") as aside:
        folder = Path(aside) / "model"
        plain(model, kind).save_pretrained(folder)
        load_tokenizer(adapter, base=base).save_pretrained(folder)
        difference = _difference(outputs(getattr(need("transformers"), kind.__name__).from_pretrained(folder)), wanted)
        if not difference <= TOLERANCE:
            raise StateError(
                f"the merged model gives other outputs (by {difference:.1e} of the largest, {TOLERANCE:g} is allowed); "
                f"{out} was not written"
            )
        if out.exists():
            shutil.move(out, Path(aside) / "replaced")
        folder.replace(out)
    print(f"{out}: outputs equal to {difference:.1e}")
    if quantised is not None:
        print(rounded(quantised))
    print(f'transformers.{kind.__name__}.from_pretrained("{out}")')
    return 0


def rounded(quantised: Quantised) -> str:
    """Return what is to be known of weights merged from a quantised base."""
    return (
        f"trained on the base quantised to {quantised.scheme}: beside the adapter, {len(quantised.stored)} weights "
        f"of the merged model differ from the original base by {quantised.error:.2%} of rounding"
    )


def plain(model: nn.Module, kind: type[nn.Module]) -> Any:
    """Return a model of transformers' own class with the weights of a merged one."""
    config: Any = model.config
    net = kind(config)
    net.load_state_dict(base_state_dict(model))
    return net.to(next(model.parameters()).dtype).eval()


@torch.inference_mode()
def outputs(model: nn.Module) -> list[Tensor]:
    """Return the scores a model in eval mode gives for some tokens."""
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, config.get_text_config().vocab_size, (2, 12), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    found = model.eval()(**inputs)
    return [found.logits] if "logits" in found else [found.start_logits, found.end_logits]


def _difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    apart = max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))
    return apart / max(1e-12, *(float(b.abs().max()) for b in wanted))
