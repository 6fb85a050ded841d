"""Every variant on every layer kind under compile, export, checkpointing, the meta device and in other processes."""

from __future__ import annotations

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
from visionlora.variants.vera import projection

EVERY = pytest.mark.parametrize(("variant", "kind"), CASES)
ONE_OF_A_FORWARD = {
    *("linear", "conv1d_of_transformers", "embedding", "conv_3x3", "conv_reflect", "conv_dilated_same", "conv_grouped"),
    *("conv2d_same", "std_conv2d", "conv_transpose", "attention_in_parts", "attention_out", "bare_parameter"),
}
FEW = [(v, k) for v, k in CASES if k == "conv_3x3" or (v == "lora" and k in ONE_OF_A_FORWARD)]


@EVERY
def test_functional_call_runs_on_given_tensors(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    twin, _ = adapted(variant, kind)
    stir(twin)
    assert_close(torch.func.functional_call(model, dict(twin.state_dict()), x), twin(x))


@EVERY
def test_activation_checkpointing_gives_the_same_gradients(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind, lora_dropout=0.5)
    stir(model.train())
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    plain = torch.autograd.grad(model(x).square().sum(), parameters)
    torch.manual_seed(0)
    again = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), parameters)
    assert_close(again, plain)


@EVERY
def test_a_model_on_the_meta_device_takes_adapters(variant: str, kind: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(LAYERS[kind].make()).eval()
    vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind], lora_alpha=4))
    real, x = adapted(variant, kind, torch.float32)
    stir(real)
    y = model(x.to("meta"))
    y.sum().backward()
    vl.check_gradients(model)
    model.to_empty(device="cpu").load_state_dict(real.state_dict())
    assert y.shape == real(x).shape
    assert_close(model(x), real(x), rtol=0, atol=0)


def compiled_and_exported(variant: str, kind: str) -> None:
    model, x = adapted(variant, kind)
    stir(model)
    parameters, y = [p for p in model.parameters() if p.requires_grad], model(x)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert_close(fast, y)
    grads = torch.autograd.grad(fast.square().sum(), parameters)
    assert_close(grads, torch.autograd.grad(y.square().sum(), parameters))
    with torch.no_grad():
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
    for variant, kind in CASES:
        torch.manual_seed(0)
        model, x = build(kind)
        vl.apply_lora(model, config_of(variant, kind, r=RANKS[variant, kind]))
        stir(model)
        folder = vl.save_adapter(model, tmp_path / f"{variant}+{kind}")
        expected[str(folder)] = model(x)
    subprocess.run([sys.executable, "-c", _READ_AGAIN, str(Path(__file__).parent), *expected], check=True)
    for folder, y in expected.items():
        assert torch.equal(torch.load(f"{folder}/output.pt"), y), folder


def test_vera_draws_the_same_projections_everywhere() -> None:
    # fixed numbers: a file holds d and b alone, so that another A or B would silently make it another adapter
    first = torch.tensor([[-0.46174338, -0.54214406, -0.11069585], [0.71967328, 0.78105569, -0.02970090]])
    assert_close(projection("A", (2, 3)), first)
