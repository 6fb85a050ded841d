"""One layer of a model as the readers and writers of files see it."""

from __future__ import annotations

from torch import Tensor, nn

from visionlora.config import LoraConfig, did_you_mean
from visionlora.core.delta import Delta
from visionlora.core.geometry import Geometry, geometry_of
from visionlora.errors import AdapterFileError
from visionlora.io.formats.change import DENSE, LayerChange
from visionlora.io.formats.factors import dense_change
from visionlora.io.formats.lokr import kronecker
from visionlora.plan import base_tensor
from visionlora.variants import VARIANTS


def known_layer(model: nn.Module, layer: str) -> str:
    """Return a name that a module of the model has. Raises AdapterFileError."""
    names = dict(model.named_modules())
    if layer not in names:
        near = did_you_mean(layer, list(names))
        raise AdapterFileError(f"{type(model).__name__} has no layer {layer!r}, which the file changes{near}")
    return layer


def layer_geometry(model: nn.Module, layer: str) -> Geometry:
    """Return the sizes of a layer that a file changes. Raises AdapterFileError where its weight cannot change."""
    geometry = geometry_of(model.get_submodule(layer))
    if geometry is None:
        raise AdapterFileError(f"{layer} is a {type(model.get_submodule(layer)).__name__}: no weight we can adapt")
    return geometry


def base_weight(model: nn.Module, layer: str) -> Tensor:
    """Return a layer's own weight as (out, in, *kernel)."""
    weight = base_tensor(model.get_submodule(layer), "weight")
    assert weight is not None
    return layer_geometry(model, layer).canonical(weight.detach())


def own_value(model: nn.Module, layer: str, attribute: str) -> Tensor:
    """Return a tensor that a layer has. Raises AdapterFileError where it has none."""
    found = base_tensor(model.get_submodule(layer), attribute)
    if found is None:
        raise AdapterFileError(f"{layer} of {type(model).__name__} has no {attribute}, the file brings one")
    return found.detach()


def delta_of(change: LayerChange, geometry: Geometry, weight: Tensor) -> Delta:
    """Return a change of ours with a file's numbers; it draws random numbers that are overwritten."""
    config = LoraConfig(r=change.rank, variant=change.variant)  # type: ignore[arg-type]
    delta = VARIANTS[change.variant](geometry, weight, change.rank, change.scale, config)
    delta.load_state_dict({key: t for key, t in change.tensors.items() if key != "m" or change.variant == "dora"})
    return delta


def dense_of(change: LayerChange, geometry: Geometry, weight: Tensor) -> Tensor:
    """Return the whole change in float64, without the "m" that may lie beside it."""
    if change.variant == DENSE:
        return change.tensors["change"]
    if change.variant == "lokr":  # its sizes need not be those of our LoKr
        return kronecker(change, geometry)
    return dense_change(delta_of(change, geometry, weight), weight)
