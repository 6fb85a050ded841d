"""What a training step costs by formula, against real steps: FLOPs, kept bytes, peak."""

from __future__ import annotations

from copy import deepcopy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import visionlora as vl
from visionlora.analysis import ModelCost, Setting, model_cost
from visionlora.analysis.work import work
from visionlora.bench.memory import peak_bytes, saved_bytes
from visionlora.core.folding import fold_norms
from visionlora.core.orders import ORDERS, Order, forced
from visionlora.errors import ConfigError, StateError

SIZE = 12
SETTING = {"batch": 3, "channels": 8, "height": SIZE, "width": SIZE}


class Tokens(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mT


NETS: dict[str, list[nn.Module]] = {
    "linear": [Tokens(), nn.Linear(8, 24), nn.Linear(24, 40)],
    "conv": [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 3, padding=1)],
    "strided": [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)],
    "strided, odd": [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 2, stride=5)],
    "dilated": [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 3, padding=2, dilation=2)],
    "grouped": [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 3, padding=1, groups=2)],
    "reflected": [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect")],
    "same": [nn.Conv2d(8, 16, 1), nn.Conv2d(16, 24, 4, padding="same")],
    "one dimension": [nn.Flatten(2), nn.Conv1d(8, 16, 1), nn.Conv1d(16, 24, 3)],
}


def net_of(layers: list[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*deepcopy(layers))


def config(**given: object) -> vl.LoraConfig:
    return vl.LoraConfig(**{"r": 2, "target_modules": "all", "modules_to_save": "none", **given})  # type: ignore[arg-type]


def step_of(net: nn.Module, x: Tensor, order: Order | None = None):  # type: ignore[no-untyped-def]
    def forward() -> Tensor:
        with forced(order):
            return net(x).sum()

    return forward


def real(net: nn.Module, lora: vl.LoraConfig, x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = vl.apply_lora(deepcopy(net), lora)
    fold_norms(net, x[:1])
    return net.train()


def owned(net: nn.Module, x: Tensor) -> list[Tensor]:
    return [*net.parameters(), *net.buffers(), x]


def by_formula(cost: ModelCost) -> tuple[int, int]:
    flops = sum(layer.floor.flops + layer.by(layer.way).flops for layer in cost.layers)
    return flops, sum(layer.by(layer.way).saved for layer in cost.layers)


EVERY = [(kind, order, "lora") for kind in NETS for order in ORDERS]
EVERY += [(kind, order, "fa") for kind in ("linear", "strided", "grouped") for order in ORDERS]


@pytest.mark.parametrize(("kind", "order", "variant"), EVERY)
def test_flops_and_kept_bytes_of_every_order_are_those_of_a_step(kind: str, order: Order, variant: str) -> None:
    net, x = net_of(NETS[kind]), torch.randn(3, 8, SIZE, SIZE)
    cost = model_cost(net, Setting(**SETTING, order=order), config=config(variant=variant))  # type: ignore[arg-type]
    step = step_of(model := real(net, config(variant=variant), x), x, order)
    flops, saved = by_formula(cost)
    saved += 4 * 3 * 16 * SIZE**2 * (kind == "reflected")  # padding by reflection keeps its input, adapted or not
    assert (flops, saved) == (work(step).flops, saved_bytes(step, owned(model, x)))
    assert (flops, saved) == (cost.work.flops, cost.saved)
    # PyTorch's counter takes a grouped weight gradient for a dense one, and does not know addmm_ and baddbmm_
    if kind not in ("grouped", "linear") and order != "factorised":
        with FlopCounterMode(display=False) as counter:
            step().backward()
        assert counter.get_total_flops() == flops


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_moves_what_the_formula_says_and_what_casts_and_scalings_add(order: Order) -> None:
    net, x = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64)), torch.randn(4, 8, 32, 64)
    setting = Setting(4, 8, 32, 64, order=order)
    cost, model = model_cost(net, setting, config=config()), real(net, config(), x)
    y = torch.zeros(4, 8, 32, 64, requires_grad=True)
    loss = work(lambda: y.square().sum()).moved_bytes  # the gradient of a sum alone would be one number
    with forced(order):
        found = work(lambda: model(x).square().sum()).moved_bytes - loss
    assert cost.floor.moved + cost.extra.moved <= found <= 1.05 * (cost.floor.moved + cost.extra.moved)


@pytest.mark.parametrize("variant", ["dora", "loha", "lokr", "tucker", "up", "ia3", "vera", "spatial"])
def test_variants_that_form_a_weight(variant: str) -> None:
    net, x = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 24, 3)), torch.randn(3, 8, SIZE, SIZE)
    cost = model_cost(net, Setting(**SETTING), config=config(variant=variant))  # type: ignore[arg-type]
    step = step_of(model := real(net, config(variant=variant), x), x)
    assert (cost.work.flops, cost.saved) == (work(step).flops, saved_bytes(step, owned(model, x)))
    assert by_formula(cost)[0] == work(step).flops


def test_a_layer_whose_owner_runs_it_is_counted_as_materialised() -> None:
    net = nn.Sequential(timm.layers.Conv2dSame(8, 16, 3, stride=2), nn.Conv2d(16, 8, 1))
    x = torch.randn(3, 8, SIZE, SIZE)
    cost, model = model_cost(net, Setting(**SETTING), config=config()), real(net, config(), x)
    assert cost.layers[0].way == "materialised"
    assert cost.work.flops == work(step_of(model, x)).flops
    assert cost.saved == saved_bytes(step_of(model, x), owned(model, x))


@pytest.mark.parametrize(
    ("name", "variant"),
    [("test_resnet", "fa"), ("test_vit", "lora"), ("test_efficientnet", "lora"), ("test_convnext", "lora")],
)
def test_the_step_of_a_model_is_counted_without_taking_it(name: str, variant: str) -> None:
    net, lora = timm.create_model(name, num_classes=5), vl.LoraConfig(r=2, variant=variant)  # type: ignore[arg-type]
    size = net.pretrained_cfg["input_size"][-1]
    x = torch.randn(2, 3, size, size)
    cost = model_cost(net, Setting(2, 3, size, size), config=lora)
    step = step_of(model := real(net, lora, x), x)
    done = work(step)
    assert (cost.work.flops, cost.saved) == (done.flops, saved_bytes(step, owned(model, x)))
    assert cost.work.moved_bytes == pytest.approx(done.moved_bytes, rel=1e-3)
    assert cost.work.peak_bytes == pytest.approx(done.peak_bytes, rel=0.02)
    model.zero_grad(set_to_none=True)
    # oneDNN's convolutions allocate some more inside, to reorder what they read
    assert cost.work.peak_bytes <= 1.02 * peak_bytes(step, "cpu") <= 1.5 * cost.work.peak_bytes
    assert cost.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {layer.name for layer in cost.layers} | set(cost.uncounted) == {row.layer for row in vl.summary(model).rows}
    assert all(layer.saved == layer.by(layer.way).saved for layer in cost.layers if layer.way != "materialised")


def test_norms_are_folded_as_training_folds_them() -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    x = torch.randn(3, 8, SIZE, SIZE)
    cost, model = model_cost(net, Setting(**SETTING), config=config()), real(net, config(), x)
    assert cost.folded == 1
    assert [layer.sizes.folded for layer in cost.layers] == [False, True]
    assert cost.saved == saved_bytes(step_of(model, x), owned(model, x))


def test_the_active_adapter_of_a_model_is_counted_and_nothing_changes() -> None:
    net = vl.apply_lora(net_of(NETS["conv"]), config())
    before = {key: t.clone() for key, t in net.state_dict().items()}
    forward = net[1].forward
    cost = model_cost(net, Setting(**SETTING))
    assert [layer.sizes.rank for layer in cost.layers] == [2, 2]
    assert net[1].forward == forward
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    assert not any(p.grad is not None for p in net.parameters())


def test_half_the_numbers_take_half_the_bytes() -> None:
    net = net_of(NETS["conv"])
    full, half = (model_cost(net, Setting(**SETTING, dtype=t), config=config()) for t in ("fp32", "bf16"))  # type: ignore[arg-type]
    assert half.extra.flops == full.extra.flops
    assert half.extra.moved == full.extra.moved // 2
    assert half.saved < full.saved


def test_a_gpu_takes_another_order_than_a_cpu() -> None:
    net = net_of(NETS["linear"])
    ways = {
        device: [layer.way for layer in model_cost(net, Setting(**SETTING, device=device), config=config()).layers]
        for device in ("cpu", "cuda")
    }
    assert ways["cpu"] == ["projected", "projected"]
    assert model_cost(net, Setting(**SETTING, order="merged"), config=config()).layers[0].way == "merged"


def test_misuse() -> None:
    with pytest.raises(ConfigError, match="batch must be at least 1"):
        Setting(batch=0)
    with pytest.raises(ConfigError, match="expected an order of factorised"):
        Setting(order="quick")  # type: ignore[arg-type]
    with pytest.raises(StateError, match="call apply_lora"):
        model_cost(net_of(NETS["conv"]), Setting(**SETTING))


def test_a_frozen_A_keeps_bits_of_a_network_of_convolutions() -> None:
    # ResNet-50 at batch 8 and 224 pixels: 20.5 of 275.1 MiB; PEFT keeps 666 there
    net, setting = timm.create_model("resnet26", num_classes=5), Setting(2, height=96, width=96)
    exact, lean = (model_cost(net, setting, config=vl.LoraConfig(r=8, variant=v)) for v in ("lora", "fa"))  # type: ignore[arg-type]
    assert lean.saved < 0.12 * exact.saved
