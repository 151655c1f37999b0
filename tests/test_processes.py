"""Two processes (gloo, CPU) take the steps that one takes on the same global batch, in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, tiny_model, wait_for
from filelock import FileLock
from forked import run_forked
from safetensors.torch import load_file

# token_level.py, which also leaves beside its run the first step's gradients before clipping, and
# the names of the tensor files that each process writes. Small batches of teacher states, so that
# there are several to share out.
SCRIPT = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import accelerate, torch
import common, token_level

target = sys.argv.pop()
clip, save_tensors = accelerate.Accelerator.clip_grad_norm_, common.save_tensors

def clip_and_save(self, parameters, *rest):
    parameters = list(parameters)
    if self.is_main_process and clip_and_save.first:
        torch.save(torch.cat([p.grad.flatten() for p in parameters]), target)
    clip_and_save.first = False
    return clip(self, parameters, *rest)

def save_and_note(path, **tensors):
    with open(f"{{target}}-{{accelerate.PartialState().process_index}}", "a") as file:
        file.write(path.name + chr(10))
    save_tensors(path, **tensors)

clip_and_save.first = True
accelerate.Accelerator.clip_grad_norm_ = clip_and_save
common.save_tensors = save_and_note
common.length_batches.__defaults__ = (256,)
common.launch(token_level.main, token_level.Arguments, "")
"""

# Of 7 examples one process gets 4 and the other 3, three at a time: the second process's last
# micro-batch is empty, and every micro-batch is padded to a width of its own.
TWO = ("--micro-batch-size", "3", "--logging-steps", "1", "--cache-dir", "cache-two")


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """A directory with a tiny teacher, a tiny student and the script."""
    directory = tmp_path_factory.mktemp("processes")
    for seed, name in enumerate(("teacher", "student")):
        tiny_model("llama", len(tokenizer.get_vocab()), seed).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    (directory / "script.py").write_text(SCRIPT)
    return directory


def words(name: str, *flags: str) -> list[str]:
    """Flags of a run on 60 rows for 20 steps in its own directory and, unless told so, its own
    cache."""
    options = {
        "teacher": "teacher", "student": "student", "max-rows": 60, "eval-size": 7,
        "max-new-tokens": 8, "max-steps": 20, "warmup-steps": 2, "batch-size": 7,
        "logging-steps": 3, "eval-steps": 9, "output-dir": name, "cache-dir": f"cache-{name}",
    }  # fmt: skip
    given = [str(part) for flag, value in options.items() for part in (f"--{flag}", value)]
    return [*given, *flags, f"{name}.pt"]


def train(place: Path, name: str, processes: int, *flags: str) -> tuple[torch.Tensor, list[dict]]:
    """First gradient (all parameters in a row) and metrics of a run, whose processes are forks."""
    given = words(name, *flags)
    done = run_forked(
        place / "script.py", *given, cwd=place, processes=processes, ACCELERATE_USE_CPU="true"
    )
    said = [line for line in done.stderr.splitlines() if "rror: " in line]
    assert done.returncode == 0, "\n".join(said) or done.stderr[-3000:]
    assert done.stdout.count("run directory") == done.stdout.count("gap recovered") == 1
    return torch.load(place / f"{name}.pt"), metrics(place / name)


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


@pytest.fixture(scope="module")
def two(place) -> tuple[torch.Tensor, list[dict]]:
    """A whole run of two processes."""
    return train(place, "two", 2, *TWO)


def test_two_processes_train_as_one(place, two):
    """First gradients agree to 1e-5 of their norm, the losses of all steps to 1e-3."""
    one = train(place, "one", 0, "--micro-batch-size", "0")
    assert (one[0] - two[0]).norm() <= 1e-5 * one[0].norm()
    losses = [[m["train/loss"] for m in run[1] if "train/loss" in m] for run in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    before = [run[1][0]["eval/kl_to_teacher"] for run in (one, two)]
    assert before[1] == pytest.approx(before[0], rel=1e-5)
    # Only one process writes metrics: a line for every step and every evaluation, once.
    steps = [sorted(m["step"] for m in run[1]) for run in (one, two)]
    assert steps[0] == steps[1] == sorted([*range(1, 21), 0, 9, 18, 20])

    # Both processes wrote teacher states, each file once, and the bytes are those of one process.
    wrote = [(place / f"two.pt-{i}").read_text().split() for i in (0, 1)]
    files = [
        sorted((place / f"cache-{n}" / "states").glob("*/*.safetensors")) for n in ("one", "two")
    ]
    assert min(map(len, wrote)) > 2 and sorted(wrote[0] + wrote[1]) == [f.name for f in files[1]]
    for ours, theirs in zip(*files, strict=True):
        assert ours.name == theirs.name
        assert ours.read_bytes() == theirs.read_bytes()


def test_an_error_of_one_process_is_one_sentence(place):
    """The other loses its connection, and ends without a traceback."""
    (place / "taken").mkdir()
    with FileLock(place / "taken/.lock"):
        flags = words("taken", *TWO)[:-1]
        done = run_forked("token_level.py", *flags, cwd=place, processes=2)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("another run is writing to --output-dir taken") == 1


def test_plan_of_several_processes(place):
    flags = [*words("plan")[:-1], "--plan"]
    done = run_forked("token_level.py", *flags, cwd=place, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("token_level.py needs, in MB") == 1


def test_processes_stop_together_and_resume(place, two):
    """SIGTERM to torchrun: one checkpoint of both processes, and the same run afterwards."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    with open(place / "cut.txt", "wb") as out:
        process = subprocess.Popen(
            [sys.executable, *start, *words("cut", *TWO, "--save-steps", "4")], cwd=place,
            env=os.environ | {"ACCELERATE_USE_CPU": "true"}, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert wait_for(process, (place / "cut/checkpoints/step-000004/state.json").exists)
    process.terminate()
    assert process.wait() != 0
    assert (place / "cut.txt").read_text().count("stopped after step") == 1
    assert not (place / "cut" / "results.json").exists()
    _, lines = train(place, "cut", 2, *TWO, "--resume")
    assert lines == two[1]
    ours, theirs = (load_file(place / n / "final/model.safetensors") for n in ("cut", "two"))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
