"""Texts that are nearly the same: by the share of runs of three words they have in common."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from hashlib import blake2b

__all__ = ["near_pairs"]

RUN = 3
SKETCH = 24
"""Smallest hashes of a text by which candidates are found (MinHash, Broder 1997)."""
COMMON = 50
"""Texts that may share a hash before it says nothing: "in front of the"."""


def near_pairs(known: Sequence[str], others: Sequence[str], share: float = 0.8) -> Iterator[tuple[int, int, float]]:
    """Yield (place in known, place in others, share of common runs) for each other text that has a near twin.

    Texts of fewer than six words say too little and are left out.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    for at, text in enumerate(known):
        for value in _sketch(_runs(text)):
            holders[value].append(at)
    for at, text in enumerate(others):
        own = _runs(text)
        seen: Counter[int] = Counter()
        for value in _sketch(own):
            found = holders.get(value, ())
            seen.update(found if len(found) <= COMMON else ())
        best = max(((_share(own, _runs(known[other])), other) for other, _ in seen.most_common(3)), default=(0.0, 0))
        if best[0] >= share:
            yield best[1], at, best[0]


def _runs(text: str) -> set[int]:
    words = text.lower().split()
    if len(words) < 2 * RUN:
        return set()
    return {_hash(" ".join(words[at : at + RUN])) for at in range(len(words) - RUN + 1)}


def _sketch(runs: set[int]) -> list[int]:
    return heapq.nsmallest(SKETCH, runs)


def _share(one: set[int], other: set[int]) -> float:
    return len(one & other) / max(1, len(one | other))


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
