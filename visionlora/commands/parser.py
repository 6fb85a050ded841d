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
_NESTED = re.compile(r"\"(?P<group>[\w.]+)\".*NestedArg\(key='(?P<word>[^']+)'")
_UNION = re.compile(
    r"\"(?P<key>[\w.]+)\": Does not validate against any of the Union subtypes Subtypes: \[(?P<types>.*?)\] Errors:"
    r".*Given value: (?P<value>.*)$"
)
_TYPE = re.compile(r"\"(?P<key>[\w.]+)\": Expected an? (?P<types>.+?)\. Got value: (?P<value>.*)$")
_MISSING = re.compile(r"\"model\.model_name\": .*Got value: None")
_IN_WORDS = {"NoneType": "null", "float": "a number", "int": "a whole number", "str": "text", "bool": "true or false"}


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
            if pattern is _UNKNOWN[0] and not found["word"].startswith("-"):
                return f'"{found["word"]}" belongs to no setting; data are given by --data.root {found["word"]}'
            group = found.groupdict().get("group")
            key = found["word"].partition("=")[0].lstrip("-")
            key = f"{group}.{key}" if group else key
            return f"there is no setting {key}{nearest(key, known)}"
    text = _plain(message)
    if nested := _NESTED.search(text):
        return f"{nested['group']} is one value, there is no setting {nested['group']}.{nested['word']}"
    if "must be given via" in text and "num_classes" in text:
        return "model.num_classes is counted in the data; data.classes names the classes"
    if _MISSING.search(text):
        return (
            "no model: give --model.model_name NAME (a backbone of timm, or for text a model of transformers), "
            "a --config with it, or a trained --adapter or --ckpt_path"
        )
    if typed := _UNION.search(text) or _TYPE.search(text):
        return _not_of_type(**typed.groupdict())
    return _cut(text)


def _not_of_type(key: str, types: str, value: str) -> str:
    """Return what was expected of a setting, each choice once, and what came."""
    choices: dict[str, None] = {}
    for part in _split(types):
        if part.startswith("Literal["):
            choices |= dict.fromkeys(choice.strip("'\"") for choice in _split(part[8:-1]))
        else:
            choices[_IN_WORDS.get(part, part)] = None
    near = get_close_matches(value, list(choices), n=1, cutoff=0.6)
    hint = f'; did you mean "{near[0]}"?' if near else ""
    *most, last = choices
    expected = f"{', '.join(most)} or {last}" if most else last
    if "list[str]" in choices:
        hint = ': write them as ["01", "02"], numbers in quotes' if value.startswith("[") else f"; write [{value}]"
    return _cut(f"{key}: expected {expected}, got {value}") + hint


def _split(types: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth = [""], 0
    for sign in types:
        depth += (sign == "[") - (sign == "]")
        if sign == "," and not depth:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


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


def _plain(message: str) -> str:
    """Return the message in one line, with the names of types alone."""
    text = " ".join(message.split()).replace('Parser key "', '"').replace("typing.", "")
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text)


def _cut(text: str) -> str:
    return text if len(text) <= MOST else text[:MOST] + " ..."


def _keys(parser: Any) -> Iterator[str]:
    for action in parser._actions:
        if action.dest != argparse.SUPPRESS and action.option_strings:
            yield action.option_strings[-1].lstrip("-")
