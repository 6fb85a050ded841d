"""Flags taken from classes and dataclasses, with errors of two lines: what is wrong and the nearest right word."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any, NoReturn

import jsonargparse

from visionlora.errors import ConfigError

MOST = 600  # characters of a message; jsonargparse repeats whole unions of types

_UNKNOWN = (
    re.compile(r"unrecognized arguments: (?P<word>\S+)"),
    re.compile(r"Subcommand '\w+' does not accept option '(?P<word>[^']+)'"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<word>[^']+)'"),
    re.compile(r"Option '(?P<word>[^']+)' is not accepted"),
)
_VALUE = re.compile(
    r"(?:typing\.)?Literal\[(?P<choices>[^\]]+)\].*?(?:value|Got value):? *'?(?P<value>[\w.+-]+)'?", re.S
)


class ShortErrors(jsonargparse.ArgumentParser):
    """jsonargparse that raises a ConfigError instead of printing the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser: argparse.ArgumentParser = getattr(ex, "subcommand_parser", None) or self
        known = sorted(set(_keys(self)) | set(_keys(parser)))
        prog = re.sub(r" (\[options\]|--SETTING VALUE \.\.\.)", "", parser.prog)
        raise ConfigError(f"{explain(message, known)}\n{prog} --help shows the options") from None


def explain(message: str, known: list[str]) -> str:
    """Return a parser's message in one line, with the nearest known key where a word is wrong."""
    for pattern in _UNKNOWN:
        found = pattern.search(message)
        if found:
            group = found.groupdict().get("group")
            key = found["word"].partition("=")[0].lstrip("-")
            key = f"{group}.{key}" if group else key
            return f"there is no setting {key}{nearest(key, known)}"
    return _one_line(message) + _nearest_choice(message)


def nearest(key: str, known: list[str]) -> str:
    """Return '; did you mean ...?': a key that ends like this one, or one spelled nearly like it."""
    leaf = key.rpartition(".")[2]
    owned = [k for k in known if k.rpartition(".")[2] == leaf]
    near = get_close_matches(key, known, n=1, cutoff=0.6) or owned or get_close_matches(leaf, _leaves(known), 1, 0.6)
    if not near:
        return ""
    full = next((k for k in known if k == near[0]), None) or next(k for k in known if k.endswith(f".{near[0]}"))
    return f'; did you mean "{full}"?'


def _leaves(known: list[str]) -> list[str]:
    return sorted({key.rpartition(".")[2] for key in known if "." in key})


def _nearest_choice(message: str) -> str:
    found = _VALUE.search(message)
    if not found:
        return ""
    choices = [choice.strip(" '\"") for choice in found["choices"].split(",")]
    near = get_close_matches(found["value"], choices, n=1, cutoff=0.5)
    return f'; did you mean "{near[0]}"?' if near else ""


def _one_line(message: str) -> str:
    text = " ".join(message.split()).replace('Parser key "', '"').replace("typing.", "")
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)
    return text if len(text) <= MOST else text[:MOST] + " ..."


def _keys(parser: Any) -> Iterator[str]:
    for action in parser._actions:
        if action.dest != argparse.SUPPRESS and action.option_strings:
            yield action.option_strings[-1].lstrip("-")
