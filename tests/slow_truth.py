"""The weight an adapter makes, computed the long way: from its numbers, group by group, without the product's code."""

from __future__ import annotations

import torch
from drawn_layers import Adapter, Layer
from torch import Tensor

Numbers = dict[str, Tensor]


def changed_weight(layer: Layer, base: Tensor, adapters: list[tuple[Adapter, Numbers]]) -> Tensor:
    """Return the weight as the layer has it, with the changes of all adapters, each at its strength."""
    W = layer.canonical(base)
    changes = (adapter.strength * change(layer, W, adapter, numbers) for adapter, numbers in adapters)
    return base + layer.stored(sum(changes, torch.zeros_like(W)))


def change(layer: Layer, W: Tensor, adapter: Adapter, n: Numbers) -> Tensor:
    """Return W' - W as (out, in, *kernel)."""
    s = adapter.scale
    match adapter.config.variant:
        case "lora" if "start_A" in n:
            return s * (grouped(layer, LORA, n["B"], n["A"]) - grouped(layer, LORA, n["start_B"], n["start_A"]))
        case "lora" | "fa":
            return s * grouped(layer, LORA, n["B"], n["A"])
        case "dora":
            V = W + s * grouped(layer, LORA, n["B"], n["A"])
            norm = V.detach().flatten(1).norm(dim=1)  # a constant, as the paper has it
            return V * column(n["m"] / norm, W) - W
        case "loha":
            return s * ((n["w1_a"] @ n["w1_b"]) * (n["w2_a"] @ n["w2_b"])).reshape(W.shape)
        case "lokr":
            w1, w2 = n["w1"], n["w2"] if "w2" in n else n["w2_a"] @ n["w2_b"]
            w2 = w2.reshape(W.shape[0] // w1.shape[0], W.shape[1] // w1.shape[1], *W.shape[2:])
            return s * torch.einsum("ab,cd...->acbd...", w1, w2).reshape(W.shape)
        case "tucker":
            return s * grouped(layer, "or,rq...,qi->oi...", n["B"], n["M"], n["A"])
        case "up":
            return s * grouped(layer, "or...,ri->oi...", n["B"], n["A"])
        case "spatial":
            return s * torch.einsum("oir,r...->oi...", n["B"], n["A"])
        case "vera":
            return grouped(layer, LORA, column(n["b"], n["B"]) * n["B"], column(n["d"], n["A"]) * n["A"])
        case "ia3":
            return W * column(n["s"] - 1, W)


LORA = "or,ri...->oi..."


def grouped(layer: Layer, formula: str, *factors: Tensor) -> Tensor:
    """Return the product of each group, one below the other, as the factors hold their groups."""
    terms = formula.partition("->")[0].split(",")
    plain = [t if "..." in term else t.flatten(1) for term, t in zip(terms, factors, strict=True)]
    blocks = zip(*(factor.chunk(layer.groups) for factor in plain), strict=True)
    return torch.cat([torch.einsum(formula, *block) for block in blocks])


def column(numbers: Tensor, like: Tensor) -> Tensor:
    return numbers.view(-1, *[1] * (like.ndim - 1))
