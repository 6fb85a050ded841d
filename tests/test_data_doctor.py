"""The doctor finds every fault that would stop or falsify a run, and none in a healthy data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visionlora.data.doctor import Report, examine, examine_csv, examine_tree, render
from visionlora.data.folders import Sample


def noise(seed: int, size: int = 20) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def healthy(root: Path, parts: tuple[str, ...] = ("train", "val"), count: int = 12) -> Path:
    for p, part in enumerate(parts):
        for c, label in enumerate(("bus", "car")):
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                noise(1000 * p + 100 * c + i).save(root / part / label / f"{i}.png")
    return root


def codes(report: Report, severity: str) -> list[str]:
    return [f.code for f in report.findings if f.severity == severity]


def message(report: Report, code: str) -> str:
    (found,) = [f.message for f in report.findings if f.code == code]
    return found


def test_a_healthy_tree_has_no_errors_and_no_warnings(tmp_path: Path) -> None:
    report = examine_tree(healthy(tmp_path))
    assert (report.images, report.count("error"), report.count("warning")) == (48, 0, 0)
    assert codes(report, "info") == ["balance", "format", "size"]
    assert "48 images examined: 0 errors, 0 warnings" in render(report)


def test_unreadable_files_are_errors_with_their_paths(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    (root / "train/car/zero.jpg").touch()
    (root / "train/car/page.jpg").write_text("<html>")
    (root / "val/bus/cut.png").write_bytes((root / "val/bus/0.png").read_bytes()[:600])
    report = examine_tree(root)
    assert codes(report, "error") == ["empty", "unreadable", "unreadable"]
    paths = {Path(f.path or "").name for f in report.findings if f.severity == "error"}
    assert paths == {"zero.jpg", "page.jpg", "cut.png"}
    assert all((f.path or "") in f.message for f in report.findings if f.severity == "error")


def test_duplicates_are_found_by_their_pixels(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    noise(0).save(root / "train/bus/again.bmp")
    report = examine_tree(root)
    assert codes(report, "warning") == ["duplicate"]
    assert "again.bmp" in message(report, "duplicate")


def test_a_picture_in_two_splits_or_with_two_labels_is_an_error(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    noise(0).save(root / "val/bus/leak.png")
    noise(1).save(root / "train/car/other.png")
    report = examine_tree(root)
    assert codes(report, "error") == ["leak", "two-labels"]
    assert "train and val" in message(report, "leak")
    assert "bus and car" in message(report, "two-labels")


def test_a_picture_in_two_domains_is_a_warning(tmp_path: Path) -> None:
    root = healthy(tmp_path, parts=("day", "night"))
    noise(0).save(root / "night/bus/day.png")
    assert "in day and night" in message(examine_tree(root), "duplicate")


def test_class_names_that_differ_between_splits_are_errors(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    (root / "val/car").rename(root / "val/cars")
    report = examine_tree(root)
    assert message(report, "class-mismatch") == "class 'cars' is not in the training part; did you mean \"car\"?"
    assert message(report, "class-missing") == "val has no image of car"


def test_classes_of_domains_and_of_a_given_list_are_compared(tmp_path: Path) -> None:
    root = healthy(tmp_path, parts=("day", "night"))
    (root / "night/car").rename(root / "night/truck")
    report = examine_tree(root)
    assert sorted(f.message for f in report.findings if f.code == "class-missing") == [
        "day has no image of truck",
        "night has no image of car",
    ]
    report = examine_tree(root, classes=["bus", "car"])
    assert "'truck' is not in the given classes" in message(report, "class-mismatch")


def test_empty_class_folders_and_impossible_trees_are_findings(tmp_path: Path) -> None:
    root = healthy(tmp_path / "a")
    (root / "train/truck").mkdir()
    assert codes(examine_tree(root), "error") == ["empty-class"]
    assert codes(examine_tree(root, classes=["bus", "car", "truck"]), "error") == []
    (tmp_path / "b").mkdir()
    assert codes(examine_tree(tmp_path / "b"), "error") == ["layout"]
    assert 'did you mean "a"' in message(examine_tree(tmp_path / "aa"), "layout")
    assert codes(examine_csv(tmp_path / "none.csv"), "error") == ["layout"]


def test_single_small_and_unbalanced_classes_are_told(tmp_path: Path) -> None:
    root = healthy(tmp_path, parts=("train",), count=40)
    for i in range(3, 40):
        (root / f"train/car/{i}.png").unlink()
    report = examine_tree(root)
    assert codes(report, "warning") == ["balance", "small-class"]
    assert "bus (40), is 13.3 times car (3)" in message(report, "balance")
    only = [Sample(str(root / "train/bus/0.png"), "bus")]
    assert "one-class" in codes(examine(only), "error")


def test_odd_files_are_told(tmp_path: Path) -> None:
    root = healthy(tmp_path)
    noise(7, 8).save(root / "train/car/tiny.png")
    frames = [noise(8), noise(9)]
    frames[0].save(root / "train/car/move.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(10).save(root / "train/car/turned.jpg", format="PNG", exif=exif)
    report = examine_tree(root)
    assert codes(report, "warning") == ["animated", "tiny"]
    assert "1 images carry" in message(report, "rotated")
    assert "turned.jpg" in message(report, "misnamed")
    assert "RGB" in message(report, "format")


def test_a_csv_is_examined(tmp_path: Path) -> None:
    root = healthy(tmp_path, parts=("train",))
    rows = [f"train/{label}/{i}.png,{label}" for label in ("bus", "car") for i in range(12)]
    (root / "list.csv").write_text("\n".join(["path,label", *rows]))
    report = examine_csv(root / "list.csv")
    assert (report.images, report.count("error")) == (24, 0)


@pytest.mark.parametrize("bad", [3, 30])
def test_the_table_is_short_and_counts_everything(tmp_path: Path, bad: int) -> None:
    root = healthy(tmp_path)
    for i in range(bad):
        (root / f"train/car/bad{i:02}.jpg").touch()
    text = render(examine_tree(root), most=5, width=100)
    lines = text.splitlines()
    assert max(map(len, lines)) <= max(100, len(str(root)) + 60)
    assert lines[-1] == f"{48 + bad} images examined: {bad} errors, 0 warnings"
    assert text.count("0 bytes") == min(bad, 5)
    assert ("... and 25 more" in text) == (bad == 30)
