"""The same directory in PEFT and here gives the same logits, in both directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import io_toy
import pytest
import torch
from io_toy import images, resnext, timm_model
from torch import Tensor, nn

import visionlora as vl
from visionlora.io import load_adapter, read_adapter, save_adapter
from visionlora.io.read import MIRROR, PEFT_CONFIG, WEIGHTS

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT calls transformers'


def adapted(model: nn.Module, **config: Any) -> nn.Module:
    return io_toy.adapted(model, **{"norm": "frozen", "bias": "none", **config})


def vit(seed: int = 0) -> nn.Module:
    return timm_model("test_vit", seed, img_size=64)


def resnet(seed: int = 0) -> nn.Module:
    return timm_model("test_resnet", seed)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(images())


PLANS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3.0},
    "dora": {"variant": "dora"},
    "frozen A": {"variant": "fa"},
    "patterns": {"rank_pattern": {}, "alpha_pattern": {}},
    "biases": {"bias": "all"},
    "biases of adapted layers": {"bias": "lora_only"},
    "no head": {"modules_to_save": "none"},
}
PATTERNS = {
    vit: {"rank_pattern": {"attn.qkv": 5, "blocks.1.mlp.fc1": 3}, "alpha_pattern": {"attn.qkv": 7.0, "fc2": 1.5}},
    resnet: {"rank_pattern": {"layer2.0.conv1": 5}, "alpha_pattern": {"conv1": 7.0, "layer1.0.conv2": 1.5}},
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("make", [vit, resnet])
def test_peft_computes_what_we_saved(make: Any, plan: str, tmp_path: Path) -> None:
    config = {**PLANS[plan], **(PATTERNS[make] if plan == "patterns" else {})}
    base = logits(make())
    model = adapted(make(), r=4, **config)
    y = logits(model)
    assert (y - base).abs().max() > 1e-2
    save_adapter(model, tmp_path)
    assert (tmp_path / PEFT_CONFIG).exists(), json.loads((tmp_path / MIRROR).read_text())["peft"]
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "olora", "soma"])
@pytest.mark.parametrize("make", [vit, resnet])
def test_peft_computes_on_the_original_base_what_started_from_its_weights(
    make: Any, start: Any, tmp_path: Path
) -> None:
    model = adapted(make(), r=3, init_lora_weights=start)
    y = logits(model)
    save_adapter(model, tmp_path)
    assert (y - logits(make())).abs().max() > 1e-2
    assert json.loads((tmp_path / PEFT_CONFIG).read_text())["r"] == 6
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_peft_keeps_the_padding_of_a_convolution_that_pads_itself(variant: Any, tmp_path: Path) -> None:
    make = lambda: timm_model("test_efficientnet", pad_type="same")  # noqa: E731
    model = adapted(make(), target_modules="all-conv", variant=variant)
    y = logits(model)
    save_adapter(model, tmp_path)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(make(), tmp_path)), y, atol=1e-5, rtol=1e-5)


def test_peft_changes_the_named_layers_alone(tmp_path: Path) -> None:
    model = adapted(resnet(), r=2, target_modules=["layer1.0.conv1", "layer2.0.conv2"])
    y = logits(model)
    save_adapter(model, tmp_path)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(resnet(), tmp_path)), y, atol=1e-5, rtol=1e-5)


class Twice(nn.Module):
    """A layer `conv1` outside and another inside `block`, as timm's ResNets have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.block = nn.Sequential()
        self.block.add_module("conv1", nn.Conv2d(8, 8, 3))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block(self.conv1(x).relu()).mean((2, 3)))


def test_a_name_that_is_another_ones_ending_is_written_as_a_regex(tmp_path: Path) -> None:
    model = Twice()
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules="conv1", norm="frozen"))
    nn.init.ones_(model.conv1.adapters["default"]["weight"].B)
    y = logits(model)
    save_adapter(model, tmp_path)
    assert json.loads((tmp_path / PEFT_CONFIG).read_text())["target_modules"] == "conv1"
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(Twice(), tmp_path)), y, atol=1e-5, rtol=1e-5)
    fresh = Twice()
    load_adapter(fresh, tmp_path)
    assert torch.equal(logits(fresh), y)


@pytest.mark.parametrize(
    ("model", "config", "reason"),
    [
        (vit, {"target_modules": ["attn.qkv[q,v]"]}, "parts q, v"),
        (resnet, {"norm": "stats"}, "norm"),
        (resnet, {"norm": "affine"}, "running_mean"),
        (resnext, {"target_modules": "all-conv"}, "groups"),
        (lambda: timm_model("test_nfnet"), {"target_modules": "all-conv"}, "ScaledStdConv2d"),
        (vit, {"target_modules": "none"}, "low rank"),
    ],
)
def test_what_peft_cannot_express_is_not_written(model: Any, config: Any, reason: str, tmp_path: Path) -> None:
    save_adapter(adapted(model(), **config), tmp_path)
    assert not (tmp_path / PEFT_CONFIG).exists()
    assert any(reason in text for text in json.loads((tmp_path / MIRROR).read_text())["peft"]["reasons"])


PEFT_PLANS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 6},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True},
    "dora": {"r": 4, "lora_alpha": 6, "use_dora": True},
    "gaussian": {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian"},
    "bias": {"r": 4, "lora_alpha": 6, "bias": "all"},
}
TARGETS: dict[Any, dict[str, Any]] = {
    vit: {
        "target_modules": ["qkv", "fc1", "proj"],
        "exclude_modules": ["patch_embed.proj"],
        "modules_to_save": ["head"],
    },
    resnet: {"target_modules": r"layer\d\.\d\.conv\d", "modules_to_save": ["fc", "layer1.0.bn1"]},
}
WITH_PATTERNS: dict[Any, dict[str, Any]] = {
    vit: {"rank_pattern": {"attn.qkv": 2, "^blocks.0.mlp.fc1": 3}, "alpha_pattern": {"blocks.1.mlp.fc1": 11}},
    resnet: {"rank_pattern": {"conv1": 2}, "alpha_pattern": {"layer2.0.conv2": 11}},
}


@pytest.mark.parametrize("plan", [*PEFT_PLANS, "patterns"])
@pytest.mark.parametrize("make", [vit, resnet])
def test_we_compute_what_peft_trained(make: Any, plan: str, tmp_path: Path) -> None:
    config = {**TARGETS[make], **(PEFT_PLANS[plan] if plan != "patterns" else {"r": 4, **WITH_PATTERNS[make]})}
    model = peft.get_peft_model(make(), peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.rand_like(parameter))
        for name, buffer in model.named_buffers():
            if "modules_to_save" in name and name.endswith("running_mean"):
                buffer.add_(0.1)
    y = logits(model)
    model.save_pretrained(tmp_path)
    fresh = make()
    base = logits(fresh)
    assert (y - base).abs().max() > 1e-2
    load_adapter(fresh, tmp_path)
    assert torch.allclose(logits(fresh), y, atol=1e-5, rtol=1e-5)
    assert "PEFT" in read_adapter(tmp_path).notices[0]
    save_adapter(fresh, tmp_path / "ours")
    again = make()
    load_adapter(again, tmp_path / "ours")
    assert torch.equal(logits(again), logits(fresh))


def test_a_half_precision_peft_adapter_is_read_in_float32(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_adapter(adapted(vit()), tmp_path)
    (tmp_path / MIRROR).unlink()
    tensors = {
        k: t.to(torch.bfloat16) for k, t in load_file(tmp_path / WEIGHTS).items() if not k.startswith("visionlora")
    }
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    assert {tensor.dtype for tensor in read_adapter(tmp_path).tensors.values()} == {torch.float32}


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 3}
    config = transformers.BertConfig(**sizes, intermediate_size=48, max_position_embeddings=16)
    return transformers.BertForSequenceClassification(config).eval()


def t5() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0)).eval()


def text_logits(model: nn.Module) -> Tensor:
    ids = torch.randint(64, (2, 7), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "decoder_input_ids": ids} if "T5" in str(model) else {"input_ids": ids}
    with torch.no_grad():
        return model.eval()(**inputs).logits


TEXT: dict[Any, tuple[list[str], list[str] | None]] = {
    gpt2: (["c_attn", "c_fc", "mlp.c_proj"], None),
    bert: (["query", "value", "output.dense"], ["classifier"]),
    t5: (["q", "v", "wi", "wo"], None),
}


@pytest.mark.parametrize("plan", ["lora", "rslora", "dora"])
@pytest.mark.parametrize("make", TEXT)
def test_we_compute_what_peft_trained_on_text(make: Any, plan: str, tmp_path: Path) -> None:
    targets, saved = TEXT[make]
    extra = {"fan_in_fan_out": True} if make is gpt2 else {}
    config = peft.LoraConfig(**PEFT_PLANS[plan], target_modules=targets, modules_to_save=saved, **extra)
    y = trained_by_peft(make(), config, tmp_path)
    fresh = make()
    assert (y - text_logits(fresh)).abs().max() > 1e-3
    load_adapter(fresh, tmp_path)
    assert torch.allclose(text_logits(fresh), y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("make", TEXT)
def test_peft_computes_text_that_we_saved(make: Any, variant: Any, tmp_path: Path) -> None:
    model = adapted(make(), target_modules=TEXT[make][0], variant=variant)
    y = text_logits(model)
    save_adapter(model, tmp_path)
    assert (y - text_logits(make())).abs().max() > 1e-3
    read = peft.PeftModel.from_pretrained(make(), tmp_path)
    assert torch.allclose(text_logits(read), y, atol=1e-5, rtol=1e-5)


def trained_by_peft(model: nn.Module, config: Any, folder: Path) -> Tensor:
    """Save an adapter of PEFT whose every tensor differs from its start; return the logits with it."""
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.rand(parameter.shape, generator=generator))
    y = text_logits(wrapped)
    wrapped.save_pretrained(folder)
    return y
