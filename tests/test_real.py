"""A chat model that nobody here made: SmolLM2-135M-Instruct teaching an 8-layer cut of itself."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import run_script

import common

MODELS = Path(os.environ.get("DISTIL_REAL_MODELS", "nowhere"))

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        not (MODELS / "smollm2" / "config.json").exists(),
        reason="DISTIL_REAL_MODELS names no directory with smollm2/ and smollm2-8l/",
    ),
]


def test_real_pair_learns(tmp_path):
    """Its own template, chat prompts, answers of its own: held-out KL falls within 12 steps."""
    done = run_script(
        "token_level.py", "--teacher", MODELS / "smollm2", "--student", MODELS / "smollm2-8l",
        "--dataset", common.DATA / "chat.jsonl", "--max-rows", "72", "--eval-size", "8",
        "--max-new-tokens", "48", "--batch-size", "8", "--micro-batch-size", "4",
        "--max-steps", "12", "--warmup-steps", "2", "--learning-rate", "3e-4", "--eval-steps", "4",
        "--output-dir", "run", cwd=tmp_path, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "8 of 8 evaluation rows have no reference" in done.stdout
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["eval/kl_to_teacher"] for line in lines if "eval/kl_to_teacher" in line]
    assert len(held_out) == 4 and held_out == sorted(held_out, reverse=True)
    assert held_out[-1] < 0.8 * held_out[0]


def test_template_without_generation_marks():
    """SmolLM2's template has none: spans come from prefixes, and end with the end-of-turn token."""
    tokenizer = common.load_tokenizer(str(MODELS / "smollm2"), "main", None)
    model = common.load_model(
        str(MODELS / "smollm2-8l"), tokenizer, revision="main", dtype=torch.float32,
        compute_dtype=torch.float32, attention=None, device=torch.device("cpu"), cache_dir="cache",
    )  # fmt: skip
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello. 👋🏽 שלום"},
        {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "Goodbye."},
    ]
    ids, targets = common.encode_conversation(model, turns)
    wanted = [ids[i] for i in targets]
    assert tokenizer.decode(wanted) == "Hello. 👋🏽 שלום<|im_end|>Goodbye.<|im_end|>"
