"""`--plan` against what a model's tensors take, on the embedded pair and on tiny models."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from byte_models import edit
from conftest import language_model, tiny_model
from forked import run_forked

import common
import token_level

ROWS = {"gradients", "optimizer", "kept for backward", "peak of training"}


def parts(student: common.LanguageModel, **flags: object) -> dict[str, int]:
    args = token_level.Arguments(student=student.name, completions="dataset", **flags)
    return common.memory_of_run("token_level", args, student, student, longest_prompt=16)


@pytest.fixture(scope="module")
def student(tokenizer) -> common.LanguageModel:
    model = tiny_model("llama", len(tokenizer.get_vocab()), num_hidden_layers=4)
    return language_model(model, tokenizer, "llama-0")


def test_parts_are_the_tensors(student: common.LanguageModel):
    """Weights, gradients and Adam's two moments to the byte; activations in proportion to the
    micro-batch, and fewer with checkpointing; adapters' gradients alone with LoRA."""
    flags = {"max_length": 64, "batch_size": 8}
    whole = parts(student, micro_batch_size=8, **flags)
    weights = sum(p.nbytes for p in student.model.parameters())
    assert whole["gradients"] == weights and whole["optimizer"] == 2 * weights
    buffers = sum(b.nbytes for b in student.model.buffers())
    assert whole["student's weights"] == weights + buffers
    half = parts(student, micro_batch_size=4, **flags)
    assert whole["kept for backward"] == pytest.approx(2 * half["kept for backward"], rel=0.02)
    checkpointed = parts(student, micro_batch_size=8, gradient_checkpointing=True, **flags)
    assert checkpointed["kept for backward"] < 0.5 * whole["kept for backward"]
    adapted = parts(student, micro_batch_size=8, lora_rank=2, **flags)
    assert 0 < adapted["gradients"] < 0.3 * weights
    assert adapted["student's weights"] == weights + buffers + adapted["gradients"]


def test_peak_is_that_of_a_real_step(student: common.LanguageModel):
    """The same step on real tensors, counted in the same way, but of the operators' own results."""
    args = token_level.Arguments(
        student=student.name, completions="dataset", max_length=64, batch_size=4, micro_batch_size=4
    )
    planned = common.memory_of_run("token_level", args, student, None, longest_prompt=16)
    ids = torch.ones(4, 64, dtype=torch.long)
    batch = common.Batch(ids, *ids.new_zeros(3, 4 * 63))
    with common.LiveBytes() as live:
        logits = student.logits(batch)
        common.distillation_loss(logits, batch.targets, common.Objective(ce_weight=1.0))
    assert live.peak == pytest.approx(
        planned["kept for backward"] + planned["added in the loss"], rel=0.1
    )


@pytest.mark.parametrize("script", ["sequence_level", "on_policy", "cross_tokenizer"])
def test_every_script_plans_without_weights(tmp_path: Path, script: str):
    """No file of weights is there; nothing is written; checkpointing is lower than as given."""
    pair = ("teacher", "student_other_tokenizer" if script == "cross_tokenizer" else "student")
    flags = ["--plan", "--max-rows", "64", "--max-new-tokens", "16"]
    for side, name in zip(("--teacher", "--student"), pair, strict=True):
        (tmp_path / name).mkdir()
        for file in (common.DATA / name).iterdir():
            if file.suffix != ".safetensors":
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
        edit(tmp_path / name / "config.json", num_hidden_layers=2)
        flags += [side, tmp_path / name]
    done = run_forked(f"{script}.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    table = {
        line[:26].strip(): [float(n.replace(",", "")) for n in re.findall(r"[\d,]+", line[26:])]
        for line in done.stdout.splitlines()
        if any(line.startswith(row) for row in ROWS)
    }
    given, checkpointed, *_ = table["peak of training"]
    assert table.keys() == ROWS and checkpointed < given
    assert not (tmp_path / "runs").exists()


def test_the_teacher_of_a_server_is_not_counted(tmp_path: Path):
    flags = ["--api-base-url", "http://localhost:1/v1", "--api-model", "m", "--max-rows", "64"]
    done = run_forked("sequence_level.py", "--plan", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "student's weights" in done.stdout and "teacher's" not in done.stdout
