"""Small models and files for the tests of adapter files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn

import visionlora as vl
from visionlora.core.digest import tensor_digest
from visionlora.io.read import WEIGHTS
from visionlora.registry import adapted_layers


class Net(nn.Module):
    """Convolution, grouped convolution, BatchNorm and a head, without timm."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.mix = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.hidden = nn.Linear(16, 16)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.bn(self.stem(x)).relu()).relu().mean((2, 3))
        return self.fc(self.hidden(x).relu())


def net(seed: int = 0, **args: Any) -> nn.Module:
    torch.manual_seed(seed)
    return Net(**args).eval()


def resnext(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return ResNet(Bottleneck, (1, 1, 1, 1), 4, cardinality=4, base_width=8, zero_init_last=False).eval()


def timm_model(name: str, seed: int = 0, **args: Any) -> nn.Module:
    torch.manual_seed(seed)
    model = timm.create_model(name, num_classes=4, **args).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)  # timm starts the last one of a block at 0, which hides every change
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "net": (net, {"target_modules": ["hidden", "stem"], "norm": "stats-affine"}),
    "vit": (lambda: timm_model("test_vit", img_size=64), {}),
    "vit parts": (lambda: timm_model("test_vit", img_size=64), {"target_modules": ["attn.qkv[q,v]"]}),
    "resnet stats": (lambda: timm_model("test_resnet"), {"norm": "stats"}),
    "resnext": (resnext, {"target_modules": "all-conv", "norm": "stats-affine", "bias": "all"}),
    "same padding": (lambda: timm_model("test_efficientnet", pad_type="same"), {"target_modules": "all-conv"}),
    "standardised": (lambda: timm_model("test_nfnet"), {"target_modules": "all-conv", "bias": "lora_only"}),
}


def images(seed: int = 1) -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def adapted(model: nn.Module, *, name: str = "default", **config: Any) -> nn.Module:
    """Return the model with an adapter whose every tensor differs from its start, as if trained."""
    vl.apply_lora(model, vl.LoraConfig(**{"r": 2, **config}), name=name)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            for key, tensor in layer.adapters[name].state_dict().items():
                if not key.endswith("start"):
                    tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))
                    tensor.add_(0.05 * torch.rand(tensor.shape, generator=generator))
    return model


def saved(folder: Path, model: nn.Module | None = None, **config: Any) -> Path:
    config = {"target_modules": ["hidden", "stem"], **config} if model is None else config
    return vl.save_adapter(adapted(net() if model is None else model, **config), folder)


def look(model: nn.Module) -> dict[str, Any]:
    """Return everything of a model that a failed load must not change."""
    return {
        "state": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "classes": {name: type(m) for name, m in model.named_modules()},
        "training": {name: m.training for name, m in model.named_modules()},
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "random": torch.get_rng_state(),
        "attributes": sorted(model.__dict__),
    }


def assert_same(now: dict[str, Any], before: dict[str, Any]) -> None:
    assert now["state"].keys() == before["state"].keys()
    assert all(torch.equal(now["state"][key], tensor) for key, tensor in before["state"].items())
    assert torch.equal(now["random"], before["random"])
    for what in ("classes", "training", "grads", "attributes"):
        assert now[what] == before[what], what


def take_apart(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the bytes of the tensors of a weights file or the one in a directory."""
    content = (path / WEIGHTS if path.is_dir() else path).read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put_together(path: Path, header: dict[str, Any] | bytes, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / WEIGHTS if path.is_dir() else path).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def record_of(path: Path) -> dict[str, Any]:
    return json.loads(take_apart(path)[0]["__metadata__"]["visionlora"])


def forge(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the record as someone would who knows the format: the checksum of the record is made to fit."""
    header, data = take_apart(path)
    record = json.loads(header["__metadata__"]["visionlora"])
    change(record)
    text = json.dumps(record)
    header["__metadata__"] |= {"visionlora": text, "visionlora_sha256": hashlib.sha256(text.encode()).hexdigest()}
    return put_together(path, header, data)


def set_value(path: Path, key: str, value: float) -> Path:
    """Put a value in the first place of a tensor, every checksum made to fit."""
    header, data = take_apart(path)
    start, stop = header[key]["data_offsets"]
    tensor = torch.frombuffer(bytearray(data[start:stop]), dtype=torch.float32).reshape(header[key]["shape"])
    tensor.view(-1)[0] = value
    put_together(path, header, data[:start] + tensor.numpy().tobytes() + data[stop:])
    return forge(path, lambda record: record["tensors"].update({key: tensor_digest(key, tensor).hex()}))
