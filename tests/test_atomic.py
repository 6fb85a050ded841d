"""Atomic writes: old or new, never half."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from visionlora.atomic import TEMPORARY, atomic_path, sweep, write_atomic

posix = pytest.mark.skipif(os.name == "nt", reason="signals and resource limits")


def leftovers(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if TEMPORARY.fullmatch(p.name)]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def temporary_of(folder: Path, pid: int) -> Path:
    with atomic_path(folder / "x") as mine:
        name = mine.name.replace(f".{os.getpid()}.", f".{pid}.")
    path = folder / name
    path.write_bytes(b"half")
    return path


@pytest.mark.parametrize("data", [b"new \x00 bytes", "new text, äöü"])
def test_write_atomic_replaces_the_whole_file(tmp_path: Path, data: bytes | str) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_error_in_the_block_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail_halfway() -> None:
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail_halfway()
    assert path.read_bytes() == b"old"
    assert not leftovers(tmp_path)


@posix
def test_the_file_gets_the_permissions_of_an_ordinary_file(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_bytes(b"")
    write_atomic(tmp_path / "atomic", b"")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        write_atomic(tmp_path / "nowhere" / "file", b"")


def test_the_next_write_sweeps_what_a_dead_process_left(tmp_path: Path) -> None:
    stale = temporary_of(tmp_path, dead_pid())
    write_atomic(tmp_path / "file", b"new")
    assert not stale.exists()


def test_sweep_keeps_temporaries_of_living_processes_and_other_files(tmp_path: Path) -> None:
    mine = temporary_of(tmp_path, os.getpid())
    other = tmp_path / ".hidden.tmp"
    other.write_bytes(b"")
    assert sweep(tmp_path) == 0
    assert mine.exists()
    assert other.exists()


def test_sweep_takes_old_temporaries_of_other_machines_only(tmp_path: Path) -> None:
    young = tmp_path / f".elsewhere.{dead_pid()}.{'0' * 16}.vltmp"
    old = tmp_path / f".elsewhere.{dead_pid()}.{'1' * 16}.vltmp"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 3 * 86400,) * 2)
    assert sweep(tmp_path) == 1
    assert young.exists()


@posix
def test_a_full_disk_names_path_need_and_free_space_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="free") as caught:
            write_atomic(path, b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in str(caught.value)
    assert "5,000 bytes" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert not leftovers(tmp_path)


def test_writers_of_one_path_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"

    def write(letter: bytes) -> None:
        for _ in range(25):
            write_atomic(path, letter * 10_000)

    threads = [threading.Thread(target=write, args=(c,)) for c in (b"a", b"b", b"c", b"d")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = path.read_bytes()
    assert content == content[:1] * 10_000
    assert not leftovers(tmp_path)


@posix
def test_file_then_name_then_folder_reach_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    real_fsync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        order.append("folder" if Path(f"/proc/self/fd/{descriptor}").resolve() == tmp_path.resolve() else "file")
        real_fsync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        order.append("rename")
        return real_replace(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    write_atomic(tmp_path / "file", b"new")
    assert order == ["file", "rename", "folder"]


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from visionlora.atomic import write_atomic
n = 0
while True:
    write_atomic(sys.argv[1], (b"%08d" % n) * 100_000)
    n += 1
"""


@posix
@pytest.mark.slow
def test_kill_9_leaves_an_old_or_a_new_file_and_no_litter(tmp_path: Path) -> None:
    path, root = tmp_path / "file", str(Path(__file__).parents[1])
    swept = 0
    write_atomic(path, b"%08d" % 0 * 100_000)
    for trial in range(40):
        writer = subprocess.Popen([sys.executable, "-S", "-c", textwrap.dedent(WRITER).format(root=root), str(path)])
        time.sleep(0.15 + 0.003 * trial)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        content = path.read_bytes()
        assert len(content) == 800_000
        assert content == content[:8] * 100_000
        swept += sweep(tmp_path)
        assert not leftovers(tmp_path)
    assert swept > 0, "no kill hit a write: the test proves nothing"
