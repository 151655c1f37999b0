"""on_policy.py: the coin, the student's own text, what is learned from it, and resuming."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from conftest import ROOT, run_script, tiny_model
from safetensors.torch import load_file
from torch import nn

import common
import on_policy
import token_level
from common import Conversation, Head, Objective, Prompt, UsageError
from on_policy import Arguments

SMALL = {
    "max_rows": 48, "batch_size": 8, "micro_batch_size": 3, "max_steps": 8, "eval_size": 6,
    "eval_steps": 0, "save_steps": 2, "logging_steps": 2, "warmup_steps": 2, "max_new_tokens": 8,
}  # fmt: skip
WORDS = [w for name, value in SMALL.items() for w in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """Tiny teacher and student, which every run here shares with one cache."""
    directory = tmp_path_factory.mktemp("on_policy")
    for seed, name in enumerate(("teacher", "student")):
        tiny_model("llama", len(tokenizer.get_vocab()), seed).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return directory


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def in_process(module, place: Path, name: str, **changes) -> list[dict]:
    """`main` of a script on the tiny pair, without a process's start; its lines of metrics."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    torch.set_num_threads(1)
    models = {"teacher": str(place / "teacher"), "student": str(place / "student")}
    where = {"output_dir": str(place / name), "cache_dir": str(place / "cache")}
    module.main(module.Arguments(**{**SMALL, **models, **where, **changes}))
    return metrics(place / name)


def metrics(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("speed/")} for line in lines]


def assert_same_end(run: Path, other: Path, steps: int = SMALL["max_steps"]) -> None:
    """Weights and optimizer state, bit for bit."""
    last = Path("checkpoints") / f"step-{steps:06}"
    ours, theirs = (load_file(r / last / "model.safetensors") for r in (run, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    ours, theirs = (torch.load(r / last / "optimizer.bin", weights_only=True) for r in (run, other))
    for i, state in ours["state"].items():
        assert all(torch.equal(value, theirs["state"][i][k]) for k, value in state.items())


def prompts_of(count: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(5, 400, (1 + i % 5,), generator=draw).tolist() for i in range(count)]
    return [Prompt(Conversation([], None, [], f"row {i}"), r, r) for i, r in enumerate(rows)]


# --------------------------------------------------------------------------------- the mixture


@pytest.mark.parametrize(
    "flags",
    [
        {"kl": "reverse"},
        {"kl": "jsd", "temperature": 2.0, "ce_weight": 0.3, "cache_teacher": False},
    ],
    ids=["reverse", "jsd-ce-live"],
)
def test_mix_0_is_token_level(flags: dict, place: Path):
    """Step for step and bit for bit: the same losses, norms, weights and optimizer state."""
    names = [f"{script}-{flags['kl']}" for script in ("ours", "theirs")]
    ours = in_process(on_policy, place, names[0], mix=0.0, **flags)
    theirs = in_process(token_level, place, names[1], **flags)
    assert_same_end(place / names[0], place / names[1])
    assert [m["step"] for m in ours] == [m["step"] for m in theirs] == [*range(9), 8]
    for mine, its in zip(ours, theirs, strict=True):
        assert its.items() <= mine.items()  # what is more is about the student's own text
        assert not any(k.startswith("rollout/") for k in mine)


def test_the_coin():
    """A share of steps, a function of (seed, step), that rises in a straight line from 0."""
    flips = [Arguments(mix=0.3).on_policy(s) for s in range(2000)]
    assert sum(flips) / 2000 == pytest.approx(0.3, abs=3 * math.sqrt(0.21 / 2000))
    assert flips == [Arguments(mix=0.3).on_policy(s) for s in range(2000)]
    assert flips != [Arguments(mix=0.3, seed=1).on_policy(s) for s in range(2000)]
    more = [Arguments(mix=0.6).on_policy(s) for s in range(2000)]
    assert all(b for a, b in zip(flips, more, strict=True) if a)  # one draw, another threshold
    assert not any(Arguments(mix=0.0).on_policy(s) for s in range(500))
    assert all(Arguments(mix=1.0).on_policy(s) for s in range(500))
    risen = [Arguments(mix=0.8, mix_warmup_steps=2000).on_policy(s) for s in range(4000)]
    for start, share in ((0, 0.1), (500, 0.3), (1000, 0.5), (1500, 0.7), (2000, 0.8), (3000, 0.8)):
        count = 500 if start < 2000 else 1000
        assert sum(risen[start : start + count]) / count == pytest.approx(share, abs=0.06)


def test_pure_on_policy_has_the_teacher_write_no_training_text(place: Path, capsys):
    """--mix 1: only the evaluation's text is in the cache, and every step is of own text."""
    cache = {"cache_dir": str(place / "cache of mix 1")}
    lines = in_process(on_policy, place, "mix-1", mix=1.0, **cache)
    text = [p.read_text() for p in (place / "cache of mix 1" / "text").glob("*.jsonl")]
    assert len(text) == 2 and all(t.count("\n") == SMALL["eval_size"] for t in text)
    steps = [m for m in lines if "train/loss" in m]
    assert len(steps) == 8
    for m in steps:
        assert m["train/kl_on_own_text"] == m["train/kl"] == m["train/loss"] > 0
        assert 1 <= m["rollout/response_tokens"] <= 8 and m["rollout/staleness"] == 0
        assert 0 <= m["rollout/cut_off"] <= 1
        assert 0 < m["rollout/entropy"] < math.log(408)
        assert 0 < m["rollout/teacher_entropy"] < math.log(408)
    assert "step 1, the student writes:" in capsys.readouterr().out
    results = json.loads((place / "mix-1" / "results.json").read_text())
    for moment, step in (("before", 0), ("after", 8)):
        found = results[moment]
        ratio = found["kl_on_own_text"] / found["kl_to_teacher"]
        assert found["exposure_bias"] == pytest.approx(ratio)
        scored = next(m for m in lines if m["step"] == step and "eval/exposure_bias" in m)
        assert scored["eval/kl_on_own_text"] == found["kl_on_own_text"]


def test_learns_on_the_embedded_pair(tmp_path: Path):
    """As a user runs it: half of 24 steps on its own words bring the student nearer there."""
    flags = ["--max-rows", "512", "--max-steps", "24", "--eval-size", "80", "--eval-steps", "20"]
    flags += ["--learning-rate", "1e-3", "--warmup-steps", "8", "--lmbda", "0.5"]
    flags += ["--output-dir", "run", "--save-steps", "0"]
    done = run_script("on_policy.py", *flags, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "run/results.json").read_text())
    lines = metrics(tmp_path / "run")
    before, after = results["before"], results["after"]
    assert after["kl_on_own_text"] < 0.92 * before["kl_on_own_text"]
    assert after["exposure_bias"] < 0.92 * before["exposure_bias"]
    assert after["cut_off"] == 0
    own = [m["train/kl"] for m in lines if "train/kl_on_own_text" in m]
    teachers = [m["train/kl"] for m in lines if "train/kl_on_teacher_text" in m]
    assert 8 <= len(own) <= 16 and len(own) + len(teachers) == 24
    assert sum(own[-4:]) < 0.8 * sum(own[:4])
    assert json.loads((tmp_path / "run/args.json").read_text())["mix"] == 0.5
    assert done.stdout.count("the student writes:") == 2 and "warning" not in done.stdout
    assert "exposure_bias" in done.stdout


# ------------------------------------------------------------------------------------ the loss


class Fixed(nn.Module):
    """A student whose states are parameters: one position, as often as there are targets."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        state, weight = (torch.randn(n, width, generator=draw) for n in (1, size))
        self.model = SimpleNamespace()
        self.state, self.weight = nn.Parameter(state.double()), nn.Parameter(weight.double())

    def states(self, batch: common.Batch) -> torch.Tensor:
        return self.state.expand(len(batch.targets), -1)

    def head(self) -> Head:
        return Head(self.weight, None)


def test_sampled_estimator_has_the_exact_expected_gradient():
    """Over every token of a vocabulary of 11, weighted by the student's own probabilities.

    Float64, to 1e-12 of the norm; one token alone is far from it, so that this says something.
    The expected value of the loss that is logged is the divergence itself.
    """
    student = Fixed(11, 5)
    draw = torch.Generator().manual_seed(1)
    teacher = Head(torch.randn(11, 7, generator=draw).double(), None)
    states = torch.randn(1, 7, generator=draw).double()

    def gradient(estimator: str, target: int) -> tuple[torch.Tensor, torch.Tensor]:
        objective = Objective(kl="reverse")
        loss = on_policy.OnPolicyLoss(student, teacher, objective, estimator)  # type: ignore
        targets = torch.tensor([target])
        empty = torch.zeros(1, 1, dtype=torch.long)
        value, sums = loss(common.Batch(empty, empty[0], empty[0], targets), states, True)
        found = torch.autograd.grad(value, (student.state, student.weight))
        return torch.cat([g.flatten() for g in found]), sums[0]

    logprobs = (student.state @ student.weight.t()).log_softmax(-1)[0].detach()
    theirs = (states @ teacher.weight.t()).log_softmax(-1)[0]
    exact, kl = gradient("exact", 0)
    assert kl.item() == pytest.approx((logprobs.exp() * (logprobs - theirs)).sum().item())
    each = [gradient("sampled", y) for y in range(11)]
    expected = sum(p * g for p, (g, _) in zip(logprobs.exp(), each, strict=True))
    assert (expected - exact).norm() < 1e-12 * exact.norm()
    assert min((g - exact).norm() for g, _ in each) > 0.1 * exact.norm()
    value = sum(p * v for p, (_, v) in zip(logprobs.exp(), each, strict=True))
    assert value.item() == pytest.approx(kl.item())
    # Draws, as training has them: within five standard errors of the mean of 20000.
    tokens = torch.multinomial(logprobs.exp(), 20_000, replacement=True, generator=draw)
    drawn = torch.stack([each[y][0] for y in tokens.tolist()])
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - exact).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_nothing_written_is_a_connected_zero(estimator: str, tiny):
    """Whatever the process has no tokens for leaves zero gradients, not none and not NaN."""
    student, teacher = tiny("llama"), tiny("qwen2", seed=1)
    loss = on_policy.OnPolicyLoss(student, teacher.head(), Objective(kl="reverse"), estimator)
    empty = [common.with_response([7, 8, 9], []), common.with_response([4, 5], [])]
    for tokens in (empty, []):
        batch = common.collate(tokens, torch.device("cpu"))
        value, sums = loss(batch, common.teacher_states(teacher, batch), True)
        value.backward()
        assert value.item() == 0 and sums.tolist() == [0] * 5
        gradients = [p.grad for p in student.model.parameters()]
        assert all(g is not None and (g == 0).all() for g in gradients)
        student.model.zero_grad()


def test_cross_entropy_is_for_text_of_others(tiny):
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    objective = Objective(kl="reverse", ce_weight=0.5)
    loss = on_policy.OnPolicyLoss(student, teacher.head(), objective, "exact")
    batch = common.collate([common.with_response([7, 8, 9], [10, 11, 1])], torch.device("cpu"))
    states = common.teacher_states(teacher, batch)
    own, sums = loss(batch, states, True)
    assert sums[1] == 0 and own.item() == pytest.approx(sums[0].item())
    teachers, sums = loss(batch, states, False)
    assert sums[1] > 1 and teachers.item() == pytest.approx((sums[0] + 0.5 * sums[1]).item())
    assert sums[2:].tolist() == [0, 0, 0]


def test_entropies_against_plain_ones(tiny, monkeypatch):
    """All tokens where they fit into a chunk; else at most a chunk of them, evenly spread."""
    student, teacher = tiny("llama"), tiny("gemma2", seed=1)
    states = [torch.randn(50, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    plain = [
        torch.distributions.Categorical(logits=m.head().logits(s).double()).entropy()
        for m, s in zip((student, teacher), states, strict=True)
    ]
    pair = (states[0], student.head(), states[1], teacher.head())
    found = on_policy.entropies(*pair)
    assert found.tolist() == pytest.approx([*(p.sum().item() for p in plain), 50], rel=1e-5)
    monkeypatch.setattr(common, "chunk_rows", lambda *_: 20)
    some = on_policy.entropies(*pair)
    assert some.tolist() == pytest.approx([*(p[::3].sum().item() for p in plain), 17], rel=1e-5)


# --------------------------------------------------------------------------------- own text


def rollouts(student, accelerator, steps: int = 30, **flags) -> on_policy.Rollouts:
    args = Arguments(batch_size=6, max_new_tokens=8, **{"mix": 0.5, **flags})
    return on_policy.Rollouts(student, prompts_of(20), args, steps, accelerator)


def test_rollouts_are_ids_and_cut_ones_have_no_end(tiny, accelerator):
    """Each row's ids as the generator wrote them with that row's seed, alone, after its prompt."""
    student = tiny("llama")
    student.end_ids = list(range(5, 60))
    source = rollouts(student, accelerator, mix=1.0, seed=4, max_length=9)
    examples, about = source(7)
    prompts = common.global_batch(source.prompts, source.args, 7)
    lengths, cut = [], []
    for row, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        seed = common.row_seed(4, "rollout", 7, row)
        [(_, alone)] = common.generate(
            student, [prompt.student], [seed], max_new_tokens=8, temperature=1.0
        )
        ids, targets = example.student
        assert ids == (prompt.student + alone.ids)[:9] and example.teacher == example.student
        assert [ids[i] for i in targets] == alone.ids[: 9 - len(prompt.student)]
        assert example.where == prompt.conversation.where
        lengths.append(len(alone.ids))
        cut.append(not alone.finished)
        if cut[-1]:
            assert not set(alone.ids) & set(student.end_ids)
    assert about["rollout/response_tokens"] == pytest.approx(sum(lengths) / 6)
    assert about["rollout/cut_off"] == pytest.approx(sum(cut) / 6) and 0 < sum(cut) < 6
    again, _ = rollouts(student, accelerator, mix=1.0, seed=4, max_length=9)(7)
    assert again == examples
    other, _ = rollouts(student, accelerator, mix=1.0, seed=5, max_length=9)(7)
    assert other != examples


def test_rollouts_in_bulk_are_those_of_single_steps(tiny, accelerator, monkeypatch):
    """The next n on-policy steps in one call; by an unchanged student the same text; staleness."""
    student, calls = tiny("llama"), []
    generate = common.generate

    def counting(model, prompts, *rest, **settings):
        calls.append(len(prompts))
        return generate(model, prompts, *rest, **settings)

    monkeypatch.setattr(common, "generate", counting)
    single, bulk = (rollouts(student, accelerator, rollout_steps=n) for n in (1, 4))
    due = [s for s in range(30) if single.args.on_policy(s)]
    expected = [single(s)[0] for s in due]
    assert calls == [6] * len(due)
    calls.clear()
    found = [bulk(s) for s in due]
    assert [examples for examples, _ in found] == expected
    groups = [due[i : i + 4] for i in range(0, len(due), 4)]
    assert calls == [6 * len(g) for g in groups] and not bulk.waiting
    stale = [about["rollout/staleness"] for _, about in found]
    assert stale == [s - g[0] for g in groups for s in g] and max(stale) > 0


def test_what_waits_is_saved_and_loaded(tiny, accelerator, tmp_path):
    source = rollouts(tiny("llama"), accelerator, rollout_steps=3)
    due = [s for s in range(30) if source.args.on_policy(s)]
    source(due[0])
    source.save(str(tmp_path))
    other = rollouts(tiny("llama", seed=9), accelerator, rollout_steps=3)
    other.load(str(tmp_path))
    assert list(other.waiting) == due[1:3] and other.waiting == source.waiting
    assert [other(s) for s in due[1:3]] == [source(s) for s in due[1:3]]
    other.save(str(tmp_path))
    source.load(str(tmp_path))
    assert source.waiting == {}


def test_evaluation_on_own_text(tiny, accelerator, tmp_path):
    """kl_on_own_text: sampled rows, one by one, through the models' own logits in float64."""
    student, teacher = tiny("llama", seed=1), tiny("qwen2", seed=2)
    student.end_ids = list(range(5, 60))
    args = Arguments(max_new_tokens=8, cache_dir=str(tmp_path), seed=3)
    prompts = prompts_of(12)
    evaluator = on_policy.Evaluator(prompts, student, teacher, args, accelerator)
    student.model.train()
    found = common.scores(evaluator(student))
    assert student.model.training
    kl = tokens = 0.0
    for i, prompt in enumerate(prompts):
        seed = common.row_seed(3, "own text", i)
        [(_, response)] = common.generate(
            student, [prompt.student], [seed], max_new_tokens=8, temperature=1.0
        )
        ids, start = torch.tensor([prompt.student + response.ids]), len(prompt.student) - 1
        with torch.no_grad():
            ours, theirs = (
                m.model(input_ids=ids).logits[0, start:-1].double().log_softmax(-1)
                for m in (student, teacher)
            )
        kl += (theirs.exp() * (theirs - ours)).sum().item()
        tokens += len(response.ids)
    assert found["kl_on_own_text"] == pytest.approx(kl / tokens, rel=1e-4)
    ratio = found["kl_on_own_text"] / found["kl_to_teacher"]
    assert found["exposure_bias"] == pytest.approx(ratio)


def test_health(tiny):
    """Each warning once while its cause lasts, and again when it comes back."""
    health = on_policy.Health(tiny("llama"), 7.0, Arguments(eval_steps=10))

    def after(step: int, *notes: tuple[float, float, float]) -> list[str]:
        for length, own, teachers in notes:
            mean = health.note(length, *torch.tensor([own * 4, teachers * 4, 4.0]))
            assert mean["rollout/entropy"] == pytest.approx(own)
        return list(health.warnings(step))

    assert after(9) == []
    assert after(9, (8, 0.5, 0.4), (19, 0.5, 0.4)) == []  # 13.5 tokens on the mean
    (said,) = after(19, (8, 0.5, 0.4), (22, 0.5, 0.4))
    assert "step 20" in said and "15 tokens" in said and "--mix" in said
    assert after(29, (30, 0.5, 0.4)) == []
    (said,) = after(39, (30, 0.05, 0.4))
    assert "0.050 nats" in said and "0.400" in said
    assert after(49, (8, 0.5, 0.4)) == []
    assert len(after(59, (30, 0.01, 0.4))) == 2
    assert math.isfinite(health.note(0.0, *torch.zeros(3))["rollout/entropy"])

    example = common.Example(*[common.with_response([5, 6], [7, 1])] * 2, "here")
    shown = [s for s in range(25) if list(health.samples(s, [example] * 3))]
    assert shown == [0, 10, 20]


def test_flags_that_contradict_each_other():
    for wrong, match in (
        ({"mix": 1.5}, "--mix is a share"),
        ({"rollout_steps": 0}, "--rollout-steps"),
        ({"mix": 1.0, "ce_weight": 0.5}, "--ce-weight"),
        ({"mix": 0.0, "rollout_temperature": 0.5}, "--rollout-temperature is for"),
        ({"estimator": "sampled", "kl": "forward"}, "--kl must be reverse"),
        ({"estimator": "sampled", "skew": 0.1}, "--skew must be 0"),
        ({"estimator": "sampled", "temperature": 2.0}, "--temperature must be 1"),
        ({"estimator": "sampled", "rollout_temperature": 0.0}, "--rollout-temperature must be 1"),
        ({"estimator": "sampled", "rollout_steps": 2}, "--rollout-steps must be 1"),
        ({"jsd_beta": 1.0}, "--jsd-beta"),
    ):
        with pytest.raises(UsageError, match=match):
            Arguments(**wrong).objective()
    assert Arguments(mix=1.0, mix_warmup_steps=5, ce_weight=0.5).objective().kl == "reverse"
    assert Arguments(estimator="sampled", rollout_steps=1).objective()


# ----------------------------------------------------------------------- processes and resuming

# on_policy.py, which is killed where the environment says so, after the text of a step was
# sampled and before anything was learned from it, and which leaves the ids of its steps.
SCRIPT = f"""
import json, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import common, on_policy

call = on_policy.Rollouts.__call__

def watched(self, step):
    found = call(self, step)
    if self.accelerator.is_main_process:
        with open(os.environ["ROLLOUTS"], "a") as stream:
            ids = [e.student.ids for e in found[0]]
            print(json.dumps({{"step": step, "ids": ids, "left": len(self.waiting)}}), file=stream)
    if step == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return found

on_policy.Rollouts.__call__ = watched
common.launch(on_policy.main, on_policy.Arguments, "")
"""


def launch(place: Path, name: str, *flags: str, processes: int = 1, kill_at: int = -1) -> int:
    (place / "script.py").write_text(SCRIPT)
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    where = ["--teacher", "teacher", "--student", "student", "--cache-dir", "cache"]
    done = subprocess.run(
        [*command, "script.py", *WORDS, *where, "--output-dir", name, *flags],
        cwd=place, capture_output=True, text=True, timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
             "ROLLOUTS": f"{name}.rollouts", "KILL_AT": str(kill_at)},
    )  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def written(place: Path, name: str) -> dict[int, list]:
    lines = (place / f"{name}.rollouts").read_text().splitlines()
    return {row["step"]: row["ids"] for row in map(json.loads, lines)}


def test_killed_between_rollout_and_update(place: Path):
    """SIGKILL with text waiting for later steps: resumed, it ends as the run that was not."""
    args = Arguments(**SMALL, mix=0.7, rollout_steps=3)
    due = [s for s in range(8) if args.on_policy(s)]
    flags = ("--mix", "0.7", "--rollout-steps", "3")
    assert launch(place, "whole", *flags) == 0
    # Killed at the last step of a bulk, whose text waited, and at the first of the next.
    waited, fresh = due[2:4]
    assert waited >= 2
    assert launch(place, "cut", *flags, kill_at=waited) == -signal.SIGKILL
    kept = place / "cut" / "checkpoints" / f"step-{waited // 2 * 2:06}" / "rollouts.safetensors"
    assert len(load_file(kept)["rows"]) >= 8  # the text of a step at least
    assert launch(place, "cut", *flags, "--resume", kill_at=fresh) == -signal.SIGKILL
    assert launch(place, "cut", *flags, "--resume") == 0
    assert_same_end(place / "cut", place / "whole")
    assert metrics(place / "cut") == metrics(place / "whole")
    assert written(place, "cut") == written(place, "whole")


def test_two_processes_write_and_learn_as_one(place: Path):
    """Of 7 rows one process writes 4, the other 3: the same ids at step 1, losses to 1e-3."""
    flags = ("--mix", "1", "--batch-size", "7", "--rollout-steps", "2", "--save-steps", "0")
    assert launch(place, "one", *flags) == 0
    assert launch(place, "two", *flags, processes=2) == 0
    assert written(place, "two")[0] == written(place, "one")[0]
    one, two = (
        [m["train/loss"] for m in metrics(place / n) if "train/loss" in m] for n in ("one", "two")
    )
    assert len(one) == 8 and two == pytest.approx(one, rel=1e-3)
    for key in ("rollout/entropy", "rollout/response_tokens", "eval/kl_on_own_text"):
        values = [[m[key] for m in metrics(place / n) if key in m] for n in ("one", "two")]
        assert values[1] == pytest.approx(values[0], rel=1e-3) and values[0]
