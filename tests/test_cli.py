"""The command: verbs, help, errors in two lines, exit codes, and the verbs that need no trainer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from visionlora import LoraConfig, __version__
from visionlora.adapt import apply_lora
from visionlora.cli import VERBS, main
from visionlora.commands import arguments
from visionlora.data.folders import LAYOUTS
from visionlora.io import read_adapter, save_adapter
from visionlora.registry import adapter_parameters
from visionlora.vision.backbone import create_backbone, data_config
from visionlora.vision.loading import load_model

HEAVY = ("torch", "timm", "pytorch_lightning", "albumentations", "PIL", "numpy")


def modules_and_seconds_after(args: list[str]) -> tuple[list[str], float]:
    """Return which heavy modules a fresh process has loaded after `main(args)`, and its CPU seconds."""
    code = (
        "import sys, os; from visionlora.__main__ import main; main(sys.argv[1:]); t = os.times();"
        f"print('LOADED', t.user + t.system, *[m for m in {HEAVY} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True, timeout=60)
    seconds, *loaded = done.stdout.splitlines()[-1].removeprefix("LOADED ").split()
    return loaded, float(seconds)


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in VERBS)


def test_no_verb_shows_the_help_and_is_misuse(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "verbs:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"visionlora {__version__}\n"


def test_an_unknown_verb_gets_two_lines_and_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scnes", "out"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert 'did you mean "scenes"?' in lines[0]


@pytest.mark.parametrize("verb", [name for name, verb in VERBS.items() if verb.arguments])
def test_help_of_a_plain_verb_shows_its_options(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    assert f"usage: visionlora {verb}" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--per_clas", "--per_clas=3"])
def test_an_unknown_option_is_not_taken_for_an_abbreviation(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["scenes", str(tmp_path / "out"), option]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert 'did you mean "--per_class"?' in lines[0]
    assert not (tmp_path / "out").exists()


def test_a_missing_argument_gets_two_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert "out" in lines[0]


def test_debug_shows_the_traceback_and_keeps_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(tmp_path), "--size", "-1", "--debug"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert main(["scenes", str(tmp_path), "--size", "-1"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_file_system_error_is_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["scenes", str(tmp_path / "file" / "below")]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_ctrl_c_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background process ignores it
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        assert main(["scenes", str(tmp_path / "s"), "--per_class", "10000"]) == 130
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err.splitlines()[-1] == "visionlora: interrupted"


def test_scenes_writes_an_image_folder_and_completes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["scenes", str(tmp_path / "s"), "--domains", "day, night_tilted_test", "--size", "16", "--per_class", "2"]
    assert main([*words, "--test_per_class", "1"]) == 0
    assert "24 new images of 8 classes" in capsys.readouterr().out
    assert len(list((tmp_path / "s" / "day").glob("*/*.jpg"))) == 16
    assert main([*words, "--test_per_class", "1"]) == 0
    assert "0 new images" in capsys.readouterr().out


def test_scenes_names_the_nearest_domain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["scenes", str(tmp_path / "s"), "--domains", "nigth"]) == 2
    assert "night" in capsys.readouterr().err


def folder_of_images(root: Path, classes: tuple[str, ...] = ("cat", "dog"), each: int = 12) -> Path:
    """Write class folders of small random pictures."""
    rng = np.random.default_rng(0)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(each):
            Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def test_doctor_is_content_with_sound_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(folder_of_images(tmp_path / "data"))]) == 0
    assert "24 images" in capsys.readouterr().out


def test_doctor_ends_with_1_and_names_the_broken_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of_images(tmp_path / "data")
    (root / "dog" / "empty.jpg").touch()
    assert main(["doctor", str(root)]) == 1
    assert "empty.jpg" in capsys.readouterr().out


def test_doctor_names_an_image_that_is_too_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of_images(tmp_path / "data")
    Image.new("1", (9500, 9500)).save(root / "dog" / "vast.png")
    assert main(["doctor", str(root)]) == 1
    assert "vast.png: 9500 x 9500 pixels; at most" in " ".join(capsys.readouterr().out.split())


def test_doctor_reads_a_csv(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder_of_images(tmp_path / "data")
    rows = [f"{path},{path.parent.name}" for path in sorted(root.glob("*/*.png"))]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    assert main(["doctor", str(tmp_path / "list.csv")]) == 0
    assert main(["doctor", str(tmp_path / "none.csv")]) == 1
    assert "does not exist" in capsys.readouterr().out
    (tmp_path / "list.csv").write_text("\n".join(["path,label", "gone.png,cat", *rows, "lost.png,dog", rows[0]]))
    assert main(["doctor", str(tmp_path / "list.csv")]) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "line 2" in told
    assert "line 27" in told
    assert "listed more than once" in told
    assert "25 images examined" in told, "the others are examined all the same"


def test_doctor_offers_the_layouts_of_the_data_code() -> None:
    assert arguments.LAYOUTS == LAYOUTS


def test_info_lists_what_would_be_attached(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "test_vit", "--num_classes", "3", "--lora.r", "4"]) == 0
    shown = capsys.readouterr().out
    assert "preset of vision_transformer" in shown
    assert "blocks.0.attn.qkv   Linear  branched     4" in shown
    assert "(head, in full)" in shown
    assert "left alone" in shown


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--lora.rr", "4"], 'did you mean "lora.r"?'),
        (["--lora.variant=dorra"], 'did you mean "dora"?'),
        (["--lora.target_modules", "[conv1,conv2x]"], 'did you mean "conv2"?'),
        (["--lora.r", "0"], "r must be a whole number"),
        (["--lora.r"], "lora.r"),
    ],
)
def test_info_explains_a_wrong_lora_setting(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "test_resnet", *words]) == 2
    shown = capsys.readouterr().err
    assert hint in shown
    assert len(shown.splitlines()) <= 2


def test_info_names_the_nearest_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "test_resnt"]) == 2
    assert 'did you mean "test_resnet"?' in capsys.readouterr().err


def test_info_needs_an_adapter_or_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 2
    assert "--model NAME" in capsys.readouterr().err


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Path]:
    """Return the directory of an adapter with an effect, and the checkpoint of its base."""
    model = timm.create_model("test_resnet", num_classes=3)
    save_file(model.state_dict(), tmp_path / "base.safetensors")
    apply_lora(model, LoraConfig(r=2, norm="stats-affine"), name="night")
    for group in adapter_parameters(model, "night").values():
        for parameter in group.values():
            nn.init.normal_(parameter, std=0.3)
    data = {**data_config("test_resnet"), "crop_mode": "center"}
    save_adapter(model, tmp_path / "night", name="night", classes=["a", "b", "c"], data=data, metrics={"val/acc": 0.5})
    return tmp_path / "night", tmp_path / "base.safetensors"


def test_info_tells_what_is_in_an_adapter(adapter: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(adapter[0])]) == 0
    told = capsys.readouterr().out
    shown = {line.partition(" ")[0]: line for line in told[: told.index("\n\n")].splitlines()}
    assert shown["adapter"].split()[1] == "night"
    assert "test_resnet" in shown["base"]
    assert shown["classes"].endswith("3: a, b, c")
    assert "% of the base's" in shown["parameters"]
    assert "affine" in shown["norm"]
    assert "val/acc 0.5" in shown["metrics"]
    size = (adapter[0] / "adapter_model.safetensors").stat().st_size
    assert f"{size / 1000:.1f} kB" in shown["file"]


def test_info_lists_every_layer_and_the_counts_add_up(
    adapter: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info", str(adapter[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = lines[lines.index(next(line for line in lines if line.startswith("-----"))) + 1 :]
    file = read_adapter(adapter[0])
    assert len(rows) == len(file.record["plan"]["layers"])
    low_rank = sum(t.numel() for key, t in file.tensors.items() if key.endswith(("/A", "/B")))
    assert sum(int(row.split()[-1].replace(",", "")) for row in rows) == low_rank


def test_info_needs_a_class_to_count(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--model", "test_resnet", "--num_classes", "0"]) == 2
    assert "--num_classes must be at least 1" in capsys.readouterr().err


def test_info_names_a_missing_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_merge_writes_a_checkpoint_that_plain_timm_loads(
    adapter: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = adapter[0].parent / "merged.safetensors"
    assert main(["merge", str(adapter[0]), str(out), "--checkpoint", str(adapter[1])]) == 0
    assert "timm.create_model" in capsys.readouterr().out
    model = load_model(adapter[0], checkpoint=adapter[1])
    plain = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(out)).eval()
    base = timm.create_model("test_resnet", num_classes=3, checkpoint_path=str(adapter[1])).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), atol=1e-4, rtol=1e-4)
        assert (plain(x) - base(x)).abs().max() > 0.01  # else the merge could be empty


def test_merge_prints_the_very_call_that_builds_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = {"output_stride": 8, "pad_type": "same"}
    net = timm.create_model("mobilenetv2_035", num_classes=3, **args)
    save_file(net.state_dict(), tmp_path / "base.safetensors")
    apply_lora(net, LoraConfig(r=1, target_modules=["conv_head"]))
    save_adapter(net, tmp_path / "a", base={"name": "mobilenetv2_035", "args": args})
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(tmp_path / "a"), str(out), "--checkpoint", str(tmp_path / "base.safetensors")]) == 0
    exec(f"built = {capsys.readouterr().out.splitlines()[-1]}", names := {"timm": timm})
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(names["built"].eval()(x), net.eval()(x), atol=1e-4, rtol=1e-4)


def test_merge_tells_where_a_model_that_timm_lacks_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = apply_lora(create_backbone("scenes_resnet"), LoraConfig(r=1))
    save_adapter(net, tmp_path / "a")
    assert main(["merge", str(tmp_path / "a"), str(tmp_path / "merged.safetensors")]) == 0
    code = capsys.readouterr().out.splitlines()[-2:]
    script = f"import timm\n{code[0]}\nprint(type({code[1]}).__name__)"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "ResNet"


@pytest.mark.parametrize(
    "words", [["merge", "out.safetensors"], ["convert", "out", "--to", "peft"], ["combine", "--out", "out"]]
)
def test_an_adapter_in_its_run_needs_no_checkpoint(
    words: list[str], adapter: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(adapter[0].parent)
    Path("run").mkdir()
    adapter[0].rename("run/adapter")
    Path("run/config.yaml").write_text(f"model: {{model_name: test_resnet, checkpoint: {adapter[1].name}}}")
    assert main([words[0], "run/adapter", *words[1:]]) == 0
    assert list(Path().glob("out*"))


def test_merge_keeps_an_existing_file_unless_forced(
    adapter: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = adapter[0].parent / "merged.safetensors"
    out.write_text("mine")
    words = ["merge", str(adapter[0]), str(out), "--checkpoint", str(adapter[1])]
    assert main(words) == 2
    assert out.read_text() == "mine"
    assert "--force" in capsys.readouterr().err
    assert main([*words, "--force"]) == 0
    assert out.stat().st_size > 1000


def test_merge_of_the_wrong_base_writes_nothing(adapter: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    other = adapter[0].parent / "other.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), other)
    out = adapter[0].parent / "merged.safetensors"
    assert main(["merge", str(adapter[0]), str(out), "--checkpoint", str(other)]) == 2
    assert "trained on" in capsys.readouterr().err
    assert not out.exists()


def test_merge_writes_safetensors_only(adapter: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(adapter[0]), str(adapter[0].parent / "merged.pth")]) == 2
    assert ".safetensors" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("args", [["--help"], *([verb, "--help"] for verb, v in VERBS.items() if v.arguments)])
def test_help_is_quick_and_loads_nothing_heavy(args: list[str]) -> None:
    loaded, seconds = modules_and_seconds_after(args)
    assert loaded == []
    assert seconds < 0.5


@pytest.mark.slow
def test_the_module_runs_as_a_command() -> None:
    env = {**os.environ, "PYTHONWARNINGS": "error"}
    words = [sys.executable, "-m", "visionlora", "nonsense"]
    done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 2
    assert "there is no verb" in done.stderr
