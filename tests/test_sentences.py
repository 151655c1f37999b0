"""data/sentences: the task of long answers, and that its models are what data/README.md says."""

from __future__ import annotations

import json

import pytest
from conftest import generate

import common

TASK = common.DATA / "sentences"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (TASK / name).read_text().splitlines()]


def test_no_sentence_is_both_held_out_and_trained_on():
    """Words are shared, sentences are not; each has one right answer of 44 to 99 phonemes."""
    train, held_out = rows("train.jsonl"), rows("eval.jsonl")
    texts = [[row["messages"][0]["content"] for row in part] for part in (train, held_out)]
    assert [len(set(part)) for part in texts] == [4096, 1000]
    assert not set(texts[0]) & set(texts[1])
    words = [{word for text in part for word in text.split()} for part in texts]
    assert words[1] <= words[0] and len(words[0]) > 1500
    assert all(10 <= len(text.split()) <= 14 for part in texts for text in part)
    lengths = [len(row["references"][0].split()) for row in held_out]
    assert all(len(row["references"]) == 1 for row in held_out)
    assert min(lengths) > 40 and max(lengths) < 100 and 65 < sum(lengths) / 1000 < 85


@pytest.mark.parametrize(
    ("name", "exact", "errors"),
    [
        ("teacher", (0.7, 1.0), (0.0, 0.02)),
        ("student", (0.0, 0.1), (0.25, 0.4)),
        ("student_other_tokenizer", (0.0, 0.1), (0.35, 0.55)),
    ],
)
def test_what_the_models_know(name, exact, errors):
    """Of 40 held-out sentences; files below 5 MB."""
    assert sum(path.stat().st_size for path in (TASK / name).iterdir()) < 5e6
    args = common.Flags(student=str(TASK / name))
    model = common.open_model(args, common.PartialState(cpu=True).device, "student")
    asked = rows("eval.jsonl")[:40]
    texts = [common.render(model.tokenizer, row["messages"], prompt=True) for row in asked]
    prompts = [common.tokenize(model.tokenizer, text)[0] for text in texts]
    answers = dict(generate(model, prompts, [0] * 40, max_new_tokens=160, temperature=0.0))
    edits = length = right = 0
    for i, row in enumerate(asked):
        said, wanted = answers[i].text.split(), row["references"][0].split()
        edits, length = edits + common.edit_distance(said, wanted), length + len(wanted)
        right += said == wanted
    assert exact[0] <= right / 40 <= exact[1] and errors[0] <= edits / length <= errors[1]
