"""Every model module of timm: what an adapter takes of it, and that it keeps every promise there."""

from __future__ import annotations

import pytest
import timm
import torch
from _pytest.mark import ParameterSet
from families import FAMILIES, NETS, Net
from proof import CONFIG, check_choice, prove
from torch import nn

import visionlora as vl
from visionlora.adapt import adapter_plan
from visionlora.targets import head_layers


def on_meta(net: Net) -> tuple[nn.Module, torch.Tensor]:
    """Return a shallow model that holds no numbers, and an image of the size it was made for."""
    with torch.device("meta"):
        model = timm.create_model(net.name, num_classes=7, **net.small).eval()
        return model, torch.empty(2, *model.pretrained_cfg["input_size"])


def marked(slow: set[str]) -> list[ParameterSet]:
    """Return every backbone, some of them for the slow tests."""
    return [pytest.param(net, id=net.name, marks=[pytest.mark.slow] * (net.name in slow)) for net in NETS]


def test_every_model_module_of_timm_is_here() -> None:
    assert set(FAMILIES) == set(timm.list_modules())
    for module, nets in FAMILIES.items():
        assert {net.name for net in nets} <= set(timm.list_models(module=module))


@pytest.mark.parametrize("net", marked({net.name for nets in FAMILIES.values() for net in nets[1:]}))
def test_auto_takes_layers_that_see_the_image_and_no_stem_gate_or_head(net: Net) -> None:
    model, x = on_meta(net)
    keys = set(model.state_dict())
    vl.apply_lora(model, CONFIG)
    sites = {site.layer for site in adapter_plan(model, "default").sites}
    assert sites
    assert not sites & set(head_layers(model))
    assert set(vl.base_state_dict(model)) == keys
    check_choice(model, x)


@pytest.mark.parametrize("net", [nets[0] for nets in FAMILIES.values()], ids=lambda net: net.name)
def test_all_that_depends_on_the_number_of_classes_is_head(net: Net) -> None:
    model, _ = on_meta(net)
    before = {key: t.shape for key, t in model.state_dict().items()}
    model.reset_classifier(11)
    after = {key: t.shape for key, t in model.state_dict().items()}
    follow = {key.rpartition(".")[0] for key in after if after[key] != before.get(key)}
    assert follow
    assert follow <= set(head_layers(model))


@pytest.mark.parametrize("net", marked({net.name for net in NETS if net.slow}))
def test_an_adapter_keeps_every_promise(net: Net) -> None:
    prove(net.create_small(), torch.randn(2, 3, net.size, net.size, dtype=torch.float64))
