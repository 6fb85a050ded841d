"""Bicycles and motorbikes, with and without a rider."""

from __future__ import annotations

import numpy as np

from visionlora.data.scenes.beings import rider
from visionlora.data.scenes.solids import Material, Solid, box, ellipsoid, limb, pole, wheel
from visionlora.data.scenes.vehicles import HEADLIGHT, TAIL, paint

RUBBER = Material((0.02, 0.02, 0.02), rough=0.1)
METAL = Material((0.4, 0.4, 0.42), gloss=0.25, rough=0.05)


def bicycle(rng: np.random.Generator) -> list[Solid]:
    """Return a bicycle: two large thin rings, a diamond of tubes, two times in three a rider."""
    coat, r = paint(rng), 0.35
    back, crank, seat, head = (-0.52, 0, r), (-0.06, 0, 0.3), (-0.2, 0, 0.88), (0.36, 0, 0.86)
    fork, bar = (0.55, 0, r), (0.36, 0, 1.02)
    tubes = [(back, crank), (back, seat), (crank, seat), (seat, head), (crank, head), (fork, bar)]
    frame = [pole(a, b, 0.026, coat) for a, b in tubes]
    rims = [wheel((x, 0, r), r, 0.05, RUBBER, hole=0.87) for x in (-0.52, 0.55)]
    hubs = [wheel((x, 0, r), 0.045, 0.1, METAL) for x in (-0.52, 0.55)]
    saddle = ellipsoid((-0.22, 0, 0.93), (0.14, 0.07, 0.04), RUBBER)
    grips = pole((0.33, -0.28, 1.03), (0.33, 0.28, 1.03), 0.022, METAL)
    lights = [box((0.42, 0, 0.95), (0.05, 0.06, 0.06), HEADLIGHT), box((-0.42, 0, 0.72), (0.04, 0.06, 0.06), TAIL)]
    cycle = [*rims, *hubs, *frame, saddle, grips, pole((-0.06, -0.1, 0.3), (-0.06, 0.1, 0.3), 0.09, METAL), *lights]
    helmet = paint(rng) if rng.random() < 0.4 else None
    return cycle + (
        rider(rng, (-0.2, 0, 0.92), (0.34, 0, 1.03), (-0.06, 0, 0.28), helmet) if rng.random() < 0.66 else []
    )


def motorbike(rng: np.random.Generator) -> list[Solid]:
    """Return a motorbike: fat wheels, a tank and an engine between them, two times in three a helmeted rider."""
    coat, r = paint(rng), 0.31
    tyre = Material(RUBBER.colour, pattern=lambda p: p[0] ** 2 + p[2] ** 2 < 0.3, inlay=METAL.colour)
    wheels = [wheel((x, 0, r), r, 0.17, tyre) for x in (-0.68, 0.74)]
    body = [
        ellipsoid((0.14, 0, 0.82), (0.33, 0.17, 0.17), coat), ellipsoid((0.0, 0, 0.45), (0.32, 0.2, 0.22), METAL),
        limb((-0.2, 0, 0.78), (-0.75, 0, 0.86), 0.13, RUBBER), ellipsoid((-0.72, 0, 0.76), (0.22, 0.1, 0.1), coat),
        ellipsoid((0.56, 0, 0.88), (0.17, 0.19, 0.22), coat), pole((0.74, 0, r), (0.44, 0, 1.0), 0.06, METAL),
        pole((-0.68, -0.14, r), (0.1, -0.18, 0.28), 0.065, METAL), pole((-0.68, 0, r), (0.0, 0, 0.5), 0.06, RUBBER),
        ellipsoid((0.74, 0, 0.6), (0.27, 0.1, 0.09), coat), pole((0.38, -0.34, 1.04), (0.38, 0.34, 1.04), 0.03, RUBBER),
        ellipsoid((0.71, 0, 0.88), (0.07, 0.11, 0.11), HEADLIGHT), box((-0.93, 0, 0.78), (0.06, 0.16, 0.08), TAIL),
    ]  # fmt: skip
    helmet = paint(rng)
    return [*wheels, *body] + (
        rider(rng, (-0.25, 0, 0.86), (0.4, 0, 1.03), (-0.1, 0, 0.32), helmet) if rng.random() < 0.66 else []
    )
