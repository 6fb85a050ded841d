"""What a checkpoint, an adapter and the run they lie in recorded, as configs that are weaker than what is typed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from visionlora.commands import runs, words
from visionlora.errors import AdapterFileError, ConfigError
from visionlora.io.read import FULL
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
OF_TRAINING = ("seed_everything", "trainer", "checkpoint", "report")
"""Parts of a run's config that fit takes when it goes on with it."""
MACHINE = ("accelerator", "strategy", "devices", "num_nodes")
"""Settings of the Trainer that belong together: where one is given, none of the run's is taken."""
DOMAINS = ("train_domains", "test_domains", "source_domains")
PLACES = ("root", "csv", "val_root", "test_root")
OF_ADAPTER = ("model_args", "mode", "lora", "recipe", "adapter_name", "memory", "pretrained", "quantize")
"""Settings of the model that an adapter has of itself; typed beside one, they would be passed over."""


def with_recorded_settings(verb: str, configs: list[str], flags: list[str]) -> tuple[list[str], list[str]]:
    """Return configs and flags with the settings of the checkpoint or the adapter as the first, weakest configs.

    What makes an adapter the one it is comes last: a config that it was trained with may say other things.
    """
    adapter, checkpoint = (words.setting(key, configs, flags) for key in ("adapter", "ckpt_path"))
    if adapter is not None and (checkpoint is not None or verb == "fit"):
        what = "--ckpt_path" if checkpoint is not None else "fit"
        raise ConfigError(
            f"--adapter does not go with {what}: an adapter is measured as it is (validate, test, predict)"
        )
    if adapter is not None:
        _check_typed(flags)
        own, fixed = _of_adapter(Path(adapter))
        _check_name(adapter, own["model"], configs, flags)
        weak = [*_of_run(Path(adapter), verb, configs, flags), json.dumps(own)]
        return [*weak, *configs, json.dumps({"model": fixed})], flags
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
    given_name = words.setting("run", configs, flags)
    if given_name is None and all(config.lstrip().startswith("{") for config in configs):
        raise ConfigError("--ckpt_path last is the newest run of a --config or of a --run NAME: give one of them")
    name = given_name or runs.default_name(configs, "")
    run = runs.newest(Path(words.setting("output", configs, flags) or "runs"), name)
    if run is None:
        log.info("no run %s to go on with: this is the first", name)
    return None if run is None else run / runs.LAST


def _check_typed(flags: list[str]) -> None:
    """Raise ConfigError for what is typed of the model and is the adapter's own."""
    for key in OF_ADAPTER:
        if words.is_typed(f"model.{key}", flags):
            raise ConfigError(f"--model.{key} does not go with --adapter: an adapter is measured as it was trained")


def _check_name(adapter: str, own: dict[str, Any], configs: list[str], flags: list[str]) -> None:
    """Raise ConfigError where another backbone is asked for than that of the adapter."""
    given = words.model_setting("model_name", configs, flags)
    if given is None or "task_type" in own or not own["model_name"]:
        return  # a model of language may lie in any folder: its weights are compared
    (name, _, tag), (arch, _, own_tag) = (str(n).partition(".") for n in (given, own["model_name"]))
    if name != arch or (tag and own_tag and tag != own_tag):
        raise ConfigError(
            f"{adapter} was trained on {own['model_name']}, and model_name is {given}: leave the name away, or give "
            "the adapter that belongs to it"
        )


def _of_run(path: Path, verb: str, configs: list[str], flags: list[str]) -> list[str]:
    """Return, as a config, where the run of a checkpoint or an adapter had its base and its data."""
    run = runs.run_of(path)
    if run is None:
        if verb in ("validate", "test"):
            log.info("%s lies in no run: what is divided here anew may be what it was trained on", path)
        return []
    recorded = words.read_config(str(run / runs.CONFIG))
    model = recorded.get("model") or {}
    whole = (path / FULL).is_file()  # trained in full: it needs no weights of a base
    own = ("model_name", *WRITING) if model.get("task_type") else () if whole else ("checkpoint",)
    kept: dict[str, Any] = {"model": {key: model.get(key) for key in own if key in model}}
    if verb != "predict":
        kept |= _data_of(run, recorded, configs, flags)
    if verb == "fit":
        kept |= {key: recorded[key] for key in OF_TRAINING if recorded.get(key) is not None}
        kept.get("checkpoint", {}).pop("fixed", None)
        if any(words.trainer_setting(key, configs, flags) is not None for key in MACHINE):
            kept["trainer"] = {key: v for key, v in kept.get("trainer", {}).items() if key not in MACHINE}
        _tell_changes(recorded, configs, flags)
    return [json.dumps(kept)]


def _data_of(run: Path, recorded: dict[str, Any], configs: list[str], flags: list[str]) -> dict[str, Any]:
    """Return the data settings of a run: divided otherwise, its test images would be those it was trained on."""
    data, place = dict(recorded.get("data") or {}), run / runs.CONFIG
    if words.data_is_given(configs, flags) and not _same_data(data, configs, flags):
        root = words.data_setting("root", configs, flags)
        named = [name for key in DOMAINS for name in data.get(key) or ()]
        for key in PLACES:
            data.pop(key, None)
        if root is not None and Path(root).is_dir() and not all((Path(root) / name).is_dir() for name in named):
            log.info("%s has not the domains of %s: %s", root, place, ", ".join(named))
            for key in DOMAINS:
                data.pop(key, None)
        log.info("data read and divided as in %s, but for its place", place)
        return {"data": data}
    for key in ("root", "csv"):
        if isinstance(data.get(key), str) and not Path(data[key]).exists() and not recorded.get("scenes"):
            raise ConfigError(f"{data[key]}, the data of {place}, is not here: give its place, --data.{key} PATH")
    log.info("data as in %s", place)
    return {key: recorded[key] for key in ("data", "scenes") if recorded.get(key)}


def _same_data(own: dict[str, Any], configs: list[str], flags: list[str]) -> bool:
    return all(_place(words.data_setting(key, configs, flags)) == _place(own.get(key)) for key in ("root", "csv"))


def _place(given: Any) -> Any:
    return Path(given).resolve() if isinstance(given, str) else given


def _tell_changes(recorded: dict[str, Any], configs: list[str], flags: list[str]) -> None:
    """Say which settings of the Trainer are other than in the run's last call; those of model and data fit tells."""
    for key, then in (recorded.get("trainer") or {}).items():
        now = words.trainer_setting(key, configs, flags)
        if now is not None and not isinstance(then, dict | list) and now != then:
            log.info("changed since the run's last call: trainer.%s: %s then, %s now", key, then, now)


def _of_checkpoint(checkpoint: dict[str, Any]) -> dict[str, Any]:
    model = checkpoint.get("hyper_parameters", {})
    own = {key: v for key, v in model.items() if key not in LINKED and not key.startswith("_")}
    classes = model.get("label_names" if "task_type" in model else "class_names")
    return {"model": own, "data": {"classes": classes, **_input(model.get("data"))}}


def _of_adapter(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what an adapter records, for configs to change, and settings of the model that are not theirs."""
    text = text_record(directory)
    if text is not None:
        return _of_text(text)
    record = read_record(directory)
    base, args = record["base"], dict(record["base"]["args"])
    args.pop("num_classes", None)
    name = ".".join(part for part in (base["name"], base["tag"]) if part)
    # the network is replaced by the adapted one as soon as the classifier is there: any weights will do
    fixed = {"model_args": args, "pretrained": False, "mode": "linear", "quantize": "none"}
    return {"model": {"model_name": name}, "data": {"classes": record["classes"], **_input(record["data"])}}, fixed


def text_record(directory: Path) -> dict[str, Any] | None:
    """Return what an adapter or a model of text records; None for one of images, and for what cannot be read."""
    try:
        return read_text_record(directory)
    except AdapterFileError:
        return None


def _of_text(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    base, data = record["base"], record["data"]
    sizes = {key: base["args"][key] for key in ("new_tokens", "untied", "problem_type") if key in base["args"]}
    # the network is replaced by the adapted one as soon as the task is there: any weights will do
    fixed = {"task_type": data["task_type"], "pretrained": False, "mode": "lora", "quantize": "none", **sizes}
    model = {"task_type": data["task_type"]}
    if base["name"] is not None:
        model |= {"model_name": base["name"], "model_args": {"revision": base["tag"]} if base["tag"] else None}
    return {"model": model, "data": {"classes": record["classes"], **_input(data)}}, fixed


def _input(data: dict[str, Any] | None) -> dict[str, Any]:
    if data is None:
        return {}
    if "input_size" not in data:
        return {key: data[key] for key in OF_TEXT if key in data}
    channels, *size = data["input_size"]
    kept = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    return {"image_size": size, "in_chans": channels, **{key: data[key] for key in kept if key in data}}
