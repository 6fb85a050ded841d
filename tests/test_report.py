"""The end of a run: table, JSON, pictures, predictions."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from PIL import Image

import visionlora as vl
from visionlora.report.closing import Closing, SetScores
from visionlora.report.measure import answer
from visionlora.report.pictures import Tile, confusion_picture, sample_picture
from visionlora.report.predictions import PredictionWriter
from visionlora.report.run import RunReport
from visionlora.training.checkpoint import AdapterCheckpoint
from visionlora.training.checkpoint_io import AtomicCheckpointIO
from visionlora.vision.datamodule import ImageFolderData
from visionlora.vision.loading import load_model
from visionlora.vision.metrics import Result, Scores
from visionlora.vision.module import ImageClassifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """day and night of three colours."""
    root, random = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for domain, light, count in (("day", 200, 6), ("night", 60, 12)):
        for channel, name in ((2, "blue"), (1, "green"), (0, "red")):
            (root / domain / name).mkdir(parents=True)
            for i in range(count):
                pixels = random.integers(0, light, (32, 32, 3))
                pixels[..., channel] += 55
                Image.fromarray(pixels.astype(np.uint8)).save(root / domain / name / f"{i}.png")
    return root


def data(folder: Path) -> ImageFolderData:
    return ImageFolderData(
        str(folder), train_domains=["night"], source_domains=["day"], image_size=32, mean=[0.5] * 3, std=[0.5] * 3,
        interpolation="bilinear", crop_pct=1.0, batch_size=8, augment="none", num_workers=0,
    )  # fmt: skip


def classifier(mode: str = "lora") -> ImageClassifier:
    lora = vl.LoraConfig(r=2)
    return ImageClassifier("test_resnet", 3, class_names=CLASSES, mode=mode, lora=lora, pretrained=False, lr=1e-2)


def fit(
    tmp_path: Path,
    folder: Path,
    module: ImageClassifier,
    *callbacks: pl.Callback,
    max_epochs: int = 2,
    ckpt_path: Path | None = None,
) -> pl.Trainer:
    trainer = pl.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", devices=1, plugins=[AtomicCheckpointIO()], max_epochs=max_epochs,
        callbacks=list(callbacks), enable_checkpointing=any(isinstance(c, AdapterCheckpoint) for c in callbacks),
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data(folder), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def accuracy(net: torch.nn.Module, loader: Any) -> float:
    net.eval()
    with torch.no_grad():
        right = [(net(batch.images).argmax(1) == batch.labels) for batch in loader]
    return float(torch.cat(right).float().mean())


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_table_speaks_of_the_adapter_on_disk_and_of_the_base(tmp_path, folder, mode):
    shown: list[str] = []
    module, report = classifier(mode), RunReport(show=shown.append)
    loaders = data(folder)
    base = [accuracy(module.net, loader) for loader in loaders.test_dataloader()]
    fit(tmp_path, folder, module, report, AdapterCheckpoint(tmp_path))
    closing = report.closing
    assert closing is not None
    assert list(closing.sets) == ["target", "source"]
    assert [s.before.acc for s in closing.sets.values()] == pytest.approx(base)
    assert closing.base_unchanged is (True if mode == "lora" else None)
    on_disk = load_on_disk(tmp_path, module)
    found = [s.after.acc for s in closing.sets.values()]
    assert found == pytest.approx([accuracy(on_disk, loader) for loader in loaders.test_dataloader()])
    (text,) = shown
    assert f"{found[0]:.1%}" in text
    assert f"mode {mode}" in text
    assert str(tmp_path / "adapter") in text


def load_on_disk(path: Path, module: ImageClassifier) -> torch.nn.Module:
    if module.config is None:
        return load_model(path / "adapter")
    fresh = classifier().net
    vl.remove(fresh)
    vl.load_adapter(fresh, path / "adapter")
    return fresh


def test_everything_is_written_into_the_folder(tmp_path, folder):
    fit(tmp_path, folder, classifier(), RunReport(show=lambda text: None))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["trainable"] > 0
    assert summary["size"] == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert np.asarray(summary["sets"]["target"]["after"]["confusion"]).shape == (3, 3)
    for name in ("confusion_matrix.png", "samples.png"):
        pixels = np.asarray(Image.open(tmp_path / name).convert("L"))
        assert min(pixels.shape) > 200
        assert pixels.std() > 10


def test_the_model_is_left_as_training_left_it(tmp_path, folder):
    states: list[dict[str, torch.Tensor]] = []

    class Keep(pl.Callback):
        def on_train_end(self, trainer, pl_module):
            states.append({k: v.clone() for k, v in pl_module.state_dict().items()})

    module = classifier()
    fit(tmp_path, folder, module, Keep(), RunReport(show=lambda text: None), AdapterCheckpoint(tmp_path))
    after = module.state_dict()
    assert states[0].keys() == after.keys()
    assert all(torch.equal(states[0][key], after[key]) for key in after)
    assert vl.adapter_names(module.net) == ["default"]
    assert {p for g in module.trainable_groups().values() for p in g} == {
        p for p in module.parameters() if p.requires_grad
    }


def test_a_head_of_new_classes_has_no_before(tmp_path, folder):
    weights = timm.create_model("test_resnet", num_classes=7).state_dict()
    torch.save(weights, tmp_path / "w.pth")
    module = ImageClassifier("test_resnet", 3, class_names=CLASSES, checkpoint=str(tmp_path / "w.pth"))
    shown: list[str] = []
    fit(tmp_path, folder, module, RunReport(show=shown.append), max_epochs=1)
    assert "no head for these classes: there is no accuracy before; chance is 33.3%" in shown[0]
    assert json.loads((tmp_path / "summary.json").read_text())["sets"]["target"]["before"] is None


def test_a_resumed_full_run_still_knows_its_base(tmp_path, folder):
    first = RunReport(show=lambda text: None)
    trainer = fit(tmp_path, folder, classifier("full"), first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = RunReport(show=lambda text: None)
    fit(tmp_path, folder, classifier("full"), again, max_epochs=2, ckpt_path=tmp_path / "x.ckpt")
    assert first.closing is not None
    assert again.closing is not None
    for name, scores in again.closing.sets.items():
        assert scores.before == first.closing.sets[name].before
    assert again.closing.seconds > first.closing.seconds
    assert again.closing.epochs == 2


def test_answers_are_those_of_the_model_in_order(folder):
    module, loader = classifier(), data(folder).test_dataloader()[1]
    answers = answer(module.net, loader, 3)
    with torch.no_grad():
        probabilities = torch.cat([module.net.eval()(b.images).softmax(-1) for b in loader])
    assert answers.predicted == probabilities.argmax(-1).tolist()
    assert answers.confidence == pytest.approx(probabilities.max(-1).values.tolist())
    assert list(answers.places) == list(range(18))
    assert answers.labels == loader.dataset.labels


def result(right: int, wrong: int) -> Result:
    scores, labels = Scores(2), torch.zeros(right + wrong, dtype=torch.long)
    logits = torch.tensor([[4.0, 0.0]] * right + [[0.0, 4.0]] * wrong)
    scores.update(logits, labels)
    return scores.compute()


def closing(**changes: Any) -> Closing:
    sets = {"target": SetScores(result(9, 1), result(5, 5)), "source": SetScores(result(7, 3), result(8, 2))}
    values: dict[str, Any] = {
        "sets": sets, "classes": 2, "mode": "lora", "trainable": 1234, "base": 100_000, "saved": "runs/a/adapter",
        "size": 5300, "seconds": 75.4, "epochs": 3, "steps": 1200, "memory": 812_000_000, "memory_of": "process",
        "base_unchanged": True,
    }  # fmt: skip
    return Closing(**{**values, **changes})


def test_the_table_reads_as_people_write():
    assert str(closing()) == "\n".join(
        [
            "accuracy on  images  before  after  change",
            "-----------  ------  ------  -----  ------  ---------",
            "target           10   50.0%  90.0%   +40.0",
            "source           10   80.0%  70.0%   -10.0  forgotten",
            "",
            "trained      1,234 parameters, 1.23% of the model's 100,000 (mode lora)",
            "adapter      5.3 kB in runs/a/adapter",
            "time         1 min 15 s for 3 epochs, 1,200 steps",
            "peak memory  812.0 MB (process)",
            "adapter off  the base, bit for bit",
        ]
    )


def test_a_table_without_what_was_not_measured():
    text = str(closing(sets={}, memory=None, mode="full", base_unchanged=None, seconds=7300))
    assert text.startswith("no test images: accuracy was not measured")
    assert "not told by this system" in text
    assert "2 h 1 min" in text
    assert "adapter" not in text.replace("runs/a/adapter", "")


def test_a_broken_base_is_shouted():
    assert "NOT the base any more" in str(closing(base_unchanged=False))


@pytest.mark.parametrize("classes", [2, 30, 100])
def test_the_confusion_picture_shows_the_diagonal(tmp_path, classes):
    scores, labels = Scores(classes), torch.arange(classes).repeat(3)
    scores.update(torch.nn.functional.one_hot(labels, classes) * 9.0, labels)
    confusion_picture(tmp_path / "c.png", scores.compute(), [f"cost $ {i}" for i in range(classes)], title="target")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).astype(int)
    dark_blue = (pixels[..., 2] - pixels[..., 0] > 60) & (pixels[..., 0] < 40)
    rows, columns = np.nonzero(dark_blue[:, : int(pixels.shape[1] * 0.85)])
    assert np.corrcoef(rows, columns)[0, 1] > 0.5


def test_the_sample_picture_marks_right_and_wrong(tmp_path):
    grey = np.full((32, 32, 3), 0.5, np.float32)
    tiles = [Tile(grey, "car 90%", True), Tile(grey, "bus 80%", False, "is car"), Tile(grey, "car")]
    sample_picture(tmp_path / "s.png", {"a": tiles, "empty": [], "b": tiles * 5})
    pixels = np.asarray(Image.open(tmp_path / "s.png").convert("RGB")).reshape(-1, 3).tolist()
    colours = {tuple(p) for p in pixels}
    assert (0x1A, 0x7F, 0x4B) in colours
    assert (0xC0, 0x39, 0x2B) in colours


def test_predictions_are_written_row_by_row(tmp_path):
    probabilities = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])
    paths = ['a, "b".jpg', "ü.png"]
    with PredictionWriter(tmp_path / "out" / "p", CLASSES, top=2) as writer:
        writer.write(paths, probabilities)
    with (tmp_path / "out" / "p.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {
        "path": paths[0], "label": "blue", "probability": "0.7", "label_2": "green", "probability_2": "0.2",
    }  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "out" / "p.jsonl").read_text(encoding="utf-8").splitlines()]
    assert lines[1] == {
        "path": "ü.png", "label": "red", "probability": 0.6,
        "top": [{"label": "red", "probability": 0.6}, {"label": "green", "probability": 0.3}],
    }  # fmt: skip
    assert writer.rows == 2
