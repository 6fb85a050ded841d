"""Generated scenes: same seed same bytes, conditions that differ, an image folder, a backbone that knows them."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from visionlora.data.scenes import CAMERAS, CLASSES, CONDITIONS, DOMAINS, Camera, render, write_scenes
from visionlora.data.scenes.camera import aim, draw_camera
from visionlora.data.scenes.raycast import cast, shadow
from visionlora.data.scenes.solids import Material, box, ellipsoid, limb, pole, wheel
from visionlora.data.scenes.street import draw_street
from visionlora.data.scenes.weather import Light
from visionlora.errors import ConfigError, DataError
from visionlora.vision import scenes_backbone

SOLIDS = {
    "box": box((1, 2, 3), (2, 1, 3), Material()),
    "ellipsoid": ellipsoid((0.5, 0, 1), (1, 2, 0.5), Material()),
    "wheel": wheel((0, 1, 0.5), 0.7, 0.4, Material()),
    "tube": wheel((0, 1, 0.5), 0.7, 0.4, Material(), hole=0.8),
    "pole": pole((0, 0, 0), (1, 1, 2), 0.4, Material()),
    "limb": limb((0, 0, 0), (1, -1, 2), 0.4, Material()),
}


def _pictures(condition: str, camera: str, count: int = 16) -> np.ndarray:
    return np.stack([render(CLASSES[i % len(CLASSES)], condition, camera, i, 32) for i in range(count)]) / 255.0


@pytest.mark.parametrize("name", SOLIDS)
def test_entry_and_exit_agree_with_marching_along_the_ray(name: str) -> None:
    solid, rng = SOLIDS[name], np.random.default_rng(0)
    middle = solid.corners.mean(1, keepdims=True)
    origin = (middle + np.array([[4], [-5], [3]])).astype(np.float32)
    rays = (middle + rng.uniform(-1, 1, (3, 200)) - origin).astype(np.float32)
    near, far = solid.interval(origin, rays)
    steps = np.linspace(0.3, 1.7, 2001)
    local = np.stack([solid.local(origin + rays * step) for step in steps])  # (steps, 3, n)
    inside = (np.einsum("kc,scn->skn", solid.planes[:, :3], local) <= solid.planes[None, :, 3:]).all(1)
    if solid.quadric.any():
        bulge = (solid.quadric[None, :, None] * local**2).sum(1)
        inside &= (bulge <= 1) & (bulge >= solid.hole**2)
    first = np.where(inside.any(0), steps[inside.argmax(0)], np.inf)
    clear = np.abs(far - near) > 0.01  # a ray that only grazes is decided by rounding
    assert 30 < np.isfinite(first).sum() < 200
    np.testing.assert_array_equal(np.isfinite(first)[clear], (near < far)[clear])
    both = np.isfinite(first) & clear
    np.testing.assert_allclose(near[both], first[both], atol=2e-3)


@pytest.mark.parametrize("name", SOLIDS)
def test_normals_are_unit_and_face_the_ray(name: str) -> None:
    solid, rng = SOLIDS[name], np.random.default_rng(1)
    middle = solid.corners.mean(1, keepdims=True)
    origin = (middle + np.array([[-6], [2], [4]])).astype(np.float32)
    rays = (middle + rng.uniform(-0.9, 0.9, (3, 300)) - origin).astype(np.float32)
    near, far = solid.interval(origin, rays)
    hit = near < far - 0.02
    normals = solid.normals(solid.local(origin + near[hit] * rays[:, hit]))
    assert hit.sum() > 30
    np.testing.assert_allclose(np.linalg.norm(normals, axis=0), 1, atol=1e-4)
    assert ((normals * rays[:, hit]).sum(0) < 1e-3).mean() > 0.99


def test_a_box_throws_its_shadow_away_from_the_sun() -> None:
    cube = box((0, 0, 1), (1, 1, 2), Material())
    view = aim(Camera(20, 60), cube.corners, 0.2, np.zeros(2), 64)
    hits = cast(view, view.rays(), [cube])
    up = np.zeros_like(hits.points)
    up[2] = 1
    dark = shadow(view, hits, up, [cube], Light((1, 0, 1, 0), (1, 1, 1))) & (hits.owner == -1)
    x, y = hits.points[0][dark], hits.points[1][dark]
    assert dark.sum() > 20
    assert x.max() < 0.6
    assert x.min() == pytest.approx(-2.5, abs=0.25)  # two metres high under a sun at 45 degrees
    assert np.abs(y).max() < 0.6


def test_the_level_camera_sees_the_sky_and_the_tilted_one_the_street() -> None:
    corners, rng = box((0, 0, 1.5), (11, 2.5, 3), Material()).corners, np.random.default_rng(0)
    views = {m: [aim(draw_camera(m, rng), corners, 0.7, np.zeros(2), 32) for _ in range(20)] for m in CAMERAS}
    sky = {m: np.mean([(view.rays()[2] > 0).mean() for view in seen]) for m, seen in views.items()}
    assert sky["level"] > 0.1
    assert sky["tilted"] < 0.01


def test_pitch_is_the_angle_below_the_horizontal() -> None:
    forward = aim(Camera(6, 30, 90), box((0, 0, 1), (1, 1, 2), Material()).corners, 0.5, np.zeros(2), 32).axes[2]
    np.testing.assert_allclose(forward, [0, np.cos(np.pi / 6), -0.5], atol=1e-6)


def test_roll_turns_the_horizon() -> None:
    corners = box((0, 0, 0.75), (4, 1.8, 1.5), Material()).corners
    up = aim(Camera(4, 5, roll=20), corners, 0.3, np.zeros(2), 64).rays()[2] > 0
    assert abs(int(up[:, 0].sum()) - int(up[:, -1].sum())) > 15


def test_the_object_fills_the_asked_share_of_the_picture() -> None:
    solid = ellipsoid((0, 0, 1), (2, 1, 1), Material())
    for camera in (Camera(3, 5, 40), Camera(9, 55, 120, 20)):
        view = aim(camera, solid.corners, 0.8, np.zeros(2), 100)
        rows, columns = view.window(solid.corners) or (slice(0), slice(0))
        assert max(rows.stop - rows.start, columns.stop - columns.start) == pytest.approx(80, abs=2)


@pytest.mark.parametrize("camera", CAMERAS)
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_class_gives_a_distinct_picture_with_content(condition: str, camera: str) -> None:
    pictures = [render(klass, condition, camera, 3, 48) for klass in CLASSES]
    assert all(p.shape == (48, 48, 3) and p.dtype == np.uint8 for p in pictures)
    assert all(p.std() > 4 and 4 < p.mean() < 250 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == len(CLASSES)


def test_night_is_darker_and_fog_flatter_than_day_and_infrared_is_grey() -> None:
    day, night, fog, infrared = (_pictures(c, "level") for c in ("day", "night", "fog", "infrared"))
    assert night.mean() < 0.6 * day.mean()
    assert np.median(fog.std((1, 2, 3))) < 0.5 * np.median(day.std((1, 2, 3)))
    assert np.ptp(infrared, axis=3).max() == 0
    assert np.ptp(day, axis=3).mean() > 0.05


def test_sensor_noise_shows_between_neighbours() -> None:
    day, noisy = (np.abs(np.diff(_pictures(c, "tilted", 8), axis=2)).mean() for c in ("day", "noisy"))
    assert noisy > 1.3 * day


def test_lighting_and_camera_are_independent() -> None:
    pictures = {(c, m): render("car", c, m, 5, 32).tobytes() for c in ("day", "night") for m in CAMERAS}
    assert len(set(pictures.values())) == 4
    assert render("car", "day", Camera(5, 20, 60), 5, 32).tobytes() not in pictures.values()


def test_the_same_seed_gives_the_same_bytes_in_another_process() -> None:
    code = (
        "import hashlib; from visionlora.data.scenes import render;"
        "print(hashlib.sha256(render('bus', 'rain', 'tilted', 7, 32).tobytes()).hexdigest(), end='')"
    )
    there = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout for _ in range(2)]
    render("dog", "day", "level", 1, 16)  # what was drawn before must not matter
    here = hashlib.sha256(render("bus", "rain", "tilted", 7, 32).tobytes()).hexdigest()
    assert there == [here.encode()] * 2
    assert render("bus", "rain", "tilted", 8, 32).tobytes() != render("bus", "rain", "tilted", 7, 32).tobytes()


@pytest.mark.parametrize(
    ("kwargs", "hint"),
    [
        ({"klass": "buss"}, 'did you mean "bus"'),
        ({"condition": "nigth"}, 'did you mean "night"'),
        ({"camera": "tilt"}, 'did you mean "tilted"'),
        ({"size": 4}, "16 to 1024"),
    ],
)
def test_render_refuses_what_it_does_not_know(kwargs: dict[str, object], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        render(**{"klass": "car", "condition": "day", "camera": "level", "seed": 0, "size": 32, **kwargs})  # type: ignore[arg-type]


@pytest.mark.parametrize("kwargs", [{"pitch": 0}, {"pitch": 90}, {"height": 1}])
def test_a_camera_that_cannot_see_the_street_is_refused(kwargs: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="Camera"):
        Camera(**{"height": 5, "pitch": 20, **kwargs})


def test_ground_at_the_horizon_has_a_colour() -> None:
    street = draw_street(np.random.default_rng(0), on_pavement=False)
    far = np.array([0, 1e4, 1e9, -1e12, 1e30], np.float32)
    assert np.isfinite(street.ground(far, far[::-1])).all()


def test_write_scenes_makes_an_image_folder(tmp_path: Path) -> None:
    seen: list[Path] = []
    written = write_scenes(
        tmp_path / "s", domains=["day", "fog_tilted_test"], per_class=2, test_per_class=1, size=16, on_image=seen.append
    )
    files = sorted(p.relative_to(tmp_path / "s").as_posix() for p in (tmp_path / "s").rglob("*.jpg"))
    wanted = [f"day/{k}/000{i}.jpg" for k in CLASSES for i in range(2)]
    assert files == sorted([*wanted, *(f"fog_tilted_test/{k}/0000.jpg" for k in CLASSES)])
    assert written == len(seen) == 3 * len(CLASSES)
    with Image.open(seen[0]) as picture:
        assert (picture.size, picture.mode) == ((16, 16), "RGB")
    assert [p.name for p in (tmp_path / "s").rglob(".*")] == [".scenes.json"], "a half-written file was left"


def test_train_and_test_domains_share_no_picture(tmp_path: Path) -> None:
    write_scenes(tmp_path, domains=["day", "day_test"], per_class=3, test_per_class=3, size=16)
    files = list(tmp_path.rglob("*.jpg"))
    assert len({p.read_bytes() for p in files}) == len(files) == 6 * len(CLASSES)


def test_files_do_not_depend_on_the_order_of_the_domains_or_on_the_counts(tmp_path: Path) -> None:
    write_scenes(tmp_path / "a", domains=["day", "night"], per_class=2, size=16)
    write_scenes(tmp_path / "b", domains=["night"], per_class=1, size=16)
    for path in (tmp_path / "b" / "night").rglob("*.jpg"):
        assert path.read_bytes() == (tmp_path / "a" / path.relative_to(tmp_path / "b")).read_bytes()


def test_a_broken_off_folder_is_completed_and_the_rest_left_alone(tmp_path: Path) -> None:
    def go(per_class: int) -> int:
        return write_scenes(tmp_path, domains=["dusk"], per_class=per_class, size=16)

    assert go(2) == 2 * len(CLASSES)
    gone, empty, kept = (tmp_path / "dusk" / name for name in ("car/0000.jpg", "van/0001.jpg", "bus/0000.jpg"))
    before = {p: p.read_bytes() for p in (gone, empty, kept)}
    gone.unlink()
    empty.write_bytes(b"")
    gone.with_name(".0000.jpg.part").write_bytes(b"half a pic")
    stamp = kept.stat().st_mtime_ns
    assert go(2) == 2
    assert {p: p.read_bytes() for p in before} == before
    assert kept.stat().st_mtime_ns == stamp
    assert not gone.with_name(".0000.jpg.part").exists()
    assert go(2) == 0
    assert go(3) == len(CLASSES)


def test_a_foreign_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "holiday.txt").write_text("mine")
    with pytest.raises(DataError, match="already holds other files"):
        write_scenes(tmp_path, domains=["day"], per_class=1, size=16)
    assert [p.name for p in tmp_path.iterdir()] == ["holiday.txt"]
    with pytest.raises(DataError, match="is a file"):
        write_scenes(tmp_path / "holiday.txt", domains=["day"], per_class=1, size=16)


@pytest.mark.parametrize("change", [{"seed": 1}, {"size": 32}])
def test_a_folder_of_other_scenes_is_refused(tmp_path: Path, change: dict[str, int]) -> None:
    write_scenes(tmp_path, domains=["day"], per_class=1, size=16)
    with pytest.raises(DataError, match="holds scenes of"):
        write_scenes(tmp_path, **{"domains": ["day"], "per_class": 1, "size": 16, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("record", ["not json", "[]", json.dumps({"format": 99, "seed": 0, "size": 16})])
def test_a_strange_record_is_refused(tmp_path: Path, record: str) -> None:
    (tmp_path / ".scenes.json").write_text(record)
    with pytest.raises(DataError, match="choose an empty or a new folder"):
        write_scenes(tmp_path, domains=["day"], per_class=1, size=16)


@pytest.mark.parametrize(
    ("kwargs", "hint"),
    [
        ({"domains": ["day", "night_titled"]}, 'did you mean "night_tilted"'),
        ({"domains": []}, "at least one"),
        ({"domains": "day"}, "must be a list"),
        ({"domains": ["../day"]}, "domain must be one of"),
        ({"per_class": 0}, "per_class"),
        ({"seed": -1}, "seed"),
    ],
)
def test_write_scenes_refuses_bad_settings_before_it_writes(
    tmp_path: Path, kwargs: dict[str, object], hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        write_scenes(tmp_path / "s", **{"domains": ["day"], "per_class": 1, "size": 16, **kwargs})  # type: ignore[arg-type]
    assert not (tmp_path / "s").exists()


def test_there_is_a_domain_for_every_condition_camera_and_half() -> None:
    assert len(DOMAINS) == len(CONDITIONS) * len(CAMERAS) * 2
    tilted = DOMAINS["night_tilted_test"]
    assert (tilted.condition, tilted.camera, tilted.held_out) == ("night", "tilted", True)


def test_the_shipped_backbone_is_small_and_described() -> None:
    assert scenes_backbone.WEIGHTS.stat().st_size <= 2 * 2**20
    described = timm.get_pretrained_cfg("scenes_resnet")
    assert described.num_classes == len(described.label_names) == len(CLASSES)
    assert described.input_size == (3, 64, 64)
    model = timm.create_model("scenes_resnet")
    assert model.get_submodule(described.first_conv).weight.shape[1] == 3
    assert model.get_submodule(described.classifier).out_features == len(CLASSES)


def test_the_shipped_backbone_loads_and_recognises_fresh_day_pictures_better_than_night_ones() -> None:
    model = timm.create_model("scenes_resnet", pretrained=True).eval()
    right = {
        condition: _accuracy(model, condition, camera) for condition, camera in (("day", "level"), ("night", "tilted"))
    }
    assert right["day"] >= 0.85
    assert right["night"] <= right["day"] - 0.15  # what an adapter is there to win


def test_another_head_and_features_come_from_the_same_weights() -> None:
    whole = timm.create_model("scenes_resnet", pretrained=True).eval()
    five = timm.create_model("scenes_resnet", pretrained=True, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    assert five(x).shape == (2, 5)
    torch.testing.assert_close(five.forward_features(x), whole.forward_features(x))


@torch.inference_mode()
def _accuracy(model: torch.nn.Module, condition: str, camera: str) -> float:
    labels = torch.arange(64) % len(CLASSES)
    pictures = np.stack([render(CLASSES[k], condition, camera, 10**6 + i, 64) for i, k in enumerate(labels.tolist())])
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
    return (model(images).argmax(1) == labels).float().mean().item()
