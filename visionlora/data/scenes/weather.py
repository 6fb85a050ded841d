"""The conditions a picture is taken in: light, air and how hard the sensor has to work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from visionlora.data.scenes.solids import Array, Point, scaled


@dataclass(frozen=True)
class Light:
    """The sun (far) or a lamp: homogeneous position, colour, and for a spot where it points."""

    position: tuple[float, float, float, float]  # w = 0 is a direction towards the light, w = 1 a place in metres
    colour: Point
    aim: Point = (0.0, 0.0, -1.0)
    focus: float = 0.0
    """Exponent of the cosine falloff around aim; 0 shines everywhere."""

    def towards(self, points: Array) -> Array:
        """Return vectors from points (3, n) to the light: (3, 1) for the sun, (3, n) for a lamp."""
        *place, w = self.position
        here = np.asarray(place, np.float32)[:, None]
        return here - points if w else here / np.linalg.norm(here)


@dataclass(frozen=True)
class Weather:
    """Everything between the scene and the sensor. Colours are linear RGB."""

    zenith: Point
    horizon: Point
    ambient: Point
    light: Light | None = None
    """The one light that throws shadows."""
    fog: float = 0.0
    """Optical depth at the object's distance: exp(-fog) of its light arrives."""
    wet: float = 0.0
    """How much the ground mirrors."""
    streaks: int = 0
    """Falling drops in the picture."""
    lamps: float = 0.0
    """Brightness of headlights, tail lights and lit windows."""
    infrared: bool = False
    """Monochrome, lit by a lamp beside the lens."""
    exposure: float = 0.4
    """Mean brightness, after the tone curve, that the automatic gain aims at."""
    max_gain: float = 4.0
    noise: float = 0.008
    """Standard deviation of the sensor noise in the shadows, after the tone curve."""
    blur: float = 0.4
    """Standard deviation of the lens blur in pixels of the finished picture."""
    colour: float = 1.0
    """Saturation."""


def day(rng: np.random.Generator) -> Weather:
    """Return sunshine, or a bright overcast sky in one picture of four."""
    tint: Point = tuple(rng.uniform(0.9, 1.1, 3))
    if rng.random() < 0.25:
        cloud = scaled(tint, 0.75)
        return Weather(cloud, cloud, scaled(tint, 0.8), exposure=rng.uniform(0.4, 0.5), blur=rng.uniform(0.3, 0.6))
    sun = _sun(rng, rng.uniform(28, 65), scaled(tint, (1.5, 1.42, 1.28)))
    return Weather(
        zenith=(0.16, 0.33, 0.68), horizon=(0.6, 0.72, 0.85), ambient=scaled(tint, (0.32, 0.36, 0.44)),
        light=sun, exposure=rng.uniform(0.4, 0.52), blur=rng.uniform(0.3, 0.6), noise=rng.uniform(0.004, 0.012),
    )  # fmt: skip


def dusk(rng: np.random.Generator) -> Weather:
    """Return a low warm sun under a blue sky, lamps just switched on."""
    glow = rng.uniform(0.7, 1.1)
    return Weather(
        zenith=(0.08, 0.11, 0.26), horizon=(0.85 * glow, 0.42 * glow, 0.22 * glow), ambient=(0.16, 0.16, 0.26),
        light=_sun(rng, rng.uniform(7, 16), (1.3 * glow, 0.62 * glow, 0.27 * glow)), lamps=1.0,
        exposure=rng.uniform(0.26, 0.34), noise=rng.uniform(0.012, 0.022), blur=rng.uniform(0.4, 0.7),
    )  # fmt: skip


def night(rng: np.random.Generator) -> Weather:
    """Return the light of one street lamp, sodium or LED, and of the vehicles themselves."""
    lamp = (1.0, 0.55, 0.2) if rng.random() < 0.6 else (0.85, 0.95, 1.0)
    power = rng.uniform(13, 22)
    return Weather(
        zenith=(0.006, 0.007, 0.014), horizon=(0.03, 0.025, 0.03),
        ambient=scaled(tuple(rng.uniform(0.8, 1.2, 3)), 0.022),
        light=Light((rng.uniform(-6, 6), rng.uniform(-5, 5), rng.uniform(6.5, 9), 1.0), scaled(lamp, power), focus=1.5),
        wet=0.5 if rng.random() < 0.3 else 0.0, lamps=2.5, exposure=rng.uniform(0.18, 0.25), max_gain=3.8,
        noise=rng.uniform(0.02, 0.04), blur=rng.uniform(0.6, 0.9), colour=0.8,
    )  # fmt: skip


def infrared(rng: np.random.Generator) -> Weather:
    """Return the monochrome night picture of a camera with its own infrared lamp."""
    dim = rng.uniform(0.02, 0.05)
    return Weather(
        zenith=(0.004,) * 3, horizon=(0.008,) * 3, ambient=(dim,) * 3, lamps=1.2, infrared=True,
        exposure=rng.uniform(0.24, 0.32), noise=rng.uniform(0.025, 0.045), blur=rng.uniform(0.6, 0.9), colour=0.0,
    )  # fmt: skip


def rain(rng: np.random.Generator) -> Weather:
    """Return a dark overcast sky, a wet mirroring street and drops in front of the lens."""
    grey = scaled((0.92, 1.0, 1.08), rng.uniform(0.45, 0.6))
    return Weather(
        zenith=grey, horizon=scaled(grey, 1.2), ambient=grey, lamps=1.0, wet=rng.uniform(0.5, 0.8),
        fog=rng.uniform(0.05, 0.2), streaks=int(rng.integers(15, 45)), exposure=rng.uniform(0.34, 0.42),
        noise=rng.uniform(0.012, 0.025), blur=rng.uniform(0.6, 0.9), colour=0.85,
    )  # fmt: skip


def fog(rng: np.random.Generator) -> Weather:
    """Return thick fog: the object is there, most of its contrast is not."""
    grey = scaled((0.97, 1.0, 1.02), rng.uniform(0.5, 0.65))
    return Weather(
        zenith=grey, horizon=grey, ambient=scaled(grey, 0.8), fog=rng.uniform(0.55, 1.05), lamps=0.6,
        exposure=rng.uniform(0.5, 0.6), noise=rng.uniform(0.008, 0.016), blur=rng.uniform(0.5, 0.9), colour=0.8,
    )  # fmt: skip


def noisy(rng: np.random.Generator) -> Weather:
    """Return a day through a worn sensor: soft, pale and full of noise."""
    clear = day(rng)
    return Weather(
        clear.zenith, clear.horizon, clear.ambient, clear.light, exposure=rng.uniform(0.3, 0.5),
        noise=rng.uniform(0.08, 0.14), blur=rng.uniform(0.6, 1.0), colour=0.6,
    )  # fmt: skip


CONDITIONS: dict[str, Callable[[np.random.Generator], Weather]] = {
    "day": day, "dusk": dusk, "night": night, "infrared": infrared, "rain": rain, "fog": fog, "noisy": noisy,
}  # fmt: skip


def _sun(rng: np.random.Generator, elevation: float, colour: Point) -> Light:
    up, around = np.radians(elevation), rng.uniform(0, 2 * np.pi)
    # from behind the camera or the side; against the sun every object is a silhouette
    flat = (np.cos(around), -0.3 - 0.7 * abs(np.sin(around)))
    scale = np.cos(up) / np.hypot(*flat)
    return Light((flat[0] * scale, flat[1] * scale, np.sin(up), 0.0), colour)
