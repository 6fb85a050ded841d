"""The fingerprint that loading compares: remembered, and never older than the tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import visionlora as vl
from visionlora.core.digest import known_digest, tensor_digest
from visionlora.errors import BaseMismatchError


def counted(t: Tensor) -> None:
    with torch.no_grad():
        t[0] += 1


def through_data(t: Tensor) -> None:
    t.data.mul_(1.5)


def through_numpy(t: Tensor) -> None:
    t.detach().numpy()[:] = 0


def replaced(t: Tensor) -> None:
    t.data = torch.zeros_like(t)


@pytest.mark.parametrize("write", [counted, through_data, through_numpy, replaced])
def test_a_tensor_that_was_written_to_gets_another_digest(write: object) -> None:
    t = nn.Parameter(torch.randn(200, 300))
    before = known_digest("w", t)
    assert before == tensor_digest("w", t)
    write(t)  # type: ignore[operator]
    assert known_digest("w", t) == tensor_digest("w", t) != before


def test_a_digest_is_of_its_name_and_type() -> None:
    t = torch.randn(3, 4)
    assert known_digest("a", t) != known_digest("b", t)
    assert known_digest("a", t) != known_digest("a", t.double())
    assert known_digest("a", t.t()) == tensor_digest("a", t.t())


@pytest.mark.parametrize("shape", [(0,), (1,), ()])
def test_small_tensors_have_digests(shape: tuple[int, ...]) -> None:
    t = torch.zeros(shape)
    assert known_digest("a", t) == known_digest("a", t) == tensor_digest("a", t)


def test_inference_tensors_have_digests() -> None:
    with torch.inference_mode():
        t = torch.randn(4)
    assert known_digest("a", t) == tensor_digest("a", t)


def test_an_adapter_is_refused_once_its_base_changed(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 4))
    vl.apply_lora(net, vl.LoraConfig(r=2, target_modules=["0"]), name="day")
    vl.save_adapter(net, tmp_path / "day", name="day")
    vl.remove(net)
    vl.load_adapter(net, tmp_path / "day", name="a")
    vl.load_adapter(net, tmp_path / "day", name="b")
    net[0].bias.data.add_(1)
    with pytest.raises(BaseMismatchError):
        vl.load_adapter(net, tmp_path / "day", name="c")
