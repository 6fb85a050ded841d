"""What all tests share: one thread, a fixed seed, no network check of albumentations."""

from __future__ import annotations

import logging
import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import; without it a hub out of reach is tried for 40 s
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from cli_place import errors, here, place, run, trained  # noqa: F401  (fixtures)


def pytest_collection_finish() -> None:
    # pytest hooks its handlers into every logger that does not propagate, six times a test; torch alone has 58
    for logger in logging.Logger.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.propagate = True


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.default_generator.manual_seed(0)  # torch.manual_seed also formats a traceback for each absent kind of device
