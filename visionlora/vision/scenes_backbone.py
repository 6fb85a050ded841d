"""scenes_resnet: a small timm ResNet that knows the day pictures of visionlora.data.scenes; its weights ship here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet

from visionlora.data.scenes import CLASSES

__all__ = ["CLASSES", "WEIGHTS", "scenes_resnet"]

WEIGHTS = Path(__file__).parent / "assets" / "scenes_resnet.safetensors"
"""The weights in the package, float32; scripts/train_scenes_backbone.py makes them."""

default_cfgs = generate_default_cfgs(
    {
        "scenes_resnet.day": {
            "file": str(WEIGHTS),
            "num_classes": len(CLASSES),
            "input_size": (3, 64, 64),
            "pool_size": (2, 2),
            "crop_pct": 1.0,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "conv1.0",
            "classifier": "fc",
            "label_names": list(CLASSES),
            "license": "apache-2.0",
        }
    }
)


@register_model
def scenes_resnet(pretrained: bool = False, **kwargs: Any) -> ResNet:
    """Return the network; pretrained=True needs no network connection. kwargs are timm's."""
    shape = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (32, 48, 80, 128)}
    stem = {"stem_width": 8, "stem_type": "deep", "avg_down": True}
    model: ResNet = build_model_with_cfg(ResNet, "scenes_resnet", pretrained, **{**shape, **stem, **kwargs})
    return model
