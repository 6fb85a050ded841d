"""The special tokens a tokenizer puts around one text or two, and texts as plain token numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from json import dumps, loads
from typing import Any

from visionlora.errors import ConfigError
from visionlora.hub import local_only
from visionlora.text.extras import need

__all__ = ["Layout", "check_vocabulary", "fitting_length", "identity", "layout_of", "numbers", "ready_tokenizer"]

PLACED = ("TOKEN_CLS", "QUESTION_ANS")
USUAL = {"QUESTION_ANS": 384}
"""Tokens of an input where none are asked for, by task."""


@dataclass(frozen=True)
class Layout:
    """Numbers before, between and after the texts, with their token types (empty where the model has none)."""

    pieces: tuple[tuple[int, ...], ...]
    """Before the first text, after it, and so on: one more than there are texts."""
    types: tuple[tuple[int, ...], ...]
    """Types of the pieces."""
    text_types: tuple[int, ...]
    """Types of the texts."""

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return sum(map(len, self.pieces))

    def around(self, *texts: Sequence[int]) -> list[int]:
        """Return the numbers of the texts with the special tokens around them."""
        found = list(self.pieces[0])
        for text, piece in zip(texts, self.pieces[1:], strict=True):
            found += [*text, *piece]
        return found

    def types_around(self, *texts: Sequence[int]) -> list[int]:
        """Return the token types that go with `around`; nothing where the model has none."""
        if not self.text_types:
            return []
        found = list(self.types[0])
        for text, kind, piece in zip(texts, self.text_types, self.types[1:], strict=True):
            found += [*[kind] * len(text), *piece]
        return found


def ready_tokenizer(given: Any, task: str) -> Any:
    """Return a tokenizer by its name, its folder or itself, that can pad, on the right. Raises ConfigError.

    A tokenizer without padding, as GPT-2's, pads with its end token: lengths, not numbers, tell what is padding.
    """
    tokenizer = _load(given) if isinstance(given, str) else given
    if task in PLACED and not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ConfigError(f"{task} needs a tokenizer that tells where tokens stand in the text; {kind} does not")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"{type(tokenizer).__name__} has no padding and no end token: set its pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    return tokenizer


def fitting_length(tokenizer: Any, asked: int | None, task: str) -> int:
    """Return how many tokens an input may have: as asked, else 512 (questions 384) where the model takes as many."""
    limit = int(tokenizer.model_max_length)  # a number of 30 digits where it is not known
    if asked is None:
        return min(limit, USUAL.get(task, 512))
    if asked > limit:
        raise ConfigError(f"max_length {asked} is more than the {limit} tokens that this tokenizer's model takes")
    return asked


def layout_of(tokenizer: Any, texts: int = 1, *, target: bool = False) -> Layout:
    """Return the layout of one text or two; with target that of the text a model is to write."""
    words = ("a", "b")[:texts]
    told = {"text_target": "a"} if target else dict(zip(("text", "text_pair"), words, strict=False))
    encoded = tokenizer(**told, truncation=False, padding=False)
    ids, kinds = list(encoded["input_ids"]), list(encoded.get("token_type_ids", ()))
    pieces, types, text_types, at = [], [], [], 0
    for word in words:
        bare = _bare(tokenizer, word, target)
        start = next((i for i in range(at, len(ids)) if ids[i : i + len(bare)] == bare), None)
        if start is None or not bare:
            raise ConfigError(
                f"{type(tokenizer).__name__} puts special tokens around a text in a way that is not known"
            )
        pieces.append(tuple(ids[at:start]))
        types.append(tuple(kinds[at:start]))
        text_types += kinds[start : start + 1]
        at = start + len(bare)
    return Layout((*pieces, tuple(ids[at:])), (*types, tuple(kinds[at:])), tuple(text_types))


def numbers(tokenizer: Any, texts: Sequence[str], *, target: bool = False, **options: Any) -> Any:
    """Return the encoding of some texts without special tokens, whole: nothing is cut here."""
    given = {"text_target" if target else "text": list(texts)}
    return tokenizer(
        **given, add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False,
        return_token_type_ids=False, verbose=False, **options,
    )  # fmt: skip


def identity(tokenizer: Any) -> str:
    """Return a hash of everything that decides which numbers a text becomes."""
    content: dict[str, Any] = {
        "class": type(tokenizer).__name__,
        "special": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "chat": tokenizer.chat_template,
        "inputs": list(tokenizer.model_input_names),
    }
    if tokenizer.is_fast:
        # truncation and padding are marks of the newest call, not of the tokenizer
        stored: Mapping[str, Any] = loads(tokenizer.backend_tokenizer.to_str())
        content["stored"] = {key: value for key, value in stored.items() if key not in ("truncation", "padding")}
    else:
        content["vocabulary"] = tokenizer.get_vocab()
        content["settings"] = {key: repr(value) for key, value in tokenizer.init_kwargs.items()}
    return blake2b(dumps(content, sort_keys=True, default=str).encode(), digest_size=16).hexdigest()


def check_vocabulary(tokenizer: Any, embeddings: int) -> None:
    """Raise ConfigError if a tokenizer can give a number for which a model has no embedding."""
    highest = max(tokenizer.get_vocab().values())
    if highest >= embeddings:
        raise ConfigError(
            f"the tokenizer has {highest + 1:,} tokens, the model embeds {embeddings:,}: it belongs to another model; "
            "leave --data.tokenizer away to take the model's own"
        )


def _load(name: str) -> Any:
    try:
        return need("transformers").AutoTokenizer.from_pretrained(name, **local_only(name))
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"no tokenizer {name!r} can be had: {' '.join(str(e).split())[:300]}") from None


def _bare(tokenizer: Any, word: str, target: bool) -> list[int]:
    return list(numbers(tokenizer, [word], target=target)["input_ids"][0])
