"""From names to layers: what is chosen, what is refused, and what the refusal says."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

import visionlora as vl
from visionlora.errors import ConfigError, TargetError
from visionlora.targets import head_layers, select


def names(model: nn.Module, **config: object) -> list[str]:
    return [site.name for site in select(model, vl.LoraConfig(**config))]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=5)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return timm.create_model("resnet26d", num_classes=5)


@pytest.fixture(scope="module")
def efficientnet() -> nn.Module:
    return timm.create_model("efficientnet_b0", num_classes=5)


def test_auto_takes_attention_and_mlp_of_a_vit(vit: nn.Module) -> None:
    block = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]
    assert names(vit) == [f"blocks.{i}.{layer}" for i in range(2) for layer in block]


def test_auto_takes_dense_convolutions_of_a_cnn(resnet: nn.Module, efficientnet: nn.Module) -> None:
    chosen = names(resnet)
    assert "fc" not in chosen
    assert not any(n.startswith("conv1.") for n in chosen)
    assert {"layer1.0.conv1", "layer1.0.conv2", "layer4.1.conv3", "layer2.0.downsample.1"} <= set(chosen)
    chosen = names(efficientnet)
    assert "conv_stem" not in chosen
    assert not any(".se." in n or "conv_dw" in n for n in chosen)
    assert {"blocks.1.0.conv_pw", "blocks.6.0.conv_pwl", "conv_head"} <= set(chosen)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "convnext_atto", "mobilevit_xxs", "maxvit_rmlp_pico_rw_256"]
)
def test_auto_leaves_stem_head_gates_and_bias_networks_alone(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    chosen = names(model)
    assert chosen
    assert not set(chosen) & set(head_layers(model))
    assert not any(part in n for n in chosen for part in ("stem", "patch_embed", ".se.", "rel_pos"))


def test_keywords_take_what_they_say_and_never_the_head(resnet: nn.Module, vit: nn.Module) -> None:
    convs = names(resnet, target_modules="all-conv")
    assert "conv1.0" in convs
    assert "fc" not in convs
    assert set(names(vit, target_modules="all-linear")) == set(names(vit))
    assert "patch_embed.proj" in names(vit, target_modules="all")
    with pytest.raises(TargetError, match="leaves no layer"):
        names(resnet, target_modules="all-linear")


def test_lists_match_whole_names_and_endings(vit: nn.Module) -> None:
    assert names(vit, target_modules=["attn.qkv"]) == ["blocks.0.attn.qkv", "blocks.1.attn.qkv"]
    assert names(vit, target_modules=["blocks.1.mlp.fc1", "qkv"]) == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
        "blocks.1.mlp.fc1",
    ]


def test_a_regular_expression_matches_whole_names(vit: nn.Module) -> None:
    assert names(vit, target_modules=r"blocks\.1\..*fc\d") == ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]
    with pytest.raises(ConfigError, match="not a regular expression"):
        names(vit, target_modules="blocks.(")


def test_exclude_wins(vit: nn.Module) -> None:
    assert names(vit, exclude_modules=["blocks.0.attn.qkv", "mlp.fc1", "mlp.fc2"]) == [
        *("blocks.0.attn.proj", "blocks.1.attn.qkv", "blocks.1.attn.proj"),
    ]
    with pytest.raises(TargetError, match=r'exclude_modules: no layer matches "mpl.fc1".*did you mean "mlp.fc1"'):
        names(vit, exclude_modules=["mpl.fc1"])


def test_a_typo_is_an_error_even_when_the_rest_matches(vit: nn.Module) -> None:
    with pytest.raises(
        TargetError, match=r'no layer matches "atn.qkv" in VisionTransformer; did you mean "attn.qkv"\? \(2 layers\)'
    ):
        names(vit, target_modules=["attn.proj", "atn.qkv"])


def test_naming_a_module_without_a_weight_names_the_layers_inside(vit: nn.Module) -> None:
    with pytest.raises(TargetError, match=r'"attn" is 2 module\(s\) of class Attention.*"blocks.0.attn.qkv"'):
        names(vit, target_modules=["attn"])
    with pytest.raises(TargetError, match=r'of class LayerNorm, .* are trained by norm="affine"'):
        names(vit, target_modules=["norm1"])


def test_the_head_is_low_rank_only_when_named_in_full(resnet: nn.Module) -> None:
    model = nn.Sequential(resnet)
    model.get_classifier = resnet.get_classifier  # type: ignore[assignment]
    with pytest.raises(TargetError, match="only the classifier head"):
        names(model, target_modules=["fc"], r=2)
    assert names(resnet, target_modules=["fc"], r=2) == ["fc"]
    vl.apply_lora(model, vl.LoraConfig(r=2, bias="none", target_modules=["0.fc"]))
    assert set(vl.adapter_parameters(model, "default")) == {"A", "B"}
    vl.remove(model)


def test_parts_of_a_fused_layer(vit: nn.Module) -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5).eval()
    x = torch.randn(2, 3, 224, 224)
    vl.apply_lora(model, vl.LoraConfig(r=4, target_modules=["attn.qkv[q,v]"], modules_to_save="none"))
    for group in vl.adapter_parameters(model, "default").values():
        for parameter in group.values():
            torch.nn.init.normal_(parameter, std=0.1)
    layer = model.blocks[0].attn.qkv
    change = (layer.effective("weight") - layer.base_tensor("weight")).view(3, 192, 192)
    assert [part.abs().max() > 0 for part in change] == [True, False, True]
    assert [int(torch.linalg.matrix_rank(part)) for part in change] == [4, 0, 4]
    with torch.no_grad():
        y = model(x)
        vl.merge(model)
        torch.testing.assert_close(model(x), y, atol=1e-5, rtol=1e-4)


def test_parts_are_refused_where_the_rows_are_not_known(vit: nn.Module) -> None:
    with pytest.raises(TargetError, match="has the parts q, k, v, not 'w'"):
        names(vit, target_modules=["attn.qkv[w]"])
    with pytest.raises(TargetError, match="not a fused layer"):
        names(vit, target_modules=["mlp.fc1[q]"])
    with pytest.raises(TargetError, match="not a layer name with parts"):
        names(vit, target_modules=["attn.qkv[q"])
    with torch.device("meta"):
        interleaved = timm.create_model("levit_128s")
    with pytest.raises(TargetError, match=r"target it whole|not a fused layer|owns no weight"):
        names(interleaved, target_modules=["attn.qkv[q]"])


def test_rank_and_alpha_patterns(vit: nn.Module) -> None:
    config = vl.LoraConfig(
        r=4, lora_alpha=8, rank_pattern={"mlp.fc1": 2, r"blocks\.1\..*": 3}, alpha_pattern={"qkv": 2}
    )
    sites = {site.name: site for site in select(vit, config)}
    assert {n: s.rank for n, s in sites.items()} == {
        **{"blocks.0.attn.qkv": 4, "blocks.0.attn.proj": 4, "blocks.0.mlp.fc1": 2, "blocks.0.mlp.fc2": 4},
        **{"blocks.1.attn.qkv": 3, "blocks.1.attn.proj": 3, "blocks.1.mlp.fc1": 2, "blocks.1.mlp.fc2": 3},
    }
    assert sites["blocks.0.attn.qkv"].scale == 0.5
    assert sites["blocks.0.mlp.fc1"].scale == 4
    with pytest.raises(TargetError, match=r'rank_pattern: no adapted layer matches "mlp.fc3"; did you mean'):
        select(vit, vl.LoraConfig(rank_pattern={"mlp.fc3": 2}))


def test_rslora_scales_by_the_root_of_the_rank(vit: nn.Module) -> None:
    assert {s.scale for s in select(vit, vl.LoraConfig(r=16, lora_alpha=8, use_rslora=True))} == {2.0}
    assert {s.scale for s in select(vit, vl.LoraConfig(r=16, lora_alpha=8))} == {0.5}


def test_a_rank_larger_than_the_layer_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(TargetError, match="rank 8 at most, r=9 is larger"):
        names(model, target_modules=["0"], r=9)
    with pytest.raises(
        TargetError, match=r"at r=8 the change has more parameters than the weight; set rank_pattern=\{\"0\": 5\}"
    ):
        names(model, target_modules=["0"], r=8)
    with pytest.raises(TargetError, match="every low-rank change is larger than the layer"):
        names(model, target_modules=["1"], r=1)
    assert names(model, target_modules=["0"], r=5) == ["0"]


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "resnext50_32x4d", "mobilenetv3_small_050", "vit_tiny_patch16_224"]
)
def test_a_change_never_has_more_parameters_than_the_weight(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    weights = dict(model.named_parameters())
    vl.apply_lora(model, vl.LoraConfig(r=64))
    for layer in {n.rpartition(".")[0] for n in weights}:
        changes = [
            p
            for n, p in model.named_parameters()
            if n.startswith(f"{layer}.adapters.default.weight.") and n[-1] in "AB"
        ]
        assert sum(p.numel() for p in changes) <= weights.get(f"{layer}.weight", torch.empty(0)).numel()


def test_small_layers_met_by_a_keyword_keep_the_scale_at_a_smaller_rank(efficientnet: nn.Module) -> None:
    sites = select(efficientnet, vl.LoraConfig(r=32, lora_alpha=32))
    assert min(site.rank for site in sites) < 32
    assert {site.scale for site in sites} == {1.0}


@pytest.mark.parametrize(
    ("name", "head"),
    [
        *(("resnet18", ["fc"]), ("vit_tiny_patch16_224", ["head"]), ("convnext_atto", ["head.fc"])),
        *(("deit_tiny_distilled_patch16_224", ["head", "head_dist"]), ("resnetv2_50x1_bit", ["head.fc"])),
    ],
)
def test_heads_are_found(name: str, head: list[str]) -> None:
    with torch.device("meta"):
        assert head_layers(timm.create_model(name)) == head
        assert head_layers(timm.create_model(name, num_classes=0)) == []


def test_heads_of_other_models_are_found_by_the_usual_names() -> None:
    import torchvision

    with torch.device("meta"):
        assert head_layers(torchvision.models.resnet18()) == ["fc"]
        assert head_layers(torchvision.models.mobilenet_v2()) == ["classifier.1"]
        assert head_layers(torchvision.models.vit_b_16()) == ["heads.head"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("r", 0), ("r", -1), ("r", 2.5), ("r", "8"), ("r", True), ("lora_alpha", 0), ("lora_alpha", float("nan"))),
        *(("lora_dropout", -1), ("lora_dropout", 1), ("variant", "lroa"), ("norm", "train"), ("bias", "some")),
        *(("target_modules", 3), ("modules_to_save", "head"), ("rank_pattern", {"a": 0}), ("rank_pattern", {"(": 1})),
    ],
)
def test_settings_that_cannot_work_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match="rank_pattern" if field == "rank_pattern" else field):
        vl.LoraConfig(**{field: value})  # type: ignore[arg-type]


def test_a_config_survives_plain_data() -> None:
    config = vl.LoraConfig(r=3, target_modules=["a"], rank_pattern={"a": 2}, norm="stats")
    assert vl.LoraConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="has no field 'lora_alhpa'; did you mean \"lora_alpha\""):
        vl.LoraConfig.from_dict({"lora_alhpa": 3})


def test_a_name_given_as_a_text_is_told_from_a_pattern(vit: nn.Module) -> None:
    with pytest.raises(TargetError, match=r'"attn.qkv" is the end of 2 of them .*; write \["attn.qkv"\]'):
        names(vit, target_modules="attn.qkv")


@pytest.mark.parametrize("typo", ["al-linear", "all-linaer"])
def test_a_misspelt_keyword_is_guessed(vit: nn.Module, typo: str) -> None:
    with pytest.raises(TargetError, match='did you mean "all-linear"'):
        names(vit, target_modules=typo)


@pytest.mark.parametrize("targets", ["auto", "all-linear", "all"])
def test_a_rank_beyond_every_layer_is_refused(vit: nn.Module, targets: str) -> None:
    assert names(vit, r=100, target_modules=targets)
    with pytest.raises(TargetError, match=r"r=193 is more than any layer has; .* a matrix of rank 192"):
        names(vit, r=193, target_modules=targets)


@pytest.mark.parametrize("targets", [["attn.qkv", "blocks.0.attn.qkv[q]"], ["blocks.0.attn.qkv[q]", "attn.qkv"]])
def test_a_whole_layer_holds_its_parts_in_any_order(vit: nn.Module, targets: list[str]) -> None:
    assert [site.parts for site in select(vit, vl.LoraConfig(r=2, target_modules=targets))] == [{}, {}]


def test_parts_of_a_layer_add_up(vit: nn.Module) -> None:
    sites = select(vit, vl.LoraConfig(r=2, target_modules=["attn.qkv[q]", "attn.qkv[v,q]"]))
    assert [list(site.parts) for site in sites] == [["q", "v"]] * 2


def test_a_part_is_not_excluded(vit: nn.Module) -> None:
    with pytest.raises(TargetError, match=r"leaves out whole layers, not parts of blocks\.0\.attn\.qkv"):
        names(vit, target_modules=["attn.qkv", "attn.proj"], exclude_modules=["attn.qkv[k]"])
