"""What one adapter adds to the weight of one layer, as matrices in float64 on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionlora.core.delta import Delta, Parts
from visionlora.core.geometry import Geometry, materialisable, widened
from visionlora.core.thin import Thin, joined
from visionlora.errors import StateError
from visionlora.targets import Site
from visionlora.variants.fa import FA
from visionlora.variants.lora import LoRA

Rows = tuple[int, int]
Piece = Thin | Tensor
"""Thin factors where the variant has them, else the dense (groups, out / groups, in * taps)."""


def pieces(delta: Delta, site: Site, base: Tensor) -> dict[Rows, Piece]:
    """Return the change of one layer by the rows it changes: of the whole weight, or of the parts of a fused one."""
    if not isinstance(delta, Parts):
        return {(0, site.geometry.out): _piece(delta, site, (0, site.geometry.out), base)}
    return {rows: _piece(delta.deltas[part], site, rows, base) for part, rows in site.parts.items()}  # type: ignore[arg-type]


def blocks(sites: Sequence[Site]) -> dict[str, Rows]:
    """Return the parts that adapters of one layer change together; {"": all rows} where one changes the layer whole."""
    if all(site.parts for site in sites):
        found = {part: rows for site in sites for part, rows in site.parts.items()}
        return dict(sorted(found.items(), key=lambda item: item[1]))
    return {"": (0, sites[0].geometry.out)}


def within(block: Rows, found: Mapping[Rows, Piece]) -> Piece | None:
    """Return what an adapter adds to a block of rows, which holds its pieces whole; None for nothing."""
    inside = {rows: piece for rows, piece in found.items() if block[0] <= rows[0] and rows[1] <= block[1]}
    if list(inside) == [block]:
        return inside[block]
    if not inside:
        return None
    if all(isinstance(piece, Thin) for piece in inside.values()):
        return joined([_set_in(piece, rows, block) for rows, piece in inside.items()])  # type: ignore[misc]
    return sum(dense(_set_in(piece, rows, block)) for rows, piece in inside.items())  # type: ignore[return-value]


def dense(piece: Piece) -> Tensor:
    """Return the change itself."""
    return piece.dense() if isinstance(piece, Thin) else piece


def each(found: Mapping[Rows, Piece], change: Callable[[Tensor], Tensor]) -> dict[Rows, Piece]:
    """Return the pieces, dense, with something done to each."""
    return {rows: change(dense(piece)) for rows, piece in found.items()}


def as_tensors(factors: Thin, geometry: Geometry) -> dict[str, Tensor]:
    """Return A and B as the variant "lora" stores them."""
    A = factors.A.reshape(geometry.groups * factors.rank, geometry.in_, *geometry.kernel)
    return {"A": A, "B": factors.B.reshape(-1, factors.rank, *[1] * len(geometry.kernel))}


def _piece(delta: Delta, site: Site, rows: Rows, base: Tensor) -> Piece:
    geo = delta.geometry
    if isinstance(delta, (LoRA, FA)) and delta.state_dict().keys() == {"A", "B"}:  # and no start that is taken off
        A = wide(delta.A).reshape(geo.groups, delta.rank, -1)
        return Thin(delta.scale * wide(delta.B).reshape(geo.groups, -1, delta.rank), A)
    if not materialisable(base):
        raise StateError(
            f"the change of {site.name} depends on its weight, and {type(base).__name__} hides it; combine the "
            "adapters on a base that is not quantised"
        )
    weight = wide(site.geometry.canonical(widened(base)))[slice(*rows)]
    own = copy.deepcopy(delta).to("cpu", torch.float64).eval()  # in training mode dropout would thin the change
    with torch.no_grad():
        return own.change(weight).reshape(geo.groups, geo.out // geo.groups, -1)


def _set_in(piece: Piece, rows: Rows, block: Rows) -> Piece:
    above, below = rows[0] - block[0], block[1] - rows[1]
    if isinstance(piece, Thin):
        return Thin(F.pad(piece.B, (0, 0, above, below)), piece.A)
    return F.pad(piece, (0, 0, above, below))


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 on the CPU, where sums of adapters are the same on every machine."""
    return tensor.detach().to("cpu", torch.float64)
