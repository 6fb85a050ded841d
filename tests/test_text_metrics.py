"""Scores of language tasks against counts by hand and slow truths."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from visionlora.errors import DataError, NonFiniteError
from visionlora.text.entities import entities, entity_f1
from visionlora.text.metrics import AnswerScores, ClassScores, LanguageScores, TagScores, ValueScores
from visionlora.text.spans import best_answers, candidates
from visionlora.text.tasks import task_of


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-PER", "I-PER", "O"], {("PER", 0, 2)}),
        (["B-PER", "B-PER"], {("PER", 0, 1), ("PER", 1, 2)}),
        (["I-PER", "I-LOC"], {("PER", 0, 1), ("LOC", 1, 2)}),
        (["O", "I-LOC", "I-LOC"], {("LOC", 1, 3)}),
        (["S-PER", "B-LOC", "I-LOC", "E-LOC"], {("PER", 0, 1), ("LOC", 1, 4)}),
        (["E-PER", "E-PER"], {("PER", 0, 1), ("PER", 1, 2)}),
        (["O"], set()),
        ([], set()),
    ],
)
def test_entities_are_read_as_conlleval_reads_them(tags: list[str], expected: set[tuple[str, int, int]]) -> None:
    assert entities(tags) == expected


def test_entity_f1_counts_whole_entities() -> None:
    names = ["O", "B-PER", "I-PER"]
    # right: words 0-1; found: words 0-1 and 3
    words = [(0, 0, 1, 1), (0, 1, 2, 2), (0, 2, 0, 0), (0, 3, 0, 1)]
    assert entity_f1(words, names) == pytest.approx(2 * 1 / (1 + 2))
    assert entity_f1([(0, 0, 1, 1), (1, 0, 2, 2)], names) == 1.0  # rows are not joined


def tags_of(found: list[list[int]]) -> torch.Tensor:
    return F.one_hot(torch.tensor(found), 3).float() * 9


def test_tags_of_one_row_are_joined_over_its_windows() -> None:
    scores = TagScores(["O", "B-PER", "I-PER"])
    labels = torch.tensor([[-100, 1, 2], [-100, 2, 0]])
    words = [[None, 0, 1], [None, 2, 3]]
    scores.update(tags_of([[0, 1, 2], [0, 2, 0]]), {"labels": labels, "rows": [7, 7], "word_ids": words})
    result = scores.compute()
    assert result.count == 4
    assert result.values["f1"] == 1.0  # one entity of three words
    assert result.values["acc"] == 1.0


def test_classes_without_entities_have_the_f1_of_words() -> None:
    scores = TagScores(["noun", "verb", "other"])
    scores.update(tags_of([[0, 1, 1]]), {"labels": torch.tensor([[0, 1, 2]])})
    values = scores.compute().values
    assert values["f1"] == values["token_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert values["acc"] == pytest.approx(2 / 3)


def windows(draw: random.Random, count: int) -> tuple[torch.Tensor, dict[str, Any]]:
    offsets = [[None, None, *((3 * i, 3 * i + 2) for i in range(w, w + 6)), None] for w in range(count)]
    logits = torch.tensor([[[draw.gauss(0, 1), draw.gauss(0, 1)] for _ in range(9)] for _ in range(count)])
    return logits, {"example_id": ["q"] * count, "offset_mapping": offsets}


@pytest.mark.parametrize("seed", range(20))
def test_the_best_span_is_that_of_a_search_of_all(seed: int) -> None:
    draw = random.Random(seed)
    logits, batch = windows(draw, 3)
    context, best = "ab " * 12, (float("-inf"), "")
    for row, offsets in zip(logits, batch["offset_mapping"], strict=True):
        for i in range(9):
            for j in range(i, min(i + 3, 9)):
                if offsets[i] is not None and offsets[j] is not None:
                    score = float(row[i, 0] + row[j, 1])
                    best = max(best, (score, context[offsets[i][0] : offsets[j][1]]))
    found = best_answers(candidates(logits, batch, most_tokens=3), {"q": context})
    assert found == {"q": best[1]}


def test_no_answer_wins_where_every_window_says_so() -> None:
    logits = torch.zeros(2, 9, 2)
    logits[:, 3] = 1.0
    _, batch = windows(random.Random(0), 2)
    logits[:, 0] = 5.0
    found = candidates(logits, batch, most_tokens=3)
    assert best_answers(found, {"q": "ab " * 12}, 0.0) == {"q": ""}
    assert best_answers(found, {"q": "ab " * 12}, 9.0) != {"q": ""}
    assert best_answers(found, {"q": "ab " * 12}) != {"q": ""}
    logits[1, 0] = -5.0  # one window is sure of its answer
    found = candidates(logits, batch, most_tokens=3)
    assert best_answers(found, {"q": "ab " * 12}, 0.0) != {"q": ""}


def test_a_likely_start_behind_every_likely_end_still_gives_a_span() -> None:
    offsets = [None, *((2 * i, 2 * i + 1) for i in range(60))]
    logits = torch.zeros(1, 61, 2)
    logits[0, 31:, 0], logits[0, 1:31, 1] = 5.0, 5.0
    found = candidates(logits, {"example_id": ["q"], "offset_mapping": [offsets]}, most_tokens=5)
    start, end = found[0].span
    assert end - start == 1


def test_answers_are_scored_as_squad_does() -> None:
    examples = [
        {"id": "a", "context": "the red house", "answers": {"text": ["red house"], "answer_start": [4]}},
        {"id": "b", "context": "no answer", "answers": {"text": [], "answer_start": []}},
    ]
    offsets = [None, (0, 3), (4, 7), (8, 13)]
    logits = torch.zeros(2, 4, 2)
    logits[0, 2, 0], logits[0, 2, 1] = 9, 9  # "red": half of the words
    logits[1, 0] = 9
    scores = AnswerScores(examples, most_words=5, null_threshold=0.0)
    spans = [offsets, [None, (0, 2), (3, 9), None]]
    scores.update(logits, {"example_id": ["a", "b"], "offset_mapping": spans})
    result = scores.compute()
    assert result.count == 2
    assert result.values["em"] == pytest.approx(0.5)
    assert result.values["f1"] == pytest.approx((2 / 3 + 1) / 2)


@pytest.mark.parametrize("shifted", [True, False])
def test_perplexity_is_that_of_the_counted_tokens(shifted: bool) -> None:
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    labels[0, :3] = -100
    scores = LanguageScores(shifted=shifted)
    for i in range(2):
        scores.update(logits[i : i + 1], {"labels": labels[i : i + 1]})
    seen, wanted = (logits[:, :-1], labels[:, 1:]) if shifted else (logits, labels)
    loss = F.cross_entropy(seen.flatten(0, 1), wanted.flatten(), ignore_index=-100)
    values = scores.compute().values
    assert values["ppl"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert values["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_written_texts_are_compared_word_by_word() -> None:
    scores = LanguageScores(shifted=False)
    scores.update(torch.randn(1, 2, 3), {"labels": torch.tensor([[1, 2]])})
    scores.add_texts(["the red house is here", "no"], ["the red house is here", "yes"])
    values = scores.compute().values
    assert values["exact"] == 0.5
    assert values["rouge1"] == values["rougeL"] == pytest.approx(0.5)
    assert 0 < values["bleu"] < 1


def test_several_labels_and_numbers_are_scored() -> None:
    several = ClassScores(2, several=True)
    several.update(torch.tensor([[2.0, -1.0], [1.0, 1.0]]), {"labels": torch.tensor([[1.0, 0.0], [1.0, 0.0]])})
    assert several.compute().values["acc"] == pytest.approx(0.75)
    number = ValueScores()
    number.update(torch.tensor([[1.0], [3.0]]), {"labels": torch.tensor([1.0, 2.0])})
    assert number.compute().values == {"loss": 0.5, "mse": 0.5, "r2": pytest.approx(1 - 1 / 0.5)}


def test_nothing_scored_and_nan_are_errors() -> None:
    scores = ClassScores(2, several=False)
    with pytest.raises(DataError, match="no example was scored"):
        scores.compute()
    with pytest.raises(NonFiniteError, match="1 of 2 predictions"):
        scores.update(torch.tensor([[0.0, float("nan")], [0.0, 1.0]]), {"labels": torch.tensor([0, 1])})


@pytest.mark.parametrize("name", ["TOKEN_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"])
def test_the_loss_is_the_mean_over_counted_tokens(name: str) -> None:
    task = task_of(name, label_names=("a", "b", "c"))
    logits, labels = torch.randn(2, 4, 3), torch.tensor([[0, -100, 1, 2], [-100, -100, 2, 1]])
    loss, count = task.loss(logits, {"labels": labels}, None, 0.1)
    seen, wanted = (logits[:, :-1], labels[:, 1:]) if name == "CAUSAL_LM" else (logits, labels)
    expected = F.cross_entropy(seen.flatten(0, 1), wanted.flatten(), ignore_index=-100, label_smoothing=0.1)
    assert_close(loss, expected)
    assert count == int((wanted != -100).sum())


def test_a_batch_without_labels_that_count_has_no_loss() -> None:
    task = task_of("CAUSAL_LM")
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss, count = task.loss(logits, {"labels": torch.full((1, 3), -100)}, None, 0.0)
    loss.backward()
    assert (float(loss.detach()), count) == (0.0, 0)


def test_weights_of_classes_act_as_in_torch() -> None:
    weight, logits, labels = torch.tensor([1.0, 3.0]), torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    for name, seen, wanted in (("SEQ_CLS", logits, labels), ("TOKEN_CLS", logits[None], labels[None])):
        loss, _ = task_of(name, label_names=("a", "b")).loss(seen, {"labels": wanted}, weight, 0.0)
        assert_close(loss, F.cross_entropy(logits, labels, weight=weight))
