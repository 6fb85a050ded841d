"""Read an adapter from disk as data alone: nothing in the file is executed, imported, fetched or followed."""

from __future__ import annotations

import hashlib
import logging
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionlora.core.digest import tensor_digest
from visionlora.errors import AdapterFileError
from visionlora.io.header import Header, open_inside, read_header, read_tensors
from visionlora.io.keys import OURS, as_used, core_key
from visionlora.io.peft_config import plan_from_peft
from visionlora.io.record import FORMAT_VERSION, RECORD, check_agreement, check_record, from_metadata, to_text
from visionlora.io.strict import parse_object

WEIGHTS, PEFT_CONFIG, MIRROR, CARD = "adapter_model.safetensors", "adapter_config.json", "visionlora.json", "README.md"
FULL = "model.safetensors"
"""What a directory of mode "full" holds instead."""

_MAX_JSON = 8 << 20  # bytes
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from disk: sound in itself, not yet on a model."""

    path: Path
    record: dict[str, Any]
    """Everything but the numbers; the fields are those of visionlora.json."""
    tensors: dict[str, Tensor]
    """As adapter_state gives them: {"layer/attribute/tensor": tensor}, float32 or wider."""
    notices: tuple[str, ...] = ()
    """What is odd about the files beside the weights, which are sound."""


def read_adapter(source: str | Path, *, allow_nonfinite: bool = False) -> AdapterFile:
    """Return the adapter of a directory or of one weights file, ours or PEFT's, every check but the base's done.

    The weights file decides; a visionlora.json or adapter_config.json of another save beside it is reported in
    `notices` and logged. Raises AdapterFileError naming file, field, what was expected and what came.
    """
    path = _weights_path(Path(source))
    try:
        with open_inside(path) as file:
            header = read_header(file)
            record, notices = _record(path, header)
            tensors = read_tensors(file, header)
        _check_tensors(record, tensors, allow_nonfinite)
    except AdapterFileError as e:
        raise AdapterFileError(f"{path}: {e}") from None
    for notice in notices:
        _log.warning("%s: %s", path.parent, notice)
    used = {core_key(key): tensors[key] for key in _used(tensors)}
    return AdapterFile(path, record, {key: as_used(key, tensor) for key, tensor in used.items()}, tuple(notices))


def _used(keys: Iterable[str]) -> list[str]:
    """Return the keys but for what PEFT writes and never needs: step counters and second copies of saved biases."""
    known = dict.fromkeys(keys)  # a set that keeps the order
    twins = {f"{twin}.bias": ".bias" for twin in (".modules_to_save", ".original_module")}
    return [
        key
        for key in known
        if not key.endswith(".num_batches_tracked")
        and not any(key.endswith(end) and key.removesuffix(end) + plain in known for end, plain in twins.items())
    ]


def _weights_path(source: Path) -> Path:
    path = source / WEIGHTS if source.is_dir() else source
    if _is_training_state(source):
        raise AdapterFileError(
            f"{source} is the state of a training, to go on with: fit --ckpt_path {source}{_near(source.parent)}"
        )
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise AdapterFileError(f"{path}: {_PICKLE.format(path=path.name, weights=WEIGHTS)}")
    if not path.is_symlink() and not path.exists():
        pickles = [p.name for p in sorted(path.parent.glob("adapter_model.*")) if p.suffix in (".bin", ".pt", ".pth")]
        if pickles:
            raise AdapterFileError(f"{path.parent}: {_PICKLE.format(path=pickles[0], weights=WEIGHTS)}")
        if (source / FULL).is_file():
            raise AdapterFileError(
                f"{source} holds a whole model (mode full), no adapter: load_model builds it, and "
                f"timm.create_model(..., checkpoint_path={str(source / FULL)!r})"
            )
        found = "found nothing there" + _near(source)
        raise AdapterFileError(f"{path}: expected an adapter file or a directory with {WEIGHTS}, {found}")
    return path


def _is_training_state(source: Path) -> bool:
    return source.suffix == ".ckpt" and source.is_file() and zipfile.is_zipfile(source)


def _near(run: Path) -> str:
    """Return where the adapter of a run lies, if this is the folder of one."""
    return f"; the adapter of this run is {run / 'adapter'}" if (run / "adapter").is_dir() else ""


_PICKLE = (
    "{path} is a pickle, which can run any program when it is read, so we never do. Where you trust it, convert it "
    'once: python -c "import torch, safetensors.torch as s; '
    "s.save_file(torch.load('{path}', weights_only=True), '{weights}')\""
)


def _record(path: Path, header: Header) -> tuple[dict[str, Any], list[str]]:
    shapes = {key: header.slots[key].shape for key in _used(header.slots)}
    if RECORD in header.metadata:
        record = from_metadata(header.metadata)
        check_agreement(record, shapes)
        return record, _stale(path.parent, record)
    if (path.parent / MIRROR).exists() or any(key.startswith(OURS) for key in shapes):
        raise AdapterFileError(
            f"__metadata__: expected the field {RECORD!r}, which every file saved here carries, found none; another "
            "tool rewrote the file. Save the adapter again"
        )
    record = _peft_record(path.parent, shapes)
    check_record(record)
    check_agreement(record, shapes)
    return record, ["written by PEFT, which does not record the base: make sure that this is the right one"]


def _peft_record(folder: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    if not (folder / PEFT_CONFIG).exists():
        raise AdapterFileError(
            f"__metadata__: expected our record, or PEFT's {PEFT_CONFIG} beside the file; found neither"
        )
    try:
        plan = plan_from_peft(_json(folder / PEFT_CONFIG)[0], shapes)
    except AdapterFileError as e:
        raise AdapterFileError(f"{PEFT_CONFIG}: {e}") from None
    fields = ("name", "tag", "class", "dtype", "fingerprint", "head_fingerprint")
    return {
        "format_version": FORMAT_VERSION,
        "name": "default",
        "base": {**dict.fromkeys(fields), "args": {}},
        "plan": plan,
        **dict.fromkeys(("classes", "data", "created", "tensors")),
        "metrics": {},
        "versions": {},
    }


def _stale(folder: Path, record: dict[str, Any]) -> list[str]:
    """Return what tells that the files beside the weights are of another save, or were edited."""
    if not (folder / MIRROR).exists():
        return []
    cure = "the weights file was used, save the adapter again to renew it"
    try:
        mirror = _json(folder / MIRROR)[0]
        peft = mirror.pop("peft", None)
        if to_text(mirror) != to_text(record):
            return [f"{MIRROR} does not belong to {WEIGHTS}; {cure}"]
        digest = _json(folder / PEFT_CONFIG)[1] if (folder / PEFT_CONFIG).exists() else None
    except (AdapterFileError, ValueError) as e:
        return [f"{MIRROR} or {PEFT_CONFIG} is damaged ({e}); {cure}"]
    if not isinstance(peft, dict) or peft.get("sha256") != digest:
        return [f"{PEFT_CONFIG} does not belong to {WEIGHTS}; {cure}"]
    return []


def _json(path: Path) -> tuple[dict[str, Any], str]:
    with open_inside(path) as file:
        text = file.read(_MAX_JSON + 1)
    if len(text) > _MAX_JSON:
        raise AdapterFileError(f"{path.name}: larger than {_MAX_JSON} bytes")
    return parse_object(text, path.name), hashlib.sha256(text).hexdigest()


def _check_tensors(record: dict[str, Any], tensors: dict[str, Tensor], allow_nonfinite: bool) -> None:
    sums = record["tensors"]
    if sums is not None and sums.keys() != tensors.keys():
        raise AdapterFileError("record.tensors: its names are not those of the tensors in the file")
    for key, tensor in tensors.items():
        if sums is not None and tensor_digest(key, tensor).hex() != sums[key]:
            raise AdapterFileError(f"{key}: its checksum does not fit; the file is damaged, copy or save it again")
        if not allow_nonfinite and not torch.isfinite(tensor).all():
            raise AdapterFileError(
                f"{key}: {int((~torch.isfinite(tensor)).sum())} of {tensor.numel()} values are NaN or infinite; the "
                "training run was broken. read_adapter(..., allow_nonfinite=True) reads it all the same"
            )
