"""What an image classifier does with a batch, whatever is trained: logits, loss, scores, predictions."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visionlora.data.dataset import Batch
from visionlora.vision.features import FeatureBatch
from visionlora.vision.layout import laid_out
from visionlora.vision.loops import as_batch, image_paths, set_names
from visionlora.vision.metrics import Result, Scores, check_labels, check_predictions
from visionlora.vision.prefix import Cut

__all__ = ["ImageSteps"]


class ImageSteps(pl.LightningModule):
    """The steps of a classifier on a network."""

    net: nn.Module
    class_names: list[str]
    _class_weight: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, Result] = {}
        """Newest result of each set of images: "val", "test" or "test/<name>"."""
        self._scores: dict[str, Scores] = {}
        self._first_epoch = 0
        self._cut: Cut | None = None
        self._layout = torch.contiguous_format
        self.register_buffer("_class_weight", None, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, (batch, classes)."""
        return self.net(laid_out(images, self._layout))  # type: ignore[no-any-return]

    def _logits(self, batch: Batch | FeatureBatch) -> Tensor:
        if isinstance(batch, FeatureBatch):
            assert self._cut is not None
            return self._cut.logits(batch.images)
        return self(batch.images)  # type: ignore[no-any-return]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the training loss: cross-entropy with class weights and label smoothing."""
        smoothing: float = self.hparams.label_smoothing
        return F.cross_entropy(logits.float(), labels, weight=self._class_weight, label_smoothing=smoothing)

    def on_train_start(self) -> None:
        self._first_epoch = self.current_epoch

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        batch = as_batch(batch)
        # on a GPU this waits for the device; labels do not change from epoch to epoch
        if batch.labels.is_cpu or self.current_epoch == self._first_epoch:
            check_labels(batch.labels, self.hparams.num_classes)
        loss, size = self.loss(self._logits(batch), batch.labels), len(batch.images)
        self.log("loss", loss, prog_bar=True, logger=False, batch_size=size)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=size)
        return loss

    def on_validation_epoch_start(self) -> None:
        run = self.trainer
        stage, batches = ("test", run.num_test_batches) if run.testing else ("val", run.num_val_batches)
        names = set_names(stage, len(batches), run)
        self._scores = {name: Scores(self.hparams.num_classes, self.device) for name in names}

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        batch = as_batch(batch)
        if not len(batch.images):  # none could be read
            return
        check_labels(batch.labels, self.hparams.num_classes)
        list(self._scores.values())[dataloader_idx].update(self._logits(batch), batch.labels)

    def on_validation_epoch_end(self) -> None:
        for name, scores in self._scores.items():
            result = self.results[name] = scores.compute()
            for key, value in result.scalars().items():
                self.log(f"{name}/{key}", value, prog_bar=key == "acc", sync_dist=True, add_dataloader_idx=False)

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Return {"probabilities": (batch, classes) on the CPU, "classes": names of the likeliest, "paths": files}."""
        batch = as_batch(batch)
        if not len(batch.images):  # none could be read
            return {"probabilities": torch.zeros(0, len(self.class_names)), "classes": [], "paths": []}
        logits = self(batch.images).float()
        check_predictions(logits)
        probabilities = logits.softmax(-1).cpu()
        classes = [self.class_names[i] for i in probabilities.argmax(-1).tolist()]
        paths = image_paths(self.trainer.predict_dataloaders, dataloader_idx, batch)
        return {"probabilities": probabilities, "classes": classes, "paths": paths}
