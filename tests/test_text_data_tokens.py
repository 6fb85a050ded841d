"""Token numbers are those of transformers' own calls; what is cut, learned and answered is where it should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from text_toy import FAMILIES, sentences, tokenizer

from visionlora.errors import ConfigError, DataError
from visionlora.text.caching import cached_features, key_of
from visionlora.text.collating import Collate
from visionlora.text.columns import Example, TaskType
from visionlora.text.features import Features, FeatureWriter
from visionlora.text.layout import check_vocabulary, fitting_length, identity, layout_of, ready_tokenizer
from visionlora.text.prompts import columns_of, fill, pieces_of, prompt_of
from visionlora.text.settings import IGNORED, TokenSettings, describe
from visionlora.text.tokenising import tokenise
from visionlora.text.windows import longest_first, windows, without_middle

TEXTS = sentences(12, seed=3)
CHAT = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def made(task: TaskType, tok: Any, *fields: dict[str, Any], length: int = 32, **settings: Any) -> Features:
    examples = [Example(one, f"line {at}") for at, one in enumerate(fields, 1)]
    return tokenise(examples, ready_tokenizer(tok, task), TokenSettings(task, length, **settings))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("length", [9, 10, 32])
def test_texts_are_as_the_tokenizer_makes_them(family: str, paired: bool, length: int) -> None:
    tok = tokenizer(family)
    fields = [{"text": t, "label": "b"} | ({"text_pair": TEXTS[-at]} if paired else {}) for at, t in enumerate(TEXTS)]
    features = made("SEQ_CLS", tok, *fields, length=length, names=("a", "b"))
    for found, one in zip(features, fields, strict=True):
        wanted = tok(one["text"], one.get("text_pair"), truncation="longest_first", max_length=length)
        assert found["input_ids"] == wanted["input_ids"]
        assert found.get("token_type_ids") == wanted.get("token_type_ids")
        assert found["labels"] == 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("length", "stride"), [(24, 0), (24, 4), (60, 8)])
def test_windows_of_a_context_are_as_the_tokenizer_makes_them(family: str, length: int, stride: int) -> None:
    tok, context = tokenizer(family), " ".join(TEXTS)
    fields = {"question": "who sat", "context": context, "answers": {"text": [], "answer_start": []}}
    features = made("QUESTION_ANS", tok, fields, length=length, stride=stride)
    wanted = tok(
        "who sat", context, truncation="only_second", max_length=length, stride=stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    batch = Collate(tok, TokenSettings("QUESTION_ANS", length, stride=stride), [Example(fields | {"id": "1"}, "")])(
        [*features]
    )
    assert [one["input_ids"] for one in features] == wanted["input_ids"]
    for at, offsets in enumerate(wanted["offset_mapping"]):
        inside = [pair if n == 1 else None for pair, n in zip(offsets, wanted.sequence_ids(at), strict=True)]
        assert batch["offset_mapping"][at] == inside
    assert set(batch["example_id"]) == {"1"}


@pytest.mark.parametrize("family", ["bert", "roberta", "t5", "llama", "gpt2"])
def test_an_answer_is_found_in_every_window_that_holds_it(family: str) -> None:
    tok, context = tokenizer(family), " ".join([*TEXTS[:4], "anna lives in paris", *TEXTS[4:8]])
    answers = {"text": ["anna lives"], "answer_start": [context.index("anna lives")]}
    fields = {"question": "who?", "context": context, "answers": answers}
    features = [*made("QUESTION_ANS", tok, fields, length=48, stride=20)]
    found = 0
    for one in features:
        first, last, ids = one["start_positions"], one["end_positions"], one["input_ids"]
        pairs = [*zip(one["offsets"][::2], one["offsets"][1::2], strict=True)]
        if first:
            assert context[pairs[first][0] : pairs[last][1]].strip() == "anna lives"
            assert tok.decode(ids[first : last + 1]).strip() == "anna lives"
            found += 1
        else:
            assert last == 0
            assert not (min(a for a, _ in pairs if a >= 0) <= answers["answer_start"][0] - 1
                        and max(b for _, b in pairs) >= answers["answer_start"][0] + 10)  # fmt: skip
    assert found > 0
    assert len(features) > 1


def test_an_over_long_question_is_cut_and_counted() -> None:
    fields = {"question": " ".join(TEXTS), "context": TEXTS[0], "answers": {"text": [], "answer_start": []}}
    features = made("QUESTION_ANS", tokenizer("bert"), fields, length=16, stride=2)
    assert max(features.lengths) <= 16
    assert "1 questions take over half of a window" in describe(features.counts, 16)


def test_tags_of_bert_are_those_of_separate_words() -> None:
    tok, words = tokenizer("bert"), [*TEXTS[0].split(), "unfilmable"]
    features = made("TOKEN_CLS", tok, {"tokens": words, "tags": ["x"] * len(words)}, names=("o", "x"))
    wanted = tok(words, is_split_into_words=True)
    assert features[0]["input_ids"] == wanted["input_ids"]
    firsts = [w if w is not None and wanted.word_ids()[i - 1] != w else -1 for i, w in enumerate(wanted.word_ids())]
    assert features[0]["word_ids"] == firsts
    assert features[0]["labels"] == [1 if w >= 0 else IGNORED for w in firsts]


@pytest.mark.parametrize("family", FAMILIES)
def test_tagged_words_are_read_as_a_sentence(family: str) -> None:
    tok, words = tokenizer(family), TEXTS[0].split()
    tags = [str(at % 2) for at in range(len(words))]
    (one,) = made("TOKEN_CLS", tok, {"tokens": words, "tags": tags}, names=("0", "1"))
    assert one["input_ids"] == tok(" ".join(words))["input_ids"]
    learned = [label for label in one["labels"] if label != IGNORED]
    assert learned == [at % 2 for at in range(len(words))]
    assert [n for n in one["word_ids"] if n >= 0] == [*range(len(words))]


def test_long_tagged_sentences_are_split_without_loss() -> None:
    words = " ".join(TEXTS).split()
    fields = {"tokens": words, "tags": ["x"] * len(words)}
    features = made("TOKEN_CLS", tokenizer("bert"), fields, length=10, names=("x", "y"))
    assert sum(label == 0 for one in features for label in one["labels"]) == len(words)
    assert [n for one in features for n in one["word_ids"] if n >= 0] == [*range(len(words))]
    assert features.counts == {"examples": 1, "split": 1, "words without tokens": 0}


@pytest.mark.parametrize("family", ["t5", "gpt2"])
@pytest.mark.parametrize("length", [6, 32])
def test_targets_are_as_the_tokenizer_makes_them_and_end_only_where_they_are_whole(family: str, length: int) -> None:
    tok = tokenizer(family)
    fields = {"source": TEXTS[0], "target": TEXTS[1]}
    (one,) = made("SEQ_2_SEQ_LM", tok, fields, max_target_length=length)
    whole = tok(text_target=TEXTS[1])["input_ids"]
    assert one["labels"] == whole[:length]
    assert one["input_ids"] == tok(TEXTS[0], truncation=True, max_length=32)["input_ids"]
    templated = made("SEQ_2_SEQ_LM", tok, {"a": "x", "b": "y", "target": "z"}, template="write {a}: {b} {{}}")
    assert tok.decode(templated[0]["input_ids"], skip_special_tokens=True) == tok.decode(
        tok("write x: y {}")["input_ids"], skip_special_tokens=True
    )


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_the_end_of_a_document_is_learned_although_padding_is_the_same_token(family: str) -> None:
    tok = ready_tokenizer(tokenizer(family), "CAUSAL_LM")
    settings = TokenSettings("CAUSAL_LM", 64, max_target_length=8)
    examples = [Example({"text": text}, "") for text in TEXTS[:3]]
    batch = Collate(tok, settings)([*tokenise(examples, tok, settings)])
    lengths = batch["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1
    for row, n in enumerate(lengths):
        assert batch["labels"][row, n - 1] == tok.eos_token_id
        assert batch["labels"][row, :n].eq(batch["input_ids"][row, :n]).all()
        assert batch["labels"][row, n:].eq(IGNORED).all()
        assert batch["input_ids"][row, n:].eq(tok.pad_token_id).all()


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_of_a_prompt_and_its_response_the_response_alone_is_learned(family: str) -> None:
    tok = tokenizer(family)
    (one,) = made("CAUSAL_LM", tok, {"prompt": TEXTS[0], "response": TEXTS[1]}, length=128)
    learned = [i for i in one["labels"] if i != IGNORED]
    assert learned == [*tok(TEXTS[1], add_special_tokens=False)["input_ids"], tok.eos_token_id]
    assert one["input_ids"][-len(learned) :] == learned
    assert one["prompt"] == len(one["input_ids"]) - len(learned)


def with_start(tok: Any) -> Any:
    """A tokenizer that begins every text with its bos token, as Llama's on the hub does."""
    from tokenizers.processors import TemplateProcessing

    tok.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tok.bos_token_id)]
    )
    return tok


def test_the_start_token_comes_once_and_is_not_learned_before_an_answer() -> None:
    tok = with_start(tokenizer("llama"))
    assert layout_of(tok).pieces == ((tok.bos_token_id,), ())
    (one,) = made("CAUSAL_LM", tok, {"prompt": TEXTS[0], "response": TEXTS[1]}, length=128)
    assert one["input_ids"].count(tok.bos_token_id) == 1
    assert one["input_ids"][0] == tok.bos_token_id
    assert one["labels"][0] == IGNORED
    (text,) = made("CAUSAL_LM", tok, {"text": TEXTS[0]}, length=128)
    assert text["input_ids"] == [*tok(TEXTS[0])["input_ids"], tok.eos_token_id]


def test_every_token_of_a_long_document_is_learned_exactly_once() -> None:
    tok = tokenizer("gpt2")
    text = " ".join(TEXTS)
    features = [*made("CAUSAL_LM", tok, {"text": text}, length=16, max_target_length=4)]
    whole = [*tok(text)["input_ids"], tok.eos_token_id]
    assert [i for at, one in enumerate(features) for i in one["input_ids"][at > 0 :]] == whole
    # transformers shifts labels by one: the first label of a feature is not learned
    assert [i for one in features for i in one["labels"][1:]] == whole[1:]


def test_a_long_prompt_loses_its_middle_and_keeps_its_answer() -> None:
    tok = tokenizer("gpt2")
    prompt = "write: " + " ".join(TEXTS) + " so:"
    features = made("CAUSAL_LM", tok, {"prompt": prompt, "response": "good film"}, length=24, max_target_length=8)
    (one,) = features
    assert len(one["input_ids"]) == 24
    text = tok.decode(one["input_ids"])
    assert text.startswith("write:")
    assert text.endswith(" so:\ngood film<|endoftext|>")
    assert [i for i in one["labels"] if i != IGNORED] == [*tok("good film")["input_ids"], tok.eos_token_id]
    assert features.counts["cut"] == 1
    (one,) = made("CAUSAL_LM", tok, {"prompt": prompt, "response": TEXTS[0] * 3}, length=24, max_target_length=8)
    assert sum(i != IGNORED for i in one["labels"]) == 8
    assert one["labels"][-1] != tok.eos_token_id


MESSAGES = [
    {"role": "user", "content": "who sat"}, {"role": "assistant", "content": "the cat"},
    {"role": "user", "content": "where"}, {"role": "assistant", "content": "in paris"},
]  # fmt: skip


def learned_text(tok: Any, one: dict[str, Any]) -> str:
    return str(tok.decode([i for i in one["labels"] if i != IGNORED]))


def test_a_chat_template_is_used_where_there_is_one() -> None:
    tok = tokenizer("gpt2")
    tok.chat_template = CHAT
    (one,) = made("CAUSAL_LM", tok, {"messages": MESSAGES}, length=128)
    whole = tok.apply_chat_template(MESSAGES, tokenize=False)
    assert tok.decode(one["input_ids"]) == whole
    end = tok.eos_token
    assert learned_text(tok, one) == f"the cat{end}in paris{end}"
    (pair,) = made("CAUSAL_LM", tok, {"prompt": "who sat", "response": "the cat"}, length=128)
    assert tok.decode(pair["input_ids"]) == tok.apply_chat_template(MESSAGES[:2], tokenize=False)
    (off,) = made("CAUSAL_LM", tok, {"prompt": "who sat", "response": "the cat"}, length=128, chat="off")
    assert tok.decode(off["input_ids"]) == f"who sat\nthe cat{end}"
    opened = prompt_of(Example({"messages": MESSAGES}, ""), tok)
    assert opened == tok.apply_chat_template(MESSAGES[:3], tokenize=False, add_generation_prompt=True)


def test_a_chat_template_without_an_end_gets_one() -> None:
    tok = tokenizer("gpt2")
    tok.chat_template = CHAT.replace("{{ eos_token }}", "")
    (one,) = made("CAUSAL_LM", tok, {"messages": MESSAGES[:2]}, length=128)
    assert one["labels"][-1] == tok.eos_token_id


def test_messages_without_a_chat_template_are_plain_lines() -> None:
    tok = tokenizer("gpt2")
    (one,) = made("CAUSAL_LM", tok, {"messages": [*MESSAGES, {"role": "user", "content": "more"}]}, length=128)
    end = tok.eos_token
    assert learned_text(tok, one) == f"the cat{end}in paris{end}"
    assert tok.decode(one["input_ids"]) == (
        f"user: who sat\nassistant: the cat{end}user: where\nassistant: in paris{end}"
    )
    with pytest.raises(DataError, match="line 1: the messages hold no turn of the assistant"):
        made("CAUSAL_LM", tok, {"messages": MESSAGES[:1]}, length=128)


def test_a_chat_template_that_rewrites_or_refuses_is_an_error() -> None:
    tok = tokenizer("gpt2")
    tok.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(ConfigError, match="rewrites earlier turns"):
        made("CAUSAL_LM", tok, {"messages": MESSAGES}, length=128)
    tok.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="line 1: the tokenizer's chat template refuses the messages: roles must"):
        made("CAUSAL_LM", tok, {"messages": MESSAGES}, length=128)


def test_prompts_to_continue_leave_room_and_are_padded_on_the_left() -> None:
    tok = ready_tokenizer(tokenizer("gpt2"), "CAUSAL_LM")
    settings = TokenSettings("CAUSAL_LM", 24, max_target_length=8, answered=False)
    examples = [Example({"prompt": text}, "") for text in ("who", " ".join(TEXTS))]
    features = tokenise(examples, tok, settings)
    assert features.lengths.tolist()[1] == 16
    batch = Collate(tok, settings, examples)([*features])
    assert batch["attention_mask"][0].tolist() == [0] * (16 - features.lengths[0]) + [1] * features.lengths[0]
    assert batch["rows"] == [0, 1]
    assert set(batch) == {"input_ids", "attention_mask", "rows"}


def test_evaluation_of_prompts_brings_prompts_and_references() -> None:
    tok = ready_tokenizer(tokenizer("gpt2"), "CAUSAL_LM")
    settings = TokenSettings("CAUSAL_LM", 64, max_target_length=8)
    examples = [
        Example({"prompt": p, "response": r}, "") for p, r in (("who sat", "bob"), ("where is the cat", "oslo"))
    ]
    batch = Collate(tok, settings, examples)([*tokenise(examples, tok, settings)])
    prompts = [
        tok.decode(ids[mask.bool()]) for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    ]
    assert prompts == ["who sat\n", "where is the cat\n"]
    assert batch["prompt_mask"][0, 0] == 0
    assert batch["references"] == ["bob", "oslo"]


def test_templates_are_plain_columns() -> None:
    assert columns_of("a {b} {{c}} {d} {b}") == ["b", "d"]
    assert fill("a {b} {{c}}", {"b": "{x}"}) == "a {x} {c}"
    for template in ("{a.__class__}", "{0}", "{a!r}", "{a:>9}", "{a[0]}", "{}"):
        with pytest.raises(ConfigError, match="expected a column as in"):
            columns_of(template)
    with pytest.raises(ConfigError, match="a brace of the text itself is written twice"):
        columns_of("{a")
    with pytest.raises(ConfigError, match="names no column"):
        columns_of("write")
    with pytest.raises(DataError, match="the prompt is empty"):
        pieces_of(Example({"a": " ", "response": "x"}, "line 3"), tokenizer("gpt2"), template="{a}")


def test_overlong_may_raise_and_is_counted() -> None:
    tok = tokenizer("bert")
    with pytest.raises(DataError, match=r"line 1: \d+ tokens too long for max_length 5: raise max_length"):
        made("SEQ_CLS", tok, {"text": TEXTS[0], "label": "a"}, length=5, names=("a",), overlong="raise")
    features = made("SEQ_CLS", tok, {"text": TEXTS[0], "label": "a"}, length=5, names=("a",))
    lost = len(tok(TEXTS[0])["input_ids"]) - 5
    assert describe(features.counts, 5) == f"1 of 1 are longer than 5 tokens and lose {lost} tokens"
    with pytest.raises(ConfigError, match="leaves no room for text"):
        made("SEQ_CLS", tok, {"text": TEXTS[0], "label": "a"}, length=3, names=("a",))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlong": "truncate"}, "overlong must be one of auto, cut, split, raise"),
        ({"overlong": "split"}, "overlong: split belongs to TOKEN_CLS"),
        ({"chat": "on"}, "chat must be one of auto, off"),
        ({"max_length": 0}, "max_length must be at least 1"),
        ({"task": "CAUSAL_LM", "max_target_length": 32}, r"max_target_length \(32\) must be under max_length \(32\)"),
        ({"task": "QUESTION_ANS", "stride": 16}, "stride must be under half of max_length"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenSettings(**{"task": "SEQ_CLS", "max_length": 32, **settings})


def test_a_tokenizer_of_another_model_is_refused() -> None:
    check_vocabulary(tokenizer("bert"), 150)
    with pytest.raises(ConfigError, match="the tokenizer has 400 tokens, the model embeds 150: it belongs to another"):
        check_vocabulary(tokenizer("gpt2"), 150)
    with pytest.raises(ConfigError, match="no tokenizer '/nowhere/at/all' can be had"):
        ready_tokenizer("/nowhere/at/all", "SEQ_CLS")
    with pytest.raises(ConfigError, match="max_length 200 is more than the 128 tokens"):
        fitting_length(tokenizer("bert"), 200, "SEQ_CLS")
    with pytest.raises(ConfigError, match="CAUSAL_LM needs a tokenizer with an end-of-text token; BertTokenizer"):
        made("CAUSAL_LM", tokenizer("bert"), {"text": "a"}, max_target_length=8)


def test_padding_that_is_missing_is_the_end_token() -> None:
    tok = tokenizer("gpt2")
    tok.padding_side = "left"
    assert tok.pad_token is None
    ready_tokenizer(tok, "SEQ_CLS")
    assert (tok.pad_token, tok.padding_side) == (tok.eos_token, "right")
    bare = tokenizer("gpt2")
    bare.eos_token = None
    with pytest.raises(ConfigError, match="has no padding and no end token"):
        ready_tokenizer(bare, "SEQ_CLS")


def test_cutting() -> None:
    assert [*windows(5, 8)] == [(0, 5)]
    assert [*windows(10, 4, 1)] == [(0, 4), (3, 7), (6, 10)]
    assert [*windows(0, 4)] == [(0, 0)]
    assert without_middle([*range(10)], 5) == [0, 1, 2, 8, 9]
    assert longest_first([9, 2], 6) == [4, 2]
    assert longest_first([5, 5], 5) == [2, 3]
    assert longest_first([9], 6) == [6]


EXAMPLES = [Example({"text": text, "label": "a"}, f"line {at}") for at, text in enumerate(TEXTS)]
SETTINGS = TokenSettings("SEQ_CLS", 16, names=("a", "b"))


def test_tokens_are_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tok = tokenizer("bert")
    made_once = cached_features(EXAMPLES, tok, SETTINGS, tmp_path / "tokens")
    monkeypatch.setattr("visionlora.text.caching.tokenise", None)
    found = cached_features(EXAMPLES, tok, SETTINGS, tmp_path / "tokens")
    assert [*found] == [*made_once]
    assert found.counts == made_once.counts
    assert [path.suffixes for path in (tmp_path / "tokens").iterdir()] == [[".tokens", ".safetensors"]]


def test_another_text_label_tokenizer_or_setting_is_another_key() -> None:
    tok, other = tokenizer("bert"), tokenizer("bert")
    other.add_tokens(["oslow"])
    chatty = tokenizer("bert")
    chatty.chat_template = CHAT
    keys = [
        key_of(EXAMPLES, tok, SETTINGS),
        key_of(EXAMPLES[::-1], tok, SETTINGS),
        key_of([Example({"text": TEXTS[0], "label": "b"}, ""), *EXAMPLES[1:]], tok, SETTINGS),
        key_of(EXAMPLES, other, SETTINGS),
        key_of(EXAMPLES, chatty, SETTINGS),
        key_of(EXAMPLES, tok, TokenSettings("SEQ_CLS", 16, names=("b", "a"))),
        key_of(EXAMPLES, tok, TokenSettings("SEQ_CLS", 17, names=("a", "b"))),
    ]
    assert len(set(keys)) == len(keys)


def test_using_a_tokenizer_does_not_change_what_it_is() -> None:
    tok = tokenizer("gpt2")
    before = identity(tok)
    tok(TEXTS[0], truncation=True, max_length=3)
    tok.backend_tokenizer.enable_padding(length=9)
    assert identity(tok) == before


def test_a_damaged_or_closed_cache_costs_time_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tok = tokenizer("bert")
    wanted = [*cached_features(EXAMPLES, tok, SETTINGS, tmp_path)]
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert [*cached_features(EXAMPLES, tok, SETTINGS, tmp_path)] == wanted
    assert "is damaged and made anew" in caplog.text
    assert [*cached_features(EXAMPLES, tok, SETTINGS, tmp_path)] == wanted
    assert [*cached_features(EXAMPLES, tok, SETTINGS, path / "below a file")] == wanted
    assert "tokens are not kept for the next run" in caplog.text


def test_features_are_what_was_written() -> None:
    writer = FeatureWriter()
    writer.add(3, input_ids=[1, 2], labels=0.5)
    writer.add(5, input_ids=[], labels=1.5)
    writer.add(5, input_ids=[4], labels=2.5)
    features = writer.features()
    assert [*features] == [
        {"input_ids": [1, 2], "row": 3, "labels": 0.5}, {"input_ids": [], "row": 5, "labels": 1.5},
        {"input_ids": [4], "row": 5, "labels": 2.5},
    ]  # fmt: skip
    assert features.lengths.tolist() == [2, 0, 1]
    assert features.tensors["labels"].dtype == torch.float32
    assert len(FeatureWriter().features()) == 0
    assert json.dumps(features[0])
