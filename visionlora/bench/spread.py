"""Ratios of times that were taken in turns, and how sure they are."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

DRAWS = 2000
NOISY = 0.10


@dataclass(frozen=True)
class Ratio:
    """One contestant's time over another's."""

    median: float
    """Of the ratios inside each round."""
    low: float
    high: float
    """The 95 % bootstrap interval of the median."""
    of_minima: float
    """The shortest time over the other's shortest, over all rounds."""

    @property
    def noisy(self) -> bool:
        """The interval is too wide to say anything within 10 %."""
        return self.high - self.low > NOISY * self.median


def ratio(times: Sequence[float], others: Sequence[float]) -> Ratio:
    """Return the ratio of times, those of one round at the same place in both."""
    each = [a / b for a, b in zip(times, others, strict=True)]
    drawn = random.Random(0)
    medians = sorted(median(drawn.choices(each, k=len(each))) for _ in range(DRAWS))
    low, high = medians[int(0.025 * DRAWS)], medians[int(0.975 * DRAWS) - 1]
    return Ratio(median(each), low, high, min(times) / min(others))
