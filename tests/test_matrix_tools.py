"""Every variant on every layer kind under compile, export, checkpointing, the meta device and in other processes."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layer_kinds import CASES, LAYERS, RANKS, adapted, build, config_of, stir
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import visionlora as vl
from visionlora.adapt import attach_plan
from visionlora.plan import Plan
from visionlora.registry import adapter_plan, adapter_state
from visionlora.variants.vera import projection

EVERY = pytest.mark.parametrize(("variant", "kind"), CASES)
FEW = [case for case in CASES if case[0] == "lora" or case[1] == "conv_3x3"]


@EVERY
def test_functional_call_runs_on_given_tensors(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    twin, _ = adapted(variant, kind)
    stir(twin)
    assert_close(torch.func.functional_call(model, dict(twin.state_dict()), x), twin(x))


@EVERY
def test_activation_checkpointing_gives_the_same_gradients(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.autograd.grad(model(x).square().sum(), parameters)
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), parameters)
    assert_close(again, plain)


@EVERY
def test_a_model_on_the_meta_device_takes_adapters(variant: str, kind: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(LAYERS[kind].make())
    vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind]))
    real, _ = adapted(variant, kind, torch.float32)
    shapes = [{k: tuple(t.shape) for k, t in m.state_dict().items()} for m in (model, real)]
    assert shapes[0] == shapes[1]


def compiled_and_exported(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, torch.float32)
    stir(model)
    with torch.no_grad():
        y = model(x)
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
        assert_close(torch.export.export(model, (x,)).module()(x), y)
    torch._dynamo.reset()


@pytest.mark.parametrize(("variant", "kind"), FEW)
def test_models_compile_without_graph_breaks_and_export(variant: str, kind: str) -> None:
    compiled_and_exported(variant, kind)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "kind"), [case for case in CASES if case not in FEW])
def test_the_rest_compiles_and_exports_as_well(variant: str, kind: str) -> None:
    compiled_and_exported(variant, kind)


_READ_AGAIN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from layer_kinds import build
import visionlora as vl
torch.set_grad_enabled(False)
for folder in sys.argv[2:]:
    kind = folder.rpartition("+")[2]
    torch.manual_seed(0)
    model, x = build(kind)
    vl.load_adapter(model, folder, name="again")
    vl.activate(model, "again")
    torch.save(model(x), f"{folder}/output.pt")
"""


@torch.no_grad()  # attention takes another way where a parameter wants a gradient
def test_adapters_are_the_same_in_a_fresh_process(tmp_path: Path) -> None:
    expected = {}
    for variant, kind in FEW:
        torch.manual_seed(0)
        model, x = build(kind)
        vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind]))
        stir(model)
        folder = vl.save_adapter(model, tmp_path / f"{variant}+{kind}")
        expected[str(folder)] = model(x)
    subprocess.run([sys.executable, "-c", _READ_AGAIN, str(Path(__file__).parent), *expected], check=True)
    for folder, y in expected.items():
        assert torch.equal(torch.load(f"{folder}/output.pt"), y), folder


@EVERY
def test_the_numbers_of_an_adapter_make_it_again(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    twin = vl.remove(copy.deepcopy(model))
    plan = Plan.from_record(twin, adapter_plan(model, "default").to_record())
    attach_plan(twin, plan, adapter_state(model, "default"), name="again")
    vl.activate(twin, "again")
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))


def test_vera_draws_the_same_projections_everywhere() -> None:
    # fixed numbers: a file holds d and b alone, so that another A or B would silently make it another adapter
    first = torch.tensor([[-0.46174338, -0.54214406, -0.11069585], [0.71967328, 0.78105569, -0.02970090]])
    assert_close(projection("A", (2, 3)), first)
