"""A checkpoint every few steps, whose step may be the last of an epoch, and an average measured from a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_toy import PointsData, Toy, checkpoint_callback, equal, make_trainer, trained

from visionlora.training.checkpoint_io import read_checkpoint
from visionlora.training.ema import AdapterEMA

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


def fit(folder: Path, resume: Path | None = None, **settings: Any) -> Toy:
    module, validates = Toy(), settings.get("limit_val_batches") != 0
    watch = {"every_n_steps": 3} | ({} if validates else {"monitor": None})
    callbacks = [checkpoint_callback(folder, **watch), AdapterEMA(0.9)]
    make_trainer(folder, callbacks, max_epochs=2, **settings).fit(module, PointsData(), ckpt_path=resume)
    return module


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}], ids=["validated", "not validated"])
def test_a_checkpoint_at_the_last_step_leads_on_to_the_end_of_the_epoch(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole = fit(tmp_path / "whole", **settings)
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole/previous.ckpt", tmp_path / "part/last.ckpt")
    step = read_checkpoint(tmp_path / "part/last.ckpt")["global_step"]
    assert step == (9 if settings else 12), "12 is the last step of the second epoch, saved as its validation begins"
    part = fit(tmp_path / "part", resume=tmp_path / "part/last.ckpt", **settings)
    assert equal(trained(part), trained(whole))
    assert part.validated == ([] if settings else [12])
    assert part.saved_steps == [12]
    ends = [read_checkpoint(tmp_path / name / "last.ckpt") for name in ("whole", "part")]
    assert equal(ends[0]["state_dict"], ends[1]["state_dict"])
    assert ends[0]["loops"]["fit_loop"]["epoch_progress"] == ends[1]["loops"]["fit_loop"]["epoch_progress"]


def test_the_average_is_measured_from_a_checkpoint(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    class Measured(Toy):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            seen.append(self.net.A.weight.detach().clone())

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.test_step(batch, batch_idx)
            return seen[-1]

    average = fit(tmp_path).net.A.weight  # after training the model holds it
    loader, path = PointsData().val_dataloader(), tmp_path / "last.ckpt"
    module = Measured()
    trainer = make_trainer(tmp_path, [AdapterEMA(0.9)])
    trainer.test(module, loader, ckpt_path=path, verbose=False)
    trainer.predict(module, loader, ckpt_path=path, return_predictions=False)
    assert all(torch.equal(weight, average) for weight in seen)
    assert len(seen) == 2 * len(loader)
    raw = read_checkpoint(path)["state_dict"]["net.A.weight"]
    assert torch.equal(module.net.A.weight, raw), "the values of training come back"
    assert not torch.equal(raw, average)
