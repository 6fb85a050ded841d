"""What surrounds a training step: decoding, optimiser, memory layout, a cached prefix; paired, in one run.

nice -n 10 python benchmarks/around_step.py decoding optimiser layout prefix
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import visionlora as vl
from visionlora.data.dataset import ImageDataset
from visionlora.data.transforms import InputConfig, Preprocess
from visionlora.vision.prefix import cut

ROUNDS = 3


def main() -> None:
    """Print what was asked for."""
    parts = {"decoding": decoding, "optimiser": optimiser, "layout": layout, "prefix": prefix}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=list(parts))
    for part in parser.parse_args().parts:
        print(f"\n{part}")
        parts[part]()


def decoding() -> None:
    """JPEG files of three sizes to 224 x 224 float32, one process, against what a step takes an image."""
    with tempfile.TemporaryDirectory() as folder:
        for side in (256, 512, 1024):
            noise = torch.rand(1, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(0))
            pixels = F.interpolate(noise, (side, side), mode="bicubic").clamp(0, 1).mul(255).byte()[0].permute(1, 2, 0)
            paths = [str(Path(folder, f"{side}_{i}.jpg")) for i in range(8)]
            for path in paths:
                Image.fromarray(pixels.numpy()).save(path, quality=90)
            data = ImageDataset(paths, None, Preprocess(InputConfig()))
            exact = seconds(lambda data=data: [data[i] for i in range(8)]) / 8
            drafted = seconds(lambda paths=paths: [draft(p) for p in paths]) / 8
            print(f"{side} x {side}: {1 / exact:.0f} images/s exact, {1 / drafted:.0f} decoded at reduced size")
    model = vl.apply_lora(timm.create_model("mobilenetv3_large_100", num_classes=10), vl.LoraConfig(r=8)).train()
    print(
        f"mobilenetv3_large_100: {8 / seconds(lambda: step(model, torch.randn(8, 3, 224, 224))):.0f} images/s trained"
    )


def draft(path: str) -> None:
    with Image.open(path) as image:
        image.draft("RGB", (256, 256))
        image.resize((256, 256), Image.Resampling.BICUBIC).crop((16, 16, 240, 240)).load()


def optimiser() -> None:
    """AdamW over the adapters of ViT-S, and over all of it."""
    net = timm.create_model("vit_small_patch16_224", num_classes=10)
    adapted = vl.apply_lora(timm.create_model("vit_small_patch16_224", num_classes=10), vl.LoraConfig(r=8))
    for name, model in (("adapters", adapted), ("all weights", net)):
        trained = [p for p in model.parameters() if p.requires_grad]
        for p in trained:
            p.grad = torch.ones_like(p)
        plain, fused = (torch.optim.AdamW(trained, lr=1e-6, fused=fused) for fused in (False, True))
        found = paired({"plain": plain.step, "fused": fused.step})
        print(f"{name}, {len(trained)} tensors: fused / plain {found['fused']}")


def layout() -> None:
    """Forward and backward pass of adapted CNNs, channels after positions over channels before."""
    for name in ("resnet50", "mobilenetv3_large_100", "convnext_tiny"):
        last = vl.apply_lora(timm.create_model(name, num_classes=10), vl.LoraConfig(r=8)).train()
        first = vl.apply_lora(timm.create_model(name, num_classes=10), vl.LoraConfig(r=8)).train()
        last.to(memory_format=torch.channels_last)
        images = torch.randn(4, 3, 224, 224)
        calls = {
            "first": lambda first=first, images=images: step(first, images),
            "last": lambda last=last, images=images: step(last, images.contiguous(memory_format=torch.channels_last)),
        }
        print(f"{name}: channels_last / contiguous {paired(calls)['last']}")


def prefix() -> None:
    """A step on images over one on cached features, the last quarter of the network adapted."""
    late = {
        "vit_small_patch16_224": r"blocks\.(9|10|11)\..*",
        "resnet50": r"layer4\..*",
        "convnext_tiny": r"stages\.3\..*fc.",
    }
    for name, targets in late.items():
        model = timm.create_model(name, num_classes=10)
        vl.apply_lora(model, vl.LoraConfig(r=8, target_modules=targets)).train()
        parts, images = cut(model), torch.randn(4, 3, 224, 224)
        features = parts.features(images)
        size = features[0].numel() * features.element_size() / 2**20
        found = paired(
            {"images": lambda m=model, x=images: step(m, x), "cached": lambda p=parts, x=features: tail(p, x)}
        )
        print(f"{name}: cached / images {found['cached']}, {size:.2f} MiB an image")


def step(model: nn.Module, images: torch.Tensor) -> None:
    F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.long)).backward()


def tail(parts: object, features: torch.Tensor) -> None:
    F.cross_entropy(parts.logits(features), torch.zeros(len(features), dtype=torch.long)).backward()  # type: ignore[attr-defined]


def seconds(call: Callable[[], object]) -> float:
    call()
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return statistics.median(found)


def paired(calls: dict[str, Callable[[], object]]) -> dict[str, str]:
    """Return median and range over rounds of each call's processor time over the first one's."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append(time.process_time() - start)
    base = next(iter(times.values()))[1:]
    told = {}
    for name, found in times.items():
        ratios = [t / b for t, b in zip(found[1:], base, strict=True)]
        told[name] = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
    return told


if __name__ == "__main__":
    main()
