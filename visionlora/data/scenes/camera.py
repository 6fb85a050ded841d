"""A pinhole camera on a mast: height, pitch, yaw and roll, aimed at one object."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from visionlora.data.scenes.solids import Array
from visionlora.errors import ConfigError


@dataclass(frozen=True)
class Camera:
    """How a camera is mounted. Angles in degrees, height in metres above the ground."""

    height: float
    pitch: float
    """Degrees below the horizontal: 0 looks at the horizon, 90 straight down."""
    yaw: float = 90.0
    """Degrees between the road and the line of sight: 90 looks straight across the road."""
    roll: float = 0.0
    """Degrees the picture is turned clockwise, as with a camera that hangs askew."""

    def __post_init__(self) -> None:
        if not 2.2 <= self.height <= 60:
            raise ConfigError(f"Camera height must be 2.2 to 60 metres (above a bus's middle), got {self.height!r}")
        if not 1 <= self.pitch <= 80:
            raise ConfigError(f"Camera pitch must be 1 to 80 degrees below the horizontal, got {self.pitch!r}")


CAMERAS: dict[str, tuple[Camera, Camera]] = {
    "level": (Camera(2.8, 4, 32, -2), Camera(4.2, 11, 148, 2)),
    "tilted": (Camera(6, 28, 25, -16), Camera(10, 48, 155, 16)),
}
"""Presets as two opposite corners; every picture draws its camera between them."""


def draw_camera(preset: str, rng: np.random.Generator) -> Camera:
    """Return one camera between the corners of a preset."""
    low, high = CAMERAS[preset]
    mix = rng.random(4)
    ends = ((low.height, high.height), (low.pitch, high.pitch), (low.yaw, high.yaw), (low.roll, high.roll))
    return Camera(*(float(a + (b - a) * m) for (a, b), m in zip(ends, mix, strict=True)))


@dataclass(frozen=True, eq=False)
class View:
    """A camera at work: where it stands, how it is turned, what its pixels see."""

    origin: Array  # (3,)
    axes: Array  # (3, 3) rows right, down, forward
    focal: float
    centre: Array  # (2,) principal point in pixels
    size: int

    def rays(self) -> Array:
        """Return one ray a pixel, (3, size, size), whose parameter is the depth along the line of sight."""
        grid = np.arange(self.size, dtype=np.float32) + np.float32(0.5)
        x = (grid - self.centre[0]) / np.float32(self.focal)
        y = (grid - self.centre[1]) / np.float32(self.focal)
        right, down, forward = self.axes[:, :, None, None]
        rays: Array = right * x[None, None, :] + down * y[None, :, None] + forward
        return rays

    def window(self, points: Array) -> tuple[slice, slice] | None:
        """Return the rows and columns that the convex hull of points (3, n) can cover; None if out of sight."""
        local = self.axes @ (points - self.origin[:, None])
        if local[2].min() < 0.05:
            return (slice(0, self.size), slice(0, self.size)) if local[2].max() > 0.05 else None
        pixels = local[:2] / local[2] * self.focal + self.centre[:, None]
        x0, y0 = np.maximum(np.floor(pixels.min(1)), 0).astype(int)
        x1, y1 = np.minimum(np.ceil(pixels.max(1)), self.size).astype(int)
        return (slice(y0, y1), slice(x0, x1)) if x0 < x1 and y0 < y1 else None

    def mirrored(self) -> View:
        """Return the view from below the ground that a puddle shows."""
        flip = np.array([1, 1, -1], np.float32)
        return View(self.origin * flip, self.axes * flip, self.focal, self.centre, self.size)


def aim(camera: Camera, corners: Array, fill: float, shift: Array, size: int) -> View:
    """Return the view whose crop of `size` pixels holds the object with these corners (3, n).

    fill is the share of the crop that the object's longer side takes, shift (2,) moves it off the middle.
    """
    middle = (corners.min(1) + corners.max(1)) / 2
    axes = _axes(camera)
    reach = float(np.linalg.norm(corners - middle[:, None], axis=0).max())
    # never inside the object, even where a low mast and a steep pitch ask for it
    distance = max((camera.height - middle[2]) / -axes[2, 2], 1.8 * reach)
    origin = middle - distance * axes[2]
    local = axes @ (corners - origin[:, None])
    flat = local[:2] / local[2]
    low, high = flat.min(1), flat.max(1)
    focal = fill * size / float((high - low).max())
    centre = size * (0.5 + shift) - focal * (low + high) / 2
    return View(origin.astype(np.float32), axes.astype(np.float32), focal, centre.astype(np.float32), size)


def _axes(camera: Camera) -> Array:
    pitch, yaw, roll = np.radians([camera.pitch, camera.yaw, camera.roll])
    level = np.array([np.cos(yaw), np.sin(yaw), 0])
    forward = np.cos(pitch) * level - np.sin(pitch) * np.array([0, 0, 1])
    right = np.cross(level, (0, 0, 1))
    down = np.cross(forward, right)
    turn = np.array([[np.cos(roll), np.sin(roll)], [-np.sin(roll), np.cos(roll)]])
    axes: Array = np.vstack([turn @ np.stack([right, down]), forward])
    return axes
