"""One batch, one adapter a sample: every sample gets what it would get alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import timm
import torch
from layer_kinds import LAYERS, RANKS, config_of, stir
from torch import Tensor, nn

import visionlora as vl
from visionlora.core.attach import Materialised
from visionlora.errors import StateError

NAMES = ["a", None, "b", "a", "b"]
READ_OUTSIDE = ("attention_in", "attention_in_parts", "attention_out")
CASES = [("lora", kind) for kind in LAYERS if kind not in READ_OUTSIDE]
CASES += [(v, kind) for v in ("dora", "loha", "ia3") for kind in ("linear", "conv_3x3", "conv_grouped", "std_conv2d")]


def alone(model: nn.Module, x: Tensor, names: Sequence[str | None]) -> list[Tensor]:
    """Return what each sample gets when it is the only one: the slow truth."""
    found = []
    for name, sample in zip(names, x, strict=True):
        vl.deactivate(model) if name is None else vl.activate(model, name)
        found.append(model(sample[None])[0])
    return found


def together(model: nn.Module, x: Tensor, names: Sequence[str | None]) -> Tensor:
    with vl.route(model, names):
        return model(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("variant", "kind"), [case for case in CASES if case in RANKS])
def test_every_sample_gets_what_it_would_get_alone(variant: str, kind: str) -> None:
    row = LAYERS[kind]
    model = nn.Sequential(row.make()).double().eval()
    shape = (len(NAMES), *row.shape[1:])
    x = torch.randint(1, 20, shape) if row.tokens else torch.randn(shape, dtype=torch.float64)
    for name in "ab":
        vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind]), name=name)
        stir(model, name)
    with torch.no_grad():
        wanted = torch.stack(alone(model, x, NAMES))
        assert not torch.allclose(wanted[0], alone(model, x[:1], ["b"])[0])  # the two adapters differ
        torch.testing.assert_close(together(model, x, NAMES), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("norm", ["frozen", "stats-affine"])
@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet"])
def test_a_backbone_with_two_heads_biases_and_statistics(name: str, norm: str) -> None:
    model = timm.create_model(name, num_classes=5).double().eval()
    for adapter in "ab":
        vl.apply_lora(model, vl.LoraConfig(r=2, norm=norm, bias="all"), name=adapter)
        stir(model, adapter)
    x = torch.randn(len(NAMES), *model.pretrained_cfg["input_size"], dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack(alone(model, x, NAMES))
        torch.testing.assert_close(together(model, x, NAMES), wanted, rtol=1e-9, atol=1e-9)


def test_windows_of_one_sample_stay_with_it() -> None:
    swin = timm.models.swin_transformer.SwinTransformer
    model = swin(img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(2, 2), num_classes=3)
    model.double().eval()
    for adapter in "ab":
        vl.apply_lora(model, vl.LoraConfig(r=2), name=adapter)
        stir(model, adapter)
    x = torch.randn(len(NAMES), 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack(alone(model, x, NAMES))
        torch.testing.assert_close(together(model, x, NAMES), wanted, rtol=1e-9, atol=1e-9)


def two_cameras() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    for adapter in "ab":
        vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["0"]), name=adapter)
        stir(model, adapter)
    return model, torch.randn(len(NAMES), 8)


def test_the_base_is_there_bit_for_bit() -> None:
    model, x = two_cameras()
    with torch.no_grad(), vl.disabled(model):
        base = model(x)
    with torch.no_grad():
        assert torch.equal(together(model, x, NAMES)[1], base[1])


def test_heads_of_fewer_classes_are_filled_up(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3).eval()
    other = timm.create_model("test_vit", num_classes=5)
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k[:5] != "head."}, strict=False)
    vl.apply_lora(model, vl.LoraConfig(r=2), name="three")
    vl.apply_lora(other, vl.LoraConfig(r=2), name="five")
    stir(other, "five")
    vl.save_adapter(other, tmp_path, name="five")
    vl.load_adapter(model, tmp_path, name="five", allow_other_classes=True)
    size = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        y = together(model, x, ["three", "five"])
        torch.testing.assert_close(y[0, :3], alone(model, x[:1], ["three"])[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y[1], alone(model, x[1:], ["five"])[0], rtol=1e-4, atol=1e-4)
    assert y.shape == (2, 5)
    assert (y[0, 3:] == float("-inf")).all()


def test_everything_is_as_it_was_afterwards() -> None:
    model, x = two_cameras()
    vl.activate(model, "b", 0.5)
    before, state = model(x), {k: v.clone() for k, v in model.state_dict().items()}
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ZeroDivisionError), vl.route(model, NAMES):
        _ = 1 / 0
    together(model, x, NAMES)
    assert vl.active_adapters(model) == {"b": 0.5}
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), before)
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "c", "b", "a", "b"], "no adapter 'c'"),
        (["a", "b"], "2 adapters are named, one a sample"),
        ([], "expected a list"),
        ("a", "expected a list"),
    ],
)
def test_names_that_cannot_be_are_refused(names: list[str | None], message: str) -> None:
    model, x = two_cameras()
    with pytest.raises(StateError, match=message):
        together(model, x, names)
    assert torch.equal(model(x), model(x))
    vl.activate(model, "a")


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", None, "a"]])
def test_a_batch_of_another_size_is_refused_at_the_door(names: list[str | None]) -> None:
    model, x = two_cameras()
    batch = x.repeat(2, 1)[:6]
    with torch.no_grad(), vl.route(model, names), pytest.raises(StateError, match=f"{len(names)} adapters are named"):
        model(batch)
    model(batch)


def test_nothing_changes_inside() -> None:
    model, _ = two_cameras()
    with vl.route(model, NAMES):
        for verb in (lambda: vl.activate(model, "a"), lambda: vl.merge(model), lambda: vl.remove(model, "a")):
            with pytest.raises(StateError, match="being routed"):
                verb()


@pytest.mark.parametrize("kind", READ_OUTSIDE)
def test_a_weight_that_its_owner_reads_is_refused(kind: str) -> None:
    model = nn.Sequential(LAYERS[kind].make()).eval()
    for name in "ab":
        vl.apply_lora(model, config_of("lora", kind, r=1), name=name)
    assert LAYERS[kind].way is Materialised
    with torch.no_grad(), vl.route(model, ["a", "b"]), pytest.raises(StateError, match="cannot be routed"):
        model(torch.randn(LAYERS[kind].shape))
