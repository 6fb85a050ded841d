"""A timm network as a row of steps, cut where the first trained one begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from visionlora.core.attach import Adapted, own_class
from visionlora.core.folding import fold_when_trained
from visionlora.errors import ConfigError
from visionlora.vision.layout import laid_out

__all__ = ["Cut", "Step", "cut"]


@dataclass(frozen=True)
class Step:
    """One part of a forward pass, from one tensor to one tensor."""

    name: str
    modules: tuple[nn.Module, ...]
    """Everything it runs, and whatever lies below."""
    run: Callable[[Tensor], Tensor]


class Rest(nn.Module):
    """The steps from the first trained one on, as a network of their own that shares every layer."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.parts = nn.ModuleList(m for step in steps for m in step.modules)

    def forward(self, features: Tensor) -> Tensor:
        for step in self.steps:
            features = step.run(features)
        return features


class Cut:
    """A network in two: what no adapter changes, and what begins with the first that one does."""

    def __init__(self, frozen: tuple[Step, ...], rest: tuple[Step, ...], layout: torch.memory_format) -> None:
        self.frozen, self.rest, self.layout = frozen, Rest(rest), layout
        fold_when_trained(self.rest)  # the network itself does so before its first training pass

    def features(self, images: Tensor) -> Tensor:
        """Return what the frozen steps make of images, without gradients; the network must be in eval mode."""
        images = laid_out(images, self.layout)
        with torch.no_grad():
            for step in self.frozen:
                images = step.run(images)
        return images

    def logits(self, features: Tensor) -> Tensor:
        """Return what the network makes of the features, in the mode it is in."""
        return self.rest(laid_out(features, self.layout))  # type: ignore[no-any-return]


def cut(net: nn.Module, layout: torch.memory_format = torch.contiguous_format) -> Cut:
    """Return the network cut before its first trained step. Raises ConfigError where a cache would not be exact.

    Dropout in the frozen steps, or something trained in the first of them, leaves nothing that is the same each time.
    """
    steps = _steps(net)
    own = _changed(net)  # parameters of the network itself, a position embedding, belong to the first step
    first = 0 if own else next((i for i, step in enumerate(steps) if _trained(step)), len(steps))
    frozen, rest = steps[:first], steps[first:]
    if not frozen:
        raise ConfigError(
            f"cache_prefix: {own or _trained(steps[0])} in the first part of the network is changed or trained, so "
            "that nothing before it stays the same; adapt later layers alone, say --model.lora.target_modules "
            f"'{_suggestion(steps)}', with norm frozen and bias none"
        )
    for step in frozen:
        for module in _inside(step):
            if isinstance(module, (nn.modules.dropout._DropoutNd, DropPath, PatchDropout)) and _drops(module):
                raise ConfigError(
                    f"cache_prefix: {step.name} drops values at random ({type(module).__name__}), so that it differs "
                    "each time; set its rate to 0 in --model.model_args, or leave cache_prefix away"
                )
    return Cut(frozen, rest, layout)


def _steps(net: nn.Module) -> tuple[Step, ...]:
    for known in type(net).__mro__:
        maker = _FAMILIES.get((known.__module__, known.__name__))
        if maker is not None:
            return tuple(maker(net))
    raise ConfigError(
        f"cache_prefix knows where to cut timm's {', '.join(name for _, name in _FAMILIES)}, and {type(net).__name__} "
        "is none of them; leave cache_prefix away"
    )


def _vit(net: nn.Module) -> Iterator[Step]:
    first = ("patch_embed", "pos_drop", "patch_drop", "norm_pre")
    embed = [net.get_submodule("patch_embed"), net._pos_embed, *(net.get_submodule(n) for n in first[2:])]
    yield Step("patch_embed", _modules(net, first), _row(embed))
    for i, block in enumerate(net.blocks):  # type: ignore[arg-type]
        yield Step(f"blocks.{i}", (block,), block)
    names = ("norm", "attn_pool", "fc_norm", "head_drop", "head")
    yield Step("norm", _modules(net, names), _row([net.norm, net.forward_head]))


def _resnet(net: nn.Module) -> Iterator[Step]:
    first = ("conv1", "bn1", "act1", "maxpool")
    yield Step("conv1", _modules(net, first), _row([net.get_submodule(n) for n in first]))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for name, block in net.get_submodule(stage).named_children():
            yield Step(f"{stage}.{name}", (block,), block)
    yield Step("fc", _modules(net, ("global_pool", "fc")), net.forward_head)  # type: ignore[arg-type]


def _convnext(net: nn.Module) -> Iterator[Step]:
    yield Step("stem", _modules(net, ("stem",)), net.get_submodule("stem"))
    for i, stage in enumerate(net.stages):  # type: ignore[arg-type]
        yield Step(f"stages.{i}.downsample", (stage.downsample,), stage.downsample)
        for j, block in enumerate(stage.blocks):
            yield Step(f"stages.{i}.blocks.{j}", (block,), block)
    yield Step("head", _modules(net, ("norm_pre", "head")), _row([net.norm_pre, net.forward_head]))


_FAMILIES: dict[tuple[str, str], Callable[[nn.Module], Iterator[Step]]] = {
    ("timm.models.vision_transformer", "VisionTransformer"): _vit,
    ("timm.models.resnet", "ResNet"): _resnet,
    ("timm.models.convnext", "ConvNeXt"): _convnext,
}


def _modules(net: nn.Module, names: tuple[str, ...]) -> tuple[nn.Module, ...]:
    found = (net._modules.get(name) for name in names)
    return tuple(m for m in found if m is not None)


def _row(calls: list[Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        for call in calls:
            x = call(x)
        return x

    return run


def _inside(step: Step) -> Iterator[nn.Module]:
    for module in step.modules:
        yield from module.modules()


def _trained(step: Step) -> str | None:
    """Return the class of something in the step that an adapter changes or a run trains."""
    return next((found for module in _inside(step) if (found := _changed(module))), None)


def _changed(module: nn.Module) -> str | None:
    changed = isinstance(module, Adapted) and any(len(a) for a in module.adapters.values())  # type: ignore[arg-type]
    trained = any(p.requires_grad for p in module.parameters(recurse=False))
    return own_class(module).__name__ if changed or trained else None


def _drops(module: nn.Module) -> bool:
    rate = getattr(module, "drop_prob", None) if isinstance(module, DropPath) else getattr(module, "p", None)
    rate = getattr(module, "prob", rate) if isinstance(module, PatchDropout) else rate
    return bool(rate)


def _suggestion(steps: tuple[Step, ...]) -> str:
    last = steps[-2].name
    stage = last.rpartition(".")[0] if last.startswith("layer") else last
    return stage.replace(".", r"\.") + r"\..*"
