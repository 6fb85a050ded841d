"""Dividing examples into training, validation and named test parts without letting a text or its group be in two."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from visionlora.config import did_you_mean
from visionlora.data.folders import Sample
from visionlora.data.parts import SOURCE, TARGET, Division
from visionlora.data.splits import few_shot, stratified_split
from visionlora.errors import DataError
from visionlora.text.columns import Example
from visionlora.text.labels import labels_of

__all__ = ["TextParts", "content_key", "divide"]

logger = logging.getLogger(__name__)

INPUTS = ("text", "text_pair", "tokens", "context", "prompt", "messages", "source")


@dataclass(frozen=True)
class TextParts:
    """A divided data set."""

    train: list[Example]
    val: list[Example]
    tests: dict[str, list[Example]]
    """Test parts by name: TARGET first, then single domains, SOURCE last if there is one."""


def divide(examples: Sequence[Example], division: Division, *, source: Sequence[Example] | None = None) -> TextParts:
    """Return the parts of a data set, by the rules of visionlora.data.parts.divide.

    Examples with the same input stay together, and so do those with the same group; questions about one context are
    a group of their own. Raises DataError: unknown domains, a domain both trained and tested, nothing to train on.
    """
    domains = _domains(examples, division)
    train, val, target = _target(examples, division, domains)
    tests = {**({TARGET: target} if target else {}), **_single_domains(examples, division, domains)}
    known = {e.domain for e in (examples if source is None else source) if e.domain is not None}
    _check_known("source_domains", division.source_domains, known)
    if division.source_domains is not None:
        tests[SOURCE] = _of_domains(examples if source is None else source, division.source_domains)
    elif source is not None:
        tests[SOURCE] = _of_domains(source, sorted({e.domain for e in source}, key=str))
    trained = {id(example) for example in train}
    for name, part in tests.items():
        if any(id(example) in trained for example in part):
            raise DataError(f"examples of the {name} part are trained on; name other domains")
    if division.shots is not None:
        keyed = _samples(train)
        chosen = few_shot([s for s, _ in keyed], division.shots, seed=division.split_seed, group_by=_group)
        train = _examples(keyed, chosen)
    return TextParts(train, val, tests)


def content_key(example: Example) -> bytes:
    """Return a hash of what an example asks, whatever its answer, its case and its spaces."""
    fields = example.fields
    asked = [name for name in sorted(fields) if name in INPUTS] or sorted(fields)
    plain = [" ".join(str(fields[name]).lower().split()) for name in asked]
    return blake2b("\n".join(plain).encode(), digest_size=12).digest()


def _samples(examples: Sequence[Example]) -> list[tuple[Sample, Example]]:
    """Return the examples as the samples that visionlora.data.splits divides: named group.content-number."""
    seen: Counter[bytes] = Counter()
    found = []
    for example in examples:
        key = content_key(example)
        group = key if example.group is None else blake2b(example.group.encode(), digest_size=12).digest()
        labels = labels_of(example) if "label" in example.fields and not _numeric(example) else []
        name = f"{group.hex()}.{key.hex()}-{seen[key]}"
        seen[key] += 1
        found.append((Sample(name, "+".join(labels), example.domain), example))
    return found


def _numeric(example: Example) -> bool:
    return isinstance(example.fields["label"], float)


def _group(stem: str) -> str:
    return stem


def _examples(keyed: Iterable[tuple[Sample, Example]], chosen: Iterable[Sample]) -> list[Example]:
    """Return the chosen examples in the order of the files."""
    names = {sample.path for sample in chosen}
    return [example for sample, example in keyed if sample.path in names]


def _domains(examples: Sequence[Example], division: Division) -> list[str | None]:
    """Return the domains to train on, after checking every domain that is named."""
    known = {example.domain for example in examples if example.domain is not None}
    for field in ("train_domains", "test_domains"):
        _check_known(field, getattr(division, field), known)
    if division.train_domains is not None:
        return list(division.train_domains)
    held = {*(division.test_domains or ()), *(division.source_domains or ())}
    free: list[str | None] = [*sorted(known - held)]
    return free + [None] * any(example.domain is None for example in examples)


def _check_known(field: str, names: Sequence[str] | None, known: Iterable[str]) -> None:
    have = sorted(known)
    for name in names or ():
        if name not in have:
            told = f"it has {', '.join(have)}" if have else "it has none: expected a column domain, or <domain>/<file>"
            raise DataError(f"{field}: the data set has no domain {name!r}{did_you_mean(name, have)}; {told}")


def _target(
    examples: Sequence[Example], division: Division, domains: list[str | None]
) -> tuple[list[Example], list[Example], list[Example]]:
    """Return the training, validation and target test examples, shots not yet chosen."""
    own = [example for example in examples if example.domain in domains]
    pool = [example for example in own if example.split in (None, "train")]
    if not pool:
        raise DataError(f"no training examples{f' in the domains {domains}' if any(domains) else ''}{_named_only(own)}")
    val, test = _of_split(own, "val"), _of_split(own, "test")
    if division.test_domains is not None:
        test = _of_domains(examples, division.test_domains)
    named = any(example.split is not None for example in own)
    test_share = 0.0 if test or named else division.test_fraction
    val_share = 0.0 if val else division.val_fraction
    train, more_val, more_test = _split(pool, [1 - val_share - test_share, val_share, test_share], division)
    val, test = val or more_val, test or more_test
    if val and not test:
        logger.warning("no test examples: the target test is the validation part, which also chooses the best adapter")
    return train, val, test or val


def _named_only(examples: Sequence[Example]) -> str:
    counts = Counter(str(example.split) for example in examples)
    told = ", ".join(f"{split}: {counts[split]}" for split in ("val", "test") if counts[split])
    cure = "give one file as root, which is then divided, or another with val_root and test_root"
    return f": the files name {told} alone; {cure}" if told else ""


def _split(pool: Sequence[Example], shares: list[float], division: Division) -> list[list[Example]]:
    if shares[0] == 1:
        return [list(pool), [], []]
    keyed = _samples(pool)
    try:
        parts = stratified_split([s for s, _ in keyed], shares, seed=division.split_seed, group_by=_group)
    except DataError:
        told = f"{len(pool)} examples in {len({s.path.partition('.')[0] for s, _ in keyed})} groups"
        raise DataError(
            f"{told} cannot be divided into shares of {shares}: give more, or val_root and test_root"
        ) from None
    return [_examples(keyed, part) for part in parts]


def _single_domains(
    examples: Sequence[Example], division: Division, domains: list[str | None]
) -> dict[str, list[Example]]:
    if division.test_domains is not None:
        names = list(division.test_domains) if len(division.test_domains) > 1 else []
    else:
        taken = {*domains, *(division.source_domains or ())}
        names = sorted({e.domain for e in examples if e.domain is not None and e.domain not in taken})
    return {f"domain {name}" if name in (TARGET, SOURCE) else name: _of_domains(examples, [name]) for name in names}


def _of_split(examples: Iterable[Example], split: str) -> list[Example]:
    return [example for example in examples if example.split == split]


def _of_domains(examples: Iterable[Example], domains: Sequence[str | None]) -> list[Example]:
    """Return the test examples of some domains: of each its test split, else its validation split, else all."""
    found: list[Example] = []
    for domain in domains:
        own = [example for example in examples if example.domain == domain]
        found += _of_split(own, "test") or _of_split(own, "val") or own
    return found
