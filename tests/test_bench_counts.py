"""The deterministic figures, against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from visionlora.analysis.work import work
from visionlora.bench.memory import peak_bytes, saved_bytes

FLOAT = 4


def owned(*modules: nn.Module, inputs: tuple[Tensor, ...] = ()) -> list[Tensor]:
    return [*inputs, *(t for m in modules for t in (*m.parameters(), *m.buffers()))]


def test_saved_bytes_are_what_gelu_and_a_trained_linear_keep() -> None:
    x, net = torch.randn(8, 16), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 4))
    assert saved_bytes(lambda: net(x).sum(), owned(net, inputs=(x,))) == 2 * 8 * 32 * FLOAT  # around the GELU
    net[2].requires_grad_(False)  # nobody needs the output of the GELU any more
    assert saved_bytes(lambda: net(x).sum(), owned(net, inputs=(x,))) == 8 * 32 * FLOAT


def test_saved_bytes_count_a_storage_once_and_whole() -> None:
    x = torch.randn(8, 16)
    w = torch.randn(16, requires_grad=True)

    def forward() -> Tensor:
        both = x + 1
        return (both[:1] * w).sum() + (both[4:] * w).sum()

    assert saved_bytes(forward, [x, w]) == 8 * 16 * FLOAT


def test_peak_bytes_hold_activations_and_gradients() -> None:
    x, layer = torch.randn(64, 256), nn.Linear(256, 512, bias=False)
    found = peak_bytes(lambda: layer(x).square().sum(), "cpu")
    activation, weight = 64 * 512 * FLOAT, 512 * 256 * FLOAT
    assert activation + weight <= found <= 4 * activation + weight


def test_work_of_a_linear_layer() -> None:
    x, layer = torch.randn(8, 16, requires_grad=True), nn.Linear(16, 32, bias=False)
    done = work(lambda: layer(x).sum())
    assert done.flops == 3 * 2 * 8 * 16 * 32
    x_bytes, w_bytes, y_bytes = 8 * 16 * FLOAT, 16 * 32 * FLOAT, 8 * 32 * FLOAT
    forward = x_bytes + w_bytes + y_bytes
    total = y_bytes + FLOAT  # and the gradient of the sum is one expanded number
    start = 2 * FLOAT  # ones_like(loss): written; the loss itself is not read
    backward = (FLOAT + w_bytes + x_bytes) + (FLOAT + x_bytes + w_bytes)
    assert forward + total + backward <= done.moved_bytes <= forward + total + backward + start
    assert done.operations == 5  # two products for the gradients, one forward, a sum, a one


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("frozen", [True, False])
def test_flops_of_a_convolution_of_any_groups(groups: int, frozen: bool) -> None:
    x = torch.randn(2, 8, 10, 12, requires_grad=True)
    conv = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=groups, bias=False).requires_grad_(not frozen)
    one_pass = 2 * 2 * 5 * 6 * 16 * (8 // groups) * 9
    assert work(lambda: conv(x).sum()).flops == one_pass * (2 if frozen else 3)


def test_flops_agree_with_pytorchs_counter_where_it_is_right() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 5))
    x = torch.randn(2, 3, 9, 9)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    assert work(lambda: net(x).sum()).flops == counter.get_total_flops()


def test_flops_of_attention_are_counted() -> None:
    q = torch.randn(2, 3, 7, 8, requires_grad=True)
    done = work(lambda: F.scaled_dot_product_attention(q, q, q).sum())
    assert done.flops > 2 * (2 * 3 * 7 * 7 * 8) * 2


def test_a_frozen_convolution_does_not_read_its_input_again() -> None:
    x, conv = torch.randn(2, 8, 10, 10, requires_grad=True), nn.Conv2d(8, 8, 3, padding=1, bias=False)
    trained = work(lambda: conv(x).sum()).moved_bytes
    x.grad = None
    frozen = work(lambda: conv.requires_grad_(False)(x).sum()).moved_bytes
    assert trained - frozen == (x.numel() + conv.weight.numel()) * FLOAT  # x is read, the gradient written


def test_views_and_allocations_are_no_operations() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    before = work(x.sum)
    after = work(lambda: x.new_empty(9).expand(3, 9).numel() * 0 + x.t().reshape(3, 8).sum())
    moved_by_the_copy = 2 * x.numel() * FLOAT  # reshape of a transposed tensor
    assert after.moved_bytes - before.moved_bytes >= moved_by_the_copy
    assert work(lambda: x.view(24)[None].squeeze(0).sum()).operations == before.operations


@torch.library.custom_op("visionlora_test::scaled_sum", mutates_args=())
def scaled_sum(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2 + y).clone()


def test_an_operation_written_in_python_is_counted_by_what_it_is_made_of() -> None:
    x, w = torch.randn(4, 4), torch.zeros(1, requires_grad=True)
    done = work(lambda: scaled_sum(x, x).sum() + w.sum())
    plain = work(lambda: (x * 2 + x).clone().sum() + w.sum())
    assert done.operations == plain.operations
    assert abs(done.moved_bytes - plain.moved_bytes) <= 8  # the 2 is a number in one and a tensor in the other


def test_products_in_place_are_counted() -> None:
    y, z, B = torch.zeros(6, 4), torch.randn(6, 2), torch.randn(2, 4, requires_grad=True)
    assert work(lambda: y.clone().addmm_(z, B).sum()).flops == 2 * 2 * 6 * 2 * 4
    stack = torch.zeros(3, 6, 4)
    assert (
        work(lambda: stack.clone().baddbmm_(z.expand(3, 6, 2), B.expand(3, 2, 4)).sum()).flops == 3 * 2 * 2 * 6 * 2 * 4
    )
