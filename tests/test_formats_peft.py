"""Adapters that PEFT lays out otherwise: written so that PEFT computes the same, and read from PEFT's own files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from io_toy import adapted, images, net, resnext, timm_model
from safetensors.torch import save_file
from torch import Tensor, nn

from visionlora.errors import AdapterFileError, ConfigError
from visionlora.io import load_adapter
from visionlora.io.formats import difference, peft_tensors, put_on, read_peft
from visionlora.io.read import PEFT_CONFIG, WEIGHTS
from visionlora.registry import adapter_plan

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings(
    "ignore:LoRA adapter added to ConvNd layer with groups > 1",
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:(PiSSA|OLoRA) changes the base weights:UserWarning",
)


def vit() -> nn.Module:
    return timm_model("test_vit", img_size=64)


def resnet() -> nn.Module:
    return timm_model("test_resnet")


class Words(nn.Module):
    """An embedding, a convolution over time and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(40, 16)
        self.mix = nn.Conv1d(16, 24, 3, padding=1)
        self.head = nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mix(self.table(ids).transpose(1, 2)).relu().mean(2))


def inputs(model: nn.Module) -> Tensor:
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(1))
    return ids if any(isinstance(module, nn.Embedding) for module in model.modules()) else images()


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(inputs(model))


def wrote(folder: Path, model: nn.Module, rank: int | None = None) -> Path:
    content = peft_tensors(model, "default", rank=rank)
    folder.mkdir(exist_ok=True)
    (folder / PEFT_CONFIG).write_text(json.dumps(content.config))
    save_file(content.tensors, folder / WEIGHTS, {"format": "pt"})
    return folder


def close(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).abs().max() <= 1e-5 * y.abs().max())


WHOLE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "parts of qkv": (vit, {"target_modules": ["attn.qkv[q,v]"]}),
    "parts of qkv, DoRA": (vit, {"target_modules": ["attn.qkv[q,v]"], "variant": "dora"}),
    "groups": (resnext, {"target_modules": "all-conv"}),
    "scale and shift": (vit, {"norm": "affine"}),
    "statistics": (resnet, {"norm": "stats"}),
    "statistics, scale, shift and biases": (resnext, {"norm": "affine", "bias": "all"}),
    "embedding": (Words, {"target_modules": ["table", "mix"], "modules_to_save": ["head"]}),
    "embedding, DoRA": (Words, {"target_modules": ["table", "mix"], "variant": "dora"}),
    "loha": (vit, {"variant": "loha"}),
    "lokr": (vit, {"variant": "lokr"}),
    "tucker": (resnet, {"variant": "tucker", "target_modules": "all-conv"}),
    "up": (resnet, {"variant": "up", "target_modules": ["layer2.0.conv1"]}),
    "vera": (vit, {"variant": "vera"}),
    "ia3": (vit, {"variant": "ia3"}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_peft_computes_what_it_stores_otherwise(case: str, tmp_path: Path) -> None:
    make, config = WHOLE[case]
    model = adapted(make(), **config)
    y, base = outputs(model), outputs(make())
    assert (y - base).abs().max() > 1e-2
    wrote(tmp_path, model)
    assert close(outputs(peft.PeftModel.from_pretrained(make(), tmp_path)), y)
    again = make()
    put_on(again, read_peft(again, tmp_path))
    assert close(outputs(again), y)
    assert difference(model, "default", again, "default")[0] < 1e-6


def test_parts_and_groups_keep_every_number(tmp_path: Path) -> None:
    for make, config in (WHOLE["parts of qkv"], WHOLE["groups"]):
        model, again = adapted(make(), **config), make()
        put_on(again, read_peft(again, wrote(tmp_path, model)))
        assert difference(model, "default", again, "default")[0] == 0


def test_a_change_of_full_rank_is_refused_and_approximated_on_request(tmp_path: Path) -> None:
    model = adapted(resnext(), target_modules=["layer1.0.conv2"], variant="dora")
    with pytest.raises(ConfigError, match="approximate"):
        peft_tensors(model, "default")
    content = peft_tensors(model, "default", rank=3)
    factors = content.decomposed["layer1.0.conv2"]
    again = resnext()
    put_on(again, read_peft(again, wrote(tmp_path, model, rank=3)))
    share = difference(model, "default", again, "default")[1]["layer1.0.conv2"]
    assert factors.rank == 3
    assert share == pytest.approx(factors.error / factors.norm, rel=1e-3)
    assert 0.01 < share < 0.9


@pytest.mark.parametrize(
    ("make", "config", "reason"),
    [
        (lambda: timm_model("test_nfnet"), {"target_modules": "all-conv"}, "ScaledStdConv2d"),
        (
            lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3), nn.Conv2d(8, 8, 3)),
            {"target_modules": ["0"]},
            "Transpose",
        ),
        (vit, {"target_modules": "none"}, "low rank"),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, dilation=2)), {"target_modules": ["0"]}, "dilation"),
    ],
)
def test_what_peft_cannot_hold_is_refused_with_the_reason(make: Any, config: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        peft_tensors(adapted(make(), **config), "default", rank=4)


TRAINED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "pissa": (vit, {"init_lora_weights": "pissa", "target_modules": ["qkv", "fc1"]}),
    "pissa, rslora": (vit, {"init_lora_weights": "pissa", "target_modules": ["qkv"], "use_rslora": True}),
    "pissa, dora": (vit, {"init_lora_weights": "pissa", "target_modules": ["fc1"], "use_dora": True}),
    "pissa, patterns": (
        vit,
        {"init_lora_weights": "pissa", "target_modules": ["qkv"], "rank_pattern": {"1.attn.qkv": 2}},
    ),
    "olora": (vit, {"init_lora_weights": "olora", "target_modules": ["qkv", "fc2"]}),
    "mica": (vit, {"init_lora_weights": "mica", "target_modules": ["qkv"]}),
    "embedding": (Words, {"target_modules": ["table", "mix"], "modules_to_save": ["head"]}),
    "embedding, dora": (Words, {"target_modules": ["table"], "use_dora": True}),
    "statistics": (resnet, {"target_modules": r"layer\d\.\d\.conv\d", "modules_to_save": ["layer1.0.bn1", "fc"]}),
}


def trained(model: nn.Module, folder: Path, **config: Any) -> tuple[Any, Tensor]:
    """Save an adapter of PEFT whose every tensor differs from its start; return PEFT's model and its outputs."""
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.rand(parameter.shape, generator=generator))
    y = outputs(wrapped)
    wrapped.save_pretrained(folder)
    return wrapped, y


@pytest.mark.parametrize("case", TRAINED)
def test_we_compute_what_peft_trained_and_saved_as_it_is(case: str, tmp_path: Path) -> None:
    make, config = TRAINED[case]
    y = trained(make(), tmp_path, **config)[1]
    fresh = make()
    assert (outputs(fresh) - y).abs().max() > 1e-3
    put_on(fresh, read_peft(fresh, tmp_path))
    assert close(outputs(fresh), y)


PRODUCTS: dict[str, tuple[Callable[[], nn.Module], type, dict[str, Any], str]] = {
    "loha": (vit, peft.LoHaConfig, {"target_modules": ["qkv", "fc1"], "modules_to_save": ["head"]}, "loha"),
    "loha, patterns": (vit, peft.LoHaConfig, {"target_modules": ["qkv"], "rank_pattern": {"1.attn.qkv": 2}}, "loha"),
    "loha with cores": (resnet, peft.LoHaConfig, {"target_modules": ["conv2"], "use_effective_conv2d": True}, "loha"),
    "loha of kernels": (resnet, peft.LoHaConfig, {"target_modules": ["conv2"]}, "loha"),
    "lokr": (vit, peft.LoKrConfig, {"target_modules": ["qkv", "fc1"]}, "lokr"),
    "lokr of two low ranks": (
        vit,
        peft.LoKrConfig,
        {"target_modules": ["fc1"], "decompose_both": True, "r": 2},
        "lokr",
    ),
    "lokr with cores": (
        resnet,
        peft.LoKrConfig,
        {"target_modules": ["conv2"], "r": 1, "decompose_factor": 2, "use_effective_conv2d": True},
        "lokr",
    ),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_we_compute_peft_products(case: str, tmp_path: Path) -> None:
    make, kind, config, variant = PRODUCTS[case]
    wrapped = peft.get_peft_model(make(), kind(**{"r": 3, "alpha": 5, **config}))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    y, fresh = outputs(wrapped), make()
    wrapped.save_pretrained(tmp_path)
    assert (outputs(fresh) - y).abs().max() > 1e-3
    put_on(fresh, read_peft(fresh, tmp_path))
    assert close(outputs(fresh), y)
    assert adapter_plan(fresh, "default").config.variant == variant


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_moved_the_base_is_refused_without_the_base(start: str, tmp_path: Path) -> None:
    trained(vit(), tmp_path, init_lora_weights=start, target_modules=["qkv"])
    with pytest.raises(AdapterFileError, match="visionlora convert"):
        load_adapter(vit(), tmp_path)


def test_a_random_decomposition_is_left_to_peft(tmp_path: Path) -> None:
    trained(vit(), tmp_path, init_lora_weights="pissa_niter_4", target_modules=["qkv"])
    with pytest.raises(AdapterFileError, match="path_initial_model_for_weight_conversion"):
        read_peft(vit(), tmp_path)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_what_peft_converted_itself_is_plain_lora(start: str, tmp_path: Path) -> None:
    config = {"init_lora_weights": start, "target_modules": ["qkv", "fc1"]}
    model = peft.get_peft_model(vit(), peft.LoraConfig(r=4, lora_alpha=6, **config))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = start
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.rand_like(parameter))
    y = outputs(model)
    model.save_pretrained(tmp_path / "out", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    fresh = vit()
    load_adapter(fresh, tmp_path / "out")
    assert close(outputs(fresh), y)
    assert {site.rank for site in adapter_plan(fresh, "default").sites} == {8}


def test_singular_values_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    def same() -> nn.Module:
        model = vit()
        nn.init.eye_(model.get_submodule("blocks.0.attn.proj").weight)
        return model

    trained(same(), tmp_path, init_lora_weights="pissa", target_modules=["attn.proj"])
    with pytest.raises(AdapterFileError, match="so near"):
        read_peft(same(), tmp_path)


def test_a_grouped_convolution_that_sees_all_channels_is_refused(tmp_path: Path) -> None:
    trained(net(), tmp_path, target_modules=["mix"])
    with pytest.raises(AdapterFileError, match="see the channels of all"):
        read_peft(net(), tmp_path)


def test_a_table_of_another_base_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def llama(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        return transformers.LlamaModel(transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0)).eval()

    wrapped = peft.get_peft_model(llama(0), peft.LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        wrapped.save_pretrained(tmp_path)
    assert "embed_tokens" in read_peft(llama(0), tmp_path).layers
    with pytest.raises(AdapterFileError, match="table"):
        read_peft(llama(1), tmp_path)
