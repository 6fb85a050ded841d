"""Files of other libraries that are damaged, hostile or for another model: an error, nothing run, nothing changed."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from io_toy import adapted, assert_same, look, net, put_together, take_apart
from safetensors.torch import save_file
from torch import Tensor, nn

from visionlora.errors import AdapterFileError
from visionlora.io.formats import detect, lycoris_tensors, put_on, read_loralib, read_lycoris, read_peft
from visionlora.io.formats.names import Layers
from visionlora.io.formats.tensors import MAX_HEADER, read_safetensors, read_torch
from visionlora.io.read import PEFT_CONFIG, WEIGHTS

CONFIG = {"target_modules": ["hidden", "stem"], "norm": "frozen", "bias": "none", "modules_to_save": "none"}


def sound(**config: Any) -> dict[str, Tensor]:
    return lycoris_tensors(adapted(net(), **{**CONFIG, **config}), "default").tensors


def refused(model: nn.Module, path: Path, words: str, **options: Any) -> None:
    before = look(model)
    with pytest.raises(AdapterFileError, match=words) as caught:
        put_on(model, read_lycoris(model, path, **options))
    assert str(path) in str(caught.value)
    assert_same(look(model), before)


def changed(tensors: dict[str, Tensor], **new: Tensor | None) -> dict[str, Tensor]:
    """Return the tensors with some of the layer `hidden` replaced, added or (None) left out."""
    named = {f"lycoris_hidden.{key.replace('__', '.')}": t for key, t in new.items()}
    return {key: t for key, t in {**tensors, **named}.items() if t is not None}


DOWN, UP = torch.ones(2, 16), torch.ones(16, 2)
MISFITS: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = {
    "too many inputs": (lambda t: changed(t, lora_down__weight=torch.ones(2, 17)), r"shape \(any, 16\)"),
    "another rank": (lambda t: changed(t, lora_up__weight=torch.ones(16, 3)), r"shape \(16, 2\)"),
    "a vector": (lambda t: changed(t, lora_down__weight=torch.ones(16)), "shape"),
    "no partner": (lambda t: changed(t, lora_up__weight=None), "is missing"),
    "alpha of no strength": (lambda t: changed(t, alpha=torch.tensor(-1.0)), "above 0"),
    "many alphas": (lambda t: changed(t, alpha=torch.ones(3)), "one number"),
    "two families": (lambda t: changed(t, hada_w1_a=torch.ones(16, 2)), "one kind of change"),
    "a difference beside factors": (lambda t: changed(t, diff=torch.ones(16, 16)), "one kind of change"),
    "an unknown tensor": (lambda t: changed(t, oft_blocks=torch.ones(2, 2)), "other algorithms"),
    "a key without an ending": (lambda t: {**t, "lycoris_hidden": torch.ones(2)}, "other algorithms"),
    "an unknown layer": (lambda t: {**t, "lycoris_hiden.lora_up.weight": UP}, 'did you mean "hidden"'),
    "a layer without a weight": (lambda t: {**t, "lycoris_bn.lora_up.weight": UP}, "no weight we can adapt"),
    "twice": (
        lambda t: {**t, "lora_unet_hidden.lora_down.weight": DOWN, "lora_unet_hidden.lora_up.weight": UP},
        "twice",
    ),
    "a bias that is not there": (
        lambda t: {**t, "lycoris_fc.diff": torch.ones(3, 16), "lycoris_fc.b_norm": UP},
        "shape",
    ),
    "a difference of another head": (lambda t: {**t, "lycoris_fc.diff": torch.ones(5, 16)}, r"shape \(3, 16\)"),
    "a magnitude of another layer": (lambda t: changed(t, dora_scale=torch.ones(5, 1)), "dora_scale"),
    "NaN": (lambda t: changed(t, lora_up__weight=torch.full((16, 2), torch.nan)), "32 of 32 values are NaN"),
    "infinite": (lambda t: changed(t, alpha=torch.tensor(torch.inf)), "infinite"),
    "whole numbers": (lambda t: changed(t, lora_up__weight=UP.to(torch.int8)), "dtype"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_file_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    change, words = MISFITS[case]
    save_file(change(sound()), tmp_path / "a.safetensors")
    refused(net(), tmp_path / "a.safetensors", words)


@pytest.mark.parametrize(
    ("variant", "change", "words"),
    [
        ("loha", {"hada_w2_b": torch.ones(3, 16)}, "shape"),
        ("loha", {"hada_w2_a": torch.ones(16, 3), "hada_w2_b": torch.ones(3, 16)}, "rank of hada_w1_b"),
        ("loha", {"hada_t1": torch.ones(2, 2)}, "shape"),
        ("lokr", {"lokr_w1": torch.ones(3, 4)}, "divide"),
        ("lokr", {"lokr_w2": torch.ones(5, 4)}, "shape"),
        ("lokr", {"lokr_w1": None}, "lokr_w1_a is missing"),
    ],
)
def test_factors_of_other_kinds_are_checked_too(variant: str, change: Any, words: str, tmp_path: Path) -> None:
    save_file(changed(sound(variant=variant, target_modules=["hidden"]), **change), tmp_path / "a.safetensors")
    refused(net(), tmp_path / "a.safetensors", words)


@pytest.mark.parametrize("prefix", ["lora_unet", "lycori", "lycoris_hidden"])
def test_another_prefix_finds_no_layer(prefix: str, tmp_path: Path) -> None:
    save_file(sound(), tmp_path / "a.safetensors")
    refused(net(), tmp_path / "a.safetensors", "--prefix", prefix=prefix)


def test_a_name_that_two_layers_have_is_refused() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})})
    with pytest.raises(AdapterFileError, match=r"a_b and a\.b|a\.b and a_b"):
        Layers(model).find("lycoris_a_b")
    assert Layers(model).find("lycoris_a_c") == "a.c"


def test_a_prefix_that_is_part_of_a_name_is_told_from_one() -> None:
    model = nn.ModuleDict({"lora_te": nn.ModuleDict({"q": nn.Linear(4, 4)}), "unet": nn.Linear(4, 4)})
    assert Layers(model).find("lora_te_q") == "lora_te.q"
    assert Layers(model).find("lora_unet") == "unet"


def test_names_with_dots_and_diffusers_endings_are_read(tmp_path: Path) -> None:
    save_file({"hidden.lora_A.weight": DOWN, "hidden.lora_B.weight": UP}, tmp_path / "a.safetensors")
    model = net()
    put_on(model, read_lycoris(model, tmp_path / "a.safetensors"))
    assert torch.equal(model.hidden.adapters["default"]["weight"].B, UP)
    assert model.hidden.adapters["default"]["weight"].scale == 1


@pytest.mark.parametrize("keep", [0, 5, 9, 40, 300, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(sound(), path)
    path.write_bytes(path.read_bytes()[:keep])
    refused(net(), path, "truncated|damaged|no sound")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{" * 4000,
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1, -1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [4294967296, 4294967296, 4294967296], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], '
        b'"data_offsets": [0, 4]}}',
    ],
)
def test_a_header_that_contradicts_itself_is_refused(header: bytes, tmp_path: Path) -> None:
    put_together(tmp_path / "a.safetensors", header, bytes(4))
    with pytest.raises(AdapterFileError):
        read_safetensors(tmp_path / "a.safetensors")


def test_a_header_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate((1 << 30) + 8)  # a hole: takes no room
    assert MAX_HEADER < 1 << 30
    with pytest.raises(AdapterFileError, match="header"):
        read_safetensors(path)


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file(sound(), tmp_path / "a.safetensors")
    (tmp_path / "in" / "a.safetensors").symlink_to(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="outside its folder"):
        read_safetensors(tmp_path / "in" / "a.safetensors")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_pickle_with_a_program_is_not_run(save: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    save({"fc.lora_A": Bomb(mark)}, tmp_path / "a.pt")
    with pytest.raises(AdapterFileError):
        read_loralib(net(), tmp_path / "a.pt", alpha=1)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([1, 2], "a dict"),
        ({}, "a dict"),
        ({"a": 1}, "a tensor"),
        ({1: torch.ones(2)}, "text"),
        ({"a": torch.ones(1).expand(1 << 40)}, "fit in the"),
        ({"a": torch.ones(2, 2).to_sparse()}, "dense"),
        ({"a": torch.ones(2).int()}, "dense"),
        ({"a": torch.ones(2, device="meta")}, "dense"),
        ({"a": torch.tensor([1.0, torch.inf])}, "infinite"),
        ({"a": torch.ones(0)}, "fit in the"),
    ],
)
@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
def test_a_torch_file_of_anything_but_tensors_is_refused(content: Any, words: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(AdapterFileError, match=words):
        read_torch(tmp_path / "a.pt")


def test_a_packed_archive_is_not_unpacked(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1 << 20)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "a.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    assert (tmp_path / "a.pt").stat().st_size < 1 << 16
    with pytest.raises(AdapterFileError, match="compressed"):
        read_torch(tmp_path / "a.pt")


def test_the_old_format_of_torch_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterFileError, match=r"1\.6"):
        read_torch(tmp_path / "a.pt")


@pytest.mark.parametrize("keep", [0, 30, 400, -1])
def test_a_truncated_torch_file_is_refused(keep: int, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(200)}, tmp_path / "b.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "b.pt").read_bytes()[:keep])
    with pytest.raises(AdapterFileError):
        read_torch(tmp_path / "a.pt")


def peft_folder(folder: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["hidden"], **config}
    (folder / PEFT_CONFIG).write_text(json.dumps(settings))
    save_file({f"base_model.model.{key}": t for key, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"})
    return folder


PAIR = {"hidden.lora_A.weight": DOWN, "hidden.lora_B.weight": UP}


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        ({**PAIR, "hidden.lora_A.weight": torch.ones(2, 9)}, {}, "shape"),
        ({**PAIR, "hidden.lora_A.weight": torch.ones(3, 16)}, {}, "shape"),
        ({"hidden.lora_A.weight": DOWN}, {}, "missing"),
        ({**PAIR, "fc.weight": torch.ones(9, 16)}, {"modules_to_save": ["fc"]}, "num_classes"),
        ({**PAIR, "hidn.lora_A.weight": DOWN + 1}, {}, "no layer 'hidn'"),
        ({**PAIR, "hidden.lora_magnitude_vector": torch.ones(3)}, {"use_dora": True}, "16 numbers"),
        ({**PAIR, "mix.lora_A.weight": torch.ones(3, 8, 3, 3)}, {"rank_pattern": {"mix": 3}}, "2 groups"),
        (PAIR, {"peft_type": "VERA"}, "LORA"),
        ({"hidden.hada_w1_a": UP}, {"peft_type": "LOHA", "lora_alpha": None}, "is missing"),
        (PAIR, {"peft_type": "LOKR"}, "lora_alpha"),
        (PAIR, {"r": 0}, "whole number"),
        (PAIR, {"lora_bias": True}, "lora_bias"),
        (PAIR, {"rank_pattern": {"(a+)+$": 4}}, "regular expression"),
    ],
)
def test_a_peft_folder_that_does_not_fit_is_refused(tensors: Any, config: Any, words: str, tmp_path: Path) -> None:
    model = net()
    before = look(model)
    with pytest.raises(AdapterFileError, match=words):
        put_on(model, read_peft(model, peft_folder(tmp_path, tensors, **config)))
    assert_same(look(model), before)


def test_a_foreign_name_in_a_peft_file_is_refused(tmp_path: Path) -> None:
    save_file({"hidden.lora_A.weight": DOWN}, peft_folder(tmp_path, PAIR) / WEIGHTS)
    with pytest.raises(AdapterFileError, match=r"base_model\.model"):
        read_peft(net(), tmp_path)


def test_the_format_is_told_by_the_content(tmp_path: Path) -> None:
    from io_toy import saved

    save_file(sound(), tmp_path / "a.safetensors")
    (tmp_path / "peft").mkdir()
    torch.save({}, tmp_path / "a.pt")
    kinds = {"ours": "visionlora", "a.safetensors": "kohya", "peft": "peft", "a.pt": "loralib"}
    saved(tmp_path / "ours")
    peft_folder(tmp_path / "peft", PAIR)
    assert {name: detect(tmp_path / name) for name in kinds} == kinds


def test_what_has_no_known_format_is_refused(tmp_path: Path) -> None:
    save_file({"weight": DOWN}, tmp_path / "a.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled" / "adapter_model.bin")
    peft_folder(tmp_path, PAIR)
    (tmp_path / PEFT_CONFIG).unlink()
    for name, words in (
        ("a.safetensors", "neither ours"),
        ("empty", "nothing there"),
        ("nowhere", "nothing there"),
        ("pickled", r"adapter_model\.bin"),
        (WEIGHTS, "not beside it"),
    ):
        with pytest.raises(AdapterFileError, match=words):
            detect(tmp_path / name)


def test_a_file_of_no_change_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    model = net()
    with pytest.raises(AdapterFileError, match="changes nothing"):
        put_on(model, read_lycoris(model, tmp_path / "a.safetensors"))


def test_a_header_with_training_notes_is_read(tmp_path: Path) -> None:
    save_file(sound(), tmp_path / "a.safetensors", {"ss_tag_frequency": "x" * (2 << 20)})
    assert len(take_apart(tmp_path / "a.safetensors")[0]["__metadata__"]["ss_tag_frequency"]) == 2 << 20
    model = net()
    put_on(model, read_lycoris(model, tmp_path / "a.safetensors"))
