"""Text files of every kind become the same rows, and what cannot be read names the file, the line and the cure."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from text_toy import sentences

from visionlora.errors import ConfigError, DataError
from visionlora.text.columns import TaskType, example_of, form_of
from visionlora.text.examples import checked_examples
from visionlora.text.extras import need
from visionlora.text.reading import Row, read_rows, rows_of, split_of

ROWS = [{"text": f'{s}, "quoted"', "label": str(i % 3)} for i, s in enumerate(sentences(9))]


def cells(rows: list[Row]) -> list[dict[str, Any]]:
    return [dict(row.cells) for row in rows]


def write(folder: Path, name: str, rows: list[dict[str, Any]] = ROWS) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.suffix
    if kind in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    elif kind == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl", "a.json", "a.parquet"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name)
    rows = read_rows(path)
    assert cells(rows) == ROWS
    assert rows[0].place.startswith(str(path))
    assert {(row.split, row.domain) for row in rows} == {(None, None)}


def test_rows_in_memory(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS)
    assert cells(rows_of(ROWS)) == cells(rows_of(table)) == cells(rows_of(table.to_pandas())) == ROWS
    parts = rows_of({"train": ROWS[:4], "validation": ROWS[4:]})
    assert [row.split for row in parts] == ["train"] * 4 + ["val"] * 5
    with pytest.raises(DataError, match="row 1: expected a dict of columns, got str"):
        rows_of(["text"])
    with pytest.raises(DataError, match="'extra' is none of train"):
        rows_of({"extra": ROWS})


def test_saved_data_sets_bring_the_names_of_their_labels(tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(ROWS).class_encode_column("label")
    named = table.cast_column("label", datasets.ClassLabel(names=["bad", "fair", "good"]))
    names = [["bad", "fair", "good"][int(row["label"])] for row in ROWS]
    named.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": named, "test": named}).save_to_disk(str(tmp_path / "two"))
    named.to_parquet(str(tmp_path / "labels.parquet"))
    for source in (tmp_path / "one", tmp_path / "labels.parquet"):
        assert [row.cells["label"] for row in read_rows(source)] == names
    assert [row.split for row in read_rows(tmp_path / "two")] == ["train"] * 9 + ["test"] * 9
    lists = datasets.Features({"tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B"]))})
    tagged = rows_of(datasets.Dataset.from_dict({"tags": [[0, 1], [1]]}, features=lists))
    assert [row.cells["tags"] for row in tagged] == [["O", "B"], ["B"]]


def test_a_label_of_minus_one_is_none(tmp_path: Path) -> None:
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"text": ["x", "y"], "label": [1, -1]}, features=features)
    assert [row.cells["label"] for row in rows_of(table)] == ["b", None]


def test_folders_and_names_tell_split_and_domain(tmp_path: Path) -> None:
    write(tmp_path, "films/train.csv")
    write(tmp_path, "films/review.dev.jsonl")
    write(tmp_path, "books/test/part.csv")
    write(tmp_path, ".hidden/test.csv")
    (tmp_path / "README.txt").write_text("not data")
    rows = read_rows(tmp_path)
    assert [(row.domain, row.split) for row in rows[::9]] == [("books", "test"), ("films", "val"), ("films", "train")]
    assert len(rows) == 27
    assert len(read_rows(f"{tmp_path}/films/*")) == 18
    assert [split_of([name]) for name in ("train-00000-of-00002", "my_validation", "latest", "testing")] == [
        "train", "val", None, "test",
    ]  # fmt: skip


def test_plain_text_is_documents_by_line_paragraph_or_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\r\n\r\nthree\n".encode("utf-8-sig"))
    read = {kind: read_rows(tmp_path / "a.txt", documents=kind) for kind in ("line", "paragraph", "file")}
    assert [r.cells["text"] for r in read["line"]] == ["one", "two", "three"]
    assert [r.cells["text"] for r in read["paragraph"]] == ["one\ntwo", "three"]
    assert [r.cells["text"] for r in read["file"]] == ["one\ntwo\n\nthree\n"]
    assert [r.place.rpartition(" ")[2] for r in read["line"]] == ["1", "2", "4"]
    assert [r.place.rpartition(" ")[2] for r in read["paragraph"]] == ["1", "4"]


def test_a_tree_of_documents_has_folders_as_labels(tmp_path: Path) -> None:
    for folder in ("train/pos", "train/neg", "test/pos"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "1.txt").write_text("a long\nfilm")
    rows = read_rows(tmp_path, documents="file")
    assert [(r.split, r.domain, r.cells["label"]) for r in rows] == [
        ("test", None, "pos"), ("train", None, "neg"), ("train", None, "pos"),
    ]  # fmt: skip


def test_squad(tmp_path: Path) -> None:
    asked = [{"id": "1", "question": "who?", "answers": [{"text": "bob", "answer_start": 0}]},
             {"id": "2", "question": "why?", "is_impossible": True}]  # fmt: skip
    nested = {"data": [{"title": "t", "paragraphs": [{"context": "bob ran", "qas": asked}]}]}
    (tmp_path / "train.json").write_text(json.dumps(nested))
    examples, _ = checked_examples(read_rows(tmp_path / "train.json"), "QUESTION_ANS", {})
    assert [e.fields["answers"] for e in examples] == [
        {"text": ["bob"], "answer_start": [0]}, {"text": [], "answer_start": []},
    ]  # fmt: skip
    assert [e.fields["id"] for e in examples] == ["1", "2"]


def test_quotes_in_a_tsv_may_be_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('"what a film\t1\n"no" he said\t0\n')
    rows = read_rows(tmp_path / "a.tsv", header=["text", "label"])
    assert cells(rows) == [{"text": '"what a film', "label": "1"}, {"text": '"no" he said', "label": "0"}]


def test_a_cell_may_be_longer_than_the_limit_of_csv(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    (tmp_path / "a.csv").write_text(f"text\n{'x' * 200_000}\n")
    assert len(read_rows(tmp_path / "a.csv")[0].cells["text"]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nhello,1\ncaf\xe9,0\n", r"a.csv, line 3: byte 0xe9 is not UTF-8; convert it: iconv"),
        ("a.csv", b"text,label\nhello,1,2\n", r"line 2: 3 cells, the header has 2"),
        ("a.csv", b"text,text\nhello,1\n", "the header needs different names"),
        ("a.csv", b'text,label\n"open,1\nnext,2\n', "not a sound CSV near row 2"),
        ("a.csv", b"text,label\n", "no rows in it"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["text"]\n', r"line 1: expected an object \{...\}, got list"),
        ("a.json", b'{"text": "a"}', "expected a list of objects"),
        ("a.parquet", b"nonsense", "not a parquet file"),
        ("a.xlsx", b"PK", "expected a file of .csv"),
    ],
)
def test_a_file_that_cannot_be_read_names_the_line_and_the_cure(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_a_missing_path_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "reviews.csv")
    with pytest.raises(DataError, match=r"reviws.csv does not exist; did you mean .reviews.csv."):
        read_rows(tmp_path / "reviws.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no rows in it"):
        read_rows(tmp_path / "empty")


def test_a_name_that_is_no_data_set_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no-such-set does not exist, and as a data set of the hub"):
        read_rows("no-such-set")


def test_a_missing_package_is_an_error_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r'text needs datasets, .*pip install "visionlora\[text\]"'):
        need("datasets")


def rows_like(**cells: Any) -> list[Row]:
    return [Row(cells, "f.csv, line 2")]


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [
        ("SEQ_CLS", {"txt": "a", "label": "1"}, r"no 'text' in txt, label; did you mean .txt.*\n.*columns.text"),
        ("SEQ_CLS", {"text": "", "label": "1"}, "f.csv, line 2: the text is empty"),
        ("SEQ_CLS", {"text": " \n", "label": "1"}, "the text is empty"),
        ("SEQ_CLS", {"text": 5, "label": "1"}, "the text must be text, got int"),
        ("SEQ_CLS", {"text": "a", "label": None}, "the label is missing"),
        ("SEQ_CLS", {"text": "a", "label": " "}, "the label is empty"),
        ("SEQ_CLS", {"text": "a", "label": float("nan")}, "the label is missing or not finite"),
        ("SEQ_CLS", {"text": "a\ud800", "label": "1"}, "half a character"),
        ("SEQ_CLS", {"text": "a", "label": "1", "split": "tets"}, "split 'tets' must be .* did you mean \"test\""),
        ("TOKEN_CLS", {"tokens": ["a", "b"], "tags": ["O"]}, "2 tokens but 1 tags"),
        ("TOKEN_CLS", {"tokens": [], "tags": []}, "the tokens must be a list of words"),
        ("QUESTION_ANS", {"question": "q", "context": "abc", "answers": {"text": ["c"], "answer_start": [1]}},
         "the answer 'c' does not stand at character 1 of the context: it stands at 2"),
        ("QUESTION_ANS", {"question": "q", "context": "abc", "answers": {"text": "c"}}, "must be SQuAD's"),
        ("CAUSAL_LM", {"prompt": "a"}, "reads the columns messages or prompt,response or text; there is no 'response'"),
        ("CAUSAL_LM", {"messages": [{"role": "user"}]}, "the messages must be text, got NoneType"),
        ("SEQ_2_SEQ_LM", {"source": "a"}, "there is no 'target' in source"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(task: TaskType, cells: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked_examples(rows_like(**cells), task, {})


def test_columns_may_have_other_names() -> None:
    rows = rows_like(sentence="good", sentiment=1, place="films", part="dev")
    columns = {"text": "sentence", "label": "sentiment", "domain": "place", "split": "part"}
    (example,), _ = checked_examples(rows, "SEQ_CLS", columns)
    assert (example.fields, example.domain, example.split) == ({"text": "good", "label": "1"}, "films", "val")
    with pytest.raises(ConfigError, match="SEQ_CLS has no 'txt'; did you mean"):
        checked_examples(rows, "SEQ_CLS", {"txt": "sentence"})
    with pytest.raises(DataError, match=r"the domain is 'plce', which is not among .*did you mean .place"):
        checked_examples(rows, "SEQ_CLS", {**columns, "domain": "plce"})


def test_rows_of_another_task_are_refused() -> None:
    with pytest.raises(DataError, match="QUESTION_ANS reads the columns question,context,answers"):
        form_of("QUESTION_ANS", rows_like(text="a", label="b"), {})


def test_skip_leaves_bad_rows_out_and_counts_them() -> None:
    rows = rows_of([*ROWS, {"text": "", "label": "1"}, {"text": "a"}])
    examples, skipped = checked_examples(rows, "SEQ_CLS", {}, on_error="skip")
    assert len(examples) == 9
    assert [reason.partition(": ")[2] for reason in skipped] == ["the text is empty", "the label is missing"]
    with pytest.raises(DataError, match="none of 1 examples can be used"):
        checked_examples(rows_like(text="", label="1"), "SEQ_CLS", {}, on_error="skip")


def test_a_test_split_without_labels_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = rows_of({"train": ROWS, "test": [{"text": "a", "label": None}]})
    examples, _ = checked_examples(rows, "SEQ_CLS", {})
    assert len(examples) == 9
    assert "the 1 rows of the test split have no label" in caplog.text


def test_prediction_needs_no_answers() -> None:
    (example,), _ = checked_examples(rows_like(text="a"), "SEQ_CLS", {}, answered=False)
    assert example.fields == {"text": "a"}
    (example,), _ = checked_examples(rows_like(text="a"), "SEQ_2_SEQ_LM", {}, answered=False)
    assert example.fields == {"source": "a"}


def test_the_same_id_twice_is_refused() -> None:
    rows = rows_of([{"id": 1, "question": "q", "context": "c", "answers": []}] * 2)
    with pytest.raises(DataError, match="number 2: the id '1' is that of rows, number 1 too"):
        checked_examples(rows, "QUESTION_ANS", {})


def test_labels_keep_their_text() -> None:
    form = form_of("SEQ_CLS", rows_like(text="a", label="b"), {})
    for given, wanted in (("b", "b"), (1, "1"), (True, "True"), (2.5, 2.5), (["x", 1], ["x", "1"])):
        (row,) = rows_like(text="a", label=given)
        assert example_of(row, form, {}).fields["label"] == wanted
