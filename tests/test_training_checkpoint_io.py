"""Checkpoint files: whole or not at all, plain data only, local only, damage noticed."""

from __future__ import annotations

import logging
import multiprocessing
import os
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visionlora.errors import ConfigError, ResumeError
from visionlora.training.checkpoint_io import AtomicCheckpointIO, read_checkpoint


def checkpoint(step: int = 1, size: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"w": torch.full((size,), float(step))}, "global_step": step}


def save(path: Path, step: int = 1, size: int = 1000) -> Path:
    AtomicCheckpointIO().save_checkpoint(checkpoint(step, size), path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_round_trip(tmp_path: Path) -> None:
    path = save(tmp_path / "new folder" / "last.ckpt", 5)
    loaded = AtomicCheckpointIO().load_checkpoint(str(path))
    assert loaded["global_step"] == 5
    assert torch.equal(loaded["state_dict"]["w"], checkpoint(5)["state_dict"]["w"])
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError, match="free") as caught:
            save(path, 2, 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(caught.value)
    assert read_checkpoint(path)["global_step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_cut_checkpoint_falls_back_to_the_newest_readable_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for age, name in ((300, "oldest"), (200, "previous"), (100, "broken too"), (0, "last")):
        path = save(tmp_path / f"{name}.ckpt", step=age)
        os.utime(path, (time.time() - age,) * 2)
    cut(tmp_path / "broken too.ckpt")
    cut(tmp_path / "last.ckpt")
    with caplog.at_level(logging.WARNING):
        assert AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")["global_step"] == 200
    assert "last.ckpt is damaged" in caplog.text
    assert "previous.ckpt" in caplog.text


def test_a_cut_checkpoint_alone_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    cut(path)
    with pytest.raises(ResumeError, match=r"last.ckpt is damaged or cut off"):
        AtomicCheckpointIO().load_checkpoint(path)


def test_flipped_bits_in_tensors_are_found(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt", size=5000)
    good, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    start = good.index(torch.full((50,), 1.0).numpy().tobytes())
    for offset in torch.randint(start, start + 5000 * 4, (50,), generator=generator).tolist():
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 4]) + good[offset + 1 :])
        with pytest.raises(ResumeError, match="checksum"):
            read_checkpoint(path)


def test_any_flipped_byte_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    good = path.read_bytes()
    for offset in range(0, len(good), 37):
        path.write_bytes(good[:offset] + bytes([good[offset] ^ 255]) + good[offset + 1 :])
        try:
            loaded = read_checkpoint(path)
        except ResumeError:
            continue
        assert loaded["global_step"] == 1
        assert torch.equal(loaded["state_dict"]["w"], checkpoint()["state_dict"]["w"])


def test_a_missing_checkpoint_lists_its_neighbours(tmp_path: Path) -> None:
    save(tmp_path / "epoch3.ckpt")
    with pytest.raises(ResumeError, match=r"no checkpoint at .*last.ckpt; beside it: epoch3.ckpt"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt")


@pytest.mark.parametrize("url", ["http://host/last.ckpt", "https://host/last.ckpt", "s3://bucket/last.ckpt"])
def test_checkpoints_from_the_network_are_refused(url: str) -> None:
    with pytest.raises(ResumeError, match="local files"):
        AtomicCheckpointIO().load_checkpoint(url)
    with pytest.raises(ResumeError, match="local files"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(), url)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("payload ran",))


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "evil": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(ResumeError, match="more than plain data"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt")
    with pytest.raises(ResumeError, match="weights_only"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "evil.ckpt", weights_only=False)
    assert not Path("payload ran").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip", b"PK\x05\x06" + 18 * b"\0"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.ckpt"
    path.write_bytes(content)
    with pytest.raises(ResumeError, match=r"other.ckpt"):
        read_checkpoint(path)


def test_a_file_of_tensors_alone_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "weights.ckpt")
    with pytest.raises(ResumeError, match="no state_dict"):
        read_checkpoint(tmp_path / "weights.ckpt")


def test_a_checkpoint_that_could_not_be_loaded_is_refused_at_the_first_save(tmp_path: Path) -> None:
    bad = checkpoint() | {"callbacks": {"mine": {"score": np.float64(1.0), "path": Path("x")}}}
    with pytest.raises(ConfigError, match="could not resume"):
        AtomicCheckpointIO().save_checkpoint(bad, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


def test_inspect_sees_the_checkpoint_and_may_refuse_it(tmp_path: Path) -> None:
    path, plugin, seen = save(tmp_path / "last.ckpt", 3), AtomicCheckpointIO(), []
    plugin.inspect = lambda loaded: seen.append(loaded["global_step"])
    plugin.load_checkpoint(path)
    assert seen == [3]


def test_remove_checkpoint_removes_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "last.ckpt")
    AtomicCheckpointIO().remove_checkpoint(path)
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not path.exists()


def save_for_ever(path: Path) -> None:
    plugin, step = AtomicCheckpointIO(), 0
    while True:
        plugin.save_checkpoint(checkpoint(step, 500_000), path)
        step += 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_kill_9_while_saving_leaves_a_readable_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/dev/shm").is_dir():  # another file system, as in a container: renaming from there would be a copy
        monkeypatch.setenv("TMPDIR", "/dev/shm")
        monkeypatch.setattr("tempfile.tempdir", None)
    path, left = save(tmp_path / "last.ckpt", size=500_000), 0
    for trial in range(30):
        saver = multiprocessing.get_context("fork").Process(target=save_for_ever, args=(path,))
        saver.start()
        time.sleep(0.05 + 0.003 * trial)
        saver.kill()
        saver.join()
        loaded = read_checkpoint(path)
        assert (loaded["state_dict"]["w"] == loaded["global_step"]).all()
        left += len(list(tmp_path.glob(".*.vltmp")))
    save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
    assert left > 0, "no kill hit a save: the test proves nothing"
