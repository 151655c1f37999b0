"""A third-party chat model: SmolLM2-135M-Instruct teaches a copy of itself cut to 8 layers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import run_script

import common
import token_level

MODELS = Path(os.environ.get("DISTIL_REAL_MODELS", "nowhere"))

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MODELS / "smollm2" / "config.json").exists(),
        reason="DISTIL_REAL_MODELS names no directory with smollm2/ and smollm2-8l/",
    ),
]


def test_real_pair_learns(tmp_path):
    """On chat prompts and the teacher's answers, the held-out KL falls within 12 steps."""
    done = run_script(
        "token_level.py", "--teacher", MODELS / "smollm2", "--student", MODELS / "smollm2-8l",
        "--dataset", common.DATA / "chat.jsonl", "--max-rows", "72", "--eval-size", "8",
        "--max-new-tokens", "48", "--batch-size", "8", "--micro-batch-size", "4",
        "--max-steps", "12", "--warmup-steps", "2", "--learning-rate", "3e-4", "--eval-steps", "4",
        "--output-dir", "run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 of 8 evaluation rows have no reference" in done.stdout
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/kl_to_teacher"] for line in lines if "eval/kl_to_teacher" in line]
    assert len(held_out) == 4 and held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < 0.8 * held_out[0]


def test_template_without_generation_marks():
    """SmolLM2's template has none: spans come from prefixes, and end with the end-of-turn token."""
    args = token_level.Arguments(student=str(MODELS / "smollm2-8l"))
    model = common.open_model(args, torch.device("cpu"), "student")
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello. 👋🏽 שלום"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Goodbye."},
    ]
    ids, targets = common.tokenize_conversation(model, turns)
    assert model.tokenizer.decode([ids[i] for i in targets]) == (
        "Hello. 👋🏽 שלום<|im_end|>Goodbye.<|im_end|>"
    )
