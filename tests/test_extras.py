"""LoRA and trackers, on the embedded pair: optional, and so that nothing is left of them after."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import common
import token_level

SMALL = ("--max-rows", "640", "--eval-size", "60", "--eval-steps", "0", "--warmup-steps", "4")


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def test_lora_learns_and_leaves_a_plain_model(tmp_path):
    """Loss falls; checkpoints hold only what peft trains; final/ has the names of the student."""
    pytest.importorskip("peft")
    done = run_script(
        "token_level.py", *SMALL, "--lora-rank", "8", "--max-steps", "40", "--output-dir", "run",
        "--learning-rate", "1e-2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = [line["train/loss"] for line in metrics(tmp_path / "run")]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    found = load_file(tmp_path / "run" / "final" / "model.safetensors")
    given = load_file(common.DATA / "student" / "model.safetensors")
    assert found.keys() == given.keys()
    moved = {name for name in given if not torch.equal(found[name], given[name].float())}
    assert moved == {name for name in given if name.endswith("_proj.weight")}
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["kl_to_teacher"] < results["before"]["kl_to_teacher"]


def test_merged_adapters_are_the_model_that_was_trained(tmp_path):
    """Adapters alone are trained, and merging them changes no logit beyond rounding."""
    pytest.importorskip("peft")
    args = token_level.Arguments(lora_rank=4)
    student, _ = common.load_pair(args, torch.device("cpu"))
    trained = {name for name, p in student.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in student.model.named_parameters():
            if name in trained:
                parameter.normal_(std=0.05)
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        before = student.model(input_ids=ids).logits
    common.save_student(student, tmp_path / "final", "card")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32)
    with torch.no_grad():
        after = loaded(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_tensorboard_gets_what_metrics_jsonl_gets(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    done = run_script(
        "token_level.py", *SMALL, "--max-steps", "4", "--report-to", "tensorboard",
        "--output-dir", "run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = sorted((tmp_path / "run").rglob("events.out.tfevents*"))
    found = {}
    for directory in {e.parent for e in events}:
        reader = accumulator.EventAccumulator(str(directory))
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            found[tag] = [(e.step, e.value) for e in reader.Scalars(tag)]
    expected = [(line["step"], line["train/loss"]) for line in metrics(tmp_path / "run")]
    assert [step for step, _ in found["train/loss"]] == [1, 2, 3, 4]
    assert [v for _, v in found["train/loss"]] == pytest.approx([v for _, v in expected], rel=1e-5)
    assert [step for step, _ in found["eval/exact_match"]] == [0, 4]


def test_unknown_tracker_is_wrong_input(tmp_path):
    done = run_script("token_level.py", "--report-to", "nothing", cwd=tmp_path)
    assert done.returncode == 2 and "--report-to nothing" in done.stderr
