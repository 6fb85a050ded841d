"""A resumed run is the uninterrupted run, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from training_toy import Points, PointsData, Toy, checkpoint_callback, equal, make_trainer, trained

from visionlora.errors import ResumeError
from visionlora.training.ema import AdapterEMA
from visionlora.training.signals import StoppedBySignal

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


class StopAt(pl.Callback):
    """Ask StopOnSignal's way out at an optimiser step, or at a hook of the validation after it."""

    def __init__(self, checkpoint: Any, step: int, hook: str = "on_train_batch_end") -> None:
        from visionlora.training.signals import StopOnSignal

        self.stopper = StopOnSignal(checkpoint)
        self.step, self.hook = step, hook

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.hook == "on_train_batch_end":
            self.stopper.received = 15

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and self.hook == "on_validation_batch_start":
            self.stopper.received = 15


def run(
    folder: Path, *, workers: int = 0, resume: Path | None = None, stop: StopAt | None = None, **settings: Any
) -> Toy:
    module = Toy()
    torch.manual_seed(7 if resume is None else 99)
    extra = settings.pop("extra", [])
    callbacks = [checkpoint_callback(folder), *extra]
    if stop is not None:
        callbacks = [stop.stopper.checkpoint, stop.stopper, stop, *extra]
    trainer = make_trainer(folder, callbacks, **settings)
    if stop is None:
        trainer.fit(module, PointsData(workers), ckpt_path=resume)
    else:
        with pytest.raises(StoppedBySignal) as caught:
            trainer.fit(module, PointsData(workers), ckpt_path=resume)
        assert caught.value.code == 143
    return module


@pytest.mark.parametrize("settings", [{}, {"max_epochs": -1, "max_steps": 18}, {"accumulate_grad_batches": 2}])
def test_resume_after_an_epoch_is_exact(tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole", **settings)
    short = {"max_epochs": 2} if "max_steps" not in settings else {"max_steps": 12}
    run(tmp_path / "part", **(settings | short))
    resumed = run(tmp_path / "part", resume=tmp_path / "part/last.ckpt", **settings)
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert len(resumed.seen) == 22
    assert equal(trained(resumed), trained(whole))


@pytest.mark.parametrize("step", [1, 5, 6, 8, 12, 17])
def test_resume_in_an_epoch_is_exact(tmp_path: Path, step: int) -> None:
    whole = run(tmp_path / "whole")
    part = run(tmp_path / "part", stop=StopAt(checkpoint_callback(tmp_path / "part"), step))
    resumed = run(tmp_path / "part", resume=tmp_path / "part/last.ckpt")
    assert part.seen + resumed.seen == whole.seen
    assert equal(trained(resumed), trained(whole))
    assert part.validated + resumed.validated == whole.validated == [6, 12, 18]


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"val_check_interval": 3}, {"max_steps": 15}])
@pytest.mark.parametrize("step", [2, 3, 4])
def test_resume_in_an_epoch_is_exact_with(tmp_path: Path, step: int, settings: dict[str, Any]) -> None:
    whole = run(tmp_path / "whole", **settings)
    part = run(tmp_path / "part", stop=StopAt(checkpoint_callback(tmp_path / "part"), step), **settings)
    resumed = run(tmp_path / "part", resume=tmp_path / "part/last.ckpt", **settings)
    assert part.seen + resumed.seen == whole.seen
    assert equal(trained(resumed), trained(whole))
    assert part.validated + resumed.validated == whole.validated


def test_resume_in_a_validation_repeats_it_and_is_exact(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    stop = StopAt(checkpoint_callback(tmp_path / "part"), 12, "on_validation_batch_start")
    part = run(tmp_path / "part", stop=stop)
    resumed = run(tmp_path / "part", resume=tmp_path / "part/last.ckpt")
    assert part.validated == [6, 12]
    assert resumed.validated == [12, 18]
    assert part.seen + resumed.seen == whole.seen
    assert equal(trained(resumed), trained(whole))


def test_resume_with_averages_is_exact(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", extra=[AdapterEMA(0.9)])
    for step, hook in ((8, "on_train_batch_end"), (12, "on_validation_batch_start")):
        folder = tmp_path / hook
        run(folder, stop=StopAt(checkpoint_callback(folder), step, hook), extra=[AdapterEMA(0.9)])
        resumed = run(folder, resume=folder / "last.ckpt", extra=[AdapterEMA(0.9)])
        assert equal(trained(resumed), trained(whole))


@pytest.mark.parametrize("step", [6, 9])
def test_resume_with_workers_is_exact(tmp_path: Path, step: int) -> None:
    whole = run(tmp_path / "whole", workers=2)
    run(tmp_path / "part", workers=2, stop=StopAt(checkpoint_callback(tmp_path / "part"), step))
    resumed = run(tmp_path / "part", workers=2, resume=tmp_path / "part/last.ckpt")
    assert resumed.seen == whole.seen[-len(resumed.seen) :]
    assert equal(trained(resumed), trained(whole))


def test_a_checkpoint_every_few_steps_resumes_too(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")

    class Crash(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == 10:
                raise KeyError("crash")

    checkpoint = checkpoint_callback(tmp_path / "part", every_n_steps=4)
    module = Toy()
    torch.manual_seed(7)
    with pytest.raises(KeyError):
        make_trainer(tmp_path / "part", [checkpoint, Crash()]).fit(module, PointsData())
    resumed = run(tmp_path / "part", resume=tmp_path / "part/last.ckpt")
    assert resumed.seen == whole.seen[22 + 2 * 4 :]
    assert equal(trained(resumed), trained(whole))


@pytest.mark.parametrize("data", [PointsData(batch_size=2), PointsData(seed=1), PointsData(dataset=Points(30))])
def test_other_data_in_the_middle_of_an_epoch_is_refused(tmp_path: Path, data: PointsData) -> None:
    run(tmp_path, stop=StopAt(checkpoint_callback(tmp_path), 8))
    with pytest.raises(ResumeError, match="in the checkpoint, "):
        make_trainer(tmp_path).fit(Toy(), data, ckpt_path=tmp_path / "last.ckpt")


def test_other_data_after_an_epoch_is_allowed(tmp_path: Path) -> None:
    run(tmp_path, max_epochs=1)
    module = Toy()
    make_trainer(tmp_path, max_epochs=2).fit(module, PointsData(batch_size=2), ckpt_path=tmp_path / "last.ckpt")
    assert len(module.seen) == 22
