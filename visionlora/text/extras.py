"""Optional packages of the text path, imported when first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from visionlora.errors import ConfigError

__all__ = ["need"]


def need(package: str) -> Any:
    """Return an imported package of the extra "text". Raises ConfigError with the command that installs it."""
    try:
        return import_module(package)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != package.partition(".")[0]:
            raise  # the package is there and lacks one of its own
        raise ConfigError(f'text needs {package}, which is not installed: pip install "visionlora[text]"') from None
