"""What is saved is what is loaded: every tensor, every output, in this process and in a fresh one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from io_toy import MODELS, adapted, images, look, net, record_of, saved, timm_model
from torch import nn

import visionlora as vl
from visionlora.errors import BaseMismatchError, ConfigError, StateError
from visionlora.io import load_adapter, read_adapter, save_adapter
from visionlora.io.read import CARD, MIRROR, PEFT_CONFIG, WEIGHTS
from visionlora.registry import adapter_plan, adapter_state


@pytest.mark.parametrize("variant", ["lora", "dora", "fa"])
@pytest.mark.parametrize("case", MODELS)
def test_round_trip_is_exact(case: str, variant: str, tmp_path: Path) -> None:
    make, config = MODELS[case]
    model, x = make(), images()
    with torch.no_grad():
        base = model(x)
        y = adapted(model, name="cam12", variant=variant, **config)(x)
        mixed = vl.activate(model, "cam12", strength=0.8)(x)
    assert (y - base).abs().max() > 1e-3
    save_adapter(model, tmp_path, name="cam12", classes=None)
    fresh = make()
    assert load_adapter(fresh, tmp_path) == "cam12"
    state, again = adapter_state(model, "cam12"), adapter_state(fresh, "cam12")
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) and state[key].dtype == again[key].dtype for key in state)
    with torch.no_grad():
        assert torch.equal(fresh(x), y)
        assert torch.equal(vl.activate(fresh, "cam12", strength=0.8)(x), mixed)
        assert torch.equal(vl.remove(fresh)(x), base)


def test_saving_a_loaded_adapter_gives_the_same_tensors_and_plan(tmp_path: Path) -> None:
    saved(tmp_path / "a", norm="stats-affine")
    model = net()
    load_adapter(model, tmp_path / "a")
    save_adapter(model, tmp_path / "b")
    first, second = record_of(tmp_path / "a"), record_of(tmp_path / "b")
    assert {**first, "created": 0} == {**second, "created": 0}


def test_the_weights_file_alone_is_enough(tmp_path: Path) -> None:
    model = adapted(net(), target_modules=["hidden"])
    save_adapter(model, tmp_path / "full")
    alone = tmp_path / "any_name.safetensors"
    (tmp_path / "full" / WEIGHTS).rename(alone)
    fresh = net()
    load_adapter(fresh, alone)
    assert torch.equal(fresh(images()), model(images()))


def test_the_record_says_what_people_need(tmp_path: Path) -> None:
    model = adapted(timm_model("test_vit", img_size=64), name="cam12", lora_alpha=6.0)
    data = {"input_size": (3, 64, 64), "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "crop_pct": 1}
    metrics = {"val/accuracy": torch.tensor(0.5), "val/loss": float("nan")}
    save_adapter(model, tmp_path, name="cam12", classes=["bus", "car", "người", "a|b"], data=data, metrics=metrics)
    record = read_adapter(tmp_path).record
    assert record["base"]["name"] == "test_vit"
    assert record["base"]["args"] == {"num_classes": 4, "img_size": [64, 64]}
    assert record["base"]["fingerprint"] == vl.fingerprint(timm_model("test_vit", img_size=64))
    assert record["data"]["mean"] == [0.5, 0.5, 0.5]
    assert record["metrics"] == {"val/accuracy": 0.5, "val/loss": None}
    assert record["plan"]["layers"]["blocks.0.attn.qkv"]["scale"] == 3.0
    mirror = json.loads((tmp_path / MIRROR).read_text())
    assert mirror.pop("peft")["reasons"] == []
    assert mirror == record
    card = (tmp_path / CARD).read_text()
    assert all(word in card for word in ("cam12", "test_vit", "`người`", "a\\|b", "3x64x64", "val/accuracy"))


def test_a_card_written_by_hand_is_kept(tmp_path: Path) -> None:
    (tmp_path / CARD).write_text("my own words")
    saved(tmp_path)
    assert (tmp_path / CARD).read_text() == "my own words"


def test_the_first_adapter_is_active_the_second_waits(tmp_path: Path) -> None:
    saved(tmp_path)
    model = net()
    load_adapter(model, tmp_path, name="a")
    load_adapter(model, tmp_path, name="b")
    assert vl.active_adapters(model) == {"a": 1.0}


def test_loading_keeps_mode_and_random_numbers(tmp_path: Path) -> None:
    saved(tmp_path)
    model = net()
    model.train()
    model.hidden.eval()
    before = look(model)
    load_adapter(model, tmp_path)
    after = look(model)
    assert {name: after["training"][name] for name in before["training"] if name != "bn"} == {
        name: mode for name, mode in before["training"].items() if name != "bn"
    }
    assert torch.equal(after["random"], before["random"])
    assert not any(after["grads"].values())


def test_a_loaded_adapter_can_be_trained_on(tmp_path: Path) -> None:
    saved(tmp_path)
    model = net()
    load_adapter(model, tmp_path, trainable=True)
    model(images()).sum().backward()
    vl.check_gradients(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_round_trip_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(net().to(dtype), target_modules=["hidden", "stem"], norm="stats-affine", variant="dora")
    save_adapter(model, tmp_path)
    fresh = net().to(dtype)
    load_adapter(fresh, tmp_path)
    state, again = adapter_state(model, "default"), adapter_state(fresh, "default")
    assert all(torch.equal(state[key], again[key]) and state[key].dtype == again[key].dtype for key in state)
    assert torch.equal(fresh(images().to(dtype)), model(images().to(dtype)))


class WideHead(nn.Module):
    """A head too large for its start to be stored."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(300, 300)
        torch.manual_seed(seed)
        self.fc = nn.Linear(300, 300)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.hidden(x))


def test_strength_is_refused_where_the_start_of_the_head_is_lost(tmp_path: Path) -> None:
    x = torch.randn(2, 300)
    model = adapted(WideHead(1), target_modules=["hidden"])
    y, mixed = model(x), vl.activate(model, "default", strength=0.5)(x)
    save_adapter(model, tmp_path / "a")
    same, other = WideHead(1), WideHead(2)
    load_adapter(same, tmp_path / "a")
    load_adapter(other, tmp_path / "a")
    assert torch.equal(other(x), y)
    assert torch.equal(vl.activate(same, "default", strength=0.5)(x), mixed)
    with pytest.raises(StateError, match="another head"):
        vl.activate(other, "default", strength=0.5)(x)
    save_adapter(other, tmp_path / "b")  # the head of `other` must not pass for the start now
    third = WideHead(2)
    load_adapter(third, tmp_path / "b")
    with pytest.raises(StateError, match="another head"):
        vl.activate(third, "default", strength=0.5)(x)


def test_without_head_the_model_keeps_its_own(tmp_path: Path) -> None:
    saved(tmp_path, norm="stats-affine")
    model = net(classes=7)
    head = model.fc.weight.clone()
    load_adapter(model, tmp_path, with_head=False)
    assert model(images()).shape == (2, 7)
    assert torch.equal(model.fc.weight, head)
    assert "fc" not in adapter_plan(model, "default").values


def test_other_classes_load_when_asked_for(tmp_path: Path) -> None:
    model = adapted(net(), target_modules=["hidden"])
    save_adapter(model, tmp_path)
    other = net(classes=7)
    with pytest.raises(BaseMismatchError, match="7"):
        load_adapter(other, tmp_path)
    load_adapter(other, tmp_path, allow_other_classes=True)
    assert torch.equal(other(images()), model(images()))
    with vl.disabled(other):
        assert other(images()).shape == (2, 7)


def test_what_peft_cannot_express_removes_its_old_mirror(tmp_path: Path) -> None:
    saved(tmp_path)
    assert (tmp_path / PEFT_CONFIG).exists()
    saved(tmp_path, norm="stats", bias="none", target_modules=["mix"])
    assert not (tmp_path / PEFT_CONFIG).exists()
    reasons = json.loads((tmp_path / MIRROR).read_text())["peft"]["reasons"]
    assert "norm" in reasons[0]
    assert "2 groups" in reasons[1]
    assert read_adapter(tmp_path).notices == ()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("classes", ["a", "b"], "2 names for 3 outputs"),
        ("classes", ["a", "b", "c\n"], "printable"),
        ("base", {"name": "hf-hub:someone/else"}, "word"),
        ("base", {"name": "test_vit", "args": {"checkpoint_path": "x"}}, "only sizes a model"),
        ("base", {"name": "test_vit", "args": {"norm_layer": "../x"}}, "a number, a word"),
        ("base", {"nmae": "test_vit"}, "nmae"),
        ("data", {"input_size": [3, 0, 0]}, "input_size|missing"),
    ],
)
def test_what_no_reader_would_take_is_not_written(field: str, value: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        save_adapter(adapted(net(), target_modules=["hidden"]), tmp_path / "a", **{field: value})  # type: ignore[arg-type]
    assert not (tmp_path / "a").exists()


def test_saving_an_unknown_name_says_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="cam12"):
        save_adapter(adapted(net(), name="cam12", target_modules=["hidden"]), tmp_path, name="cam13")


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_output(tmp_path: Path) -> None:
    model = adapted(timm_model("test_vit", img_size=64), variant="dora")
    save_adapter(model, tmp_path)
    with torch.no_grad():
        torch.save(model(images()), tmp_path / "y.pt")
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[2]); from io_toy import images, timm_model\n"
        "import visionlora as vl; torch.set_num_threads(1); model = timm_model('test_vit', img_size=64)\n"
        "vl.load_adapter(model, sys.argv[1])\n"
        "with torch.no_grad(): assert torch.equal(model(images()), torch.load(sys.argv[1] + '/y.pt'))"
    )
    torch.set_num_threads(1)
    command = [sys.executable, "-c", code, str(tmp_path), str(Path(__file__).parent)]
    subprocess.run(command, check=True, timeout=200)
