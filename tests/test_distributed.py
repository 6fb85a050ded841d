"""Two processes train the adapter that one process trains on the same global batches, and leave what it leaves."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import distributed_run
import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import visionlora as vl
from visionlora.cli import main
from visionlora.errors import ConfigError
from visionlora.training.sharding import blocks, shard


def start(words: Sequence[str], folder: Path) -> str:
    """Run Python in a folder and return what it prints; with two processes the first one starts the other."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def fit(folder: Path, strategy: str, *words: str) -> str:
    """Run `visionlora fit` in a folder and return what it prints; a single process need not be a new one."""
    words = ("fit", "--config", "tiny.yaml", *words, *STRATEGIES[strategy])
    if strategy != "one":
        return start(["-m", "visionlora", *words], folder)
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed, torch.random.fork_rng():
        patch.chdir(folder)
        assert main([*words]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, name in enumerate(("car", "van")):
        for split, count in (("train", 8), ("val", 2), ("test", 2)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + 120 * np.uint8(label)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def one_process(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    out = tmp_path_factory.mktemp("one") / "adapter.safetensors"
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # as in the processes of their own: Lightning's, for any loop
        distributed_run.main("one", str(images), str(out))
    return load_file(out)


@pytest.mark.slow
def test_a_plain_trainer_and_plain_shards_equal_one_process(
    images: Path, one_process: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    start([distributed_run.__file__, "fsdp2", str(images), "adapter.safetensors"], tmp_path)
    two = load_file(tmp_path / "adapter.safetensors")
    assert two.keys() == one_process.keys()
    assert max(t.abs().max() for key, t in two.items() if key.endswith("/B")) > 1e-3, "nothing was learned"
    for key, tensor in two.items():
        torch.testing.assert_close(tensor, one_process[key], atol=1e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_layers_that_compute_their_weight_are_not_sharded() -> None:
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    vl.apply_lora(net, vl.LoraConfig(r=2, variant="dora"))
    with pytest.raises(ConfigError, match=r"blocks\.0\.attn\.qkv.*cannot be sharded by FSDP2"):
        shard(net, None)  # type: ignore[arg-type]  # refused before the mesh is looked at
    assert not any(type(m).__name__.startswith("FSDP") for m in net.modules())


@pytest.mark.parametrize(("name", "count"), [("vit_tiny_patch16_224", 12), ("resnet18", 8), ("convnext_atto", 12)])
def test_blocks_are_the_repeated_modules(name: str, count: int) -> None:
    with torch.device("meta"):
        net: nn.Module = timm.create_model(name)
    assert len(blocks(net)) == count


# the command


STRATEGIES = {
    "one": ["--data.batch_size", "8"],
    "ddp": ["--trainer.devices", "2", "--trainer.strategy", "ddp"],
    "fsdp2": ["--trainer.devices", "2", "--trainer.strategy", "fsdp2"],
}
SETTINGS: dict[str, Any] = {
    "model": {
        "model_name": "vit_tiny_patch16_224",
        "model_args": {"img_size": 32, "depth": 2},
        "pretrained": False,
        "ema_decay": 0.9,
    },
    "data": {"image_size": 32, "batch_size": 4, "augment": "none", "num_workers": 0},
    "checkpoint": {"monitor": "val/loss", "mode": "min"},
    "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "gradient_clip_val": 1.0},
}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--", "visionlora"]


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Return the folder of the finished run of a strategy, which a test must not change, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("command"), dict[str, str]()
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": SETTINGS["data"] | {"root": str(images)}}))

    def finished(name: str) -> tuple[Path, str]:
        if name not in printed:
            printed[name] = fit(folder, name, "--run", name)
        return folder / "runs" / name, printed[name]

    return finished


def tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Return every tensor in plain data by its path."""
    if isinstance(value, torch.Tensor):
        yield path, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from tensors(item, f"{path}/{key}")


def resumable(path: Path) -> dict[str, Any]:
    checkpoint = torch.load(path, weights_only=True)
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "callbacks")}


def assert_same(ours: Path, theirs: Path, *, within: float) -> None:
    """Compare two runs: the adapter, and all that a resumed run would go on with."""
    for read, name in ((load_file, "adapter/adapter_model.safetensors"), (resumable, "last.ckpt")):
        found, expected = (dict(tensors(read(folder / name))) for folder in (ours, theirs))
        assert found.keys() == expected.keys()
        worst = {key: float((found[key] - expected[key]).abs().max()) for key in found}
        assert max(worst.values()) <= within, f"{name}: {max(worst, key=lambda key: worst[key])}: {max(worst.values())}"


def measured(run: Path) -> list[float]:
    """Return what metrics.csv says of validation and test, row by row."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [float(row[key]) for row in rows for key in ("val/loss", "val/acc", "test/target/acc") if row[key]]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_fit_in_two_processes_leaves_what_it_leaves_in_one(
    strategy: str, runs: Callable[[str], tuple[Path, str]]
) -> None:
    (two, printed), (one, table) = runs(strategy), runs("one")
    assert {path.relative_to(two) for path in two.rglob("*.*") if "events" not in path.name} == {
        path.relative_to(one) for path in one.rglob("*.*") if "events" not in path.name
    }
    assert [path.name for path in two.parent.iterdir() if path.name.startswith(strategy)] == [strategy]
    assert_same(two, one, within=1e-5)
    assert measured(two) == pytest.approx(measured(one), abs=1e-5)
    kept = ("target", "trained", "adapter off")  # time and memory differ
    shown = [[line for line in text.splitlines() if line.startswith(kept)] for text in (printed, table)]
    assert shown[0] == shown[1]
    assert shown[0][-1] == "adapter off  the base, bit for bit"


@pytest.mark.slow
@pytest.mark.parametrize(("made_by", "resumed_by"), [("ddp", "ddp"), ("fsdp2", "fsdp2"), ("fsdp2", "one")])
def test_a_resumed_run_ends_as_if_it_had_gone_through(
    made_by: str, resumed_by: str, runs: Callable[[str], tuple[Path, str]], tmp_path: Path
) -> None:
    whole, _ = runs(made_by)
    part = tmp_path / "runs" / "part"
    part.mkdir(parents=True)
    for name in ("config.yaml", "metrics.csv", "previous.ckpt"):  # as it was before the last validation
        shutil.copy(whole / name, part)
    shutil.copy(whole.parent.parent / "tiny.yaml", tmp_path)
    words = ["--ckpt_path", str(part / "previous.ckpt")]
    if resumed_by == "fsdp2":
        start([*TORCHRUN, "fit", "--config", "tiny.yaml", *words, *STRATEGIES[resumed_by]], tmp_path)
    else:
        fit(tmp_path, resumed_by, *words)
    assert_same(part, whole, within=0 if made_by == resumed_by else 1e-5)
