"""The data module gives the loaders a run asks for, the same order and pixels for the same seed, and clear errors."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler

import visionlora
from visionlora.data.dataset import Batch
from visionlora.errors import ConfigError, DataError, ImageError
from visionlora.training.sampler import ResumableSampler
from visionlora.vision.datamodule import ImageFolderData

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")  # Python 3.12 with workers
lightning_warnings = pytest.mark.filterwarnings(
    "ignore:The '.*dataloader' does not have many workers", "ignore:`isinstance.treespec, LeafSpec.` is deprecated"
)


def write(root: Path, *folders: str, count: int = 10, step: int = 10) -> Path:
    """Images of one grey each, so that a tensor tells its file: 10 * class + number."""
    for c, folder in enumerate(folders):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (12, 12), (step * c + i,) * 3).save(root / folder / f"{c}{i:02}.png")
    return root


def data(root: Path | None = None, **options: Any) -> ImageFolderData:
    given = {"image_size": 8, "mean": [0.0], "std": [1.0], "augment": "none", "batch_size": 4, **options}
    return ImageFolderData(None if root is None else str(root), **given)


def greys(loader: DataLoader[Any], epoch: int = 0) -> list[list[int]]:
    if isinstance(loader.sampler, ResumableSampler):
        loader.sampler.set_epoch(epoch)
    return [batch.images[:, 0, 0, 0].mul(255).round().int().tolist() for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [value for batch in batches for value in batch]


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return write(tmp_path / "plain", "bus", "car")


def test_classes_are_known_before_setup(plain: Path) -> None:
    module = data(plain)
    assert (module.num_classes, module.class_names, module.class_counts) == (2, ["bus", "car"], [7, 7])
    assert module.record == {
        "input_size": [3, 8, 8],
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "interpolation": "bicubic",
        "crop_pct": 0.875,
        "crop_mode": "center",
    }


def test_every_image_is_in_one_part_and_keeps_its_label(plain: Path) -> None:
    module = data(plain, batch_size=3)
    loaders = [module.train_dataloader(), module.val_dataloader(), *module.test_dataloader()]
    module_parts = [module.parts.train, module.parts.val, module.parts.tests["target"]]
    assert [len(p) for p in module_parts] == [14, 2, 4]
    seen = []
    for loader in loaders:
        assert isinstance(loader, DataLoader)
        for batch in loader:
            assert isinstance(batch, Batch)
            values = batch.images[:, 0, 0, 0].mul(255).round().int().tolist()
            assert [value // 10 for value in values] == batch.labels.tolist()
            seen += values
    assert len(seen) == len(set(seen)) == 20 - 14 % 3


def test_training_order_is_a_function_of_seed_and_epoch(plain: Path) -> None:
    orders = [greys(data(plain, seed=s).train_dataloader(), e) for s, e in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]
    assert all(len(batch) == 4 for batch in orders[0])


@pytest.mark.parametrize("epoch", [0, 3])
def test_random_changes_repeat_by_seed_and_epoch_with_any_number_of_workers(plain: Path, epoch: int) -> None:
    runs = []
    for workers, at in ((0, epoch), (2, epoch), (0, epoch + 1)):
        loader = data(plain, augment="surveillance", seed=5, num_workers=workers).train_dataloader()
        loader.sampler.set_epoch(at)  # type: ignore[union-attr]
        runs.append({int(i): image for batch in loader for i, image in zip(batch.indices, batch.images, strict=True)})
    first, again, other = runs
    assert all(torch.equal(first[i], again[i]) for i in first)
    both = first.keys() & other.keys()
    assert any(not torch.equal(first[i], other[i]) for i in both)


def test_the_seed_of_the_run_is_the_default(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    assert greys(data(plain).train_dataloader()) == greys(data(plain, seed=7).train_dataloader())


def test_evaluation_and_statistics_come_in_order_and_unchanged(plain: Path) -> None:
    module = data(plain, augment="surveillance")
    loaders = [module.val_dataloader(), *module.test_dataloader(), module.statistics_dataloader()]
    for loader, part in zip(loaders, (module.parts.val, module.parts.tests["target"], module.parts.train), strict=True):
        assert isinstance(loader, DataLoader)
        assert isinstance(loader.sampler, SequentialSampler)
        assert flat(greys(loader)) == [int(Path(s.path).stem[0]) * 10 + int(Path(s.path).stem[1:]) for s in part]


def test_a_set_smaller_than_a_batch_is_one_batch(plain: Path) -> None:
    assert [len(b) for b in greys(data(plain, batch_size=64).train_dataloader())] == [14]


def test_test_loaders_are_named(tmp_path: Path) -> None:
    folders = [f"{domain}/{label}" for domain in ("night", "night_test", "day_test") for label in ("bus", "car")]
    root = write(tmp_path, *folders)
    module = data(root, train_domains=["night"], test_domains=["night_test"], source_domains=["day_test"])
    assert module.test_names == ["target", "source"]
    assert [sum(map(len, greys(loader))) for loader in module.test_dataloader()] == [20, 20]
    assert data(root, train_domains=["night"]).test_names == ["target", "day_test", "night_test"]


def test_the_source_may_lie_in_another_tree(plain: Path, tmp_path: Path) -> None:
    module = data(plain, source_root=str(write(tmp_path / "old", "test/bus", "test/car", "train/bus", "train/car")))
    assert module.test_names == ["target", "source"]
    assert len(module.parts.tests["source"]) == 20
    with pytest.raises(DataError, match="the test source images"):
        _ = data(plain, source_root=str(write(tmp_path / "other", "bus", "lorry"))).num_classes


def test_a_csv_and_shots(plain: Path) -> None:
    rows = [f"{label}/{c}{i:02}.png,{label}" for c, label in enumerate(("bus", "car")) for i in range(10)]
    (plain / "list.csv").write_text("\n".join(["path,label", *rows]))
    module = data(csv=str(plain / "list.csv"), shots=2)
    assert module.class_counts == [2, 2]


def test_grey_images_for_grey_models(plain: Path) -> None:
    batch = next(iter(data(plain, in_chans=1, augment="light").train_dataloader()))
    assert batch.images.shape == (4, 1, 8, 8)
    assert data(plain, model_args={"in_chans": 1}).input_config.input_size == (1, 8, 8)


def test_the_input_comes_from_the_model_and_arguments_win(plain: Path) -> None:
    module = ImageFolderData(str(plain), model_name="vit_tiny_patch16_224")
    assert (module.record["mean"], module.record["crop_pct"]) == ([0.5] * 3, 0.9)
    assert module.record["input_size"] == [3, 224, 224]
    module = ImageFolderData(str(plain), model_name="vit_tiny_patch16_224", model_args={"img_size": 96}, crop_pct=1.0)
    assert (module.record["input_size"], module.record["crop_pct"]) == ([3, 96, 96], 1.0)
    with pytest.raises(ConfigError, match='did you mean "vit_tiny_patch16_224"'):
        ImageFolderData(str(plain), model_name="vit_tinny_patch16_224")


def test_prediction_takes_a_file_a_folder_or_a_glob(plain: Path) -> None:
    for source, count in ((plain / "bus" / "000.png", 1), (plain, 20), (plain / "*" / "*5.png", 2)):
        loader = data(predict_source=str(source)).predict_dataloader()
        assert sum(map(len, greys(loader))) == count
        assert len(loader.dataset.paths) == count  # type: ignore[attr-defined]
    assert data(classes=["a", "b"], predict_source=str(plain)).num_classes == 2
    with pytest.raises(DataError, match="predict_source"):
        data().predict_dataloader()


def test_bad_images_raise_or_are_counted(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    (plain / "bus" / "000.png").write_bytes(b"")
    loader = data(plain, val_fraction=0.0, test_fraction=0.0, num_workers=2).train_dataloader()
    with pytest.raises(ImageError, match=r"000\.png"):
        list(loader)
    module = data(plain, val_fraction=0.0, test_fraction=0.0, on_error="skip", num_workers=2)
    assert sum(map(len, greys(module.train_dataloader()))) == 19
    assert module.skipped == {"train": [str(plain / "bus" / "000.png")]}
    with caplog.at_level(logging.WARNING):
        module.teardown("fit")
    assert "train: 1 of 20 images could not be read" in caplog.text


def test_validation_without_images_is_an_error(plain: Path) -> None:
    with pytest.raises(DataError, match=r"val_fraction above 0, or --trainer\.limit_val_batches 0"):
        data(plain, val_fraction=0.0).val_dataloader()


def test_a_worker_that_hangs_is_an_error_by_default(plain: Path) -> None:
    assert data(plain, num_workers=2).train_dataloader().timeout == 300
    assert data(plain, num_workers=0).train_dataloader().timeout == 0
    assert data(plain).train_dataloader().num_workers == 0


def test_another_sampler_may_be_given(plain: Path) -> None:
    loader = data(plain, train_sampler=SequentialSampler).train_dataloader()
    assert isinstance(loader.sampler, SequentialSampler)


def test_settings_are_kept_as_plain_data(plain: Path) -> None:
    module = data(plain, group_by="^.", train_sampler=SequentialSampler)
    assert module.hparams["group_by"] == "^."
    assert "train_sampler" not in module.hparams
    assert "group_by" not in data(plain, group_by=str.lower).hparams


def test_the_command_line_reads_and_writes_every_setting(plain: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(ImageFolderData, "data")
    augment = [{"name": "OneOf", "p": 0.5, "transforms": [{"name": "RandomGamma", "gamma_limit": [60, 140]}]}]
    words = [f"--data.root={plain}", "--data.image_size=[8, 12]", "--data.group_by=^[^_]+", "--data.mean=[0.5]"]
    words += [f"--data.augment={json.dumps(augment)}", "--data.classes=[car, bus]", "--data.train_domains=null"]
    config = parser.parse_args(words)
    again = parser.parse_string(parser.dump(config))
    assert again.data.augment == augment
    module = parser.instantiate(again).data
    assert (module.input_config.input_size, module.class_names) == ((3, 8, 12), ["car", "bus"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"csv": "x.csv"}, ConfigError, "not both"),
        ({"batch_size": 0}, ConfigError, "above 0"),
        ({"num_workers": -1}, ConfigError, "at least 0"),
        ({"augment": "strong"}, DataError, "none, light, surveillance"),
        ({"classes": ["bus"]}, DataError, "two classes"),
        ({"classes": ["bus", "van"]}, DataError, "'car'"),
        ({"on_error": "ignore"}, DataError, "raise or skip"),
        ({"train_domains": ["day"]}, DataError, "it has none"),
        ({"layout": "class/split"}, DataError, "layout must be"),
    ],
)
def test_impossible_settings_are_errors(plain: Path, options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        data(plain, **options).train_dataloader()


def test_no_data_and_wrong_roots_are_errors(plain: Path) -> None:
    with pytest.raises(DataError, match="no data: give a folder as root"):
        _ = data().num_classes
    with pytest.raises(DataError, match='did you mean "plain"'):
        _ = data(plain.parent / "plian").num_classes


class Recorder(pl.LightningModule):
    """Notes the images of every step; learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[Tensor] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images = self.all_gather(batch.images[:, 0, 0, 0]) if self.trainer.world_size > 1 else batch.images[:, 0, 0, 0]
        self.seen.append(images.flatten().mul(255).round().int().sort().values)
        return (self.weight * 0).sum()

    def validation_step(self, batch: Batch, batch_idx: int) -> None: ...

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def record(root: str, devices: int, epochs: int = 2) -> list[list[int]]:
    """Return the global batches of a run on one or more processes."""
    module = Recorder()
    options: dict[str, Any] = {"accelerator": "cpu", "devices": devices, "max_epochs": epochs, "logger": False}
    options |= {
        "limit_val_batches": 0,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(strategy="ddp" if devices > 1 else "auto", **options)
    trainer.fit(
        module, datamodule=data(Path(root), batch_size=4 // devices, val_fraction=0.0, test_fraction=0.0, seed=3)
    )
    return [batch.tolist() for batch in module.seen]


@lightning_warnings
def test_a_run_sees_a_new_order_in_each_epoch(plain: Path) -> None:
    batches = record(str(plain), devices=1)
    assert len(batches) == 10
    for epoch in (batches[:5], batches[5:]):
        assert sorted(flat(epoch)) == list(range(20))
    assert batches[:5] != batches[5:]


@pytest.mark.slow
@lightning_warnings
def test_two_processes_see_the_global_batches_of_one(plain: Path) -> None:
    command = [sys.executable, "-W", "ignore", __file__, str(plain)]
    env = {**os.environ, "PYTHONPATH": str(Path(visionlora.__file__).parents[1])}
    run = subprocess.run(command, check=False, capture_output=True, text=True, timeout=280, env=env)
    assert run.returncode == 0, run.stderr[-3000:]
    (told,) = [line for line in run.stdout.splitlines() if line.startswith("batches ")]
    assert told == f"batches {record(str(plain), devices=1)}"


if __name__ == "__main__":
    found = record(sys.argv[1], devices=2)
    if torch.distributed.get_rank() == 0:
        print("batches", found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()  # a process that ends with its connections open may abort
