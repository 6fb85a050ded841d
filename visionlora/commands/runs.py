"""Where a run writes: runs/<name>, then runs/<name>-2 and so on; nothing of an earlier run is touched."""

from __future__ import annotations

import re
from pathlib import Path

from visionlora.commands.words import read_config
from visionlora.errors import ConfigError, ResumeError

CONFIG = "config.yaml"
WEIGHTS = "adapter_model.safetensors"
LAST = "last.ckpt"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def default_name(configs: list[str], model_name: str) -> str:
    """Return a name for a run: that of its config file, of the run the config was saved by, or of its model."""
    for config in reversed(configs):
        if not config.lstrip().startswith("{"):
            path = Path(config).absolute()
            stem = path.parent.name if path.name == CONFIG else path.stem
            return re.sub(r"[^A-Za-z0-9_.-]", "_", stem).lstrip(".-") or "run"
    return re.sub(r"[^A-Za-z0-9_.-]", "_", model_name).lstrip(".-") or "run"


def next_free(output: Path, name: str) -> Path:
    """Return the folder of a new run."""
    taken = {version for version, _ in _versions(output, check_name(name))}
    first = 1 if not taken else max(taken) + 1
    return output / (name if first == 1 else f"{name}-{first}")


def newest(output: Path, name: str) -> Path | None:
    """Return the folder of the newest run of a name that can be resumed."""
    found = [path for _, path in sorted(_versions(output, check_name(name))) if (path / LAST).is_file()]
    return found[-1] if found else None


def check_name(name: str) -> str:
    """Return a name that is a plain folder name."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"a run's name is one folder name of A-Z a-z 0-9 _ - . (no path), got {name!r}; see --output")
    return name


def checkpoint_of(path: str) -> Path:
    """Return the checkpoint file a user means: the file itself, or last.ckpt of a run's folder. Raises ResumeError."""
    if path == "best":
        raise ResumeError("the best of a run is its adapter, no checkpoint: --adapter runs/<name>/adapter")
    found = Path(path)
    return found / LAST if found.is_dir() else found


def run_of(path: Path) -> Path | None:
    """Return the run a checkpoint or an adapter lies in, if it lies in one."""
    parent = path.parent.parent if path.name == WEIGHTS else path.parent
    return parent if (parent / CONFIG).is_file() else None


def weights_of_base(adapter: Path) -> str | None:
    """Return the file that the run of an adapter had the weights of its base from, if it is still there."""
    run = run_of(adapter)
    model = {} if run is None else read_config(str(run / CONFIG)).get("model") or {}
    given = model.get("checkpoint")
    return given if isinstance(given, str) and Path(given).is_file() else None


def _versions(output: Path, name: str) -> list[tuple[int, Path]]:
    found = []
    for path in output.iterdir() if output.is_dir() else ():
        if path.name == name:
            found.append((1, path))
        elif re.fullmatch(re.escape(name) + r"-[1-9]\d*", path.name):
            found.append((int(path.name.rpartition("-")[2]), path))
    return found
