"""Persons and dogs, built from ellipsoids in a walking or standing pose."""

from __future__ import annotations

import numpy as np

from visionlora.data.scenes.solids import Material, Point, Solid, box, ellipsoid, limb, scaled

SKIN: list[Point] = [(0.62, 0.42, 0.32), (0.5, 0.32, 0.22), (0.3, 0.17, 0.1), (0.14, 0.08, 0.05)]
FUR: list[Point] = [(0.3, 0.18, 0.08), (0.04, 0.035, 0.03), (0.55, 0.48, 0.38), (0.2, 0.19, 0.18), (0.42, 0.26, 0.12)]


def cloth(rng: np.random.Generator) -> Material:
    """Return a garment, from black to a loud colour."""
    return Material(scaled(tuple(rng.uniform(0.4, 1.6, 3)), rng.uniform(0.02, 0.5)), gloss=0.02, rough=0.12)


def skin(rng: np.random.Generator) -> Material:
    """Return a tone of skin."""
    return Material(SKIN[rng.integers(len(SKIN))], gloss=0.03, rough=0.05)


def person(rng: np.random.Generator) -> list[Solid]:
    """Return a pedestrian, with or without a coat, a bag, a bright hat."""
    top, legs, face = cloth(rng), cloth(rng), skin(rng)
    stride, swing = rng.uniform(0.05, 0.42), rng.uniform(0.05, 0.3)
    shape = [
        ellipsoid((0, 0, 1.18), (0.15, 0.23, 0.33), top),
        ellipsoid((0, 0, 0.93), (0.15, 0.19, 0.17), top if rng.random() < 0.4 else legs),
        *_head(rng, (0.03, 0, 1.62), face),
        *_legs(legs, stride),
    ]
    for side in (1, -1):
        hand = (side * swing, side * 0.3, 0.88)
        shape += [limb((0, side * 0.22, 1.4), hand, 0.065, top), ellipsoid(hand, (0.06, 0.05, 0.07), face)]
    return shape + _luggage(rng)


def _legs(cloth: Material, stride: float) -> list[Solid]:
    shoe = Material((0.04, 0.04, 0.04))
    parts = []
    for side in (1, -1):
        knee, foot = (side * stride * 0.45 + 0.04, side * 0.1, 0.48), (side * stride, side * 0.1, 0.06)
        parts += [limb((0, side * 0.09, 0.92), knee, 0.1, cloth), limb(knee, foot, 0.075, cloth)]
        parts.append(ellipsoid((foot[0] + 0.06, foot[1], 0.05), (0.14, 0.06, 0.05), shoe))
    return parts


def _head(rng: np.random.Generator, at: Point, face: Material) -> list[Solid]:
    hair = Material(scaled((0.12, 0.08, 0.05), rng.uniform(0.2, 3.0)), rough=0.3)
    x, y, z = at
    head, neck = ellipsoid(at, (0.11, 0.09, 0.13), face), limb((x, y, z - 0.2), at, 0.055, face)
    return [head, neck, ellipsoid((x - 0.03, y, z + 0.05), (0.11, 0.1, 0.11), hair)]


def _luggage(rng: np.random.Generator) -> list[Solid]:
    kind, bag = rng.integers(4), cloth(rng)
    if kind == 0:
        return [ellipsoid((-0.2, 0, 1.22), (0.12, 0.16, 0.24), bag)]
    return [box((0.0, 0.36, 0.68), (0.34, 0.12, 0.32), bag)] if kind == 1 else []


def rider(rng: np.random.Generator, seat: Point, grip: Point, pedal: Point, head: Material | None) -> list[Solid]:
    """Return a person who sits, holds a handlebar and rests the feet; head is the helmet, None for hair."""
    top, legs, face = cloth(rng), cloth(rng), skin(rng)
    x, _, z = seat
    shoulder = (x + 0.42 * (grip[0] - x), 0.0, z + 0.5)
    at = (shoulder[0] + 0.1, 0.0, shoulder[2] + 0.22)
    parts = [limb((x, 0, z + 0.08), shoulder, 0.19, top)]
    parts += [ellipsoid(at, (0.15, 0.13, 0.15), head)] if head else _head(rng, at, face)
    for side in (1, -1):
        knee = (x + 0.42, side * 0.14, (z + pedal[2]) / 2 + 0.12 + side * 0.08)
        foot = (pedal[0] + side * 0.06, side * 0.13, pedal[2] + side * 0.06)
        parts += [limb((x, side * 0.09, z + 0.05), knee, 0.09, legs), limb(knee, foot, 0.07, legs)]
        parts.append(limb((shoulder[0], side * 0.2, shoulder[2]), (grip[0], side * 0.24, grip[2]), 0.06, top))
    return parts


def dog(rng: np.random.Generator) -> list[Solid]:
    """Return a dog between a terrier and a shepherd in size."""
    base = scaled(FUR[rng.integers(len(FUR))], rng.uniform(0.8, 1.3))
    fur = Material(base, gloss=0.02, rough=0.35)
    dark = Material(scaled(base, 0.5), rough=0.3)
    stride, lift = rng.uniform(0.02, 0.16), rng.uniform(-0.05, 0.1)
    shape = [
        limb((-0.3, 0, 0.5), (0.28, 0, 0.52), 0.15, fur), ellipsoid((0.24, 0, 0.5), (0.17, 0.14, 0.18), fur),
        limb((0.3, 0, 0.55), (0.46, 0, 0.74 + lift), 0.09, fur),
        ellipsoid((0.5, 0, 0.76 + lift), (0.13, 0.1, 0.1), fur),
        limb((0.55, 0, 0.73 + lift), (0.7, 0, 0.7 + lift), 0.055, dark),
        limb((-0.36, 0, 0.56), (-0.62, 0, rng.uniform(0.45, 0.85)), 0.04, fur),
        *(ellipsoid((0.44, s * 0.08, 0.85 + lift), (0.04, 0.03, 0.08), dark) for s in (1, -1)),
    ]  # fmt: skip
    for x, side, step in ((0.26, 1, 1), (0.26, -1, -1), (-0.3, 1, -1), (-0.3, -1, 1)):
        shape.append(limb((x, side * 0.09, 0.45), (x + step * stride, side * 0.09, 0.04), 0.055, fur))
    grown = np.eye(3, dtype=np.float32) * np.float32(rng.uniform(0.75, 1.15))
    return [solid.turned(grown) for solid in shape]
