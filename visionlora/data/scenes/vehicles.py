"""Cars, vans, trucks and buses, built from prisms and wheels. x is forward, z is up, metres."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from visionlora.data.scenes.solids import Array, Material, Point, Solid, box, prism, scaled, wheel

GLASS = Material((0.03, 0.04, 0.05), gloss=0.35, rough=0.0)
DARK = Material((0.03, 0.03, 0.03), rough=0.1)
HEADLIGHT = Material((0.7, 0.7, 0.68), gloss=0.3, glow=(1.6, 1.5, 1.25), rough=0.0)
TAIL = Material((0.45, 0.02, 0.02), gloss=0.2, glow=(1.0, 0.05, 0.03), rough=0.0)
PLATE = Material((0.75, 0.75, 0.7), rough=0.0)

PAINTS: list[Point] = [
    (0.62, 0.62, 0.61), (0.4, 0.46, 0.48), (0.2, 0.21, 0.22), (0.04, 0.04, 0.05), (0.5, 0.04, 0.04),
    (0.05, 0.13, 0.42), (0.04, 0.22, 0.12), (0.62, 0.42, 0.04), (0.1, 0.3, 0.45), (0.36, 0.3, 0.2),
]  # fmt: skip


def paint(rng: np.random.Generator) -> Material:
    """Return a car paint."""
    return Material(scaled(PAINTS[rng.integers(len(PAINTS))], rng.uniform(0.8, 1.2)), gloss=0.14, rough=0.03)


def car(rng: np.random.Generator) -> list[Solid]:
    """Return a hatchback, a saloon or an off-roader."""
    tail, top, clear = [(-1.95, 1.46, 0.24), (-1.35, 1.42, 0.22), (-2.0, 1.72, 0.36)][rng.integers(3)]
    half, width, coat = rng.uniform(1.95, 2.25), rng.uniform(0.84, 0.93), paint(rng)
    waist = 0.62 * top
    rear, nose = -half, half
    body = prism(
        [(rear + 0.08, clear), (nose - 0.1, clear), (nose, clear + 0.3), (nose - 0.12, waist - 0.14),
         (0.45 * half, waist), (rear + 0.1, waist), (rear, clear + 0.35)], width, coat, taper=0.08,
    )  # fmt: skip
    back = max(tail, rear + 0.15)
    panes = replace(GLASS, inlay=coat.colour, pattern=partial(_pillars, top=top))
    cabin = prism(
        [(back, waist - 0.02), (0.48 * half, waist - 0.02), (0.12 * half, top), (back + 0.42, top)],
        width - 0.04, panes, taper=0.3,
    )  # fmt: skip
    trim = [*_wheels([0.62 * half, -0.6 * half], clear + 0.09, width, 0.2), *_lamps(nose, rear, width, waist - 0.22)]
    return [body, cabin, *trim]


def van(rng: np.random.Generator) -> list[Solid]:
    """Return a panel van: one tall box with a short slanted bonnet, windows only in front."""
    half, width, top, coat = rng.uniform(2.5, 2.9), rng.uniform(0.95, 1.03), rng.uniform(2.15, 2.5), paint(rng)
    cowl = (half - 0.7, 1.25)
    body = prism(
        [(-half, 0.32), (half - 0.7, 0.32), cowl, (half - 1.35, top), (-half + 0.08, top)], width, coat, taper=0.05
    )
    nose = prism([(cowl[0] - 0.3, 0.32), (half, 0.32), (half, 0.85), cowl, (cowl[0] - 0.3, 1.25)], width - 0.04, coat)
    screen = _on_slope(cowl, (half - 1.35, top), width - 0.16)
    doors = [box((half - 1.55, s * (width - 0.04), 1.5), (0.8, 0.05, 0.55), GLASS) for s in (1, -1)]
    rear = [box((-half + 0.02, s * 0.45, 1.65), (0.1, 0.6, 0.5), GLASS) for s in (1, -1)]
    seam = [box((-0.2, s * (width - 0.01), 1.2), (0.03, 0.05, 1.5), DARK) for s in (1, -1)]
    trim = [*_wheels([0.62 * half, -0.6 * half], 0.35, width, 0.22), *_lamps(half, -half, width - 0.04, 0.75)]
    return [body, nose, screen, *doors, *rear, *seam, *trim]


def truck(rng: np.random.Generator) -> list[Solid]:
    """Return a lorry: a cab, a gap, and a taller box or an open bed on a dark frame."""
    half, width, coat = rng.uniform(3.4, 4.3), 1.15, paint(rng)
    cab_top, cab = rng.uniform(2.4, 2.8), half - 1.7
    front = prism([(cab, 0.55), (half, 0.55), (half, 1.5), (half - 0.2, cab_top), (cab, cab_top)], width, coat)
    screen = _on_slope((half, 1.5), (half - 0.2, cab_top - 0.15), width - 0.15)
    doors = [box((half - 0.75, s * width, 1.85), (0.8, 0.05, 0.6), GLASS) for s in (1, -1)]
    frame = box((0, 0, 0.7), (2 * half - 0.3, 0.9, 0.3), DARK)
    load = _load(rng, -half, cab - 0.3, width + 0.05)
    axles = [half - 0.95, -half + 0.9, -half + 2.0]
    return [front, screen, *doors, frame, *load, *_wheels(axles, 0.5, width, 0.3), *_lamps(half, -half, width, 0.9)]


def _load(rng: np.random.Generator, rear: float, front: float, width: float) -> list[Solid]:
    middle, length = (rear + front) / 2, front - rear
    if rng.random() < 0.7:
        tone = PAINTS[0] if rng.random() < 0.6 else PAINTS[rng.integers(len(PAINTS))]
        skin = Material(tone, rough=0.08, pattern=partial(_ribs, period=0.6), inlay=scaled(tone, 0.75))
        high = rng.uniform(2.2, 2.6)
        return [box((middle, 0, 0.85 + high / 2), (length, 2 * width, high), skin)]
    cargo = Material((0.28, 0.2, 0.12), rough=0.8)
    side = paint(rng)
    walls = [box((middle, s * width, 1.25), (length, 0.08, 0.8), side) for s in (1, -1)]
    ends = [box((x, 0, 1.25), (0.08, 2 * width, 0.8), side) for x in (rear, front)]
    heap = prism([(rear + 0.2, 0.9), (front - 0.2, 0.9), (middle + 0.5, 2.1), (middle - 0.6, 2.0)], width, cargo, 0.5)
    return [*walls, *ends, heap]


def bus(rng: np.random.Generator) -> list[Solid]:
    """Return a city bus: a long box with a band of windows all around and doors to the ground."""
    half, width, top, coat = rng.uniform(4.8, 5.8), 1.25, rng.uniform(2.9, 3.15), paint(rng)
    body = prism(
        [(-half, 0.35), (half - 0.05, 0.35), (half, 1.0), (half - 0.12, top), (-half + 0.05, top)], width,
        replace(coat, pattern=_skirt, inlay=scaled(coat.colour, 0.55)),
    )  # fmt: skip
    band = replace(GLASS, pattern=partial(_ribs, period=1.5), inlay=coat.colour)
    windows = [box((-0.1, s * width, 1.95), (2 * half - 0.9, 0.06, 0.85), band) for s in (1, -1)]
    doors = [box((x, -width, 1.4), (1.1, 0.08, 1.9), GLASS) for x in (half - 1.0, -0.4)]
    screen = _on_slope((half, 1.05), (half - 0.1, top - 0.4), width - 0.1)
    sign = box((half - 0.08, 0, top - 0.22), (0.12, 1.6, 0.26), Material((0.05, 0.05, 0.03), glow=(0.9, 0.5, 0.05)))
    roof = box((-0.5, 0, top + 0.08), (2.5, 1.4, 0.2), Material((0.6, 0.6, 0.6)))
    rear = box((-half, 0, 2.0), (0.1, 2 * width - 0.4, 0.7), GLASS)
    wheels = _wheels([half - 2.2, -half + 2.4], 0.48, width, 0.3)
    return [body, *windows, *doors, screen, rear, sign, roof, *wheels, *_lamps(half, -half, width, 0.75)]


def _wheels(axles: list[float], radius: float, half_track: float, width: float) -> list[Solid]:
    tyre = Material((0.02, 0.02, 0.022), rough=0.1, pattern=_hub, inlay=(0.45, 0.45, 0.47))
    side = half_track - width / 2 + 0.03
    return [wheel((x, s * side, radius), radius, width, tyre) for x in axles for s in (1, -1)]


def _lamps(nose: float, rear: float, width: float, height: float) -> list[Solid]:
    y = width - 0.22
    front = [box((nose - 0.03, s * y, height), (0.12, 0.34, 0.18), HEADLIGHT) for s in (1, -1)]
    back = [box((rear + 0.05, s * (y + 0.05), height + 0.1), (0.16, 0.24, 0.24), TAIL) for s in (1, -1)]
    plates = [box((x, 0, height - 0.25), (0.1, 0.5, 0.13), PLATE) for x in (nose - 0.02, rear + 0.02)]
    return [*front, *back, *plates]


def _on_slope(low: tuple[float, float], high: tuple[float, float], half_width: float) -> Solid:
    (x0, z0), (x1, z1) = low, high
    rise = np.hypot(x1 - x0, z1 - z0)
    nx, nz = (z1 - z0) / rise * 0.03, (x0 - x1) / rise * 0.03
    x0, z0 = x0 + 0.08 * (x1 - x0), z0 + 0.08 * (z1 - z0)
    x1, z1 = x1 - 0.08 * (x1 - x0), z1 - 0.08 * (z1 - z0)
    return prism([(x0 - nx, z0 - nz), (x0 + nx, z0 + nz), (x1 + nx, z1 + nz), (x1 - nx, z1 - nz)], half_width, GLASS)


def _pillars(local: Array, top: float) -> Array:
    pillars: Array = (local[2] > top - 0.09) | (np.abs(local[0] + 0.35) < 0.05)
    return pillars


def _ribs(local: Array, period: float) -> Array:
    ribs: Array = np.abs((local[0] / period) % 1 - 0.5) < 0.06
    return ribs


def _skirt(local: Array) -> Array:
    skirt: Array = local[2] < 0.85
    return skirt


def _hub(local: Array) -> Array:
    hub: Array = local[0] ** 2 + local[2] ** 2 < 0.36
    return hub
