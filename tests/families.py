"""Backbones of every model module of timm: together they hold every pair of block and layer kind timm has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
from torch import nn


@dataclass(frozen=True)
class Net:
    """A backbone of timm, the smallest image it takes, and what makes it small enough for a test."""

    name: str
    size: int
    """Side of the image, in pixels."""
    slow: bool
    """Its proof takes more than half a second of one core."""
    image: Mapping[str, int] = field(default_factory=dict)
    """Arguments that let it take an image of this size."""
    small: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that make it shallow and narrow."""

    def create(self, num_classes: int = 7) -> nn.Module:
        """Return it in full depth and width, for its small image."""
        return timm.create_model(self.name, num_classes=num_classes, **self.image)

    def create_small(self, num_classes: int = 7) -> nn.Module:
        """Return it shallow and narrow."""
        return timm.create_model(self.name, num_classes=num_classes, **self.image, **self.small)


def net(name: str, size: int = 32, **small: Any) -> Net:
    """Return a backbone that takes images of every size."""
    return Net(name, size, False, {}, small)


def sized(name: str, size: int = 32, **small: Any) -> Net:
    """Return a backbone that is built for one size of image."""
    return Net(name, size, False, {"img_size": size}, small)


def slow(of: Net) -> Net:
    """Return the backbone, marked as slow."""
    return Net(of.name, of.size, True, of.image, of.small)


VIT: dict[str, Any] = {"depth": 2, "embed_dim": 96, "num_heads": 4}
SWIN: dict[str, Any] = {"depths": (1, 2, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 4, 8), "window_size": 4}
DAVIT: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 64, 128), "num_heads": (2, 2, 2, 2)}
ONE_EACH = (1, 1, 1, 1)

FAMILIES: dict[str, tuple[Net, ...]] = {
    "beit": (sized("beit_base_patch16_224", **VIT),),
    "byoanet": (
        slow(sized("eca_botnext26ts_256")),
        slow(sized("lambda_resnet26t")),
        slow(net("eca_halonext26ts", 256)),
    ),
    "byobnet": (
        net("test_byobnet"),
        slow(net("mobileone_s0")),
        slow(net("regnetz_b16")),
        slow(net("resnet50_mlp")),
        slow(net("resnet50_clip")),
    ),
    "cait": (sized("cait_xxs24_224", depth=2),),
    "coat": (sized("coat_lite_tiny", serial_depths=ONE_EACH), slow(sized("coat_tiny", serial_depths=ONE_EACH))),
    "convit": (sized("convit_tiny", depth=2, local_up_to_layer=1),),
    "convmixer": (slow(net("convmixer_768_32")),),
    "convnext": (
        net("test_convnext"),
        net("convnext_zepto_rms"),
        slow(net("convnextv2_atto")),
        slow(net("convnextv2_tiny")),
    ),
    "cpubone": (net("cpubone_nano"),),
    "crossvit": (slow(net("crossvit_tiny_240")),),
    "csatv2": (slow(net("csatv2", 64)),),
    "cspnet": (net("cs3darknet_focus_s"), slow(net("cspresnext50"))),
    "cspnext": (net("cspnext_tiny"),),
    "davit": (net("davit_tiny", **DAVIT), slow(net("davit_base_fl", **DAVIT))),
    "deepseek_vit": (sized("deepseek_vit_412m", 56, **VIT), slow(sized("deepseek_vit_412m_align", 56, **VIT))),
    "deit": (sized("deit_tiny_patch16_224", depth=2), sized("deit_tiny_distilled_patch16_224", depth=2)),
    "densenet": (net("densenet121", block_config=ONE_EACH), slow(net("densenetblur121d"))),
    "dla": (net("dla46x_c"), slow(net("dla34")), slow(net("dla60_res2next")), slow(net("dla60_res2net"))),
    "dpn": (net("dpn48b", k_sec=ONE_EACH),),
    "edgenext": (net("edgenext_xx_small", 64, depths=(1, 1, 2, 1)),),
    "efficientformer": (slow(sized("efficientformer_l1", 224, depths=(1, 1, 1, 2))),),
    "efficientformer_v2": (slow(sized("efficientformerv2_s0", 64, depths=ONE_EACH)),),
    "efficientnet": (
        net("test_efficientnet"),
        slow(net("mobilenetv2_035")),
        slow(net("mixnet_s")),
        slow(net("mobilenet_edgetpu_v2_xs")),
        slow(net("tf_efficientnet_es")),
        slow(net("efficientnet_b0_g8_gn")),
        slow(net("efficientnet_x_b3")),
        slow(net("efficientnet_cc_b0_4e")),
    ),
    "efficientvim": (slow(net("efficientvim_m1")), slow(net("efficientvim_m1_dist"))),
    "efficientvit_mit": (net("efficientvit_b0"), slow(net("efficientvit_l1", depths=(1, *ONE_EACH)))),
    "efficientvit_msra": (slow(sized("efficientvit_m0")),),
    "eva": (
        sized("vit_tiny_patch16_dinov3_qkvb", depth=2),
        sized("eva02_tiny_patch14_224", depth=2),
        sized("vit_pe_spatial_tiny_patch16_512", depth=2),
        sized("vit_pe_core_tiny_patch16_384", depth=2),
        sized("vit_small_plus_patch16_dinov3", depth=2),
    ),
    "fasternet": (net("fasternet_t0"),),
    "fastvit": (net("fastvit_t8", layers=ONE_EACH), slow(net("fastvit_sa12"))),
    "focalnet": (slow(net("focalnet_tiny_srf")),),
    "gcvit": (slow(sized("gcvit_xxtiny", 64)),),
    "gemma4_vit": (sized("gemma4_vit_167m", 48, **VIT), slow(sized("gemma4_vit_167m_enc", 48, **VIT))),
    "ghostnet": (slow(net("ghostnet_050")), slow(net("ghostnetv2_100", 64)), slow(net("ghostnetv3_050", 64))),
    "hardcorenas": (slow(net("hardcorenas_b")),),
    "hgnet": (slow(net("hgnetv2_b0")), slow(net("hgnet_tiny"))),
    "hiera": (sized("hiera_tiny_224", stages=ONE_EACH),),
    "hieradet_sam2": (net("sam2_hiera_tiny", stages=(1, 1, 2, 1), embed_dim=24),),
    "hrnet": (slow(net("hrnet_w18_small")),),
    "iformer": (slow(net("iformer_t", 64)),),
    "inception_next": (net("inception_next_atto"),),
    "inception_resnet_v2": (slow(net("inception_resnet_v2", 80)),),
    "inception_v3": (slow(net("inception_v3", 80)),),
    "inception_v4": (slow(net("inception_v4", 80)),),
    "lcnetv2": (slow(net("lcnetv2_small")),),
    "levit": (sized("levit_128s", 64), slow(sized("levit_conv_128s", 64)), slow(sized("levit_256d", 64))),
    "lowformer": (slow(net("lowformer_b0")),),
    "mambaout": (net("test_mambaout"), net("mambaout_femto", depths=ONE_EACH)),
    "maxxvit": (sized("test_coatnet"), sized("test_maxvit"), slow(sized("coatnet_0_224"))),
    "metaformer": (net("poolformerv2_s12"), slow(net("caformer_s18"))),
    "mlp_mixer": (sized("gmlp_ti16_224"), slow(sized("gmixer_12_224")), slow(sized("resmlp_12_224"))),
    "mobilenetv3": (
        net("lcnet_035"),
        net("mobilenetv3_small_050"),
        net("mobilenetv4_conv_small_035"),
        slow(net("mobilenetv4_hybrid_medium_075")),
    ),
    "mobilenetv5": (slow(net("mobilenetv5_base")),),
    "mobilevit": (net("mobilevit_xxs"), net("mobilevitv2_050")),
    "mvitv2": (slow(sized("mvitv2_tiny")),),
    "naflexvit": (
        sized("naflexvit_base_patch16_parfac_gap", **VIT),
        sized("naflexvit_base_patch16_siglip", **VIT),
    ),
    "nasnet": (slow(net("nasnetalarge", num_features=96)),),
    "nest": (slow(sized("nest_tiny")),),
    "nextvit": (slow(net("nextvit_small")),),
    "nfnet": (net("test_nfnet"), slow(net("dm_nfnet_f0", depths=ONE_EACH))),
    "pit": (sized("pit_ti_224", depth=(1, 1, 1)),),
    "pnasnet": (slow(net("pnasnet5large")),),
    "pvt_v2": (net("pvt_v2_b0", 64, depths=ONE_EACH),),
    "qwen3_vit": (
        sized("qwen3_vit_88m", **VIT),
        sized("qwen3_vit_88m_enc", **VIT),
        slow(sized("qwen3_vit_88m_merge", **VIT)),
    ),
    "rdnet": (net("rdnet_tiny", num_init_features=16, growth_rates=(8,) * 7),),
    "regnet": (net("regnetx_002"), slow(net("regnetv_040")), slow(net("regnetv_064"))),
    "repghost": (net("repghostnet_050"),),
    "repvit": (slow(net("repvit_m1")),),
    "res2net": (slow(net("res2next50", layers=ONE_EACH)), slow(net("res2net50_14w_8s", layers=ONE_EACH))),
    "resnest": (slow(net("resnest14d")),),
    "resnet": (net("test_resnet"), slow(net("ecaresnext26t_32x4d"))),
    "resnetv2": (
        net("resnetv2_18"),
        slow(net("resnetv2_18d")),
        net("resnetv2_50", layers=ONE_EACH),
        slow(net("resnetv2_50x1_bit")),
    ),
    "rexnet": (slow(net("rexnet_100")),),
    "selecsls": (slow(net("selecsls42")),),
    "senet": (
        net("legacy_seresnet18", layers=ONE_EACH),
        slow(net("legacy_seresnext26_32x4d", layers=ONE_EACH)),
        slow(net("legacy_seresnet50", layers=ONE_EACH)),
        slow(net("legacy_senet154", layers=ONE_EACH)),
    ),
    "sequencer": (net("sequencer2d_s", layers=ONE_EACH),),
    "shvit": (slow(net("shvit_s1")),),
    "sknet": (net("skresnet18", layers=ONE_EACH), slow(net("skresnext50_32x4d", layers=ONE_EACH))),
    "starnet": (net("starnet_s050"),),
    "swiftformer": (net("swiftformer_xs", layers=ONE_EACH),),
    "swin_transformer": (sized("swin_tiny_patch4_window7_224", 64, **SWIN),),
    "swin_transformer_v2": (sized("swinv2_tiny_window16_256", 64, **SWIN),),
    "swin_transformer_v2_cr": (sized("swinv2_cr_tiny_224", 64, **SWIN),),
    "tiny_vit": (net("tiny_vit_5m_224", depths=ONE_EACH),),
    "tnt": (sized("tnt_s_legacy_patch16_224", depth=2, embed_dim=96),),
    "tresnet": (net("tresnet_m", layers=ONE_EACH),),
    "twins": (sized("twins_svt_small", depths=ONE_EACH), slow(sized("twins_pcpvt_small", depths=ONE_EACH))),
    "vgg": (slow(net("vgg11", mlp_ratio=0.125)),),
    "visformer": (sized("visformer_tiny"),),
    "vision_transformer": (
        sized("test_vit"),
        sized("test_vit3"),
        sized("vit_pwee_patch16_reg1_gap_256", depth=2),
        sized("vit_dwee_patch16_reg1_gap_256", depth=2),
        sized("vit_dpwee_patch16_reg1_gap_256", depth=2),
    ),
    "vision_transformer_hybrid": (sized("vit_tiny_r_s16_p8_224"), slow(sized("vit_small_resnet26d_224"))),
    "vision_transformer_relpos": (sized("test_vit_relpos"), slow(sized("vit_srelpos_small_patch16_224", depth=2))),
    "vision_transformer_sam": (sized("samvit_base_patch16_224", **VIT, global_attn_indexes=(1,)),),
    "vitamin": (sized("vitamin_small_224", depth=2),),
    "volo": (slow(sized("volo_d1_224", 64)),),
    "vovnet": (net("ese_vovnet19b_slim_dw"), slow(net("eca_vovnet39b"))),
    "xception": (slow(net("legacy_xception")),),
    "xception_aligned": (slow(net("xception41p")), slow(net("xception41"))),
    "xcit": (sized("xcit_nano_12_p8_224", depth=2),),
}
"""timm's model module -> its backbones, the one that stands for it first."""

NETS: tuple[Net, ...] = tuple(one for nets in FAMILIES.values() for one in nets)
