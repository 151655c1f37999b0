"""LoRA and trackers, which are optional, on the embedded pair."""

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


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


@pytest.fixture(scope="module")
def run(tmp_path_factory, shared_cache: Path) -> Path:
    """The directory of a run with adapters that reports to a tracker."""
    pytest.importorskip("peft")
    pytest.importorskip("tensorboard")
    directory = tmp_path_factory.mktemp("extras")
    done = run_script(
        "token_level.py", "--max-rows", "512", "--eval-size", "80", "--eval-steps", "0",
        "--max-steps", "24", "--warmup-steps", "4", "--learning-rate", "1e-2",
        "--lora-rank", "8", "--report-to", "tensorboard", "--output-dir", "run",
        "--cache-dir", shared_cache, cwd=directory,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return directory / "run"


def test_lora_learns_and_leaves_a_plain_model(run: Path):
    """Loss falls; only what peft trains has moved; final/ has the student's own tensor names."""
    losses = [line["train/loss"] for line in metrics(run)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    after = load_file(run / "final" / "model.safetensors")
    before = load_file(common.DATA / "student" / "model.safetensors")
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(after[name], before[name].float())}
    assert moved == {name for name in before if name.endswith("_proj.weight")}
    results = json.loads((run / "results.json").read_text())
    assert results["after"]["kl_to_teacher"] < results["before"]["kl_to_teacher"]


def test_merged_adapters_are_the_model_that_was_trained(tmp_path):
    """Adapters alone are trained, and merging them changes no logit beyond rounding."""
    pytest.importorskip("peft")
    args = token_level.Arguments(lora_rank=4, cache_teacher=False)
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


def test_tensorboard_gets_what_metrics_jsonl_gets(run: Path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    scalars = {}
    for directory in {event.parent for event in run.rglob("events.out.tfevents*")}:
        reader = accumulator.EventAccumulator(str(directory))
        reader.Reload()
        for tag in reader.Tags()["scalars"]:
            scalars[tag] = [(e.step, e.value) for e in reader.Scalars(tag)]
    steps, values = zip(*scalars["train/loss"], strict=True)
    assert steps == tuple(range(1, 25))
    assert values == pytest.approx([line["train/loss"] for line in metrics(run)], rel=1e-5)
    assert [step for step, _ in scalars["eval/exact_match"]] == [0, 24]


def test_unknown_tracker_is_wrong_input(capsys):
    with pytest.raises(SystemExit) as end:
        common.parse_arguments(token_level.Arguments, "", ["--report-to", "nothing"])
    assert (
        end.value.code == 2 and "--report-to: nothing is not installed" in capsys.readouterr().err
    )
