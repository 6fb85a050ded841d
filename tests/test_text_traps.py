"""What goes wrong with language models elsewhere: renamed layers, stacks of experts, layers that read weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from text_toy import pretrained
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, ViTConfig, ViTForImageClassification

import visionlora as vl
from visionlora import LoraConfig
from visionlora.core.orders import forced
from visionlora.errors import BaseMismatchError
from visionlora.targets import select
from visionlora.text import load_older_adapter

_WIDE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**_WIDE, image_size=32, patch_size=16, num_labels=3)).eval()


def older_adapter(folder: Path, layer: str = "vit.encoder.layer.{i}.attention.attention.{n}") -> dict[str, Tensor]:
    """Write what PEFT wrote with transformers 4 for the canonical image tutorial."""
    torch.manual_seed(1)
    tensors = {
        "base_model.model.classifier.weight": torch.randn(3, 32),
        "base_model.model.classifier.bias": torch.ones(3),
    }
    for i in range(2):
        for n in ("query", "value"):
            name = f"base_model.model.{layer.format(i=i, n=n)}"
            tensors |= {f"{name}.lora_A.weight": torch.randn(2, 32), f"{name}.lora_B.weight": torch.randn(32, 2)}
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
    config |= {"modules_to_save": ["classifier"], "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return tensors


def test_an_adapter_of_transformers_4_finds_its_layers(tmp_path: Path) -> None:
    tensors, net, truth = older_adapter(tmp_path / "old"), vit(), vit()
    with torch.no_grad():
        for i in range(2):
            for n, new in (("query", "q_proj"), ("value", "v_proj")):
                name = f"base_model.model.vit.encoder.layer.{i}.attention.attention.{n}"
                weight = truth.get_submodule(f"vit.layers.{i}.attention.{new}").weight
                weight += 2 * tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        truth.classifier.weight.copy_(tensors["base_model.model.classifier.weight"])
        truth.classifier.bias.copy_(tensors["base_model.model.classifier.bias"])
    load_older_adapter(net, tmp_path / "old")
    x = torch.randn(2, 3, 32, 32)
    assert_close(net(x).logits, truth(x).logits, atol=1e-4, rtol=1e-4)


def test_names_that_were_never_there_are_refused(tmp_path: Path) -> None:
    older_adapter(tmp_path / "old", "vit.encoder.layer.{i}.attention.attention.no_{n}")
    net = vit()
    with pytest.raises(BaseMismatchError, match="under a newer name neither"):
        load_older_adapter(net, tmp_path / "old")
    assert not vl.adapter_names(net)


def experts() -> nn.Module:
    torch.manual_seed(0)
    sizes = {**_WIDE, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 50}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes)).eval()


def test_auto_leaves_experts_and_their_router_alone() -> None:
    names = {site.name.rpartition(".")[2] for site in select(experts(), LoraConfig(r=2))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}


@pytest.mark.parametrize("layer", ["gate_up_proj", "down_proj"])
def test_a_stack_of_experts_changes_as_its_weight_would(layer: str) -> None:
    net, truth, ids = experts(), experts(), torch.tensor([[5, 6, 7, 8]])
    vl.apply_lora(net, LoraConfig(r=2, lora_alpha=2, target_modules=[layer]))
    groups = vl.adapter_parameters(net, "default")
    with torch.no_grad():
        for B in groups["B"].values():
            B.normal_()
        for (name, A), B in zip(groups["A"].items(), groups["B"].values(), strict=True):
            owner = name.partition(".adapters.")[0]
            weight = truth.get_parameter(f"{owner}.{layer}")
            weight += (B @ A).view(weight.shape)
    assert_close(net(ids).logits, truth(ids).logits, atol=1e-5, rtol=1e-5)
    net.train()
    net(ids, labels=ids).loss.backward()
    vl.check_gradients(net)


def test_t5_reads_a_weight_of_an_adapted_layer() -> None:
    net, ids = pretrained("t5"), torch.tensor([[5, 6, 1]])
    expected = net(input_ids=ids, decoder_input_ids=ids).logits
    vl.apply_lora(net, LoraConfig(r=2, target_modules=["wo"]))
    assert net.encoder.block[0].layer[1].DenseReluDense.wo.weight.shape == (32, 64)
    assert_close(net(input_ids=ids, decoder_input_ids=ids).logits, expected)


def test_t5_asks_a_weight_for_its_type_without_forming_it() -> None:
    net, ids = pretrained("t5"), torch.tensor([[5, 6, 1]])

    def operations() -> int:
        with FlopCounterMode(display=False) as counted, torch.no_grad(), forced("factorised"):
            net(input_ids=ids, decoder_input_ids=ids)
        return int(counted.get_total_flops())

    base = operations()
    vl.apply_lora(net, LoraConfig(r=2, target_modules=["wo"]))
    assert operations() - base < 2 * 2 * 32 * 64, "what it takes to form one of the four weights"
