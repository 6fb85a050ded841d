"""Dividing a data set into training, validation and named test parts, with one list of classes for all."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from visionlora.config import did_you_mean
from visionlora.data.classes import check_labels, class_list
from visionlora.data.folders import Sample
from visionlora.data.splits import GroupBy, few_shot, stratified_split
from visionlora.errors import ConfigError, DataError

__all__ = ["SOURCE", "TARGET", "Division", "Parts", "divide"]

logger = logging.getLogger(__name__)

TARGET, SOURCE = "target", "source"


@dataclass(frozen=True)
class Division:
    """How a data set is divided; what the files say by split folders or columns comes first."""

    train_domains: Sequence[str] | None = None
    """Domains to train on; None takes all that are neither tested nor the source."""
    test_domains: Sequence[str] | None = None
    """Domains that measure the target; None holds images of the training domains out, and tests each other domain."""
    source_domains: Sequence[str] | None = None
    """Domains of the base's own training, whose images measure forgetting."""
    val_fraction: float = 0.1
    """Share held out for validation where the files name no validation part."""
    test_fraction: float = 0.2
    """Share held out as target test, where the files name no split at all and test_domains is None."""
    split_seed: int = 0
    group_by: GroupBy | None = None
    """What keeps near-duplicates together, such as frames of one track (see group_names)."""
    shots: int | None = None
    """Training images of each class; None takes all."""


@dataclass(frozen=True)
class Parts:
    """A divided data set."""

    class_names: list[str]
    train: list[Sample]
    val: list[Sample]
    tests: dict[str, list[Sample]]
    """Test parts by name: TARGET first, then single domains, SOURCE last if there is one."""


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise ConfigError unless the shares held out leave something to train on."""
    for name, share in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
        if not 0 <= share < 1:
            raise ConfigError(f"{name} must be at least 0 and below 1, got {share}")
    if val_fraction + test_fraction >= 1:
        raise ConfigError(
            f"val_fraction {val_fraction} and test_fraction {test_fraction} leave nothing to train on: together they "
            "must be below 1"
        )


def divide(
    samples: Sequence[Sample],
    division: Division = Division(),
    *,
    source: Sequence[Sample] | None = None,
    classes: Sequence[str] | None = None,
) -> Parts:
    """Return the parts of a data set.

    source gives the images that measure forgetting where they lie in another data set. Where the files name a split,
    nothing of their test part is trained on, and a missing test part is replaced by the validation part (logged).
    A domain's test images are its test split, else its validation split, else all of it. Raises DataError: unknown
    domains, a domain both trained and tested, class names that the training part does not have.
    """
    domains = _domains(samples, division)
    train, val, target = _target(samples, division, domains)
    names = class_list(train, classes=classes)
    tests = {**({TARGET: target} if target else {}), **_single_domains(samples, division, domains)}
    forgotten = _source(samples, source, division.source_domains)
    if forgotten:
        tests[SOURCE] = forgotten
    for where, part in {"validation": val, **{f"test {name}": part for name, part in tests.items()}}.items():
        _check_classes(where, part, names)
    _check_disjoint(train, {"validation": val, **tests})
    if division.shots is not None:
        train = few_shot(train, division.shots, seed=division.split_seed, group_by=division.group_by)
    return Parts(names, train, val, tests)


def _domains(samples: Sequence[Sample], division: Division) -> list[str | None]:
    """Return the domains to train on, after checking every domain that is named."""
    known = sorted({sample.domain for sample in samples if sample.domain is not None})
    for field in ("train_domains", "test_domains"):
        _check_known(field, getattr(division, field), known)
    if division.train_domains is not None:
        return list(division.train_domains)
    held = {*(division.test_domains or ()), *(division.source_domains or ())}
    free: list[str | None] = [*(name for name in known if name not in held)]
    if any(sample.domain is None for sample in samples):
        free.append(None)
    if len(free) > 1:
        logger.info("training on the domains %s", ", ".join(map(str, free)))
    return free


def _check_known(field: str, names: Sequence[str] | None, known: list[str]) -> None:
    for name in names or ():
        if name not in known:
            have = f"it has {', '.join(known)}" if known else "it has none: expected <domain>/<class>/<image>"
            raise DataError(f"{field}: the data set has no domain {name!r}{did_you_mean(name, known)}; {have}")


def _target(
    samples: Sequence[Sample], division: Division, domains: list[str | None]
) -> tuple[list[Sample], list[Sample], list[Sample]]:
    """Return the training, validation and target test samples, shots not yet chosen."""
    own = [sample for sample in samples if sample.domain in domains]
    pool = [sample for sample in own if sample.split in (None, "train")]
    if not pool:
        raise DataError(f"no training images{f' in the domains {domains}' if domains else ''}")
    val, test = (sorted(_of_split(own, split), key=lambda s: s.path) for split in ("val", "test"))
    if division.test_domains is not None:
        test = _of_domains(samples, division.test_domains)
    named = any(sample.split is not None for sample in own)
    test_share = 0.0 if test or named else division.test_fraction
    val_share = 0.0 if val else division.val_fraction
    train, more_val, more_test = stratified_split(
        pool, [1 - val_share - test_share, val_share, test_share], seed=division.split_seed, group_by=division.group_by
    )
    val, test = val or more_val, test or more_test
    if val and not test:
        logger.warning("no test images: the target test is the validation part, which also chooses the best adapter")
    return train, val, test or val


def _single_domains(
    samples: Sequence[Sample], division: Division, domains: list[str | None]
) -> dict[str, list[Sample]]:
    if division.test_domains is not None:
        names = list(division.test_domains) if len(division.test_domains) > 1 else []
    else:
        taken = {*domains, *(division.source_domains or ())}
        names = sorted({s.domain for s in samples if s.domain is not None and s.domain not in taken})
    taken_names = (TARGET, SOURCE)
    return {f"domain {name}" if name in taken_names else name: _of_domains(samples, [name]) for name in names}


def _source(samples: Sequence[Sample], source: Sequence[Sample] | None, domains: Sequence[str] | None) -> list[Sample]:
    own = samples if source is None else source
    _check_known("source_domains", domains, sorted({s.domain for s in own if s.domain is not None}))
    if domains is not None:
        return _of_domains(own, domains)
    return [] if source is None else _of_domains(own, sorted({s.domain for s in own}, key=str))


def _of_split(samples: Iterable[Sample], split: str) -> list[Sample]:
    return [sample for sample in samples if sample.split == split]


def _of_domains(samples: Iterable[Sample], domains: Sequence[str | None]) -> list[Sample]:
    """Return the test images of some domains: of each its test split, else its validation split, else all."""
    found: list[Sample] = []
    for domain in domains:
        own = sorted((sample for sample in samples if sample.domain == domain), key=lambda sample: sample.path)
        found += _of_split(own, "test") or _of_split(own, "val") or own
    return found


def _check_classes(where: str, part: Sequence[Sample], names: Sequence[str]) -> None:
    counts = Counter(sample.label for sample in part)
    check_labels(counts, names, where=f"the {where} images")
    lacking = [name for name in names if name not in counts]
    if part and lacking:
        logger.warning("no %s image of %s", where, ", ".join(lacking))


def _check_disjoint(train: Sequence[Sample], held: dict[str, list[Sample]]) -> None:
    trained = set(_places(train))
    for name, part in held.items():
        both = [sample.path for sample, place in zip(part, _places(part), strict=True) if place in trained]
        if both:
            raise DataError(
                f"{len(both)} images are trained on and in the {name} part, such as {both[0]}; name other domains"
            )


def _places(samples: Sequence[Sample]) -> list[Path]:
    """Return the resolved paths; folders once, since a data set has few of them."""
    paths = [Path(sample.path) for sample in samples]
    folders = {folder: folder.resolve() for folder in {path.parent for path in paths}}
    return [folders[path.parent] / path.name for path in paths]
