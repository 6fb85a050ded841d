"""A run that would learn nothing or destroy what it learned stops in the same step."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_toy import Points, PointsData, Toy, make_trainer, trained

import visionlora as vl
from visionlora.errors import InertAdapterError, NonFiniteError
from visionlora.training.checkpoint_io import read_checkpoint
from visionlora.training.guards import CheckGradients, StopOnNonFinite
from visionlora.training.sampler import ResumableSampler

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


def spoil(step: int, value: float, kind: str = "loss") -> Any:
    """Return a hook that makes the loss, or only its gradient, non-finite at an optimiser step."""

    def at_step(module: Toy, index: int, loss: Tensor) -> Tensor:
        if module.trainer.global_step != step:
            return loss
        if kind == "loss":
            return loss + value
        zero = (module.net.A.weight.sum() * 0).sqrt()  # 0, with an infinite slope times 0
        return loss + zero

    return at_step


def stopped(
    folder: Path,
    step: int,
    value: float = math.nan,
    kind: str = "loss",
    data: PointsData | None = None,
    **settings: Any,
) -> tuple[Toy, str]:
    module = Toy()
    module.at_step = spoil(step, value, kind)
    with pytest.raises(NonFiniteError) as caught:
        make_trainer(folder, [StopOnNonFinite()], **settings).fit(module, data or PointsData())
    return module, str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("step", [0, 9])
def test_a_loss_that_is_not_finite_stops_before_the_step(tmp_path: Path, step: int, value: float) -> None:
    before: list[dict[str, Tensor]] = []
    module = Toy()
    bad = spoil(step, value)

    def at_step(m: Toy, index: int, loss: Tensor) -> Tensor:
        before.append({n: p.detach().clone() for n, p in m.named_parameters()})
        return bad(m, index, loss)

    module.at_step = at_step
    with pytest.raises(NonFiniteError) as caught:
        make_trainer(tmp_path, [StopOnNonFinite()]).fit(module, PointsData())
    assert len(before) == step + 1, "no step after the bad one"
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, before[-1][name])
        assert parameter.isfinite().all()
    assert f"optimiser step {step}, epoch {step // 6}" in str(caught.value)


def test_the_message_names_batch_and_samples(tmp_path: Path) -> None:
    _, message = stopped(tmp_path, step=8)
    sampler = ResumableSampler(len(Points()), seed=0)
    samples = ", ".join(str(i) for i in sampler.order(1)[8:12])
    assert f"the loss is nan in batch 2 (samples {samples} of the training set)" in message


def test_samples_with_a_name_are_named(tmp_path: Path) -> None:
    class Files(Points):
        def name_of(self, at: int) -> str:
            return f"{at}.jpg"

    _, message = stopped(tmp_path, step=8, data=PointsData(dataset=Files()))
    names = ", ".join(f"{i}.jpg" for i in ResumableSampler(len(Points()), seed=0).order(1)[8:12])
    assert f"the loss is nan in batch 2 ({names})" in message


def test_nothing_is_saved_after_a_bad_loss(tmp_path: Path) -> None:
    module, _ = stopped(tmp_path, step=8)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 6
    assert module.saved_steps == [6]


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    module, message = stopped(tmp_path, step=3, kind="gradient")
    assert "a gradient is not, batch 3" in message
    assert all(p.isfinite().all() for p in module.parameters())


def test_with_accumulation_the_bad_batch_is_named(tmp_path: Path) -> None:
    module = Toy()
    module.at_step = lambda m, index, loss: loss * math.nan if index == 2 else loss
    with pytest.raises(NonFiniteError, match=r"optimiser step 1, epoch 0: the loss is nan in batch 2 "):
        make_trainer(tmp_path, [StopOnNonFinite()], accumulate_grad_batches=2).fit(module, PointsData())
    assert all(t.isfinite().all() for t in trained(module).values())


def test_a_sound_run_is_not_disturbed(tmp_path: Path) -> None:
    guarded, free = Toy(), Toy()
    for module, callbacks in ((guarded, [StopOnNonFinite()]), (free, [])):
        torch.manual_seed(3)
        make_trainer(tmp_path, callbacks).fit(module, PointsData())
    assert all(torch.equal(a, b) for a, b in zip(guarded.parameters(), free.parameters(), strict=True))


class Network(nn.Module):
    """`skipped` is used through its weight without its adapter seeing it."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        self.first, self.skipped, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        weight = self.skipped.weight.detach()
        return self.head(nn.functional.linear(h, weight) if self.skip else self.skipped(h))


class Adapted(Toy):
    def __init__(self, skip: bool = False, adapted: bool = True) -> None:
        super().__init__()
        self.net = Network(skip)
        if adapted:
            config = vl.LoraConfig(r=2, target_modules=["first", "skipped"], modules_to_save="none")
            vl.apply_lora(self.net, config)

    def trainable_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"all": [p for p in self.net.parameters() if p.requires_grad]}

    def fingerprint(self) -> str:
        return "same"


def test_an_adapter_without_gradient_stops_the_run_in_the_first_step(tmp_path: Path) -> None:
    module = Adapted(skip=True)
    trainer = make_trainer(tmp_path, [CheckGradients()])
    with pytest.raises(InertAdapterError, match="skipped"):
        trainer.fit(module, PointsData())
    assert trainer.global_step == 0


@pytest.mark.parametrize("adapted", [True, False])
def test_sound_adapters_and_full_training_pass(tmp_path: Path, adapted: bool) -> None:
    trainer = make_trainer(tmp_path, [CheckGradients()], max_epochs=1)
    trainer.fit(Adapted(adapted=adapted), PointsData())
    assert trainer.global_step == 6
