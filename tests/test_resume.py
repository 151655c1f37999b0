"""A run that is killed or stopped at any moment and resumed equals one that was not interrupted."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_in_process, run_script, tiny_model, wait_for
from forked import ForkedScript
from safetensors.torch import load_file, save_file

import common
import token_level

STEPS = 40
FLAGS = {
    "max_rows": 64, "batch_size": 8, "micro_batch_size": 4, "max_steps": STEPS, "eval_size": 8,
    "eval_steps": 10, "save_steps": 4, "logging_steps": 3, "generation_batch_size": 8,
}  # fmt: skip
WORDS = [w for name, value in FLAGS.items() for w in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> Path:
    """The directory of a whole run; the cache that it filled is beside it, in runs/cache."""
    directory = tmp_path_factory.mktemp("whole_run")
    done = run_script("token_level.py", *WORDS, "--output-dir", "run", cwd=directory)
    assert done.returncode == 0, done.stderr
    return directory / "run"


def in_process(output_dir: Path, **changes: object) -> None:
    cache = str(output_dir.parent / "cache")
    flags = {"cache_dir": cache, **FLAGS, "output_dir": str(output_dir), **changes}
    run_in_process(token_level, **flags)


def metrics(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def assert_same(run: Path, expected: Path, steps: int = STEPS) -> None:
    """Equal weights and optimizer state, bit for bit, and equal metrics, each line once."""
    last = Path("checkpoints") / f"step-{steps:06}"
    for file in (Path("final") / "model.safetensors", last / "model.safetensors"):
        ours, theirs = load_file(run / file), load_file(expected / file)
        assert ours.keys() == theirs.keys()
        assert all(v.dtype == torch.float32 and torch.equal(v, theirs[k]) for k, v in ours.items())
    ours, theirs = (
        torch.load(r / last / "optimizer.bin", weights_only=True) for r in (run, expected)
    )
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for i, state in ours["state"].items():
        assert all(torch.equal(v, theirs["state"][i][k]) for k, v in state.items())
    assert metrics(run) == metrics(expected)
    trained = [line["step"] for line in metrics(run) if "train/loss" in line]
    assert trained == list(range(1, steps + 1))


RESUME = ("--output-dir", "run", "--resume")


def resumed(directory: Path) -> ForkedScript:
    """token_level.py on its way; what it prints goes to out.txt."""
    return ForkedScript("token_level.py", [*WORDS, *RESUME], directory, directory / "out.txt")


def test_killed_at_many_moments(whole_run, tmp_path):
    chance = random.Random(0)
    run, checkpoints = tmp_path / "run", tmp_path / "run" / "checkpoints"
    cache = tmp_path / "runs" / "cache"

    def printed(text: str) -> bool:
        return text in (tmp_path / "out.txt").read_text()

    def reached(step: int) -> bool:
        """The last whole line of the metrics is of this training step or a later one."""
        text = (run / "metrics.jsonl").read_bytes() if (run / "metrics.jsonl").exists() else b""
        lines = [json.loads(line) for line in text.split(b"\n")[:-1]]
        return bool(lines) and "train/loss" in lines[-1] and lines[-1]["step"] >= step

    def lines_of_text() -> int:
        return sum(p.read_bytes().count(b"\n") for p in cache.glob("text/*.jsonl"))

    began = time.monotonic()
    pause = chance.uniform(0.1, 0.4)
    moments: dict[str, Callable[[], bool]] = {
        "loading": lambda: time.monotonic() > began + pause,
        "generating": lambda: lines_of_text() >= chance.randrange(8, 56),
        "writing teacher states": lambda: any(cache.glob("states/*/head.safetensors")),
        "training, no checkpoint": lambda: reached(3),
        "saving": lambda: any(checkpoints.glob("step-*")),  # partial, unless the poll came late
        "training": lambda: reached(7),
        "evaluating": lambda: reached(10),
        "resumed, loading": lambda: printed("run directory"),
        "training later": lambda: reached(chance.randrange(21, 36)),
        "last evaluation": (checkpoints / f"step-{STEPS:06}").exists,
    }
    for name, moment in moments.items():
        process = resumed(tmp_path)
        came = wait_for(process, moment)
        time.sleep(chance.uniform(0, 0.02))
        process.kill()
        process.wait()
        assert came or moment(), f"{name}: {(tmp_path / 'out.txt').read_text()}"
    process = resumed(tmp_path)
    wait_for(process, (run / "final").exists)  # for so short a time that the poll may miss it
    process.kill()
    process.wait()
    if not (run / "results.json").exists():
        assert resumed(tmp_path).wait() == 0, (tmp_path / "out.txt").read_text()
    assert_same(run, whole_run)
    results = [json.loads((r / "results.json").read_text()) for r in (run, whole_run)]
    assert results[0]["after"] == results[1]["after"]
    assert results[0]["before"] == results[1]["before"]


def test_signals_end_the_run_with_a_checkpoint(whole_run, tmp_path):
    """SIGTERM; Ctrl-C, which ends the reader of the pipe too; Ctrl-C twice: each is resumed."""
    shutil.copytree(whole_run.parent / "runs", tmp_path / "runs")
    checkpoints = tmp_path / "run" / "checkpoints"

    def last_checkpoint() -> int:
        return max((int(p.parent.name[5:]) for p in checkpoints.glob("*/state.json")), default=0)

    def wait_for_checkpoint_after(step: int, process: subprocess.Popen | ForkedScript) -> None:
        assert wait_for(process, lambda: last_checkpoint() > step), said()

    def said(file: str = "out.txt") -> str:
        return (tmp_path / file).read_text()

    def begin(flags: Sequence[str], **streams: object) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(ROOT / "token_level.py"), *flags]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, **streams)

    with open(tmp_path / "out.txt", "wb") as out:
        flags = [*WORDS, "--output-dir", "run", "--overwrite"]
        process = begin(flags, stdout=out, stderr=subprocess.STDOUT)
    wait_for_checkpoint_after(0, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
    last_line = said().splitlines()[-1]
    stopped_after = last_checkpoint()
    flags = ["--output-dir", "run", "--resume"]
    assert last_line == (
        f"stopped after step {stopped_after}; the same command with {shlex.join(flags)} and "
        "without --overwrite continues"
    )

    with open(tmp_path / "err.txt", "wb") as err:
        process = begin([*WORDS, *flags], stdout=subprocess.PIPE, stderr=err)
    assert any(line.startswith(b"resumed from run/checkpoints") for line in process.stdout)
    wait_for_checkpoint_after(stopped_after, process)
    process.stdout.close()  # as when the same Ctrl-C ends a `tee` behind the run
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT  # only then a shell leaves its loop
    assert "Traceback" not in said("err.txt")
    assert said("err.txt").splitlines()[-1].startswith("stopped after step")
    assert last_checkpoint() > stopped_after

    process = resumed(tmp_path)
    wait_for_checkpoint_after(last_checkpoint(), process)
    os.kill(process.pid, signal.SIGSTOP)  # so that both signals arrive during the same step
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.005)
    assert process.wait() == -signal.SIGINT
    assert "Traceback" not in said()
    assert said().splitlines()[-1] == "interrupted" or "stopped after step" in said()

    assert resumed(tmp_path).wait() == 0, said()
    assert_same(tmp_path / "run", whole_run)


def arguments(output_dir: Path | None, **changes: object) -> token_level.Arguments:
    named = {"output_dir": output_dir and str(output_dir), "resume": True}
    return token_level.Arguments(**{**FLAGS, "cache_dir": "runs/cache", **named, **changes})


def test_what_cannot_be_resumed(whole_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("results.json"))
    common.check_resume(run, "token_level", arguments(run))
    common.check_resume(run, "token_level", arguments(run, eval_steps=7, save_steps=1))
    refused = f"--resume cannot continue {run}: "
    cases = [
        ("token_level", arguments(run, temperature=2.0), "started with --temperature 1.0, not 2.0"),
        ("token_level", arguments(run, kl="reverse"), "started with --kl forward, not reverse"),
        ("on_policy", arguments(run), "script token_level, not on_policy"),
    ]
    for script, args, reason in cases:
        with pytest.raises(common.UsageError) as conflict:
            common.start(script, args)
        assert str(conflict.value).startswith(refused) and reason in str(conflict.value)
    saved = json.loads((run / "args.json").read_text())
    assert saved["launched"] == "NO"
    (run / "args.json").write_text(json.dumps(saved | {"launched": "MULTI_CPU"}))
    with pytest.raises(common.UsageError, match="launched MULTI_CPU, not NO"):
        common.start("token_level", arguments(run))
    with pytest.raises(common.UsageError, match="it is finished"):
        common.start("token_level", arguments(whole_run))
    with pytest.raises(common.UsageError, match=r"which has no readable args\.json"):
        common.start("token_level", arguments(ROOT))
    with pytest.raises(common.UsageError, match="contradict each other"):
        common.check_arguments(arguments(run, overwrite=True))
    with pytest.raises(common.UsageError, match="--resume needs --output-dir"):
        common.check_arguments(arguments(None))


def test_other_text_cannot_be_resumed_on(tmp_path):
    """The file under --dataset has changed: other rows would be learned and held out."""
    rows = [{"prompt": w, "response": "N"} for w in ("night", "train", "river", "seven")]
    file = tmp_path / "rows.jsonl"
    flags = {"dataset": str(file), "completions": "dataset", "max_rows": 0, "eval_size": 1}
    common.write_json_lines(file, rows)
    in_process(tmp_path / "run", **flags)
    (tmp_path / "run/results.json").unlink()  # as if it had been stopped before the end
    common.write_json_lines(file, [*rows[:2], {"prompt": "cloud", "response": "N"}, *rows[3:]])
    with pytest.raises(common.UsageError, match=r"cannot continue .*are not what they were"):
        in_process(tmp_path / "run", resume=True, **flags)
    common.write_json_lines(file, rows)
    in_process(tmp_path / "run", resume=True, **flags)
    assert (tmp_path / "run/results.json").exists()


def test_other_references_or_another_teacher_cannot_be_resumed_with(tmp_path):
    """The scores before and after would be of different answers."""
    rows = [{"prompt": w, "response": "N"} for w in ("night", "train", "river", "seven")]
    held_out = {"prompt": "cloud", "references": ["K L AW1 D"], "tests": "A"}
    files = {name: tmp_path / f"{name}.jsonl" for name in ("dataset", "eval_dataset")}
    shutil.copytree(common.DATA / "teacher", tmp_path / "teacher")
    flags = {"teacher": str(tmp_path / "teacher"), "completions": "dataset", "max_rows": 0}
    flags |= {"max_steps": 4} | {name: str(file) for name, file in files.items()}
    common.write_json_lines(files["dataset"], rows)
    common.write_json_lines(files["eval_dataset"], [held_out])
    in_process(tmp_path / "run", **flags)
    (tmp_path / "run/results.json").unlink()

    def refused() -> None:
        with pytest.raises(common.UsageError, match=r"cannot continue .*are not what they were"):
            in_process(tmp_path / "run", resume=True, **flags)

    common.write_json_lines(files["eval_dataset"], [held_out | {"references": ["K L AW1 D Z"]}])
    refused()
    common.write_json_lines(files["eval_dataset"], [held_out | {"tests": "B"}])  # for a grader
    refused()
    common.write_json_lines(files["eval_dataset"], [held_out])
    weights = tmp_path / "teacher/model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= torch.linspace(0, 1, len(tensors["model.norm.weight"]))
    save_file(tensors, weights, metadata={"format": "pt"})
    refused()


def test_arguments_are_checked_again_once_the_directory_is_locked(tmp_path, monkeypatch):
    """Another run may have begun, and died, while this one loaded its models."""
    flags, load = {"max_steps": 4}, common.load_pair

    def slowly(*inputs: object) -> common.Pair:
        monkeypatch.setattr(common, "load_pair", load)
        in_process(tmp_path / "run", learning_rate=1e-4, **flags)
        (tmp_path / "run/results.json").unlink()
        return load(*inputs)

    monkeypatch.setattr(common, "load_pair", slowly)
    with pytest.raises(common.UsageError, match=r"started with --learning-rate 0.0001, not 0.002"):
        in_process(tmp_path / "run", resume=True, **flags)


def test_a_signal_during_the_last_checkpoint_stops_the_run(tmp_path, monkeypatch):
    write = common.Run._write_checkpoint

    def interrupted(run: common.Run, step: int) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        write(run, step)

    monkeypatch.setattr(common.Run, "_write_checkpoint", interrupted)
    monkeypatch.setattr(common, "end_by", lambda number: sys.exit(f"by {number}"))
    with pytest.raises(SystemExit, match="by 15"):
        in_process(tmp_path / "run", max_steps=4, save_steps=0)
    assert not (tmp_path / "run/results.json").exists()
    monkeypatch.undo()
    in_process(tmp_path / "run", max_steps=4, save_steps=0, resume=True)
    assert (tmp_path / "run/results.json").exists()


def test_lost_lines_of_metrics(tmp_path, capsys):
    """A torn line is dropped; without a checkpoint the run begins anew, and says so."""
    flags = {"max_steps": 8, "eval_steps": 0}
    in_process(tmp_path / "whole", **flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    file = tmp_path / "run/metrics.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    for left in (b"".join(whole)[:-5], b"".join(whole[:3])[:-5], b""):
        file.write_bytes(left)
        complete = metrics(tmp_path / "whole")[: left.count(b"\n")][:9]  # of the checkpoint
        (tmp_path / "run/results.json").unlink()
        in_process(tmp_path / "run", resume=True, **flags)
        assert metrics(tmp_path / "run") == complete + metrics(tmp_path / "whole")[9:]
    (tmp_path / "run/results.json").unlink()
    shutil.rmtree(tmp_path / "run/checkpoints")
    in_process(tmp_path / "run", resume=True, **flags)
    assert "has no checkpoint, so the run begins anew" in capsys.readouterr().out
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_checkpoint_is_read_as_it_was_written(tmp_path, monkeypatch):
    """In UTF-8, where the system has another encoding."""
    in_process(tmp_path / "run")
    (tmp_path / "run/results.json").unlink()
    state = max(tmp_path.glob("run/checkpoints/*/state.json"))
    saved = json.loads(state.read_text(encoding="utf-8"))
    saved["before"][0]["answer"] = "café"
    common.write_json(state, saved)
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, encoding="cp1252": read(path, encoding))
    in_process(tmp_path / "run", resume=True)
    assert json.loads((tmp_path / "run/answers.jsonl").open().readline())["before"] == "café"


def test_old_checkpoints_are_removed_and_corrupt_ones_named(whole_run, tmp_path):
    last = f"step-{STEPS:06}"
    names = sorted(p.name for p in (whole_run / "checkpoints").iterdir())
    assert names == [f"step-{STEPS - 4:06}", last]
    run = tmp_path / "run"
    shutil.copytree(whole_run, run, ignore=shutil.ignore_patterns("results.json"))
    shutil.copytree(whole_run.parent / "runs" / "cache", tmp_path / "cache")
    for file in ("optimizer.bin", "model.safetensors", "state.json"):
        broken = run / "checkpoints" / last / file
        broken.write_bytes(broken.read_bytes()[:-20])
        with pytest.raises(
            common.UsageError, match=rf"cannot load the checkpoint .*{last} .*delete it"
        ):
            in_process(run, resume=True)
    # Without its state.json, which is written last, a checkpoint is partial, and does not count.
    broken.unlink()
    shutil.copytree(run / "checkpoints" / last, run / "checkpoints" / "step-000002")
    (run / "checkpoints/.DS_Store").touch()  # of a file manager
    copy = shutil.copytree(run / "checkpoints/step-000002", run / "checkpoints/step-000002.bak")
    with open(run / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 21, "train')
    in_process(run, resume=True, save_total_limit=1)
    assert_same(run, whole_run)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [".DS_Store", copy.name, last]


def test_checkpoints_are_ordered_by_their_steps(tmp_path):
    run = object.__new__(common.Run)
    run.directory = tmp_path
    for step in (1_000_000, 999_800, 200):
        common.write_json(tmp_path / f"checkpoints/step-{step:06}/state.json", {})
    found = [path.name for path in run._checkpoints()]
    assert found == ["step-000200", "step-999800", "step-1000000"]


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

    def interrupt(run: common.Run, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt
        save(run, step)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "save", interrupt)
        in_process(tmp_path / "cut", **flags)
    in_process(tmp_path / "cut", **flags, resume=True)
    assert_same(tmp_path / "cut", tmp_path / "whole", 6)
