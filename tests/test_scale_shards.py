"""Whole tensors out of sharded modules and back, in one process: FSDP2 over a group of one, and its refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy, StrategyRegistry
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import visionlora as vl
from visionlora.errors import ConfigError
from visionlora.training.ema import AdapterEMA
from visionlora.training.fsdp2 import ShardedStrategy, whole_checkpoints
from visionlora.training.gather import fill, gathered, is_sharded, like, own_part, reshard, whole_in_first_process


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def pair(group: None) -> tuple[nn.Module, nn.Module]:
    """A whole network with an adapter, and the same one sharded."""
    torch.manual_seed(0)
    net = vl.apply_lora(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)), vl.LoraConfig(r=2))
    sharded = copy.deepcopy(net)
    fully_shard(sharded[0])
    fully_shard(sharded)
    return net, sharded


def is_cut(module: nn.Module) -> bool:
    return all(isinstance(p, DTensor) for p in module.parameters())


def test_a_sharded_network_is_whole_inside_the_block_and_cut_after_it(pair: tuple[nn.Module, nn.Module]) -> None:
    net, sharded = pair
    assert is_sharded(sharded)
    assert not is_sharded(net)
    with torch.no_grad():
        sharded(torch.ones(1, 6))  # leaves the outermost parameters gathered
    before = dict(sharded.named_parameters())
    with whole_in_first_process(sharded):
        assert not any(isinstance(p, DTensor) for p in sharded.parameters())
        assert vl.fingerprint(sharded) == vl.fingerprint(net)
        grads = {name: p.requires_grad for name, p in sharded.named_parameters()}
    assert grads == {name: p.requires_grad for name, p in net.named_parameters()}
    assert is_cut(sharded)
    assert before.keys() == dict(sharded.named_parameters()).keys()
    torch.testing.assert_close(sharded(torch.ones(1, 6)), net(torch.ones(1, 6)))


def test_the_parts_come_back_after_an_error(pair: tuple[nn.Module, nn.Module]) -> None:
    _, sharded = pair
    with pytest.raises(OSError, match="disk"), whole_in_first_process(sharded):
        raise OSError("disk full")
    assert is_cut(sharded)


def test_a_whole_state_fills_the_parts(pair: tuple[nn.Module, nn.Module]) -> None:
    net, sharded = pair
    state = {key: torch.randn_like(tensor) for key, tensor in net.state_dict().items()}
    fill(sharded, state)
    assert is_cut(sharded)
    found = gathered({"state": sharded.state_dict(), "more": [1, "a"]})
    assert found["more"] == [1, "a"]
    assert all(torch.equal(found["state"][key], state[key]) for key in state)
    part = like(state["0.weight"], sharded[0].weight)
    assert torch.equal(own_part(part), state["0.weight"])
    assert like(part, sharded[0].weight) is part
    assert like(state["0.weight"], net[0].weight) is state["0.weight"]


def test_the_average_is_measured_and_the_raw_values_come_back(pair: tuple[nn.Module, nn.Module]) -> None:
    _, sharded = pair
    module, ema = nn.Module(), AdapterEMA(0.9)
    module.net = sharded
    raw = gathered({n: p for n, p in module.named_parameters() if p.requires_grad})
    # whole tensors, as they come from a checkpoint
    ema.load_state_dict({"updates": 1, "average": {n: t + 1 for n, t in raw.items()}})
    x = torch.ones(1, 6)
    with torch.no_grad():
        before = sharded(x)
        reshard(module)  # as a backward pass leaves it
        ema.swap_in(module)  # type: ignore[arg-type]
        assert not torch.equal(sharded(x), before)
        ema.swap_out(module)  # type: ignore[arg-type]
        reshard(module)
        assert torch.equal(sharded(x), before)


def test_the_strategy_is_known_by_its_name() -> None:
    assert isinstance(StrategyRegistry.get("fsdp2"), ShardedStrategy)


@pytest.fixture
def four() -> Iterator[None]:
    """A group of four processes, three of which do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_layers_split_over_processes_are_refused(four: None, tensor_parallel: int) -> None:
    strategy = ModelParallelStrategy()
    names = ("data_parallel", "tensor_parallel")
    strategy._device_mesh = init_device_mesh("cpu", (4 // tensor_parallel, tensor_parallel), mesh_dim_names=names)
    if tensor_parallel > 1:
        with pytest.raises(ConfigError, match=r"splits every layer over 2 processes.*--trainer\.strategy fsdp2"):
            whole_checkpoints(strategy)
        assert type(strategy) is ModelParallelStrategy
    else:
        whole_checkpoints(strategy)
        assert type(strategy) is ShardedStrategy


def test_without_shards_nothing_is_gathered() -> None:
    net = nn.Linear(2, 2)
    weight = net.weight
    with whole_in_first_process(net):
        assert net.weight is weight
    assert gathered(weight).data_ptr() == weight.data_ptr()
