"""Starting values: the function stays, the base stays, the file is plain LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layer_kinds import LAYERS, RANKS, adapted, build, cast, config_of, seat, stir
from torch import Tensor, nn
from torch.testing import assert_close
from transformers.pytorch_utils import Conv1D

import visionlora as vl
from visionlora.config import Init
from visionlora.errors import ConfigError, StateError, TargetError

SPLITS: list[Init] = ["pissa", "olora", "soma"]
KINDS = [k for k in LAYERS if ("lora", k) in RANKS]


def convs(groups: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    layers = (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=groups), nn.ReLU(), nn.Conv2d(8, 12, 1))
    return nn.Sequential(*layers).double().eval()


def images(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(8, 8, generator=generator, dtype=torch.float64) * torch.tensor([8, 4, 2, 1, 0.1, 0.1, 0.1, 0.1])
    draws = [torch.randn(2, 8, 6, 5, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [torch.einsum("ij,njhw->nihw", mix.double(), draw) for draw in draws]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_start_from_the_weight_changes_no_bit(kind: str, init: Init, dtype: torch.dtype) -> None:
    model, x = build(kind, dtype)
    before, weights = model(x), copy.deepcopy(model.state_dict())
    vl.apply_lora(model, config_of("lora", kind, r=RANKS["lora", kind], init_lora_weights=init))
    assert torch.equal(model(cast(x, dtype)), before)
    assert all(p.any() for n, p in seat(model)[2].named_parameters() if n.endswith("B"))
    vl.remove(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in weights.items())


@pytest.mark.parametrize("init", SPLITS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_output_is_that_of_the_dense_weight(kind: str, init: Init) -> None:
    model, x = adapted("lora", kind, init_lora_weights=init)
    stir(model)
    path, _, delta = seat(model)
    base, geometry = vl.base_state_dict(model)[path], delta.geometry
    dense = base + geometry.stored(delta.change(geometry.canonical(base)))
    twin = vl.remove(copy.deepcopy(model))
    assert_close(model(x), torch.func.functional_call(twin, {path: dense}, x))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(model(x).square().sum(), parameters))


@pytest.mark.parametrize("init", SPLITS)
@pytest.mark.parametrize("kind", ["linear", "conv_3x3", "conv_grouped", "std_conv2d"])
def test_the_parts_of_the_weight_are_those_of_the_papers(kind: str, init: Init) -> None:
    model, _ = adapted("lora", kind, init_lora_weights=init)
    path, _, delta = seat(model)
    W = delta.geometry.canonical(vl.base_state_dict(model)[path])
    for i, weight in enumerate(W.reshape(delta.geometry.groups, -1, delta.geometry.taps)):
        A = delta.A.detach().reshape(delta.geometry.groups, delta.rank, -1)[i]
        B = delta.B.detach().reshape(delta.geometry.groups, -1, delta.rank)[i]
        U, S, V = torch.linalg.svd(weight, full_matrices=False)
        parts = {"pissa": slice(0, delta.rank), "soma": slice(len(S) - delta.rank, len(S))}
        if init == "olora":
            Q, R = torch.linalg.qr(weight)
            expected = Q[:, : delta.rank] @ R[: delta.rank]
        else:
            expected = U[:, parts[init]] * S[parts[init]] @ V[parts[init]]
        assert_close(delta.scale * B @ A, expected)


@pytest.mark.parametrize("init", SPLITS)
@pytest.mark.parametrize("kind", ["linear", "conv_3x3", "conv_grouped", "attention_in_parts", "embedding"])
@torch.no_grad()
def test_the_file_is_plain_lora_against_the_original_base(kind: str, init: Init, tmp_path: Path) -> None:
    model, x = adapted("lora", kind, init_lora_weights=init)
    stir(model)
    vl.save_adapter(model, tmp_path / "a")
    twin = vl.remove(copy.deepcopy(model))
    vl.load_adapter(twin, tmp_path / "a", name="again")
    vl.activate(twin, "again")
    assert_close(twin(x), model(x), rtol=1e-9, atol=1e-9)
    record = vl.read_adapter(tmp_path / "a").record["plan"]
    assert record["config"]["init_lora_weights"] == "default"
    assert {entry["rank"] for entry in record["layers"].values()} == {2 * RANKS["lora", kind]}


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped conv"])
@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_random_starts_have_their_distribution(init: Init, kind: str) -> None:
    groups, r = 4 if kind == "grouped conv" else 1, 8
    layer = nn.Linear(900, 64) if kind == "linear" else nn.Conv2d(100 * groups, 64, 3, groups=groups)
    vl.apply_lora(nn.Sequential(layer), vl.LoraConfig(r=r, target_modules=["0"], init_lora_weights=init))
    delta = layer.adapters["default"]["weight"]  # type: ignore[operator, union-attr]
    assert not delta.B.any()
    for A in delta.A.detach().view(groups, r, 900):
        if init == "orthogonal":
            assert_close(A @ A.T, torch.eye(r), atol=1e-5, rtol=0)
        elif init == "gaussian":
            assert A.std() == pytest.approx(r**-0.5, rel=0.05)  # variance 1 / r, Hu et al. 2021
            assert A.abs().max() > 2.5 * r**-0.5
        else:
            assert A.abs().max() == pytest.approx(900**-0.5, rel=0.02)  # uniform, as nn.Linear starts
            assert A.std() == pytest.approx((3 * 900) ** -0.5, rel=0.05)


@pytest.mark.parametrize(("init", "variant"), [("pissa", "dora"), ("olora", "fa"), ("soma", "ia3"), ("eva", "loha")])
def test_a_start_that_a_variant_cannot_take_is_refused(init: Init, variant: str) -> None:
    with pytest.raises(ConfigError, match=f'init_lora_weights="{init}" starts the variants'):
        vl.LoraConfig(init_lora_weights=init, variant=variant)  # type: ignore[arg-type]


@pytest.mark.parametrize("groups", [1, 2])
def test_directions_of_the_data_are_those_of_the_patches(groups: int) -> None:
    model = convs(groups)
    config = vl.LoraConfig(r=3, target_modules=["0", "2"], init_lora_weights="eva", modules_to_save="none")
    vl.apply_lora(model, config)
    before = model(images()[0])
    shares = vl.fit_to_data(model, images())
    assert torch.equal(model(images()[0]), before)
    padded = nn.functional.pad(torch.cat(images()), (1, 1, 1, 1), mode="reflect")
    patches = nn.functional.unfold(padded, 3).transpose(1, 2).reshape(-1, groups, 72 // groups)
    for group in range(groups):
        S = torch.linalg.svdvals(patches[:, group])
        A = model[0].adapters["default"]["weight"].A.detach().reshape(groups, 3, -1)[group]
        assert_close(A @ A.T, torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0)
        assert (patches[:, group] @ A.T).square().sum() >= 0.998 * S[:3].square().sum()
    if groups == 1:
        assert shares["0"] == pytest.approx(float(S[:3].square().sum() / S.square().sum()), rel=1e-2)


@pytest.mark.parametrize("make", [lambda: nn.Linear(8, 12), lambda: Conv1D(12, 8)], ids=["linear", "conv1d"])
def test_directions_of_tokens_are_their_principal_ones(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make()).double()
    vl.apply_lora(model, vl.LoraConfig(r=3, target_modules=["0"], init_lora_weights="eva", modules_to_save="none"))
    batches = [batch.flatten(2).mT for batch in images()]  # (2, 30, 8)
    shares = vl.fit_to_data(model, batches)
    tokens, A = torch.cat(batches).reshape(-1, 8), seat(model)[2].A.detach()
    _, S, V = torch.linalg.svd(tokens, full_matrices=False)
    assert_close(V[:3] @ A.T @ A, V[:3], atol=1e-5, rtol=0)  # the same plane
    assert shares["0"] == pytest.approx(float(S[:3].square().sum() / S.square().sum()), rel=1e-6)


def test_directions_need_a_fresh_low_rank_adapter_and_data() -> None:
    model = convs()
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["0", "2"], modules_to_save="none"))
    with pytest.raises(StateError, match="no images"):
        vl.fit_to_data(model, [])
    with pytest.raises(StateError, match="nothing but zeros"):
        vl.fit_to_data(model, [torch.zeros(1, 8, 5, 5, dtype=torch.float64)])
    stir(model)
    with pytest.raises(StateError, match="before it is trained"):
        vl.fit_to_data(model, images())
    assert not model[0]._forward_pre_hooks


def test_a_layer_that_hides_its_inputs_is_refused() -> None:
    model, x = build("std_conv2d")
    vl.apply_lora(model, config_of("lora", "std_conv2d", r=2, init_lora_weights="eva"))
    with pytest.raises(TargetError, match="exclude_modules"):
        vl.fit_to_data(model, [x])


def test_ranks_go_where_the_energy_is_within_the_budget() -> None:
    model = convs()
    config = vl.LoraConfig(r=3, target_modules=["0", "2"], modules_to_save="none", bias="none")
    uniform = vl.summary(vl.apply_lora(copy.deepcopy(model), config)).parameters
    spent = vl.allocate_ranks(model, config, images())
    assert not vl.adapter_names(model)
    vl.apply_lora(model, spent)
    table = vl.summary(model)
    assert 0.7 * uniform <= table.parameters <= uniform
    assert {row.scale for row in table.rows} == {config.scale(3)}
    assert max(row.rank for row in table.rows) <= 6
    less = vl.allocate_ranks(vl.remove(model), config, images(), budget=uniform // 2)
    assert vl.summary(vl.apply_lora(model, less)).parameters <= uniform // 2
    with pytest.raises(ConfigError, match="does not pay"):
        vl.allocate_ranks(vl.remove(model), config, images(), budget=1)
