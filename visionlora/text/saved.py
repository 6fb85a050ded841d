"""Data sets of the `datasets` library: saved folders, parquet files and names on the hub, as plain rows."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from visionlora.data.find import missing
from visionlora.errors import DataError
from visionlora.text.extras import need

__all__ = ["from_disk", "from_hub", "from_parquet", "is_saved", "may_be_a_name", "plain"]

logger = logging.getLogger(__name__)

Cells = Sequence[Mapping[str, Any]]
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_saved(folder: Path) -> bool:
    """Tell whether save_to_disk wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def may_be_a_name(text: str) -> bool:
    """Tell whether a text that is no path may name a data set on the hub: imdb, or nyu-mll/glue."""
    return bool(_NAME.fullmatch(text)) and Path(text).suffix.lower() not in (".csv", ".tsv", ".jsonl", ".json", ".txt")


def from_disk(folder: Path) -> dict[str, Cells]:
    """Return the rows that save_to_disk wrote, by part; a single part is named ""."""
    datasets = need("datasets")
    try:
        return _by_part(datasets.load_from_disk(str(folder)))
    except (OSError, ValueError, KeyError) as e:
        raise DataError(f"{folder}: a data set that cannot be read: {_short(e)}") from None


def from_hub(name: str, subset: str | None = None) -> dict[str, Cells]:
    """Return the rows of a data set by its name, by part; fetched where it is not on this machine."""
    datasets = need("datasets")
    try:
        return _by_part(datasets.load_dataset(name, subset))
    except (OSError, ValueError, RuntimeError) as e:  # datasets' own errors derive from these, network ones too
        raise DataError(f"{missing(name)}, and as a data set of the hub: {_short(e)}") from None


def from_parquet(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a parquet file, with labels by name where it records their names."""
    datasets, parquet = need("datasets"), need("pyarrow.parquet")
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as e:  # pyarrow's errors derive from these
        raise DataError(f"{path}: not a parquet file: {_short(e)}") from None
    return _named(table.to_pylist(), datasets.Features.from_arrow_schema(table.schema))


def plain(part: Any) -> list[Mapping[str, Any]]:
    """Return the rows of a list of dicts, of a pandas frame or of a Dataset."""
    if hasattr(part, "features") and hasattr(part, "to_list"):
        return [*_named(part.to_list(), part.features)]
    rows = part.to_dict("records") if hasattr(part, "to_dict") else list(part)
    for at, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {at}: expected a dict of columns, got {type(row).__name__}")
    return list(rows)


def _by_part(found: Any) -> dict[str, Cells]:
    parts = found if isinstance(found, Mapping) else {"": found}
    return {name: plain(part) for name, part in parts.items() if name != "unsupervised"}


def _named(rows: list[dict[str, Any]], features: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows with the numbers of classes replaced by their names; -1, which means unknown, by None."""
    kinds = {column: (feature, getattr(feature, "feature", feature)) for column, feature in features.items()}
    for column, (feature, inner) in kinds.items():
        names = getattr(inner, "names", None)
        if names is None:
            continue
        for row in rows:
            value = row[column]
            row[column] = _name(names, value) if feature is inner else [_name(names, v) for v in value or ()]
    return rows


def _name(names: Sequence[str], value: int | None) -> str | None:
    return None if value is None or value < 0 else names[value]


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
