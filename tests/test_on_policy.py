"""on_policy.py: the coin, the student's own text, what is learned from it, and resuming."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import (
    ROOT,
    example_of,
    generate,
    run_in_process,
    run_script,
    tiny_model,
    with_response,
)
from forked import run_forked
from safetensors.torch import load_file
from torch import nn

import common
import on_policy
import token_level
from common import Conversation, Head, Logits, Objective, Pair, Prompt, UsageError
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
    """Run `main` of a script on the tiny pair in this process; its lines of metrics."""
    models = {"teacher": str(place / "teacher"), "student": str(place / "student")}
    directories = {"output_dir": str(place / name), "cache_dir": str(place / "cache")}
    run_in_process(module, **{**SMALL, **models, **directories, **changes})
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
        assert its.items() <= mine.items()  # the rest are numbers of the student's own text
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
        scores = results[moment]
        ratio = scores["kl_on_own_text"] / scores["kl_to_teacher"]
        assert scores["exposure_bias"] == pytest.approx(ratio)
        line = next(m for m in lines if m["step"] == step and "eval/exposure_bias" in m)
        assert line["eval/kl_on_own_text"] == scores["kl_on_own_text"]


def test_learns_on_the_embedded_pair(tmp_path: Path, shared_cache: Path):
    """As a user runs it: 24 steps, half of them on its own text, lower the KL on that text."""
    flags = ["--max-rows", "512", "--max-steps", "24", "--eval-size", "80", "--eval-steps", "20"]
    flags += ["--learning-rate", "1e-3", "--warmup-steps", "8", "--lmbda", "0.5"]
    flags += ["--output-dir", "run", "--save-steps", "0", "--cache-dir", str(shared_cache)]
    done = run_script("on_policy.py", *flags, cwd=tmp_path)
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
    assert "the student is weak (kl_to_teacher 0." in done.stdout


# ------------------------------------------------------------------------------------ the loss


class Fixed(nn.Module):
    """A student whose hidden state is a parameter, the same at each target."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        hidden, weight = (torch.randn(n, width, generator=draw) for n in (1, size))
        self.model = SimpleNamespace()
        self.hidden, self.weight = nn.Parameter(hidden.double()), nn.Parameter(weight.double())

    def logits(self, batch: common.Batch) -> Logits:
        return Logits(self.hidden.expand(len(batch.targets), -1), Head(self.weight))


def test_sampled_estimator_has_the_exact_expected_gradient():
    """Over every token of a vocabulary of 11, weighted by the student's own probabilities.

    Float64, to 1e-12 of the norm; one token alone is far from it, so that this says something.
    The expected value of the loss that is logged is the divergence itself.
    """
    student = Fixed(11, 5)
    draw = torch.Generator().manual_seed(1)
    teacher = Head(torch.randn(11, 7, generator=draw).double(), None)
    teacher_hidden = torch.randn(1, 7, generator=draw).double()

    def gradient(estimator: str, target: int) -> tuple[torch.Tensor, torch.Tensor]:
        objective = Objective(kl="reverse")
        loss = on_policy.OnPolicyLoss(student, teacher, objective, estimator)  # type: ignore
        targets = torch.tensor([target])
        empty = torch.zeros(1, 1, dtype=torch.long)
        value, sums = loss(common.Batch(empty, empty[0], empty[0], targets), teacher_hidden, True)
        gradients = torch.autograd.grad(value, (student.hidden, student.weight))
        assert value == sums[0] == sums[1]
        return torch.cat([g.flatten() for g in gradients]), sums[1]

    logprobs = (student.hidden @ student.weight.t()).log_softmax(-1)[0].detach()
    theirs = (teacher_hidden @ teacher.weight.t()).log_softmax(-1)[0]
    exact, kl = gradient("exact", 0)
    assert kl.item() == pytest.approx((logprobs.exp() * (logprobs - theirs)).sum().item())
    each = [gradient("sampled", y) for y in range(11)]
    expected = sum(p * g for p, (g, _) in zip(logprobs.exp(), each, strict=True))
    assert (expected - exact).norm() < 1e-12 * exact.norm()
    assert min((g - exact).norm() for g, _ in each) > 0.1 * exact.norm()
    value = sum(p * v for p, (_, v) in zip(logprobs.exp(), each, strict=True))
    assert value.item() == pytest.approx(kl.item())
    assert [v.item() for _, v in each] == pytest.approx((logprobs - theirs).tolist())
    # Sampled tokens, as in training: within five standard errors of the mean of 20 000.
    tokens = torch.multinomial(logprobs.exp(), 20_000, replacement=True, generator=draw)
    drawn = torch.stack([each[y][0] for y in tokens.tolist()])
    error = drawn.std(0) / math.sqrt(len(drawn))
    assert ((drawn.mean(0) - exact).abs() <= 5 * error + 1e-12).all()


def test_sampled_loss_against_autograd(monkeypatch):
    """Its gradient over several chunks, with bias and softcap, is that of the policy gradient."""
    chunks = [slice(i, i + 5) for i in range(0, 17, 5)]
    monkeypatch.setattr(Logits, "chunks", lambda _: chunks)
    draw = torch.Generator().manual_seed(2)
    n, size, cap = 17, 23, 3.0
    hidden, weight, bias, theirs, other, their_bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64)
        for shape in ((n, 6), (size, 6), (size,), (n, 4), (size, 4), (size,))
    )
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    targets = torch.randint(size, (n,), generator=draw)
    student = Logits(hidden, Head(weight, bias, softcap=cap))
    teacher = Logits(theirs, Head(other, their_bias, softcap=cap))
    loss, sums = on_policy.sampled_loss(student, targets, teacher)
    ours, wanted = (
        (cap * torch.tanh((h @ w.t() + b) / cap)).log_softmax(-1).gather(1, targets[:, None])
        for h, w, b in ((hidden, weight, bias), (theirs, other, their_bias))
    )
    assert sums.tolist() == pytest.approx([(ours - wanted).sum().item()] * 2)
    gradients = torch.autograd.grad(loss, leaves)
    expected = torch.autograd.grad(((ours - wanted).detach() * ours).sum(), leaves)
    for gradient, plain in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_nothing_written_is_a_connected_zero(estimator: str, tiny):
    """A micro-batch without target tokens gives zero gradients, not None and not NaN."""
    student, teacher = tiny("llama"), tiny("qwen2", seed=1)
    loss = on_policy.OnPolicyLoss(student, teacher.head(), Objective(kl="reverse"), estimator)
    empty = [with_response([7, 8, 9], []), with_response([4, 5], [])]
    for tokens in (empty, []):
        batch = common.collate(tokens, torch.device("cpu"))
        theirs = common.teacher_hidden_states(teacher, [*map(example_of, tokens)])
        value, sums = loss(batch, theirs, True)
        value.backward()
        assert value.item() == 0 and sums.tolist() == [0] * 5
        gradients = [p.grad for p in student.model.parameters()]
        assert all(g is not None and (g == 0).all() for g in gradients)
        student.model.zero_grad()


def test_cross_entropy_is_for_text_of_others(tiny):
    """On the student's own text --ce-weight has no effect: the loss is the divergence alone."""
    student, teacher = tiny("llama"), tiny("llama", seed=1)
    objective = Objective(kl="reverse", ce_weight=0.5)
    loss = on_policy.OnPolicyLoss(student, teacher.head(), objective, "exact")
    tokens = with_response([7, 8, 9], [10, 11, 1])
    batch = common.collate([tokens], torch.device("cpu"))
    theirs = common.teacher_hidden_states(teacher, [example_of(tokens)])
    own, sums = loss(batch, theirs, True)
    assert own.item() == sums[0].item() == pytest.approx(sums[1].item())
    text, sums = loss(batch, theirs, False)
    logprobs = student.model(batch.input_ids).logits[0].log_softmax(-1)
    ce = -sum(logprobs[i - 1, tokens.ids[i]].item() for i in tokens.targets)
    assert sums[1].item() == pytest.approx(own.item())
    assert text.item() == sums[0].item() == pytest.approx(own.item() + 0.5 * ce)
    assert ce > 1 and sums[2:].tolist() == [0, 0, 0]


def test_entropies_against_plain_ones(tiny, monkeypatch):
    """All tokens where they fit into a chunk; else at most a chunk of them, evenly spread."""
    student, teacher = tiny("llama"), tiny("gemma2", seed=1)
    hidden = [torch.randn(50, 32, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    plain = [
        torch.distributions.Categorical(logits=m.head().logits(h).double()).entropy()
        for m, h in zip((student, teacher), hidden, strict=True)
    ]
    inputs = Logits(hidden[0], student.head()), Logits(hidden[1], teacher.head())
    everything = on_policy.entropies(*inputs)
    assert everything.tolist() == pytest.approx([*(p.sum().item() for p in plain), 50], rel=1e-5)
    chunks = [slice(i, i + 20) for i in range(0, 50, 20)]
    monkeypatch.setattr(Logits, "chunks", lambda _: chunks)
    some = on_policy.entropies(*inputs)
    assert some.tolist() == pytest.approx([*(p[::3].sum().item() for p in plain), 17], rel=1e-5)


# --------------------------------------------------------------------------------- own text


def rollouts(student, accelerator, steps: int = 30, **flags) -> on_policy.Rollouts:
    args = Arguments(batch_size=6, max_new_tokens=8, **{"mix": 0.5, **flags})
    run = SimpleNamespace(args=args, accelerator=accelerator, steps=steps)
    return on_policy.Rollouts(Pair(student, student), prompts_of(20), run)


def test_rollouts_are_ids_and_cut_ones_have_no_end(tiny, accelerator):
    """Each row's ids as the generator wrote them with that row's seed, alone, after its prompt."""
    student = tiny("llama", dtype=torch.float64)  # so that no batch changes text by rounding
    student.end_ids = list(range(5, 60))
    source = rollouts(student, accelerator, mix=1.0, seed=4, max_length=9)
    examples, numbers = source(7)
    prompts = common.global_batch(source.prompts, source.args, 7)
    lengths, cut = [], []
    for row, (example, prompt) in enumerate(zip(examples, prompts, strict=True)):
        seed = common.row_seed(4, "rollout", 7, row)
        [(_, alone)] = generate(
            student, [prompt.student], [seed], max_new_tokens=8, temperature=1.0
        )
        ids, targets = example.student
        assert ids == (prompt.student + alone.ids)[:9] and example.teacher == example.student
        assert [ids[i] for i in targets] == alone.ids[: 9 - len(prompt.student)]
        assert example.prompt == prompt and example.index == row
        lengths.append(len(alone.ids))
        cut.append(not alone.finished)
        if cut[-1]:
            assert not set(alone.ids) & set(student.end_ids)
    assert numbers["rollout/response_tokens"] == pytest.approx(sum(lengths) / 6)
    assert numbers["rollout/cut_off"] == pytest.approx(sum(cut) / 6) and 0 < sum(cut) < 6
    again, _ = rollouts(student, accelerator, mix=1.0, seed=4, max_length=9)(7)
    assert again == examples
    other, _ = rollouts(student, accelerator, mix=1.0, seed=5, max_length=9)(7)
    assert other != examples


def test_rollouts_in_bulk_are_those_of_single_steps(tiny, accelerator, monkeypatch):
    """The next n on-policy steps in one call; by an unchanged student the same text; staleness."""
    student, calls = tiny("llama", dtype=torch.float64), []
    write = common.generate

    def counting(model, prompts, *rest):
        calls.append(len(prompts))
        return write(model, prompts, *rest)

    monkeypatch.setattr(common, "generate", counting)
    single, bulk = (rollouts(student, accelerator, rollout_steps=n) for n in (1, 4))
    due = [s for s in range(30) if single.args.on_policy(s)]
    expected = [single(s)[0] for s in due]
    assert calls == [6] * len(due)
    calls.clear()
    sampled = [bulk(s) for s in due]
    assert [examples for examples, _ in sampled] == expected
    groups = [due[i : i + 4] for i in range(0, len(due), 4)]
    assert calls == [6 * len(g) for g in groups] and [*bulk.waiting] == due[-1:]
    stale = [numbers["rollout/staleness"] for _, numbers in sampled]
    assert stale == [s - g[0] for g in groups for s in g] and max(stale) > 0


def test_text_that_waits_is_saved_and_loaded(tiny, accelerator, tmp_path):
    source = rollouts(tiny("llama"), accelerator, rollout_steps=3)
    due = [s for s in range(30) if source.args.on_policy(s)]
    source(due[0])
    source.save(str(tmp_path))
    other = rollouts(tiny("llama", seed=9), accelerator, rollout_steps=3)
    other.load(str(tmp_path))
    assert list(other.waiting) == list(source.waiting) == due[:3]  # the first is in use
    for step in due[1:3]:
        (ours, numbers), (theirs, logged) = other(step), source(step)
        assert [e.student for e in ours] == [e.student for e in theirs] and numbers == logged
    other.save(str(tmp_path))
    source.load(str(tmp_path))
    assert list(source.waiting) == due[2:3]


def test_evaluation_on_own_text(tiny, tmp_path):
    """kl_on_own_text: sampled answers, one by one, through the models' own logits in float64."""
    student, teacher = (
        tiny(kind, seed, torch.float64) for kind, seed in (("llama", 1), ("qwen2", 2))
    )
    student.end_ids = list(range(5, 60))
    args = Arguments(max_new_tokens=8, cache_dir=str(tmp_path), seed=3)
    prompts = prompts_of(12)
    evaluator = on_policy.Evaluator(prompts, Pair(student, teacher), args)
    student.model.train()
    scores = common.scores(evaluator())
    assert student.model.training
    kl = tokens = 0.0
    for i, prompt in enumerate(prompts):
        seed = common.row_seed(3, "own text", i)
        [(_, response)] = generate(
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
    assert scores["kl_on_own_text"] == pytest.approx(kl / tokens, rel=1e-4)
    ratio = scores["kl_on_own_text"] / scores["kl_to_teacher"]
    assert scores["exposure_bias"] == pytest.approx(ratio)


def test_rollout_monitor(tiny):
    """Each warning once while its cause lasts, and again when it comes back."""
    monitor = on_policy.RolloutMonitor(tiny("llama"), 7.0, Arguments(eval_steps=10))

    def after(step: int, *notes: tuple[float, float, float]) -> list[str]:
        for length, own, teachers in notes:
            mean = monitor.note(length, torch.tensor([own * 4, teachers * 4, 4.0]))
            assert mean["rollout/entropy"] == pytest.approx(own)
        return list(monitor.warnings(step))

    assert after(9) == []
    assert after(9, (8, 0.5, 0.4), (19, 0.5, 0.4)) == []  # 13.5 tokens on the mean
    (line,) = after(19, (8, 0.5, 0.4), (22, 0.5, 0.4))
    assert "step 20" in line and "15 tokens" in line and "--mix" in line
    assert after(29, (30, 0.5, 0.4)) == []
    (line,) = after(39, (30, 0.05, 0.4))
    assert "0.050 nats" in line and "0.400" in line
    assert after(49, (8, 0.5, 0.4)) == []
    assert len(after(59, (30, 0.01, 0.4))) == 2
    assert math.isfinite(monitor.note(0.0, torch.zeros(3))["rollout/entropy"])

    examples = [example_of(with_response([5, 6], [7, i]), i) for i in (1, 8, 9)]
    shown = {s: lines for s in range(25) if (lines := list(monitor.samples(s, examples)))}
    assert list(shown) == [0, 10, 20]
    assert len(shown[0]) == 3 and "step 1," in shown[0][0]  # a title and two answers
    decode = monitor.student.tokenizer.decode
    assert shown[0][2] == f"  {decode([5, 6])!r}\n    {decode([7, 8])!r}"


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

# Runs on_policy.py and records the ids of each on-policy step. It is killed at the step KILL_AT,
# after that step's text was sampled and before anything was learned from it.
SCRIPT = f"""
import json, os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import common, on_policy

call = on_policy.Rollouts.__call__

def watched(self, step):
    result = call(self, step)
    if self.run.accelerator.is_main_process:
        with open(os.environ["ROLLOUTS"], "a") as stream:
            ids = [e.student.ids for e in result[0]]
            print(json.dumps({{"step": step, "ids": ids, "left": len(self.waiting)}}), file=stream)
    if step == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return result

on_policy.Rollouts.__call__ = watched
common.launch(on_policy.main, on_policy.Arguments, "")
"""


MIXED = ("--mix", "0.7", "--rollout-steps", "3", "--batch-size", "7")


def launch(place: Path, name: str, *flags: str, processes: int = 0, kill_at: int = -1) -> int:
    (place / "script.py").write_text(SCRIPT)
    models = ["--teacher", "teacher", "--student", "student", "--cache-dir", "cache"]
    done = run_forked(
        place / "script.py", *WORDS, *models, "--output-dir", name, *flags, cwd=place,
        processes=processes, ROLLOUTS=f"{name}.rollouts", KILL_AT=str(kill_at),
    )  # fmt: skip
    assert done.returncode in (0, -signal.SIGKILL), done.stderr[-3000:]
    return done.returncode


def written(place: Path, name: str) -> dict[int, list]:
    lines = (place / f"{name}.rollouts").read_text().splitlines()
    return {line["step"]: line["ids"] for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def whole(place: Path) -> Path:
    """A run that nothing interrupts: most steps on own text, sampled for three steps at a time."""
    assert launch(place, "whole", *MIXED) == 0
    return place / "whole"


def test_killed_between_rollout_and_update(place: Path, whole: Path):
    """SIGKILL with text waiting for later steps: resumed, it ends as the run that was not."""
    args = Arguments(**{**SMALL, "batch_size": 7}, mix=0.7, rollout_steps=3)
    due = [s for s in range(8) if args.on_policy(s)]
    # Killed at the last step of a bulk, whose text waited, and at the first of the next.
    waited, fresh = due[2:4]
    assert waited >= 2
    assert launch(place, "cut", *MIXED, kill_at=waited) == -signal.SIGKILL
    kept = place / "cut" / "checkpoints" / f"step-{waited // 2 * 2:06}" / "rollouts.safetensors"
    assert len(load_file(kept)["rows"]) >= 7  # the text of a step at least
    assert launch(place, "cut", *MIXED, "--resume", kill_at=fresh) == -signal.SIGKILL
    assert launch(place, "cut", *MIXED, "--resume") == 0
    assert_same_end(place / "cut", whole)
    assert metrics(place / "cut") == metrics(whole)
    assert written(place, "cut") == written(place, "whole")


def test_two_processes_write_and_learn_as_one(place: Path, whole: Path):
    """Of 7 rows one process writes 4, the other 3: the same ids at first, losses to 1e-3."""
    assert launch(place, "two", *MIXED, processes=2) == 0
    first = min(written(place, "whole"))
    assert written(place, "two")[first] == written(place, "whole")[first]
    for key in ("train/loss", "train/kl_on_own_text", "rollout/entropy",
                "rollout/response_tokens", "eval/kl_on_own_text"):  # fmt: skip
        one, two = ([m[key] for m in metrics(run) if key in m] for run in (whole, place / "two"))
        assert one and two == pytest.approx(one, rel=1e-3)
