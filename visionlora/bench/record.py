"""A measurement as a file: everything needed to read it, judge it and compare it with another."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from visionlora.atomic import write_atomic
from visionlora.bench.machine import load, machine, versions
from visionlora.bench.settings import Settings
from visionlora.errors import ConfigError

SCHEMA = 1


def new_record(settings: Settings) -> dict[str, Any]:
    """Return a record without results."""
    return {
        "schema": SCHEMA,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "versions": versions(),
        "machine": machine(settings),
        "load": {"before": load(), "after": None},
        "settings": asdict(settings) | {"variants": list(settings.variants)},
        "models": [],
        "failed": {},
        "verbs": {},
        "imports": {},
    }


def write_record(path: str | Path, record: dict[str, Any]) -> None:
    """Write a record, whole or not at all."""
    write_atomic(path, json.dumps(record, indent=1) + "\n")


def read_record(path: str | Path) -> dict[str, Any]:
    """Return a record. Raises ConfigError for a file that is none, or one of another schema."""
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ConfigError(f"{path} is not JSON: {e}; expected what visionlora bench --json wrote") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ConfigError(f"{path}: expected a record of visionlora bench with schema {SCHEMA}, found {found!r}")
    missing = [key for key in new_record(Settings()) if key not in record]
    if missing:
        raise ConfigError(f"{path}: this record lacks {', '.join(missing)}; measure again")
    return record
