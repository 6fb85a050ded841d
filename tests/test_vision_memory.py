"""Memory modes of ImageClassifier: what they keep for the backward pass, and that numbers stay what they are."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visionlora as vl
from visionlora.bench.memory import saved_bytes
from visionlora.core.blocks import checkpoint_blocks
from visionlora.errors import ConfigError
from visionlora.vision.module import ImageClassifier

SIZE = 64


def module(name: str = "test_resnet", **settings: Any) -> ImageClassifier:
    settings = {"lora": vl.LoraConfig(r=2), "data": {"input_size": [3, SIZE, SIZE]}, **settings}
    torch.manual_seed(0)
    return ImageClassifier(name, 3, pretrained=False, **settings).train()


def loss(model: ImageClassifier) -> Tensor:
    x = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return F.cross_entropy(model(x), torch.arange(4) % 3)


def kept(model: ImageClassifier) -> int:
    loss(model).backward()  # finds the norms that are folded
    model.zero_grad(set_to_none=True)
    return saved_bytes(lambda: loss(model), [*model.parameters(), *model.buffers()])


def test_lean_trains_B_alone_and_keeps_less() -> None:
    exact, lean = module(), module(memory="lean")
    assert lean.config is not None
    assert (lean.config.variant, set(lean.trainable_groups())) == ("fa", {"B", "head"})
    assert kept(lean) < 0.8 * kept(exact)


def test_lean_is_recorded_in_the_file_as_what_it_is(tmp_path: Any) -> None:
    lean = module(memory="lean", class_names=["a", "b", "c"], data=None)
    lean.save_adapter(tmp_path / "a")
    assert vl.read_adapter(tmp_path / "a").record["plan"]["config"]["variant"] == "fa"


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_blocks_computed_again_give_the_same_gradients_from_the_first_step_on(name: str) -> None:
    args = {"model_args": {"img_size": SIZE}} if name == "test_vit" else {}
    plain, again = module(name, **args), module(name, grad_checkpointing=True, **args)
    again.load_state_dict(plain.state_dict())
    for _ in range(2):
        for model in (plain, again):
            model.zero_grad(set_to_none=True)
            loss(model).backward()
        grads = [[p.grad for p in model.parameters() if p.requires_grad] for model in (plain, again)]
        torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-6)
    assert kept(again) < 0.6 * kept(plain)


def test_misuse() -> None:
    with pytest.raises(ConfigError, match='freezes A of plain LoRA, not of variant "dora"'):
        module(lora=vl.LoraConfig(variant="dora"), memory="lean")
    with pytest.raises(ConfigError, match="memory must be exact or lean, got 'leen'; did you mean \"lean\""):
        module(memory="leen")
    net, lora = nn.Sequential(nn.Linear(3, 8)), vl.LoraConfig(r=1, target_modules=["0"])
    with pytest.raises(ConfigError, match="Sequential has no set_grad_checkpointing"):
        ImageClassifier.from_model(net, num_classes=3, lora=lora, grad_checkpointing=True)
    with pytest.raises(ConfigError, match="Sequencer2d cannot recompute its blocks"):
        checkpoint_blocks(vl.apply_lora(timm.create_model("sequencer2d_s")), torch.zeros(1, 3, 224, 224))
