"""The exactness benchmark runs, keeps its promises for visionlora alone, and notices promises that are broken."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import visionlora as vl

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import exactness
from exactness_libraries import OnVisionLoRA, Put, Spot, VisionLoRA
from exactness_promises import PROMISES, passed_over, verdicts
from exactness_report import counts, details, in_a_word, overview, plain
from exactness_rows import ROWS


def test_the_table_of_two_layer_kinds() -> None:
    rows = {label: ROWS[label] for label in ("Conv2d reflect", "MultiheadAttention out_proj")}
    columns = {"visionlora": exactness.table(VisionLoRA(), rows)}
    for found, _ in columns["visionlora"].values():
        assert list(found) == list(PROMISES)
        assert {v.state for v in found.values()} == {"kept"}
    assert overview(columns).splitlines()[2] == "| Conv2d reflect | right |"
    assert counts(columns).count("2 / 0 / 0") == len(PROMISES)
    assert details(columns["visionlora"]).count("exact") >= 4
    assert plain(columns)["visionlora"]["Conv2d reflect"]["merged"]["state"] == "kept"


def test_the_page_shows_every_layer_kind_and_promise() -> None:
    page = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text()
    assert all(f"| {label} |" in page for label in ROWS)
    assert all(f"| `{name}` | {promise.__doc__} |" in page for name, promise in PROMISES.items())


def test_the_page_names_tests_that_exist() -> None:
    page = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", page))
    defined = {
        name
        for file in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text())
    }
    assert len(named) > 30
    assert named <= defined


def test_a_refusal_is_no_crash() -> None:
    (found, _) = exactness.check(VisionLoRA(), ROWS["Conv2d depthwise"])
    assert (found["attaches"].state, found["attaches"].text) == ("no", "refused")
    assert not passed_over(lambda model, spot: VisionLoRA().put(model, spot, "lora"), ROWS["Conv2d depthwise"])

    def torn(model: nn.Module, spot: Spot) -> Put:
        torch.zeros(2) @ torch.zeros(3)
        raise AssertionError

    assert in_a_word(verdicts(torn, ROWS["Linear"])) == "crash: RuntimeError"


def test_a_broken_promise_is_noticed() -> None:
    class Forgetful(OnVisionLoRA):
        """Merges by dropping the adapter, and saves it before it was trained."""

        def ways(self):
            return [(lambda: vl.deactivate(self.model), lambda: vl.activate(self.model, "default"))]

        def load(self, base, folder):
            return VisionLoRA().put(base, ROWS["Linear"].spot, "lora")

    def place(model: nn.Module, spot: Spot) -> Put:
        return Forgetful(VisionLoRA().put(model, spot, "lora").model)

    found = verdicts(place, ROWS["Linear"])
    assert found["merged"].text == "wrong: 1"
    assert found["saved"].text.startswith("wrong")
    assert found["unmerged"].text == "exact"
    assert found["start"].state == "kept"


def test_a_missing_library_is_named_with_what_to_type(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(exactness, "find_spec", lambda name: None if name == "lycoris" else name)
    monkeypatch.setattr(sys, "argv", ["exactness.py", "--libraries", "LyCORIS", "visionlora"])
    assert exactness.main() == 2
    assert "LyCORIS missing: pip install lycoris-lora" in capsys.readouterr().err
