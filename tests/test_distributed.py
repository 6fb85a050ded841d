"""Two processes train the adapter that one process trains on the same global batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.training.sharding import blocks, shard

SCRIPT = Path(__file__).with_name("distributed_run.py")


def train(strategy: str, images: Path, out: Path) -> dict[str, torch.Tensor]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    command = [sys.executable, str(SCRIPT), strategy, str(images), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for label, name in enumerate(("car", "van")):
        for split, count in (("train", 8), ("test", 2)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 128, (32, 32, 3), dtype=np.uint8) + 120 * np.uint8(label)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def one_process(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train("one", images, tmp_path_factory.mktemp("one") / "adapter.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one(
    strategy: str, images: Path, one_process: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    two = train(strategy, images, tmp_path / "adapter.safetensors")
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
