"""The place: road, kerb, pavement and lawn underfoot, houses, trees and posts behind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from visionlora.data.scenes.solids import Array, Material, Point, Solid, box, ellipsoid, pole, scaled

TILE = 64  # texels of the repeating noise


@dataclass(frozen=True, eq=False)
class Street:
    """One stretch of road along x. Distances in metres; the object stands at the origin."""

    middle: float  # y of the centre line
    half: float  # half width of the carriageway
    pavement: float  # width beyond the kerb
    asphalt: Point
    slabs: Point
    lawn: Point
    crossing: float  # x where a zebra crossing begins, far away for none
    tile: Array  # (TILE, TILE) smooth noise in [-1, 1]

    def noise(self, u: Array, v: Array) -> Array:
        """Return mottling in [-1, 1] that varies over about a unit of u and v."""
        noise: Array = self.tile[_cell(u), _cell(v)]
        return noise

    def ground(self, x: Array, y: Array) -> Array:
        """Return the linear colour (3, n) of the ground at x, y (n,)."""
        off = np.abs(y - np.float32(self.middle))
        road = off < self.half
        paved = off < self.half + self.pavement
        base = np.where(road, _column(self.asphalt), np.where(paved, _column(self.slabs), _column(self.lawn)))
        grain = 1 + np.where(paved, np.float32(0.12), np.float32(0.35)) * self.noise(x * 9, y * 9)
        grain += np.float32(0.14) * self.noise(x, y)
        joints = paved & ~road & ((x % 1.2 < 0.07) | (off % 0.9 < 0.06))
        base = base * (grain * np.where(joints, np.float32(0.7), np.float32(1)))
        painted = np.where(self._paint(x, off), np.float32(0.72), base)
        kerb = np.abs(off - (self.half + 0.12)) < 0.13
        ground: Array = np.where(kerb, np.float32(0.5), painted)
        return ground

    def _paint(self, x: Array, off: Array) -> Array:
        dashes = (off < 0.09) & (x % 6.0 < 3.0)
        edges = np.abs(off - (self.half - 0.35)) < 0.06
        zebra = (np.abs(x - self.crossing) < 1.6) & (off % 1.0 < 0.5) & (off < self.half - 0.4)
        paint: Array = dashes | edges | zebra
        return paint


def draw_street(rng: np.random.Generator, on_pavement: bool) -> Street:
    """Return a street whose pavement, or one of whose lanes, passes under the object."""
    half, pavement = rng.uniform(3.2, 4.4), rng.uniform(2.0, 4.0)
    side = rng.choice([-1, 1])
    middle = side * (half + rng.uniform(0.8, pavement - 0.5)) if on_pavement else side * half * rng.uniform(0.4, 0.6)
    grey = rng.uniform(0.07, 0.2)
    lawn = scaled((0.14, 0.2, 0.06), rng.uniform(0.6, 1.3)) if rng.random() < 0.6 else (0.24, 0.24, 0.24)
    return Street(
        middle, half, pavement, asphalt=(grey, grey, grey * rng.uniform(0.95, 1.12)),
        slabs=scaled(tuple(rng.uniform(0.9, 1.1, 3)), rng.uniform(0.2, 0.38)), lawn=lawn,
        crossing=rng.uniform(-4, 4) if rng.random() < 0.3 else 1e4, tile=_tile(rng),
    )  # fmt: skip


def _tile(rng: np.random.Generator) -> Array:
    rough = rng.random((TILE, TILE), np.float32) * 2 - 1
    smooth = rough + np.roll(rough, 1, 0) + np.roll(rough, 1, 1) + np.roll(rough, (1, 1), (0, 1))
    tile: Array = np.clip(smooth * np.float32(0.45), -1, 1)
    return tile


def _cell(u: Array) -> Array:
    # a ray that all but misses the ground meets it further away than whole numbers go
    cell: Array = np.clip(u * 2, np.float32(-(2**30)), np.float32(2**30)).astype(np.int32) & (TILE - 1)
    return cell


def _column(colour: Point) -> Array:
    return np.asarray(colour, np.float32)[:, None]


def backdrop(rng: np.random.Generator, street: Street, lit: bool) -> list[Solid]:
    """Return houses in a row along the far side, a tree or two and a lamp post."""
    front = max(street.middle + street.half + street.pavement, 3.5) + rng.uniform(0.3, 3)
    solids = _houses(rng, front, lit) if rng.random() < 0.8 else []
    for _ in range(rng.integers(0, 3)):
        solids += _tree(rng, rng.uniform(-9, 9), max(front - rng.uniform(0.2, 1.0), 3.0))
    if rng.random() < 0.5:
        x, y = rng.uniform(-7, 7), max(front - 0.8, 2.8)
        solids.append(pole((x, y, 0), (x, y, 6), 0.08, Material((0.12, 0.12, 0.13))))
    return solids


def _houses(rng: np.random.Generator, front: float, lit: bool) -> list[Solid]:
    solids, x = [], -26.0 + rng.uniform(0, 8)
    while x < 24:
        width, height, deep = rng.uniform(7, 15), rng.uniform(3.5, 12), rng.uniform(0, 1.5)
        wall = _wall(rng)
        solids.append(box((x + width / 2, front + deep + 3, height / 2), (width, 6, height), wall))
        if lit:
            at = (x + width * rng.uniform(0.3, 0.7), front + deep, rng.uniform(1.5, 2.6))
            solids.append(
                box(at, (rng.uniform(0.8, 1.4), 0.06, 1.2), Material((0.3, 0.28, 0.2), glow=(0.3, 0.2, 0.08)))
            )
        x += width + (rng.uniform(0, 6) if rng.random() < 0.4 else 0)
    return [replace(solid, casts=False) for solid in solids]


def _wall(rng: np.random.Generator) -> Material:
    tones = [(0.45, 0.24, 0.17), (0.5, 0.46, 0.36), (0.38, 0.38, 0.4), (0.58, 0.55, 0.5), (0.3, 0.27, 0.25)]
    colour = scaled(tones[rng.integers(len(tones))], rng.uniform(0.75, 1.15))
    panes = partial(_panes, period=(rng.uniform(1.6, 3.2), rng.uniform(2.6, 3.2)), share=rng.uniform(0.35, 0.6))
    return Material(colour, rough=0.2, pattern=panes, inlay=(0.06, 0.08, 0.11))


def _panes(local: Array, period: tuple[float, float], share: float) -> Array:
    across, up = (local[0] / period[0]) % 1, (local[2] / period[1]) % 1
    panes: Array = (np.abs(across - 0.5) < share / 2) & (np.abs(up - 0.5) < 0.28)
    return panes


def _tree(rng: np.random.Generator, x: float, y: float) -> list[Solid]:
    height, bark = rng.uniform(2.2, 3.6), Material((0.12, 0.09, 0.06), rough=0.5)
    leaves = Material(scaled((0.1, 0.19, 0.04), rng.uniform(0.7, 1.4)), rough=0.9)
    crowns = [(x + rng.uniform(-0.8, 0.8), y + rng.uniform(-0.4, 0.8), height + rng.uniform(0, 1.2)) for _ in range(2)]
    trunk = pole((x, y, 0), (x, y, height), rng.uniform(0.1, 0.2), bark)
    return [trunk, *(ellipsoid(c, tuple(rng.uniform(0.9, 1.7, 3)), leaves) for c in crowns)]
