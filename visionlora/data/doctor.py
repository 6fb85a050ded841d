"""Examination of a data set before training: every file is read once, every fault becomes a finding."""

from __future__ import annotations

import os
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from os import PathLike
from pathlib import Path
from typing import Literal

from visionlora.config import did_you_mean
from visionlora.data.folders import Layout, Sample, scan_csv, scan_tree
from visionlora.data.images import Header, inspect_image
from visionlora.errors import DataError, ImageError

__all__ = ["Finding", "Report", "Severity", "examine", "examine_csv", "examine_tree", "render"]

Severity = Literal["error", "warning", "info"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
FEW = 10
"""Training images below which a class is called small."""
IMBALANCE = 10.0
"""Largest over smallest class from which the classes are called unbalanced."""
NARROW = 16
"""Pixels of the short side below which an image is called tiny."""
SUFFIXES = {"JPEG": "jpg jpeg jpe jfif", "TIFF": "tif tiff", "PPM": "ppm pgm pbm pnm", "MPO": "jpg jpeg mpo"}


@dataclass(frozen=True)
class Finding:
    """One thing worth knowing about a data set. An error stops or falsifies a training run."""

    severity: Severity
    code: str
    message: str
    path: str | None = None


@dataclass(frozen=True)
class Report:
    """What an examination found, errors first."""

    images: int
    findings: list[Finding]

    def count(self, severity: Severity) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self.findings)


def examine_tree(
    root: str | PathLike[str],
    *,
    layout: Layout = "auto",
    classes: Sequence[str] | None = None,
    threads: int | None = None,
) -> Report:
    """Return the report on a folder tree; a tree that cannot be read gives findings, not an exception."""
    try:
        scan = scan_tree(root, layout=layout)
    except DataError as e:
        return Report(0, [Finding("error", "layout", str(e), str(root))])
    faults = [Finding("error", "layout", problem) for problem in scan.problems]
    empty = [folder for folder in scan.empty if Path(folder).name not in (classes or ())]
    faults += [Finding("error", "empty-class", f"{name}: no image in this class folder", name) for name in empty]
    report = examine(scan.samples, classes=classes, threads=threads) if scan.samples else Report(0, [])
    return _sorted(report.images, faults + report.findings)


def examine_csv(
    path: str | PathLike[str], *, classes: Sequence[str] | None = None, threads: int | None = None
) -> Report:
    """Return the report on the images a CSV lists; rows that stand for none give findings, not an exception."""
    try:
        scan = scan_csv(path)
    except DataError as e:
        return Report(0, [Finding("error", "layout", str(e), str(path))])
    faults = [Finding("error", "layout", problem) for problem in scan.problems]
    report = examine(scan.samples, classes=classes, threads=threads) if scan.samples else Report(0, [])
    return _sorted(report.images, faults + report.findings)


def examine(samples: Sequence[Sample], *, classes: Sequence[str] | None = None, threads: int | None = None) -> Report:
    """Return the report on labelled images. Every file is decoded, so the time is that of one epoch without resizing.

    Duplicates are images with equal pixels, whatever their format or name.
    """
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        seen = list(pool.map(_look, samples))
    findings = [found for one in seen for found in _of_one(one)]
    findings += [*_duplicates(seen), *_classes(samples, classes), *_balance(samples), *_summary(seen)]
    return _sorted(len(samples), findings)


def render(report: Report, *, most: int = 10, width: int = 120) -> str:
    """Return the report as plain text: one line a finding, at most a number of lines a kind, then the counts."""
    lines: list[str] = []
    shown: Counter[tuple[str, str]] = Counter((f.severity, f.code) for f in report.findings)
    printed: Counter[tuple[str, str]] = Counter()
    for finding in report.findings:
        kind = (finding.severity, finding.code)
        printed[kind] += 1
        if printed[kind] <= most:
            lines += _wrapped(finding, finding.message, width)
        if printed[kind] == shown[kind] > most:
            lines += _wrapped(finding, f"... and {shown[kind] - most} more", width)
    counts = ", ".join(f"{report.count(s)} {s}{'s' * (report.count(s) != 1)}" for s in ("error", "warning"))
    return "\n".join([*lines, f"{report.images} images examined: {counts}"])


@dataclass(frozen=True)
class _Seen:
    sample: Sample
    header: Header | None
    digest: bytes
    fault: str


def _look(sample: Sample) -> _Seen:
    try:
        header, image = inspect_image(sample.path)
    except ImageError as e:
        return _Seen(sample, None, b"", str(e))
    digest = blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16).digest()
    return _Seen(sample, header, digest, "")


def _of_one(seen: _Seen) -> Iterator[Finding]:
    path = seen.sample.path
    if seen.header is None:
        empty = Path(path).is_file() and Path(path).stat().st_size == 0
        yield Finding("error", "empty" if empty else "unreadable", seen.fault, path)
        return
    if seen.header.frames > 1:
        yield Finding("warning", "animated", f"{path}: {seen.header.frames} frames, the first one is used", path)
    if min(seen.header.size) < NARROW:
        yield Finding("warning", "tiny", f"{path}: {_size(seen.header.size)} pixels", path)


def _duplicates(seen: Iterable[_Seen]) -> Iterator[Finding]:
    same: dict[bytes, list[Sample]] = defaultdict(list)
    for one in seen:
        if one.header is not None:
            same[one.digest].append(one.sample)
    for samples in same.values():
        if len(samples) > 1:
            yield _judged(samples)


def _judged(samples: list[Sample]) -> Finding:
    """Return the finding on images with equal pixels: the worst thing true of them."""
    paths = " = ".join(sample.path for sample in samples[:4]) + (" = ..." if len(samples) > 4 else "")
    labels, splits, domains = (
        sorted({str(part) for part in parts}) for parts in zip(*map(_parts, samples), strict=True)
    )
    if len(labels) > 1:
        return Finding("error", "two-labels", f"the same picture as {' and '.join(labels)}: {paths}", samples[0].path)
    if len(splits) > 1:
        return Finding("error", "leak", f"the same picture in {' and '.join(splits)}: {paths}", samples[0].path)
    where = f" in {' and '.join(domains)}" if len(domains) > 1 else ""
    return Finding("warning", "duplicate", f"the same picture{where}: {paths}", samples[0].path)


def _parts(sample: Sample) -> tuple[str, str | None, str | None]:
    return sample.label, sample.split, sample.domain


def _classes(samples: Sequence[Sample], classes: Sequence[str] | None) -> Iterator[Finding]:
    trained = {sample.label for sample in _training(samples)}
    known = set(classes) if classes is not None else trained
    if len(known) < 2:
        yield Finding("error", "one-class", f"a classifier needs two classes or more, got {sorted(known)}")
    for name in sorted({sample.label for sample in samples} - known):
        where = "the given classes" if classes is not None else "the training part"
        yield Finding("error", "class-mismatch", f"class {name!r} is not in {where}{did_you_mean(name, sorted(known))}")
    for part, labels in _labels_by_part(samples).items():
        lacking = sorted(known - labels)
        if lacking:
            yield Finding("warning", "class-missing", f"{part} has no image of {', '.join(lacking)}")


def _training(samples: Iterable[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.split in (None, "train")]


def _labels_by_part(samples: Iterable[Sample]) -> dict[str, set[str]]:
    parts: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        parts["/".join(part for part in (sample.domain, sample.split) if part) or "the data set"].add(sample.label)
    return parts


def _balance(samples: Sequence[Sample]) -> Iterator[Finding]:
    counts = Counter(sample.label for sample in _training(samples))
    small = sorted(name for name, n in counts.items() if n < FEW)
    if small:
        told = ", ".join(f"{name} ({counts[name]})" for name in small)
        yield Finding("warning", "small-class", f"fewer than {FEW} training images: {told}")
    if not counts:
        return
    (large, most), (least, fewest) = counts.most_common()[0], counts.most_common()[-1]
    severity: Severity = "warning" if most >= IMBALANCE * fewest else "info"
    told = f"{len(counts)} classes; the largest, {large} ({most}), is {most / fewest:.1f} times {least} ({fewest})"
    yield Finding(severity, "balance", told)


def _summary(seen: Sequence[_Seen]) -> Iterator[Finding]:
    readable = [(one.sample.path, one.header) for one in seen if one.header is not None]
    if not readable:
        return
    headers = [header for _, header in readable]
    sizes = sorted((header.size for header in headers), key=lambda size: size[0] * size[1])
    yield Finding(
        "info", "format", f"formats {_counted(h.format for h in headers)}; modes {_counted(h.mode for h in headers)}"
    )
    yield Finding(
        "info", "size", f"{_size(sizes[0])} to {_size(sizes[-1])} pixels, median {_size(sizes[len(sizes) // 2])}"
    )
    turned = sum(header.orientation != 1 for header in headers)
    if turned:
        yield Finding("info", "rotated", f"{turned} images carry an EXIF orientation, which is applied")
    renamed = [path for path, header in readable if not _name_fits(path, header)]
    if renamed:
        yield Finding("info", "misnamed", f"{len(renamed)} names do not fit their content, such as {renamed[0]}")


def _name_fits(path: str, header: Header) -> bool:
    suffix = Path(path).suffix.lower().removeprefix(".")
    return suffix in SUFFIXES.get(header.format, header.format.lower()).split()


def _counted(values: Iterable[str]) -> str:
    return ", ".join(f"{value} ({n})" for value, n in Counter(values).most_common())


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"


def _sorted(images: int, findings: Iterable[Finding]) -> Report:
    return Report(images, sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.code)))


def _wrapped(finding: Finding, text: str, width: int) -> list[str]:
    head = f"{finding.severity:<8} {finding.code:<15} "
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head), break_on_hyphens=False)
