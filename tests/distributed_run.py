"""Train a small ViT for a few steps by a strategy and write its adapter; test_distributed.py runs this."""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from safetensors.torch import save_file

from visionlora.config import LoraConfig
from visionlora.registry import adapter_state
from visionlora.vision.datamodule import ImageFolderData
from visionlora.vision.module import ImageClassifier


def strategy(name: str) -> pl.strategies.Strategy | str:
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return "auto"


def main(name: str, images: str, out: str) -> None:
    devices = 1 if name == "one" else 2
    pl.seed_everything(0, verbose=False)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=2)
    config = LoraConfig(r=4, norm="stats-affine")
    module = ImageClassifier.from_model(net, num_classes=2, lora=config, lr=1e-2, warmup=0.0)
    data = ImageFolderData(
        images, image_size=32, batch_size=8 // devices, augment="none", num_workers=0, val_fraction=0.0, seed=3
    )
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy(name), max_epochs=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    state = adapter_state(net, "default")  # gathered where it is sharded
    if trainer.is_global_zero:
        save_file({key: t.contiguous() for key, t in state.items()}, Path(out))
    assert trainer.global_step == 4
    if name == "fsdp2":
        stored = net.blocks[0].attn.qkv._parameters["weight"]
        assert type(stored).__name__ == "DTensor", "the base was not sharded"
    if devices > 1:  # a process that ends with its connections open may abort
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
