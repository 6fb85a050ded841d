"""Store the frozen base in fewer bits and take it back: the adapters stay in full precision."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from visionlora.config import did_you_mean
from visionlora.core.attach import Adapted, Branched, Materialised, attach, own_modules, set_active
from visionlora.core.digest import tensor_digest
from visionlora.core.geometry import materialisable, plain_linear
from visionlora.core.quantised import QUANTISED, Quantised, dequantised, inner_tensors, is_quantised, quantised_base
from visionlora.errors import ConfigError, StateError
from visionlora.merging import merge
from visionlora.registry import Registry, adapter_names, registry_of
from visionlora.targets import head_layers, owner_reads_weight

log = logging.getLogger(__name__)

Scheme = Literal["int8", "nf4"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)


class Merged(NamedTuple):
    """A model without adapters, and how far it is from what it was made of."""

    model: nn.Module
    base_error: float
    """What rounding had changed in the base's weights, relative to their norm: it stays in the merged ones."""
    output_error: float | None
    """Largest difference of an output on the example, relative to the largest output; None without an example."""


def quantize_base(model: nn.Module, scheme: Scheme = "int8") -> Quantised:
    """Change the model in place: store the weights of its Linear layers in fewer bits. Return what was gained.

    "int8" (torchao) has one scale a row; "nf4" (bitsandbytes, Dettmers et al. 2023, arXiv:2305.14314) has 4 bits and a
    scale for 64 weights, and makes other layer objects of the class Linear4bit. Both work before or after an adapter is
    put on. Head, embeddings, norms, convolutions and layers whose owner reads their weight stay as they are. The
    fingerprint stays that of the original base, so that adapters load on either. Raises ConfigError for an unknown
    scheme, a package that is not installed and a model without such layers, StateError for a base that is quantised or
    merged; the model is then as it was.
    """
    if scheme not in SCHEMES:
        near = did_you_mean(str(scheme), list(SCHEMES))
        raise ConfigError(f"expected a scheme of {', '.join(SCHEMES)}, got {scheme!r}{near}")
    if "_visionlora" in model.__dict__:
        registry_of(model)
    if quantised_base(model) is not None:
        raise StateError("the base is quantised already; call dequantize_base first")
    quantise = _QUANTISERS[scheme]()
    linear = [name for name, layer in own_modules(model).items() if plain_linear(layer)]
    names = _quantisable(model, linear)
    record = Quantised(scheme, len(linear))
    made = {name: new for name in names if (new := _rounded(model, name, quantise, record)) is not None}
    if not made:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer that {scheme} can store ({len(linear)} linear layers, head "
            "included); leave quantize away, or choose another scheme"
        )
    for name, new in made.items():
        _put(model, name, new)
    weights: dict[str, Any] = {f"{name}.weight": model.get_submodule(name)._parameters["weight"] for name in made}
    record.stored = {key: tensor_digest(key, weight) for key, weight in weights.items()}
    model.__dict__["_visionlora_quantised"] = record
    _hold_still(model, list(made))
    log.info("base quantised to %s", record)
    return record


def quantised_as_recorded(model: nn.Module, base: dict[str, Any], wanted: str) -> nn.Module:
    """Change a freshly built base to what an adapter's record ("recorded") or a name says. Return the model."""
    scheme = base.get(QUANTISED) if wanted == "recorded" else wanted
    if scheme in (None, "none"):
        return model
    try:
        quantize_base(model, scheme)  # type: ignore[arg-type]
    except ConfigError as e:
        hint = "" if wanted != "recorded" else '. To run the adapter on the base in full precision pass quantize="none"'
        raise ConfigError(f"{e}{hint}") from None
    return model


def dequantize_base(model: nn.Module) -> nn.Module:
    """Change the model in place: give its quantised layers plain weights again, rounded as they are. Return the model.

    That is another base than the original one, with another fingerprint; adapters on it stay and keep their outputs.
    """
    if "_visionlora" in model.__dict__:
        registry_of(model)
    names = [n for n, m in own_modules(model).items() if is_quantised(m._parameters.get("weight"))]
    if not names:
        raise StateError("the base is not quantised")
    plain = {name: _plain_weight(model.get_submodule(name)) for name in names}
    for name, weight in plain.items():
        _put(model, name, weight)
    model.__dict__.pop("_visionlora_quantised", None)
    return model


def merge_dequantized(model: nn.Module, example: Tensor | None = None) -> Merged:
    """Return a plain copy of the model in full precision, its active adapters folded in, and how far it is from it.

    The outputs are those of the quantised model with its adapters, which stay untouched. Raises StateError where the
    base is not quantised (call merge) or nothing is active.
    """
    quantised = quantised_base(model)
    if quantised is None:
        raise StateError("the base is not quantised; call merge(model)")
    whole = merge(dequantize_base(copy.deepcopy(model)))
    del whole._visionlora  # the copy is a plain model; the adapters live on in the first one
    error = None if example is None else _difference(model, whole, example)
    said = "" if error is None else f", outputs equal to {error:.1e}"
    log.info("merged into a copy in full precision%s; its base is rounded by %.2f %%", said, 100 * quantised.error)
    return Merged(whole, quantised.error, error)


def _quantisable(model: nn.Module, linear: list[str]) -> list[str]:
    heads = set(head_layers(model))
    owners = Counter(id(m._parameters.get("weight")) for m in own_modules(model).values())
    return [
        name
        for name in linear
        if name not in heads and _can_change(model.get_submodule(name)) and not _is_read(model, name)
        if owners[id(model.get_submodule(name)._parameters["weight"])] == 1  # not tied to an embedding
    ]


def _can_change(layer: nn.Module) -> bool:
    weight = layer._parameters["weight"]
    if weight is None or not materialisable(weight) or isinstance(layer, Materialised):
        return False
    # a weight that an adapter owns in full is trained, not frozen
    adapters: Any = layer.adapters.values() if isinstance(layer, Adapted) else ()
    return not any("weight" in a and not hasattr(a["weight"], "geometry") for a in adapters)


def _is_read(model: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return owner_reads_weight(model.get_submodule(owner), leaf)


def _rounded(model: nn.Module, name: str, quantise: Callable[[nn.Module], Any], record: Quantised) -> Any:
    layer = model.get_submodule(name)
    weight, new = _stored(layer), quantise(layer)
    if new is None:
        return None
    tensor: Any = new._parameters["weight"] if isinstance(new, nn.Module) else new
    key = f"{name}.weight"
    off, own = (dequantised(tensor) - weight).double().norm(), weight.double().norm()
    record.errors[key] = float(off / own) if own else 0.0
    record.squares = (record.squares[0] + float(off) ** 2, record.squares[1] + float(own) ** 2)
    record.originals[key] = tensor_digest(key, weight)
    record.bytes_before += weight.numel() * weight.itemsize
    record.bytes_after += sum(t.numel() * t.itemsize for t in inner_tensors(tensor))
    return new


def _stored(layer: nn.Module) -> Tensor:
    weight = layer._parameters["weight"]  # not .weight, which an adapter changes
    assert weight is not None
    return weight.detach()


def _put(model: nn.Module, name: str, new: Any) -> None:
    layer = model.get_submodule(name)
    registry: Registry | None = model.__dict__.get("_visionlora")
    if registry is not None:
        registry.grads[f"{name}.weight"] = False
    if isinstance(new, nn.Module):
        if isinstance(layer, Adapted):
            for adapter, changes in layer.adapters.items():
                attach(new, adapter, dict(changes.items()), Branched)  # type: ignore[operator]
            set_active(new, layer.active)  # type: ignore[arg-type]
        model.set_submodule(name, new)
        return
    layer._parameters["weight"] = nn.Parameter(new, requires_grad=False)


def _plain_weight(layer: nn.Module) -> Any:
    weight: Any = layer._parameters["weight"]  # bitsandbytes' tensor loses its scales in detach()
    numbers = dequantised(weight)
    if plain_linear(layer):
        return numbers
    plain = nn.Linear(numbers.shape[1], numbers.shape[0], bias=False, device="meta")
    plain._parameters |= {"weight": nn.Parameter(numbers, requires_grad=False), "bias": layer._parameters["bias"]}
    return plain.train(layer.training)


def _hold_still(model: nn.Module, names: list[str]) -> None:
    # beside an adapter, a layer without one must run through our op too: torchao's keeps the numbers of the weight
    for name in names:
        layer = model.get_submodule(name)
        for adapter in adapter_names(model) if not isinstance(layer, Adapted) else ():
            attach(layer, adapter, {}, Branched)


@torch.inference_mode()
def _difference(model: nn.Module, whole: nn.Module, example: Tensor) -> float:
    training = model.training
    wanted = model.eval()(example)
    model.train(training)
    found = whole.eval()(example)
    whole.train(training)
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _int8() -> Callable[[nn.Module], Any]:
    library = _need("torchao", "torchao.quantization")

    def quantise(layer: nn.Module) -> Any:
        made = library.Int8Tensor.from_hp(_stored(layer), library.PerRow())
        # its zero points are all 0: without them the numbers are made in a third of the time
        return library.Int8Tensor(made.qdata, made.scale, made.block_size, made.dtype)

    return quantise


def _nf4() -> Callable[[nn.Module], Any]:
    library = _need("bitsandbytes", "bitsandbytes")

    def quantise(layer: nn.Module) -> Any:
        weight, bias = _stored(layer), layer._parameters["bias"]
        made = library.nn.Linear4bit(  # on "meta" it draws no random numbers
            weight.shape[1], weight.shape[0], bias=bias is not None, compute_dtype=weight.dtype, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        made.weight = library.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
        made.bias = bias
        made.support_avx512bf16_for_cpu = False  # see core.quantised.is_readable
        return made.to(weight.device).train(layer.training)

    return quantise


_QUANTISERS: dict[Scheme, Callable[[], Callable[[nn.Module], Any]]] = {
    "int8": _int8,
    "nf4": _nf4,
}


def _need(package: str, module: str) -> Any:
    try:
        with _quiet():
            return import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or e.name.partition(".")[0] != package:
            raise  # the package is there and lacks one of its own
        raise ConfigError(
            f'a quantised base needs {package}, which is not installed: pip install "visionlora[quant]"'
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    # both packages warn at import of things that are not the user's: escapes in docstrings, kernels of other devices
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
