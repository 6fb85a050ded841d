"""What a base in 8 or 4 bits saves and costs: memory, a training step, losses, paired in one run.

nice -n 10 python benchmarks/quantised.py --models vit_small_patch16_224 vit_base_patch16_224 --rounds 4
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visionlora as vl
from visionlora.core.quantised import inner_tensors, is_quantised

PEERS = ("full precision", "int8", "nf4")


def main() -> None:
    """Print one Markdown table a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["vit_small_patch16_224"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help="steps of the loss comparison")
    options = parser.parse_args()
    for name in options.models:
        print(f"\n{name}, batch {options.batch}, r 8, float32, {torch.get_num_threads()} thread(s)\n")
        print("| base | linear weights, MiB | model, MiB | kept for backward, MiB | step over full precision | loss |")
        print("|---|---|---|---|---|---|")
        for row in measured(name, options.batch, options.rounds, options.steps):
            print("| " + " | ".join(row) + " |")


def measured(name: str, batch: int, rounds: int, steps: int) -> list[list[str]]:
    torch.manual_seed(0)
    base = timm.create_model(name, num_classes=10)
    images, labels = torch.randn(batch, *base.pretrained_cfg["input_size"]), torch.arange(batch) % 10
    models = {peer: adapted(base, peer) for peer in PEERS}
    times: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for _ in range(rounds + 1):  # the first is warm-up
        for peer, model in models.items():
            start = time.process_time()
            F.cross_entropy(model(images), labels).backward()
            times[peer].append(time.process_time() - start)
    rows = []
    for peer, model in models.items():
        ratios = [t / full for t, full in zip(times[peer][1:], times[PEERS[0]][1:], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
        linear = sum(stored(m._parameters["weight"]) for m in model.modules() if isinstance(m, nn.Linear))
        whole = sum(stored(p) for n, p in model.named_parameters() if ".adapters." not in n)
        figures = [linear, whole, kept(model, images)]
        rows.append([peer, *(f"{size / 2**20:.1f}" for size in figures), spread, losses(model, images, labels, steps)])
    return rows


def adapted(base: nn.Module, peer: str) -> nn.Module:
    model = copy.deepcopy(base)
    if peer != PEERS[0]:
        vl.quantize_base(model, peer)  # type: ignore[arg-type]
    torch.manual_seed(1)
    return vl.apply_lora(model, vl.LoraConfig(r=8)).train()


def stored(tensor: Tensor) -> int:
    return sum(t.numel() * t.itemsize for t in (inner_tensors(tensor) if is_quantised(tensor) else [tensor]))


def kept(model: nn.Module, images: Tensor) -> int:
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(images)
    return sum(sizes.values())


def losses(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> str:
    """Return first and last loss of some steps on one batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return f"{found[0]:.3f} -> {found[-1]:.3f}"


if __name__ == "__main__":
    main()
