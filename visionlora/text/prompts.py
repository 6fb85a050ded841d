"""From an example to the pieces of text a causal model reads, each learned or only given."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from visionlora.errors import ConfigError, DataError
from visionlora.text.columns import Example
from visionlora.text.extras import need

__all__ = ["Chat", "Piece", "answer_of", "columns_of", "fill", "pieces_of", "prompt_of", "uses_chat"]

Chat = Literal["auto", "off"]
PLAIN = "{prompt}\n"
TURN = "{role}: "
NO_ANSWER = "the messages hold no turn of the assistant, which is what would be learned"


class Piece(NamedTuple):
    """A piece of text and whether the model learns to write it."""

    text: str
    learned: bool


def columns_of(template: str | None) -> list[str]:
    """Return the columns that a template names in braces. Raises ConfigError for anything but plain names."""
    if template is None:
        return []
    try:
        found = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as e:
        raise ConfigError(f"template {template!r}: {e}; a brace of the text itself is written twice") from None
    for name, spec, conversion in found:
        if not str(name).isidentifier() or spec or conversion:
            raise ConfigError(f"template: expected a column as in {{dialogue}}, got {{{name}}}")
    if not found:
        raise ConfigError(f"template {template!r} names no column: write one as {{prompt}}")
    return list(dict.fromkeys(str(name) for name, _, _ in found))


def fill(template: str, fields: Mapping[str, Any]) -> str:
    """Return the template with the columns of an example in it."""
    return template.format_map({name: fields[name] for name in columns_of(template)})


def pieces_of(example: Example, tokenizer: Any, *, template: str | None = None, chat: Chat = "auto") -> list[Piece]:
    """Return what a causal model reads of an example; of a prompt and its response it learns the response alone.

    Where the tokenizer has a chat template, a prompt is a user's turn and the response the assistant's; of messages
    every turn of the assistant is learned. chat="off" writes plain lines.
    """
    fields = example.fields
    if "text" in fields and template is None:
        return [Piece(fields["text"], True)]
    messages = _messages(fields, template)
    try:
        if uses_chat(tokenizer, chat):
            return _chat_pieces(tokenizer, messages)
        return _learned(_plain_turns(messages)) if "messages" in fields else _plain_pair(messages, template)
    except DataError as e:
        raise DataError(f"{example.place}: {e}") from None


def prompt_of(example: Example, tokenizer: Any, *, template: str | None = None, chat: Chat = "auto") -> str:
    """Return the text after which a model writes its answer."""
    fields = example.fields
    if "text" in fields and template is None:
        return str(fields["text"])
    messages = [m for m in _messages({**fields, "response": ""}, template) if m["content"]]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise DataError(f"{example.place}: there is nothing to answer")
    if uses_chat(tokenizer, chat):
        return _rendered(tokenizer, messages, open_answer=True)
    plain = _plain_turns(messages) if "messages" in fields else _plain_pair(messages, template)
    opened = TURN.format(role="assistant") if "messages" in fields else ""
    return "".join(piece.text for piece in plain) + opened


def answer_of(example: Example) -> str | None:
    """Return what should come out after the prompt, if the example says so."""
    fields = example.fields
    if "messages" in fields:
        last = fields["messages"][-1]
        return str(last["content"]) if last["role"] == "assistant" else None
    return fields.get("response") or fields.get("target")


def uses_chat(tokenizer: Any, chat: Chat) -> bool:
    """Tell whether prompts go through the tokenizer's chat template."""
    return chat == "auto" and bool(tokenizer.chat_template)


def _messages(fields: Mapping[str, Any], template: str | None) -> list[dict[str, str]]:
    if "messages" in fields:
        return list(fields["messages"])
    prompt = fields["prompt"] if template is None else fill(template, fields)
    if not prompt.strip():
        raise DataError("the prompt is empty")
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": fields["response"]}]


def _plain_pair(messages: Sequence[Mapping[str, str]], template: str | None) -> list[Piece]:
    prompt, *answer = (message["content"] for message in messages)
    given = prompt if template is not None else PLAIN.format(prompt=prompt)
    return [Piece(given, False), *(Piece(text, True) for text in answer)]


def _plain_turns(messages: Sequence[Mapping[str, str]]) -> list[Piece]:
    found = []
    for message in messages:
        found.append(Piece(TURN.format(role=message["role"]), False))
        found.append(Piece(message["content"], message["role"] == "assistant"))
        if message["role"] != "assistant":
            found.append(Piece("\n", False))
    return found


def _learned(pieces: list[Piece]) -> list[Piece]:
    """Return the pieces up to the last one that is learned."""
    while pieces and not pieces[-1].learned:
        pieces.pop()
    if not pieces:
        raise DataError(NO_ANSWER)
    return pieces


def _chat_pieces(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> list[Piece]:
    found, done = [], ""
    for at, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(tokenizer, messages[:at], open_answer=True) if at else done
        after = _rendered(tokenizer, messages[: at + 1])
        if not before.startswith(done) or not after.startswith(before):
            raise ConfigError(
                "the tokenizer's chat template rewrites earlier turns, so what is learned cannot be told apart: give "
                'the last turn as prompt and response, or set chat to "off"'
            )
        found += [Piece(before[len(done) :], False), Piece(after[len(before) :], True)]
        done = after
    if not found:
        raise DataError(NO_ANSWER)
    return [piece for piece in found if piece.text]


def _rendered(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, open_answer: bool = False) -> str:
    failure = need("jinja2").TemplateError
    try:
        text = tokenizer.apply_chat_template([*messages], tokenize=False, add_generation_prompt=open_answer)
    except failure as e:
        raise DataError(f"the tokenizer's chat template refuses the messages: {e}") from None
    return str(text)
