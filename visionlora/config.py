"""What an adapter is made of, as one frozen dataclass that imports no torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from visionlora.errors import ConfigError

Variant = Literal["lora", "dora", "fa", "loha", "lokr", "tucker", "up", "spatial", "vera", "ia3"]
Norm = Literal["frozen", "affine", "stats", "stats-affine"]
Bias = Literal["none", "lora_only", "all"]
Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "soma", "eva"]

ADAPTER_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class LoraConfig:
    """Say which layers change, how, and with how many parameters."""

    r: int = 16
    """Rank of the change; parameters grow linearly with it."""
    lora_alpha: float = 32.0
    """Strength of the change: scale = lora_alpha / r (lora_alpha / sqrt(r) with use_rslora)."""
    lora_dropout: float = 0.0
    """Probability of dropping a rank-one part of the change in a training step; costs no activation memory."""
    target_modules: str | list[str] = "auto"
    """"auto", "all-linear", "all-conv", "all", "none", a regular expression over whole layer names, or a list of
    layer names or name endings. Parts of a fused layer go in brackets: ["attn.qkv[q,v]"]."""
    exclude_modules: str | list[str] = field(default_factory=list)
    """Layers left alone, written like target_modules; wins over it."""
    variant: Variant = "lora"
    """How a change is made of numbers: "lora" (Hu et al. 2021), "dora" (Liu et al. 2024), "fa": LoRA with A frozen,
    "loha" and "lokr": Hadamard and Kronecker products, "tucker": a small kernel between two 1x1, "up": the kernel in B,
    "spatial": learned filters mixed per channel (for depthwise layers), "vera" and "ia3": vectors alone."""
    decompose_factor: int = -1
    """Of "lokr": the largest side of the first Kronecker factor; -1 makes both factors as square as they go."""
    norm: Norm = "frozen"
    """Normalisation layers: "frozen", or "affine" to train their scale and shift, which keeps an activation for each of
    them. BatchNorm has the statistics of the base in both; "stats" and "stats-affine" re-estimate them once on the
    target data. In none of them do statistics drift while training."""
    bias: Bias = "none"
    """Also train the biases of every layer, normalisation included ("all"), of the adapted ones ("lora_only") or of
    none ("none"). A bias costs a number a channel and no activation memory."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023): the strength no longer shrinks as the rank grows."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Rank of single layers: {regular expression of a name ending: rank}."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """lora_alpha of single layers, written like rank_pattern."""
    modules_to_save: str | list[str] = "auto"
    """Modules trained in full and saved with the adapter: "auto" is the classifier head; a list adds to the head;
    "none" trains no module in full, the head included."""
    init_lora_weights: Init = "default"
    """Starting values. "default" (Kaiming uniform), "gaussian" (variance 1/r), "orthogonal" and "eva" (directions of
    the data's activations, see visionlora.fit_to_data) fill A while B is 0; "pissa", "olora" and "soma" train a part of
    the weight itself: its largest singular components, its first QR columns, its smallest singular components."""
    task_type: str | None = None
    """The field's name of the task; None for image models."""

    def __post_init__(self) -> None:
        _whole_number("r", self.r)
        for pattern, rank in self.rank_pattern.items():
            _whole_number(f"rank_pattern[{pattern!r}]", rank)
        _positive("lora_alpha", self.lora_alpha)
        if self.decompose_factor != -1:
            _whole_number("decompose_factor", self.decompose_factor)
        for pattern, alpha in self.alpha_pattern.items():
            _positive(f"alpha_pattern[{pattern!r}]", alpha)
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        for name, choices in _CHOICES.items():
            _one_of(name, getattr(self, name), choices)
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            _names(name, getattr(self, name))
        if isinstance(self.modules_to_save, str):
            _one_of("modules_to_save", self.modules_to_save, ("auto", "none"))
        _check_start(self.init_lora_weights, self.variant)
        for pattern in (*self.rank_pattern, *self.alpha_pattern):
            compile_pattern(pattern, "rank_pattern or alpha_pattern")

    def scale(self, rank: int, alpha: float | None = None) -> float:
        """Return the one number that multiplies B @ A."""
        alpha = self.lora_alpha if alpha is None else alpha
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that from_dict reads back."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LoraConfig:
        """Return the config that to_dict wrote; an unknown field is an error."""
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                near = f'; did you mean "{MEANT[key]}"?' if key in MEANT else did_you_mean(key, known)
                raise ConfigError(f"LoraConfig has no field {key!r}{near}; it has {', '.join(known)}")
        return cls(**data)


MEANT = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "targets": "target_modules"}
"""What other libraries call our fields."""
_CHOICES: dict[str, tuple[str, ...]] = {
    "variant": get_args(Variant),
    "norm": get_args(Norm),
    "bias": get_args(Bias),
    "init_lora_weights": get_args(Init),
}


def _check_start(init: str, variant: str) -> None:
    needs = {"eva": ("lora", "dora", "fa"), **dict.fromkeys(("pissa", "olora", "soma"), ("lora",))}.get(
        init, (variant,)
    )
    if variant not in needs:
        raise ConfigError(f'init_lora_weights="{init}" starts the variants {", ".join(needs)}, not {variant!r}')


def did_you_mean(word: str, choices: list[str], cutoff: float = 0.5) -> str:
    """Return '; did you mean "x"?' for the nearest choice, or nothing."""
    near = get_close_matches(word, choices, n=1, cutoff=cutoff)
    return f'; did you mean "{near[0]}"?' if near else ""


def check_adapter_name(name: str) -> str:
    """Return the name if it may be a file, a folder and a module name at once."""
    if not isinstance(name, str) or not ADAPTER_NAME.fullmatch(name):
        raise ConfigError(f"an adapter name is 1 to 64 of A-Z a-z 0-9 _ -, got {name!r}")
    return name


def compile_pattern(pattern: str, where: str) -> re.Pattern[str]:
    """Return the compiled regular expression a user typed."""
    try:
        return re.compile(pattern)
    except re.error as e:
        raise ConfigError(f"{where}: {pattern!r} is not a regular expression ({e})") from None


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole_number(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}")


def _positive(name: str, value: object) -> None:
    if not _is_number(value) or value <= 0:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a finite number above 0, got {value!r}")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        near = did_you_mean(str(value), list(choices))
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{near}")


def _names(name: str, value: object) -> None:
    if isinstance(value, str) or (isinstance(value, (list, tuple)) and all(isinstance(v, str) and v for v in value)):
        return
    raise ConfigError(f"{name} must be text or a list of names, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, (list, tuple)) else value
