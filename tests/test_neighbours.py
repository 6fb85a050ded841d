"""What models meet outside timm.create_model: torchvision, fusing, feature extraction, checkpointing, layer decay."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from proof import CONFIG, check_choice, difference, largest, outputs, prove, same, stir, wake
from timm.models import reparameterize_model
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models import list_models
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.maxvit import MaxVit
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2  # fmt: skip
from torchvision.models.vision_transformer import VisionTransformer

import visionlora as vl
from visionlora.errors import StateError
from visionlora.registry import adapter_plan
from visionlora.targets import head_layers, select


def image(size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, dtype=torch.float64)


def swin(**kwargs: object) -> nn.Module:
    return SwinTransformer([4, 4], 24, [2, 1], [2, 4], [4, 4], num_classes=7, **kwargs)  # type: ignore[arg-type]


def convnext() -> nn.Module:
    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], num_classes=7)


TORCHVISION: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "vit": (lambda: VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=7), 32),
    "swin": (swin, 32),
    "swin_v2": (lambda: swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 32),
    "resnet": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=7), 32),
    "resnext": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=7, groups=8, width_per_group=4), 32),
    "convnext": (convnext, 32),
    "densenet": (lambda: DenseNet(8, (1, 1, 1, 1), 16, num_classes=7), 64),
    "maxvit": (lambda: MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=7), 64),
    "shufflenet": (lambda: ShuffleNetV2([1, 1, 1], [16, 32, 48, 64, 128], num_classes=7), 64),
    "mobilenet_v3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=7, width_mult=0.25), 64),
    "squeezenet": (lambda: torchvision.models.squeezenet1_1(num_classes=7), 64),
}

ONE_PER_MODULE = {
    *("alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "inception_v3"),
    *("maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d"),
    *("shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vit_b_16"),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_models_keep_every_promise(name: str) -> None:
    make, size = TORCHVISION[name]
    prove(make(), image(size))


@pytest.mark.parametrize("name", sorted(ONE_PER_MODULE))
def test_auto_on_torchvision_takes_no_stem_gate_or_head(name: str) -> None:
    model = on_meta(name, 7)
    vl.apply_lora(model, CONFIG)
    heads, sites = set(head_layers(model)), {site.layer for site in adapter_plan(model, "default").sites}
    assert sites
    assert not sites & heads
    check_choice(model, torch.empty(2, 3, 224, 224, device="meta"))
    ours, other = vl.base_state_dict(model), on_meta(name, 11).state_dict()
    assert {key.rpartition(".")[0] for key in ours if ours[key].shape != other[key].shape} == heads


def on_meta(name: str, num_classes: int) -> nn.Module:
    """Return a torchvision model without numbers and without the classifiers only training uses."""
    leaner = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    device = "cpu" if name.startswith("regnet") else "meta"  # computes its widths with tensors
    with torch.device(device):
        model = torchvision.models.get_model(name, num_classes=num_classes, **leaner)
    return model.to("meta").eval()  # type: ignore[no-any-return]


def test_every_module_of_torchvision_is_here() -> None:
    homes = [type(on_meta(name, 7)).__module__ for name in ONE_PER_MODULE]
    builders = (torchvision.models.get_model_builder(name) for name in list_models(module=torchvision.models))
    assert set(homes) == {builder.__module__ for builder in builders}


def test_auto_takes_attention_and_mlp_of_torchvisions_transformers() -> None:
    vit, swin_v2 = TORCHVISION["vit"][0](), TORCHVISION["swin_v2"][0]()
    block = "encoder.layers.encoder_layer_1"
    attention = [f"{block}.self_attention.in_proj_weight", f"{block}.self_attention.out_proj"]
    assert [s.name for s in select(vit, CONFIG) if block in s.name] == [*attention, f"{block}.mlp.0", f"{block}.mlp.3"]
    chosen = {site.name for site in select(swin_v2, CONFIG)}
    assert {n.partition(".0.")[2] for n in chosen if n.startswith("features.3.0.")} == {
        *("attn.qkv", "attn.proj", "mlp.0", "mlp.3"),
    }


def test_the_parts_of_torchvisions_fused_projection_act_apart() -> None:
    model = TORCHVISION["vit"][0]()
    prove(model, image(), vl.LoraConfig(r=4, target_modules=["self_attention.in_proj_weight[q,v]"]))
    layer = model.encoder.layers.encoder_layer_0.self_attention
    change = (layer.in_proj_weight - layer._parameters["in_proj_weight"]).view(3, -1)
    assert [bool(part.abs().max() > 0) for part in change] == [True, False, True]


def test_googlenets_and_inceptions_auxiliary_classifiers_are_left_alone() -> None:
    for make in (torchvision.models.googlenet, torchvision.models.inception_v3):
        with torch.device("meta"):
            model = make(num_classes=7, aux_logits=True, init_weights=False)
        assert not any("aux" in site.name.lower() for site in select(model, CONFIG))


FUSING = {
    "repvgg_a0": ({}, 32),
    "mobileone_s0": ({}, 32),
    "fastvit_t8": ({"layers": (1, 1, 1, 1)}, 32),
    "repvit_m1": ({}, 32),
    "repghostnet_050": ({}, 32),
    "levit_128s": ({"img_size": 64}, 64),
    "tiny_vit_5m_224": ({"depths": (1, 1, 1, 1)}, 32),
    "efficientvit_m0": ({"img_size": 32}, 32),
    "efficientvim_m1": ({}, 32),
    "iformer_t": ({}, 64),
    "lcnetv2_small": ({}, 32),
    "nextvit_small": ({}, 32),
    "shvit_s1": ({}, 32),
    "ghostnetv3_050": ({}, 64),
}
WRITE_IN_PLACE = ("efficientvim_m1", "nextvit_small")  # into weights that an adapted layer computes: only merged
QUICK_TO_FUSE = ("repghostnet_050", "fastvit_t8", "tiny_vit_5m_224", "levit_128s")


@pytest.fixture
def float64() -> Iterator[None]:
    """New layers are made in float64: some of timm's fusing forgets the type of what it fuses."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in QUICK_TO_FUSE)) for n in FUSING])
def test_reparameterising_keeps_the_adapter_merged_or_not(name: str) -> None:
    small, size = FUSING[name]
    model, x = timm.create_model(name, num_classes=7, **small).eval(), image(size)
    wake(model, x)
    base = outputs(model, x)
    vl.apply_lora(model, CONFIG)
    stir(model)
    changed = outputs(model, x)
    effect = largest(difference(changed, base))
    if name not in WRITE_IN_PLACE:
        assert largest(difference(outputs(reparameterize_model(model), x), changed)) < 1e-8 * effect
    vl.merge(model)
    assert largest(difference(outputs(reparameterize_model(model), x), changed)) < 1e-8 * effect
    vl.unmerge(model)
    assert same(outputs(model, x), changed)


def test_a_model_that_was_fused_with_its_adapter_is_not_saved(tmp_path: Path) -> None:
    model = timm.create_model("repghostnet_050", num_classes=7).eval()
    vl.apply_lora(model, vl.LoraConfig(target_modules=["blocks.1.0.ghost1.primary_conv.0"], r=1))
    model.blocks[1][0].ghost1 = nn.Identity()
    with pytest.raises(StateError, match="fused or rebuilt"):
        vl.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {}),
        ("test_convnext", {}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 3}),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24, "window_size": 4}),
    ],
)
def test_feature_extractors_keep_every_promise(name: str, small: dict[str, object]) -> None:
    model = timm.create_model(name, features_only=True, **small)
    x = image(64 if "swin" in name else 32)
    prove(model, x)
    check_choice(model, x)
    assert not head_layers(model)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224"])
def test_feature_extractors_get_the_preset_of_their_family(name: str) -> None:
    with torch.device("meta"):
        model, bare = timm.create_model(name), timm.create_model(name, features_only=True)
    endings = [{s.name.rpartition(".")[2] for s in select(m, CONFIG)} for m in (model, bare)]
    assert endings[0] == endings[1] == {"qkv", "proj", "fc1", "fc2"}


class Backbone(nn.Module):
    """Somebody's own model around a backbone of timm."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.head = net, nn.Linear(192, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))  # type: ignore[no-any-return]


class OwnViT(timm.models.VisionTransformer):
    """Somebody's own subclass of a model of timm."""


def test_wrapped_and_derived_models_get_the_preset_of_their_family() -> None:
    wrapped = Backbone(timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0))
    own = OwnViT(img_size=32, embed_dim=32, depth=2, num_heads=4, num_classes=7)
    for model in (wrapped, own):
        assert {s.name.rpartition(".")[2] for s in select(model, CONFIG)} == {"qkv", "proj", "fc1", "fc2"}
    prove(wrapped, image())


CHECKPOINTED = {
    "vit_tiny_patch16_224": {"img_size": 32, "depth": 3},
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24, "window_size": 4},
    "eva02_tiny_patch14_224": {"img_size": 32, "depth": 3},
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("name", CHECKPOINTED)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, dropout: float) -> None:
    model = timm.create_model(name, num_classes=7, **CHECKPOINTED[name]).double()
    x = image(64 if "swin" in name else 32)
    wake(model.eval(), x)
    vl.apply_lora(model, vl.LoraConfig(r=4, lora_dropout=dropout))
    stir(model)
    gradients(
        model.train(), x
    )  # the first training pass finds norms to fold: the next ones are rounded in another order
    plain = gradients(model, x)
    model.set_grad_checkpointing()
    assert_close(gradients(model, x), plain, rtol=1e-9, atol=1e-11)  # inputs that are kept are summed in another order
    assert dropout or all(grad.abs().max() > 0 for key, grad in plain.items() if key.endswith((".A", ".B")))


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    model(x).square().sum().backward()
    vl.check_gradients(model)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "name",
    [
        *("vit_tiny_patch16_224", "resnet18", "convnext_atto", "swin_tiny_patch4_window7_224", "efficientnet_b0"),
        *("eva02_tiny_patch14_224", "regnetx_002", "beit_base_patch16_224", "mobilenetv3_small_050", "volo_d1_224"),
    ],
)
def test_layer_decay_gives_an_adapter_the_rate_of_its_layer(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=7)
    before = rates(model)
    vl.apply_lora(model, CONFIG)
    adapted = rates(model)
    assert adapted
    assert all(rate == before[key.replace(".adapters.default", "").rpartition(".")[0]] for key, rate in adapted.items())
    assert len(set(adapted.values())) > 2


def rates(model: nn.Module) -> dict[str, float]:
    """Return the share of the learning rate that timm gives every trained parameter."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.7)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


class Ops(TorchDispatchMode):
    """The names of the operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.add(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("targets", ["auto", ["linear1"], ["in_proj_weight"], ["out_proj"], ["in_proj_weight[q,v]"]])
def test_the_fast_path_of_nn_transformer_encoder_sees_the_adapter(targets: str | list[str]) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    twin, x = copy.deepcopy(model), torch.randn(2, 5, 32)
    vl.apply_lora(model, vl.LoraConfig(r=4, target_modules=targets))
    with torch.no_grad():
        assert_close(model(x), twin(x), rtol=0, atol=1e-6)
    stir(model)
    with torch.no_grad(), Ops() as ops:
        fast = model(x)
    assert any("transformer_encoder_layer" in name for name in ops.names), "not the path this test is about"
    assert_close(model(x), fast, rtol=0, atol=1e-5)
    assert (fast - twin(x)).abs().max() > 1e-2
    vl.merge(model)
    assert_close(model(x), fast, rtol=0, atol=1e-5)


def test_patches_of_another_size_meet_the_adapted_projection_of_naflexvit() -> None:
    small = {"depth": 2, "embed_dim": 96, "num_heads": 4, "num_classes": 7}
    model = timm.create_model("naflexvit_base_patch16_gap", enable_patch_interpolator=True, **small).eval()
    grid = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).expand(2, 4, 2)
    x = {"patches": torch.randn(2, 4, 8, 8, 3), "patch_coord": grid, "patch_valid": torch.ones(2, 4, dtype=torch.bool)}
    vl.apply_lora(model, vl.LoraConfig(r=4, target_modules=["embeds.proj"], modules_to_save="none", bias="none"))
    with vl.disabled(model):
        base = model(x)
    stir(model)
    changed = model(x)
    assert (changed - base).abs().max() > 1e-2
    changed.square().sum().backward()
    vl.check_gradients(model)
    vl.merge(model)
    assert_close(model(x), changed)
