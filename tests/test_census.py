"""Every model module of timm: what an adapter takes of it, and that it keeps every promise there."""

from __future__ import annotations

import sys

import pytest
import timm
import torch
from _pytest.mark import ParameterSet
from families import FAMILIES, NETS, Net
from proof import CONFIG, check_choice, prove
from torch import nn

import visionlora as vl
from visionlora.registry import adapter_plan
from visionlora.targets import head_layers


def marked(slow: set[str]) -> list[ParameterSet]:
    """Return every backbone, some of them for the slow tests."""
    return [pytest.param(net, id=net.name, marks=[pytest.mark.slow] * (net.name in slow)) for net in NETS]


@pytest.fixture(scope="module", params=marked({net.name for nets in FAMILIES.values() for net in nets[1:]}))
def shallow(request: pytest.FixtureRequest) -> nn.Module:
    """A shallow model for images of full size, without numbers."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(request.param.name, num_classes=7, **request.param.small)
    return model.eval()


def test_every_model_module_of_timm_is_here() -> None:
    theirs = {m for m in timm.list_modules() if f"timm.models.{m}" in sys.modules}  # and not those others registered
    assert set(FAMILIES) == theirs
    for module, nets in FAMILIES.items():
        assert {net.name for net in nets} <= set(timm.list_models(module=module))


def test_auto_takes_layers_that_see_the_image_and_no_stem_gate_or_head(shallow: nn.Module) -> None:
    keys, x = set(shallow.state_dict()), torch.empty(2, *shallow.pretrained_cfg["input_size"], device="meta")  # type: ignore[index, misc]
    vl.apply_lora(shallow, CONFIG)
    sites = {site.layer for site in adapter_plan(shallow, "default").sites}
    assert sites
    assert not sites & set(head_layers(shallow))
    assert set(vl.base_state_dict(shallow)) == keys
    check_choice(shallow, x)
    vl.remove(shallow)


def test_all_that_depends_on_the_number_of_classes_is_head(shallow: nn.Module) -> None:
    if not head_layers(shallow):
        pytest.skip("a backbone without a head")
    before = {key: t.shape for key, t in shallow.state_dict().items()}
    shallow.reset_classifier(11)  # type: ignore[operator]
    after = {key: t.shape for key, t in shallow.state_dict().items()}
    follow = {key.rpartition(".")[0] for key in after if after[key] != before.get(key)}
    assert follow
    assert follow <= set(head_layers(shallow))


@pytest.mark.parametrize("net", marked({net.name for net in NETS if net.slow}))
def test_an_adapter_keeps_every_promise(net: Net) -> None:
    prove(net.create_small(), torch.randn(2, 3, net.size, net.size, dtype=torch.float64))
