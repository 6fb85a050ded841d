"""Features on disk, under a name that is a hash of all that made them: never stale, whole or absent."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from visionlora import __version__
from visionlora.atomic import atomic_path
from visionlora.text.columns import Example
from visionlora.text.extras import need
from visionlora.text.features import Features
from visionlora.text.layout import identity
from visionlora.text.settings import TokenSettings
from visionlora.text.tokenising import tokenise

__all__ = ["cache_folder", "cached_features", "key_of"]

logger = logging.getLogger(__name__)

FORMAT = 1
"""Raised whenever tokenise makes other features of the same examples."""
UNUSED = 30 * 24 * 3600.0
"""Seconds without use after which a cached file is removed."""
SUFFIX = ".tokens.safetensors"


def cache_folder(setting: str) -> Path | None:
    """Return the folder that a setting means: "auto" is the user's cache, "none" no folder."""
    if setting == "none":
        return None
    if setting != "auto":
        return Path(setting)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "visionlora" / "tokens"


def key_of(examples: Sequence[Example], tokenizer: Any, settings: TokenSettings) -> str:
    """Return a hash of the examples' content, the tokenizer, the settings and the code that made features of them."""
    versions = [FORMAT, __version__, need("transformers").__version__, need("tokenizers").__version__]
    digest = blake2b(json.dumps([versions, identity(tokenizer), settings.to_dict()]).encode(), digest_size=20)
    for example in examples:
        digest.update(json.dumps(example.fields, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def cached_features(
    examples: Sequence[Example], tokenizer: Any, settings: TokenSettings, folder: Path | None
) -> Features:
    """Return the features of some examples, from the folder if they are there, else made and kept there.

    A folder that cannot be written costs the time of tokenising again, and is logged.
    """
    if folder is None:
        return tokenise(examples, tokenizer, settings)
    path = folder / (key_of(examples, tokenizer, settings) + SUFFIX)
    found = _read(path)
    if found is not None:
        return found
    features = tokenise(examples, tokenizer, settings)
    try:
        _write(path, features)
    except OSError as e:
        logger.warning("tokens are not kept for the next run: %s", e)
    return features


def _read(path: Path) -> Features | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            counts = json.loads(file.metadata()["counts"])
            features = Features({name: file.get_tensor(name) for name in file.keys()}, counts)  # noqa: SIM118
        os.utime(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as e:
        logger.warning("%s is damaged and made anew (%s)", path, e)
        return None
    return features


def _write(path: Path, features: Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _forget_unused(path.parent)
    with atomic_path(path) as temporary:
        save_file(features.tensors, temporary, metadata={"counts": json.dumps(features.counts)})


def _forget_unused(folder: Path) -> None:
    for path in folder.glob(f"*{SUFFIX}"):
        try:
            if time.time() - path.stat().st_mtime > UNUSED:
                path.unlink()
        except FileNotFoundError:  # another run was faster
            continue
