"""A run that is told to stop saves, says where, and ends with the exit code of the signal."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from training_toy import PointsData, Toy, checkpoint_callback, equal, make_trainer, trained

from visionlora.training.checkpoint_io import read_checkpoint
from visionlora.training.signals import StopOnSignal, StoppedBySignal

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="POSIX signals"),
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning"),
]
CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129}
TOY = Path(__file__).with_name("training_toy.py")


class Send(pl.Callback):
    """Send this process signals at one step, at one hook."""

    def __init__(self, number: int, step: int, hook: str = "on_train_batch_start", times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times
        setattr(self, hook, self.send)

    def send(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def stopped(folder: Path, send: Send, workers: int = 0, **settings: Any) -> tuple[Toy, int]:
    module, checkpoint = Toy(), checkpoint_callback(folder)
    torch.manual_seed(7)
    trainer = make_trainer(folder, [checkpoint, StopOnSignal(checkpoint), send], **settings)
    with pytest.raises(StoppedBySignal) as caught:
        trainer.fit(module, PointsData(workers))
    return module, caught.value.code  # type: ignore[return-value]


@pytest.mark.parametrize("number", list(CODES))
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_finishes_the_step_saves_and_says_where(
    tmp_path: Path, number: int, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = {n: signal.getsignal(n) for n in CODES}
    with caplog.at_level(logging.WARNING, "visionlora"):
        module, code = stopped(tmp_path, Send(number, 8), workers)
    assert code == CODES[number]  # type: ignore[index]
    assert len(module.seen) == 22 + 3 * 4, "the step in which the signal came is finished, no other begun"
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 9
    assert f"stopped by {signal.Signals(number).name} at step 9; go on from {tmp_path / 'last.ckpt'}" in caplog.text
    assert {n: signal.getsignal(n) for n in CODES} == handlers


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    whole = Toy()
    torch.manual_seed(7)
    make_trainer(tmp_path / "whole").fit(whole, PointsData())
    stopped(tmp_path, Send(signal.SIGTERM, 8))
    resumed = Toy()
    make_trainer(tmp_path).fit(resumed, PointsData(), ckpt_path=tmp_path / "last.ckpt")
    assert equal(trained(resumed), trained(whole))


def test_a_signal_in_a_validation_saves_at_once(tmp_path: Path) -> None:
    module, code = stopped(tmp_path, Send(signal.SIGTERM, 6, "on_validation_batch_start"))
    assert code == 143
    assert module.saved_steps == []
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 6


def test_a_signal_waits_for_accumulated_gradients(tmp_path: Path) -> None:
    stopped(tmp_path, Send(signal.SIGTERM, 1), accumulate_grad_batches=3)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


def test_a_signal_in_the_sanity_check_ends_without_a_checkpoint(tmp_path: Path) -> None:
    send = Send(signal.SIGTERM, 0, "on_sanity_check_start")
    _, code = stopped(tmp_path, send, num_sanity_val_steps=1)
    assert code == 143
    assert not (tmp_path / "last.ckpt").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path: Path) -> None:
    module, code = stopped(tmp_path, Send(signal.SIGINT, 8, times=2))
    assert code == 130
    assert len(module.seen) == 22 + 2 * 4
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 6


def test_after_a_run_the_handlers_are_back(tmp_path: Path) -> None:
    handlers = {n: signal.getsignal(n) for n in CODES}
    checkpoint = checkpoint_callback(tmp_path)
    make_trainer(tmp_path, [checkpoint, StopOnSignal(checkpoint)], max_epochs=1).fit(Toy(), PointsData())
    assert {n: signal.getsignal(n) for n in CODES} == handlers


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(TOY.parents[1]), "PYTHONWARNINGS": "ignore"}
    for name in ("LOCAL_RANK", "MASTER_PORT", "NODE_RANK"):
        environment.pop(name, None)
    command = [sys.executable, str(TOY), str(folder), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, start_new_session=True
    )


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"the run ended with {process.wait()} before it said {text!r}")


@pytest.mark.slow
def test_a_process_ends_with_the_exit_code_of_its_signal(tmp_path: Path) -> None:
    runs = {n: start(tmp_path / signal.Signals(n).name, "slowly") for n in CODES}
    runs[-signal.SIGINT] = start(tmp_path / "group", "slowly", "workers")
    for number, process in runs.items():
        wait_for(process, "RUNNING")
        sent = time.monotonic()
        if number > 0:
            process.send_signal(number)
        else:  # Ctrl-C in a terminal reaches the loader workers too
            os.killpg(process.pid, signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == CODES[signal.Signals(abs(number))], out
        assert time.monotonic() - sent < 30, "a cluster waits so long before it kills"
        assert "go on from" in out
        assert "Traceback" not in out
    for folder in tmp_path.iterdir():
        assert read_checkpoint(folder / "last.ckpt")["global_step"] >= 3


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    """Wait for the end of a run, kill it with all it started if it hangs, and return what it said."""
    try:
        out, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, _ = process.communicate()
        raise AssertionError(f"the run hangs after saying:\n{out}") from None
    assert process.returncode == code, out
    return out


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def pids(folder: Path) -> list[int]:
    return [int((folder / f"rank{rank}").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_resume_exactly_and_see_every_sample(tmp_path: Path) -> None:
    finish(start(tmp_path / "whole", "ddp"))
    part = start(tmp_path / "part", "ddp", "slow")
    wait_for_files(tmp_path / "part", part, 2)
    part.send_signal(signal.SIGTERM)
    finish(part, code=143)
    step = read_checkpoint(tmp_path / "part/last.ckpt")["global_step"]
    assert 0 < step < 12, f"stopped at step {step}: not in the run"
    assert not any(alive(pid) for pid in pids(tmp_path / "part"))
    finish(start(tmp_path / "part", "ddp", "resume"))
    a, b = torch.load(tmp_path / "whole/result.pt"), torch.load(tmp_path / "part/result.pt")
    for rank in (0, 1):
        assert b["seen"][rank] == a["seen"][rank][-len(b["seen"][rank]) :]
        assert len(b["seen"][rank]) == 22 - 2 * step + (step >= 6)  # 11 samples an epoch: the last batch has one
    assert equal(a["weights"], b["weights"])


def wait_for_files(folder: Path, process: subprocess.Popen[str], count: int) -> None:
    for _ in range(1500):
        if len(list(folder.glob("pid*"))) == count:
            return
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.1)
    raise AssertionError("the run did not begin")


@pytest.mark.slow
def test_a_bad_loss_of_one_process_stops_all(tmp_path: Path) -> None:
    out = finish(start(tmp_path, "ddp", "nan"), code=3)
    assert "not finite on another device" in out
    assert not any(alive(pid) for pid in pids(tmp_path))


@pytest.mark.slow
def test_a_killed_process_ends_all_within_a_minute(tmp_path: Path) -> None:
    run = start(tmp_path, "ddp", "kill")
    for _ in range(1500):
        if (tmp_path / "rank1").exists() and not alive(int((tmp_path / "rank1").read_text())):
            break
        time.sleep(0.1)
    out, _ = run.communicate(timeout=60)
    assert run.returncode != 0, out
    assert not any(alive(pid) for pid in pids(tmp_path))
