"""The sizes that decide what one call of one adapted layer costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """One call of a layer with a weight of `out` rows and `taps` numbers in a row. Everything is counted in numbers."""

    positions: int
    """Where the weight is applied, for each feature: images x pixels of the output, or tokens."""
    out: int
    taps: int
    """Inputs of one group x kernel."""
    x: int
    """Numbers in the input."""
    y: int
    """Numbers in the output."""
    rank: int
    groups: int = 1
    conv: bool = False
    trains_A: bool = True
    needs_input: bool = True
    """Something before this layer is trained, so that the gradient of its input is computed."""
    keeps_input: bool = True
    """Nobody else keeps the input for the backward pass."""
    folded: bool = False
    """The norm that follows is folded in: its scale is kept, a number for every output channel."""
    again: int = 0
    """Numbers read and written to compute the input once more from what is kept anyway."""

    @property
    def weight(self) -> int:
        return self.out * self.taps

    @property
    def A(self) -> int:
        return self.groups * self.rank * self.taps

    @property
    def B(self) -> int:
        return self.out * self.rank

    @property
    def z(self) -> int:
        """Numbers in x A'."""
        return self.positions * self.groups * self.rank
