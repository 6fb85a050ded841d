"""What a checkpoint, an adapter and the run they lie in recorded, as configs that are weaker than what is typed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from visionlora.commands import runs, words
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.text.loading import read_record as read_text_record
from visionlora.training.checkpoint_io import newest_readable, read_checkpoint
from visionlora.vision.loading import read_record

log = logging.getLogger(__name__)

LINKED = ("num_classes", "class_names", "label_names", "data")
"""Settings of the model that come from the data."""
OF_TEXT = ("max_length", "max_target_length", "stride", "overlong", "template", "chat", "columns", "packing")
"""What is recorded of texts and is a setting of the data by the same name."""
WRITING = ("max_new_tokens", "num_beams", "max_answer_tokens", "null_threshold")
"""How a run of text had its answers made."""


def with_recorded_settings(verb: str, configs: list[str], flags: list[str]) -> tuple[list[str], list[str]]:
    """Return configs and flags with the settings of the checkpoint or the adapter as the first, weakest configs."""
    adapter, checkpoint = (words.setting(key, configs, flags) for key in ("adapter", "ckpt_path"))
    if adapter is not None and (checkpoint is not None or verb == "fit"):
        what = "--ckpt_path" if checkpoint is not None else "fit"
        raise ConfigError(
            f"--adapter does not go with {what}: an adapter is measured as it is (validate, test, predict)"
        )
    if adapter is not None:
        own = _of_adapter(Path(adapter))
        return [*_of_run(Path(adapter), verb, configs, flags), json.dumps(own), *configs], flags
    if checkpoint is None:
        return configs, flags
    path = _resolve(checkpoint, configs, flags)
    flags = words.without("ckpt_path", flags)
    if path is None:
        return configs, [*flags, "--ckpt_path", "null"]
    if checkpoint == "last":
        flags = [*words.without("run", flags), "--run", "null"]  # go on in the folder that was found
    # a damaged checkpoint is no reason to measure another one, only to go on from it
    path, content = newest_readable(path) if verb == "fit" else (path, read_checkpoint(path))
    own = _of_checkpoint(content)
    return [*_of_run(path, verb, configs, flags), json.dumps(own), *configs], [*flags, "--ckpt_path", str(path)]


def _resolve(given: str, configs: list[str], flags: list[str]) -> Path | None:
    """Return the checkpoint that is meant; None where "last" of a run is wanted that has none yet."""
    if given != "last":
        return runs.checkpoint_of(given)
    name = words.setting("run", configs, flags) or runs.default_name(configs, "")
    run = runs.newest(Path(words.setting("output", configs, flags) or "runs"), name)
    if run is None:
        log.info("no run %s to go on with: this is the first", name)
    return None if run is None else run / runs.LAST


def _of_run(path: Path, verb: str, configs: list[str], flags: list[str]) -> list[str]:
    """Return, as a config, where the run of a checkpoint or an adapter had its base and its data."""
    run = runs.run_of(path)
    if run is None:
        return []
    recorded = words.read_config(str(run / runs.CONFIG))
    model = recorded.get("model") or {}
    own = ("model_name", *WRITING) if model.get("task_type") else ("checkpoint",)
    kept: dict[str, Any] = {"model": {key: model.get(key) for key in own if key in model}}
    if verb != "predict" and (not words.data_is_given(configs, flags) or _same_data(recorded, configs, flags)):
        log.info("data as in %s", run / runs.CONFIG)
        kept |= {key: recorded[key] for key in ("data", "scenes") if recorded.get(key)}
    return [json.dumps(kept)]


def _same_data(recorded: dict[str, Any], configs: list[str], flags: list[str]) -> bool:
    """Tell whether the data given is the run's own: divided anew, its test images would be those trained on."""
    own = recorded.get("data") or {}
    return all(_place(words.data_setting(key, configs, flags)) == _place(own.get(key)) for key in ("root", "csv"))


def _place(given: Any) -> Any:
    return Path(given).resolve() if isinstance(given, str) else given


def _of_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    model = checkpoint.get("hyper_parameters", {})
    own = {key: v for key, v in model.items() if key not in LINKED and not key.startswith("_")}
    classes = model.get("label_names" if "task_type" in model else "class_names")
    return {"model": own, "data": {"classes": classes, **_input(model.get("data"))}}


def _of_adapter(directory: Path) -> dict[str, Any]:
    text = text_record(directory)
    if text is not None:
        return _of_text(text)
    record = read_record(directory)
    base, args = record["base"], dict(record["base"]["args"])
    args.pop("num_classes", None)
    name = ".".join(part for part in (base["name"], base["tag"]) if part)
    # the network is replaced by the adapted one as soon as the classifier is there: any weights will do
    model = {"model_name": name, "model_args": args, "pretrained": False, "mode": "linear"}
    return {"model": model, "data": {"classes": record["classes"], **_input(record["data"])}}


def text_record(directory: Path) -> dict[str, Any] | None:
    """Return what an adapter or a model of text records; None for one of images, and for what cannot be read."""
    try:
        return read_text_record(directory)
    except AdapterFileError:
        return None


def _of_text(record: dict[str, Any]) -> dict[str, Any]:
    base, data = record["base"], record["data"]
    sizes = {key: base["args"][key] for key in ("new_tokens", "untied", "problem_type") if key in base["args"]}
    # the network is replaced by the adapted one as soon as the task is there: any weights will do
    model = {"task_type": data["task_type"], "pretrained": False, "mode": "lora", **sizes}
    if base["name"] is not None:
        model |= {"model_name": base["name"], "model_args": {"revision": base["tag"]} if base["tag"] else None}
    return {"model": model, "data": {"classes": record["classes"], **_input(data)}}


def _input(data: dict[str, Any] | None) -> dict[str, Any]:
    if data is None:
        return {}
    if "input_size" not in data:
        return {key: data[key] for key in OF_TEXT if key in data}
    channels, *size = data["input_size"]
    kept = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {"image_size": size, "in_chans": channels, **{key: data[key] for key in kept if key in data}}
