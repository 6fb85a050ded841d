"""Preprocessing agrees with timm; random changes repeat by seed and are named in plain data."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

from visionlora.data.augment import PRESETS, build_augment
from visionlora.data.transforms import InputConfig, Preprocess, input_config
from visionlora.errors import ConfigError, DataError, ImageError


def picture(width: int = 50, height: int = 36, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 2, width // 2, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18", "mobilenetv2_100.ra_in1k", "convnext_atto"])
def test_the_evaluation_transform_is_timms(name: str) -> None:
    known = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    expected = create_transform(**known, is_training=False)(picture(300, 200))
    torch.testing.assert_close(Preprocess(input_config(known))(picture(300, 200)), expected)


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(24, 24), (20, 28)])
def test_every_crop_mode_and_channel_count_is_timms(crop_mode: str, mode: str, size: tuple[int, int]) -> None:
    in_chans = len(mode) // 3 * 2 + 1
    config = input_config(image_size=size, crop_mode=crop_mode, crop_pct=0.8, in_chans=in_chans)
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in config.to_dict().items()}
    expected = create_transform(**options, is_training=False)(picture(mode=mode))
    got = Preprocess(config)(picture(mode=mode))
    assert got.shape == (in_chans, *size)
    torch.testing.assert_close(got, expected)


def test_given_arguments_win_over_what_is_known() -> None:
    known = {"input_size": [3, 64, 48], "mean": [0.5, 0.5, 0.5], "std": [0.4, 0.4, 0.4], "crop_pct": 0.9}
    config = input_config(known, mean=[0.1, 0.2, 0.3], interpolation="bilinear")
    assert (config.input_size, config.mean, config.std) == ((3, 64, 48), (0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    assert (config.interpolation, config.crop_pct) == ("bilinear", 0.9)
    assert input_config(config.to_dict()) == config


def test_statistics_follow_the_channels() -> None:
    assert input_config(mean=[0.1, 0.2, 0.6], std=[0.5], in_chans=1).mean == (pytest.approx(0.3),)
    assert input_config(mean=[0.5], std=[0.5]).mean == (0.5, 0.5, 0.5)
    with pytest.raises(ConfigError, match="mean needs 3 finite values"):
        input_config(mean=[0.5, 0.5])


@pytest.mark.parametrize(
    "wrong", [{"image_size": 0}, {"image_size": [1, 2, 3]}, {"crop_pct": 0.0}, {"crop_pct": 1.5}, {"std": [0.0]},
              {"mean": [float("nan")]}, {"interpolation": "bicubc"}, {"crop_mode": "centre"}, {"in_chans": 4}]
)  # fmt: skip
def test_impossible_inputs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        input_config(**wrong)


def test_a_strip_is_refused_before_it_is_enlarged() -> None:
    with pytest.raises(ImageError, match="too narrow"):
        Preprocess(InputConfig())(Image.new("RGB", (1, 20_000)))


def test_input_config_is_plain_data() -> None:
    assert input_config(image_size=32).to_dict()["input_size"] == [3, 32, 32]


def preprocess(augment: Any, in_chans: int = 3, size: int = 32) -> Preprocess:
    return Preprocess(input_config(image_size=size, in_chans=in_chans), augment=build_augment(augment), seed=7)


@pytest.mark.parametrize("preset", ["light", "surveillance"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [12, 64])
def test_presets_change_pictures_and_repeat_by_draw(preset: str, mode: str, size: int) -> None:
    image = picture(mode=mode)
    first, second = preprocess(preset, len(mode) // 3 * 2 + 1, size), preprocess(preset, len(mode) // 3 * 2 + 1, size)
    draws = [(epoch, index) for epoch in range(2) for index in range(40)]
    changed = [first(image, draw) for draw in draws]
    again = [second(image, draw) for draw in reversed(draws)][::-1]  # another object, another order
    assert all(torch.equal(a, b) for a, b in zip(changed, again, strict=True))
    assert len({tuple(c.flatten().tolist()) for c in changed}) > 60
    assert changed[0].shape == (len(mode) // 3 * 2 + 1, size, size)


def test_no_draw_means_no_change() -> None:
    assert torch.equal(preprocess("surveillance")(picture()), preprocess("none")(picture()))
    assert torch.equal(preprocess("none")(picture(), (0, 0)), preprocess("none")(picture()))


def test_the_seed_changes_the_change() -> None:
    config, augment = input_config(image_size=32), build_augment("surveillance")
    a, b = (Preprocess(config, augment=augment, seed=seed) for seed in (0, 1))
    assert not all(torch.equal(a(picture(), (0, i)), b(picture(), (0, i))) for i in range(8))


def test_a_pickled_transform_gives_the_same() -> None:
    original = preprocess("surveillance")
    copy = pickle.loads(pickle.dumps(original))
    assert all(torch.equal(original(picture(), (0, i)), copy(picture(), (0, i))) for i in range(8))


def test_a_list_of_one_transform_does_just_that() -> None:
    got = preprocess([{"name": "HorizontalFlip", "p": 1.0}])(picture(), (0, 0))
    assert torch.equal(got, preprocess("none")(picture()).flip(-1))


def test_every_transform_of_the_presets_may_be_left_out_or_kept_alone() -> None:
    for entries in PRESETS.values():
        for entry in entries:
            got = preprocess([{**entry, "p": 1.0}])(picture(), (0, 0))
            assert not torch.equal(got, preprocess("none")(picture())), entry


@pytest.mark.parametrize(
    ("augment", "message"),
    [
        ("ligth", 'did you mean "light"'),
        ([{"name": "RandomGama"}], 'no transform .*did you mean "RandomGamma"'),
        ([{"name": "Lambda"}], "no transform 'Lambda'"),
        ([{"name": "os"}], "no transform"),
        ([{"name": "RandomGamma", "gama_limit": [60, 140]}], 'no argument .*did you mean "gamma_limit"'),
        ([{"name": "RandomGamma", "gamma_limit": "much"}], "RandomGamma: gamma_limit"),
        ([{"name": "RandomGamma", "p": 2}], "RandomGamma: p"),
        ([{"name": "ImageCompression", "quality_range": [90, 35]}], "ImageCompression"),
        ([{"name": "OneOf", "transforms": [{"name": "Blurr"}]}], 'did you mean "Blur"'),
        ([{"RandomGamma": {"p": 1}}], "expected {name: RandomGamma"),
        (["RandomGamma"], "expected {name: RandomGamma"),
    ],
)
def test_wrong_augmentations_are_errors(augment: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build_augment(augment)


def test_a_transform_that_changes_the_shape_is_an_error() -> None:
    with pytest.raises(DataError, match=r"must keep shape.*\(8, 8, 3\)"):
        preprocess([{"name": "Resize", "height": 8, "width": 8}])(picture(), (0, 0))


def test_a_transform_that_fails_is_a_data_error() -> None:
    with pytest.raises(DataError, match="augment fails on a picture of shape"):
        preprocess([{"name": "RandomCrop", "height": 99, "width": 99, "p": 1.0}])(picture(), (0, 0))
