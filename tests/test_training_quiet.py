"""What a run prints: no advertising, no zeros."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import pytorch_lightning as pl
from training_toy import PointsData, Toy, checkpoint_callback

from visionlora.training.checkpoint_io import AtomicCheckpointIO
from visionlora.training.quiet import Bar, EpochLines, ParameterSummary, progress_bar, silence_tips

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


def fit(folder: Path, *callbacks: pl.Callback) -> None:
    trainer = pl.Trainer(
        default_root_dir=folder,
        callbacks=[checkpoint_callback(folder), *callbacks],
        plugins=[AtomicCheckpointIO()],
        accelerator="cpu",
        logger=False,
        max_epochs=2,
    )
    trainer.fit(Toy(), PointsData())


def test_no_advertising_and_no_flops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    silence_tips()
    silence_tips()
    with caplog.at_level(logging.INFO):
        fit(tmp_path, ParameterSummary(), EpochLines())
    assert "litlogger" not in caplog.text
    assert "litmodels" not in caplog.text
    assert "flops" not in caplog.text.lower()
    assert "`Trainer.fit` stopped" in caplog.text, "other messages stay"
    assert "training 463 parameters, 50.82% of the model's 911" in caplog.text


def test_without_a_terminal_an_epoch_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "visionlora"):
        fit(tmp_path, ParameterSummary(), EpochLines())
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("epoch ")]
    assert [line[:12] for line in lines] == ["epoch 1 of 2", "epoch 2 of 2"]


def test_the_bar_shows_no_run_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, ParameterSummary(), Bar())
    out = capsys.readouterr().out
    assert "Epoch 1" in out
    assert "v_num" not in out


def test_the_bar_fits_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert isinstance(progress_bar(), Bar)
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    assert isinstance(progress_bar(), EpochLines)
