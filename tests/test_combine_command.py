"""`visionlora combine`, end to end on a tiny timm model, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from layer_kinds import stir
from safetensors.torch import save_file
from torch.testing import assert_close

import visionlora as vl
from visionlora.cli import main
from visionlora.commands import arguments
from visionlora.compose.methods import METHODS
from visionlora.vision.backbone import data_config

IMAGES = (2, 3, 64, 64)
DATA = {**data_config("test_vit"), "crop_mode": "center"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "base.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit", img_size=64, num_classes=3).state_dict(), path)
    return path


def written(folder: Path, base: Path, *, name: str = "default", record: Any = None, **config: Any) -> Path:
    """Write an adapter of the base; return its directory."""
    classes, data = ["a", "b", "c"], DATA
    model = timm.create_model("test_vit", img_size=64, num_classes=3, checkpoint_path=str(base))
    vl.apply_lora(model, vl.LoraConfig(**{"r": 2, "target_modules": ["fc1", "attn.qkv"], **config}), name=name)
    torch.manual_seed(sum(map(ord, folder.parent.name + folder.name)))
    stir(model, name)
    options = {"classes": classes, "data": data, **(record or {})}
    return vl.save_adapter(model, folder, name=name, **options)


@pytest.fixture
def two(tmp_path: Path, base: Path) -> tuple[Path, Path]:
    return written(tmp_path / "night" / "adapter", base), written(tmp_path / "rain" / "adapter", base, r=3)


def run(*words: object) -> int:
    return main(["combine", *map(str, words)])


def test_two_adapters_become_one(two: tuple[Path, Path], base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = two[0].parents[1] / "both"
    assert run(*two, "--weights", 0.7, 0.3, "--out", out, "--checkpoint", base) == 0
    shown = capsys.readouterr().out
    assert "combined = +0.7 night +0.3 rain by concat: 12 layers, relative error 0.00%" in shown
    assert "blocks.0.attn.qkv" in shown
    model = vl.load_model(out, checkpoint=base)
    assert model.class_names == ["a", "b", "c"]
    vl.load_adapter(model, two[0], name="night")
    vl.load_adapter(model, two[1], name="rain")
    layer = model.blocks[0].mlp.fc1
    wanted = sum(w * layer.adapters[n]["weight"].product() for n, w in (("night", 0.7), ("rain", 0.3)))
    assert_close(layer.adapters["combined"]["weight"].product(), wanted)
    assert layer.adapters["combined"]["weight"].rank == 5
    head = model.head.adapters
    assert_close(
        head["combined"]["weight"].value, 0.7 * head["night"]["weight"].value + 0.3 * head["rain"]["weight"].value
    )
    record = vl.read_adapter(out).record
    assert record["data"] == vl.read_adapter(two[0]).record["data"]
    assert record["base"] == vl.read_adapter(two[0]).record["base"]
    assert record["metrics"]["combination"] in shown


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_an_adapter_that_loads(method: str, two: tuple[Path, Path], base: Path) -> None:
    out = two[0].parents[1] / "both"
    rank = [] if method == "concat" else ["--rank", 2]
    assert run(*two, "--method", method, *rank, "--out", out, "--checkpoint", base, "--name", "mine") == 0
    file = vl.read_adapter(out)
    assert file.record["name"] == "mine"
    assert {entry["rank"] for entry in file.record["plan"]["layers"].values()} == {5 if method == "concat" else 2}
    assert (file.record["metrics"]["combination/error"] > 0.01) == (method != "concat")
    assert vl.load_model(out, checkpoint=base)(torch.zeros(IMAGES)).shape == (2, 3)


def test_the_help_names_every_method() -> None:
    parser = arguments.Parser(prog="visionlora combine", description="")
    arguments.combine(parser)
    shown = parser.format_help()
    assert all(name in shown or name.partition("_")[0] + "_*" in shown for name in METHODS)


def test_adapters_are_called_as_recorded_where_that_tells_them_apart(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [written(tmp_path / f"x{i}", base, name=name) for i, name in enumerate(("dusk", "dawn"))]
    assert run(*paths, "--out", tmp_path / "out", "--checkpoint", base, "--head", "dawn") == 0
    assert "+0.5 dusk +0.5 dawn" in capsys.readouterr().out
    key = "head/weight/value"
    assert torch.equal(vl.read_adapter(tmp_path / "out").tensors[key], vl.read_adapter(paths[1]).tensors[key])


def test_a_combination_can_be_combined_again(two: tuple[Path, Path], base: Path) -> None:
    out = two[0].parents[1] / "both"
    assert run(*two, "--out", out, "--checkpoint", base) == 0
    weights = ["--weights", 1, "-0.5", "0.25"]
    assert run(out, *two, *weights, "--out", out, "--checkpoint", base, "--force", "--method", "svd", "--rank", 5) == 0
    assert vl.read_adapter(out).record["metrics"]["combination"].startswith("combined = +1 both -0.5 night +0.25 rain")


def test_an_adapter_may_be_given_as_its_weights_file(two: tuple[Path, Path], base: Path) -> None:
    alone = two[0].parents[1] / "alone.safetensors"
    alone.write_bytes((two[0] / "adapter_model.safetensors").read_bytes())
    assert run(alone, two[1], "--out", two[0].parents[1] / "both", "--checkpoint", base) == 0


def test_an_existing_adapter_is_kept_unless_forced(
    two: tuple[Path, Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (two[1] / "adapter_model.safetensors").read_bytes()
    assert run(*two, "--out", two[1], "--checkpoint", base) == 2
    assert "--force" in capsys.readouterr().err
    assert (two[1] / "adapter_model.safetensors").read_bytes() == before
    assert run(*two, "--out", two[1], "--checkpoint", base, "--force") == 0
    assert (two[1] / "adapter_model.safetensors").read_bytes() != before


REFUSED: dict[str, tuple[list[object], str]] = {
    "weights of wrong count": (["--weights", 1], "2 adapters need 2 weights, --weights has 1"),
    "a weight that is no number": (["--weights", "nan", 1], "finite number"),
    "unknown method": (["--method", "tise"], 'did you mean "ties"'),
    "rank 0": (["--method", "svd", "--rank", 0], "at least 1"),
    "rank too large": (["--method", "svd", "--rank", 999], "more than any layer can have"),
    "density of nothing": (["--density", 0.5], "keeps every entry"),
    "density outside": (["--method", "ties", "--density", 0], "above 0"),
    "unknown head": (["--head", "rian"], 'did you mean "rain"'),
    "a bad name": (["--name", "a b"], "adapter name"),
    "an unknown option": (["--weigths", 1], 'did you mean "--weights"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_misuse_is_explained_and_writes_nothing(
    case: str, two: tuple[Path, Path], base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = REFUSED[case]
    out = two[0].parents[1] / "both"
    assert run(*two, "--out", out, "--checkpoint", base, *words) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_adapters_of_other_bases_are_refused(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.safetensors"
    torch.manual_seed(9)
    save_file(timm.create_model("test_vit", img_size=64, num_classes=3).state_dict(), other)
    paths = written(tmp_path / "night", base), written(tmp_path / "rain", other)
    assert run(*paths, "--out", tmp_path / "out", "--checkpoint", base) == 2
    assert "only adapters of one base" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("classes", "difference"),
    [(["c", "b", "a"], "another order"), (["a", "b", "d"], "not in both: c, d")],
)
def test_heads_of_other_classes_are_averaged_on_no_account(
    classes: list[str], difference: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = written(tmp_path / "night", base), written(tmp_path / "rain", base, record={"classes": classes})
    words = [*paths, "--out", tmp_path / "out", "--checkpoint", base]
    assert run(*words) == 2
    shown = capsys.readouterr().err
    assert difference in shown
    assert "--head rain" in shown
    assert run(*words, "--head", "rain") == 0
    assert vl.read_adapter(tmp_path / "out").record["classes"] == classes
    assert run(*words, "--head", "base", "--force") == 0
    assert vl.read_adapter(tmp_path / "out").record["classes"] is None


def test_a_head_of_more_classes_can_be_taken_over(tmp_path: Path, base: Path) -> None:
    night = written(tmp_path / "night", base)
    model = timm.create_model("test_vit", img_size=64, num_classes=3, checkpoint_path=str(base))
    model.reset_classifier(5)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["fc2"]))
    stir(model)
    rain = vl.save_adapter(model, tmp_path / "rain", classes=list("abcde"), data=DATA)
    assert run(night, rain, "--out", tmp_path / "out", "--checkpoint", base, "--head", "rain") == 0
    combined = vl.load_model(tmp_path / "out", checkpoint=base)
    assert combined.class_names == list("abcde")
    assert combined(torch.zeros(IMAGES)).shape == (2, 5)


def test_adapters_of_other_inputs_are_refused(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {**DATA, "mean": [0.1, 0.2, 0.3]}
    paths = written(tmp_path / "night", base), written(tmp_path / "rain", base, record={"data": data})
    assert run(*paths, "--out", tmp_path / "out", "--checkpoint", base) == 2
    assert "[0.1, 0.2, 0.3]" in capsys.readouterr().err


def test_a_missing_adapter_is_named(two: tuple[Path, Path], base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(two[0], two[0].parents[1] / "gone", "--out", two[0].parent / "out", "--checkpoint", base) == 2
    assert "gone" in capsys.readouterr().err
