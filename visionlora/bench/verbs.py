"""How long the verbs take that a user waits for: attach, load, switch, and the first import."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from visionlora.adapt import activate, apply_lora, remove
from visionlora.bench.contestants import lora_config
from visionlora.bench.settings import Settings
from visionlora.bench.timing import host_watch
from visionlora.io import load_adapter, save_adapter
from visionlora.vision.backbone import create_backbone

REPEATS = 7
IMPORTS = {
    "import torch": "import torch",
    "import visionlora": "import visionlora",
    "import visionlora, then look up apply_lora": "import visionlora; visionlora.apply_lora",
}


def verbs(model_name: str, settings: Settings) -> dict[str, list[float]]:
    """Return milliseconds of attaching a fresh adapter, loading a saved one and switching between two, repeated."""
    torch.manual_seed(settings.seed)
    model = create_backbone(model_name, pretrained=False).eval().to(settings.device)
    config = lora_config(settings)

    def attach() -> nn.Module:
        return apply_lora(model, config, name="fresh")

    def detach() -> None:
        remove(model, "fresh")

    found = {"attach": _repeated(settings, attach, detach)}
    with TemporaryDirectory() as folder:
        for name in ("day", "night"):
            apply_lora(model, config, name=name)
            save_adapter(model, Path(folder) / name, name=name)
        remove(model, "night")
        found["load"] = _repeated(
            settings,
            lambda: load_adapter(model, Path(folder) / "night", name="night"),
            lambda: remove(model, "night"),
        )
        load_adapter(model, Path(folder) / "night", name="night")
    activate(model, "day")
    found["switch"] = _repeated(settings, lambda: activate(model, "night"), lambda: activate(model, "day"))
    return found


def imports(repeats: int = REPEATS) -> dict[str, list[float]]:
    """Return milliseconds of processor time of first imports, each in fresh processes that find compiled files."""
    found: dict[str, list[float]] = {what: [] for what in IMPORTS}
    with TemporaryDirectory() as folder:
        env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
        env["PYTHONPYCACHEPREFIX"] = folder
        for turn in range(repeats + 1):
            for what, statement in IMPORTS.items():
                spent = _spent(statement, env)
                if turn:  # the first one compiles
                    found[what].append(spent)
    return found


def _spent(statement: str, env: dict[str, str]) -> float:
    code = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=env)
    return 1e3 * float(done.stdout)


def _repeated(settings: Settings, do: Callable[[], object], undo: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(REPEATS):
        watch = host_watch(settings)
        watch.mark()
        do()
        if settings.device == "cuda":
            torch.cuda.synchronize()
        watch.mark()
        times += watch.laps()
        undo()
    return times
