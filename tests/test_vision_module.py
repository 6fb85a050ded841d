"""ImageClassifier: every mode learns, the base stays, settings are plain data, the optimiser holds what is trained."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import timm
import torch
from pytorch_lightning.cli import LightningCLI
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import visionlora as vl
from visionlora.errors import ConfigError, DataError, NonFiniteError
from visionlora.training.ema import AdapterEMA
from visionlora.vision.module import ImageClassifier

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Found .* module.* in eval mode"),  # a FrozenNorm is never in training mode
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
]
MODES = ["lora", "full", "linear", "norm"]
ADAPTERS = ["lora", "linear", "norm"]


def images(n: int = 48, size: int = 32, classes: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    x = torch.randn(n, 3, size, size, generator=generator) * 0.3
    x[torch.arange(n), labels] += 1.0  # the class is the brightest channel
    return x, labels


class Data(pl.LightningDataModule):
    """What ImageFolderData offers, on tensors."""

    test_names = ("target", "source")
    class_counts = (16, 16, 16)

    def __init__(self, batch: int = 16) -> None:
        super().__init__()
        self.batch = batch

    def _loader(self, seed: int = 0, shuffle: bool = False) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(
            TensorDataset(*images(seed=seed)), batch_size=self.batch, shuffle=shuffle, generator=generator
        )

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(shuffle=True)

    def statistics_dataloader(self) -> DataLoader[Any]:
        return self._loader()

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader(1)

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self._loader(2), self._loader(3)]

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(images(seed=4)[0], batch_size=self.batch)


def trainer(path: Path, **options: Any) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(default_root_dir=path, accelerator="cpu", devices=1, **{"max_epochs": 3, **quiet, **options})


def backbone(name: str = "test_resnet", **args: Any) -> nn.Module:
    torch.manual_seed(5)
    net = timm.create_model(name, num_classes=3, **({"zero_init_last": False} if "resnet" in name else {}), **args)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # a pretrained net has statistics of its own
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net


def classifier(name: str = "test_resnet", **settings: Any) -> ImageClassifier:
    args = {"img_size": 32} if "vit" in name else {}
    return ImageClassifier.from_model(backbone(name, **args), num_classes=3, **settings)


def loss_of(net: nn.Module) -> float:
    x, y = images(seed=7)
    with torch.no_grad():
        loss = float(F.cross_entropy(net.eval()(x), y))
    net.train()
    return loss


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_and_only_full_moves_the_base(tmp_path, mode, name):
    module = classifier(name, mode=mode, lr={"full": 1e-3, "linear": 5e-2}.get(mode, 1e-2))
    before, loss = copy.deepcopy(vl.base_state_dict(module.net)), loss_of(module.net)
    trainer(tmp_path, max_epochs=10 if mode == "linear" else 3).fit(module, datamodule=Data())
    assert loss_of(module.net) < 0.8 * loss
    after = vl.base_state_dict(module.net)
    same = all(torch.equal(after[key], before[key]) for key in before)
    assert same == (mode != "full")
    assert module.fingerprint() == vl.fingerprint(backbone(name, **({"img_size": 32} if "vit" in name else {})))


@pytest.mark.parametrize("mode", MODES)
def test_the_optimiser_holds_exactly_what_is_trained(tmp_path, mode):
    module = classifier(mode=mode, lora=vl.LoraConfig(r=2))
    run = trainer(tmp_path, max_steps=1, max_epochs=1)
    run.fit(module, datamodule=Data())
    held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {p for p in module.net.parameters() if p.requires_grad}
    assert (
        set(module.trainable_groups())
        == {
            "lora": {"A", "B", "head"},
            "linear": {"head"},
            "norm": {"norm", "head"},
            "full": {"backbone", "head"},
        }[mode]
    )


def test_rates_of_head_and_B_are_multiplied_and_flat_tensors_do_not_decay(tmp_path):
    module = classifier(recipe="none", lr=1e-2, head_lr_factor=3, lora_plus=8, weight_decay=0.1)
    run = trainer(tmp_path, max_steps=1, max_epochs=1)
    run.fit(module, datamodule=Data())
    groups = {g["name"]: (g["initial_lr"], g["weight_decay"]) for g in run.optimizers[0].param_groups}
    assert groups == {
        "A": (1e-2, 0.1),
        "B": (8e-2, 0.1),
        "head": (3e-2, 0.1),
        "head (no decay)": (3e-2, 0.0),
    }


@pytest.mark.parametrize(("batch", "accumulate", "limit"), [(16, 1, 1.0), (16, 2, 1.0), (20, 1, 1.0), (16, 1, 2)])
def test_the_rate_reaches_zero_with_the_last_step(tmp_path, batch, accumulate, limit):
    rates: list[float] = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            rates.append(optimizer.param_groups[0]["lr"])

    run = trainer(
        tmp_path, max_epochs=4, accumulate_grad_batches=accumulate, limit_train_batches=limit, callbacks=[Watch()]
    )
    run.fit(classifier(mode="linear", lr=1.0, warmup=0.25), datamodule=Data(batch))
    assert len(rates) == run.global_step
    assert max(rates) == pytest.approx(1.0)
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-12)
    assert rates[-1] > 0


def test_a_schedule_without_end_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_epochs"):
        trainer(tmp_path, max_epochs=-1).fit(classifier(mode="linear"), datamodule=Data())


def test_plain_loaders_work_as_well(tmp_path):
    module, data = classifier(mode="norm", lr=1e-2), Data()
    loss = loss_of(module.net)
    trainer(tmp_path).fit(module, data.train_dataloader(), data.val_dataloader())
    assert loss_of(module.net) < 0.8 * loss


def first_norm_statistics(net: nn.Module) -> tuple[np.ndarray, np.ndarray]:
    found: list[Tensor] = []
    layer = next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    handle = layer.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        net(images()[0])
    handle.remove()
    x = found[0].double().numpy()
    return x.mean((0, 2, 3)), x.var((0, 2, 3), ddof=1)


def test_statistics_are_those_of_numpy_and_are_estimated_once(tmp_path):
    module = classifier(lora=vl.LoraConfig(r=2, target_modules=["layer3.0.conv1"], norm="stats"))
    mean, var = first_norm_statistics(backbone())
    run = trainer(tmp_path, max_epochs=2)
    run.fit(module, datamodule=Data())
    layer = next(m for m in module.net.modules() if isinstance(m, nn.BatchNorm2d))
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-5)
    with vl.disabled(module.net):
        assert torch.equal(
            layer.running_mean, next(m for m in backbone().modules() if isinstance(m, nn.BatchNorm2d)).running_mean
        )


def test_a_resumed_run_keeps_its_statistics(tmp_path):
    config = vl.LoraConfig(r=2, target_modules=["layer3.0.conv1"], norm="stats")
    run = trainer(tmp_path, max_epochs=1)
    run.fit(classifier(lora=config), datamodule=Data())
    run.save_checkpoint(tmp_path / "a.ckpt")

    class NoStatistics(Data):
        def statistics_dataloader(self) -> DataLoader[Any]:
            raise AssertionError("estimated a second time")

    again = classifier(lora=config)
    trainer(tmp_path, max_epochs=2).fit(
        again, datamodule=NoStatistics(), ckpt_path=tmp_path / "a.ckpt", weights_only=True
    )
    mean, _ = first_norm_statistics(backbone())
    layer = next(m for m in again.net.modules() if isinstance(m, nn.BatchNorm2d))
    np.testing.assert_allclose(layer.running_mean.numpy(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_a_trainer_checkpoint_is_plain_data_and_builds_the_module_again(tmp_path, mode):
    torch.save(backbone().state_dict(), tmp_path / "base.pth")
    module = ImageClassifier(
        "test_resnet",
        3,
        class_names=["a", "b", "c"],
        mode=mode,
        lora=vl.LoraConfig(r=2, rank_pattern={"conv1": 1}),
        checkpoint=str(tmp_path / "base.pth"),
        model_args={"zero_init_last": False},
        class_weights=[1.0, 2.0, 1.0],
    )
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=Data())
    run.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert saved["hyper_parameters"]["lora"] == vl.LoraConfig(r=2, rank_pattern={"conv1": 1}).to_dict()
    again = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    x = images()[0]
    assert torch.equal(again.eval()(x), module.eval()(x))


def test_full_mode_is_plain_timm_fine_tuning(tmp_path):
    class InOrder(Data):
        def train_dataloader(self) -> DataLoader[Any]:
            return self._loader()

    module = classifier(mode="full", lr=1e-3, warmup=0.0, weight_decay=0.0, memory_format="contiguous")
    plain, data = backbone(), InOrder()
    trainer(tmp_path, max_epochs=2).fit(module, datamodule=data)

    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    plain.train()
    loader = data.train_dataloader()
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(plain(x), y).backward()
            optimizer.step()
            schedule.step()
    ours, theirs = module.net.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.parametrize(("setting", "expected"), [("balanced", (0.5, 1.0, 3.0)), ([1.0, 2.0, 0.5], (1.0, 2.0, 0.5))])
def test_class_weights_reach_the_loss(tmp_path, setting, expected):
    class Uneven(Data):
        class_counts = (24, 12, 4)

    module = classifier(mode="linear", class_weights=setting)
    if setting == "balanced":
        expected = tuple(40 / (3 * n) for n in Uneven.class_counts)
    trainer(tmp_path, max_steps=1, max_epochs=1).fit(module, datamodule=Uneven())
    x, y = images()
    found = module.loss(module(x), y)
    torch.testing.assert_close(found, F.cross_entropy(module(x), y, weight=torch.tensor(expected)))


def test_label_smoothing_is_for_training_only(tmp_path):
    module = classifier(mode="linear", label_smoothing=0.3)
    run = trainer(tmp_path, max_epochs=1)
    run.fit(module, datamodule=Data())
    x, y = images(seed=1)
    module.eval()
    with torch.no_grad():
        assert module.results["val"].loss == pytest.approx(float(F.cross_entropy(module(x), y)), abs=1e-5)
        smooth = F.cross_entropy(module(x), y, label_smoothing=0.3)
        torch.testing.assert_close(module.loss(module(x), y), smooth)


def test_several_test_sets_are_measured_by_name(tmp_path):
    module, run = classifier(mode="linear"), trainer(tmp_path)
    (target, source) = run.test(module, datamodule=Data(), verbose=False)
    assert set(module.results) == {"test/target", "test/source"}
    x, y = images(seed=3)
    with torch.no_grad():
        right = (module.eval()(x).argmax(1) == y).float().mean()
    assert source["test/source/acc"] == pytest.approx(float(right))
    assert "test/target/f1" in target


def test_prediction_gives_probabilities_classes_and_places(tmp_path):
    module = classifier(class_names=["red", "green", "blue"])
    batches = trainer(tmp_path).predict(module, datamodule=Data())
    assert batches is not None
    first: Any = batches[0]
    torch.testing.assert_close(first["probabilities"].sum(1), torch.ones(16))
    assert set(first["classes"]) <= {"red", "green", "blue"}
    assert first["paths"][:2] == ["0", "1"]


def test_a_batch_of_one_trains_an_adapter(tmp_path):
    module = classifier(lora=vl.LoraConfig(r=2, norm="affine"))
    before = [p.clone() for group in module.trainable_groups().values() for p in group]
    trainer(tmp_path, max_steps=2, max_epochs=1).fit(module, datamodule=Data(batch=1))
    after = [p for group in module.trainable_groups().values() for p in group]
    assert any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(p.isfinite().all() for p in after)


def test_a_label_outside_the_classes_stops_the_run(tmp_path):
    x, y = images()
    y[5] = 3
    with pytest.raises(DataError, match="labels from 0 to 2, got 3"):
        trainer(tmp_path).fit(classifier(), DataLoader(TensorDataset(x, y), batch_size=16), Data().val_dataloader())


def test_nan_predictions_are_refused_in_validation(tmp_path):
    module = classifier(mode="linear")
    module.net.conv1[0].weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="16 of 16 predictions"):
        trainer(tmp_path).validate(module, datamodule=Data(), verbose=False)


def test_the_average_is_a_callback_of_the_module(tmp_path):
    run = trainer(tmp_path, max_epochs=1)
    run.fit(classifier(mode="linear", ema_decay=0.9), datamodule=Data())
    assert [c.decay for c in run.callbacks if isinstance(c, AdapterEMA)] == [0.9]


def test_the_seed_decides_the_start_and_disturbs_nothing():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a, b, c = (classifier_seeded(seed) for seed in (1, 1, 2))
    torch.manual_seed(3)
    classifier_seeded(9)
    assert torch.equal(torch.rand(1), expected)
    states = [vl_state(m) for m in (a, b, c)]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not all(torch.equal(states[0][k], states[2][k]) for k in states[0])


def classifier_seeded(seed: int) -> ImageClassifier:
    return ImageClassifier("test_resnet", 3, pretrained=False, seed=seed)


def vl_state(module: ImageClassifier) -> dict[str, Tensor]:
    return {f"{g}{n}": p for g, ps in module.trainable_groups().items() for n, p in enumerate(ps)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "lore"}, 'mode must be one of .*did you mean "lora"'),
        ({"lr": -1.0}, "lr must be a finite number above 0"),
        ({"lr": math.nan}, "lr must be"),
        ({"warmup": 1.0}, "warmup .* below 1"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"class_names": ["a", "b"]}, "3 different names"),
        ({"class_weights": [1.0]}, "class_weights needs 3 numbers"),
        ({"class_weights": "balance"}, 'did you mean "balanced"'),
        ({"adapter_name": "../x"}, "adapter name"),
        ({"learning_rate": 1.0}, "no setting 'learning_rate'"),
        ({"num_classes": 1}, "at least 2"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ImageClassifier.from_model(backbone(), **{"num_classes": 3, **settings})


def test_norm_mode_needs_a_normalisation():
    net = timm.create_model("test_nfnet", num_classes=3)
    with pytest.raises(ConfigError, match="no normalisation"):
        ImageClassifier.from_model(net, num_classes=3, mode="norm")


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")  # LightningCLI's use
def test_the_command_line_sets_everything_and_keeps_plain_data(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["visionlora"])
    path = tmp_path / "base.pth"
    torch.save(backbone().state_dict(), path)
    words = [
        "--model.model_name=test_resnet",
        "--model.num_classes=3",
        f"--model.checkpoint={path}",
        "--model.mode=lora",
    ]
    words += ["--model.lora.r=2", "--model.lora.norm=stats", "--model.class_weights=[1,2,1]", "--model.lr=0.01"]
    words += ['--model.model_args={"zero_init_last": false}', "--trainer.max_epochs=1", "--trainer.logger=false"]
    words += ["--trainer.accelerator=cpu", "--trainer.devices=1", f"--trainer.default_root_dir={tmp_path}"]
    words += ["--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false", "--seed_everything=false"]
    cli = LightningCLI(
        ImageClassifier, Data, args=words, run=False, save_config_callback=None, auto_configure_optimizers=False
    )
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    cli.trainer.save_checkpoint(tmp_path / "a.ckpt")
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert saved["lora"] == vl.LoraConfig(r=2, norm="stats").to_dict()
    assert saved["class_weights"] == [1, 2, 1]
    assert not any(key.startswith("_") for key in saved)
    assert cli.model.config == vl.LoraConfig(r=2, norm="stats")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_backbone_trains_to_the_same_loss(tmp_path):
    losses = []
    for compiled in (False, True):
        module = classifier("test_vit", compile=compiled, lr=1e-2)
        trainer(tmp_path, max_epochs=1).fit(module, datamodule=Data())
        losses.append(loss_of(module.net))
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
