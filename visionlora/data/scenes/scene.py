"""One picture: an object of a class, in a street, under a condition, through a camera."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from visionlora.config import did_you_mean
from visionlora.data.scenes.beings import dog, person
from visionlora.data.scenes.camera import CAMERAS, Camera, View, aim, draw_camera
from visionlora.data.scenes.cycles import bicycle, motorbike
from visionlora.data.scenes.sensor import expose
from visionlora.data.scenes.shading import Scene, shade
from visionlora.data.scenes.solids import Array, Solid
from visionlora.data.scenes.street import backdrop, draw_street
from visionlora.data.scenes.vehicles import HEADLIGHT, bus, car, truck, van
from visionlora.data.scenes.weather import CONDITIONS, Light, Weather
from visionlora.errors import ConfigError

OBJECTS: dict[str, Callable[[np.random.Generator], list[Solid]]] = {
    "bicycle": bicycle, "bus": bus, "car": car, "dog": dog,
    "motorbike": motorbike, "person": person, "truck": truck, "van": van,
}  # fmt: skip
CLASSES = tuple(OBJECTS)
"""Class names in the order of the labels."""

_WALKERS = ("dog", "person")
_OVER = 2  # rays a pixel and axis


def render(klass: str, condition: str, camera: Camera | str, seed: int, size: int = 64) -> Array:
    """Return one picture, uint8 (size, size, 3), a pure function of its arguments.

    camera is a Camera or the name of a preset ("level", "tilted"), from which every seed draws its own.
    """
    check_choice("class", klass, list(OBJECTS))
    check_choice("condition", condition, list(CONDITIONS))
    check_size(size)
    rng = np.random.default_rng(_key(seed, klass, condition))
    if isinstance(camera, str):
        check_choice("camera", camera, list(CAMERAS))
        camera = draw_camera(camera, rng)
    weather = CONDITIONS[condition](rng)
    scene, corners = _compose(klass, weather, rng)
    view = _frame(camera, corners, size, rng)
    return expose(shade(scene, weather, view), weather, _OVER, rng)


def _key(seed: int, *names: str) -> list[int]:
    digest = hashlib.sha256("/".join([str(seed), *names]).encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "little") for i in range(0, len(digest), 4)]


def _compose(klass: str, weather: Weather, rng: np.random.Generator) -> tuple[Scene, Array]:
    walks = klass in _WALKERS
    street = draw_street(rng, on_pavement=walks and rng.random() < 0.6)
    heading = rng.uniform(0, 360) if walks else rng.choice([0, 180]) + rng.normal(0, 5)
    turn = _turn(heading) * np.float32(rng.uniform(0.94, 1.06))
    solids = [solid.turned(turn) for solid in OBJECTS[klass](rng)]
    corners = np.concatenate([solid.corners for solid in solids], 1)
    footprint = np.stack([corners[:2].min(1), corners[:2].max(1)]).astype(np.float32)
    lamps = _headlights(solids, turn, rng)
    behind = backdrop(rng, street, lit=weather.lamps > 0 and not weather.infrared)
    return Scene([*solids, *behind], street, footprint, lamps), corners


def _headlights(solids: list[Solid], turn: Array, rng: np.random.Generator) -> list[Light]:
    fronts = [s.corners.mean(1) for s in solids if s.material is HEADLIGHT]
    if not fronts or rng.random() < 0.25:  # parked with the lights off
        return []
    x, y, z = (float(v) for v in np.mean(fronts, 0))
    ahead = turn @ np.array([1, 0, -0.12])
    return [Light((x, y, z, 1.0), (7.0, 6.6, 5.6), (float(ahead[0]), float(ahead[1]), float(ahead[2])), focus=14)]


def _turn(heading: float) -> Array:
    c, s = np.cos(np.radians(heading)), np.sin(np.radians(heading))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]], np.float32)


def _frame(camera: Camera, corners: Array, size: int, rng: np.random.Generator) -> View:
    return aim(camera, corners, rng.uniform(0.66, 0.86), rng.uniform(-0.07, 0.07, 2), size * _OVER)


def check_choice(what: str, name: str, choices: list[str]) -> None:
    """Refuse a name that is not among the choices."""
    if name not in choices:
        raise ConfigError(f"{what} must be one of {', '.join(choices)}, got {name!r}{did_you_mean(str(name), choices)}")


def check_size(size: int) -> None:
    """Refuse a picture size that cannot be drawn."""
    if not isinstance(size, int) or isinstance(size, bool) or not 16 <= size <= 1024:
        raise ConfigError(f"size must be a whole number of pixels from 16 to 1024, got {size!r}")
