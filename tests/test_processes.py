"""Two processes (gloo, CPU) take the steps that one takes on the same global batch, float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_model
from safetensors.torch import load_file

# token_level.py, which also leaves the first step's gradients, before clipping, beside its run,
# and which has several batches of teacher states to share out.
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import accelerate, torch
import common, token_level

target = sys.argv.pop()
clip = accelerate.Accelerator.clip_grad_norm_

def saving(self, parameters, *rest):
    parameters = list(parameters)
    if self.is_main_process and saving.first:
        torch.save(torch.cat([p.grad.flatten() for p in parameters]), target)
    saving.first = False
    return clip(self, parameters, *rest)

saving.first = True
accelerate.Accelerator.clip_grad_norm_ = saving
common.length_batches.__defaults__ = (256,)
common.launch(token_level.main, token_level.Arguments, "")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """Tiny teacher and student, and the script."""
    directory = tmp_path_factory.mktemp("processes")
    for seed, name in enumerate(("teacher", "student")):
        tiny_model("llama", len(tokenizer.get_vocab()), seed).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    (directory / "script.py").write_text(SCRIPT)
    return directory


def command(name: str, processes: int, *flags: str) -> list[str]:
    """A run on 60 rows for 20 steps in its own directory and, unless told so, its own cache."""
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    options = {
        "teacher": "teacher", "student": "student", "max-rows": 60, "eval-size": 7,
        "max-new-tokens": 8, "max-steps": 20, "warmup-steps": 2, "logging-steps": 3,
        "eval-steps": 9, "output-dir": name, "cache-dir": f"cache-{name}",
    }  # fmt: skip
    given = [str(part) for flag, value in options.items() for part in (f"--{flag}", value)]
    return [*start, "script.py", *given, *flags, f"{name}.pt"]


ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}


def train(place: Path, name: str, processes: int, *flags: str) -> tuple[torch.Tensor, list[dict]]:
    """First gradient (all parameters in a row) and metrics of a run."""
    done = subprocess.run(
        command(name, processes, *flags), cwd=place, env=ENVIRONMENT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if "rror: " in line]
    assert done.returncode == 0, "\n".join(said) or done.stderr[-3000:]
    assert done.stdout.count("run directory") == done.stdout.count("gap recovered") == 1
    return torch.load(place / f"{name}.pt"), metrics(place / name)


def metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_steps(one: tuple[torch.Tensor, list], two: tuple[torch.Tensor, list]) -> None:
    """Gradients of the first step to 1e-5 of their norm, losses of all steps to 1e-3."""
    assert (one[0] - two[0]).norm() <= 1e-5 * one[0].norm()
    losses = [[m["train/loss"] for m in run[1] if "train/loss" in m] for run in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    before = [run[1][0]["eval/kl_to_teacher"] for run in (one, two)]
    assert before[1] == pytest.approx(before[0], rel=1e-5)
    # Only one process writes: a line for every step and every evaluation, once.
    steps = [sorted(m["step"] for m in run[1]) for run in (one, two)]
    assert steps[0] == steps[1] == sorted([*range(1, 21), 0, 9, 18, 20])


def test_two_processes_fill_a_cache_and_train_as_one(place):
    flags = ("--batch-size", "8", "--micro-batch-size", "3", "--cache-teacher")
    one, two = train(place, "one", 1, *flags), train(place, "two", 2, *flags)
    assert_same_steps(one, two)
    files = [sorted((place / f"cache-{n}" / "states").glob("*.bin")) for n in ("one", "two")]
    # One process wrote the text too; two decode in other batches, and float32 may round a sample.
    shared_out = [len(p.with_suffix(".done").read_text().splitlines()) for p in files[1]]
    assert max(shared_out) > 1
    for ours, theirs in zip(*files, strict=True):
        assert ours.name == theirs.name
        assert ours.read_bytes() == theirs.read_bytes()


def test_processes_stop_together_and_resume(place):
    """SIGTERM to the launcher: one checkpoint of both processes, and the same run afterwards."""
    flags = ("--batch-size", "8", "--micro-batch-size", "3", "--logging-steps", "1")
    whole = train(place, "uncut", 2, *flags)
    flags += ("--cache-dir", "cache-uncut")
    with open(place / "cut.txt", "wb") as out:
        process = subprocess.Popen(
            command("cut", 2, *flags, "--save-steps", "4"),
            cwd=place, env=ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    while process.poll() is None and not (place / "cut/checkpoints/step-000004").exists():
        time.sleep(0.01)
    process.terminate()
    assert process.wait() != 0
    said = (place / "cut.txt").read_text()
    assert said.count("stopped after step") == 1
    assert not (place / "cut" / "results.json").exists()
    _, lines = train(place, "cut", 2, *flags, "--resume")
    speed = "speed/tokens_per_second"
    for one, two in zip(whole[1], lines, strict=True):
        assert {k: v for k, v in one.items() if k != speed} == {
            k: v for k, v in two.items() if k != speed
        }
    ours, theirs = (load_file(place / n / "final/model.safetensors") for n in ("cut", "uncut"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


def test_unequal_padding_and_an_empty_last_micro_batch(place):
    """Of 7 examples one process gets 4 and the other 3, one at a time, each of its own width."""
    one = train(place, "whole", 1, "--batch-size", "7", "--micro-batch-size", "0")
    two = train(place, "single", 2, "--batch-size", "7", "--micro-batch-size", "1")
    assert_same_steps(one, two)
