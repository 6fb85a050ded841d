"""The command: verbs, help, errors in two lines, exit codes, and the verbs that need no trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from visionlora import __version__
from visionlora.cli import VERBS, main

HEAVY = ("torch", "timm", "pytorch_lightning", "albumentations", "PIL", "numpy")


def modules_and_seconds_after(args: list[str]) -> tuple[list[str], float]:
    """Return which heavy modules a fresh process has loaded after `main(args)`, and its CPU seconds."""
    code = (
        "import sys, os; from visionlora.__main__ import main; main(sys.argv[1:]); t = os.times();"
        f"print('LOADED', t.user + t.system, *[m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, timeout=60)
    seconds, *loaded = done.stdout.splitlines()[-1].removeprefix("LOADED ").split()
    return loaded, float(seconds)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in VERBS)


def test_no_verb_shows_the_help_and_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "verbs:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"visionlora {__version__}\n"


def test_an_unknown_verb_gets_two_lines_and_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scnes", "out"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert 'did you mean "scenes"?' in lines[0]


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.arguments])
def test_help_of_a_plain_verb_shows_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"usage: visionlora {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--per_clas", "--per_clas=3"])
def test_an_unknown_option_is_not_taken_for_an_abbreviation(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scenes", str(tmp_path / "out"), option]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert 'did you mean "--per_class"?' in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_missing_argument_gets_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "out" in lines[0]


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(tmp_path), "--size", "-1", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert main(["scenes", str(tmp_path), "--size", "-1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_system_error_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["scenes", str(tmp_path / "file" / "below")]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_scenes_writes_an_image_folder_and_completes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scenes", str(tmp_path / "s"), "--domains", "day, night_tilted_test", "--size", "16", "--per_class", "2"]
    assert main([*words, "--test_per_class", "1"]) == 0
    assert "24 new images of 8 classes" in capsys.readouterr().out
    assert len(list((tmp_path / "s" / "day").glob("*/*.jpg"))) == 16
    assert main([*words, "--test_per_class", "1"]) == 0
    assert "0 new images" in capsys.readouterr().out


def test_scenes_names_the_nearest_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(tmp_path / "s"), "--domains", "nigth"]) == 2
    assert "night" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--help"], *([verb, "--help"] for verb, v in VERBS.items() if v.arguments)])
def test_help_is_quick_and_loads_nothing_heavy(args: list[str]) -> None:
    loaded, seconds = modules_and_seconds_after(args)
    assert loaded == []
    assert seconds < 0.5


@pytest.mark.slow
def test_the_module_runs_as_a_command() -> None:
    env = {**os.environ, "PYTHONWARNINGS": "error"}
    words = [sys.executable, "-m", "visionlora", "nonsense"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is no verb" in done.stderr
