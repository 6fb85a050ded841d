"""Convex solids (boxes, prisms, cylinders, ellipsoids, tubes) and where a ray enters and leaves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # float32 everywhere: half the time of float64 at image size
Point = tuple[float, float, float]

_CORNERS = np.array([[i >> axis & 1 for i in range(8)] for axis in range(3)], bool)


@dataclass(frozen=True, eq=False)
class Material:
    """What a surface looks like. Colours are linear RGB in [0, 1]."""

    colour: Point = (0.5, 0.5, 0.5)
    gloss: float = 0.04
    """Share of the sky that mirrors in the surface when seen from the front; it grows at grazing angles."""
    glow: Point = (0.0, 0.0, 0.0)
    """Light the surface emits while lamps are on."""
    rough: float = 0.15
    """Contrast of the mottling: 0 is smooth plastic, 1 is foliage."""
    pattern: Callable[[Array], Array] | None = None
    """From local points (3, n) to the share (n,) of the inlay colour."""
    inlay: Point = (0.0, 0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Solid:
    """The set of local points with n·p <= d for every plane and sum(quadric * p²) <= 1."""

    frame: Array  # (3, 4) from world to local
    planes: Array  # (k, 4) rows n, d
    quadric: Array  # (3,) zeros for a polyhedron
    extent: Array  # (3, 2) local bounds
    material: Material = field(default_factory=Material)
    hole: float = 0.0
    """Inner radius of a tube, in local units; only for cylinders."""
    casts: bool = True
    """Whether the solid throws a shadow; backdrops do not, to save time."""

    @cached_property
    def corners(self) -> Array:
        """The eight corners of the local bounds in world coordinates, (3, 8)."""
        local = np.where(_CORNERS, self.extent[:, 1:], self.extent[:, :1])
        corners: Array = np.linalg.solve(self.frame[:, :3], local - self.frame[:, 3:])
        return corners

    def turned(self, turn: Array) -> Solid:
        """Return the solid after p -> turn @ p, a rotation with or without scale."""
        frame = np.column_stack([self.frame[:, :3] @ np.linalg.inv(turn), self.frame[:, 3]])
        return replace(self, frame=frame.astype(np.float32))

    def local(self, points: Array) -> Array:
        """Return world points (3, n) in local coordinates."""
        local: Array = self.frame[:, :3] @ points + self.frame[:, 3:]
        return local

    def interval(self, origin: Array, rays: Array) -> tuple[Array, Array]:
        """Return the ray parameters (n,) of entry and exit; the ray misses where entry >= exit.

        origin is (3, 1) or (3, n), rays are (3, n) or (3, 1), both in world coordinates.
        """
        o, d = self.local(origin), self.frame[:, :3] @ rays
        near, far = _through_planes(self.planes, o, d)
        if self.quadric.any():
            enter, leave = _through_quadric(self.quadric, 1.0, o, d)
            near, far = np.maximum(near, enter), np.minimum(far, leave)
        return self._through_hole(near, far, o, d) if self.hole else (near, far)

    def _through_hole(self, near: Array, far: Array, o: Array, d: Array) -> tuple[Array, Array]:
        # a ray that enters a cap inside the hole meets the tube where it leaves the hole
        entry = o + near * d
        inside = (self.quadric[:, None] * entry**2).sum(0) < self.hole**2
        leave = _through_quadric(self.quadric, self.hole**2, o, d)[1]
        return np.where(inside, leave, near), far

    def normals(self, local: Array) -> Array:
        """Return unit world normals (3, n) at local surface points (3, n)."""
        normal, slack = _plane_normals(self.planes, local)
        if self.quadric.any():
            bulge = self.quadric[:, None] * local
            square = (bulge * local).sum(0)
            normal = np.where(np.abs(square - 1) < slack, bulge, normal)
            if self.hole:  # the inner wall faces the axis
                inner = np.abs(square - self.hole**2) < np.minimum(slack, np.abs(square - 1))
                normal = np.where(inner, -bulge, normal)
        world = self.frame[:, :3].T @ normal
        unit: Array = world / (np.sqrt((world * world).sum(0)) + np.float32(1e-9))
        return unit


def _through_planes(planes: Array, o: Array, d: Array) -> tuple[Array, Array]:
    if not len(planes):
        return np.float32(-np.inf), np.float32(np.inf)
    slope = planes[:, :3] @ d + np.float32(1e-12)  # never exactly parallel
    t = (planes[:, 3:] - planes[:, :3] @ o) / slope
    inward = slope < 0
    near = np.where(inward, t, np.float32(-np.inf)).max(0)
    far = np.where(inward, np.float32(np.inf), t).min(0)
    return near, far


def _through_quadric(weights: Array, radius2: float, o: Array, d: Array) -> tuple[Array, Array]:
    scaled = weights[:, None] * d
    a = (scaled * d).sum(0) + np.float32(1e-12)
    b = (scaled * o).sum(0)
    c = (weights[:, None] * o * o).sum(0) - np.float32(radius2)
    disc = b * b - a * c
    root = np.sqrt(np.maximum(disc, 0))
    far = np.where(disc > 0, (root - b) / a, np.float32(-np.inf))
    return (-root - b) / a, far


def _plane_normals(planes: Array, local: Array) -> tuple[Array, Array]:
    if not len(planes):
        return np.zeros_like(local), np.full(local.shape[1], np.inf, np.float32)
    slack = np.abs(planes[:, 3:] - planes[:, :3] @ local)  # (k, n) distance to each plane
    return planes[slack.argmin(0), :3].T, slack.min(0)


def scaled(colour: Point, by: float | Point) -> Point:
    """Return a colour times a number, or times another colour."""
    factors = by if isinstance(by, tuple) else (by, by, by)
    r, g, b = (float(c * f) for c, f in zip(colour, factors, strict=True))
    return r, g, b


def _solid(centre: Point, planes: Any, quadric: Any, extent: Any, material: Material) -> Solid:
    frame = np.column_stack([np.eye(3), -np.asarray(centre)])
    rows = np.asarray(planes, np.float32).reshape(-1, 4)
    return Solid(frame.astype(np.float32), rows, np.float32(quadric), np.float32(extent), material)


def box(centre: Point, size: Point, material: Material) -> Solid:
    """Return an upright box; centre and size in metres."""
    half = np.asarray(size) / 2
    planes = [[*(sign * np.eye(3)[axis]), half[axis]] for axis in range(3) for sign in (1, -1)]
    return _solid(centre, planes, (0, 0, 0), np.column_stack([-half, half]), material)


def prism(profile: list[tuple[float, float]], half_width: float, material: Material, taper: float = 0.0) -> Solid:
    """Return a convex side view, (x, z) corners counter-clockwise, widened to ±half_width along y.

    taper leans the sides inwards: metres of half-width lost per metre above the lowest corner.
    """
    points = np.asarray(profile, np.float32)
    edge = np.roll(points, -1, 0) - points
    n = np.column_stack([edge[:, 1], -edge[:, 0]]) / np.hypot(edge[:, :1], edge[:, 1:])
    sides = [[nx, 0, nz, nx * x + nz * z] for (nx, nz), (x, z) in zip(n, points, strict=True)]
    low, scale = points[:, 1].min(), float(np.hypot(1, taper))
    leans = [[0, sign / scale, taper / scale, (half_width + taper * low) / scale] for sign in (1, -1)]
    (x0, z0), (x1, z1) = points.min(0), points.max(0)
    return _solid((0, 0, 0), sides + leans, (0, 0, 0), [[x0, x1], [-half_width, half_width], [z0, z1]], material)


def ellipsoid(centre: Point, radii: Point, material: Material) -> Solid:
    """Return an ellipsoid with its axes along x, y and z."""
    r = np.asarray(radii, np.float32)
    return _solid(centre, [], 1 / r**2, np.column_stack([-r, r]), material)


def wheel(centre: Point, radius: float, width: float, material: Material, hole: float = 0.0) -> Solid:
    """Return a cylinder around the y axis; hole is the share of the radius that is open."""
    local = _solid((0, 0, 0), [[0, 1, 0, width / 2], [0, -1, 0, width / 2]], (1, 0, 1), np.zeros((3, 2)), material)
    frame = np.diag([1 / radius, 1.0, 1 / radius])
    extent = np.array([[-1, 1], [-width / 2, width / 2], [-1, 1]], np.float32)
    shifted = np.column_stack([frame, -frame @ np.asarray(centre)]).astype(np.float32)
    return replace(local, frame=shifted, extent=extent, hole=hole)


def pole(start: Point, end: Point, radius: float, material: Material) -> Solid:
    """Return a cylinder between two points."""
    frame, length = _along(start, end)
    frame[1:] /= radius
    planes = [[1, 0, 0, length / 2], [-1, 0, 0, length / 2]]
    extent = [[-length / 2, length / 2], [-1, 1], [-1, 1]]
    return replace(_solid((0, 0, 0), planes, (0, 1, 1), extent, material), frame=frame)


def limb(start: Point, end: Point, radius: float, material: Material) -> Solid:
    """Return a long ellipsoid whose ends reach a little beyond two points: an arm, a leg, a neck."""
    frame, length = _along(start, end)
    frame[0] /= length / 2 + 0.6 * radius
    frame[1:] /= radius
    return replace(_solid((0, 0, 0), [], (1, 1, 1), [[-1, 1]] * 3, material), frame=frame)


def _along(start: Point, end: Point) -> tuple[Array, float]:
    a, b = np.asarray(start, np.float64), np.asarray(end, np.float64)
    length = float(np.linalg.norm(b - a))
    x = (b - a) / length
    y = np.cross((0, 0, 1) if abs(x[2]) < 0.9 else (1, 0, 0), x)
    y /= np.linalg.norm(y)
    turn = np.stack([x, y, np.cross(x, y)])
    return np.column_stack([turn, -turn @ (a + b) / 2]).astype(np.float32), length
