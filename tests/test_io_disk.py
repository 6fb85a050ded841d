"""Saving that is interrupted, and files of two saves side by side."""

from __future__ import annotations

import json
import logging
import multiprocessing
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from io_toy import adapted, images, net, record_of, saved

from visionlora.io import load_adapter, read_adapter, save_adapter
from visionlora.io.read import MIRROR, PEFT_CONFIG, WEIGHTS


def test_a_torn_set_is_noticed_and_the_weights_decide(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(net(), target_modules=["hidden"], lora_alpha=4.0)
    save_adapter(model, tmp_path / "new")
    saved(tmp_path / "old", lora_alpha=400.0)
    for file in (MIRROR, PEFT_CONFIG):
        (tmp_path / "new" / file).write_bytes((tmp_path / "old" / file).read_bytes())
    with caplog.at_level(logging.WARNING):
        file = read_adapter(tmp_path / "new")
    assert len(file.notices) == 1
    assert f"{MIRROR} does not belong to {WEIGHTS}" in caplog.text
    fresh = net()
    load_adapter(fresh, tmp_path / "new")
    assert torch.equal(fresh(images()), model(images()))


def test_an_edited_mirror_for_peft_is_noticed(tmp_path: Path) -> None:
    config = saved(tmp_path) / PEFT_CONFIG
    config.write_text(config.read_text().replace('"lora_alpha": 32.0', '"lora_alpha": 800.0'))
    assert f"{PEFT_CONFIG} does not belong" in read_adapter(tmp_path).notices[0]
    config.unlink()
    assert f"{PEFT_CONFIG} does not belong" in read_adapter(tmp_path).notices[0]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"peft": 3}', "\xff"])
def test_a_damaged_mirror_is_noticed(text: str, tmp_path: Path) -> None:
    (saved(tmp_path) / MIRROR).write_text(text, encoding="latin-1")
    assert MIRROR in read_adapter(tmp_path).notices[0]


def test_a_whole_set_has_nothing_odd(tmp_path: Path) -> None:
    assert read_adapter(saved(tmp_path)).notices == ()
    assert read_adapter(saved(tmp_path, lora_alpha=3.0)).notices == ()


def test_a_full_disk_leaves_the_old_adapter(tmp_path: Path) -> None:
    saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = adapted(net(), target_modules=["hidden", "stem"], lora_alpha=3.0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before[WEIGHTS]) - 500, limit[1]))
    try:
        with pytest.raises(OSError, match=rf"^\[Errno \d+\] cannot write \S*{WEIGHTS}: "):
            save_adapter(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_processes_that_save_to_one_folder_leave_a_whole_adapter(tmp_path: Path) -> None:
    model = adapted(net(), target_modules=["hidden"])
    delta = model.hidden.adapters["default"]["weight"]

    def save_often(value: int) -> None:
        delta.B.data.fill_(value)
        for _ in range(15):
            save_adapter(model, tmp_path, metrics={"step": value})

    writers = [multiprocessing.get_context("fork").Process(target=save_often, args=(value,)) for value in (1, 2, 3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    file = read_adapter(tmp_path)
    assert (file.tensors["hidden/weight/B"] == file.record["metrics"]["step"]).all()
    assert not list(tmp_path.glob(".*"))


_KILLER = """
import itertools, os, random, signal, sys, time, torch
sys.path.insert(0, sys.argv[2])
from io_toy import adapted, net
from test_io_disk import assert_whole
from visionlora.io import save_adapter
from pathlib import Path

torch.set_num_threads(1)
model = adapted(net(), target_modules=["hidden", "stem"])
delta = model.hidden.adapters["default"]["weight"]

def save(step):
    delta.B.data.fill_(step)
    delta.scale = float(step)
    save_adapter(model, sys.argv[1], metrics={"step": step})

save(1)
pause = random.Random(0)
steps, leftovers = set(), 0
for _ in range(30):
    first = assert_whole(Path(sys.argv[1]))
    child = os.fork()
    if not child:
        for step in itertools.count(first + 1):
            save(step)
    time.sleep(pause.uniform(0.001, 0.1))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    steps.add(assert_whole(Path(sys.argv[1])))
    leftovers += len(list(Path(sys.argv[1]).glob(".*")))
print(len(steps), leftovers)
save(1)
assert not list(Path(sys.argv[1]).glob(".*"))
"""


@pytest.mark.slow
def test_kill_9_while_saving_leaves_the_old_or_the_new_adapter(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", _KILLER, str(tmp_path), str(Path(__file__).parent)]
    done = subprocess.run(command, check=True, timeout=280, stdout=subprocess.PIPE, text=True)
    different, leftovers = map(int, done.stdout.split())
    assert different > 5  # the kills did fall between and into saves
    assert leftovers > 0  # temporary files, which the next save removes


def assert_whole(folder: Path) -> int:
    """Return the step that a killed saver left, whole."""
    file = read_adapter(folder)
    step: int = file.record["metrics"]["step"]
    assert (file.tensors["hidden/weight/B"] == step).all()
    if (folder / PEFT_CONFIG).exists():  # what PEFT would compute with is what the weights were saved with
        config = json.loads((folder / PEFT_CONFIG).read_text())
        alphas = {config["lora_alpha"], *config["alpha_pattern"].values()}
        assert record_of(folder)["plan"]["layers"]["hidden"]["scale"] * 2 in alphas
    return step
