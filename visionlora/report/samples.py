"""Which images of a run are shown, and what is written below them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from visionlora.report.closing import SOURCE
from visionlora.report.measure import Answers
from visionlora.report.pictures import Tile

__all__ = ["Measured", "sections"]

ROW, TWO_ROWS = 8, 16


class Measured:
    """One test set: its images, the answers now, and where they are known those of the base."""

    def __init__(self, images: Any, after: Answers, before: Answers | None) -> None:
        self.images, self.after, self.before = images, after, before

    def right(self, at: int) -> bool:
        return self.after.predicted[at] == self.after.labels[at]

    def was_right(self, at: int) -> bool:
        return self.before is not None and self.before.predicted[at] == self.after.labels[at]


def sections(
    training: Any, sets: dict[str, Measured], class_names: Sequence[str], data: dict[str, Any] | None
) -> dict[str, list[Tile]]:
    """Return the tiles of the sample picture by title.

    Training images as they reach the network; images of the first test set, spread evenly, and its most confident
    mistakes; images of the source that the base knew and the adapted model does not.
    """
    show = _shower(data)
    shown: dict[str, list[Tile]] = {}
    if training is not None:
        items = [training[i] for i in _spread(len(training), TWO_ROWS)]
        tiles = [Tile(show(item[0]), class_names[int(item[1])]) for item in items if item is not None]
        shown["training images as the network sees them"] = tiles
    for name, measured in list(sets.items())[:1]:
        answers = measured.after
        picked = _spread(len(answers.labels), TWO_ROWS)
        shown[f"{name}: what is answered now"] = _tiles(measured, picked, class_names, show)
        wrong = [at for at in range(len(answers.labels)) if not measured.right(at)]
        wrong.sort(key=lambda at: -answers.confidence[at])
        shown[f"{name}: the most confident mistakes"] = _tiles(measured, wrong[:ROW], class_names, show)
    source = sets.get(SOURCE)
    if source is not None and source.before is not None and len(sets) > 1:
        lost = [at for at in range(len(source.after.labels)) if source.was_right(at) and not source.right(at)]
        shown["source: known before, forgotten now"] = _tiles(
            source, [lost[i] for i in _spread(len(lost), ROW)], class_names, show
        )
    return shown


def _tiles(
    measured: Measured, chosen: Sequence[int], names: Sequence[str], show: Callable[[Tensor], Any]
) -> list[Tile]:
    answers, tiles = measured.after, []
    for at in chosen:
        label, said = answers.labels[at], answers.predicted[at]
        remark = f"is {names[label]}" if said != label else ""
        if measured.before is not None and measured.before.predicted[at] != said and said == label:
            remark = f"before: {names[measured.before.predicted[at]]}"
        pixels = show(measured.images[answers.places[at]][0])
        tiles.append(Tile(pixels, f"{names[said]} {answers.confidence[at]:.0%}", said == label, remark))
    return tiles


def _spread(size: int, count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, size - 1, min(size, count))})


def _shower(data: dict[str, Any] | None) -> Callable[[Tensor], Any]:
    """Return what turns a network input back into a picture."""

    def show(image: Tensor) -> Any:
        pixels = image.float().cpu().permute(1, 2, 0).numpy()
        if data is not None:
            pixels = pixels * np.asarray(data["std"]) + np.asarray(data["mean"])
        else:
            low, high = pixels.min(), pixels.max()
            pixels = (pixels - low) / max(high - low, 1e-6)
        if pixels.shape[2] != 3:
            pixels = np.repeat(pixels[..., :1], 3, axis=2)
        return pixels.clip(0, 1).astype(np.float32)

    return show
