"""token_level.py as a user runs it, on the embedded pair: what it learns and what it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import run_in_process, run_script
from forked import run_forked
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import token_level


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """One directory for all runs, so that they share the teacher's text as a sweep does."""
    return tmp_path_factory.mktemp("token_level")


FLAGS = {"max_rows": 1280, "epochs": 4.0, "eval_size": 200, "eval_steps": 40}


@pytest.fixture(scope="module")
def forward(workplace, shared_cache) -> tuple[Path, str]:
    """The directory of a run that a user starts, and what it printed."""
    flags = [word for k, v in FLAGS.items() for word in (common.as_flag(k), str(v))]
    flags += ["--cache-dir", str(shared_cache)]
    done = run_script("token_level.py", *flags, cwd=workplace)
    assert done.returncode == 0, done.stderr
    return workplace / "runs" / "token_level-max-rows-1280-eval-size-200-epochs-4.0", done.stdout


@pytest.fixture
def train(workplace, shared_cache, monkeypatch) -> Callable[..., None]:
    """Runs `main` with FLAGS and others in the same directory."""
    monkeypatch.chdir(workplace)
    cache = {"cache_dir": str(shared_cache)}
    return lambda **flags: run_in_process(token_level, **FLAGS | cache | flags)


def read(run: Path) -> tuple[dict, list[dict]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads((run / "results.json").read_text()), [json.loads(line) for line in lines]


def test_student_learns_on_held_out_words(forward):
    """80 steps of forward KL: closer to the teacher in every way that is measured."""
    results, _ = read(forward[0])
    before, after = results["before"], results["after"]
    assert after["kl_to_teacher"] < 0.7 * before["kl_to_teacher"]
    assert after["top1_agreement"] > before["top1_agreement"] + 0.02
    assert after["nats_per_token"] < before["nats_per_token"]
    assert after["bits_per_byte"] < before["bits_per_byte"]
    assert after["error_rate"] < before["error_rate"]
    assert after["cut_off"] == 0
    gap = results["gap_recovered"]["kl_to_teacher"]
    assert gap == pytest.approx(1 - after["kl_to_teacher"] / before["kl_to_teacher"])
    assert results["teacher"]["exact_match"] > after["exact_match"] > before["exact_match"]


def test_metrics_and_table(forward):
    """Every step once, with the documented keys; evaluations where they were asked for."""
    run, printed = forward
    results, lines = read(run)
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 81))
    assert all(line["train/kl"] == line["train/loss"] for line in steps)  # T = 1, no CE
    assert {"optim/lr", "optim/grad_norm", "speed/tokens_per_second"} <= steps[0].keys()
    assert steps[29]["optim/lr"] == pytest.approx(2e-3) and steps[-1]["optim/lr"] < 1e-5
    scored = {line["step"]: line for line in lines if "eval/kl_to_teacher" in line}
    assert list(scored) == [0, 40, 80]
    assert scored[80]["eval/kl_to_teacher"] == results["after"]["kl_to_teacher"]
    assert f"{results['after']['kl_to_teacher']:.4f}" in printed
    assert "teacher" in printed and "gap recovered" in printed


def test_run_directory(forward):
    """What DESIGN promises a user finds; the student loads with nothing but transformers."""
    run, _ = forward
    found = {p.name for p in run.iterdir()}
    assert {"args.json", "metrics.jsonl", "final", "results.json", "curves.png"} <= found
    args = json.loads((run / "args.json").read_text())
    assert args["script"] == "token_level" and args["kl"] == "forward" and args["max_rows"] == 1280
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    card = (run / "final" / "README.md").read_text()
    assert "token_level.py" in card and "--max-rows 1280" in card and "kl_to_teacher" in card
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert model.dtype == torch.float32
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "banana"}], add_generation_prompt=True, return_tensors="pt"
    )["input_ids"]
    out = model.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :].tolist()
    assert out[-1] == tokenizer.eos_token_id and len(out) < 16
    trained = AutoModelForCausalLM.from_pretrained(common.DATA / "student", dtype=torch.float32)
    moved = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True)
    ]
    assert all(moved)


@pytest.mark.parametrize("kl", ["reverse", "jsd"])
def test_other_divergences_learn_too(kl, workplace, shared_cache, forward, train, capsys):
    """They find text and states of the first run: nothing is written, no backbone is loaded."""

    def cached() -> dict[Path, int]:
        paths = [p for p in shared_cache.rglob("*.*") if p.suffix != ".lock"]
        return {path: path.stat().st_mtime_ns for path in paths}

    before = cached()
    assert {path.suffix for path in before} == {".jsonl", ".safetensors"}
    train(kl=kl, output_dir=f"runs/{kl}", eval_steps=0)
    assert cached() == before
    assert capsys.readouterr().out.count("its backbone is not loaded") == 2
    results, lines = read(workplace / "runs" / kl)
    own = [line["train/kl"] for line in lines if "train/kl" in line]
    assert sum(own[-10:]) < 0.9 * sum(own[:10])
    # Reverse KL raises the forward KL of a weak student at first, and 80 steps are few.
    limit = {"reverse": 1.05, "jsd": 0.97}[kl]
    assert results["after"]["kl_to_teacher"] < limit * results["before"]["kl_to_teacher"]
    assert results["after"]["error_rate"] < results["before"]["error_rate"]
    assert lines[-1]["step"] == 80


def test_sweep_and_comparison(workplace, forward, train, capsys):
    """The loop of the README: runs side by side, no backbone, one table and one picture."""
    for temperature in (2.0, 2.0):  # the same flags twice: the second directory is numbered
        train(max_steps=6, temperature=temperature, eval_steps=0, eval_size=40)
    assert capsys.readouterr().out.count("its backbone is not loaded") == 4
    runs = [p for p in (workplace / "runs").iterdir() if "temperature-2.0" in p.name]
    assert len(runs) == 2 and sorted(p.name for p in runs)[1].endswith("-2")
    _, lines = read(runs[0])
    step = lines[1]
    assert step["train/loss"] == pytest.approx(4 * step["train/kl"])
    done = run_forked("common.py", *sorted((workplace / "runs").iterdir()), cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert all(p.name in done.stdout for p in runs)
    assert (workplace / "runs" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    twice = [(p / "metrics.jsonl").read_text() for p in runs]
    losses = [[json.loads(x).get("train/loss") for x in text.splitlines()] for text in twice]
    assert losses[0] == losses[1]  # equal flags, equal numbers


def test_dataset_completions_with_cross_entropy(workplace, train):
    """The data set's own responses, KL and CE together: the loss is the documented sum."""
    flags = {"completions": "dataset", "ce_weight": 0.5, "temperature": 2.0, "max_rows": 192}
    train(**flags, max_steps=3, output_dir="runs/gold", eval_steps=0, eval_size=40)
    _, lines = read(workplace / "runs" / "gold")
    step = lines[1]
    ce = (step["train/loss"] - 4 * step["train/kl"]) / 0.5
    assert 0.5 < ce < 6  # nats per token of a student that has seen this kind of text


def test_divergence_of_training_is_named(workplace, shared_cache, forward, monkeypatch):
    """A non-finite loss stops the run, says where and on what, and leaves no student."""
    flags = "--learning-rate 1e30 --max-steps 12 --max-rows 640 --eval-size 40"
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["", *flags.split(), "--output-dir", "runs/boom",
                                      "--cache-dir", str(shared_cache)])  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        common.launch(token_level.main, token_level.Arguments, "")
    said = ended.value.code  # text, which Python prints before it exits with code 1
    assert said.startswith("error: ") and "\n" not in said
    assert "not finite at step" in said and "train.jsonl:" in said
    assert not (workplace / "runs" / "boom" / "final").exists()
