"""What, besides the tokenizer, decides which features come of examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from visionlora.config import did_you_mean
from visionlora.errors import ConfigError
from visionlora.text.columns import TaskType
from visionlora.text.labels import ProblemType
from visionlora.text.prompts import Chat, columns_of

__all__ = ["IGNORED", "Overlong", "TokenSettings", "check_choices", "describe", "one_of"]

IGNORED = -100
"""The label of a token that is not learned, as torch's cross-entropy has it."""
Overlong = Literal["auto", "cut", "split", "raise"]
CHOICES = {
    "documents": ("line", "paragraph", "file"),
    "on_error": ("raise", "skip"),
    "packing": ("none", "documents"),
}
SPLITTING = ("TOKEN_CLS", "QUESTION_ANS", "CAUSAL_LM")


@dataclass(frozen=True)
class TokenSettings:
    """Settings of tokenising."""

    task: TaskType
    max_length: int
    """Tokens of a feature."""
    max_target_length: int = 64
    """Tokens of what a model is to write."""
    stride: int = 64
    """Tokens that two windows of one long context share."""
    overlong: Overlong = "auto"
    template: str | None = None
    chat: Chat = "auto"
    problem: ProblemType = "single_label_classification"
    names: tuple[str, ...] = ()
    """Labels or tags in the order of their numbers."""
    answered: bool = True
    """Without it, as in prediction, labels are left out and a prompt is opened for its answer."""

    def __post_init__(self) -> None:
        one_of("overlong", self.overlong, get_args(Overlong))
        one_of("chat", self.chat, get_args(Chat))
        if self.overlong == "split" and self.task not in SPLITTING:
            told = f"split belongs to {', '.join(SPLITTING)}"
            raise ConfigError(f"overlong: {told}; {self.task} cuts (cut) or refuses (raise)")
        for name in ("max_length", "max_target_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.task == "CAUSAL_LM" and self.max_target_length >= self.max_length:
            told = f"max_target_length ({self.max_target_length}) must be under max_length ({self.max_length})"
            raise ConfigError(f"{told}: a feature holds the prompt and what is written")
        if self.task == "QUESTION_ANS" and not 0 <= self.stride < self.max_length // 2:
            raise ConfigError(f"stride must be under half of max_length ({self.max_length}), got {self.stride}")

    @property
    def splits(self) -> bool:
        """Whether an over-long example becomes several features."""
        return self.overlong in ("auto", "split") and self.task in SPLITTING

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)


def describe(counts: Mapping[str, int], max_length: int) -> str:
    """Return in words what was cut, split and dropped; nothing where all fitted."""
    of = f"of {counts['examples']:,} are longer than {max_length} tokens"
    told = {
        "cut": f"{{n:,}} {of} and lose {counts.get('lost', 0):,} tokens",
        "split": f"{{n:,}} {of} and are split: nothing is lost",
        "answers cut": "{n:,} answers are cut; their end is then not learned",
        "questions cut": "{n:,} questions take over half of a window and are cut",
        "dropped": "{n:,} are dropped: nothing to learn was left of them",
        "words without tokens": "{n:,} words become no token; their tags are lost",
        "answers out of tokens": "{n:,} answers stand at no token and count as unanswerable",
    }
    return "; ".join(text.format(n=counts[what]) for what, text in told.items() if counts.get(what))


def check_choices(settings: Any, task: TaskType) -> None:
    """Raise ConfigError for a setting of a data module that cannot work."""
    if settings.batch_size < 1 or settings.num_workers < 0:
        raise ConfigError("batch_size must be above 0, num_workers at least 0")
    for name, choices in CHOICES.items():
        one_of(name, settings[name], choices)
    if settings.packing != "none" and task != "CAUSAL_LM":
        raise ConfigError(f"packing belongs to CAUSAL_LM: in a row of {task} texts would see each other")
    if columns_of(settings.template) and task not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ConfigError(f"template writes prompts of CAUSAL_LM and SEQ_2_SEQ_LM; {task} has none")


def one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ConfigError if a setting is none of its choices."""
    if value not in choices:
        near = did_you_mean(str(value), list(choices))
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}{near}")
