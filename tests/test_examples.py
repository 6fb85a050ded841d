"""The examples run, on a few scenes, and show what they claim."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import visionlora as vl

EXAMPLES = Path(__file__).parents[1] / "examples"
FEW = {"per_class": 6, "epochs": 1}

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\)"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]


def example(name: str) -> Callable[..., Any]:
    """Return the main function of an example, run as a file and not as a module."""
    found: Callable[..., Any] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return found


def test_adapt_timm_saves_an_adapter_and_shows_both_accuracies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapted = example("adapt_timm")(str(tmp_path), **FEW)
    assert 0 < base < 1
    assert 0 < adapted <= 1
    assert vl.read_adapter(tmp_path / "adapter").record["base"]["name"] == "scenes_resnet"
    assert f"adapted {adapted:.1%}" in capsys.readouterr().out


def test_plain_torch_learns_without_lightning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, adapted = example("plain_torch")(str(tmp_path), per_class=12, epochs=4)
    assert adapted > base
    assert "% of the base's" in capsys.readouterr().out
    assert vl.load_model(tmp_path / "adapter").class_names == vl.read_adapter(tmp_path / "adapter").record["classes"]


def test_plain_torch_imports_no_lightning() -> None:
    text = (EXAMPLES / "plain_torch.py").read_text()
    assert "lightning" not in text.replace("no Lightning", "")


def test_camera_fleet_switches_adapters_on_one_base(tmp_path: Path) -> None:
    table = example("camera_fleet")(str(tmp_path), **FEW)
    assert set(table) == {"gate", "bridge"}
    for row in table.values():
        assert set(row) == {"base", "gate", "bridge", "half"}
        assert len(set(row.values())) > 1  # switching changes answers


def test_the_first_example_is_short() -> None:
    assert len((EXAMPLES / "adapt_timm.py").read_text().splitlines()) < 40
