"""Folder trees and CSV files become samples, or an error that says what is wrong where."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from visionlora.data.classes import check_labels, class_list
from visionlora.data.find import find_images
from visionlora.data.folders import Sample, read_csv, read_tree, scan_tree
from visionlora.errors import DataError


def tree(root: Path, *files: str) -> Path:
    """Empty files: listing never opens an image."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def facts(root: Path, samples: list[Sample]) -> list[tuple[str, str, str | None, str | None]]:
    return [(Path(s.path).relative_to(root).as_posix(), s.label, s.domain, s.split) for s in samples]


def test_class_tree(tmp_path: Path) -> None:
    tree(tmp_path, "car/b.JPG", "car/a.png", "bus/c.webp")
    got = [("bus/c.webp", "bus", None, None), ("car/a.png", "car", None, None), ("car/b.JPG", "car", None, None)]
    assert facts(tmp_path, read_tree(tmp_path)) == got


def test_split_tree_with_other_spellings(tmp_path: Path) -> None:
    tree(tmp_path, "training/car/a.jpg", "valid/car/b.jpg", "test/car/c.jpg")
    assert {(s.label, s.split) for s in read_tree(tmp_path)} == {("car", "train"), ("car", "val"), ("car", "test")}


def test_domain_tree_and_domain_split_tree(tmp_path: Path) -> None:
    tree(tmp_path / "one", "webcam/car/a.jpg", "dslr/car/b.jpg")
    assert {(s.domain, s.label, s.split) for s in read_tree(tmp_path / "one")} == {
        ("webcam", "car", None),
        ("dslr", "car", None),
    }
    tree(tmp_path / "two", "webcam/train/car/a.jpg", "webcam/test/car/b.jpg")
    assert {(s.domain, s.split) for s in read_tree(tmp_path / "two")} == {("webcam", "train"), ("webcam", "test")}


def test_a_named_layout_takes_nested_images(tmp_path: Path) -> None:
    tree(tmp_path, "car/2024/a.jpg", "car/b.jpg", "bus/c.jpg")
    assert [s.label for s in read_tree(tmp_path, layout="class")] == ["bus", "car", "car"]
    with pytest.raises(DataError, match="two depths"):
        read_tree(tmp_path)
    with pytest.raises(DataError, match="does not fit"):
        read_tree(tmp_path, layout="domain/class")


def test_hidden_folders_and_other_files_are_left_out(tmp_path: Path) -> None:
    tree(
        tmp_path, ".ipynb_checkpoints/a.jpg", "__MACOSX/b.jpg", "car/.hidden.jpg", "car/a.jpg", "car/notes.txt", "x.txt"
    )
    assert facts(tmp_path, read_tree(tmp_path)) == [("car/a.jpg", "car", None, None)]


def test_an_empty_class_folder_is_an_error_unless_named(tmp_path: Path) -> None:
    tree(tmp_path, "car/a.jpg", "bus/b.jpg")
    (tmp_path / "truck").mkdir()
    with pytest.raises(DataError, match="truck: a class folder without images"):
        read_tree(tmp_path)
    assert len(read_tree(tmp_path, classes=["bus", "car", "truck"])) == 2


def test_a_split_without_images_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path, "train/car/a.jpg", "train/bus/b.jpg")
    (tmp_path / "val").mkdir()
    with pytest.raises(DataError, match="val: a class folder without images"):
        read_tree(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["readme.txt"], "no image in it"),
        (["a.jpg"], "lie in it directly"),
        (["a.jpg", "car/a.jpg"], "lie in it directly"),
        (["train/a.jpg", "test/b.jpg"], "lie directly in t"),
        (["train/car/a.jpg", "test/b.jpg"], "two depths"),
        (["train/car/a.jpg", "webcam/car/b.jpg"], "some folders are splits"),
        (["a/b/c/d.jpg"], "no layout known"),
        (["a/b/c/d/e.jpg"], "no layout known"),
    ],
)
def test_trees_that_fit_no_layout_are_errors(tmp_path: Path, files: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_tree(tree(tmp_path, *files))


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    tree(tmp_path, "car/a.jpg", "bus/b.jpg")
    (tmp_path / "car" / "again").symlink_to(tmp_path)
    for call in (read_tree, find_images):
        with pytest.raises(DataError, match=r"car/again: a symbolic link to a folder that contains it"):
            call(tmp_path)


def test_links_that_do_not_loop_are_followed(tmp_path: Path) -> None:
    tree(tmp_path / "store", "a.jpg")
    tree(tmp_path / "data", "bus/b.jpg")
    (tmp_path / "data" / "car").symlink_to(tmp_path / "store")
    assert [s.label for s in read_tree(tmp_path / "data")] == ["bus", "car"]


def test_a_link_to_itself_stays_in_the_list_as_a_bad_image(tmp_path: Path) -> None:
    tree(tmp_path, "car/a.jpg")
    (tmp_path / "car" / "b.jpg").symlink_to(tmp_path / "car" / "b.jpg")
    assert [Path(s.path).name for s in read_tree(tmp_path)] == ["a.jpg", "b.jpg"]


def test_a_missing_root_names_the_nearest_folder(tmp_path: Path) -> None:
    (tmp_path / "office").mkdir()
    with pytest.raises(DataError, match=r'offce does not exist; did you mean "office"'):
        read_tree(tmp_path / "offce")
    with pytest.raises(DataError, match=r'did you mean "office"'):
        read_tree(tmp_path / "offce" / "webcam")


def test_a_file_as_root_and_an_unknown_layout_are_errors(tmp_path: Path) -> None:
    tree(tmp_path, "labels.csv")
    with pytest.raises(DataError, match="give a CSV as csv"):
        read_tree(tmp_path / "labels.csv")
    with pytest.raises(DataError, match="did you mean"):
        read_tree(tmp_path, layout="split-class")  # type: ignore[arg-type]


def test_a_scan_collects_faults_without_raising(tmp_path: Path) -> None:
    tree(tmp_path, "car/a.jpg")
    (tmp_path / "bus").mkdir()
    scan = scan_tree(tmp_path)
    assert (len(scan.samples), scan.empty, scan.problems) == (1, ["bus"], [])


def csv_file(folder: Path, text: str) -> Path:
    tree(folder, "img/a.jpg", "img/b.jpg")
    (folder / "list.csv").write_text(text, encoding="utf-8")
    return folder / "list.csv"


def test_csv_rows_become_samples(tmp_path: Path) -> None:
    text = "\ufeffpath,label,domain,split\nimg/a.jpg,car,night,training\nimg/b.jpg, bus ,,\n"
    got = facts(tmp_path, read_csv(csv_file(tmp_path, text)))
    assert got == [("img/a.jpg", "car", "night", "train"), ("img/b.jpg", "bus", None, None)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\nimg/a.jpg,car\n", "expected the columns path,label"),
        ("paths,label\nimg/a.jpg,car\n", 'rename "paths" to path'),
        ("path;label\nimg/a.jpg;car\n", "expected the columns"),
        ("", "expected the columns"),
        ("path,label\n", "no rows"),
        ("path,label\nimg/a.jpg,car\nimg/b.jpg,\n", "line 3: the label is empty"),
        ("path,label\nimg/a.jpg\n", "line 2: the label is empty"),
        ("path,label\nimg/c.jpg,car\n", "line 2: .*c.jpg does not exist"),
        ("path,label,split\nimg/a.jpg,car,tran\n", 'line 2: split .*did you mean "train"'),
        ("path,label\nimg/a.jpg,car\nimg/a.jpg,bus\n", "listed more than once: .*a.jpg"),
    ],
)
def test_faults_in_a_csv_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_csv(csv_file(tmp_path, text))


def test_a_csv_that_is_not_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(DataError, match="not a CSV in UTF-8"):
        read_csv(tmp_path / "list.csv")
    with pytest.raises(DataError, match=r'did you mean "list\.csv"'):
        read_csv(tmp_path / "lists.csv")


def samples(*labels: str) -> list[Sample]:
    return [Sample(f"{i}.jpg", label) for i, label in enumerate(labels)]


def test_classes_are_sorted_as_text_or_by_value() -> None:
    assert class_list(samples("car", "Bus", "bike")) == ["Bus", "bike", "car"]
    assert class_list(samples("10", "9", "0")) == ["0", "9", "10"]
    assert class_list(samples("10", "09", "00")) == ["00", "09", "10"]


def test_a_given_list_fixes_the_order_and_may_be_longer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert class_list(samples("car", "bus"), classes=["truck", "car", "bus"]) == ["truck", "car", "bus"]
    assert "no training image of truck" in caplog.text
    caplog.clear()
    assert class_list([], classes=["car", "bus"]) == ["car", "bus"]
    assert not caplog.records, "prediction trains on nothing"


def test_a_label_outside_the_given_list_is_an_error() -> None:
    with pytest.raises(DataError, match=r"'buss'; did you mean \"bus\""):
        class_list(samples("car", "buss"), classes=["car", "bus"])
    with pytest.raises(DataError, match="more than once"):
        class_list(samples("car", "bus"), classes=["car", "car", "bus"])


@pytest.mark.parametrize("labels", [["car", "car"], []])
def test_fewer_than_two_classes_are_refused(labels: list[str]) -> None:
    with pytest.raises(DataError, match="two classes or more"):
        class_list(samples(*labels))


def test_an_unknown_class_in_another_split_is_named_with_its_neighbour() -> None:
    with pytest.raises(DataError, match=r"split val: .*'trucks'; did you mean \"truck\""):
        check_labels(["car", "trucks"], ["car", "truck"], where="split val")


def test_a_file_a_folder_and_a_glob_stand_for_images(tmp_path: Path) -> None:
    tree(tmp_path, "b.jpg", "sub/a.png", "sub/notes.txt", "odd[1].jpg")
    names = [str(tmp_path / name) for name in ("b.jpg", "odd[1].jpg", "sub/a.png")]
    assert find_images(tmp_path) == names
    assert find_images(str(tmp_path / "**" / "*.*g")) == names
    assert find_images(str(tmp_path / "odd[1].jpg")) == [names[1]]
    assert find_images(str(tmp_path / "sub" / "notes.txt")) == [str(tmp_path / "sub" / "notes.txt")]


@pytest.mark.parametrize(("source", "message"), [("*.bmp", "no image found"), ("b.jpeg", 'did you mean "b.jpg"')])
def test_a_source_without_images_is_an_error(tmp_path: Path, source: str, message: str) -> None:
    tree(tmp_path, "b.jpg")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=message):
        find_images(str(tmp_path / source))
    with pytest.raises(DataError, match="no image found"):
        find_images(tmp_path / "empty")


def test_a_folder_closed_to_us_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "car/a.jpg", "bus/b.jpg")
    real = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "bus":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)  # a chmod does not stop the administrator
    with pytest.raises(DataError, match="bus: Permission denied"):
        read_tree(tmp_path)
