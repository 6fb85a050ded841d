"""Arithmetic, memory traffic and kept numbers of every computation order of one adapted layer, step by step.

Notation of core.ops: weight W, thin factors A and B, z = x A', g the gradient of the output y, dz = s B' g. A product
of an (m, k) and a (k, n) matrix is 2 m k n FLOPs, so with M positions and rank r

    f  = 2 M out taps       the layer itself, the gradient of its input, or a dense gradient of W
    tA = 2 M r groups taps  z, dA, or the branch's part of the gradient of the input
    tB = 2 M r out          B z, dz or dB
    mg = 2 r out taps       s B A, or one half of the projection of a dense gradient: no M in it

A step moves every tensor it reads and every tensor it writes once, whole: what is left when caches hold nothing between
steps and nothing is read twice within one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from visionlora.analysis.sizes import Sizes
from visionlora.core.orders import Order

Way = Literal[Order, "computed", "materialised"]
"""An order of the autograd functions; "computed": a weight formed by any other variant, its dense gradient pulled back;
"materialised": the layer's own forward run on the changed weight, for classes whose forward is not known."""


class Step(NamedTuple):
    """One product or one pass over memory."""

    what: str
    flops: int
    moved: int
    """Numbers read and written."""


class Cost(NamedTuple):
    """What a training step does (forward and backward), or what it does beyond something else."""

    flops: int
    moved: int
    """Bytes read and written."""
    saved: int
    """Bytes kept from the forward pass for the backward pass."""

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]  # sums, not longer tuples
        return Cost(self.flops + other.flops, self.moved + other.moved, self.saved + other.saved)


def floor_steps(s: Sizes) -> list[Step]:
    """Return what no adapter of the layer avoids: y, and the gradient of its input where something before needs it."""
    f = 2 * s.positions * s.weight
    steps = [Step("y", f, s.x + s.weight + s.y)]
    return [*steps, Step("dx", f, s.y + s.weight + s.x)] if s.needs_input else steps


def extra_steps(s: Sizes, way: Way, change: tuple[int, int] = (0, 0)) -> list[Step]:
    """Return what a way of computing does beyond the floor; their order is that of the pass.

    `change` is the FLOPs to form a change that is no product of two factors, and to pull a gradient back through it.
    FLOPs in sum, with all parts trained and wanted: factorised 3 tA + 3 tB, merged 2 tA + 2 tB + 2 mg, projected
    f + 4 mg.
    """
    if way == "factorised":
        return [*_factorised(s), *_again(s)]
    if way == "merged":
        return [*_merged(s), *_again(s)]
    if way == "projected":
        return [*_projected(s), *_again(s)]
    return _formed(s, way, change)


def kept(s: Sizes, way: Way) -> int:
    """Return the numbers kept for the backward pass beyond the floor's: x, z or both.

    With A frozen, z alone gives dB, the only gradient there is. A materialised layer keeps the changed weight as well.
    """
    if way == "materialised":
        return s.x * s.keeps_input + s.weight * s.needs_input
    scale = s.out * s.folded
    if way in ("factorised", "merged") and not s.trains_A:
        return s.z + scale
    return s.x * s.keeps_input + s.z * (way == "factorised") + scale


def cost(steps: Sequence[Step], itemsize: int, saved: int = 0) -> Cost:
    """Return steps in sum, and the numbers saved, in bytes of this size."""
    return Cost(sum(s.flops for s in steps), itemsize * sum(s.moved for s in steps), itemsize * saved)


def _factorised(s: Sizes) -> list[Step]:
    tA, tB = 2 * s.positions * s.A, 2 * s.positions * s.B
    steps = [_z(s), Step("y += s B z", tB, s.z + s.B + 2 * s.y)]
    if s.trains_A or s.needs_input:
        steps.append(_dz(s))
    steps.append(_dB(s))
    if s.trains_A:
        steps.append(_dA(s))
    if s.needs_input:  # a convolution cannot add its result to a tensor: it is written, read and added
        steps.append(Step("dx += A' dz", tA, s.z + s.A + (4 if s.conv else 2) * s.x))
    return steps


def _merged(s: Sizes) -> list[Step]:
    # z is not kept: recomputed in the backward pass for dB, or with A frozen kept instead of x
    steps = [_merge(s), *([_merge(s)] if s.needs_input else []), _z(s), _dB(s)]
    return [*steps, _dz(s), _dA(s)] if s.trains_A else steps


def _projected(s: Sizes) -> list[Step]:
    # the merged weight is formed for every backward pass: the call that gives dW takes it, dx wanted or not
    mg = 2 * s.rank * s.weight
    down = s.weight + s.A + s.B
    return [_merge(s), _merge(s), _dW(s), Step("dA = s B' dW", mg, down), Step("dB = s dW A'", mg, down)]


def _formed(s: Sizes, way: Way, change: tuple[int, int]) -> list[Step]:
    form, back = change
    formed = Step("W + change", form, 2 * s.weight)
    return [formed, formed, _dW(s), Step("pull dW back", back, s.weight), *(_again(s) if way == "computed" else [])]


def _again(s: Sizes) -> list[Step]:
    return [Step("x again", 0, s.again)] if s.again and s.trains_A else []


def _merge(s: Sizes) -> Step:
    return Step("W + s B A", 2 * s.rank * s.weight, 2 * s.weight + s.A + s.B)


def _z(s: Sizes) -> Step:
    return Step("z", 2 * s.positions * s.A, s.x + s.A + s.z)


def _dz(s: Sizes) -> Step:
    return Step("dz", 2 * s.positions * s.B, s.y + s.B + s.z)


def _dA(s: Sizes) -> Step:
    return Step("dA", 2 * s.positions * s.A, s.z + s.x + s.A)


def _dB(s: Sizes) -> Step:
    return Step("dB", 2 * s.positions * s.B, s.y + s.z + s.B)


def _dW(s: Sizes) -> Step:
    return Step("dW", 2 * s.positions * s.weight, s.x + s.y + s.weight)
