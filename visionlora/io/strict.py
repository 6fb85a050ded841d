"""Read plain data without trust: strict JSON, and values checked against a closed schema."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from visionlora.errors import AdapterFileError


@dataclass(frozen=True)
class Rule:
    """What a value must be: said in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


@dataclass(frozen=True)
class Maybe:
    """null, or a value of another schema."""

    schema: Schema


@dataclass(frozen=True)
class ListOf:
    """A list of values of one schema."""

    schema: Schema
    limit: int


@dataclass(frozen=True)
class MapOf:
    """An object of any keys that hold to a rule, and values of one schema."""

    key: Rule
    schema: Schema
    limit: int


@dataclass(frozen=True)
class ByField:
    """An object of one schema if it has a field, of another if it has not."""

    field: str
    present: Schema
    absent: Schema


Schema = Rule | Maybe | ListOf | MapOf | ByField | dict[str, Any]
"""A dict is an object with exactly these fields."""


def wrong(field: str, expected: str, found: object) -> AdapterFileError:
    """Return the error that names the field, what was expected and what came."""
    return AdapterFileError(f"{field}: expected {expected}, found {short(found)}")


def short(found: object) -> str:
    """Return a value as text of at most one line: a file may hold a name of a megabyte."""
    text = repr(found)
    return text if len(text) <= 120 else f"{text[:117]}..."


def parse_object(text: bytes, field: str) -> dict[str, Any]:
    """Return a JSON object. Raises AdapterFileError for anything else, for a key given twice, for NaN and infinity."""
    try:
        found = json.loads(text.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise AdapterFileError(f"{field}: nested too deep to be an adapter's record") from None
    except ValueError as e:  # not UTF-8, not JSON, a number of thousands of digits
        raise AdapterFileError(f"{field}: not JSON ({e})") from None
    if not isinstance(found, dict):
        raise wrong(field, "a JSON object", found)
    return found


def check(value: object, schema: Schema, field: str) -> None:
    """Raise AdapterFileError, naming the field, where a value does not hold to the schema."""
    if isinstance(schema, Rule):
        if not schema.holds(value):
            raise wrong(field, schema.expected, value)
    elif isinstance(schema, Maybe):
        if value is not None:
            check(value, schema.schema, field)
    elif isinstance(schema, ListOf):
        _check_list(value, schema, field)
    elif isinstance(schema, MapOf):
        _check_map(value, schema, field)
    elif isinstance(schema, ByField):
        has = isinstance(value, dict) and schema.field in value
        check(value, schema.present if has else schema.absent, field)
    else:
        _check_object(value, schema, field)


def is_whole(value: object) -> bool:
    """Tell whether the value is an int; True and 8.0 are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite(value: object) -> bool:
    """Tell whether the value is a finite number."""
    # an int beyond float's range is no number we can work with either
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300 and value == value


def _check_list(value: object, schema: ListOf, field: str) -> None:
    if not isinstance(value, list) or len(value) > schema.limit:
        raise wrong(field, f"a list of at most {schema.limit}", value)
    for i, item in enumerate(value):
        check(item, schema.schema, f"{field}[{i}]")


def _check_map(value: object, schema: MapOf, field: str) -> None:
    if not isinstance(value, dict) or len(value) > schema.limit:
        raise wrong(field, f"an object of at most {schema.limit} entries", value)
    for key, item in value.items():
        check(key, schema.key, f"{field}, a key")
        check(item, schema.schema, f"{field}.{key}")


def _check_object(value: object, schema: dict[str, Any], field: str) -> None:
    if not isinstance(value, dict):
        raise wrong(field, f"an object with the fields {', '.join(schema)}", value)
    for key in value:
        if key not in schema:
            raise AdapterFileError(f"{field}: unknown field {short(key)}; this version knows {', '.join(schema)}")
    for key, inner in schema.items():
        if key not in value:
            raise AdapterFileError(f"{field}: the field {key!r} is missing")
        check(value[key], inner, f"{field}.{key}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {short(key)} is given twice")
        found[key] = value
    return found


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number JSON knows")
