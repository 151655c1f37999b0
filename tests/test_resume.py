"""A run that is cut, wherever, and resumed ends as one that was never cut."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import ROOT, run_script, tiny_model, wait_for
from safetensors.torch import load_file

import common
import token_level

STEPS = 24
FLAGS = {
    "max_rows": 64, "batch_size": 8, "micro_batch_size": 4, "max_steps": STEPS, "eval_size": 8,
    "eval_steps": 5, "save_steps": 4, "logging_steps": 3, "generation_batch_size": 8,
}  # fmt: skip
WORDS = [w for name, value in FLAGS.items() for w in (f"--{name.replace('_', '-')}", str(value))]
ONE_THREAD = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    """A run that nothing interrupts, and the text cache that it filled."""
    directory = tmp_path_factory.mktemp("uncut")
    done = run_script("token_level.py", *WORDS, "--output-dir", "run", cwd=directory, **ONE_THREAD)
    assert done.returncode == 0, done.stderr
    return directory / "run"


def in_process(output_dir: Path, **changes: object) -> None:
    """`token_level.main`, which saves the seconds that a process takes to start."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    torch.set_num_threads(1)
    cache = str(output_dir.parent / "cache")
    flags = {"cache_dir": cache, **FLAGS, "output_dir": str(output_dir), **changes}
    token_level.main(token_level.Arguments(**flags))


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def assert_same(run: Path, other: Path, steps: int = STEPS) -> None:
    """Weights and optimizer state bit for bit, and the same lines of metrics, each once."""
    last = Path("checkpoints") / f"step-{steps:06}"
    for file in (Path("final") / "model.safetensors", last / "model.safetensors"):
        ours, theirs = load_file(run / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        assert all(v.dtype == torch.float32 and torch.equal(v, theirs[k]) for k, v in ours.items())
    ours, theirs = (torch.load(r / last / "optimizer.bin", weights_only=True) for r in (run, other))
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for i, state in ours["state"].items():
        assert all(torch.equal(v, theirs["state"][i][k]) for k, v in state.items())
    assert metrics(run) == metrics(other)
    trained = [line["step"] for line in metrics(run) if "train/loss" in line]
    assert trained == list(range(1, steps + 1))


def begin(directory: Path, *flags: str, **streams: object) -> subprocess.Popen[bytes]:
    with open(directory / "out.txt", "wb") as out:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "token_level.py"), *WORDS, "--output-dir", "run", *flags],
            cwd=directory, env={**os.environ, **ONE_THREAD},
            **{"stdout": out, "stderr": subprocess.STDOUT, **streams},
        )  # fmt: skip


def test_killed_at_many_moments(uncut, tmp_path):
    chance = random.Random(0)
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"

    def printed(text: str) -> bool:
        return text in (tmp_path / "out.txt").read_text()

    def reached(step: int) -> bool:
        """The last whole line of the metrics is of this training step or a later one."""
        text = (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else b""
        lines = [json.loads(line) for line in text.split(b"\n")[:-1]]
        return bool(lines) and "train/loss" in lines[-1] and lines[-1]["step"] >= step

    def written() -> int:
        return sum(
            p.read_bytes().count(b"\n") for p in (tmp_path / "runs/cache/text").glob("*.jsonl")
        )

    began = time.monotonic()
    pause = chance.uniform(0.2, 2)
    moments = {
        "loading": lambda: time.monotonic() > began + pause,
        "generating": lambda: written() >= chance.randrange(8, 56),
        "teacher's evaluation": lambda: printed("training text"),
        "training, no checkpoint": lambda: reached(3),
        "saving": lambda: any(checkpoints.glob("step-*")),  # .part, unless that was too quick
        "training": lambda: reached(7),
        "evaluating": lambda: reached(10),
        "resumed, loading": lambda: printed("run directory"),
        "training later": lambda: reached(chance.randrange(15, 22)),
        "last evaluation": (checkpoints / f"step-{STEPS:06}").exists,
    }
    for name, moment in moments.items():
        process = begin(tmp_path, "--resume")
        came = wait_for(process, moment)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.wait()
        assert came, f"{name}: {(tmp_path / 'out.txt').read_text()}"
    process = begin(tmp_path, "--resume")
    came = wait_for(process, (run / "final").exists)  # so short that it may be missed
    process.kill()
    process.wait()
    if not (run / "results.json").exists():
        assert begin(tmp_path, "--resume").wait() == 0, (tmp_path / "out.txt").read_text()
    assert_same(run, uncut)
    results = [json.loads((r / "results.json").read_text()) for r in (run, uncut)]
    assert results[0]["after"] == results[1]["after"]
    assert results[0]["before"] == results[1]["before"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_says_how_to_go_on(number, code, uncut, tmp_path):
    shutil.copytree(uncut.parent / "runs", tmp_path / "runs")
    process = begin(tmp_path)
    assert wait_for(process, (tmp_path / "run" / "checkpoints" / "step-000004").exists)
    process.send_signal(number)
    assert process.wait() == code
    said = (tmp_path / "out.txt").read_text().splitlines()[-1]
    assert said.startswith("stopped after step")
    command = said.partition("to go on: python token_level.py ")[2].split()
    assert command[-3:] == ["--output-dir", "run", "--resume"]
    done = run_script("token_level.py", *command, cwd=tmp_path, **ONE_THREAD)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_same(tmp_path / "run", uncut)


def test_the_reader_of_a_pipe_may_be_gone(uncut, tmp_path):
    """Ctrl-C ends the `tee` behind the run too: what is left to say goes to stderr."""
    shutil.copytree(uncut.parent / "runs", tmp_path / "runs")
    with open(tmp_path / "err.txt", "wb") as err:
        process = begin(tmp_path, stdout=subprocess.PIPE, stderr=err)
    assert wait_for(process, (tmp_path / "run" / "checkpoints" / "step-000004").exists)
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    said = (tmp_path / "err.txt").read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("stopped after step")


def test_a_second_interrupt_ends_the_run_at_once(uncut, tmp_path):
    """No checkpoint of its own, no traceback; --resume goes on from the one before."""
    shutil.copytree(uncut.parent / "runs", tmp_path / "runs")
    process = begin(tmp_path)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert wait_for(process, (checkpoints / "step-000004").exists)
    os.kill(process.pid, signal.SIGSTOP)  # so that both signals meet the same step
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.005)
    assert process.wait() == 130
    said = (tmp_path / "out.txt").read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1] == "interrupted" or "stopped after step" in said
    assert begin(tmp_path, "--resume").wait() == 0, (tmp_path / "out.txt").read_text()
    assert_same(tmp_path / "run", uncut)


def arguments(output_dir: Path | None, **changes: object) -> token_level.Arguments:
    named = {"output_dir": output_dir and str(output_dir), "resume": True}
    return token_level.Arguments(**{**FLAGS, "cache_dir": "runs/cache", **named, **changes})


def test_what_cannot_be_resumed(uncut, tmp_path, monkeypatch):
    cut = tmp_path / "runs" / "token_level-some-flags"
    shutil.copytree(uncut, cut, ignore=shutil.ignore_patterns("results.json"))
    monkeypatch.chdir(tmp_path)
    assert common.find_run("token_level", arguments(cut)) == cut
    assert common.find_run("token_level", arguments(cut, eval_steps=7, save_steps=1)) == cut
    assert common.find_run("token_level", arguments(None)) == cut.relative_to(tmp_path)
    with pytest.raises(common.UsageError, match=r"begun with --temperature 1.0, not 2.0"):
        common.find_run("token_level", arguments(cut, temperature=2.0))
    with pytest.raises(common.UsageError, match="no run in runs/ was begun with these"):
        common.find_run("token_level", arguments(None, temperature=2.0))
    with pytest.raises(common.UsageError, match="a run of token_level"):
        common.find_run("on_policy", arguments(cut))
    with pytest.raises(common.UsageError, match="is finished"):
        common.find_run("token_level", arguments(uncut))
    with pytest.raises(common.UsageError, match="no run of this suite"):
        common.find_run("token_level", arguments(ROOT))
    with pytest.raises(common.UsageError, match="choose one"):
        common.check_arguments(arguments(cut, overwrite=True))


def test_old_checkpoints_are_removed_and_corrupt_ones_named(uncut, tmp_path):
    names = sorted(p.name for p in (uncut / "checkpoints").iterdir())
    assert names == ["before.json", "step-000020", "step-000024"]
    run = tmp_path / "run"
    shutil.copytree(uncut, run, ignore=shutil.ignore_patterns("results.json"))
    shutil.copytree(uncut.parent / "runs" / "cache", tmp_path / "cache")
    for file in ("optimizer.bin", "model.safetensors", "state.json"):
        broken = run / "checkpoints" / "step-000024" / file
        broken.write_bytes(broken.read_bytes()[:-20])
        with pytest.raises(common.UsageError, match=r"step-000024 is corrupt .* delete it"):
            in_process(run, resume=True)
    shutil.rmtree(broken.parent)
    (run / "checkpoints" / "step-000024.part").mkdir()
    (run / "checkpoints" / "step-000024.part" / "model.safetensors").write_bytes(b"half")
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 21, "train')
    in_process(run, resume=True, save_total_limit=1)
    assert_same(run, uncut)
    left = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert left == ["before.json", "step-000024"]


def test_dropout_is_the_same_after_a_resume(tokenizer, tmp_path, monkeypatch):
    student = tiny_model("gpt2", len(tokenizer.get_vocab()))
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        setattr(student.config, name, 0.1)
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    flags = {"student": str(tmp_path / "student"), "max_steps": 6, "eval_steps": 0}
    flags |= {"max_new_tokens": 16, "save_steps": 2}
    in_process(tmp_path / "whole", **flags)

    save = common.Run.save

    def cut(run: common.Run, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt
        save(run, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "save", cut)
        in_process(tmp_path / "cut", **flags)
    in_process(tmp_path / "cut", **flags, resume=True)
    assert_same(tmp_path / "cut", tmp_path / "whole", 6)
