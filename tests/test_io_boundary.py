"""Loading is reading data: nothing is executed, imported, fetched, and nothing outside the folder is opened."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from io_toy import assert_same, look, net, saved

from visionlora.errors import AdapterFileError
from visionlora.io import load_adapter, read_adapter
from visionlora.io.read import MIRROR, PEFT_CONFIG, WEIGHTS

_EVENTS: list[tuple[str, tuple[Any, ...]]] = []
_WATCHING: list[bool] = []
_HOOKED: list[bool] = []
_FORBIDDEN = (
    "import",
    "exec",
    "compile",
    "socket.",
    "subprocess.",
    "os.system",
    "pickle.",
    "ctypes.dlopen",
    "marshal.",
)


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _WATCHING and (event == "open" or event.startswith(_FORBIDDEN)):
        _EVENTS.append((event, args))


@contextmanager
def watched() -> Iterator[list[tuple[str, tuple[Any, ...]]]]:
    if not _HOOKED:
        sys.addaudithook(_hook)  # it stays for the life of the process, so it is switched by _WATCHING
        _HOOKED.append(True)
    _EVENTS.clear()
    _WATCHING.append(True)
    try:
        yield _EVENTS
    finally:
        _WATCHING.clear()


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.write_text, (self.target, "executed")


@pytest.mark.parametrize("writer", ["ours", "peft"])
def test_loading_opens_the_files_of_the_adapter_and_does_nothing_else(writer: str, tmp_path: Path) -> None:
    folder = saved(tmp_path)
    if writer == "peft":
        from safetensors.torch import load_file, save_file

        tensors = {k: t for k, t in load_file(folder / WEIGHTS).items() if not k.startswith("visionlora")}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        (folder / MIRROR).unlink()
    load_adapter(net(), folder)  # whatever torch imports lazily on its own is there from now on
    model = net()
    with watched() as events:
        load_adapter(model, folder)
    opened = [args[0] for event, args in events if event == "open" and not isinstance(args[0], int)]
    assert [event for event, _ in events if event != "open"] == []
    assert {Path(path) for path in opened} == {
        folder / name for name in ([WEIGHTS, MIRROR, PEFT_CONFIG] if writer == "ours" else [WEIGHTS, PEFT_CONFIG])
    }


def test_the_watch_sees_what_it_forbids(tmp_path: Path) -> None:
    with watched() as events:
        exec("1")
        (tmp_path / "x").write_text("y")
    assert {"exec", "open"} <= {event for event, _ in events}


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt", "adapter_model.pth"])
def test_a_pickle_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    (tmp_path / PEFT_CONFIG).write_text('{"peft_type": "LORA"}')
    for source in (tmp_path, tmp_path / name):
        with watched() as events, pytest.raises(AdapterFileError, match=r"pickle.*convert it once"):
            read_adapter(source)
        assert events == []
    assert not (tmp_path / "ran").exists()


def test_a_pickle_under_the_name_of_a_weights_file_is_not_run(tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(AdapterFileError, match="a pickle, which is never read"):
        read_adapter(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("file", [WEIGHTS, PEFT_CONFIG])
def test_a_link_out_of_the_folder_is_refused(file: str, tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    folder, outside = saved(tmp_path / "in"), tmp_path / "outside"
    if file == PEFT_CONFIG:  # read only where the weights carry no record
        tensors = {k: t for k, t in load_file(folder / WEIGHTS).items() if not k.startswith("visionlora")}
        save_file(tensors, folder / WEIGHTS, {"format": "pt"})
        (folder / MIRROR).unlink()
        json.loads((folder / PEFT_CONFIG).read_text())
    (folder / file).rename(outside)
    (folder / file).symlink_to(outside)
    model = net()
    before = look(model)
    with pytest.raises(AdapterFileError, match="outside its folder"):
        load_adapter(model, folder)
    assert_same(look(model), before)


def test_a_link_inside_the_folder_and_a_linked_folder_are_read(tmp_path: Path) -> None:
    folder = saved(tmp_path / "run-3")
    (folder / WEIGHTS).rename(folder / "step-9.safetensors")
    (folder / WEIGHTS).symlink_to("step-9.safetensors")
    (tmp_path / "latest").symlink_to("run-3")
    assert load_adapter(net(), tmp_path / "latest") == "default"


def test_the_layout_of_the_hugging_face_cache_is_read(tmp_path: Path) -> None:
    repo = tmp_path / "models--someone--adapter"
    folder = saved(repo / "snapshots" / "0123abcd")
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(repo / "blobs" / f"{number}")
        path.symlink_to(f"../../blobs/{number}")
    assert read_adapter(folder).notices == ()
    secret = tmp_path / "secret"
    (repo / "blobs" / "3").rename(secret)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(secret)
    with pytest.raises(AdapterFileError, match="outside its folder"):
        read_adapter(folder)


def test_a_link_to_itself_and_to_nothing_are_refused(tmp_path: Path) -> None:
    for target in (WEIGHTS, "gone"):
        (tmp_path / WEIGHTS).unlink(missing_ok=True)
        (tmp_path / WEIGHTS).symlink_to(target)
        with pytest.raises(AdapterFileError, match=WEIGHTS):
            read_adapter(tmp_path)


def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(AdapterFileError, match="not a regular file"):
        read_adapter(tmp_path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_hard_link_to_a_file_of_another_user_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "a") / WEIGHTS
    (tmp_path / "b").mkdir()
    os.link(path, tmp_path / "b" / WEIGHTS)
    read_adapter(tmp_path / "b")
    os.chown(path, 12345, 12345)
    with pytest.raises(AdapterFileError, match="hard link"):
        read_adapter(tmp_path / "b")


def test_a_planted_module_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json

    (tmp_path / "planted_module.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    folder = saved(tmp_path / "adapter")
    from safetensors.torch import load_file, save_file

    tensors = {k: t for k, t in load_file(folder / WEIGHTS).items() if not k.startswith("visionlora")}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / MIRROR).unlink()
    config = json.loads((folder / PEFT_CONFIG).read_text())
    config["auto_mapping"] = {"base_model_class": "Net", "parent_library": "planted_module"}
    config["base_model_name_or_path"] = "someone/else"
    (folder / PEFT_CONFIG).write_text(json.dumps(config))
    load_adapter(net(), folder)
    assert "planted_module" not in sys.modules
