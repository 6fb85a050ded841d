"""Whether adapter files can become one: the same base, the same input, and classes that mean the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from visionlora.compose.values import source_of
from visionlora.errors import BaseMismatchError, ConfigError, VisionLoRAError
from visionlora.io import AdapterFile
from visionlora.io.base import base_text
from visionlora.registry import check_new_name

Files = Mapping[str, AdapterFile]


def labelled(paths: Sequence[Path], files: Sequence[AdapterFile], *, taken: str) -> dict[str, AdapterFile]:
    """Return the files by names to call them by: as recorded, else as their folders, else numbered."""
    recorded = [file.record["name"] for file in files]
    folders = [path.parent.name if path.name == "adapter" else path.name for path in map(Path.absolute, paths)]
    numbered = [f"adapter-{i}" for i in range(1, len(files) + 1)]
    for names in (recorded, folders, numbered):
        if len(set(names)) == len(names) and taken not in names and all(map(_is_name, names)):
            return dict(zip(names, files, strict=True))
    raise ConfigError(f"choose another name for the result than {taken!r}")


def check_bases(files: Files) -> None:
    """Raise BaseMismatchError unless all adapters were trained on one base, as far as it is recorded."""
    known = {name: file.record["base"] for name, file in files.items() if file.record["base"]["fingerprint"]}
    for name, base in known.items():
        first = next(iter(known))
        if base["fingerprint"] != known[first]["fingerprint"]:
            raise BaseMismatchError(
                f"{first} was trained on {base_text(known[first])}, {name} on {base_text(base)}; only adapters of one "
                "base can be combined"
            )


def merged_classes(files: Files, head: str) -> list[str] | None:
    """Return the class names of the result. Raises ConfigError where heads to be averaged mean other classes."""
    source = source_of(head, list(files), "head")
    if source is not None and source in files:
        return list(files[source].record["classes"] or ()) or None
    known = {name: file.record["classes"] for name, file in files.items() if file.record["classes"] is not None}
    if source == "base" and any(map(_owns_head, files.values())):
        return None
    first = next(iter(known), None)
    for name, classes in known.items():
        if first is not None and classes != known[first]:
            raise ConfigError(
                f"{first} and {name} know other classes ({_difference(known[first], classes)}), so their heads have no "
                f"average; take one over with --head {first} or --head {name}, or leave them away with --head base"
            )
    return None if first is None else known[first]


def merged_input(files: Files) -> dict[str, Any] | None:
    """Return what images go through, the same for all adapters. Raises ConfigError where it is not."""
    known = {name: file.record["data"] for name, file in files.items() if file.record["data"] is not None}
    first = next(iter(known), None)
    for name, data in known.items():
        other = [key for key, value in data.items() if first is not None and value != known[first][key]]
        if other:
            shown = ", ".join(f"{key} {known[str(first)][key]} and {data[key]}" for key in other)
            raise ConfigError(f"{first} and {name} were trained on other inputs: {shown}; train one of them again")
    return None if first is None else known[first]


def _owns_head(file: AdapterFile) -> bool:
    return any("head" in roles.values() for roles in file.record["plan"]["values"].values())


def _difference(first: list[str], other: list[str]) -> str:
    if sorted(first) == sorted(other):
        return "the same names in another order"
    lacking = [name for name in first if name not in other] + [name for name in other if name not in first]
    return f"{len(first)} and {len(other)}; not in both: {', '.join(lacking[:5])}{', ...' if len(lacking) > 5 else ''}"


def _is_name(name: str) -> bool:
    try:
        check_new_name(nn.Module(), name)
    except VisionLoRAError:
        return False
    return True
