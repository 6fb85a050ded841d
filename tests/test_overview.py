"""The table of what an adapter changes."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from visionlora.adapt import apply_lora, deactivate
from visionlora.config import LoraConfig
from visionlora.errors import StateError
from visionlora.merging import base_state_dict
from visionlora.overview import readable_size, summary
from visionlora.registry import adapter_state


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def test_a_row_counts_the_change_and_its_share_of_the_layer(net: nn.Module) -> None:
    apply_lora(net, LoraConfig(r=2, lora_alpha=4, target_modules=["0"]), name="cam")
    (row,) = summary(net).rows
    assert (row.layer, row.kind, row.how, row.rank, row.scale) == ("0", "Linear", "branched", 2, 2.0)
    assert row.parameters == 2 * 8 + 16 * 2
    assert row.share == pytest.approx(48 / 128)


def test_totals_agree_with_the_tensors_and_the_base() -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    base = sum(p.numel() for p in model.parameters())
    apply_lora(model, LoraConfig(r=2, norm="stats-affine", bias="none"))
    found, state = summary(model), adapter_state(model, "default")
    starts = sum(t.numel() for key, t in state.items() if key.endswith("/start"))
    assert found.parameters == sum(t.numel() for t in state.values()) - starts
    assert found.base == base
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.size == sum(t.numel() * t.element_size() for t in state.values())
    assert set(found.full) == {"head", "norm"}
    assert found.share == pytest.approx(found.parameters / base)


def test_fused_parts_are_named() -> None:
    model = apply_lora(timm.create_model("test_vit", num_classes=3), LoraConfig(r=2, target_modules=["attn.qkv[q,v]"]))
    assert all(row.layer.endswith("attn.qkv[q,v]") for row in summary(model).rows)


def test_layers_that_read_their_weight_are_materialised() -> None:
    model = apply_lora(nn.TransformerEncoderLayer(8, 2, 16), LoraConfig(r=2, target_modules=["linear1"]))
    assert summary(model).rows[0].how == "materialised"


def test_every_skipped_layer_has_a_reason() -> None:
    model = timm.create_model("test_vit", num_classes=3)
    apply_lora(model, LoraConfig(r=2, target_modules=["attn.qkv"], modules_to_save="none"))
    skipped = summary(model).skipped
    assert skipped["head"] == "classifier head"
    assert "target_modules=['attn.qkv']" in skipped["blocks.0.attn.proj"]
    assert not [name for name in skipped if name.endswith("qkv")]


def test_the_printed_table_names_layers_totals_and_reasons(net: nn.Module) -> None:
    text = str(summary(apply_lora(net, LoraConfig(r=2, target_modules=["0"], bias="none"), name="cam")))
    assert text.splitlines()[0].split() == ["layer", "class", "how", "rank", "scale", "parameters", "of", "layer"]
    assert "adapter cam: 1 layers, 48 parameters (48 trainable)" in text
    assert "left alone: not meant by target_modules=['0']: 2" in text


def test_without_a_name_the_active_adapter_is_meant(net: nn.Module) -> None:
    apply_lora(net, LoraConfig(r=2, target_modules=["0"]), name="day")
    apply_lora(net, LoraConfig(r=1, target_modules=["0"]), name="night")
    assert summary(net).name == "night"
    assert summary(net, "day").rows[0].rank == 2
    deactivate(net)
    with pytest.raises(StateError, match=r"2 adapters.*day, night"):
        summary(net)


def test_summary_leaves_the_model_as_it_was(net: nn.Module) -> None:
    apply_lora(net, LoraConfig(r=2, target_modules=["0"]))
    before = {k: v.clone() for k, v in base_state_dict(net).items()}
    str(summary(net))
    assert all(torch.equal(v, before[k]) for k, v in base_state_dict(net).items())


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2_500_000, "2.5 MB"), (3e9, "3.0 GB")]
)
def test_sizes_read_as_people_write_them(size: float, text: str) -> None:
    assert readable_size(size) == text
