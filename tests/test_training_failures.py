"""Dead and hanging loader workers and want of memory end in a message that says what to do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training_toy import Points, PointsData, Toy, make_trainer

from visionlora.errors import ImageError, TrainingError
from visionlora.training.checkpoint_io import read_checkpoint
from visionlora.training.failures import ExplainFailures, explained
from visionlora.training.sampler import ResumableSampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]


class Failing(Points):
    """One sample of the second epoch's second half does something bad in its worker."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.bad = ResumableSampler(len(self)).order(1)[14]
        self.asked = 0

    def __getitem__(self, index: int) -> Any:
        self.asked += 1
        if index == self.bad and int(os.environ["TOY_EPOCH"]) == 1:
            if self.what == "hang":
                time.sleep(30)
            elif self.what == "image":
                raise ImageError("photos/cat.jpg is cut off")
            else:
                os.kill(os.getpid(), getattr(signal, self.what))
        return super().__getitem__(index)


class FailingData(PointsData):
    def train_dataloader(self) -> DataLoader[Any]:
        sampler = ResumableSampler(len(self.dataset))  # type: ignore[arg-type]
        return DataLoader(
            self.dataset, batch_size=4, sampler=sampler, num_workers=self.workers, timeout=3 if self.workers else 0
        )


def fit(folder: Path, what: str, monkeypatch: pytest.MonkeyPatch, workers: int = 2) -> None:
    class Epochs(ExplainFailures):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            # the workers of the next epoch are forked after its last batch
            monkeypatch.setenv("TOY_EPOCH", str(int(trainer.global_step >= 6)))

    monkeypatch.setenv("TOY_EPOCH", "0")
    trainer = make_trainer(folder, [Epochs()])
    with explained(trainer):
        trainer.fit(Toy(), FailingData(workers, dataset=Failing(what)))


# the second worker dies as well: torch raises its death wherever the main process is, now and then while it cleans up
@pytest.mark.filterwarnings("ignore:Exception ignored in.*DataLoaderIter:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize(("what", "hint"), [("SIGKILL", "memory runs out"), ("SIGBUS", "/dev/shm")])
def test_a_killed_worker_is_named_and_the_run_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, hint: str
) -> None:
    with pytest.raises(TrainingError, match=r"worker [01] \(pid \d+\) died") as caught:
        fit(tmp_path, what, monkeypatch)
    assert hint in str(caught.value)
    # the death interrupts the main process wherever it is: in a step nothing is saved, the epoch's checkpoint stays
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] >= 6
    monkeypatch.setenv("TOY_EPOCH", "0")
    module = Toy()
    make_trainer(tmp_path).fit(module, PointsData(), ckpt_path=tmp_path / "last.ckpt")
    assert len(module.seen) >= 22


def test_a_hanging_worker_is_an_error_after_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TrainingError, match=r"no batch in time .*timed out after 3 seconds"):
        fit(tmp_path, "hang", monkeypatch)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_the_data_stays_itself_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    with pytest.raises(ImageError, match=r"cat.jpg"):
        fit(tmp_path, "image", monkeypatch, workers)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 9


def allocate_too_much() -> Tensor:
    return torch.empty(2**46)


def raise_cuda_error() -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("allocate", [allocate_too_much, raise_cuda_error])
def test_out_of_memory_says_where_and_what_to_do(tmp_path: Path, allocate: Any) -> None:
    module = Toy()
    module.at_step = lambda m, index, loss: loss + allocate().sum() if index == 2 else loss
    trainer = make_trainer(tmp_path, [ExplainFailures()])
    wanted = r"out of memory in training batch 2, \(4, 6\), \(4,\)"
    with pytest.raises(TrainingError, match=wanted) as caught, explained(trainer):
        trainer.fit(module, PointsData())
    assert "free" in str(caught.value)
    assert "Halve the batch size" in str(caught.value)


def test_a_single_value_in_batch_norm_is_told_with_the_cure(tmp_path: Path) -> None:
    module = Toy()
    module.at_step = lambda m, index, loss: loss + nn.BatchNorm1d(6)(torch.ones(1, 6)).sum()
    trainer = make_trainer(tmp_path, [ExplainFailures()])
    with (
        pytest.raises(TrainingError, match=r"training batch 0, \(4, 6\), \(4,\).*raise the batch size"),
        explained(trainer),
    ):
        trainer.fit(module, PointsData())


def test_other_errors_stay_themselves(tmp_path: Path) -> None:
    module = Toy()

    def fail(m: Toy, index: int, loss: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    module.at_step = fail
    trainer = make_trainer(tmp_path, [ExplainFailures()])
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught, explained(trainer):
        trainer.fit(module, PointsData())
    assert not isinstance(caught.value, TrainingError)
