"""A base in fewer bits: the adapters on it, its fingerprint, and the way back."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import visionlora as vl
from visionlora.cli import main
from visionlora.core.attach import Branched
from visionlora.core.quantised import dequantised, inner_tensors, is_quantised, quantised_base
from visionlora.errors import ConfigError, StateError
from visionlora.quantising import SCHEMES
from visionlora.variants import VARIANTS
from visionlora.vision.loading import load_model
from visionlora.vision.module import ImageClassifier

PACKAGES = {"int8": "torchao", "nf4": "bitsandbytes"}
ON_QKV = vl.LoraConfig(r=2, target_modules=["attn.qkv"])
pytestmark = pytest.mark.skipif(not all(map(find_spec, PACKAGES.values())), reason='needs the extra "quant"')
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=3).eval()


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 160, 160, generator=torch.Generator().manual_seed(1))


def moved(model: nn.Module) -> nn.Module:
    """The model with an adapter that does something."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for group in vl.adapter_parameters(model, "default").values():
            for parameter in group.values():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(scheme: str) -> nn.Module:
    model = vit()
    vl.quantize_base(model, scheme)
    return moved(vl.apply_lora(model, ON_QKV))


def dense(model: nn.Module) -> nn.Module:
    """The slow truth: the numbers of the quantised base as plain weights under the same adapters."""
    return vl.dequantize_base(copy.deepcopy(model))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(images())


@every_scheme
def test_linear_layers_are_stored_in_fewer_bits_and_the_rest_as_it_was(scheme):
    model, before = vit(), vit().state_dict()
    told = vl.quantize_base(model, scheme)
    assert len(told.stored) == told.linear_layers - 1  # the head
    assert told.bytes_after < told.bytes_before * {"int8": 0.27, "nf4": 0.15}[scheme]
    assert 0.001 < told.error < {"int8": 0.02, "nf4": 0.15}[scheme]
    assert scheme in str(told)
    assert f"{len(told.stored)} of {told.linear_layers}" in str(told)
    assert is_quantised(model.blocks[0].attn.qkv.weight)
    for name in ("head.weight", "head.bias", "norm.weight", "pos_embed", "patch_embed.proj.weight"):
        assert torch.equal(model.state_dict()[name], before[name])
    assert not torch.equal(logits(model), logits(vit()))


@every_scheme
def test_outputs_and_gradients_are_those_of_the_dense_weights(scheme):
    model = adapted(scheme).train()
    truth = dense(model).train()
    x = images().requires_grad_()
    for net in (model, truth):
        F.cross_entropy(net(x), torch.tensor([0, 2])).backward()
    torch.testing.assert_close(model(x), truth(x))
    grads = {n: p.grad for n, p in truth.named_parameters() if p.grad is not None}
    assert len(grads) == 2 * 6 + 2
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name not in grads), name
        if name in grads:
            torch.testing.assert_close(parameter.grad, grads[name], atol=1e-4 * float(grads[name].abs().max()), rtol=0)


@every_scheme
def test_bfloat16_autocast_follows_the_dense_weights(scheme):
    model = adapted(scheme).train()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images()), dense(model)(images()), atol=0.05, rtol=0.05)


@every_scheme
def test_before_or_after_the_adapter_is_the_same(scheme):
    after = moved(vl.apply_lora(vit(), ON_QKV))
    vl.quantize_base(after, scheme)  # of the stored weight, not of the one the adapter shows
    assert torch.equal(logits(after), logits(adapted(scheme)))
    x = after.train()(images()).sum()
    x.backward()
    vl.check_gradients(after)


@every_scheme
def test_training_learns_and_leaves_the_base_alone(scheme):
    model = adapted(scheme).train()
    before = [t.clone() for m in model.modules() if is_quantised(m._parameters.get("weight")) for t in stored(m)]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=5e-3), []
    for _ in range(8):
        loss = F.cross_entropy(model(images()), torch.tensor([0, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = [t for m in model.modules() if is_quantised(m._parameters.get("weight")) for t in stored(m)]
    assert all(map(torch.equal, before, after))


def stored(layer: nn.Module) -> list[Tensor]:
    return inner_tensors(layer._parameters["weight"])


@every_scheme
def test_evaluation_between_steps_does_not_cut_the_gradients(scheme):
    # bitsandbytes' own layer, on a CPU with AVX512-BF16, passes none after its first call in eval mode
    model = adapted(scheme)
    logits(model)
    model.train()(images()).sum().backward()
    vl.check_gradients(model)


@every_scheme
def test_nothing_of_the_weights_is_kept_for_the_backward_pass(scheme):
    def kept(net: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, nn.Parameter):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            net.train()(images())
        return sum(sizes.values())

    assert kept(adapted(scheme)) <= 1.01 * kept(moved(vl.apply_lora(vit(), ON_QKV)))


@every_scheme
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("spatial", "tucker", "up")])
def test_every_variant_runs_on_it(variant, scheme):
    model = vit()
    vl.quantize_base(model, scheme)
    moved(vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["attn.qkv", "mlp.fc1"], variant=variant)))
    torch.testing.assert_close(logits(model), logits(dense(model)), atol=1e-4, rtol=1e-4)
    model.train()(images()).sum().backward()
    vl.check_gradients(model)


@every_scheme
def test_the_fingerprint_stays_that_of_the_original_base(scheme):
    model, own = vit(), vl.fingerprint(vit())
    vl.quantize_base(model, scheme)
    assert vl.fingerprint(model) == own
    assert vl.fingerprint(vl.apply_lora(copy.deepcopy(model), ON_QKV)) == own
    with torch.no_grad():
        stored(model.blocks[0].mlp.fc1)[0].view(-1)[5] += 1
    assert vl.fingerprint(model) != own  # it is no longer what was made of that base
    assert vl.fingerprint(vl.dequantize_base(model)) != own


@every_scheme
def test_a_saved_adapter_loads_on_the_quantised_and_on_the_original_base(scheme, tmp_path, caplog):
    model = adapted(scheme)
    vl.save_adapter(model, tmp_path / "a")
    assert vl.read_adapter(tmp_path / "a").record["base"]["quantized"] == scheme
    again, plain = vit(), vit()
    vl.quantize_base(again, scheme)
    with caplog.at_level(logging.WARNING):
        vl.load_adapter(again, tmp_path / "a")
        assert not caplog.records
        vl.load_adapter(plain, tmp_path / "a")
    assert f'quantize_base(model, "{scheme}")' in caplog.text
    assert torch.equal(logits(again), logits(model))
    assert 0 < (logits(plain) - logits(model)).abs().max() < 1


def test_an_adapter_of_the_original_base_loads_on_the_quantised_one(tmp_path):
    vl.save_adapter(moved(vl.apply_lora(vit(), ON_QKV)), tmp_path / "a")
    assert "quantized" not in vl.read_adapter(tmp_path / "a").record["base"]
    model = vit()
    vl.quantize_base(model, "int8")
    vl.load_adapter(model, tmp_path / "a")
    assert torch.equal(logits(model), logits(adapted("int8")))


@every_scheme
def test_merge_in_place_is_refused_and_a_copy_is_merged_exactly(scheme):
    model = adapted(scheme)
    wanted = logits(model)
    with pytest.raises(StateError, match="merge_dequantized"):
        vl.merge(model)
    merged = vl.merge_dequantized(model, images())
    assert merged.output_error < 1e-5
    assert merged.base_error == quantised_base(model).error > 0.001
    assert type(merged.model) is type(vit())
    assert all(type(m).__module__.partition(".")[0] != "visionlora" for m in merged.model.modules())
    assert all(type(p) is nn.Parameter for p in merged.model.parameters())
    assert torch.equal(logits(model), wanted)
    with pytest.raises(StateError, match="not quantised"):
        vl.merge_dequantized(vl.apply_lora(vit(), ON_QKV))


@every_scheme
def test_copies_pickles_and_removal(scheme):
    model = adapted(scheme)
    wanted = logits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(other), wanted)
    bare = vit()
    vl.quantize_base(bare, scheme)
    vl.remove(model)
    assert not any(isinstance(m, Branched) for m in model.modules())
    torch.testing.assert_close(logits(model), logits(bare))
    with pytest.raises(StateError, match="already"):
        vl.quantize_base(model, scheme)


def test_torchaos_own_nf4_runs_as_well():
    model = vit()
    vl.quantize_base(vit(), "int8")  # imports torchao, whose docstrings warn where they are compiled
    from torchao.quantization import NF4Tensor

    for block in model.blocks:
        block.mlp.fc1.weight = nn.Parameter(NF4Tensor.from_tensor(block.mlp.fc1.weight.data, 64, 64), False)
    first = model.blocks[0].mlp.fc1.weight
    assert torch.equal(dequantised(first), first.get_original_weight())
    moved(vl.apply_lora(model, vl.LoraConfig(r=2, target_modules=["mlp.fc1"]))).train()(images()).sum().backward()
    vl.check_gradients(model)


def test_what_cannot_be_quantised_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="int8, nf4"):
        vl.quantize_base(vit(), "int4")
    with pytest.raises(ConfigError, match="no linear layer"):
        vl.quantize_base(timm.create_model("test_resnet", num_classes=3), "int8")
    with pytest.raises(ConfigError, match="mode full trains the weights"):
        ImageClassifier.from_model(vit(), num_classes=3, mode="full", quantize="int8")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.quantization", raising=False)
    model = vit()
    with pytest.raises(ConfigError, match=r'pip install "visionlora\[quant\]"'):
        vl.quantize_base(model, "int8")
    assert torch.equal(logits(model), logits(vit()))


def test_layers_whose_weight_is_read_or_shared_stay():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.mix, self.scores = nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
            self.look = nn.MultiheadAttention(64, 2, batch_first=True)
            self.scores.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            h = self.mix(self.words(ids))
            return self.scores(self.look(h, h, h)[0])

    model = Tied()
    assert list(vl.quantize_base(model, "int8").stored) == ["mix.weight"]
    assert model.scores.weight is model.words.weight


@every_scheme
def test_a_classifier_on_it_comes_back_and_merges(scheme, tmp_path, capsys):
    save_file(vit().state_dict(), tmp_path / "base.safetensors")
    classifier = ImageClassifier(
        "test_vit", 3, checkpoint=str(tmp_path / "base.safetensors"), lora=ON_QKV, quantize=scheme
    )
    moved(classifier.net)
    assert classifier.fingerprint() == vl.fingerprint(classifier.net)
    classifier.save_adapter(tmp_path / "a")
    checkpoint = tmp_path / "base.safetensors"
    assert torch.equal(logits(load_model(tmp_path / "a", checkpoint=checkpoint)), logits(classifier.net))
    whole = load_model(tmp_path / "a", checkpoint=checkpoint, quantize="none")
    assert quantised_base(whole) is None
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(tmp_path / "a"), str(out), "--checkpoint", str(checkpoint)]) == 0
    told = capsys.readouterr().out
    assert f"quantised to {scheme}" in told
    assert "% of rounding" in told
    plain = timm.create_model("test_vit", num_classes=3, checkpoint_path=str(out))
    torch.testing.assert_close(logits(plain), logits(classifier.net), atol=1e-4, rtol=1e-4)


def test_a_missing_package_says_how_to_go_on(tmp_path: Path, monkeypatch):
    save_file(vit().state_dict(), tmp_path / "base.safetensors")
    vl.save_adapter(adapted("int8"), tmp_path / "a")
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.delitem(sys.modules, "torchao.quantization", raising=False)
    with pytest.raises(ConfigError, match='quantize="none"'):
        load_model(tmp_path / "a", checkpoint=tmp_path / "base.safetensors")
