"""A file of loralib gives the same outputs here as in loralib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from io_toy import timm_model
from torch import Tensor, nn

from visionlora.errors import AdapterFileError, ConfigError
from visionlora.io import load_adapter, save_adapter
from visionlora.io.formats import put_on, read_loralib
from visionlora.registry import adapter_plan

loralib = pytest.importorskip("loralib")


class Net(nn.Module):
    """Every layer that loralib knows, from torch or, with `lora`, from loralib."""

    def __init__(self, *, lora: bool = False, r: int = 2, enable: tuple[bool, ...] = (True, False, True)) -> None:
        super().__init__()
        torch.manual_seed(0)
        own = {"r": r, "lora_alpha": 6, "merge_weights": False}
        self.table = loralib.Embedding(20, 12, **own) if lora else nn.Embedding(20, 12)
        self.qkv = loralib.MergedLinear(12, 36, enable_lora=list(enable), **own) if lora else nn.Linear(12, 36)
        self.proj = loralib.Linear(36, 16, **own) if lora else nn.Linear(36, 16)
        self.conv = loralib.Conv2d(16, 24, 3, padding=1, **own) if lora else nn.Conv2d(16, 24, 3, padding=1)
        self.mix = loralib.Conv2d(24, 8, 3, groups=2, **own) if lora else nn.Conv2d(24, 8, 3, groups=2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.proj(self.qkv(self.table(ids)))  # (batch, 16, 16): as a picture of 4 x 4
        return self.mix(self.conv(x.mT.reshape(-1, 16, 4, 4)).relu())


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randint(20, (2, 16), generator=torch.Generator().manual_seed(1)))


def trained(path: Path, bias: str = "none", **config: Any) -> Tensor:
    """Save an adapter of loralib on the weights of Net() whose every tensor differs from its start."""
    model, generator = Net(lora=True, **config), torch.Generator().manual_seed(2)
    base = {key.replace(".weight", ".conv.weight"): t for key, t in Net().state_dict().items()}
    base |= {key.replace(".bias", ".conv.bias"): t for key, t in Net().state_dict().items()} | Net().state_dict()
    model.load_state_dict({key: t for key, t in base.items() if key in model.state_dict()}, strict=False)
    loralib.mark_only_lora_as_trainable(model, bias)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    torch.save(loralib.lora_state_dict(model, bias), path)
    return outputs(model)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("r", [1, 2])
def test_we_compute_what_loralib_trained(r: int, bias: str, tmp_path: Path) -> None:
    y, model = trained(tmp_path / "a.pt", bias, r=r), Net()
    assert (outputs(model) - y).abs().max() > 1e-2
    put_on(model, read_loralib(model, tmp_path / "a.pt", alpha=6, parts=("q", "v")))
    assert torch.allclose(outputs(model), y, atol=1e-5, rtol=1e-5)
    save_adapter(model, tmp_path / "ours")
    again = Net()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(outputs(again), outputs(model))


def test_all_parts_of_a_fused_layer_need_no_names(tmp_path: Path) -> None:
    y, model = trained(tmp_path / "a.pt", enable=(True, True, True)), Net()
    put_on(model, read_loralib(model, tmp_path / "a.pt", alpha=6))
    assert torch.allclose(outputs(model), y, atol=1e-5, rtol=1e-5)


def test_some_parts_of_a_fused_layer_must_be_named(tmp_path: Path) -> None:
    trained(tmp_path / "a.pt")
    for parts in ((), ("q",), ("q", "z"), ("q", "k", "v")):
        with pytest.raises(ConfigError, match="--parts"):
            read_loralib(Net(), tmp_path / "a.pt", alpha=6, parts=parts)


def test_a_convolution_keeps_its_numbers_where_rank_allows(tmp_path: Path) -> None:
    trained(tmp_path / "a.pt", r=1)
    model = Net()
    put_on(model, read_loralib(model, tmp_path / "a.pt", alpha=6, parts=("q", "v")))
    ranks = {site.name: site.rank for site in adapter_plan(model, "default").sites}
    assert ranks == {"table": 1, "qkv": 1, "proj": 1, "conv": 9, "mix": 4}  # 1 * 3 * 3, and the most 4 rows have


def test_the_alpha_of_the_user_is_the_strength(tmp_path: Path) -> None:
    trained(tmp_path / "a.pt")
    model = Net()
    put_on(model, read_loralib(model, tmp_path / "a.pt", alpha=5, parts=("q", "v")))
    assert {site.scale for site in adapter_plan(model, "default").sites if site.name != "mix"} == {2.5}


def test_tensors_inside_a_training_checkpoint_are_found(tmp_path: Path) -> None:
    y, model = trained(tmp_path / "a.pt"), Net()
    inner = {f"module.{key}": t for key, t in torch.load(tmp_path / "a.pt", weights_only=True).items()}
    torch.save({"model_state_dict": inner, "step": 3}, tmp_path / "b.pt")
    put_on(model, read_loralib(model, tmp_path / "b.pt", alpha=6, parts=("q", "v")))
    assert torch.allclose(outputs(model), y, atol=1e-5, rtol=1e-5)


def without(tensors: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {k: t for k, t in tensors.items() if k != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: without(t, "proj.lora_B"), "lora_A and lora_B"),
        (lambda t: {**t, "proj.weight": torch.ones(16, 36)}, "lora_state_dict"),
        (lambda t: {**t, "porj.lora_A": torch.ones(2, 36), "porj.lora_B": torch.ones(16, 2)}, "proj"),
        (lambda t: {**t, "proj.lora_A": torch.ones(2, 35)}, "36 inputs"),
        (lambda t: {**t, "conv.lora_A": torch.ones(5, 48)}, "conv"),
        (lambda t: {**t, "proj.lora_A": torch.full((2, 36), torch.nan)}, "NaN"),
        (lambda t: {**t, "proj.bias": torch.ones(3)}, "shape"),
        (lambda t: {**t, "norm.bias": torch.ones(3)}, "lora_state_dict"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(change: Any, words: str, tmp_path: Path) -> None:
    trained(tmp_path / "a.pt")
    torch.save(change(torch.load(tmp_path / "a.pt", weights_only=True)), tmp_path / "a.pt")
    model = Net()
    with pytest.raises(AdapterFileError, match=words):
        put_on(model, read_loralib(model, tmp_path / "a.pt", alpha=6, parts=("q", "v")))
    assert not hasattr(model, "_visionlora")


def test_a_transposed_layer_of_transformers_is_adapted_too(tmp_path: Path) -> None:
    utils = pytest.importorskip("transformers.pytorch_utils")
    ours = nn.Sequential(utils.Conv1D(36, 12))
    own = {"r": 2, "lora_alpha": 6, "enable_lora": [True, False, True], "merge_weights": False}
    theirs = loralib.MergedLinear(12, 36, fan_in_fan_out=True, **own)
    theirs.weight.data, theirs.bias.data = ours[0].weight.data, ours[0].bias.data
    nn.init.normal_(theirs.lora_B)
    torch.save({f"0.{key}": t for key, t in loralib.lora_state_dict(theirs).items()}, tmp_path / "a.pt")
    put_on(ours, read_loralib(ours, tmp_path / "a.pt", alpha=6, parts=("q", "v")))
    x = torch.randn(5, 12)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def test_a_timm_model_is_adapted_too(tmp_path: Path) -> None:
    model = timm_model("test_vit", img_size=64)
    name, rows = "blocks.0.attn.qkv", model.blocks[0].attn.qkv.out_features
    B = torch.randn(rows // 3 * 2, 2)
    torch.save({f"{name}.lora_A": torch.randn(4, rows // 3), f"{name}.lora_B": B}, tmp_path / "a.pt")
    put_on(model, read_loralib(model, tmp_path / "a.pt", alpha=4, parts=("q", "v")))
    third = rows // 3
    assert adapter_plan(model, "default").sites[0].parts == {"q": (0, third), "v": (2 * third, rows)}
