"""The words of a training command before they are parsed: configs first, names of shipped configs, settings of a run.

What the user types always wins: a flag over a config wherever the config stands, both over what a checkpoint recorded.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from visionlora.config import did_you_mean
from visionlora.errors import ConfigError

CONFIG_FLAGS = ("--config", "-c")


def split_configs(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the configs in their order, as paths or as text, and the other words."""
    configs: list[str] = []
    others: list[str] = []
    waiting = iter(words)
    for word in waiting:
        flag, given, value = word.partition("=")
        if flag not in CONFIG_FLAGS:
            others.append(word)
        elif given:
            configs.append(find_config(value))
        else:
            configs.append(find_config(_next(waiting, flag)))
    return configs, others


def find_config(name: str) -> str:
    """Return the path of a config: a file, or the name of one that ships with the package. Raises ConfigError."""
    if name.lstrip().startswith("{") or Path(name).is_file():
        return name
    shipped = {path.stem: path for folder in config_folders() for path in sorted(folder.glob("*.yaml"))}
    found = shipped.get(name.removesuffix(".yaml"))
    if found is None:
        near = did_you_mean(name.removesuffix(".yaml"), list(shipped))
        raise ConfigError(f"no config file {name}{near}\nshipped configs: {', '.join(sorted(shipped)) or 'none'}")
    return str(found)


def config_folders() -> list[Path]:
    """Return where configs ship: inside the package, or beside it in a source checkout."""
    package = Path(str(files("visionlora")))
    checkout = package.parent if (package.parent / "pyproject.toml").is_file() else package
    return [folder for folder in dict.fromkeys((checkout / "configs", package / "configs")) if folder.is_dir()]


def setting(key: str, configs: list[str], words: list[str]) -> Any:
    """Return what the user gave for a top-level setting, or None: the last flag, else the last config that has it."""
    found = None
    for config in configs:
        found = read_config(config).get(key, found)
    for at, word in enumerate(words):
        flag, given, value = word.partition("=")
        if flag == f"--{key}":
            found = value if given else _next(iter(words[at + 1 :]), flag)
    return found


def model_setting(key: str, configs: list[str], words: list[str]) -> Any:
    """Return what was given for a setting of the model, or None: the last flag, else the last config that has it."""
    return _setting_of("model", key, configs, words)


def data_setting(key: str, configs: list[str], words: list[str]) -> Any:
    """Return what was given for a setting of the data, or None: the last flag, else the last config that has it."""
    return _setting_of("data", key, configs, words)


def trainer_setting(key: str, configs: list[str], words: list[str]) -> Any:
    """Return what was given for a setting of the Trainer, or None: the last flag, else the last config that has it."""
    found = _setting_of("trainer", key, configs, words)
    return yaml.safe_load(found) if isinstance(found, str) else found


def _setting_of(part: str, key: str, configs: list[str], words: list[str]) -> Any:
    found = setting(f"{part}.{key}", [], words)
    given = [(read_config(config).get(part) or {}).get(key) for config in configs]
    return found if found is not None else next((value for value in reversed(given) if value is not None), None)


def without(key: str, words: list[str]) -> list[str]:
    """Return the words without a flag and its value."""
    kept: list[str] = []
    waiting = iter(words)
    for word in waiting:
        if word == f"--{key}":
            next(waiting, None)
        elif not word.startswith(f"--{key}="):
            kept.append(word)
    return kept


def data_is_given(configs: list[str], words: list[str]) -> bool:
    """Tell whether the user says where the images are."""
    typed = is_typed("data.root", words) or is_typed("data.csv", words)
    return typed or any({"root", "csv"} & set(read_config(config).get("data") or {}) for config in configs)


def is_typed(key: str, words: list[str]) -> bool:
    """Tell whether a flag gives a setting or one below it: --model.lora.r gives model.lora, --model.lora_plus not."""
    flags = [word.partition("=")[0] for word in words]
    return any(flag == f"--{key}" or flag.startswith(f"--{key}.") for flag in flags)


def read_config(config: str) -> dict[str, Any]:
    """Return the settings of a config, a path or a text. Raises ConfigError."""
    try:
        text = config if config.lstrip().startswith("{") else Path(config).read_text(encoding="utf-8")
        content = yaml.load(text, _EachOnce)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as e:
        raise ConfigError(f"{config[:200]} is not YAML: {' '.join(str(e).split())}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{config} is not YAML: it holds bytes that are no text (UTF-8)") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{config[:200]}: expected settings (model, data, trainer ...), found {type(content).__name__}"
        )
    return content


class _EachOnce(yaml.SafeLoader):
    """YAML in which a setting that stands twice is an error: the first would be dropped without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for at, key in enumerate(keys):
            if key in keys[:at] and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"{key} stands twice", node.value[at][0].start_mark)
        return super().construct_mapping(node, deep)


def _next(waiting: Any, flag: str) -> str:
    value: str | None = next(waiting, None)
    if value is None:
        raise ConfigError(f"{flag} needs a value")
    return value
