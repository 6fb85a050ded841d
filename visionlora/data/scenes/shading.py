"""From what the pixels see to the light that leaves it: linear RGB before the sensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from visionlora.data.scenes.camera import View
from visionlora.data.scenes.raycast import GROUND, SKY, Hits, cast, mirrored, shadow
from visionlora.data.scenes.solids import Array, Point, Solid
from visionlora.data.scenes.street import Street
from visionlora.data.scenes.weather import Light, Weather


@dataclass(frozen=True, eq=False)
class Scene:
    """One object in its street."""

    solids: list[Solid]  # the object's own first
    street: Street
    footprint: Array  # (2, 2) low and high corner of the object on the ground, in world x and y
    headlights: list[Light]


@dataclass(frozen=True, eq=False)
class Surface:
    """What the pixels show, each (channels, size, size)."""

    albedo: Array
    normal: Array
    gloss: Array
    glow: Array


def shade(scene: Scene, weather: Weather, view: View) -> Array:
    """Return the picture (3, size, size) in linear light."""
    rays = view.rays()
    hits = cast(view, rays, scene.solids)
    surface = _surface(scene, weather, hits)
    light = surface.albedo * _irradiance(scene, weather, view, hits, surface.normal)
    if not weather.infrared:
        light += surface.gloss * _sheen(weather, rays, surface.normal)
    if weather.wet:
        light = _puddles(scene, weather, view, rays, hits, light)
    light += surface.glow * np.float32(weather.lamps)
    return _air(weather, hits, rays, light)


def _surface(scene: Scene, weather: Weather, hits: Hits) -> Surface:
    size = hits.owner.shape
    albedo, normal, glow = (np.zeros((3, hits.owner.size), np.float32) for _ in range(3))
    gloss = np.zeros((1, hits.owner.size), np.float32)
    points = hits.points.reshape(3, -1)
    normal[2] = 1
    for index, mine in _pixels_of(hits.owner):
        here = points[:, mine]
        if index == GROUND:
            albedo[:, mine] = scene.street.ground(here[0], here[1]) * np.float32(1 - 0.45 * weather.wet)
            continue
        solid = scene.solids[index]
        local = solid.local(here)
        albedo[:, mine] = _albedo(scene.street, solid, here, local)
        normal[:, mine] = solid.normals(local)
        gloss[0, mine] = solid.material.gloss
        glow[:, mine] = np.asarray(solid.material.glow, np.float32)[:, None]
    albedo = _infrared(albedo) if weather.infrared else albedo
    return Surface(*(part.reshape(-1, *size) for part in (albedo, normal, gloss, glow)))


def _pixels_of(owner: Array) -> list[tuple[int, Array]]:
    # one sort instead of one full-size comparison a solid
    order = owner.ravel().argsort(kind="stable")
    found, starts = np.unique(owner.ravel()[order], return_index=True)
    return [(int(i), part) for i, part in zip(found, np.split(order, starts[1:]), strict=True) if i != SKY]


def _albedo(street: Street, solid: Solid, points: Array, local: Array) -> Array:
    material = solid.material
    colour = np.asarray(material.colour, np.float32)[:, None]
    if material.pattern is not None:
        colour = np.where(material.pattern(local), np.asarray(material.inlay, np.float32)[:, None], colour)
    x, y, z = points * np.float32(5)
    grain: Array = colour * (1 + np.float32(material.rough) * street.noise(x + z, y - z))
    return grain


def _infrared(albedo: Array) -> Array:
    # dyes and leaves reflect most of the near infrared, so dark clothes and lawns come out pale
    grey = albedo.mean(0, keepdims=True)
    pale = 0.14 + 0.62 * np.sqrt(np.maximum(grey, 0))
    seen: Array = np.repeat(np.where(grey > 0.045, pale, grey * 2), 3, 0)
    return seen


def _irradiance(scene: Scene, weather: Weather, view: View, hits: Hits, normal: Array) -> Array:
    sky = np.asarray(weather.ambient, np.float32)[:, None, None]
    light = sky * (np.float32(0.55) + np.float32(0.45) * normal[2]) * _contact(scene, hits)
    if weather.light is not None:
        clear = ~shadow(view, hits, normal, scene.solids, weather.light)
        light += _from(weather.light, hits.points, normal) * clear
    for lamp in _own_lamps(scene, weather, view):
        light += _from(lamp, hits.points, normal)
    irradiance: Array = light
    return irradiance


def _own_lamps(scene: Scene, weather: Weather, view: View) -> list[Light]:
    lamps = scene.headlights if weather.lamps > 1 else []  # by dusk the sky outshines them
    if weather.infrared:
        x, y, z = (float(v) for v in view.origin)
        middle = view.axes[2]
        reach = float(np.linalg.norm(view.origin))
        aim: Point = (float(middle[0]), float(middle[1]), float(middle[2]))
        lamps = [Light((x, y, z, 1.0), (1.2 * reach**2,) * 3, aim, focus=4 + 2.2 * view.focal / view.size)]
    return lamps


def _from(light: Light, points: Array, normal: Array) -> Array:
    size = points.shape[1:]
    towards = light.towards(points.reshape(3, -1)).reshape(3, *(size if light.position[3] else (1, 1)))
    square = (towards * towards).sum(0)
    inverse = 1 / np.sqrt(square)
    facing = np.maximum((towards * normal).sum(0) * inverse, 0)
    if light.position[3]:
        facing = facing / square
    if light.focus:
        aim = -np.asarray(light.aim, np.float32)[:, None, None]
        facing = facing * np.maximum((towards * aim).sum(0) * inverse, 0) ** np.float32(light.focus)
    received: Array = np.asarray(light.colour, np.float32)[:, None, None] * facing
    return received


def _contact(scene: Scene, hits: Hits) -> Array:
    low, high = scene.footprint[:, :, None, None]
    outside = np.maximum(np.maximum(low - hits.points[:2], hits.points[:2] - high), 0)
    gap = outside[0] + outside[1]
    dark = np.float32(0.65) * np.exp(gap * np.float32(-2.8))
    contact: Array = 1 - dark * (hits.owner == GROUND)
    return contact


def _sheen(weather: Weather, rays: Array, normal: Array) -> Array:
    unit = rays / np.sqrt((rays * rays).sum(0))
    along = (unit * normal).sum(0)
    bounced = unit - 2 * along * normal
    grazing = 1 + 3 * (1 - np.abs(along)) ** 3
    mirror = _sky(weather, np.maximum(bounced[2], 0)) * np.clip(0.55 + 2 * bounced[2], 0.15, 1)
    if weather.light is not None and weather.light.position[3] == 0:
        sun = np.asarray(weather.light.position[:3], np.float32)[:, None, None]
        flash = np.maximum((bounced * sun).sum(0), 0) ** 40
        mirror = mirror + 6 * flash * np.asarray(weather.light.colour, np.float32)[:, None, None]
    sheen: Array = mirror * grazing
    return sheen


def _sky(weather: Weather, height: Array) -> Array:
    mix = np.sqrt(np.clip(height, 0, 1))
    zenith, horizon = (np.asarray(c, np.float32)[:, None, None] for c in (weather.zenith, weather.horizon))
    sky: Array = horizon + (zenith - horizon) * mix
    return sky


def _puddles(scene: Scene, weather: Weather, view: View, rays: Array, hits: Hits, light: Array) -> Array:
    owner = mirrored(view, rays, scene.solids)
    tones = np.array([_mirror_tone(solid, weather) for solid in scene.solids], np.float32).T
    seen = np.where(owner == SKY, _sky(weather, np.abs(rays[2])), tones[:, np.maximum(owner, 0)])
    x, y = hits.points[:2]
    share = weather.wet * (0.42 + 0.25 * scene.street.noise(x * 0.8, y * 0.8))
    return np.where(hits.owner == GROUND, light + np.maximum(share, 0) * (seen - light), light)


def _mirror_tone(solid: Solid, weather: Weather) -> list[float]:
    parts = zip(solid.material.colour, weather.ambient, solid.material.glow, strict=True)
    return [colour * ambient + glow * weather.lamps for colour, ambient, glow in parts]


def _air(weather: Weather, hits: Hits, rays: Array, light: Array) -> Array:
    height = rays[2] / np.sqrt((rays * rays).sum(0))
    sky = _sky(weather, height)
    light = np.where(hits.owner == SKY, sky, light)
    if not weather.fog:
        return light
    near = float(np.median(hits.depth))
    clear = np.exp(np.minimum(hits.depth, 1e3) * np.float32(-weather.fog / near))
    seen: Array = sky + (light - sky) * clear
    return seen
