"""A dataset gives its own images or says which file is bad; nothing is ever replaced by another sample."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from visionlora.data.augment import build_augment
from visionlora.data.dataset import UNLABELLED, Batch, ImageDataset, OnError, collate_images
from visionlora.data.transforms import Preprocess, input_config
from visionlora.errors import DataError, ImageError

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # Python 3.12 with workers
PREPROCESS = Preprocess(input_config(image_size=8, mean=[0.0], std=[1.0]))


def files(folder: Path, count: int = 6, bad: tuple[int, ...] = ()) -> list[str]:
    """Images of brightness 10, 20, 30 ... so that a picture tells its place."""
    for i in range(count):
        path = folder / f"{i}.png"
        path.write_bytes(b"") if i in bad else Image.new("RGB", (8, 8), (10 * i,) * 3).save(path)
    return [str(folder / f"{i}.png") for i in range(count)]


def dataset(folder: Path, bad: tuple[int, ...] = (), on_error: OnError = "raise") -> ImageDataset:
    return ImageDataset(files(folder, bad=bad), [0, 1, 2, 0, 1, 2], PREPROCESS, on_error=on_error)


def test_items_are_image_label_and_place(tmp_path: Path) -> None:
    item = dataset(tmp_path)[4]
    assert item is not None
    assert (item[0].shape, item[1], item[2]) == ((3, 8, 8), 1, 4)
    torch.testing.assert_close(item[0], torch.full((3, 8, 8), 40 / 255))


def test_a_loader_gives_batches_that_unpack(tmp_path: Path) -> None:
    batch = next(iter(DataLoader(dataset(tmp_path), batch_size=4, collate_fn=collate_images)))
    assert isinstance(batch, Batch)
    images, labels, indices = batch
    assert (images.shape, labels.tolist(), indices.tolist()) == ((4, 3, 8, 8), [0, 1, 2, 0], [0, 1, 2, 3])


def test_a_bad_file_raises_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"3\.png: the file is empty"):
        dataset(tmp_path, bad=(3,))[3]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipping_leaves_out_the_bad_file_only(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    data = dataset(tmp_path, bad=(1, 4), on_error="skip")
    with caplog.at_level(logging.WARNING):
        loader = DataLoader(data, batch_size=3, num_workers=workers, collate_fn=collate_images)
        batches = [*loader, *loader]
    assert [b.indices.tolist() for b in batches] == [[0, 2], [3, 5]] * 2
    assert [b.labels.tolist() for b in batches] == [[0, 2], [0, 2]] * 2
    assert [b.images[:, 0, 0, 0].mul(255).round().int().tolist() for b in batches] == [[0, 20], [30, 50]] * 2
    assert data.skipped == [data.paths[1], data.paths[4]]
    if workers == 0:
        assert [r.getMessage().split(":")[0] for r in caplog.records] == [f"skipped {p}" for p in data.skipped]


def test_a_bad_file_in_a_worker_is_named(tmp_path: Path) -> None:
    loader = DataLoader(dataset(tmp_path, bad=(3,)), batch_size=3, num_workers=1, collate_fn=collate_images)
    with pytest.raises(ImageError, match=r"3\.png: the file is empty"):
        list(loader)


def test_a_batch_without_a_readable_image_is_an_error(tmp_path: Path) -> None:
    data = dataset(tmp_path, bad=(0, 1), on_error="skip")
    with pytest.raises(ImageError, match="none of the 2 images"):
        collate_images([data[0], data[1]])


def test_keys_beyond_the_length_ask_for_another_epoch(tmp_path: Path) -> None:
    noisy = Preprocess(PREPROCESS.config, augment=build_augment([{"name": "GaussNoise", "p": 1.0}]))
    data = ImageDataset(files(tmp_path), None, noisy)
    first, again, second, other = data[2], data[2], data[8], data[3]
    assert first is not None and again is not None and second is not None and other is not None  # noqa: PT018
    assert torch.equal(first[0], again[0])
    assert not torch.equal(first[0], second[0])
    assert (second[1], second[2]) == (UNLABELLED, 2)


def test_random_changes_do_not_depend_on_the_number_of_workers(tmp_path: Path) -> None:
    noisy = Preprocess(PREPROCESS.config, augment=build_augment("surveillance"), seed=3)
    data = ImageDataset(files(tmp_path), None, noisy)
    keys = [13, 6, 12, 17, 8, 9]
    runs = [
        list(DataLoader(data, batch_size=2, sampler=keys, num_workers=n, collate_fn=collate_images)) for n in (0, 2)
    ]
    assert all(torch.equal(a.images, b.images) for a, b in zip(*runs, strict=True))


def test_a_failing_transform_names_the_file(tmp_path: Path) -> None:
    crop = build_augment([{"name": "RandomCrop", "height": 99, "width": 99, "p": 1.0}])
    with pytest.raises(DataError, match=r"2\.png: augment fails"):
        ImageDataset(files(tmp_path), None, Preprocess(PREPROCESS.config, augment=crop), on_error="skip")[2]
    Image.new("RGB", (1, 60_000)).save(tmp_path / "strip.png")
    strip = ImageDataset([str(tmp_path / "strip.png")], None, Preprocess(input_config(image_size=64)))
    with pytest.raises(ImageError, match=r"strip\.png: 1 x 60000 pixels are too narrow"):
        strip[0]


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one image"):
        ImageDataset([], None, PREPROCESS)
    for labels in ([0], [0, -1]):
        with pytest.raises(DataError, match="one class number, 0 or above, for each of 2"):
            ImageDataset(files(tmp_path, 2), labels, PREPROCESS)
    with pytest.raises(DataError, match='did you mean "skip"'):
        dataset(tmp_path, on_error="skpi")  # type: ignore[arg-type]
