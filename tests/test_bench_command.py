"""`visionlora bench` as typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from visionlora.cli import main

SMALL = ("--batch", "2", "--size", "64", "--rank", "2", "--rounds", "2")


def test_bench_measures_models_and_writes_both_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, table = tmp_path / "r.json", tmp_path / "r.md"
    words = ["bench", "test_vit", "test_resnet", *SMALL, "--verbs", "none", "--json", str(record)]
    assert main([*words, "--markdown", str(table)]) == 0
    shown = capsys.readouterr().out
    assert table.read_text() == shown
    assert all(f"\n| {name} |" in shown for name in ("floor", "full", "linear", "ours", "geometric mean"))
    written = json.loads(record.read_text())
    assert [model["name"] for model in written["models"]] == ["test_vit", "test_resnet"]
    assert all(len(samples) == 2 for model in written["models"] for samples in model["samples"].values())
    assert main(["bench", "--compare", str(record), str(record)]) == 0
    written["models"][0]["counts"]["ours"]["saved_bytes"] *= 2
    worse = tmp_path / "worse.json"
    worse.write_text(json.dumps(written))
    assert main(["bench", "--compare", str(record), str(worse)]) == 1
    assert "test_vit ours, saved_bytes x 2.000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["test_vitt"], 'did you mean "test_vit"'),
        (["--verbs", "none"], "expected the name of a timm model"),
        (["test_vit", "--variants", "floor,pefd"], 'did you mean "peft"'),
        (["test_vit", "--threads", "2"], "--clock wall"),
        (["test_vit", "--roundz", "2"], 'did you mean "--rounds"'),
        (["--compare", "no.json", "no.json"], "no.json"),
    ],
)
def test_misuse_is_a_short_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *words]) in (1, 2)
    assert message in capsys.readouterr().err
