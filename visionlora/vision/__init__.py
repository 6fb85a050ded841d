"""Image classification on timm backbones with Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionlora.vision.backbone import create_backbone as create_backbone
    from visionlora.vision.backbone import data_config as data_config
    from visionlora.vision.datamodule import ImageFolderData as ImageFolderData
    from visionlora.vision.loading import load_model as load_model
    from visionlora.vision.loading import load_transform as load_transform
    from visionlora.vision.module import ImageClassifier as ImageClassifier

# looked up when first used: loading a model needs no Lightning
_WHERE = {
    "ImageClassifier": "visionlora.vision.module",
    "ImageFolderData": "visionlora.vision.datamodule",
    "create_backbone": "visionlora.vision.backbone",
    "data_config": "visionlora.vision.backbone",
    "load_model": "visionlora.vision.loading",
    "load_transform": "visionlora.vision.loading",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'visionlora.vision' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
