"""Language tasks on transformers models with Lightning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionlora.text.datamodule import TextData as TextData
    from visionlora.text.families import create_backbone as create_backbone
    from visionlora.text.families import untie as untie
    from visionlora.text.loading import load_model as load_model
    from visionlora.text.loading import load_tokenizer as load_tokenizer
    from visionlora.text.module import TextTask as TextTask
    from visionlora.text.renamed import load_older_adapter as load_older_adapter
    from visionlora.text.several import TaskModels as TaskModels

# looked up when first used: transformers is needed for none of the names, only for what they do
_WHERE = {
    "TextTask": "visionlora.text.module",
    "TextData": "visionlora.text.datamodule",
    "TaskModels": "visionlora.text.several",
    "create_backbone": "visionlora.text.families",
    "untie": "visionlora.text.families",
    "load_model": "visionlora.text.loading",
    "load_tokenizer": "visionlora.text.loading",
    "load_older_adapter": "visionlora.text.renamed",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'visionlora.text' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
