"""Splits keep classes in proportion, groups together, and depend on nothing but names and seed."""

from __future__ import annotations

import logging
import random
from collections import Counter
from pathlib import Path

import pytest

from visionlora.data.folders import Sample
from visionlora.data.splits import few_shot, group_names, stratified_split
from visionlora.errors import ConfigError, DataError


def make(counts: dict[str, int], root: str = "/data") -> list[Sample]:
    return [Sample(f"{root}/{label}/{i:03}.jpg", label) for label, n in counts.items() for i in range(n)]


def tracks(classes: int = 3, groups: int = 12, frames: int = 7) -> list[Sample]:
    """Frames of tracks, each track in one class."""
    return [
        Sample(f"/data/{c}/{c:02}{g:03}_{f:02}.jpg", str(c))
        for c in range(classes)
        for g in range(groups)
        for f in range(frames)
    ]


def names(samples: list[Sample]) -> list[str]:
    return [Path(sample.path).relative_to(Path(sample.path).parents[1]).as_posix() for sample in samples]


def test_classes_keep_their_proportions() -> None:
    train, val, test = stratified_split(make({"a": 100, "b": 20, "c": 10}), [0.7, 0.2, 0.1])
    assert Counter(s.label for s in train) == {"a": 70, "b": 14, "c": 7}
    assert Counter(s.label for s in val) == {"a": 20, "b": 4, "c": 2}
    assert Counter(s.label for s in test) == {"a": 10, "b": 2, "c": 1}


def test_parts_are_disjoint_and_complete() -> None:
    samples = make({"a": 31, "b": 7})
    parts = stratified_split(samples, [0.6, 0.4])
    assert sorted(s.path for part in parts for s in part) == sorted(s.path for s in samples)


@pytest.mark.parametrize("group_by", [None, "^[^_]+"])
def test_the_split_ignores_file_order_and_root(group_by: str | None) -> None:
    samples = tracks()
    shuffled = [Sample(s.path.replace("/data", "/mnt/other"), s.label) for s in samples]
    random.Random(0).shuffle(shuffled)
    first = stratified_split(samples, [0.8, 0.2], seed=3, group_by=group_by)
    again = stratified_split(shuffled, [0.8, 0.2], seed=3, group_by=group_by)
    assert [names(part) for part in first] == [names(part) for part in again]


def test_the_seed_changes_the_split() -> None:
    samples = make({"a": 40, "b": 40})
    assert stratified_split(samples, [0.5, 0.5], seed=0) != stratified_split(samples, [0.5, 0.5], seed=1)


def test_groups_stay_together_in_near_proportion() -> None:
    train, val, test = stratified_split(tracks(), [0.6, 0.2, 0.2], group_by="^[^_]+")
    seen = [set(group_names(part, "^[^_]+")) for part in (train, val, test)]
    assert sum(map(len, seen)) == len(set().union(*seen)) == 36
    for part, share in ((train, 0.6), (val, 0.2), (test, 0.2)):
        for n in Counter(s.label for s in part).values():
            assert abs(n - 84 * share) <= 7 + 1e-9


def test_a_part_of_nothing_stays_empty() -> None:
    parts = stratified_split(tracks(classes=2, groups=5), [0.7, 0.0, 0.3], group_by="^[^_]+")
    assert [bool(part) for part in parts] == [True, False, True]


def test_every_class_is_trained_even_with_one_group() -> None:
    samples = [*make({"a": 30}), Sample("/data/b/x.jpg", "b")]
    train, val = stratified_split(samples, [0.1, 0.9])
    assert {s.label for s in train} == {"a", "b"}
    assert {s.label for s in val} == {"a"}


def test_a_class_that_a_part_lacks_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        stratified_split(make({"a": 30, "b": 1}), [0.8, 0.2])
    assert "no image of b" in caplog.text


def test_a_part_that_would_be_empty_is_an_error() -> None:
    with pytest.raises(DataError, match="would be empty"):
        stratified_split(make({"a": 1, "b": 1}), [0.9, 0.1])
    with pytest.raises(DataError, match="sum to 1"):
        stratified_split(make({"a": 5}), [0.9, 0.2])


def test_groups_come_from_an_expression_its_bracket_or_a_function() -> None:
    samples = [Sample("/d/cam3_0001.jpg", "a"), Sample("/d/cam4_0002.png", "a")]
    assert group_names(samples, "^[^_]+") == ["cam3", "cam4"]
    assert group_names(samples, r"cam(\d+)_") == ["3", "4"]
    assert group_names(samples, lambda stem: stem[:3]) == ["cam", "cam"]


def test_a_group_expression_that_fits_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match=r"matches nothing in the file name '000'"):
        group_names(make({"a": 1}), "track_")
    with pytest.raises(ConfigError, match="not a regular expression"):
        group_names(make({"a": 1}), "(")


def test_few_shot_takes_the_same_number_of_each_class() -> None:
    chosen = few_shot(make({"a": 30, "b": 9}), 4, seed=1)
    assert Counter(s.label for s in chosen) == {"a": 4, "b": 4}
    assert chosen == few_shot(make({"b": 9, "a": 30}), 4, seed=1)
    assert chosen != few_shot(make({"a": 30, "b": 9}), 4, seed=2)


def test_few_shot_prefers_different_groups() -> None:
    chosen = few_shot(tracks(classes=2), 12, group_by="^[^_]+")
    assert len(set(group_names(chosen, "^[^_]+"))) == 24


def test_few_shot_takes_all_of_a_small_class_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Counter(s.label for s in few_shot(make({"a": 30, "b": 2}), 4)) == {"a": 4, "b": 2}
    assert "fewer than 4 training images of b" in caplog.text
    with pytest.raises(DataError, match="at least 1"):
        few_shot(make({"a": 3}), 0)
