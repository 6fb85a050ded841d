"""A data set is divided as its files and the user say, with one list of classes for every part."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import pytest

from visionlora.data.folders import Sample
from visionlora.data.parts import Division, divide
from visionlora.errors import DataError


def make(domain: str | None = None, split: str | None = None, labels: str = "ab", count: int = 20) -> list[Sample]:
    folder = "/".join(part for part in ("/data", domain, split) if part)
    return [Sample(f"{folder}/{label}/{i:02}.jpg", label, domain, split) for label in labels for i in range(count)]


def domains(samples: Sequence[Sample]) -> set[str | None]:
    return {sample.domain for sample in samples}


def test_a_plain_tree_is_split_into_three() -> None:
    parts = divide(make(), Division(val_fraction=0.1, test_fraction=0.2))
    assert (len(parts.train), len(parts.val), len(parts.tests["target"])) == (28, 4, 8)
    assert list(parts.tests) == ["target"]
    assert parts.class_names == ["a", "b"]


def test_named_splits_are_kept() -> None:
    samples = make(split="train") + make(split="val", count=5) + make(split="test", count=7)
    parts = divide(samples)
    assert [{s.split for s in part} for part in (parts.train, parts.val, parts.tests["target"])] == [
        {"train"},
        {"val"},
        {"test"},
    ]
    assert (len(parts.train), len(parts.val), len(parts.tests["target"])) == (40, 10, 14)


def test_without_a_test_split_the_validation_part_is_the_test_and_it_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parts = divide(make(split="train") + make(split="val", count=5))
    assert parts.tests["target"] == parts.val
    assert len(parts.train) == 40
    assert "no test images" in caplog.text


def test_without_a_validation_split_it_is_held_out_of_the_training_split() -> None:
    parts = divide(make(split="train") + make(split="test", count=5))
    assert (len(parts.train), len(parts.val), len(parts.tests["target"])) == (36, 4, 10)


def test_train_on_one_domain_and_test_on_each_of_the_others() -> None:
    parts = divide(make("day") + make("dusk") + make("night"), Division(train_domains=["dusk"]))
    assert list(parts.tests) == ["target", "day", "night"]
    assert domains(parts.train) | domains(parts.val) | domains(parts.tests["target"]) == {"dusk"}
    assert (domains(parts.tests["day"]), len(parts.tests["day"])) == ({"day"}, 40)


def test_named_test_domains_are_the_target_together_and_one_by_one() -> None:
    samples = make("day") + make("dusk") + make("night")
    parts = divide(samples, Division(test_domains=["dusk", "night"]))
    assert list(parts.tests) == ["target", "dusk", "night"]
    assert domains(parts.train) == {"day"}
    assert len(parts.tests["target"]) == 80
    assert list(divide(samples, Division(test_domains=["night"])).tests) == ["target"]


def test_the_source_has_its_own_test_part() -> None:
    samples = make("night") + make("night_test") + make("day_test")
    division = Division(train_domains=["night"], test_domains=["night_test"], source_domains=["day_test"])
    parts = divide(samples, division)
    assert list(parts.tests) == ["target", "source"]
    assert domains(parts.tests["source"]) == {"day_test"}
    assert domains(divide(samples, Division(source_domains=["day_test"])).train) == {"night", "night_test"}


def test_the_source_may_lie_elsewhere() -> None:
    source = make("amazon", "train") + make("amazon", "test", count=3)
    parts = divide(make("webcam"), Division(), source=source)
    assert [(s.domain, s.split) for s in parts.tests["source"]] == [("amazon", "test")] * 6
    assert len(divide(make(), source=make("old", count=4)).tests["source"]) == 8
    with pytest.raises(DataError, match="no domain 'amzon'; did you mean \"amazon\""):
        divide(make("webcam"), Division(source_domains=["amzon"]), source=source)


def test_the_same_folder_under_another_name_is_no_source() -> None:
    again = [Sample(s.path.replace("/data", "/data/../data"), s.label) for s in make()]
    with pytest.raises(DataError, match="trained on and in the source part"):
        divide(make(), source=again)


def test_domains_with_splits_use_their_splits() -> None:
    samples = (
        make("day", "train") + make("day", "test", count=5) + make("night", "train") + make("night", "test", count=3)
    )
    parts = divide(samples, Division(train_domains=["night"], source_domains=["day"]))
    assert (len(parts.train) + len(parts.val), len(parts.tests["target"]), len(parts.tests["source"])) == (40, 6, 10)


def test_a_domain_called_source_does_not_hide_the_source() -> None:
    parts = divide(make("source") + make("target"), Division(train_domains=["target"]))
    assert list(parts.tests) == ["target", "domain source"]


def test_shots_limit_the_training_part_only() -> None:
    parts = divide(make(), Division(shots=3))
    assert Counter(s.label for s in parts.train) == {"a": 3, "b": 3}
    assert (len(parts.val), len(parts.tests["target"])) == (4, 8)


def test_groups_do_not_cross_parts() -> None:
    samples = [Sample(f"/d/{c}/{t:02}_{f}.jpg", c) for c in "ab" for t in range(10) for f in range(4)]
    parts = divide(samples, Division(group_by="^[^_]+"))
    tracks = [{s.path.rsplit("/", 1)[1][:2] for s in part} for part in (parts.train, parts.val, parts.tests["target"])]
    assert sum(map(len, tracks)) == 10


def test_no_validation_part_if_none_is_wanted() -> None:
    parts = divide(make(), Division(val_fraction=0.0))
    assert (len(parts.train), parts.val, len(parts.tests["target"])) == (32, [], 8)


@pytest.mark.parametrize(
    ("division", "message"),
    [
        (Division(train_domains=["nigth"]), 'train_domains: .*did you mean "night"'),
        (Division(test_domains=["dawn"]), "test_domains: the data set has no domain 'dawn'"),
        (Division(train_domains=["day"], test_domains=["day"]), "trained on and in the target part"),
        (Division(train_domains=["day"], source_domains=["day"]), "trained on and in the source part"),
        (Division(test_domains=["day", "night"]), "no training images"),
        (Division(val_fraction=0.8, test_fraction=0.3), "sum to 1"),
        (Division(shots=0), "at least 1"),
    ],
)
def test_impossible_divisions_are_errors(division: Division, message: str) -> None:
    with pytest.raises(DataError, match=message):
        divide(make("day") + make("night"), division)


def test_domains_of_a_data_set_without_domains_are_an_error() -> None:
    with pytest.raises(DataError, match="it has none: expected <domain>/<class>/<image>"):
        divide(make(), Division(train_domains=["day"]))


def test_classes_that_differ_between_parts_are_errors() -> None:
    with pytest.raises(DataError, match=r"the validation images: .*'bb'; did you mean"):
        divide([*make(split="train"), Sample("/x.jpg", "bb", None, "val")])
    with pytest.raises(DataError, match=r"the test night images: .*'c'"):
        divide(make("day") + make("night", labels="abc"), Division(train_domains=["day"]))
    with pytest.raises(DataError, match=r"the test source images: .*'c'"):
        divide(make(), source=make(labels="abc"))


def test_a_part_that_lacks_a_class_keeps_the_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parts = divide(make(split="train", labels="abc") + make(split="val", labels="ac"))
    assert parts.class_names == ["a", "b", "c"]
    assert "no validation image of b" in caplog.text


def test_a_given_list_of_classes_is_kept() -> None:
    assert divide(make(), classes=["b", "z", "a"]).class_names == ["b", "z", "a"]
    with pytest.raises(DataError, match="not among"):
        divide(make(), classes=["a", "z"])
