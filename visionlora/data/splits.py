"""Splitting samples by class and group, the same for a seed whatever the order of the files."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

from visionlora.config import compile_pattern
from visionlora.data.folders import Sample
from visionlora.errors import DataError

__all__ = ["GroupBy", "few_shot", "group_names", "stratified_split"]

logger = logging.getLogger(__name__)

GroupBy = str | Callable[[str], str]


def stratified_split(
    samples: Sequence[Sample], fractions: Sequence[float], *, seed: int = 0, group_by: GroupBy | None = None
) -> list[list[Sample]]:
    """Return one list of samples per fraction, with the classes in the same proportions in each.

    The fractions sum to 1 and the first part is the training part: every class has a sample there. Samples of one
    group (see group_names) stay together, so the proportions are as near as the groups allow. The files' order and the
    folder the data set lies in play no part. Raises DataError if a part with a fraction above 0 would be empty.
    """
    if abs(sum(fractions) - 1) > 1e-6 or min(fractions) < 0:
        raise DataError(f"the fractions of a split are at least 0 and sum to 1, got {list(fractions)}")
    need = [{label: n * share for label, n in Counter(s.label for s in samples).items()} for share in fractions]
    parts: list[list[Sample]] = [[] for _ in fractions]
    trained: set[str] = set()
    for members in _groups(samples, seed, group_by):
        counts = Counter(sample.label for sample in members)
        part = _neediest(need, counts, fractions) if trained.issuperset(counts) else 0
        trained.update(counts if part == 0 else ())
        parts[part] += members
        for label, n in counts.items():
            need[part][label] -= n
    _check_parts(parts, fractions)
    return [sorted(part, key=lambda sample: sample.path) for part in parts]


def few_shot(samples: Sequence[Sample], shots: int, *, seed: int = 0, group_by: GroupBy | None = None) -> list[Sample]:
    """Return the same number of samples of every class, from as many groups as possible.

    A class with fewer samples gives all it has, which is logged.
    """
    if shots < 1:
        raise DataError(f"shots is the number of training images of a class, at least 1; got {shots}")
    by_class: dict[str, list[tuple[int, int, Sample]]] = defaultdict(list)
    for at, members in enumerate(_groups(samples, seed, group_by)):
        taken: Counter[str] = Counter()
        for sample in members:
            by_class[sample.label].append((taken[sample.label], at, sample))
            taken[sample.label] += 1
    short = sorted(label for label, found in by_class.items() if len(found) < shots)
    if short:
        logger.warning("fewer than %d training images of %s; all of them are used", shots, ", ".join(short))
    chosen = [sample for found in by_class.values() for _, _, sample in sorted(found, key=lambda f: f[:2])[:shots]]
    return sorted(chosen, key=lambda sample: sample.path)


def group_names(samples: Sequence[Sample], group_by: GroupBy) -> list[str]:
    """Return the group of each sample: what the regular expression matches in the file name, or the function's answer.

    The name is without folder and ending; a first bracket in the expression, if any, is the group. Frames of one
    track named track_frame.jpg share the group "^[^_]+". Groups span classes and domains. Raises DataError for a
    name that the expression does not match.
    """
    stems = [Path(sample.path).stem for sample in samples]
    if callable(group_by):
        return [group_by(stem) for stem in stems]
    pattern = compile_pattern(group_by, "group_by")
    found = [pattern.search(stem) for stem in stems]
    for stem, match in zip(stems, found, strict=True):
        if match is None or not match.group(pattern.groups and 1):
            raise DataError(f"group_by {group_by!r} matches nothing in the file name {stem!r}")
    return [match.group(pattern.groups and 1) for match in found if match]


def _groups(samples: Sequence[Sample], seed: int, group_by: GroupBy | None) -> list[list[Sample]]:
    """Return the groups in random order, and their members in random order, both fixed by the seed."""
    # a hash of the name instead of a shuffle: the order survives another listing order, another root and, mostly,
    # a few files more
    names = group_names(samples, group_by) if group_by else [_key(sample) for sample in samples]
    groups: dict[str, list[Sample]] = defaultdict(list)
    for name, sample in zip(names, samples, strict=True):
        groups[name].append(sample)
    for members in groups.values():
        members.sort(key=lambda sample: (_rank(seed, _key(sample)), sample.path))
    return [groups[name] for name in sorted(groups, key=lambda name: _rank(seed, name))]


def _key(sample: Sample) -> str:
    return f"{sample.domain}/{sample.label}/{Path(sample.path).name}"


def _rank(seed: int, name: str) -> bytes:
    return blake2b(f"{seed}/{name}".encode(errors="surrogateescape"), digest_size=16).digest()


def _neediest(need: list[dict[str, float]], counts: Counter[str], fractions: Sequence[float]) -> int:
    scores = [sum(n * part[label] for label, n in counts.items()) for part in need]
    return max((part for part, share in enumerate(fractions) if share > 0), key=lambda part: scores[part])


def _check_parts(parts: list[list[Sample]], fractions: Sequence[float]) -> None:
    labels = {sample.label for part in parts for sample in part}
    for part, share in zip(parts, fractions, strict=True):
        if share > 0 and not part:
            raise DataError(f"a part of {share:g} of the samples would be empty: too few images or groups")
        lacking = sorted(labels - {sample.label for sample in part})
        if share > 0 and lacking:
            logger.warning("no image of %s in a part of %g of the samples", ", ".join(lacking), share)
