"""`visionlora convert`: from one library's files to another's, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from io_toy import adapted, images, timm_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visionlora.cli import main
from visionlora.commands import convert
from visionlora.io import load_adapter, read_adapter, save_adapter
from visionlora.io.formats import difference
from visionlora.io.read import MIRROR, PEFT_CONFIG, WEIGHTS
from visionlora.registry import adapter_names
from visionlora.vision.loading import load_model

BASE = "base.safetensors"


def vit() -> nn.Module:
    return timm_model("test_vit")


def start(folder: Path, make: Any = vit, **config: Any) -> nn.Module:
    """Write the base and an adapter of it, `ours`, to a folder; return the adapted model."""
    save_file(make().state_dict(), folder / BASE)
    model = adapted(make(), **config)
    save_adapter(model, folder / "ours", classes=list("abcd"))
    return model


def run(folder: Path, source: str, out: str, *words: str) -> int:
    return main(["convert", str(folder / source), str(folder / out), "--checkpoint", str(folder / BASE), *words])


def lost(model: nn.Module, folder: Path) -> float:
    again = vit()
    return difference(model, "default", again, load_adapter(again, folder))[0]


PLANS: dict[str, dict[str, Any]] = {
    "the default": {},
    "rank-stabilised": {"use_rslora": True, "r": 3},
    "dora": {"variant": "dora"},
    "parts": {"target_modules": ["attn.qkv[q,v]"]},
    "normalisation": {"norm": "affine"},
    "loha": {"variant": "loha"},
}


@pytest.mark.parametrize("to", ["peft", "kohya"])
@pytest.mark.parametrize("plan", PLANS)
def test_there_and_back_is_the_same_change(plan: str, to: str, tmp_path: Path) -> None:
    model = start(tmp_path, **PLANS[plan])
    other = "other.safetensors" if to == "kohya" else "other"
    assert run(tmp_path, "ours", other, "--to", to) == 0
    assert run(tmp_path, other, "back", "--to", "visionlora", "--model", "test_vit") == 0
    error = lost(model, tmp_path / "back")
    # factors keep every number; a head or a norm is stored as a difference there, LoHa in PEFT is decomposed
    assert error <= (1e-6 if to == "kohya" or plan == "loha" else 0)


def test_a_round_trip_of_factors_alone_is_exact(tmp_path: Path) -> None:
    model = start(tmp_path, norm="frozen", bias="none", modules_to_save="none", use_rslora=True, r=3)
    assert run(tmp_path, "ours", "a.safetensors", "--to", "kohya") == 0
    assert run(tmp_path, "a.safetensors", "peft", "--to", "peft", "--model", "test_vit") == 0
    assert run(tmp_path, "peft", "back", "--to", "visionlora", "--model", "test_vit") == 0
    assert lost(model, tmp_path / "back") < 1e-15


def test_what_was_converted_is_loaded_by_name_alone(tmp_path: Path) -> None:
    model = start(tmp_path)
    run(tmp_path, "ours", "peft", "--to", "peft")
    run(tmp_path, "peft", "back", "--to", "visionlora", "--model", "test_vit", "--name", "night")
    with torch.no_grad():
        y = load_model(tmp_path / "back", checkpoint=tmp_path / BASE)(images())
        assert torch.allclose(y, model.eval()(images()), atol=1e-5)
    record = read_adapter(tmp_path / "back").record
    assert record["name"] == "night"
    assert record["base"]["fingerprint"] == read_adapter(tmp_path / "ours").record["base"]["fingerprint"]
    assert record["data"]["input_size"] == [3, 160, 160]


def test_peft_reads_what_was_converted(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = start(tmp_path, target_modules=["attn.qkv[q,v]"], norm="affine")
    assert run(tmp_path, "ours", "peft", "--to", "peft") == 0
    with torch.no_grad():
        y = peft.PeftModel.from_pretrained(vit(), tmp_path / "peft").eval()(images())
        assert torch.allclose(y, model.eval()(images()), atol=1e-5)
    assert sorted(p.name for p in (tmp_path / "peft").iterdir()) == [PEFT_CONFIG, WEIGHTS]


def test_a_prefix_is_written_and_asked_for(tmp_path: Path) -> None:
    model = start(tmp_path)
    assert run(tmp_path, "ours", "a.safetensors", "--to", "kohya", "--prefix", "my_unet") == 0
    assert all(key.startswith("my_unet_") for key in load_file(tmp_path / "a.safetensors"))
    back = ("a.safetensors", "back", "--to", "visionlora", "--model", "test_vit")
    assert run(tmp_path, *back) == 2
    assert not (tmp_path / "back").exists()
    assert run(tmp_path, *back, "--prefix", "my_unet") == 0
    assert lost(model, tmp_path / "back") < 1e-6


def test_a_loralib_file_needs_its_alpha(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path)
    name, generator = "blocks.0.mlp.fc1", torch.Generator().manual_seed(0)
    rows, columns = vit().get_submodule(name).weight.shape
    A, B = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
    torch.save({f"{name}.lora_A": A, f"{name}.lora_B": B}, tmp_path / "a.pt")
    words = ("a.pt", "out", "--to", "visionlora", "--model", "test_vit")
    assert run(tmp_path, *words) == 2
    assert "--alpha" in capsys.readouterr().err
    assert run(tmp_path, *words, "--alpha", "6") == 0
    model = vit()
    load_adapter(model, tmp_path / "out")
    weight = vit().get_submodule(name).weight
    delta = model.get_submodule(name).adapters["default"]["weight"]
    assert torch.allclose(delta.change(weight), 3 * B @ A, atol=1e-5)


def test_an_approximation_tells_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make = lambda: timm_model("test_resnet")  # noqa: E731
    start(tmp_path, make, variant="spatial", target_modules=["layer1.0.conv2"], norm="frozen", r=4)
    assert run(tmp_path, "ours", "peft", "--to", "peft") == 2
    assert "--approximate RANK" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()
    shares = []
    for rank in (2, 8):
        assert run(tmp_path, "ours", f"peft{rank}", "--to", "peft", "--approximate", str(rank)) == 0
        row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("layer1.0.conv2"))
        assert row.split()[1] == str(rank)
        shares.append(float(row.split()[2].rstrip("%")))
        assert json.loads((tmp_path / f"peft{rank}" / PEFT_CONFIG).read_text())["r"] == rank
    assert 0 < shares[1] < shares[0] < 100


def test_an_approximate_reading_tells_what_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path)
    name, weight = "lycoris_blocks_0_mlp_fc1", vit().get_submodule("blocks.0.mlp.fc1").weight.detach()
    generator = torch.Generator().manual_seed(0)
    factors = {"lora_down.weight": (2, weight.shape[1]), "lora_up.weight": (len(weight), 2)}
    tensors = {f"{name}.{leaf}": torch.randn(shape, generator=generator) for leaf, shape in factors.items()}
    # along the inputs, as the first versions of LyCORIS measured it: no variant of ours
    scale = 1.5 * weight.norm(dim=0, keepdim=True)
    save_file({**tensors, f"{name}.dora_scale": scale.contiguous()}, tmp_path / "a.safetensors")
    words = ("a.safetensors", "out", "--to", "visionlora", "--model", "test_vit")
    assert run(tmp_path, *words) == 2
    capsys.readouterr()
    assert run(tmp_path, *words, "--approximate", "8") == 0
    shown = capsys.readouterr().out
    share = float(
        next(line for line in shown.splitlines() if line.startswith("blocks.0.mlp.fc1")).split()[2].rstrip("%")
    )
    assert 1 < share < 100
    assert float(shown.split()[-1]) == pytest.approx(share / 100, rel=0.1)


def spoiled(folder: Path) -> None:
    """Leave a kohya file of which one layer does not fit."""
    start(folder)
    run(folder, "ours", "a.safetensors", "--to", "kohya")
    tensors = load_file(folder / "a.safetensors")
    save_file({**tensors, "lycoris_blocks_0_mlp_fc1.lora_up.weight": torch.ones(3, 2)}, folder / "a.safetensors")


MISUSES: list[tuple[tuple[str, ...], str]] = [
    (("ours", "out", "--to", "visionlora"), "already"),
    (("ours", "out", "--to", "kohya"), "ends in .safetensors"),
    (("ours", "base.safetensors", "--to", "kohya"), "--force"),
    (("ours", "base.safetensors", "--to", "peft"), "is a file"),
    (("ours", "ours", "--to", "peft", "--force"), "one of our adapters"),
    (("ours", "out", "--to", "peft", "--approximate", "0"), "at least 1"),
    (("a.safetensors", "out", "--to", "visionlora"), "--model"),
    (("a.safetensors", "out", "--to", "visionlora", "--model", "test_vit"), "shape"),
    (("a.safetensors", "out", "--to", "visionlora", "--model", "test_vit", "--name", "a b"), "a b"),
    (("a.safetensors", "out", "--to", "visionlora", "--model", "test_vi"), "test_vit"),
    (("a.safetensors", "out", "--to", "visionlora", "--model", "test_vit", "--from", "peft"), PEFT_CONFIG),
    (("nothing", "out", "--to", "peft"), "nothing there"),
    (("base.safetensors", "out", "--to", "visionlora", "--model", "test_vit"), "neither ours"),
    (("ours", "out", "--to", "diffusers"), "invalid choice"),
    (("ours", "out"), "--to"),
]


def test_misuse_is_one_message_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoiled(tmp_path)
    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    for words, message in MISUSES:
        assert run(tmp_path, *words) == 2, words
        shown = capsys.readouterr().err
        assert message in shown, words
        assert len(shown.splitlines()) <= 2, words
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before, words


def test_a_broken_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    start(tmp_path)

    def other(model: nn.Module, name: str, again: nn.Module, again_name: str) -> tuple[float, dict[str, float]]:
        with torch.no_grad():
            next(p for n, p in again.named_parameters() if n.endswith(".B")).add_(1)
        return difference(model, name, again, again_name)

    monkeypatch.setattr(convert, "difference", other)
    assert run(tmp_path, "ours", "peft", "--to", "peft") == 2
    assert "was not written" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [BASE, "ours"]


def test_force_replaces_an_adapter_and_nothing_beside_it(tmp_path: Path) -> None:
    start(tmp_path)
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "notes.txt").write_text("mine")
    (tmp_path / "peft" / PEFT_CONFIG).write_text("{}")
    assert run(tmp_path, "ours", "peft", "--to", "peft") == 2
    assert run(tmp_path, "ours", "peft", "--to", "peft", "--force") == 0
    assert (tmp_path / "peft" / "notes.txt").read_text() == "mine"
    assert json.loads((tmp_path / "peft" / PEFT_CONFIG).read_text())["peft_type"] == "LORA"
    assert run(tmp_path, "peft", "back", "--to", "visionlora", "--model", "test_vit") == 0
    weights = (tmp_path / "back" / WEIGHTS).read_bytes()
    (tmp_path / "back" / WEIGHTS).write_bytes(b"")
    (tmp_path / "back" / "README.md").write_text("my own card")
    assert run(tmp_path, "peft", "back", "--to", "visionlora", "--model", "test_vit", "--force") == 0
    assert len((tmp_path / "back" / WEIGHTS).read_bytes()) == len(weights)
    assert read_adapter(tmp_path / "back").notices == ()
    assert (tmp_path / "back" / MIRROR).exists()
    assert (tmp_path / "back" / "README.md").read_text() == "my own card"


def test_the_adapter_of_another_base_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start(tmp_path)
    save_file(timm_model("test_vit", seed=1).state_dict(), tmp_path / BASE)
    assert run(tmp_path, "ours", "peft", "--to", "peft") == 2
    assert "trained on" in capsys.readouterr().err
    assert not (tmp_path / "peft").exists()


def test_a_base_of_another_size_is_built(tmp_path: Path) -> None:
    make = lambda: timm_model("test_vit", img_size=64)  # noqa: E731
    model = start(tmp_path, make)
    assert run(tmp_path, "ours", "peft", "--to", "peft") == 0
    assert run(tmp_path, "peft", "back", "--to", "visionlora", "--model", "test_vit", "--img_size", "64") == 0
    assert read_adapter(tmp_path / "back").record["data"]["input_size"] == [3, 64, 64]
    again = make()
    assert adapter_names(again) == []
    with torch.no_grad():
        y: Tensor = load_model(tmp_path / "back", checkpoint=tmp_path / BASE)(images())
        assert torch.allclose(y, model.eval()(images()), atol=1e-5)
