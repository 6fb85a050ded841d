"""The resumable sampler: order from seed and epoch alone, and a start anywhere."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from visionlora.errors import ConfigError
from visionlora.training.sampler import ResumableSampler


def test_every_sample_comes_once_an_epoch() -> None:
    assert sorted(ResumableSampler(17)) == list(range(17))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    a, b, other_seed = ResumableSampler(50, seed=3), ResumableSampler(50, seed=3), ResumableSampler(50, seed=4)
    torch.manual_seed(1)
    first = list(a)
    torch.manual_seed(2)
    assert list(b) == first
    assert list(other_seed) != first
    a.set_epoch(1)
    assert list(a) != first
    a.set_epoch(0)
    assert list(a) == first


def test_without_shuffle_the_order_is_the_datasets() -> None:
    assert list(ResumableSampler(5, shuffle=False)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("position", [0, 1, 10, 17])
def test_a_loaded_state_yields_exactly_the_remaining_samples(position: int) -> None:
    whole, resumed = ResumableSampler(17, seed=5), ResumableSampler(17, seed=5)
    whole.set_epoch(2)
    resumed.load_state_dict({"epoch": 2, "position": position})
    resumed.set_epoch(2)
    assert list(resumed) == list(whole)[position:]


def test_the_start_counts_for_one_iteration_only() -> None:
    sampler = ResumableSampler(6, seed=1)
    sampler.load_state_dict({"epoch": 0, "position": 4})
    assert len(list(sampler)) == 2
    assert sorted(sampler) == list(range(6))


def test_state_round_trip_in_a_plain_loop() -> None:
    sampler = ResumableSampler(12, seed=2)
    loader = DataLoader(torch.arange(12), batch_size=3, sampler=sampler)  # type: ignore[arg-type]
    batches = iter(loader)
    seen = torch.cat([next(batches), next(batches)])
    resumed = ResumableSampler(12, seed=2)
    resumed.load_state_dict(sampler.state_dict())
    rest = torch.cat(list(DataLoader(torch.arange(12), batch_size=3, sampler=resumed)))  # type: ignore[arg-type]
    assert sorted(torch.cat([seen, rest]).tolist()) == list(range(12))


def test_the_length_is_the_whole_epoch_even_after_a_resume() -> None:
    sampler = ResumableSampler(9)
    sampler.load_state_dict({"epoch": 0, "position": 5})
    assert len(sampler) == 9


def test_unrolled_keys_name_the_epoch_too() -> None:
    plain, unrolled = ResumableSampler(7, seed=1), ResumableSampler(7, seed=1, keys="unrolled")
    for sampler in (plain, unrolled):
        sampler.set_epoch(3)
    assert [key % 7 for key in unrolled] == list(plain)
    assert {key // 7 for key in unrolled} == {3}


@pytest.mark.parametrize(("size", "world"), [(8, 2), (9, 2), (3, 4), (1, 3)])
def test_ranks_share_the_global_batches_of_one_process(size: int, world: int) -> None:
    alone = ResumableSampler(size, seed=1).order(4)
    ranks = []
    for rank in range(world):
        sampler = ResumableSampler(size, seed=1)
        sampler.rank, sampler.num_replicas = rank, world
        sampler.num_samples = -(-size // world)
        sampler.total_size = sampler.num_samples * world
        ranks.append(sampler.order(4))
    assert len({len(order) for order in ranks}) == 1
    together = [index for turn in zip(*ranks, strict=True) for index in turn]
    assert together[:size] == alone


def test_an_empty_dataset_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least one sample"):
        ResumableSampler(0)
