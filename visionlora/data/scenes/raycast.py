"""Which solid each pixel sees, and which visible points a light cannot reach."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from visionlora.data.scenes.camera import View
from visionlora.data.scenes.solids import Array, Solid
from visionlora.data.scenes.weather import Light

SKY, GROUND = -2, -1


@dataclass(frozen=True, eq=False)
class Hits:
    """What the pixels of one view see."""

    owner: Array  # (size, size) index of the solid, GROUND or SKY
    depth: Array  # (size, size) along the line of sight, inf in the sky
    points: Array  # (3, size, size) places in metres


def cast(view: View, rays: Array, solids: list[Solid]) -> Hits:
    """Return the nearest surface along every ray (3, size, size)."""
    with np.errstate(divide="ignore"):
        drop = -view.origin[2] / rays[2]
    depth = np.where(drop > 0, drop, np.float32(np.inf))
    owner = np.where(drop > 0, np.int16(GROUND), np.int16(SKY))
    _nearest(view, rays, solids, owner, depth)
    reach = np.where(np.isfinite(depth), depth, np.float32(1e3))
    return Hits(owner, depth, view.origin[:, None, None] + rays * reach)


def mirrored(view: View, rays: Array, solids: list[Solid]) -> Array:
    """Return the owner (size, size) that each pixel would see in a mirror lying on the ground."""
    flip = np.array([1, 1, -1], np.float32)[:, None, None]
    depth = np.full(rays.shape[1:], np.inf, np.float32)
    owner = np.full(rays.shape[1:], SKY, np.int16)
    _nearest(view.mirrored(), rays * flip, solids, owner, depth)
    return owner


def _nearest(view: View, rays: Array, solids: list[Solid], owner: Array, depth: Array) -> None:
    origin = view.origin[:, None]
    for index, solid in enumerate(solids):
        window = view.window(solid.corners)
        if window is None:
            continue
        seen = depth[window]
        near, far = solid.interval(origin, rays[:, window[0], window[1]].reshape(3, -1))
        near, far = near.reshape(seen.shape), far.reshape(seen.shape)
        hit = (near < far) & (near > 0) & (near < seen)
        np.copyto(seen, near, where=hit)
        np.copyto(owner[window], np.int16(index), where=hit)


def shadow(view: View, hits: Hits, normals: Array, solids: list[Solid], light: Light) -> Array:
    """Return where the light is blocked, (size, size) of bool."""
    blocked = np.zeros(hits.owner.shape, bool)
    lifted = hits.points + np.float32(0.015) * normals  # off the surface, so that it does not shade itself
    for solid in solids:
        if not solid.casts:
            continue
        window = view.window(_shaft(solid.corners, light))
        if window is None:
            continue
        points = lifted[:, window[0], window[1]].reshape(3, -1)
        near, far = solid.interval(points, light.towards(points))
        # a lamp sits at parameter 1 of its own ray; the sun is never reached
        hit = (near < far) & (far > 1e-4) & ((near < 1) | (light.position[3] == 0))
        blocked[window] |= hit.reshape(blocked[window].shape)
    return blocked


def _shaft(corners: Array, light: Light) -> Array:
    *place, w = light.position
    here = np.asarray(place, np.float32)[:, None]
    away = here - w * corners
    # a corner level with the lamp throws an endless shadow; 50 m is out of every picture
    reach = corners[2] / np.maximum(away[2], 0.02 * np.linalg.norm(away, axis=0))
    return np.concatenate([corners, corners - reach * away], 1)
