"""Parameter groups and the learning-rate schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

from visionlora.errors import ConfigError
from visionlora.training.optim import parameter_groups, total_steps, warmup_cosine, warmup_cosine_factor


def parameters() -> dict[str, list[nn.Parameter]]:
    matrix, vector = torch.ones(2, 3), torch.ones(3)
    return {
        "A": [nn.Parameter(matrix)],
        "B": [nn.Parameter(matrix)],
        "head": [nn.Parameter(matrix), nn.Parameter(vector)],
        "norm": [nn.Parameter(vector), nn.Parameter(vector, requires_grad=False)],
    }


def test_every_trainable_parameter_is_in_one_group() -> None:
    given = parameters()
    groups = parameter_groups(given, lr=0.1)
    chosen = [p for g in groups for p in g["params"]]
    wanted = [p for ps in given.values() for p in ps if p.requires_grad]
    assert {id(p) for p in chosen} == {id(p) for p in wanted}
    assert len(chosen) == len(wanted)
    torch.optim.AdamW(groups)


def test_a_parameter_given_twice_is_trained_once() -> None:
    shared = nn.Parameter(torch.ones(2, 2))
    groups = parameter_groups({"A": [shared, shared], "head": [shared]}, lr=0.1)
    assert [len(g["params"]) for g in groups] == [1]


def test_one_dimensional_tensors_do_not_decay() -> None:
    for group in parameter_groups(parameters(), lr=0.1, weight_decay=0.05):
        assert group["weight_decay"] == (0.05 if group["params"][0].ndim > 1 else 0.0)
        assert len({p.ndim > 1 for p in group["params"]}) == 1


def test_factors_scale_the_rate_of_their_group() -> None:
    rates = {g["name"]: g["lr"] for g in parameter_groups(parameters(), lr=0.1, factors={"B": 16, "head": 0.5})}
    assert rates["A"] == 0.1
    assert rates["B"] == pytest.approx(1.6)
    assert rates["head"] == rates["head (no decay)"] == pytest.approx(0.05)


@pytest.mark.parametrize("given", [{}, {"A": []}, {"A": [nn.Parameter(torch.ones(2), requires_grad=False)]}])
def test_nothing_to_train_is_an_error(given: dict[str, list[nn.Parameter]]) -> None:
    with pytest.raises(ConfigError, match="nothing to train"):
        parameter_groups(given, lr=0.1)


@pytest.mark.parametrize("factors", [{"C": 2.0}, {"B": 0.0}, {"B": -1.0}, {"B": math.nan}])
def test_a_factor_without_group_or_sense_is_an_error(factors: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        parameter_groups(parameters(), lr=0.1, factors=factors)


def test_the_rate_rises_then_falls_to_zero() -> None:
    rates = [warmup_cosine_factor(step, warmup_steps=4, total_steps=20) for step in range(21)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[12] == pytest.approx(0.5)
    assert rates[20] == pytest.approx(0.0)
    assert warmup_cosine_factor(25, warmup_steps=4, total_steps=20) == 0.0


def test_warmup_cosine_drives_the_optimizer_step_by_step() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=2.0)
    entry = warmup_cosine(optimizer, warmup_steps=1, total_steps=4)
    assert entry["interval"] == "step"
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        entry["scheduler"].step()
    assert rates == pytest.approx([1.0, 2.0, 1.5, 0.5])


@pytest.mark.parametrize(("warmup", "total"), [(5, 5), (-1, 5), (0, 0)])
def test_a_warmup_as_long_as_the_run_is_an_error(warmup: int, total: int) -> None:
    with pytest.raises(ConfigError, match="warm-up"):
        warmup_cosine(torch.optim.SGD([nn.Parameter(torch.ones(1))]), warmup_steps=warmup, total_steps=total)


def test_total_steps_counts_short_batches_and_devices() -> None:
    assert total_steps(10, batch_size=4, epochs=3) == 9
    assert total_steps(10, batch_size=4, epochs=3, accumulate=2) == 6
    assert total_steps(10, batch_size=4, epochs=3, devices=2) == 6
