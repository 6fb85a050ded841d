"""Sound-looking adapters that do not belong here: refused with what was expected and what came, the model untouched."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from io_toy import (
    adapted,
    assert_same,
    forge,
    images,
    look,
    net,
    put_together,
    record_of,
    saved,
    set_value,
    take_apart,
    timm_model,
)
from safetensors.torch import load_file, save_file
from torch import nn

import visionlora as vl
from visionlora.errors import AdapterFileError, BaseMismatchError, ConfigError, StateError, VisionLoRAError
from visionlora.io import load_adapter, read_adapter, save_adapter
from visionlora.io.read import PEFT_CONFIG, WEIGHTS

A = "base_model.model.hidden.lora_A.weight"
B = "base_model.model.hidden.lora_B.weight"


def refused(
    path: Path,
    *words: str,
    model: nn.Module | None = None,
    error: type[VisionLoRAError] = AdapterFileError,
    **args: Any,
) -> None:
    model = net() if model is None else model
    before = look(model)
    with pytest.raises(error) as caught:
        load_adapter(model, path, **args)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert_same(look(model), before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [A, "base_model.model.fc.bias", "visionlora.bn/running_var/value"])
def test_non_finite_values_are_refused(key: str, value: float, tmp_path: Path) -> None:
    set_value(saved(tmp_path, norm="stats-affine"), key, value)
    refused(tmp_path, WEIGHTS, key, "1 of", "NaN", "allow_nonfinite=True")
    assert len(read_adapter(tmp_path, allow_nonfinite=True).tensors) > 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_adapter_does_not_replace_a_good_one(value: float, tmp_path: Path) -> None:
    model = net()
    vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["hidden"]), name="cam")
    save_adapter(model, tmp_path / "cam", name="cam")
    before = (tmp_path / "cam" / WEIGHTS).read_bytes()
    with torch.no_grad():
        next(iter(vl.adapter_parameters(model, "cam")["A"].values()))[0, 0] = value
    with pytest.raises(ConfigError, match=r"1 of 32 values of .*hidden.* are not finite"):
        save_adapter(model, tmp_path / "cam", name="cam")
    assert (tmp_path / "cam" / WEIGHTS).read_bytes() == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (pickle.dumps({"A": list(range(99))}), "a pickle"),
        (b"PK\x03\x04" + bytes(99), "torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "git lfs pull"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
    ],
)
def test_other_files_under_its_name_are_told(content: bytes, told: str, tmp_path: Path) -> None:
    (saved(tmp_path) / WEIGHTS).write_bytes(content)
    refused(tmp_path, WEIGHTS, told, "no safetensors file")


@pytest.mark.parametrize("share", ["one", "half", "all"])
def test_missing_tensors_are_listed(share: str, tmp_path: Path) -> None:
    tensors = load_file(saved(tmp_path, norm="stats-affine", bias="all") / WEIGHTS)
    keys = sorted(tensors)[: {"one": 1, "half": len(tensors) // 2, "all": len(tensors)}[share]]
    with_record = take_apart(tmp_path)[0]["__metadata__"]
    save_file({key: t for key, t in tensors.items() if key not in keys}, tmp_path / WEIGHTS, with_record)
    needed = sum(not key.endswith("/start") for key in keys)
    refused(tmp_path, f"missing {needed}: ", *(() if needed <= 10 else (f"and {needed - 10} more",)))


def test_a_missing_start_is_noticed(tmp_path: Path) -> None:
    tensors = load_file(saved(tmp_path) / WEIGHTS)
    metadata = take_apart(tmp_path)[0]["__metadata__"]
    del tensors["visionlora.fc/weight/start"]
    save_file(tensors, tmp_path / WEIGHTS, metadata)
    refused(tmp_path, "record.tensors")


def test_an_unexpected_tensor_is_refused(tmp_path: Path) -> None:
    tensors = load_file(saved(tmp_path) / WEIGHTS)
    metadata = take_apart(tmp_path)[0]["__metadata__"]
    save_file({**tensors, "base_model.model.extra.lora_A.weight": torch.ones(2, 2)}, tmp_path / WEIGHTS, metadata)
    refused(tmp_path, "unexpected 1: extra/weight/A")


def config(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["plan"]["config"].update(changes)


def layer(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["plan"]["layers"]["hidden"].update(changes)


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "later format": (lambda r: r.update(format_version=2), "record.format_version: expected 1"),
    "format true": (lambda r: r.update(format_version=True), "format_version"),
    "unknown field": (lambda r: r.update(secret=1), "unknown field 'secret'"),
    "missing field": (lambda r: r.pop("base"), "'base' is missing"),
    "unknown setting": (config(megascale=3), "megascale"),
    "unknown variant": (config(variant="megalora"), "tucker, up, spatial, vera, ia3, got 'megalora'"),
    "other variant": (config(variant="dora"), "hidden/weight/m"),
    "r of the config 0": (config(r=0), "r must be"),
    "rank 0": (layer(rank=0), "hidden.rank: expected a whole number from 1"),
    "rank -1": (layer(rank=-1), "hidden.rank"),
    "rank 2.5": (layer(rank=2.5), "hidden.rank"),
    "rank text": (layer(rank="8"), "hidden.rank: expected a whole number from 1 to 1073741824, found '8'"),
    "rank true": (layer(rank=True), "hidden.rank"),
    "other rank": (layer(rank=1), "hidden.rank: expected 1 as recorded, found lora_A (2, 16)"),
    "scale 0": (layer(scale=0), "hidden.scale"),
    "scale negative": (layer(scale=-1.0), "hidden.scale"),
    "scale beyond all": (layer(scale=1e301), "hidden.scale"),
    "scale text": (layer(scale="1"), "hidden.scale"),
    "alpha 0": (config(lora_alpha=0), "lora_alpha"),
    "alpha text": (config(lora_alpha="16"), "lora_alpha"),
    "dropout -1": (config(lora_dropout=-1), "lora_dropout"),
    "dropout 2": (config(lora_dropout=2), "lora_dropout"),
    "parts outside": (layer(parts={"q": [0, 99]}), "deltas.q"),
    "name of a path": (lambda r: r.update(name="../x"), "record.name"),
    "absolute name": (lambda r: r.update(name="/tmp/x"), "record.name"),
    "layer of a path": (lambda r: r["plan"]["layers"].update({"../x": {}}), "plan.layers"),
    "no checksums": (lambda r: r.update(tensors=None), "record.tensors"),
    "other checksum": (lambda r: r["tensors"].update({A: "0" * 64}), "checksum"),
    "checksum short": (lambda r: r["tensors"].update({A: "00"}), "64 hexadecimal"),
    "place as a model": (lambda r: r["base"].update(name="local-dir:/etc"), "record.base.name"),
    "hub as a model": (lambda r: r["base"].update(name="hf-hub:a/b"), "record.base.name"),
    "path argument": (lambda r: r["base"]["args"].update(checkpoint_path="x"), "only sizes a model"),
    "config argument": (lambda r: r["base"]["args"].update(pretrained_cfg_overlay="x"), "only sizes a model"),
    "importable argument": (lambda r: r["base"]["args"].update(block={"class_path": "os.system"}), "args.block"),
    "class count": (lambda r: r.update(classes=["a", "b"]), "classes: 2 names for 3 outputs of fc"),
    "class not text": (lambda r: r.update(classes=["a", "b", 3]), "record.classes[2]"),
    "layer unknown": (lambda r: r["plan"]["values"].update({"ghost": {"weight": "saved"}}), "ghost"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_record_that_says_something_else_is_refused(case: str, tmp_path: Path) -> None:
    change, message = RECORDS[case]
    forge(saved(tmp_path), change)
    refused(tmp_path, str(tmp_path / WEIGHTS), message)


def test_an_unknown_field_tells_both_versions(tmp_path: Path) -> None:
    def later(record: dict[str, Any]) -> None:
        record["plan"]["config"]["new_maths"] = True
        record["versions"]["visionlora"] = "9.9"

    refused(forge(saved(tmp_path), later), "written by visionlora 9.9, this is")


def test_a_tampered_scale_is_found_by_the_checksum(tmp_path: Path) -> None:
    header, data = take_apart(saved(tmp_path, lora_alpha=8.0))
    text = header["__metadata__"]["visionlora"]
    header["__metadata__"]["visionlora"] = text.replace('"scale":4.0', '"scale":400.0')
    assert header["__metadata__"]["visionlora"] != text
    put_together(tmp_path, header, data)
    refused(tmp_path, "record: its checksum does not fit")


def test_another_backbone_is_named(tmp_path: Path) -> None:
    save_adapter(adapted(timm_model("test_vit")), tmp_path)
    refused(tmp_path, "test_vit", "test_vit2", "trained on", model=timm_model("test_vit2"), error=BaseMismatchError)
    refused(tmp_path, WEIGHTS, model=timm_model("test_vit4"), error=BaseMismatchError, allow_other_base=True)
    with pytest.raises(BaseMismatchError, match="load the adapter on that architecture") as caught:
        load_adapter(timm_model("test_resnet"), tmp_path)
    assert "allow_other_base" not in str(caught.value), "no way to go on"


@pytest.mark.parametrize("args", [{"output_stride": 8}, {"act_layer": "silu"}, {"global_pool": "max"}])
def test_the_same_weights_in_a_model_built_otherwise_are_refused(args: dict[str, Any], tmp_path: Path) -> None:
    weights = timm_model("test_resnet").state_dict()
    save_adapter(adapted(timm_model("test_resnet")), tmp_path)
    other = timm_model("test_resnet", **args)
    other.load_state_dict(weights)
    refused(tmp_path, "built otherwise", "timm.create_model", model=other, error=BaseMismatchError)
    load_adapter(other, tmp_path, allow_other_base=True)


def test_what_only_training_uses_does_not_count(tmp_path: Path) -> None:
    model = timm_model("test_vit", drop_rate=0.1, drop_path_rate=0.2, proj_drop_rate=0.1)
    model.load_state_dict(timm_model("test_vit").state_dict())
    save_adapter(adapted(model), tmp_path)
    load_adapter(timm_model("test_vit"), tmp_path)


def test_what_lies_beside_an_adapter_is_told_from_it(tmp_path: Path) -> None:
    saved(tmp_path / "runs/cam/adapter")
    run = tmp_path / "runs/cam"
    torch.save({"epoch": 1}, run / "last.ckpt")
    refused(run, f"the adapter of this run is {run / 'adapter'}")
    refused(run / "last.ckpt", f"fit --ckpt_path {run / 'last.ckpt'}", f"the adapter of this run is {run / 'adapter'}")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "model.safetensors").write_bytes(b"")
    refused(tmp_path / "full", "holds a whole model (mode full)", "load_model")


def test_an_adapter_is_not_written_onto_a_file(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("notes")
    with pytest.raises(ConfigError, match="is a file; give the directory"):
        save_adapter(adapted(net()), tmp_path / "adapter")
    assert (tmp_path / "adapter").read_text() == "notes"


def test_other_weights_of_equal_shape_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    refused(tmp_path, "allow_other_base=True", model=net(seed=1), error=BaseMismatchError)
    other = net(seed=1)
    load_adapter(other, tmp_path, allow_other_base=True)
    assert vl.active_adapters(other) == {"default": 1.0}


def test_another_type_tells_the_cure(tmp_path: Path) -> None:
    model = net().to(torch.bfloat16)
    refused(saved(tmp_path), "in float32 and cast", "torch.bfloat16", model=model, error=BaseMismatchError)


def test_another_class_count_shows_the_classes(tmp_path: Path) -> None:
    save_adapter(adapted(net(), target_modules=["hidden"]), tmp_path, classes=["bus", "car", "van"])
    words = ("3 classes (bus, car, van)", "num_classes=3", "with_head=False", "7")
    refused(tmp_path, *words, model=net(classes=7), error=BaseMismatchError)


def test_a_model_without_head_is_told_so(tmp_path: Path) -> None:
    model = net()
    model.fc = nn.Identity()
    refused(saved(tmp_path), "head fc", "with_head=False", model=model, error=BaseMismatchError)
    load_adapter(model, tmp_path, with_head=False)
    assert model(images()).shape == (2, 16)


def test_an_adapter_that_needs_the_head_it_was_trained_with_checks_it(tmp_path: Path) -> None:
    save_adapter(adapted(net(), target_modules=["hidden"], modules_to_save="none"), tmp_path)
    other = net()
    nn.init.ones_(other.fc.weight)
    refused(tmp_path, "another head", model=other, error=BaseMismatchError)
    load_adapter(net(), tmp_path)
    load_adapter(other, tmp_path, with_head=False)


def test_a_value_of_another_shape_is_refused(tmp_path: Path) -> None:
    save_adapter(adapted(net(), target_modules=["hidden"], modules_to_save=["stem"]), tmp_path)
    model = net()
    model.stem = nn.Conv2d(3, 8, 5, padding=2)
    refused(tmp_path, "stem/weight/value", "(8, 3, 5, 5)", model=model, error=BaseMismatchError, allow_other_base=True)


def test_the_same_name_twice_is_refused(tmp_path: Path) -> None:
    model = net()
    load_adapter(model, saved(tmp_path))
    refused(tmp_path, "already attached", model=model, error=StateError)


@pytest.mark.parametrize("name", ["../x", "/abs", "a.b", "", "a/b", "a" * 65, "base"])
def test_names_that_are_paths_are_refused(name: str, tmp_path: Path) -> None:
    error = StateError if name == "base" else ConfigError
    refused(saved(tmp_path), "name", model=net(), error=error, name=name)


def test_a_merged_model_takes_no_adapter(tmp_path: Path) -> None:
    model = adapted(net(), name="a", target_modules=["hidden"])
    vl.merge(model)
    with pytest.raises(StateError, match="unmerge"):
        load_adapter(model, saved(tmp_path))
    with pytest.raises(StateError, match="unmerge"):
        save_adapter(model, tmp_path / "b", name="a")


def test_an_adapter_cannot_change_another_adapter(tmp_path: Path) -> None:
    model = adapted(net(), name="a", target_modules=["hidden"])
    inner = "hidden.adapters.a.weight"
    saved(tmp_path, target_modules=["hidden"], modules_to_save=["stem"])

    def aim(record: dict[str, Any]) -> None:
        record["plan"]["values"][inner] = {"B": record["plan"]["values"].pop("stem")["weight"]}
        del record["tensors"]["base_model.model.stem.bias"], record["tensors"]["base_model.model.stem.weight"]

    forge(tmp_path, aim)
    refused(tmp_path, model=model, name="b")


def test_a_stripped_record_is_no_peft_adapter(tmp_path: Path) -> None:
    tensors = load_file(saved(tmp_path) / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS)
    refused(tmp_path, "__metadata__", "another tool")


def test_what_is_no_adapter_is_told_so(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "found nothing there")
    save_file({"base_model.model.hidden.lora_A.weight": torch.ones(2, 2)}, tmp_path / WEIGHTS)
    refused(tmp_path, PEFT_CONFIG, "neither")
    save_file({"conv1.weight": torch.ones(2, 2)}, tmp_path / WEIGHTS)
    refused(tmp_path, "a tensor name", "conv1.weight")
    (tmp_path / "dir" / WEIGHTS).mkdir(parents=True)
    refused(tmp_path / "dir", "Is a directory")


def peft(folder: Path, **changes: Any) -> Path:
    """Write what PEFT would for a rank-2 change of `hidden`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({A: torch.ones(2, 16), B: torch.ones(16, 2)}, folder / WEIGHTS, {"format": "pt"})
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["hidden"], **changes}
    (folder / PEFT_CONFIG).write_text(json.dumps(settings))
    return folder


PEFT_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "r 0": ({"r": 0}, "r: expected a whole number of at least 1, found 0"),
    "r -1": ({"r": -1}, "r: expected"),
    "r 2.5": ({"r": 2.5}, "r: expected"),
    "r text": ({"r": "8"}, "found '8'"),
    "r huge": ({"r": 10_000_000}, "expected 10000000 as recorded, found lora_A (2, 16)"),
    "r other": ({"r": 3}, "expected 3 as recorded"),
    "alpha 0": ({"lora_alpha": 0}, "lora_alpha: expected a finite number above 0"),
    "alpha NaN": ({"lora_alpha": float("nan")}, "NaN"),
    "alpha text": ({"lora_alpha": "8"}, "lora_alpha"),
    "dropout -1": ({"lora_dropout": -1}, "lora_dropout"),
    "dropout 2": ({"lora_dropout": 2}, "lora_dropout"),
    "unknown setting": ({"megascale": 3}, "'megascale': expected it to be off"),
    "unknown method": ({"peft_type": "MEGALORA"}, "peft_type: expected LORA, found 'MEGALORA'"),
    "other maths": ({"use_qalora": True}, "use_qalora"),
    "base changed": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "dora without magnitude": ({"use_dora": True}, "hidden/weight/m"),
    "regex": ({"alpha_pattern": {"(([a-z0-9_.])+)+!": 3}}, "alpha_pattern: expected plain layer names"),
    "regex class": ({"alpha_pattern": {"hidd\\w+": 3}}, "regular expression"),
    "pattern of alpha 0": ({"alpha_pattern": {"hidden": 0}}, "alpha_pattern.hidden"),
    "pattern of rank text": ({"rank_pattern": {"hidden": "2"}}, "rank_pattern.hidden"),
    "patterns as a list": ({"rank_pattern": ["hidden"]}, "rank_pattern"),
    "flag as text": ({"use_rslora": "yes"}, "use_rslora"),
    "modules as a number": ({"modules_to_save": 3}, "modules_to_save"),
}


@pytest.mark.parametrize("case", PEFT_FAULTS)
def test_a_peft_config_beyond_our_maths_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = PEFT_FAULTS[case]
    refused(peft(tmp_path, **changes), WEIGHTS, message)


@pytest.mark.parametrize(
    ("patterns", "scale"),
    [
        ({}, 2.0),
        ({"hidden": 6}, 3.0),
        ({"^hidden": 6}, 3.0),
        ({"h.dden": 6}, 3.0),
        ({"idden": 6}, 2.0),
        ({"other": 6, "hidden": 8}, 4.0),
        ({"hidden\\.": 6}, 2.0),
    ],
)
def test_peft_patterns_are_resolved_without_a_regex(patterns: dict[str, int], scale: float, tmp_path: Path) -> None:
    record = read_adapter(peft(tmp_path, alpha_pattern=patterns)).record
    assert record["plan"]["layers"]["hidden"]["scale"] == scale


def test_a_regex_in_target_modules_is_never_run(tmp_path: Path) -> None:
    hostile = "(([a-z0-9_.])+)+!"
    load_adapter(net(), peft(tmp_path / "peft", target_modules=hostile))
    forge(saved(tmp_path / "ours"), config(target_modules=hostile, rank_pattern={hostile: 2}, alpha_pattern={"(": 1.0}))
    model = net()
    load_adapter(model, tmp_path / "ours")
    assert record_of(tmp_path / "ours")["plan"]["config"]["target_modules"] == hostile


def test_a_peft_layer_the_model_does_not_have_is_named(tmp_path: Path) -> None:
    refused(peft(tmp_path), "no layer 'hidden'", model=timm_model("test_vit"), error=BaseMismatchError)
