"""Text is divided by label, group, domain and seed, and no text is in two parts."""

from __future__ import annotations

import logging
from collections import Counter

import pytest
from text_toy import sentences

from visionlora.data.parts import Division
from visionlora.errors import ConfigError, DataError
from visionlora.text.columns import Example
from visionlora.text.labels import check_known, check_problem, label_list, label_value
from visionlora.text.parts import divide

TEXTS = sorted({*sentences(140)})[:120]


def labelled(texts: list[str] = TEXTS, **more: str | None) -> list[Example]:
    return [Example({"text": t, "label": "abc"[at % 3]}, f"line {at}", **more) for at, t in enumerate(texts)]


def texts(examples: list[Example]) -> set[str]:
    return {example.fields["text"] for example in examples}


def test_every_example_is_in_one_part_and_labels_in_proportion() -> None:
    parts = divide(labelled(), Division())
    assert [len(p) for p in (parts.train, parts.val, parts.tests["target"])] == [84, 12, 24]
    assert texts(parts.train) | texts(parts.val) | texts(parts.tests["target"]) == set(TEXTS)
    assert Counter(e.fields["label"] for e in parts.val) == {"a": 4, "b": 4, "c": 4}


def test_the_seed_divides_and_the_order_of_the_file_does_not() -> None:
    def val(examples: list[Example], seed: int = 0) -> set[str]:
        return texts(divide(examples, Division(split_seed=seed)).val)

    assert val(labelled()) == val(labelled()[::-1])
    assert val(labelled()) != val(labelled(), seed=1)


def test_the_same_text_is_never_in_two_parts() -> None:
    twice = labelled(TEXTS + [f"  {text.upper()} " for text in TEXTS])
    parts = divide(twice, Division())
    plain = [{" ".join(t.lower().split()) for t in texts(p)} for p in (parts.train, parts.val, parts.tests["target"])]
    assert not plain[0] & plain[1]
    assert not plain[0] & plain[2]
    assert not plain[1] & plain[2]
    assert sum(map(len, (parts.train, parts.val, parts.tests["target"]))) == 240


def test_groups_and_contexts_stay_together() -> None:
    grouped = [Example({"text": t, "label": "ab"[at % 2]}, "", group=str(at // 6)) for at, t in enumerate(TEXTS)]
    parts = divide(grouped, Division())
    groups = [{e.group for e in part} for part in (parts.train, parts.val, parts.tests["target"])]
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    asked = [Example({"question": t, "context": f"text {at // 6}"}, "") for at, t in enumerate(TEXTS)]
    parts = divide(asked, Division())
    contexts = [{e.fields["context"] for e in part} for part in (parts.train, parts.val, parts.tests["target"])]
    assert not contexts[0] & (contexts[1] | contexts[2])
    assert all(contexts)


def test_splits_that_the_data_names_are_kept(caplog: pytest.LogCaptureFixture) -> None:
    examples = labelled(TEXTS[:60], split="train") + labelled(TEXTS[60:90], split="val")
    with caplog.at_level(logging.WARNING):
        parts = divide(examples, Division())
    assert (len(parts.train), len(parts.val)) == (60, 30)
    assert parts.tests["target"] == parts.val
    assert "the target test is the validation part" in caplog.text


def test_domains() -> None:
    examples = [e for d in ("books", "films", "news") for e in labelled([f"{d} {t}" for t in TEXTS[:30]], domain=d)]
    parts = divide(examples, Division(train_domains=["books"], source_domains=["news"]))
    assert {name: len(part) for name, part in parts.tests.items()} == {"target": 6, "films": 30, "source": 30}
    parts = divide(examples, Division(train_domains=["books"], test_domains=["films"]))
    assert {name: len(part) for name, part in parts.tests.items()} == {"target": 30}
    source = labelled(TEXTS[90:])
    assert len(divide(labelled(TEXTS[:60]), Division(), source=source).tests["source"]) == 30
    with pytest.raises(DataError, match=r"test_domains: the data set has no domain 'film'; did you mean .films."):
        divide(examples, Division(test_domains=["film"]))
    with pytest.raises(DataError, match="examples of the target part are trained on"):
        divide(examples, Division(train_domains=["films"], test_domains=["films"], val_fraction=0))


def test_shots() -> None:
    parts = divide(labelled(), Division(shots=4))
    assert Counter(e.fields["label"] for e in parts.train) == {"a": 4, "b": 4, "c": 4}
    other = divide(labelled(), Division(shots=4, split_seed=1))
    assert texts(parts.train) != texts(other.train)
    unlabelled = [Example({"prompt": t, "response": "x"}, "") for t in TEXTS]
    assert len(divide(unlabelled, Division(shots=7)).train) == 7


def test_too_few_to_divide_names_the_cure() -> None:
    with pytest.raises(DataError, match=r"2 examples in 2 groups cannot be divided .* val_root and test_root"):
        divide(labelled(TEXTS[:2]), Division())
    with pytest.raises(DataError, match="no training examples"):
        divide(labelled(split="test"), Division())


def test_splits_without_training_say_what_there_is() -> None:
    tested = labelled(TEXTS[:20], split="val") + labelled(TEXTS[20:50], split="test")
    with pytest.raises(DataError, match="the files name val: 20, test: 30 alone; give one file as root"):
        divide(tested, Division())


def test_label_names() -> None:
    assert label_list(labelled()) == ["a", "b", "c"]
    numbers = [Example({"text": "t", "label": label}, "") for label in ("10", "9", 2.0)]
    assert label_list(numbers) == ["2", "9", "10"]
    assert label_list(labelled(), classes=["c", "b", "a"]) == ["c", "b", "a"]
    tagged = [Example({"tokens": ["x", "y"], "tags": ["O", "B-PER"]}, "")]
    assert label_list(tagged) == ["B-PER", "O"]
    with pytest.raises(DataError, match=r"needs two labels or more, got only 'a'; .*problem_type regression"):
        label_list(labelled(TEXTS[:1]))
    with pytest.raises(DataError, match="classes names a more than once"):
        label_list(labelled(), classes=["a", "b", "c", "a"])


def test_an_unknown_label_is_named_with_its_place() -> None:
    odd = [Example({"text": "t", "label": "appel"}, "test.csv, line 9")]
    with pytest.raises(
        DataError, match=r"the test part has labels that are none .*'appel' \(test.csv, line 9\); did you"
    ):
        check_known(odd, ["apple", "pear"], where="test")


def test_label_values() -> None:
    number = {"a": 0, "b": 1, "c": 2}

    def value(label: object, problem: str) -> object:
        return label_value(Example({"label": label}, "line 1"), problem, number)  # type: ignore[arg-type]

    assert value("b", "single_label_classification") == 1
    assert value(["a", "c"], "multi_label_classification") == [1, 0, 1]
    assert value([], "multi_label_classification") == [0, 0, 0]
    assert value("2.5", "regression") == 2.5
    for label, problem, message in (
        ("a", "multi_label_classification", "line 1: several labels are a list"),
        (["a"], "single_label_classification", "need problem_type multi_label_classification"),
        ("good", "regression", "regression needs a number"),
    ):
        with pytest.raises(DataError, match=message):
            value(label, problem)
    with pytest.raises(ConfigError, match="problem_type must be one of"):
        check_problem("regresion", "SEQ_CLS")
    with pytest.raises(ConfigError, match="problem_type regression belongs to SEQ_CLS"):
        check_problem("regression", "CAUSAL_LM")
