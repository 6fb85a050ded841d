"""Examination of a text data set before training: every row is read once, every fault becomes a finding."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from visionlora.config import did_you_mean
from visionlora.data.doctor import FEW, IMBALANCE, SEVERITIES, Finding, Report, Severity, render
from visionlora.errors import DataError
from visionlora.text.columns import Example, TaskType, example_of, form_of
from visionlora.text.labels import labels_of
from visionlora.text.layout import numbers
from visionlora.text.near import near_pairs
from visionlora.text.parts import INPUTS, content_key
from visionlora.text.prompts import columns_of
from visionlora.text.reading import Row, read_rows

__all__ = ["examine_rows", "examine_text", "render_text"]

MOJIBAKE = re.compile("\N{REPLACEMENT CHARACTER}|\u00c3[\u0080-\u00bf]|\u00e2\u20ac|\u00c2[\u00a0-\u00bf]")
"""What UTF-8 looks like after it was read as something else."""
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
LEAK = "the same text in"


def examine_text(source: str | Path, task: TaskType, **options: Any) -> Report:
    """Return the report on a file, a folder or a data set's name; what cannot be read is a finding, not an exception.

    Options are those of examine_rows, and subset, header and documents of read_rows.
    """
    reading = {key: options.pop(key) for key in ("subset", "header", "documents") if key in options}
    try:
        rows = read_rows(source, **reading)
    except DataError as e:
        code = "encoding" if "UTF-8" in str(e) else "layout"
        return Report(0, [Finding("error", code, str(e), str(source))])
    return examine_rows(rows, task, **options)


def examine_rows(
    rows: Sequence[Row],
    task: TaskType,
    *,
    columns: Mapping[str, str] | None = None,
    classes: Sequence[str] | None = None,
    template: str | None = None,
    tokenizer: Any = None,
    max_length: int = 512,
) -> Report:
    """Return the report on rows. A tokenizer counts tokens beside max_length; without one words are counted."""
    named = columns or {}
    try:
        form = form_of(task, rows, named, template=columns_of(template))
    except DataError as e:
        return Report(len(rows), [Finding("error", "columns", str(e))])
    examples, findings = [], []
    for row in rows:
        try:
            examples.append(example_of(row, form, named))
        except DataError as e:
            findings.append(Finding("error", "empty" if "is empty" in str(e) else "bad-row", str(e), row.place))
    findings += [*_characters(examples, tokenizer), *_duplicates(examples), *_near(examples), *_tags(examples)]
    if task in ("SEQ_CLS", "TOKEN_CLS") and not any(isinstance(e.fields.get("label"), float) for e in examples):
        findings += [*_labels(examples, classes), *_balance(examples)]
    findings += [*_lengths(examples, tokenizer, max_length), *_summary(examples, task)]
    return Report(len(rows), sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), f.code)))


def render_text(report: Report, *, most: int = 10) -> str:
    """Return the report as plain text: one line a finding, then the counts."""
    head, _, last = render(report, most=most).rpartition("\n")
    return "\n".join([*([head] if head else []), last.replace("images examined", "examples examined")])


def _characters(examples: Sequence[Example], tokenizer: Any) -> Iterator[Finding]:
    special = [token for token in tokenizer.all_special_tokens if len(token) > 2] if tokenizer is not None else []
    for example in examples:
        text = _text(example)
        if found := MOJIBAKE.search(text):
            at = text[max(0, found.start() - 10) : found.end() + 10]
            yield Finding(
                "warning", "encoding", f"{example.place}: text in a wrong encoding, near {at!r}", example.place
            )
        if CONTROL.search(text):
            yield Finding("warning", "control", f"{example.place}: holds control characters", example.place)
        for token in special:
            if token in text:
                told = f"{example.place}: holds {token}, which the tokenizer takes for its own mark"
                yield Finding("warning", "special", told, example.place)


def _duplicates(examples: Sequence[Example]) -> Iterator[Finding]:
    same: dict[tuple[bytes, str], list[Example]] = defaultdict(list)
    for example in examples:
        same[content_key(example), " ".join(str(example.fields.get("question", "")).lower().split())].append(example)
    for group in same.values():
        if len(group) < 2:
            continue
        places = " = ".join(e.place for e in group[:4]) + (" = ..." if len(group) > 4 else "")
        answers = sorted({str(_answer(e)) for e in group})
        splits = sorted({e.split or "" for e in group})
        if len(splits) > 1:
            told = f"{LEAK} {' and '.join(s or 'no split' for s in splits)}: {places}"
            yield Finding("error", "leak", told, group[0].place)
        elif len(answers) > 1 and "label" in group[0].fields:
            yield Finding(
                "error", "two-labels", f"the same text as {' and '.join(answers[:4])}: {places}", group[0].place
            )
        else:
            yield Finding("warning", "duplicate", f"the same text: {places}", group[0].place)


def _near(examples: Sequence[Example]) -> Iterator[Finding]:
    known = [e for e in examples if e.split in (None, "train")]
    held = [e for e in examples if e.split in ("val", "test")]
    keys = {content_key(e) for e in known}
    held = [e for e in held if content_key(e) not in keys]
    for at, twin, share in near_pairs([_text(e) for e in known], [_text(e) for e in held]):
        told = f"{held[twin].place} ({held[twin].split}) is {share:.0%} the text of {known[at].place} (training)"
        yield Finding("warning", "near-leak", told, held[twin].place)


def _tags(examples: Sequence[Example]) -> Iterator[Finding]:
    """Yield where an entity goes on that never began, in tags of the form B-, I-."""
    for example in examples:
        before = "O"
        for tag in example.fields.get("tags", ()):
            if tag.startswith("I-") and before[2:] != tag[2:]:
                yield Finding("warning", "tags", f"{example.place}: {tag} follows {before}", example.place)
                break
            before = tag


def _labels(examples: Sequence[Example], classes: Sequence[str] | None) -> Iterator[Finding]:
    by_part: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        by_part[example.split or "train"].update(labels_of(example))
    known = set(classes) if classes is not None else set(by_part.get("train", ()))
    if len(known) < 2:
        yield Finding("error", "one-class", f"a classifier needs two labels or more, got {sorted(known)}")
    where = "the given classes" if classes is not None else "the training part"
    for part, counts in by_part.items():
        for name in sorted(set(counts) - known):
            near = did_you_mean(name, sorted(known))
            yield Finding("error", "class-mismatch", f"label {name!r} of the {part} part is not in {where}{near}")
        lacking = sorted(known - set(counts))
        if lacking:
            yield Finding("warning", "class-missing", f"the {part} part has no example of {', '.join(lacking[:10])}")


def _balance(examples: Sequence[Example]) -> Iterator[Finding]:
    counts = Counter(label for e in examples if e.split in (None, "train") for label in labels_of(e))
    if not counts:
        return
    small = sorted(name for name, n in counts.items() if n < FEW)
    if small:
        told = ", ".join(f"{name} ({counts[name]})" for name in small[:10])
        yield Finding("warning", "small-class", f"fewer than {FEW} in training: {told}")
    (large, most), (least, fewest) = counts.most_common()[0], counts.most_common()[-1]
    severity: Severity = "warning" if most >= IMBALANCE * fewest else "info"
    told = f"{len(counts)} labels; the largest, {large} ({most}), is {most / fewest:.1f} times {least} ({fewest})"
    yield Finding(severity, "balance", told)


def _lengths(examples: Sequence[Example], tokenizer: Any, max_length: int) -> Iterator[Finding]:
    if not examples:
        return
    texts = [_text(e) for e in examples]
    if tokenizer is None:
        words = sorted(len(text.split()) for text in texts)
        yield Finding("info", "length", f"{words[0]} to {words[-1]} words, median {median(words):g}")
        return
    sizes = [
        len(ids) for at in range(0, len(texts), 1000) for ids in numbers(tokenizer, texts[at : at + 1000])["input_ids"]
    ]
    long = sum(size > max_length for size in sizes)
    told = f"{min(sizes)} to {max(sizes)} tokens, median {median(sizes):g}"
    yield Finding("info", "length", told)
    if long:
        lost = sum(max(0, size - max_length) for size in sizes)
        told = (
            f"{long} of {len(sizes)} are longer than max_length {max_length}, by {lost / sum(sizes):.1%} of all tokens"
        )
        yield Finding("warning", "over-long", told)


def _summary(examples: Sequence[Example], task: str) -> Iterator[Finding]:
    parts = Counter("/".join(part for part in (e.domain, e.split) if part) or "no split named" for e in examples)
    yield Finding("info", "parts", ", ".join(f"{name} ({n})" for name, n in sorted(parts.items())) or "nothing")
    if task == "QUESTION_ANS" and examples:
        none = sum(not e.fields["answers"]["text"] for e in examples)
        yield Finding("info", "unanswerable", f"{none} of {len(examples)} questions have no answer")


def _text(example: Example) -> str:
    """Return what the model reads of an example, in one piece."""
    fields = example.fields
    shown: Iterable[Any] = [fields[name] for name in ("question", *INPUTS) if name in fields]
    shown = shown or [value for name, value in fields.items() if name not in ("response", "target")]
    return "\n".join(value if isinstance(value, str) else _joined(value) for value in shown)


def _joined(value: Any) -> str:
    return " ".join(part if isinstance(part, str) else str(part["content"]) for part in value)


def _answer(example: Example) -> Any:
    return next(
        (example.fields[n] for n in ("label", "tags", "answers", "response", "target") if n in example.fields), ""
    )
