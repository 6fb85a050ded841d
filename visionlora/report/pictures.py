"""Pictures of a run: its confusion matrix, and the images it saw with what it made of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from visionlora.atomic import write_atomic
from visionlora.vision.metrics import Result

__all__ = ["Tile", "confusion_picture", "sample_picture"]

RIGHT, WRONG, QUIET, INK = "#1a7f4b", "#c0392b", "#7a7f87", "#1f2328"
MOST_NAMES, MOST_NUMBERS = 60, 25


@dataclass(frozen=True)
class Tile:
    """One picture of the grid."""

    pixels: NDArray[np.float32]
    """(height, width, 3), 0 to 1."""
    caption: str
    right: bool | None = None
    """None: nothing was answered."""
    remark: str = ""


def confusion_picture(path: str | Path, result: Result, class_names: Sequence[str], *, title: str) -> None:
    """Write a confusion matrix as PNG: shades are shares of the true class, numbers are images."""
    counts = np.asarray(result.confusion, dtype=float)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    n = len(class_names)
    side = min(16.0, 2.6 + 0.55 * n)
    figure = Figure(figsize=(side + 0.8, side), dpi=130, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if n <= MOST_NUMBERS:
        _write_counts(axes, counts, shares)
    ticks = np.arange(n) if n <= MOST_NAMES else np.arange(0, n, -(-n // MOST_NAMES))
    names = [_short(class_names[i]) for i in ticks]
    size = 9 if n <= MOST_NUMBERS else 6
    axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.set_xlabel("predicted", color=QUIET)
    axes.set_ylabel("true", color=QUIET)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{title}\naccuracy {result.acc:.1%}, macro F1 {result.f1:.1%}, {result.images:,} images", fontsize=10
    )
    bar = figure.colorbar(image, ax=axes, fraction=0.045, pad=0.02, ticks=[0, 0.5, 1], format="{x:.0%}")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8, colors=QUIET)
    _save(figure, path)


def sample_picture(path: str | Path, sections: dict[str, list[Tile]], *, columns: int = 8) -> None:
    """Write a grid of images as PNG, in titled sections; empty sections are left out."""
    sections = {title: tiles for title, tiles in sections.items() if tiles}
    rows = {title: -(-len(tiles) // columns) for title, tiles in sections.items()}
    heights = [0.35 + 1.62 * count for count in rows.values()]
    figure = Figure(figsize=(1.3 * columns, sum(heights)), dpi=130, facecolor="white")
    parts = figure.subfigures(len(sections), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, tiles), height in zip(parts, sections.items(), heights, strict=True):
        part.suptitle(
            title, x=0.006, y=1 - 0.04 / height, ha="left", va="top", fontsize=10, fontweight="bold", color=INK
        )
        grid = part.subplots(rows[title], columns, squeeze=False)
        part.subplots_adjust(0.004, 0.38 / height, 0.996, 1 - 0.3 / height, wspace=0.06, hspace=0.42)
        for axes, tile in zip(grid.flat, [*tiles, *[None] * (grid.size - len(tiles))], strict=True):
            _draw(axes, tile)
    _save(figure, path)


def _draw(axes: Axes, tile: Tile | None) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(tile is not None and tile.right is not None)
    if tile is None:
        return
    axes.imshow(tile.pixels, interpolation="nearest" if tile.pixels.shape[0] < 96 else "antialiased")
    color = INK if tile.right is None else RIGHT if tile.right else WRONG
    for spine in axes.spines.values():
        spine.set(color=color, linewidth=2)
    below = {"xycoords": "axes fraction", "ha": "center", "va": "top", "annotation_clip": False}
    axes.annotate(_short(tile.caption, 22), (0.5, -0.04), color=color, fontsize=7.5, **below)
    axes.annotate(_short(tile.remark, 26), (0.5, -0.18), color=QUIET, fontsize=6.5, **below)


def _write_counts(axes: Axes, counts: NDArray[np.float64], shares: NDArray[np.float64]) -> None:
    size = 9 if len(counts) <= 12 else 6
    for (row, column), count in np.ndenumerate(counts):
        if count:
            color = "white" if shares[row, column] > 0.55 else INK
            axes.text(column, row, f"{int(count)}", ha="center", va="center", fontsize=size, color=color)


def _short(text: str, most: int = 18) -> str:
    text = text.replace("$", r"\$")  # a name is no formula
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _save(figure: Figure, path: str | Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+")  # a script the font lacks is drawn as boxes
        figure.savefig(buffer, format="png")
    write_atomic(path, buffer.getvalue())
