"""Files that lie about themselves: each is refused, with the file named, before anything of its size is allocated."""

from __future__ import annotations

import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from io_toy import assert_same, forge, look, net, put_together, saved, take_apart

from visionlora.core.digest import tensor_digest
from visionlora.errors import AdapterFileError
from visionlora.io import load_adapter, read_adapter
from visionlora.io.header import MAX_HEADER
from visionlora.io.read import WEIGHTS

A = "base_model.model.hidden.lora_A.weight"


@contextmanager
def little_memory(spare: int = 256 << 20) -> Iterator[None]:
    """Let the process grow by this many bytes at most."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + spare, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[A].update(changes)


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update({name: header.pop(A)})


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown type": entry(dtype="F8_E4M3"),
    "type in small letters": entry(dtype="f32"),
    "type that is a list": entry(dtype=["F32"]),
    "integers": entry(dtype="I64"),
    "negative size": entry(shape=[-2, -16]),
    "size zero": entry(shape=[0, 1 << 62]),
    "size that overflows": entry(shape=[1 << 40, 1 << 40]),
    "size with a point": entry(shape=[2.0, 16]),
    "size true": entry(shape=[True, 32]),
    "size as text": entry(shape=["2", 16]),
    "forty dimensions": entry(shape=[1] * 38 + [2, 16]),
    "no list of sizes": entry(shape={"0": 2}),
    "other size": entry(shape=[4, 16]),
    "beyond the end": entry(data_offsets=[0, 1 << 40]),
    "backwards": entry(data_offsets=[128, 0]),
    "three offsets": entry(data_offsets=[0, 64, 128]),
    "a hole": entry(data_offsets=[4, 132]),
    "unknown field": entry(comment="hello"),
    "missing field": lambda header: header[A].pop("shape"),
    "not an object": lambda header: header.update({A: [1, 2]}),
    "tensor left out": lambda header: header.pop(A),
    "empty name": renamed(""),
    "name of a path": renamed("../../etc/passwd"),
    "name with a zero byte": renamed(f"{A}\0"),
    "name with a line end": renamed(f"{A}\n"),
    "name of a megabyte": renamed(f"base_model.model.{'a' * 600_000}"),
    "metadata that is a number": lambda header: header["__metadata__"].update(visionlora=1),
    "metadata that is a list": lambda header: header.update(__metadata__=[]),
    "many tensors": lambda header: header.update(
        {f"base_model.model.a{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 0]} for i in range(13_000)}
    ),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_lying_header_is_refused(case: str, tmp_path: Path) -> None:
    header, data = take_apart(saved(tmp_path))
    HEADERS[case](header)
    put_together(tmp_path, header, data)
    _refused(tmp_path)


TEXTS: dict[str, Callable[[bytes], bytes]] = {
    "leading blank": lambda text: b" " + text,
    "not JSON": lambda text: text[:-1],
    "not UTF-8": lambda text: text.replace(b"lora_A", b"lora_\xff", 1),
    "a list": lambda text: b"[" + text + b"]",
    "two objects": lambda text: text + b"{}",
    "a name twice, alike": lambda text: text[:-1] + b',"' + A.encode() + b'":' + _entry(text) + b"}",
    "a name twice, otherwise": lambda text: text[:-1] + b',"' + A.encode() + b'":{}}',
    "a field twice": lambda text: text.replace(b'"dtype"', b'"dtype":"F32","dtype"', 1),
    "NaN": lambda text: text.replace(b"[0,", b"[NaN,", 1).replace(b"[0, ", b"[NaN, ", 1),
    "a number without end": lambda text: text[:-1] + b',"n":' + b"9" * 10_000 + b"}",
    "infinite by exponent": lambda text: (
        text[:-1] + b',"base_model.model.n":{"dtype":"F32","shape":[1e999],"data_offsets":[0,0]}}'
    ),
    "nested without end": lambda text: text[:-1] + b',"n":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "one byte above the limit": lambda text: text + b" " * (MAX_HEADER + 1 - len(text)),
    "empty object": lambda text: b"{}",
}


def _entry(text: bytes) -> bytes:
    return json.dumps(json.loads(text)[A]).encode()


@pytest.mark.parametrize("case", TEXTS)
def test_a_header_that_is_no_plain_json_is_refused(case: str, tmp_path: Path) -> None:
    header, data = take_apart(saved(tmp_path))
    text = TEXTS[case](json.dumps(header).encode())
    assert text != json.dumps(header).encode()
    put_together(tmp_path, text, data)
    _refused(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, (1 << 20) + 1, 1 << 40, (1 << 64) - 1])
def test_a_wrong_header_length_is_refused(length: int, tmp_path: Path) -> None:
    path = saved(tmp_path) / WEIGHTS
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    _refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 100, 0.5, -1])
def test_a_truncated_file_is_refused(keep: float, tmp_path: Path) -> None:
    path = saved(tmp_path) / WEIGHTS
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep) if 0 < keep < 1 else int(keep)])
    _refused(tmp_path)


def test_bytes_after_the_end_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / WEIGHTS
    path.write_bytes(path.read_bytes() + b"PK\x03\x04")
    _refused(tmp_path)


def test_a_flipped_bit_is_always_found(tmp_path: Path) -> None:
    path = saved(tmp_path) / WEIGHTS
    content = bytearray(path.read_bytes())
    offsets = random.Random(0)
    for _ in range(1000):
        offset, bit = offsets.randrange(len(content)), 1 << offsets.randrange(8)
        content[offset] ^= bit
        path.write_bytes(content)
        with pytest.raises(AdapterFileError):
            read_adapter(path)
        content[offset] ^= bit
    path.write_bytes(content)
    read_adapter(path)


def test_a_rank_of_ten_million_allocates_nothing(tmp_path: Path) -> None:
    def enlarge(record: dict[str, Any]) -> None:
        record["plan"]["config"]["r"] = 10_000_000
        record["plan"]["layers"]["hidden"]["rank"] = 10_000_000

    forge(saved(tmp_path), enlarge)
    with little_memory(), pytest.raises(AdapterFileError, match=r"layers\.hidden\.rank: expected 10000000"):
        load_adapter(net(), tmp_path)


def test_a_rank_that_fits_the_tensors_but_not_the_layer_allocates_nothing(tmp_path: Path) -> None:
    # A (10^7, 1) and B (1, 10^7) agree with the record; a (10^7, 16) start for the layer would take 640 MB
    rank = 10_000_000
    header, _ = take_apart(saved(tmp_path, target_modules=["hidden"], modules_to_save="none", bias="none"))
    entries = {
        A: {"dtype": "F32", "shape": [rank, 1], "data_offsets": [0, 4 * rank]},
        A.replace("_A", "_B"): {"dtype": "F32", "shape": [1, rank], "data_offsets": [4 * rank, 8 * rank]},
    }
    put_together(tmp_path, {"__metadata__": header["__metadata__"], **entries}, bytes(8 * rank))

    def enlarge(record: dict[str, Any]) -> None:
        record["plan"]["layers"]["hidden"]["rank"] = rank
        record["tensors"] = {key: _sum(key, entry["shape"]) for key, entry in entries.items()}

    forge(tmp_path, enlarge)
    with little_memory(400 << 20), pytest.raises(AdapterFileError, match="needs the shape"):
        load_adapter(net(), tmp_path)


def _sum(key: str, shape: list[int]) -> str:
    return tensor_digest(key, torch.zeros(shape)).hex()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return (saved(tmp_path_factory.mktemp("sound")) / WEIGHTS).read_bytes()


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_of_the_record_is_refused_or_harmless(data: st.DataObject, sound: bytes, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(sound)

    def mutate(record: dict[str, Any]) -> None:
        place: Any = record
        while True:
            key = data.draw(
                st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1)
            )
            if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
                place = place[key]
                continue
            action = data.draw(st.sampled_from(["set", "delete", "add"]))
            if action == "set" or isinstance(place, list):
                place[key] = data.draw(JSON)
            elif action == "delete":
                del place[key]
            else:
                place[data.draw(st.text(max_size=5))] = data.draw(JSON)
            return

    forge(tmp_path, mutate)
    model = net()
    before = look(model)
    try:
        load_adapter(model, tmp_path)
    except AdapterFileError:
        assert_same(look(model), before)


def _refused(path: Path) -> None:
    model = net()
    before = look(model)
    with little_memory(), pytest.raises(AdapterFileError) as caught:
        load_adapter(model, path)
    assert str(path / WEIGHTS) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert_same(look(model), before)
