"""A tiny LightningModule with a frozen base, an "adapter" and a head, and runs of it; shared by the training tests."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from visionlora.errors import NonFiniteError
from visionlora.training.checkpoint import AdapterCheckpoint
from visionlora.training.checkpoint_io import AtomicCheckpointIO
from visionlora.training.guards import StopOnNonFinite
from visionlora.training.optim import parameter_groups, warmup_cosine
from visionlora.training.resume import ExactResume
from visionlora.training.sampler import ResumableSampler
from visionlora.training.signals import StopOnSignal

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)


class Net(nn.Module):
    def __init__(self, rank: int, classes: int, dropout: float, norm: bool) -> None:
        super().__init__()
        self.base = nn.Linear(6, 64).requires_grad_(False)
        self.A = nn.Linear(6, rank, bias=False)
        self.B = nn.Linear(rank, 64, bias=False)
        self.drop = nn.Dropout(dropout)
        self.norm = nn.BatchNorm1d(64) if norm else nn.LayerNorm(64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.base(x) + self.drop(self.B(self.A(x))))))


class Toy(pl.LightningModule):
    """`at_step` is called with (module, batch index, loss) in every training step and returns the loss to use."""

    def __init__(
        self,
        lr: float = 0.05,
        rank: int = 2,
        classes: int = 3,
        weight_decay: float = 0.0,
        base: int = 0,
        dropout: float = 0.2,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(base)
        self.net = Net(rank, classes, dropout, norm)
        self.seen: list[int] = []
        self.at_step: Callable[[Toy, int, Tensor], Tensor] = lambda module, index, loss: loss
        self.saved_steps: list[int] = []
        self.validated: list[int] = []

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y, index = batch
        self.seen += index.tolist()
        loss = nn.functional.cross_entropy(self.net(x), y)
        return self.at_step(self, batch_idx, loss)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        x, y, _ = batch
        if batch_idx == 0 and not self.trainer.sanity_checking:
            self.validated.append(self.trainer.global_step)
        self.log("val/loss", nn.functional.cross_entropy(self.net(x), y), batch_size=len(x))

    def configure_optimizers(self) -> Any:
        groups = parameter_groups(self.trainable_groups(), lr=self.hparams.lr, weight_decay=self.hparams.weight_decay)
        optimizer = torch.optim.AdamW(groups)
        schedule = warmup_cosine(optimizer, warmup_steps=2, total_steps=40)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        net = self.net
        groups = {"A": net.A, "B": net.B, "head": net.head, "norm": net.norm}
        return {name: list(m.parameters()) for name, m in groups.items()}

    def save_adapter(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        trained = {k: v.detach().clone() for k, v in self.net.named_parameters() if v.requires_grad}
        torch.save(trained, directory / "adapter.pt")
        self.saved_steps.append(self.trainer.global_step)

    def fingerprint(self) -> str:
        return f"{float(self.net.base.weight.sum()):.10f}"


class Points(Dataset[tuple[Tensor, Tensor, int]]):
    def __init__(self, size: int = 22, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randn(size, 6, generator=generator)
        self.y = self.x[:, :3].argmax(1)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        return self.x[index], self.y[index], index


class PointsData(pl.LightningDataModule):
    """6 batches an epoch."""

    def __init__(
        self, workers: int = 0, batch_size: int = 4, seed: int = 0, dataset: Dataset[Any] | None = None
    ) -> None:
        super().__init__()
        self.workers, self.batch_size, self.seed = workers, batch_size, seed
        self.dataset = Points() if dataset is None else dataset

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = ResumableSampler(len(self.dataset), seed=self.seed)  # type: ignore[arg-type]
        return DataLoader(self.dataset, batch_size=self.batch_size, sampler=sampler, num_workers=self.workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Points(8, seed=9), batch_size=4)


def make_trainer(folder: Path, callbacks: Sequence[pl.Callback] = (), **settings: Any) -> pl.Trainer:
    if not any(isinstance(c, AdapterCheckpoint) for c in callbacks):
        callbacks = [*callbacks, checkpoint_callback(folder)]
    defaults: dict[str, Any] = {"accelerator": "cpu", "max_epochs": 3, "logger": False, "num_sanity_val_steps": 0}
    return pl.Trainer(
        default_root_dir=folder,
        callbacks=[*callbacks, ExactResume()],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        **(defaults | settings),
    )


def checkpoint_callback(folder: Path, **settings: Any) -> AdapterCheckpoint:
    return AdapterCheckpoint(folder, **({"monitor": "val/loss", "mode": "min"} | settings))


def trained(module: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def main() -> None:
    """Run what the subprocess tests name: `training_toy.py FOLDER CASE`."""
    folder, case = Path(sys.argv[1]), sys.argv[2]
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
    CASES[case](folder)


def run_slowly(folder: Path) -> None:
    """Train with a pause in every step until a signal comes; say when the third step is done."""

    def slow(module: Toy, index: int, loss: Tensor) -> Tensor:
        if module.trainer.global_step == 3:
            print("RUNNING", flush=True)
        time.sleep(0.05)
        return loss

    module = Toy()
    module.at_step = slow
    checkpoint = checkpoint_callback(folder)
    torch.manual_seed(1)
    trainer = make_trainer(folder, [checkpoint, StopOnSignal(checkpoint)], max_epochs=1000)
    trainer.fit(module, PointsData(workers=2 if "workers" in sys.argv else 0))


def run_ddp(folder: Path, epochs: int = 2) -> None:
    """Train with two processes; the first writes the samples of both and its weights. `kill` ends rank 1 in step 4."""

    def at_step(module: Toy, index: int, loss: Tensor) -> Tensor:
        step, rank = module.trainer.global_step, module.global_rank
        if "kill" in sys.argv and step == 4 and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        if "nan" in sys.argv and step == 4 and rank == 1:
            return loss + float("nan")
        if "slow" in sys.argv:
            time.sleep(0.1)
            (folder / f"pid{rank}").write_text(str(os.getpid()))
        return loss

    module = Toy(dropout=0.0, norm=False)
    module.at_step = at_step
    (folder / f"rank{os.environ.get('LOCAL_RANK', '0')}").write_text(str(os.getpid()))
    checkpoint = checkpoint_callback(folder)
    callbacks = [checkpoint, StopOnSignal(checkpoint), StopOnNonFinite()]
    resume = folder / "last.ckpt" if "resume" in sys.argv else None
    limit = 1000 if "slow" in sys.argv and resume is None else epochs
    trainer = make_trainer(folder, callbacks, max_epochs=limit, devices=2, strategy="ddp")
    try:
        trainer.fit(module, PointsData(batch_size=2), ckpt_path=resume)
    except NonFiniteError as e:
        print(e, flush=True)
        sys.exit(3)
    seen = [None, None]
    torch.distributed.all_gather_object(seen, module.seen)
    if trainer.is_global_zero:
        torch.save({"seen": seen, "weights": trained(module)}, folder / "result.pt")


CASES: dict[str, Callable[[Path], None]] = {"slowly": run_slowly, "ddp": run_ddp}

if __name__ == "__main__":
    main()
