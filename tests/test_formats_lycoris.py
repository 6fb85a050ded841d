"""The same file in LyCORIS and here gives the same outputs, in both directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from io_toy import adapted, timm_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from visionlora.errors import ConfigError
from visionlora.io.formats import difference, lycoris_tensors, put_on, read_lycoris
from visionlora.registry import adapter_plan

lycoris = pytest.importorskip("lycoris")


class Net(nn.Module):
    """Convolution, grouped convolution, pointwise convolution, GroupNorm, Linear: wide enough for every low rank."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.mix = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.one = nn.Conv2d(32, 24, 1)
        self.norm = nn.GroupNorm(2, 24)
        self.hidden = nn.Linear(24, 40)
        self.fc = nn.Linear(40, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.one(self.mix(self.stem(x).relu()).relu()))
        return self.fc(self.hidden(x.mean((2, 3))).relu())


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)))


def trained(path: Path, **config: Any) -> Tensor:
    """Save a network of LyCORIS whose every tensor differs from its start; return the outputs with it."""
    net = Net()
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d", "GroupNorm"]})
    network = lycoris.create_lycoris(net, 1.0, **{"linear_dim": 2, "linear_alpha": 3, "preset": "full", **config})
    network.apply_to()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    y = outputs(net)
    save_file({key: t.detach().clone().contiguous() for key, t in network.state_dict().items()}, path)
    return y


def close(x: Tensor, y: Tensor) -> bool:
    return bool((x - y).abs().max() <= 1e-5 * y.abs().max())


# settings of LyCORIS, and the variant of ours that the file becomes
SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "lora": ({"algo": "lora"}, "lora"),
    "rank-stabilised": ({"algo": "lora", "rs_lora": True}, "lora"),
    "a trained scalar": ({"algo": "lora", "use_scalar": True}, "lora"),
    "normalisation": ({"algo": "lora", "train_norm": True}, "lora"),
    "tucker beside lora": ({"algo": "lora", "use_tucker": True}, "lora"),
    "dora": ({"algo": "lora", "dora_wd": True}, "dora"),
    "loha": ({"algo": "loha"}, "loha"),
    "loha with cores": ({"algo": "loha", "use_tucker": True}, "loha"),
    "loha as dora": ({"algo": "loha", "dora_wd": True}, "dora"),
    "lokr": ({"algo": "lokr"}, "lokr"),
    "lokr of a factor": ({"algo": "lokr", "factor": 4}, "lokr"),
    "lokr, low rank": ({"algo": "lokr", "linear_dim": 1, "factor": 2}, "lokr"),
    "lokr, low rank with cores": ({"algo": "lokr", "linear_dim": 1, "factor": 2, "use_tucker": True}, "lokr"),
    "lokr of two low ranks": ({"algo": "lokr", "linear_dim": 1, "decompose_both": True}, "lokr"),
    "lokr of whole matrices": ({"algo": "lokr", "full_matrix": True}, "lokr"),
    "lokr, unbalanced": ({"algo": "lokr", "unbalanced_factorization": True}, "lora"),
    "lokr as dora": ({"algo": "lokr", "dora_wd": True}, "dora"),
    "full": ({"algo": "full"}, "lora"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_we_compute_what_lycoris_trained(setting: str, tmp_path: Path) -> None:
    config, variant = SETTINGS[setting]
    y, fresh = trained(tmp_path / "a.safetensors", **config), Net()
    assert (outputs(fresh) - y).abs().max() > 1e-3
    put_on(fresh, read_lycoris(fresh, tmp_path / "a.safetensors"))
    assert close(outputs(fresh), y)
    assert adapter_plan(fresh, "default").config.variant == variant


def test_a_magnitude_of_inputs_is_approximated_on_request(tmp_path: Path) -> None:
    y = trained(tmp_path / "a.safetensors", algo="lora", dora_wd=True, wd_on_output=False)
    errors = []
    for rank in (4, 40):
        fresh = Net()
        found = put_on(fresh, read_lycoris(fresh, tmp_path / "a.safetensors"), rank=rank)
        assert found.keys() == {"stem", "mix", "one", "hidden", "fc"}
        errors.append(float((outputs(fresh) - y).abs().max()))
    assert errors[1] < 1e-6 < errors[0]


WRITTEN: dict[str, dict[str, Any]] = {
    "lora": {},
    "fa": {"variant": "fa"},
    "dora": {"variant": "dora"},
    "loha": {"variant": "loha"},
    "lokr": {"variant": "lokr"},
    "lokr of a factor": {"variant": "lokr", "r": 1, "decompose_factor": 2},
    "tucker": {"variant": "tucker"},
    "up": {"variant": "up"},
    "spatial": {"variant": "spatial"},
    "vera": {"variant": "vera"},
    "ia3": {"variant": "ia3"},
    "normalisation": {"norm": "affine"},
    "normalisation and biases": {"norm": "affine", "bias": "all"},
}


@pytest.mark.parametrize("case", WRITTEN)
def test_lycoris_computes_what_we_wrote(case: str, tmp_path: Path) -> None:
    targets = ["stem", "one", "hidden"] if case not in ("tucker", "spatial") else ["stem"]
    model = adapted(Net(), **{"target_modules": targets, "norm": "frozen", "bias": "none", **WRITTEN[case]})
    for layer in (model.get_submodule(name) for name in targets):
        if "bias" in layer.adapters["default"]:  # beside factors LyCORIS has no place for a bias
            layer.adapters["default"]["bias"].value.data.copy_(layer.base_tensor("bias"))
    y, base = outputs(model), outputs(Net())
    save_file(lycoris_tensors(model, "default").tensors, tmp_path / "a.safetensors")
    theirs = Net()
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "a.safetensors"), theirs)
    network.apply_to()
    assert (y - base).abs().max() > 1e-3
    assert close(outputs(theirs), y)


@pytest.mark.parametrize("case", [*WRITTEN, "parts", "groups", "parts of loha", "groups and dora"])
def test_what_we_wrote_comes_back_as_it_was(case: str, tmp_path: Path) -> None:
    special = {
        "parts": (vit, {"target_modules": ["attn.qkv[q,v]"]}),
        "parts of loha": (vit, {"target_modules": ["attn.qkv[q,v]"], "variant": "loha"}),
        "spatial": (Net, {"target_modules": ["stem"], "variant": "spatial"}),
        "groups": (Net, {"target_modules": ["mix", "stem"]}),
        "groups and dora": (Net, {"target_modules": ["mix", "stem"], "variant": "dora"}),
    }
    make, config = special.get(case) or (Net, {"target_modules": ["stem", "one", "hidden"], **WRITTEN.get(case, {})})
    model, again = adapted(make(), **{"norm": "frozen", "bias": "none", "modules_to_save": "none", **config}), make()
    content = lycoris_tensors(model, "default", prefix="lora_unet")
    save_file(content.tensors, tmp_path / "a.safetensors")
    put_on(again, read_lycoris(again, tmp_path / "a.safetensors", prefix="lora_unet"))
    lost = difference(model, "default", again, "default")[0]
    # the same numbers under other names are the same change; what has no names there is decomposed or rounded once
    assert lost < (1e-6 if content.decomposed or case in ("lokr", "ia3") or case.startswith("normalisation") else 1e-15)


def vit() -> nn.Module:
    return timm_model("test_vit", img_size=64)


def test_every_tensor_has_the_name_and_shape_that_lycoris_gives_it(tmp_path: Path) -> None:
    for setting in ("lora", "loha", "lokr", "dora"):
        trained(tmp_path / "a.safetensors", **SETTINGS[setting][0])
        theirs, fresh = load_file(tmp_path / "a.safetensors"), Net()
        put_on(fresh, read_lycoris(fresh, tmp_path / "a.safetensors"))
        ours = lycoris_tensors(fresh, "default").tensors
        shapes = {key: tuple(t.shape) for key, t in theirs.items() if "mix" not in key}
        assert {key: tuple(t.shape) for key, t in ours.items() if "mix" not in key} == shapes


def test_a_change_without_names_is_written_in_full_or_approximated(tmp_path: Path) -> None:
    model = adapted(
        Net(), variant="spatial", target_modules=["mix"], norm="frozen", bias="none", modules_to_save="none"
    )
    assert lycoris_tensors(model, "default").tensors.keys() == {"lycoris_mix.diff"}
    content = lycoris_tensors(model, "default", rank=2)
    assert content.tensors["lycoris_mix.lora_down.weight"].shape == (4, 8, 3, 3)
    assert 0 < content.decomposed["mix"].error < content.decomposed["mix"].norm


@pytest.mark.parametrize(
    ("make", "config", "reason"),
    [
        (lambda: timm_model("test_resnet"), {"norm": "stats"}, "running_mean"),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4)), {"target_modules": ["0"], "r": 1}, "no Linear"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_with_the_reason(make: Any, config: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        lycoris_tensors(adapted(make(), **{"norm": "frozen", "bias": "none", **config}), "default")


def test_what_lycoris_leaves_out_is_told() -> None:
    plans = {
        "BatchNorm": (timm_model("test_resnet"), {"bias": "all"}),
        "biases": (Net(), {"target_modules": ["hidden"], "bias": "lora_only"}),
    }
    for word, (model, config) in plans.items():
        (note,) = lycoris_tensors(adapted(model, **config), "default").notes
        assert word in note
    quiet = adapted(Net(), target_modules=["hidden"], norm="affine", bias="none")
    assert lycoris_tensors(quiet, "default").notes == []


def test_a_bias_alone_comes_back_alone(tmp_path: Path) -> None:
    model, again = adapted(Net(), target_modules=["hidden"], bias="all"), Net()
    tensors = lycoris_tensors(model, "default").tensors
    assert not tensors["lycoris_stem.diff"].any()
    assert not tensors["lycoris_norm.w_norm"].any()
    assert "lycoris_hidden.diff" not in tensors
    save_file(tensors, tmp_path / "a.safetensors")
    put_on(again, read_lycoris(again, tmp_path / "a.safetensors"))
    roles = adapter_plan(again, "default").values
    assert roles.pop("fc") == {"weight": "head", "bias": "head"}
    assert set(roles) == {"stem", "mix", "one", "norm", "hidden"}
    assert all(own == {"bias": "bias"} for own in roles.values())


def test_layers_that_are_written_alike_are_refused() -> None:
    model = nn.ModuleDict({"a_b": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
    adapted(model, target_modules=["a_b"], norm="frozen", bias="none", r=1)
    with pytest.raises(ConfigError, match="cannot tell them apart"):
        lycoris_tensors(model, "default")
