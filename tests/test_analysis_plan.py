"""From a budget to an adapter: it fits, it is the largest of its kind, and it is what training then makes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import visionlora as vl
from visionlora.analysis import Budget, Proposal, Setting, Speed, calibrated, model_cost, plan
from visionlora.analysis.budget import Saving
from visionlora.cli import main
from visionlora.errors import ConfigError

SETTING = Setting(4, 3, 32, 32)
LORA = vl.LoraConfig(r=2, lora_alpha=4)


class Block(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)))


class Net(nn.Module):
    """Four blocks that can be computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Conv2d(3, 16, 1),
            nn.ModuleList(Block() for _ in range(4)),
            nn.Linear(16, 5),
        )
        self.again = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.again = enable

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            again = self.again and torch.is_grad_enabled()
            x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if again else block(x)
        return self.head(x.mean((2, 3)))


def trained(net: nn.Module, config: vl.LoraConfig) -> int:
    return sum(p.numel() for p in vl.apply_lora(net, config).parameters() if p.requires_grad)


def propose(**limits: float) -> Proposal:
    return plan(Net(), Budget(**limits), config=LORA, setting=SETTING)  # type: ignore[arg-type]


def memory(saving: Saving) -> int:
    lora = replace(LORA, variant="fa") if saving.lean else LORA
    return model_cost(Net(), SETTING, config=lora, checkpoint=saving.checkpoint).memory


def test_parameters_are_spent_on_rank_in_every_layer() -> None:
    found = propose(parameters=10000)
    assert found.blocks == (4, 4)
    assert found.cost.trained == trained(Net(), found.config) <= 10000
    assert trained(Net(), replace(LORA, r=found.config.r + 1)) > 10000
    assert found.config.lora_alpha / found.config.r == 2  # the strength of the config


def test_too_few_parameters_for_every_layer_go_to_the_last_blocks() -> None:
    found = propose(parameters=1100)
    assert found.blocks == (2, 4)
    assert {layer.name for layer in found.cost.layers} == {f"blocks.{b}.{i}" for b in (2, 3) for i in range(3)}
    assert trained(Net(), found.config) <= 1100


def test_memory_is_saved_by_what_costs_least_accuracy_first() -> None:
    exact, again, lean = (memory(saving) for saving in (Saving(), Saving(checkpoint=True), Saving(lean=True)))
    assert exact > again > lean
    assert propose(memory=exact).saving == Saving()
    assert propose(memory=again).saving == Saving(checkpoint=True)
    found = propose(memory=again - 1)
    assert found.saving == Saving(lean=True)
    assert found.config.variant == "fa"
    assert found.cost.memory == lean


def test_what_no_saving_reaches_in_all_blocks_is_reached_in_the_last() -> None:
    least = min(memory(Saving(lean=True, checkpoint=again)) for again in (False, True))
    found = propose(memory=least - 1)
    assert found.blocks[0] < 4
    assert found.cost.memory < least
    kept = [f"blocks.{b}.{i}" for b in range(4 - found.blocks[0], 4) for i in range(3)]
    assert [row.layer for row in vl.summary(vl.apply_lora(Net(), found.config)).rows] == kept


def test_a_time_is_an_estimate_of_the_whole_step() -> None:
    slow = Speed(dense=1e9, thin=1e9, bandwidth=1e9, start=0.0)
    whole = plan(Net(), Budget(milliseconds=1e6), setting=SETTING, speed=slow)
    assert whole.milliseconds == pytest.approx(whole.cost.milliseconds(slow))
    assert whole.milliseconds > whole.cost.extra_milliseconds(slow) > 0
    quicker = plan(Net(), Budget(milliseconds=0.9 * whole.milliseconds), setting=SETTING, speed=slow)
    assert quicker.milliseconds is not None
    assert quicker.milliseconds <= 0.9 * whole.milliseconds


def test_exclusions_of_the_config_stay() -> None:
    lora = vl.LoraConfig(exclude_modules=["blocks.3.0", "blocks.3.1"])
    found = plan(Net(), Budget(parameters=800), config=lora, setting=SETTING)
    assert found.blocks == (2, 4)
    assert {layer.name for layer in found.cost.layers} == {"blocks.2.0", "blocks.2.1", "blocks.2.2", "blocks.3.2"}


def test_the_model_stays_as_it_is() -> None:
    net = vl.apply_lora(Net(), vl.LoraConfig(r=2), name="mine")
    before = {key: t.clone() for key, t in net.state_dict().items()}
    plan(net, Budget(parameters=2000), setting=SETTING)
    assert vl.adapter_names(net) == ["mine"]
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    assert net.again is False


def test_an_impossible_budget_names_the_smallest_that_works() -> None:
    with pytest.raises(ConfigError, match=r"blocks\.3 alone at rank 1, .* needs --parameters 565"):
        propose(parameters=100)
    assert propose(parameters=565).cost.trained == 565
    with pytest.raises(ConfigError, match=r"needs --memory 1MiB; a smaller --batch or --size takes less"):
        propose(memory=1000)
    with pytest.raises(ConfigError, match="a budget needs a limit"):
        Budget()
    with pytest.raises(ConfigError, match="memory must be above 0, got 0"):
        Budget(memory=0)


def test_this_machine_has_a_speed() -> None:
    speed = calibrated(repeats=1)
    assert speed.dense > 1e8
    assert speed.bandwidth > 1e8
    assert 0 < speed.seconds(10**6, 10**4) < speed.seconds(10**10, 10**8)


def test_plan_prints_a_table_a_config_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["test_resnet", "--num_classes", "5", "--batch", "2", "--size", "64"]
    assert main(["plan", *arguments, "--parameters", "16k", "--lora.norm", "affine"]) == 0
    shown = capsys.readouterr().out
    flags = shown.splitlines()[-1]
    assert "parameters  16,000" in shown
    assert "model_name: test_resnet" in shown
    assert "--model.lora.norm affine" in flags
    rank = int(flags.partition("--model.lora.r ")[2].split()[0])
    net = timm.create_model("test_resnet", num_classes=5)
    assert trained(net, vl.LoraConfig(r=rank, norm="affine")) <= 16000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--memory", "400"], "--memory must be a number like 400MiB or 2GB, got '400'"),
        (["--parameters", "many"], "--parameters must be a number like 300k or 1.5M, got 'many'"),
        (["--parameters", "10"], "the smallest (layer4.0 alone at rank 1, head trained in full) needs --parameters"),
        ([], "a budget needs a limit"),
    ],
)
def test_misuse_of_plan(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "test_resnet", *flags]) == 2
    assert message in capsys.readouterr().err


def test_info_tells_costs_layer_by_layer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["info", "--model", "test_resnet", "--cost", "--batch", "2", "--size", "64", "--time", "--lora.r", "2"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "layer3.0.conv2         conv 3x3 /2, 48 -> 48 " in shown
    for line in ("adapters add", "whole step", "memory", "norms folded  12", "estimated"):
        assert f"\n{line}" in shown
    assert main([*words, "--order", "merged"]) == 0
    assert not {"factorised", "projected"} & set(capsys.readouterr().out.split())


def test_info_tells_costs_of_a_saved_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = vl.apply_lora(timm.create_model("test_resnet", num_classes=5), vl.LoraConfig(r=2, variant="fa"))
    vl.save_adapter(net, tmp_path / "a", base={"name": "test_resnet", "args": {}})
    assert main(["info", str(tmp_path / "a"), "--cost", "--size", "64", "--batch", "1"]) == 0
    assert "on test_resnet: a step of 1 images, 64 x 64" in capsys.readouterr().out
    assert main(["info", "--model", "test_vit", "--cost", "--size", "63"]) == 2
    assert "--size sets the pixels a side" in capsys.readouterr().err
