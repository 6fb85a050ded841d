"""The doctor of text names what would stop or falsify a run, and is content with sound data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from text_toy import hub, sentences, tokenizer

from visionlora.cli import main
from visionlora.commands.arguments import TASKS as NAMED
from visionlora.data.doctor import Report
from visionlora.text.columns import TASKS
from visionlora.text.doctor import examine_rows, examine_text, render_text
from visionlora.text.near import near_pairs
from visionlora.text.reading import rows_of

TEXTS = sorted({*sentences(90)})[:60]
SOUND = {
    "train": [{"text": t, "label": "ab"[at % 2]} for at, t in enumerate(TEXTS[:40])],
    "test": [{"text": t, "label": "ab"[at % 2]} for at, t in enumerate(TEXTS[40:])],
}


def report(rows: Any, task: str = "SEQ_CLS", **options: Any) -> Report:
    return examine_rows(rows_of(rows), task, **options)  # type: ignore[arg-type]


def codes(found: Report, severity: str = "") -> set[str]:
    return {finding.code for finding in found.findings if severity in ("", finding.severity)}


def test_sound_data_has_facts_alone() -> None:
    found = report(SOUND, tokenizer=tokenizer("bert"))
    assert codes(found) == {"balance", "length", "parts"}
    assert found.images == 60
    assert render_text(found).endswith("60 examples examined: 0 errors, 0 warnings")


@pytest.mark.parametrize(
    ("part", "row", "code", "severity"),
    [
        ("train", {"text": " ", "label": "a"}, "empty", "error"),
        ("train", {"text": "fine film", "label": None}, "bad-row", "error"),
        ("test", {"text": "fine film", "label": "c"}, "class-mismatch", "error"),
        ("test", {"text": TEXTS[0].upper() + " ", "label": "a"}, "leak", "error"),
        ("train", {"text": TEXTS[0], "label": "b"}, "two-labels", "error"),
        ("train", {"text": TEXTS[0], "label": "a"}, "duplicate", "warning"),
        ("train", {"text": "a cafÃ© in paris", "label": "a"}, "encoding", "warning"),
        ("train", {"text": "a caf\ufffd in paris", "label": "a"}, "encoding", "warning"),
        ("train", {"text": "a \x00 film", "label": "a"}, "control", "warning"),
        ("train", {"text": "a [SEP] film", "label": "a"}, "special", "warning"),
        ("train", {"text": "film " * 30, "label": "a"}, "over-long", "warning"),
        ("train", {"text": "a rare film", "label": "rare"}, "small-class", "warning"),
        ("train", {"text": "a rare film", "label": "rare"}, "class-missing", "warning"),
    ],
)
def test_a_fault_is_found(part: str, row: dict[str, Any], code: str, severity: str) -> None:
    rows = {**SOUND, part: [*SOUND[part], row]}
    found = report(rows, tokenizer=tokenizer("bert"), max_length=20)
    assert code in codes(found, severity)


def test_imbalance_one_class_and_missing_columns() -> None:
    many = [{"text": t, "label": "b" if at < 2 else "a"} for at, t in enumerate(TEXTS)]
    assert {"balance", "small-class"} <= codes(report(many), "warning")
    assert codes(report(many[2:]), "error") == {"one-class"}
    found = report([{"txt": "a", "label": "b"}])
    assert "did you mean" in found.findings[0].message
    assert codes(found) == {"columns"}


def test_texts_that_are_nearly_the_same_in_two_parts() -> None:
    long = "the cat sat on the green house and the dog ran under the red tree where bob lives"
    rows = {"train": [*SOUND["train"], {"text": long, "label": "a"}],
            "test": [*SOUND["test"], {"text": long + " now", "label": "a"}]}  # fmt: skip
    found = [f for f in report(rows).findings if f.code == "near-leak"]
    assert len(found) == 1
    assert "test number 21 (test) is 94% the text of rows, train number 41 (training)" in found[0].message


def test_near_pairs_are_those_of_all_comparisons() -> None:
    known = [f"{a} {b} {c}" for a, b, c in zip(sentences(80), sentences(80, 1), sentences(80, 2), strict=True)]
    others = [text.rsplit(" ", 1)[0] for text in known[::7]] + sentences(20, 5)

    def runs(text: str) -> set[str]:
        words = text.split()
        return {" ".join(words[at : at + 3]) for at in range(len(words) - 2)} if len(words) >= 6 else set()

    slow = {
        twin: max(len(runs(t) & runs(k)) / max(1, len(runs(t) | runs(k))) for k in known)
        for twin, t in enumerate(others)
    }
    found = {twin: share for _, twin, share in near_pairs(known, others)}
    assert found == {twin: share for twin, share in slow.items() if share >= 0.8}
    assert len(found) >= 10


def test_entities_that_never_began() -> None:
    rows = [{"tokens": ["a", "b"], "tags": tags} for tags in (["O", "I-PER"], ["B-PER", "I-PER"], ["B-LOC", "I-PER"])]
    assert [f.message.partition(": ")[2] for f in report(rows, "TOKEN_CLS").findings if f.code == "tags"] == [
        "I-PER follows O", "I-PER follows B-LOC",
    ]  # fmt: skip


def test_questions_prompts_and_pairs() -> None:
    asked = [{"question": "who", "context": t, "answers": []} for t in TEXTS]
    found = report(asked, "QUESTION_ANS")
    assert "60 of 60 questions have no answer" in [f.message for f in found.findings]
    assert not codes(report([{"prompt": t, "response": "x"} for t in TEXTS], "CAUSAL_LM"), "error")
    assert not codes(report([{"a": t, "target": "x"} for t in TEXTS], "SEQ_2_SEQ_LM", template="{a}"), "error")
    talk = [{"messages": [{"role": "user", "content": t}, {"role": "assistant", "content": "x"}]} for t in TEXTS]
    assert not codes(report(talk, "CAUSAL_LM"), "error")
    numbers = [{"text": t, "label": at / 3} for at, t in enumerate(TEXTS)]
    assert not codes(report(numbers), "error")


def test_a_file_that_cannot_be_read_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\ncaf\xe9,a\n")
    assert codes(examine_text(tmp_path / "a.csv", "SEQ_CLS")) == {"encoding"}
    assert codes(examine_text(tmp_path / "b.csv", "SEQ_CLS")) == {"layout"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"sentence": r["text"], "label": r["label"]} for r in SOUND["train"]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = hub(tmp_path / "model", "bert")
    words = ["doctor", str(tmp_path / "train.jsonl"), "--task", "SEQ_CLS"]
    assert main([*words, "--columns", "text=sentence", "--tokenizer", str(model), "--max_length", "8"]) == 0
    assert "are longer than max_length 8" in capsys.readouterr().out
    assert main(words) == 1
    assert "there is no 'text' in sentence, label" in " ".join(capsys.readouterr().out.split())
    assert main([*words, "--columns", "text"]) == 2
    assert "--columns is written text=sentence" in capsys.readouterr().err


def test_the_command_knows_the_tasks() -> None:
    assert NAMED == TASKS
