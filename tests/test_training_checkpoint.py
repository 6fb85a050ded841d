"""What a run leaves behind, and which checkpoints a run accepts."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging
from torch import Tensor
from training_toy import PointsData, Toy, checkpoint_callback, equal, make_trainer, trained

from visionlora.errors import ConfigError, ResumeError
from visionlora.training.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from visionlora.training.ema import AdapterEMA
from visionlora.training.record import kept_keys

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


def fit(folder: Path, module: Toy | None = None, resume: bool = False, epochs: int = 1, **settings: Any) -> Toy:
    module = Toy() if module is None else module
    callbacks = [*settings.pop("callbacks", ())]
    trainer = make_trainer(folder, callbacks, max_epochs=epochs, **settings)
    trainer.fit(module, PointsData(), ckpt_path=folder / "last.ckpt" if resume else None)
    return module


def test_the_checkpoint_holds_everything_but_the_frozen_base(tmp_path: Path) -> None:
    module = fit(tmp_path)
    state = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    assert set(module.state_dict()) - set(state) == {"net.base.weight", "net.base.bias"}
    assert {"net.norm.running_mean", "net.A.weight"} <= set(state)


def test_frozen_tensors_of_an_adapter_are_kept() -> None:
    import visionlora as vl

    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    config = vl.LoraConfig(r=1, variant="fa", target_modules=["0"], modules_to_save="none", bias="none")
    vl.apply_lora(net, config, name="on")
    vl.apply_lora(net, config, name="off")
    vl.deactivate(net)
    assert not any(p.requires_grad for p in net.parameters()), "nothing here is trainable, adapters included"
    assert set(kept_keys(net)) == set(net.state_dict()) - {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert len(kept_keys(net)) == 4, "A and B of two adapters"


def test_the_best_adapter_is_kept_and_a_resumed_run_knows_it(tmp_path: Path) -> None:
    values = iter([0.5, 0.2, math.nan, 0.3, 0.1])

    class Metric(pl.Callback):
        def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.log("score", next(values))

    def run(resume: bool, epochs: int) -> list[int]:
        callbacks = [checkpoint_callback(tmp_path, monitor="score", mode="min"), Metric()]
        return fit(tmp_path, resume=resume, epochs=epochs, callbacks=callbacks).saved_steps

    assert run(resume=False, epochs=3) == [6, 12]
    assert run(resume=True, epochs=5) == [30]


def test_without_a_metric_every_epoch_is_kept(tmp_path: Path) -> None:
    assert fit(tmp_path, epochs=2, callbacks=[checkpoint_callback(tmp_path, monitor=None)]).saved_steps == [6, 12]


def test_an_unknown_metric_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'val/acc'.*val/loss"):
        fit(tmp_path, callbacks=[checkpoint_callback(tmp_path, monitor="val/acc", mode="max")])


def test_the_checkpoint_before_the_last_is_kept(tmp_path: Path) -> None:
    fit(tmp_path, epochs=3)
    assert read_checkpoint(tmp_path / "previous.ckpt")["global_step"] == 12
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 18


def test_a_cut_last_checkpoint_resumes_from_the_one_before(tmp_path: Path) -> None:
    fit(tmp_path, epochs=3)
    path = tmp_path / "last.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    module = fit(tmp_path, resume=True, epochs=3)
    assert len(module.seen) == 22


def test_without_the_atomic_plugin_the_run_does_not_start(tmp_path: Path) -> None:
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        callbacks=[checkpoint_callback(tmp_path)],
        accelerator="cpu",
        logger=False,
        max_epochs=1,
    )
    with pytest.raises(ConfigError, match="AtomicCheckpointIO"):
        trainer.fit(Toy(), PointsData())


def test_lightnings_averaging_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="AdapterEMA"):
        fit(tmp_path, callbacks=[EMAWeightAveraging()])


def test_another_learning_rate_wins_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path, Toy(lr=0.1))
    rates: list[float] = []

    class Rate(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    fit(tmp_path / "old", Toy(lr=0.001), epochs=2, callbacks=[Rate()])
    wanted = rates[6:]
    rates.clear()
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, Toy(lr=0.001, weight_decay=0.5), resume=True, epochs=2, callbacks=[Rate()])
    assert rates == pytest.approx(wanted)
    assert "0.001 as configured; the checkpoint had 0.1" in caplog.text
    assert "weight_decay of parameter group A: 0.5 as configured; the checkpoint had 0.0" in caplog.text


def test_an_unchanged_learning_rate_is_not_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fit(tmp_path)
    with caplog.at_level(logging.WARNING, "visionlora"):
        fit(tmp_path, resume=True, epochs=2)
    assert not [r for r in caplog.records if r.name.startswith("visionlora")]


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (
            lambda: Toy(rank=4),
            ["group A", "net.A.weight: (2, 6) in the checkpoint, (4, 6) now", "rank: 2", "rank: 2 in"],
        ),
        (lambda: Toy(classes=5), ["group head", "net.head.weight: (3, 64)", "classes: 3 in the checkpoint, 5 now"]),
        (lambda: Toy(base=1), ["base weights: fingerprint", "base: 0 in the checkpoint, 1 now"]),
    ],
)
def test_another_run_is_refused_with_the_differences(tmp_path: Path, module: Any, words: list[str]) -> None:
    fit(tmp_path)
    other = module()
    before = trained(other)
    with pytest.raises(ResumeError) as caught:
        fit(tmp_path, other, resume=True, epochs=2)
    for word in words:
        assert word in str(caught.value)
    assert equal(trained(other), before), "a refused checkpoint must change nothing"


def test_other_targets_are_refused(tmp_path: Path) -> None:
    class OtherTargets(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.net.extra = torch.nn.Linear(2, 2)

    fit(tmp_path)
    with pytest.raises(ResumeError, match=r"net.extra.weight: missing in the checkpoint"):
        fit(tmp_path, OtherTargets(), resume=True, epochs=2)


def test_other_optimizer_groups_are_refused(tmp_path: Path) -> None:
    class OneGroup(Toy):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(p for p in self.parameters() if p.requires_grad)

    fit(tmp_path)
    with pytest.raises(ResumeError, match="other parameter groups"):
        fit(tmp_path, OneGroup(), resume=True, epochs=2)


def test_fixed_settings_may_not_change(tmp_path: Path) -> None:
    callback = checkpoint_callback(tmp_path, fixed=("weight_decay",))
    fit(tmp_path, Toy(weight_decay=0.1))
    with pytest.raises(ResumeError, match=r"weight_decay: 0.1 in the checkpoint, 0.0 now"):
        fit(tmp_path, resume=True, epochs=2, callbacks=[callback])


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint = read_checkpoint_of_another_tool(tmp_path)
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "last.ckpt")
    with pytest.raises(ResumeError, match="not written by AdapterCheckpoint"):
        fit(tmp_path, resume=True, epochs=2)


def read_checkpoint_of_another_tool(folder: Path) -> dict[str, Any]:
    fit(folder)
    checkpoint = read_checkpoint(folder / "last.ckpt")
    del checkpoint["visionlora"]
    return checkpoint


@dataclass
class Settings:
    r: int = 4
    path: Path = Path("here")


class Configured(Toy):
    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.save_hyperparameters()


def test_hyper_parameters_become_plain_data(tmp_path: Path) -> None:
    fit(tmp_path, Configured(Settings()))
    assert read_checkpoint(tmp_path / "last.ckpt")["hyper_parameters"]["adapter"] == {"r": 4, "path": "here"}
    fit(tmp_path, Configured(Settings()), resume=True, epochs=2)
    callback = checkpoint_callback(tmp_path, fixed=("adapter",))
    with pytest.raises(ResumeError, match=r"adapter.r: 4 in the checkpoint, 8 now"):
        fit(tmp_path, Configured(Settings(r=8)), resume=True, epochs=3, callbacks=[callback])


@pytest.mark.filterwarnings("ignore:Attribute 'adapter' is an instance of `nn.Module`")
def test_a_hyper_parameter_that_is_no_plain_data_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hyper_parameters.adapter is a Linear"):
        fit(tmp_path, Configured(torch.nn.Linear(1, 1)))


def test_validation_and_the_adapter_see_the_average_and_training_the_raw_values(tmp_path: Path) -> None:
    raw: list[Tensor] = []
    seen: list[Tensor] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            raw.append(module.net.A.weight.detach().clone())

        def on_validation_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            seen.append(module.net.A.weight.detach().clone())

    module = fit(tmp_path, callbacks=[AdapterEMA(0.9), Watch()])
    average = None
    torch.manual_seed(0)
    start = Toy().net.A.weight.detach()
    average = start.clone()
    for n, value in enumerate(raw):
        average = average.lerp(value, 1 - min(0.9, (1 + n) / (10 + n)))
    shipped = torch.load(tmp_path / "adapter/adapter.pt")["A.weight"]
    torch.testing.assert_close(seen[0], average)
    assert torch.equal(shipped, seen[0])
    assert not torch.allclose(average, raw[-1], atol=1e-4), "the average must differ for the test to say anything"
    assert torch.equal(read_checkpoint(tmp_path / "last.ckpt")["state_dict"]["net.A.weight"], raw[-1])
    assert torch.equal(module.net.A.weight, shipped), "after training the model holds the average"


def test_averages_hold_the_trained_tensors_only(tmp_path: Path) -> None:
    module = fit(tmp_path, callbacks=[AdapterEMA()])
    states = read_checkpoint(tmp_path / "last.ckpt")["callbacks"]
    average = next(state["average"] for state in states.values() if "average" in state)
    assert set(average) == {n for n, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_a_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="decay"):
        AdapterEMA(decay)
