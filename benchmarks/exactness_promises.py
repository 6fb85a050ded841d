"""The promises of an adapter, and how each is checked on a layer."""

from __future__ import annotations

import logging
import tempfile
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from exactness_libraries import NotOffered, Put, Refused, Spot
from exactness_rows import Row
from layer_kinds import cast
from torch import Tensor, nn

ROUNDING = 1e-9  # float64; as a share of what the adapter changes

Place = Callable[[nn.Module, Spot], Put]


@dataclass(frozen=True)
class Verdict:
    """Whether a promise is kept, not made or broken; what the table says of it; how large the error is."""

    state: str
    text: str
    error: float = 0.0


def bits(error: float) -> Verdict:
    if not error:
        return Verdict("kept", "exact")
    return Verdict("broken", f"{error:.0e}" if error < 1e-4 else f"wrong: {error:.2g}", error)


def share(error: float, effect: float) -> Verdict:
    part = error / effect
    if part <= ROUNDING:
        return Verdict("kept", f"{part:.0e}" if part else "exact")
    return Verdict("broken", f"wrong: {part:.2g}", part)


def distance(y: Tensor, z: Tensor) -> float:
    return float((y - z).abs().max())


@dataclass(frozen=True)
class Case:
    """An adapter on one layer, made anew for every promise from the same seeds."""

    place: Place
    row: Row

    def base(self, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(0)
        model, shape = nn.Sequential(self.row.kind.make()).eval(), self.row.kind.shape
        x = torch.randint(1, 20, shape) if self.row.kind.tokens else torch.randn(shape)
        return model.to(dtype), cast(x, dtype)

    def put(self, dtype: torch.dtype = torch.float32, noise: float = 0.3) -> Put:
        put = self.place(self.base()[0], self.row.spot)
        generator = torch.Generator().manual_seed(1)
        for parameter in put.own:
            parameter.data += noise * torch.randn(parameter.shape, generator=generator)
        for part in put.parts:
            part.to(dtype)
        return put


def attaches(case: Case) -> Verdict:
    """takes this layer"""
    case.put()
    return Verdict("kept", "yes")


def start(case: Case) -> Verdict:
    """the fresh adapter changes no bit of the output (float32)"""
    model, x = case.base()
    return bits(distance(case.put(noise=0).model(x), model(x)))


def acts(case: Case) -> Verdict:
    """an adapter of other numbers changes the output"""
    model, x = case.base()
    silent = distance(case.put().model(x), model(x)) < 1e-6
    return Verdict("broken", "silent: no effect") if silent else Verdict("kept", "yes")


def dense(case: Case) -> Verdict:
    """output = the base run with the weight that the library says the adapter stands for (float64)"""
    (model, x), put = case.base(torch.float64), case.put(torch.float64)
    y = put.model(x)
    return share(distance(torch.func.functional_call(model, put.dense(), x), y), distance(y, model(x)))


def merged(case: Case, way: int = 0) -> Verdict:
    """output after merging = output before (float64)"""
    (model, x), put = case.base(torch.float64), case.put(torch.float64)
    y = put.model(x)
    put.ways()[way][0]()
    return share(distance(put.model(x), y), distance(y, model(x)))


def disabled(case: Case) -> Verdict:
    """with the adapter off the output is the base's, bit for bit (float32)"""
    (model, x), put = case.base(), case.put()
    put.model(x)
    with put.disabled():
        return bits(distance(put.model(x), model(x)))


def unmerged(case: Case) -> Verdict:
    """merge, then unmerge, gives the stored weights back, bit for bit (float32)"""
    ways = range(len(case.put().ways()))  # the best counts, those first whose merge is right
    right = {way: judge(lambda case, way=way: merged(case, way), case).state == "kept" for way in ways}
    found = {way: judge(lambda case, way=way: undone(case, way), case) for way in ways}
    states = ("kept", "broken", "no")
    return found[min(ways, key=lambda way: (not right[way], states.index(found[way].state), found[way].error))]


def undone(case: Case, way: int) -> Verdict:
    put = case.put()
    merge, unmerge = put.ways()[way]
    if unmerge is None:
        raise NotOffered
    merge()
    unmerge()
    after = put.base()
    return bits(max(distance(after[key], tensor) for key, tensor in case.base()[0].state_dict().items()))


def keys(case: Case) -> Verdict:
    """the base's state-dict keys stay while the adapter is on"""
    kept = case.base()[0].state_dict().keys() <= case.put().keys()
    return Verdict("kept", "kept") if kept else Verdict("broken", "renamed")


def saved(case: Case) -> Verdict:
    """save, then load on a fresh base, gives the same output, bit for bit (float32)"""
    (_, x), put = case.base(), case.put()
    y = put.model(x)
    with tempfile.TemporaryDirectory() as folder:
        put.save(Path(folder))
        again = put.load(case.base()[0], Path(folder))
    return bits(distance(again.model(x), y))


PROMISES: dict[str, Callable[[Case], Verdict]] = {
    promise.__name__: promise for promise in (attaches, start, acts, dense, merged, disabled, unmerged, keys, saved)
}
"""What each one says is its docstring."""


def judge(promise: Callable[[Case], Verdict], case: Case) -> Verdict:
    """Return the verdict on a promise, an exception included."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return promise(case)
    except NotOffered:
        return Verdict("no", "-")
    except Refused:
        return Verdict("no", "refused")
    except Exception as e:  # whatever a library throws is its result
        if _meant(e):
            return Verdict("no", "refused")
        return Verdict("broken", f"crash: {type(e).__name__}", float("inf"))


def _meant(e: Exception) -> bool:
    """Tell a refusal, raised by a line of the library itself, from a crash somewhere inside torch."""
    frame = traceback.extract_tb(e.__traceback__)[-1]
    ours = {"visionlora", "peft", "lycoris", "loralib"} & set(Path(frame.filename).parts)
    return bool(ours) and (frame.line or "").startswith(("raise", "assert"))


def verdicts(place: Place, row: Row) -> dict[str, Verdict]:
    """Return the verdict on every promise that the ones before it leave open."""
    case, found = Case(place, row), {}
    for name, promise in PROMISES.items():
        found[name] = judge(promise, case)
        if name in ("attaches", "acts") and found[name].state != "kept":
            break
    return found


def passed_over(place: Place, row: Row) -> bool:
    """Tell whether a layer beside a Linear that does get an adapter is left out without an error or a warning."""
    spot = Spot([*row.spot.names, "1"], [*row.spot.modules, "1"], row.spot.tensors)
    said: list[logging.LogRecord] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = said.append  # type: ignore[method-assign]
    logging.getLogger("LyCORIS").addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            both = place(nn.Sequential(row.kind.make(), nn.Linear(8, 8)), spot)
            alone = place(nn.Sequential(nn.Identity(), nn.Linear(8, 8)), Spot(["1"], ["1"], ["1.weight"]))
    except Exception:  # an error of any kind is not silence
        return False
    finally:
        logging.getLogger("LyCORIS").removeHandler(listener)
    return len(both.own) == len(alone.own) and not said and not warned
