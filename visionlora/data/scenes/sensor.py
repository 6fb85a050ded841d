"""The camera behind the lens: glare, drops, gain, tone curve, noise."""

from __future__ import annotations

import numpy as np

from visionlora.data.scenes.solids import Array
from visionlora.data.scenes.weather import Weather

LUMA = np.array([0.299, 0.587, 0.114], np.float32)[:, None, None]


def expose(light: Array, weather: Weather, over: int, rng: np.random.Generator) -> Array:
    """Return the finished picture, uint8 (size, size, 3), of linear light (3, over * size, over * size)."""
    light = _glare(_shrink(light, over))
    light = light * _gain(light, weather)
    if weather.streaks:
        light = _drops(light, weather.streaks, rng)
    picture = _tone(light)
    picture = _smooth(picture, weather.blur)
    picture = _noise(picture, weather.noise, rng)
    grey = (picture * LUMA).sum(0)
    picture = grey + np.float32(weather.colour) * (picture - grey)
    finished: Array = (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(finished.transpose(1, 2, 0))


def _shrink(light: Array, over: int) -> Array:
    _, height, width = light.shape
    # a lamp far brighter than white would leave jagged edges: it is clipped before averaging
    small: Array = np.minimum(light, 4).reshape(3, height // over, over, width // over, over).mean((2, 4))
    return small


def _glare(light: Array) -> Array:
    excess = np.maximum(light - 0.9, 0)
    if not excess.any():
        return light
    glare: Array = light + np.float32(0.5) * _smooth(excess, 1.6) + np.float32(0.35) * _smooth(excess, 4.0)
    return glare


def _gain(light: Array, weather: Weather) -> float:
    # the mean after the tone curve, found on a few pixels: two steps are enough for a smooth curve
    sample, gain = (light * LUMA).sum(0)[::3, ::3], 1.0
    for _ in range(3):
        gain *= (weather.exposure / max(float(_tone(sample * gain).mean()), 1e-3)) ** 1.8
    return float(np.clip(gain, 0.3, weather.max_gain))


def _tone(light: Array) -> Array:
    # a soft shoulder keeps highlights from clipping hard, gamma 1/2.2 encodes for a screen
    tone: Array = (light * (1 + light / 9) / (1 + light * 0.62)) ** np.float32(1 / 2.2)
    return tone


def _drops(light: Array, count: int, rng: np.random.Generator) -> Array:
    size = light.shape[1]
    veil, slant = np.zeros((size, size), np.float32), rng.uniform(-0.35, 0.35)
    x, y = rng.uniform(0, size, count), rng.uniform(-0.1 * size, size, count)
    length, power = rng.uniform(0.06, 0.2, count) * size, rng.uniform(0.04, 0.13, count)
    for step in np.arange(0, 0.2 * size, 0.7):
        row, column = (y + step).astype(int), (x + slant * step).astype(int)
        inside = (step < length) & (row >= 0) & (row < size) & (column >= 0) & (column < size)
        veil[row[inside], column[inside]] = power[inside]
    wet: Array = light + veil
    return wet


def _smooth(picture: Array, sigma: float) -> Array:
    reach = max(1, int(2.5 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).astype(np.float32)
    for axis in (1, 2):
        size = picture.shape[axis]
        place = np.clip(np.arange(size)[:, None] + np.arange(-reach, reach + 1), 0, size - 1)
        band = np.zeros((size, size), np.float32)
        np.add.at(band, (np.arange(size)[:, None], place), kernel[None, :])
        picture = band @ picture if axis == 1 else picture @ band.T
    return picture


def _noise(picture: Array, strength: float, rng: np.random.Generator) -> Array:
    grain = rng.standard_normal(picture.shape, np.float32)
    # the demosaicing and the denoiser smear colour noise over neighbours: half of it is coarse
    coarse = rng.standard_normal((3, picture.shape[1] // 2 + 1, picture.shape[2] // 2 + 1), np.float32)
    coarse = coarse.repeat(2, 1).repeat(2, 2)[:, : picture.shape[1], : picture.shape[2]]
    noisy: Array = picture + np.float32(strength) * (0.6 * grain + 0.25 * grain[:1] + 0.6 * coarse)
    return noisy
