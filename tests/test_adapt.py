"""The verbs on whole models: what they promise, what they refuse, and that a refusal leaves no trace."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import visionlora as vl
from visionlora.adapt import attach_plan
from visionlora.errors import ConfigError, InertAdapterError, StateError, TargetError
from visionlora.plan import Plan
from visionlora.registry import adapter_plan, adapter_state


def vit(**kwargs: object) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=4, **kwargs).eval()


def stir(model: nn.Module, name: str, size: float = 0.05) -> None:
    with torch.no_grad():
        for group in vl.adapter_parameters(model, name).values():
            for parameter in group.values():
                parameter += size * torch.randn_like(parameter)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 32, 32)


@torch.no_grad()
def test_two_adapters_switch_on_one_base(x: Tensor) -> None:
    model = vit()
    base = model(x)
    vl.apply_lora(model, vl.LoraConfig(r=4), name="cam12")
    stir(model, "cam12")
    cam12 = model(x)
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["attn.qkv"], variant="dora"), name="cam13")
    assert torch.equal(model(x), base)
    stir(model, "cam13")
    cam13 = model(x)
    assert vl.adapter_names(model) == ["cam12", "cam13"]
    for name, expected in (("cam12", cam12), ("cam13", cam13), ("cam12", cam12)):
        vl.activate(model, name)
        assert_close(model(x), expected)
    assert torch.equal(vl.deactivate(model)(x), base)
    vl.activate(model, "cam12")
    vl.remove(model, "cam13")
    assert torch.equal(model(x), cam12)
    vl.remove(model)
    assert torch.equal(model(x), base)
    assert vl.adapter_names(model) == []


def test_only_the_active_adapter_requires_grad() -> None:
    model = vit()
    vl.apply_lora(model, name="a")
    vl.apply_lora(model, name="b")
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".adapters.b." in n for n in trainable)
    vl.activate(model, "a")
    assert all(".adapters.a." in n for n, p in model.named_parameters() if p.requires_grad)
    vl.deactivate(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_removing_restores_which_parameters_were_trainable() -> None:
    model = vit()
    model.patch_embed.requires_grad_(False)
    before = {n: p.requires_grad for n, p in model.named_parameters()}
    vl.apply_lora(model)
    vl.remove(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == before


@torch.no_grad()
def test_strength_moves_weights_head_and_statistics_together(x: Tensor) -> None:
    model = timm.create_model("resnet10t", num_classes=4, zero_init_last=False).eval()
    vl.apply_lora(model, vl.LoraConfig(r=2, norm="stats-affine"))
    stir(model, "default")
    vl.estimate_statistics(model, [1 + torch.randn(4, 3, 32, 32)], model)
    full, base = vl.merge(copy.deepcopy(model)), vl.remove(copy.deepcopy(model))
    half = copy.deepcopy(base)
    for (key, b), f in zip(base.state_dict().items(), full.state_dict().values(), strict=True):
        half.state_dict()[key].copy_(torch.lerp(b.float(), f.float(), 0.5))
    vl.activate(model, "default", strength=0.5)
    assert_close(model(x), half(x))
    assert_close(vl.activate(model, "default", strength=0)(x), base(x))


@torch.no_grad()
def test_strength_of_a_head_with_other_classes_needs_its_start(x: Tensor) -> None:
    source = vit()
    vl.apply_lora(source, vl.LoraConfig(r=2))
    stir(source, "default")
    plan, tensors = adapter_plan(source, "default"), adapter_state(source, "default")
    other = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=9).eval()
    other.load_state_dict({k: v for k, v in vl.base_state_dict(source).items() if "head" not in k}, strict=False)
    attach_plan(other, plan, tensors)
    vl.activate(other, "default")
    assert torch.equal(other(x), source(x))
    for model in (source, other):
        vl.activate(model, "default", strength=0.5)
    assert torch.equal(other(x), source(x))
    merged = vl.merge(other)
    assert (merged.num_classes, merged.head.out_features) == (4, 4)
    vl.unmerge(other)
    assert (other.num_classes, other.head.out_features) == (9, 9)
    vl.deactivate(other)
    assert other(x).shape == (2, 9)


def test_the_head_is_trained_in_full_and_saved_by_default() -> None:
    model = vit()
    vl.apply_lora(model, vl.LoraConfig(r=2))
    assert set(vl.adapter_parameters(model, "default")["head"]) == {
        f"head.adapters.default.{a}.value" for a in ("weight", "bias")
    }
    assert "head/weight/value" in adapter_state(model, "default")
    vl.remove(model)
    vl.apply_lora(model, vl.LoraConfig(r=2, modules_to_save="none"))
    assert "head" not in vl.adapter_parameters(model, "default")


def test_more_modules_can_be_trained_in_full(x: Tensor) -> None:
    model = vit()
    vl.apply_lora(model, vl.LoraConfig(r=2, modules_to_save=["patch_embed.proj", "blocks.0.norm1"]))
    saved = vl.adapter_parameters(model, "default")["saved"]
    assert {n.partition(".adapters")[0] for n in saved} == {"patch_embed.proj", "blocks.0.norm1"}
    model(x).square().mean().backward()
    vl.check_gradients(model)
    with pytest.raises(TargetError, match='no module or parameter matches "patch_embd"; did you mean "patch_embed"'):
        vl.apply_lora(model, vl.LoraConfig(modules_to_save=["patch_embd"]), name="b")


@pytest.mark.parametrize(("bias", "layers"), [("lora_only", {"blocks.0.attn.qkv"}), ("all", None)])
def test_biases_can_be_trained(x: Tensor, bias: str, layers: set[str] | None) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=4).eval()
    with torch.no_grad():
        base = model(x)
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["attn.qkv"], bias=bias))
    found = {n.partition(".adapters")[0] for n in vl.adapter_parameters(model, "default")["bias"]}
    expected = {n for n, m in model.named_modules() if m._parameters.get("bias") is not None and n != "head"}
    assert found == (layers or expected)
    stir(model, "default")
    model(x).square().mean().backward()
    vl.check_gradients(model)
    with torch.no_grad():
        changed = model(x)
        assert_close(vl.merge(model)(x), changed)
        vl.unmerge(model)
        with vl.disabled(model):
            assert torch.equal(model(x), base)


@torch.no_grad()
def test_an_adapter_can_be_taken_from_one_model_and_put_on_another(x: Tensor) -> None:
    a, b = vit(), vit()
    b.load_state_dict(a.state_dict())
    vl.apply_lora(a, vl.LoraConfig(r=3, bias="lora_only", norm="stats-affine", variant="dora"))
    stir(a, "default")
    record = adapter_plan(a, "default").to_record()
    attach_plan(b, Plan.from_record(b, record), adapter_state(a, "default"), name="copy")
    assert torch.equal(b(x), vl.remove(copy.deepcopy(a))(x))
    assert torch.equal(vl.activate(b, "copy")(x), a(x))
    assert vl.fingerprint(a) == vl.fingerprint(b)
    assert not any(p.requires_grad for p in b.parameters())


@pytest.mark.parametrize("fault", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit_are_refused_and_leave_no_trace(fault: str) -> None:
    a, b = vit(), vit()
    vl.apply_lora(a, vl.LoraConfig(r=3))
    tensors = adapter_state(a, "default")
    if fault == "missing":
        del tensors["blocks.1.mlp.fc2/weight/A"]
    elif fault == "unexpected":
        tensors["blocks.7.mlp.fc2/weight/A"] = torch.zeros(3)
    else:
        tensors["blocks.1.mlp.fc2/weight/A"] = torch.zeros(4, 768)
    keys, classes = list(b.state_dict()), [type(m) for m in b.modules()]
    with pytest.raises(TargetError, match=r"blocks\.[17]\.mlp\.fc2/weight/A"):
        attach_plan(b, adapter_plan(a, "default"), tensors)
    assert (list(b.state_dict()), [type(m) for m in b.modules()]) == (keys, classes)
    assert all(p.requires_grad for p in b.parameters())


@torch.no_grad()
def test_merge_and_unmerge_a_thousand_times_leave_every_bit() -> None:
    model = nn.Sequential(nn.Linear(8, 8).bfloat16())
    for name in ("a", "b"):
        vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["0"]), name=name)
        stir(model, name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for i in range(1000):
        vl.activate(model, "ab"[i % 2])
        vl.unmerge(vl.merge(model))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@torch.no_grad()
def test_a_merged_model_may_be_moved_and_copied_before_unmerge(x: Tensor) -> None:
    model = vit()
    vl.apply_lora(model, vl.LoraConfig(r=2))
    stir(model, "default")
    expected = copy.deepcopy(model).double()(x.double())
    vl.merge(model)
    twin = copy.deepcopy(model).double()
    vl.unmerge(twin)
    assert_close(twin(x.double()), expected, atol=1e-6, rtol=1e-6)
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    vl.unmerge(model)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_verbs_in_the_wrong_order_say_what_to_do() -> None:
    model = vit()
    with pytest.raises(StateError, match="no adapters; call apply_lora"):
        vl.activate(model, "a")
    vl.apply_lora(model, name="cam12")
    with pytest.raises(StateError, match="already attached"):
        vl.apply_lora(model, name="cam12")
    with pytest.raises(StateError, match="no adapter 'cam21' on this model; did you mean \"cam12\""):
        vl.activate(model, "cam21")
    with pytest.raises(StateError, match="nothing is merged"):
        vl.unmerge(model)
    vl.merge(model)
    for verb in (
        vl.merge,
        vl.remove,
        vl.fingerprint,
        lambda m: vl.activate(m, "cam12"),
        lambda m: vl.apply_lora(m, name="b"),
    ):
        with pytest.raises(StateError, match="unmerge first"):
            verb(model)
    vl.unmerge(model)
    with pytest.raises(StateError, match=r"pass the model inside it: \.0"):
        vl.activate(nn.Sequential(model), "cam12")
    vl.deactivate(model)
    with pytest.raises(StateError, match="no adapter is active"):
        vl.merge(model)


@pytest.mark.parametrize("strength", [-1, float("nan"), float("inf"), "1", True])
def test_strengths_that_mean_nothing_are_refused(strength: object) -> None:
    model = vl.apply_lora(vit())
    with pytest.raises(StateError, match="strength must be"):
        vl.activate(model, "default", strength=strength)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "a.b", "../x", "/abs", "a b", "x" * 65, "é", 3])
def test_names_that_could_leave_a_folder_are_refused(name: object) -> None:
    with pytest.raises(ConfigError, match="an adapter name is"):
        vl.apply_lora(vit(), name=name)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["keys", "pop", "training"])
def test_names_torch_needs_for_itself_are_refused(name: str) -> None:
    with pytest.raises(StateError, match="reserved"):
        vl.apply_lora(vit(), name=name)


def test_a_refused_config_leaves_the_model_as_it_was() -> None:
    model = vit()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TargetError):
        vl.apply_lora(model, vl.LoraConfig(target_modules=["attn.qkv", "typo"]))
    assert [type(m) for m in model.modules()] == classes
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "told"),
    [(("resnet18", None), "got 'resnet18'; build it first"), ((nn.Linear(8, 8), {"r": 3}), "got the dict {'r': 3}")],
)
def test_what_is_no_model_or_no_config_is_told(given: tuple[Any, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        vl.apply_lora(*given)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_a_traced_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), torch.jit.trace(nn.Linear(8, 8), torch.randn(1, 8)))
    with pytest.raises(TargetError, match=r"1 is compiled by torch\.jit"):
        vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["0"]))


def test_a_layer_that_cannot_be_adapted_leaves_no_half_attached_model() -> None:
    class Final(nn.Linear):
        def __init_subclass__(cls) -> None:
            raise TypeError("this class is final")

    model = nn.Sequential(nn.Linear(8, 8), Final(8, 8))
    with pytest.raises(TargetError, match="layer 1 of class Final cannot be adapted: this class is final"):
        vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["0", "1"]))
    assert type(model[0]) is nn.Linear
    assert all(p.requires_grad for p in model[0].parameters())


def test_an_adapter_without_gradient_is_an_error_with_a_cure(x: Tensor) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(8, 24)
            self.out = nn.Linear(24, 2)

        def forward(self, x: Tensor) -> Tensor:
            weight = self.qkv.weight
            return self.out(nn.functional.linear(x, weight.detach() if self.cut else weight))

    model = Reader()
    vl.apply_lora(model, vl.LoraConfig(r=1, target_modules=["qkv", "out"], modules_to_save="none"))
    model.cut = False
    model(torch.randn(3, 8)).sum().backward()
    vl.check_gradients(model)
    model.zero_grad()
    model.cut = True
    model(torch.randn(3, 8)).sum().backward()
    with pytest.raises(InertAdapterError, match=r"adapters of qkv:.*exclude_modules=\['qkv'\]"):
        vl.check_gradients(model)


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "eva02_tiny_patch14_224", "swinv2_tiny_window8_256"])
def test_owners_that_read_the_weight_see_the_change(name: str) -> None:
    sizes = {"beit_base_patch16_224": 32, "eva02_tiny_patch14_224": 28, "swinv2_tiny_window8_256": 64}
    kwargs = {"depth": 1} if "swin" not in name else {"depths": (1, 1, 1, 1), "window_size": 2}
    model = timm.create_model(name, img_size=sizes[name], num_classes=4, **kwargs).eval()
    x = torch.randn(2, 3, sizes[name], sizes[name])
    with torch.no_grad():
        for p in model.parameters():  # Swin-V2 starts its norms at zero: no layer would have an effect
            if p.ndim == 1:
                p.uniform_(0.5, 1)
        base = model(x)
        vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["qkv"], modules_to_save="none"))
        assert torch.equal(model(x), base)
        stir(model, "default", 0.3)
        changed = model(x)
        assert (changed - base).abs().max() > 1e-4
        assert_close(vl.merge(model)(x), changed)
        vl.unmerge(model)
    model(x).square().mean().backward()
    vl.check_gradients(model)
    with torch.no_grad():
        assert torch.equal(vl.remove(model)(x), base)


@pytest.mark.filterwarnings("ignore:.*nested tensor.*:UserWarning")
def test_torch_attention_and_its_fast_path_see_the_adapter() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.Sequential(layer).eval()
    x = torch.randn(2, 5, 16)
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["linear1", "linear2", "self_attn.out_proj"]))
    with torch.no_grad():
        vl.deactivate(model)
        base = model(x)
        vl.activate(model, "default")
        assert torch.equal(model(x), base)
        stir(model, "default", 0.3)
        changed = model(x)
        assert (changed - base).abs().max() > 1e-2
        assert_close(vl.merge(model)(x), changed)


def test_fingerprints_see_the_base_and_not_the_head() -> None:
    a, b = vit(), vit()
    b.load_state_dict(a.state_dict())
    nn.init.normal_(b.head.weight)
    assert vl.fingerprint(a) == vl.fingerprint(b)
    before = vl.fingerprint(a)
    vl.apply_lora(a)
    stir(a, "default")
    assert vl.fingerprint(a) == before
    with torch.no_grad():
        b.blocks[0].attn.qkv.weight[0, 0] += 1e-3
    assert vl.fingerprint(b) != before
    assert vl.fingerprint(a.bfloat16()) != before


def test_attaching_keeps_train_and_eval_mode() -> None:
    for mode in (True, False):
        model = vit().train(mode)
        vl.apply_lora(model, vl.LoraConfig(lora_dropout=0.1))
        assert all(m.training is mode for m in model.modules())


def test_functional_call_meta_device_and_checkpointing(x: Tensor) -> None:
    model = vit()
    vl.apply_lora(model, vl.LoraConfig(r=2))
    stir(model, "default")
    state = dict(model.named_parameters())
    assert torch.equal(torch.func.functional_call(model, state, (x,)), model(x))
    model(x).square().mean().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.set_grad_checkpointing()
    model.train()
    model(x).square().mean().backward()
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert_close(p.grad, grads[n], atol=1e-5, rtol=1e-4)
    with torch.device("meta"):
        ghost = timm.create_model("vit_tiny_patch16_224", depth=1)
    vl.apply_lora(ghost, vl.LoraConfig(r=2))
    assert all(p.is_meta for p in ghost.parameters())


FAMILIES = [
    "resnet18",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "tf_efficientnet_b0",
    "resnetv2_50x1_bit",
    "nf_regnet_b0",
    "mobilevit_xxs",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_models_keep_every_promise(name: str) -> None:
    kwargs = (
        {"zero_init_last": False} if name == "resnet18" else {"img_size": 64, "depth": 1} if "vit_tiny" in name else {}
    )
    model, x = timm.create_model(name, num_classes=4, **kwargs).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "gamma" in key or (p.ndim <= 1 and not key.endswith("bias")):
                p.fill_(1.0)  # layer scale of 1e-6 and zero-initialised norms would hide every effect
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm):
                m.running_var.fill_(0.5)
        base, keys = model(x), list(model.state_dict())
        vl.apply_lora(model, vl.LoraConfig(r=2, modules_to_save="none"))
        assert torch.equal(model(x), base)
        stir(model, "default", 0.1)
        changed = model(x)
        effect = (changed - base).abs().max()
        assert effect > 1e-2 * base.abs().max()
        assert (vl.merge(model)(x) - changed).abs().max() < 1e-4 * effect
        assert list(model.state_dict()) == keys
        assert torch.equal(vl.unmerge(model)(x), changed)
    model.train()
    model(x).square().mean().backward()
    vl.check_gradients(model)
    model.eval()
    with torch.no_grad():
        assert torch.equal(vl.remove(model)(x), base)
