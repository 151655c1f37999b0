"""A teacher on a vLLM server: a stub that answers from a tiny model, misbehaves, or is no vLLM."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer, llama, small_run, word_tokenizer, write, write_rows
from conftest import language_model, run_in_process, top_of, wait_for
from forked import ForkedScript
from test_divergences import plain_divergence, random_heads, small_chunks
from torch import Tensor

import common
import cross_tokenizer
import on_policy
import sequence_level
import token_level
from common import Completion, Logits, Objective, TopLogprobs, UsageError

pytest.importorskip("openai")

OBJECTIVES = [
    Objective("forward"), Objective("reverse"), Objective("jsd"), Objective("jsd", jsd_beta=0.1),
    Objective("forward", skew=0.1), Objective("reverse", skew=0.1),
    Objective("forward", ce_weight=0.7), Objective("reverse", ce_weight=1.3),
]  # fmt: skip


# ------------------------------------------------------------------------------------ the loss


def plain_top_loss(
    logits: Tensor, theirs: Tensor, targets: Tensor, objective: Objective, k: int
) -> tuple[Tensor, Tensor]:
    """From the definition, one position after the other: loss and divergence."""
    student, teacher, kl = logits.softmax(-1), theirs.softmax(-1), 0.0
    for ours, whole, target in zip(student, teacher, targets.tolist(), strict=True):
        named = sorted({target, *whole.topk(k).indices.tolist()})
        others = [i for i in range(len(whole)) if i not in named]
        p, q = (torch.cat([x[named], x[others].sum()[None]]) for x in (whole, ours))
        p, q = (x[: len(x) - (not others)] for x in (p, q))
        kl = kl + plain_divergence(q[None], p[None], objective)[0]
    nats = -logits.log_softmax(-1).gather(1, targets[:, None]).sum()
    return kl + objective.ce_weight * nats, kl


@pytest.mark.parametrize("k", [0, 1, 7, 52, 53])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("shape", [{}, {"bias": False, "scale": 2.0, "softcap": 4.0}], ids=str)
def test_loss_and_gradients_in_float64(k, objective, shape, monkeypatch):
    """Against automatic differentiation of the definition, over several chunks; with K = V it is
    the whole divergence."""
    small_chunks(monkeypatch, 8)
    hidden, head, theirs, teacher_head, targets = random_heads(**shape)
    leaves = [x for x in (hidden, head.weight, head.bias) if x is not None]
    student, teacher = Logits(hidden, head), Logits(theirs, teacher_head)
    loss, sums = common.distillation_loss(
        student, targets, objective, top_of(teacher[:], targets, k)
    )
    gradients = torch.autograd.grad(loss * 3.0, leaves)
    plain, kl = plain_top_loss(student[:], teacher[:], targets, objective, k)
    expected = torch.autograd.grad(plain, leaves)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-9)
    assert sums.tolist() == pytest.approx([loss.item(), kl.item()], rel=1e-9)
    for ours, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, 3.0 * wanted, rtol=1e-8, atol=1e-9)
    whole, _ = common.distillation_loss(student, targets, objective, teacher)
    if k == 53:
        assert loss.item() == pytest.approx(whole.item(), rel=1e-9)
    elif k < 52 and not objective.ce_weight:  # with 52 the rest is one token
        assert 0 <= loss.item() < whole.item()


@pytest.mark.parametrize("k", [0, 4, 40])
def test_packed_outcomes_are_a_distribution_that_bounds_the_divergence(k):
    """In half precision too: columns sum to 1, no divergence is negative, even near 0."""
    torch.manual_seed(2)
    logits, targets = 5 * torch.randn(400, 40), torch.randint(0, 40, (400,))
    top = top_of(logits, targets, k)
    rows = list(zip(top.ids.tolist(), top.logprobs.tolist(), strict=True))
    packed = TopLogprobs.packed(rows, k)
    assert packed.shape == (400, 3 * k + 4) and packed.dtype == torch.int16
    read = TopLogprobs.unpack(packed)
    assert read.ids.equal(top.ids)
    torch.testing.assert_close(read.logprobs.exp().sum(-1), torch.ones(400))
    torch.testing.assert_close(read.logprobs, top.logprobs, rtol=2e-3, atol=2e-3)
    for objective in OBJECTIVES[:6]:
        near = (logits + 1e-3 * torch.randn_like(logits)).log_softmax(-1)
        ours, theirs, _ = common.outcomes(near, read.ids, read.logprobs)
        assert common.divergence(ours, theirs, objective)[0].min() > -1e-6


def test_a_student_that_is_sure_has_a_rest():
    """1 - the sum of the named tokens would be 0 in float32, and the rest infinitely unlikely."""
    logits = torch.tensor([[40.0, 39.0, 0.0, 1.0]])
    top = TopLogprobs(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.4, 0.1]]).log())
    ours, _, _ = common.outcomes(logits.log_softmax(-1), top.ids, top.logprobs)
    expected = logits.double().softmax(-1)[0, 2:].sum().log()
    assert ours[0, -1].item() == pytest.approx(expected.item(), rel=1e-6)


# ------------------------------------------------------------------------------------- the stub


class Stub(ThreadingHTTPServer):
    """/v1/completions and /v1/models from a tiny model.

    `trouble(body, n, reply)` may change a reply, or return (status, bytes) in its place; n is how
    often these prompts were asked before. `asked` counts each prompt whose log-probabilities were
    sent, and `bodies` holds all requests but those of proofs.
    """

    daemon_threads = True

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.model, self.tokenizer = model, tokenizer
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.trouble: Callable[[dict, int, Any], Any] = lambda body, n, reply: reply
        self.models = [{"id": "served", "max_model_len": 1024}]
        self.asked, self.seen, self.lock = Counter(), Counter(), threading.Lock()
        self.bodies: list[dict[str, Any]] = []
        self.probes: set[tuple[int, ...]] = set()  # what the proof asks for

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed here."""

    @torch.no_grad()
    def logprobs(self, ids: list[int]) -> Tensor:
        return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def choice(self, index: int, prompt: Any, body: dict[str, Any]) -> dict[str, Any]:
        ids = prompt
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        choice = {"index": index, "text": "", "prompt_token_ids": ids, "prompt_logprobs": None}
        written: list[int] = []
        generator = torch.Generator().manual_seed(body.get("seed", 0) % 2**31)
        while len(written) < body["max_tokens"]:
            row = self.logprobs([*ids, *written])[-1]
            drawn = torch.multinomial(row.exp(), 1, generator=generator).item()
            written.append(drawn if body.get("temperature") else row.argmax().item())
            if written[-1] in body.get("stop_token_ids", []):
                break
        ended = written[-1] in body.get("stop_token_ids", [])
        choice |= {"token_ids": written, "finish_reason": "stop" if ended else "length"}
        if (k := body.get("prompt_logprobs")) is not None:
            choice["prompt_logprobs"] = [None]
            for row, target in zip(self.logprobs(ids), ids[1:], strict=False):
                named = {*row.topk(min(k, len(row))).indices.tolist(), target}
                entry = {str(i): {"logprob": row[i].item(), "rank": 1} for i in named}
                choice["prompt_logprobs"].append(entry)
        return choice


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Stub

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def do_GET(self) -> None:
        self.send(200, json.dumps({"data": self.server.models}).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        stub, prompts = self.server, body.get("prompt", [])
        prompts = prompts if prompts and isinstance(prompts[0], str | list) else [prompts]
        proof = "add_special_tokens" in body and isinstance(prompts[0], str)
        key = json.dumps([prompts, body.get("temperature"), body.get("prompt_logprobs")])
        with stub.lock:
            before = stub.seen[key]
            stub.seen[key] += 1
            if not proof:
                stub.bodies.append(body)
        with stub.lock:
            reply = {"choices": [stub.choice(i, p, body) for i, p in enumerate(prompts)]}
        reply = stub.trouble(body, before, reply)
        if len(prompts) > 1024:  # as vLLM
            reply = 400, b'{"error": {"message": "prompt list length exceeds 1024"}}'
        if isinstance(reply, tuple):
            return self.send(*reply)
        self.send(200, json.dumps(reply).encode())
        with stub.lock:
            if proof:
                stub.probes |= {tuple(c["prompt_token_ids"]) for c in reply["choices"]}
            elif body.get("prompt_logprobs") is not None:
                stub.asked.update(set(map(tuple, prompts)) - stub.probes)

    def send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def started(model: Any, tokenizer: Any) -> Stub:
    server = Stub(model, tokenizer)
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    return server


@pytest.fixture
def serve(monkeypatch) -> Iterator[Callable[..., Stub]]:
    servers = []
    monkeypatch.setattr(common, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(common, "LAST_PAUSE", 0.05)

    def start(model: Any, tokenizer: Any) -> Stub:
        servers.append(started(model, tokenizer))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


ROWS = [{"prompt": f"{i} " * (i + 1), "response": "yes " * (8 - i)} for i in range(8)]


@pytest.fixture
def pair(serve, tmp_path) -> tuple[Stub, dict[str, Any], dict[str, Any]]:
    """A stub, and flags of a run with its model as a teacher that is loaded, or on the server."""
    tokenizer = byte_tokenizer()
    model = llama(tokenizer, 1)
    teacher = write(tmp_path / "teacher", model, tokenizer)
    student = write(tmp_path / "student", llama(tokenizer, 2), tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl", ROWS)
    local = small_run(tmp_path, teacher, student, rows) | {"max_length": 200, "max_steps": 2}
    stub = serve(model.eval(), tokenizer)
    served = {k: v for k, v in local.items() if k != "teacher"}
    served |= {"api_base_url": stub.url, "api_model": "served"}
    return stub, local, served


def steps_of(run: str | Path) -> list[dict[str, float]]:
    lines = [json.loads(x) for x in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def results_of(run: str | Path) -> dict[str, Any]:
    return json.loads((Path(run) / "results.json").read_text())


def teacher_on(stub: Stub, tmp_path: Path, **flags: Any) -> tuple[common.ServerTeacher, Any]:
    tokenizer = flags.pop("tokenizer", stub.tokenizer)
    student = language_model(llama(tokenizer, 2), tokenizer, "student")
    args = token_level.Arguments(
        api_base_url=stub.url, api_model="served", cache_dir=str(tmp_path / "cache"), **flags
    )
    return common.ServerTeacher(args, student), args


@pytest.mark.parametrize(
    "broken",
    [
        lambda reply: {"choices": reply["choices"][:1]},
        lambda reply: {"choices": [c | {"prompt_logprobs": [None]} for c in reply["choices"]]},
        lambda reply: {"choices": [c | {"prompt_logprobs": [None] * 9} for c in reply["choices"]]},
    ],
    ids=["few choices", "short", "nulls"],
)
def test_a_server_that_greets_oddly_is_refused(broken, pair, tmp_path):
    stub, _, served = pair
    stub.trouble = lambda body, before, reply: broken(reply)
    with pytest.raises(UsageError, match="is no server for this method"):
        run_in_process(token_level, **served)
    stub.trouble = lambda body, before, reply: reply
    stub.models = [{"id": "served", "max_model_len": "4096"}]
    with pytest.raises(UsageError, match="is no server for this method"):
        run_in_process(token_level, **served)


def test_text_is_found_by_end_tokens_too(pair, tmp_path):
    """Another set of them ends other answers; log-probabilities do not depend on them."""
    stub, *_ = pair
    teacher, _ = teacher_on(stub, tmp_path)
    reader = teacher.reader
    reader.end_ids = [*reader.end_ids, 40]
    other = common.ServerTeacher(teacher.args, reader)
    assert teacher.identity != other.identity and teacher.states_dir == other.states_dir


def read_one(teacher: common.ServerTeacher, k: int = 8) -> TopLogprobs:
    text = common.Tokens([*range(40, 60)], [5, 9, 19])
    parts: list[Tensor] = []
    teacher.read([text], k, lambda places, got: parts.extend(got))
    return TopLogprobs.unpack(torch.cat(parts))


# ----------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize("flags", [{}, {"kl": "reverse", "ce_weight": 0.3}, {"kl": "jsd"}], ids=str)
def test_all_of_the_vocabulary_is_the_loaded_teacher(flags, pair, tmp_path):
    """K = V: losses, gradients and scores are those with the teacher's weights."""
    _, local, served = pair
    run_in_process(token_level, **local, **flags)
    served |= {"output_dir": str(tmp_path / "served"), "api_top_logprobs": 262}
    run_in_process(token_level, **served, **flags)
    for ours, theirs in zip(steps_of(tmp_path / "served"), steps_of(tmp_path / "run"), strict=True):
        for name in ("train/loss", "train/kl", "optim/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name
    ours, theirs = results_of(tmp_path / "served"), results_of(tmp_path / "run")
    assert ours["after"].keys() == theirs["after"].keys()
    assert ours["teacher"]["kl_to_teacher"] == 0 and ours["teacher"]["top1_agreement"] == 1


@pytest.mark.parametrize("completions", ["dataset", "teacher"])
def test_two_tokenizers(completions, pair, tmp_path):
    """The server reads its own tokens, those of --teacher, of which no weights are read; with K = V
    losses, gradients and scores are those with its weights."""
    stub, local, served = pair
    flags = {"student": str(common.DATA / "student_other_tokenizer"), "completions": completions}
    run_in_process(cross_tokenizer, **local | flags)
    flags |= {"output_dir": str(tmp_path / "served"), "teacher": local["teacher"]}
    (Path(local["teacher"]) / "model.safetensors").unlink()
    run_in_process(cross_tokenizer, **served | flags, api_top_logprobs=262)
    runs = tmp_path / "served", tmp_path / "run"
    if completions == "dataset":  # else the two write other samples
        for ours, theirs in zip(*map(steps_of, runs), strict=True):
            for name in ("train/loss", "train/kl", "optim/grad_norm"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-4), name
    ours, theirs = map(results_of, runs)
    assert ours["after"].keys() == theirs["after"].keys() and "nats_per_token" in ours["teacher"]
    assert ours["alignment"]["vocabulary_overlap"] == theirs["alignment"]["vocabulary_overlap"]
    read = {i for prompt in stub.asked for i in prompt}
    assert stub.asked and max(read) < 262


def test_scores_of_a_server_are_those_of_weights():
    """With K = V equal, with fewer a lower bound; the teacher's own from what it said."""
    hidden, head, theirs, teacher_head, targets = random_heads(torch.float32)
    student, teacher = Logits(hidden.detach(), head), Logits(theirs, teacher_head)
    expected = common.compare(student, targets, teacher)
    for k in (53, 5):
        top = top_of(teacher[:], targets, k)
        got = common.compare(student, targets, top)
        assert got["agree"].equal(expected["agree"]) and 0 < got["agree"].sum() < 37
        assert got["logprob"].equal(expected["logprob"])
        if k == 53:
            torch.testing.assert_close(got["kl"], expected["kl"], rtol=1e-4, atol=1e-4)
        else:
            assert (got["kl"] <= expected["kl"] + 1e-5).all() and got["kl"].min() >= 0
    own = common.compare(top, targets, top)
    wanted = common.compare(teacher, targets, teacher)
    assert own["kl"].abs().max() == 0 and own["agree"].equal(torch.ones(37))
    torch.testing.assert_close(own["logprob"], wanted["logprob"])


def test_a_sweep_asks_the_server_nothing(pair, tmp_path):
    """Each text is asked for once, with its K, and the next runs need no server."""
    stub, _, served = pair
    run_in_process(token_level, **served, api_top_logprobs=16)
    assert set(stub.asked.values()) == {1} and len(stub.asked) == 8 + 2
    assert {b["prompt_logprobs"] for b in stub.bodies if "prompt_logprobs" in b} == {16}
    files = [*(tmp_path / "cache" / "logprobs").glob("*/states-*.safetensors")]
    tensors = [t for f in files for t in common.read_tensors(f).values()]
    assert {t.dtype for t in tensors} == {torch.int16} and {t.shape[1] for t in tensors} == {52}
    asked = len(stub.bodies)
    stub.server_close()
    for kl in ("reverse", "jsd"):
        served["output_dir"] = str(tmp_path / kl)
        run_in_process(token_level, **served, kl=kl, api_top_logprobs=16)
    assert len(stub.bodies) == asked
    losses = {steps_of(tmp_path / name)[0]["train/loss"] for name in ("run", "reverse", "jsd")}
    assert len(losses) == 3


def test_text_of_the_server_is_its_ids(pair, tmp_path):
    """The server's ids are trained on as they are: no text is tokenised again."""
    stub, _, served = pair
    served |= {"completions": "teacher", "max_new_tokens": 12}
    run_in_process(token_level, **served, api_top_logprobs=4)
    lines = [*(tmp_path / "cache" / "text").glob("*.jsonl")]
    lines = [json.loads(x) for f in lines for x in f.read_text().splitlines()]
    texts = [b for b in stub.bodies if "prompt_logprobs" not in b]
    assert len(lines) == len(texts) == 8 + 1 + 2 and all(line["ids"] for line in lines)
    assert all(b["top_k"] == 0 and b["repetition_penalty"] == 1 for b in texts)
    assert all(1 in b["stop_token_ids"] and b["max_tokens"] == 12 for b in texts)
    written = {tuple(line["ids"]) for line in lines}
    scored = {asked[-len(ids) :] for asked in stub.asked for ids in written}
    assert sum(ids in scored for ids in written) >= 8 + 2


@pytest.mark.parametrize("estimator", ["exact", "sampled"])
def test_on_policy_with_a_server_is_that_with_weights(estimator, pair, tmp_path):
    """The student's text is scored live, with --estimator sampled by one number a token."""
    stub, local, served = pair
    flags = {"mix": 1.0, "completions": "teacher", "estimator": estimator, "max_new_tokens": 12}
    run_in_process(on_policy, **local | flags)
    served |= flags | {"output_dir": str(tmp_path / "served"), "api_top_logprobs": 262}
    run_in_process(on_policy, **served)
    for ours, theirs in zip(steps_of(tmp_path / "served"), steps_of(tmp_path / "run"), strict=True):
        for name in ("train/loss", "train/kl", "optim/grad_norm", "rollout/entropy"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-3), name
    live = [b for b in stub.bodies if b.get("prompt_logprobs") == 0]
    assert bool(live) == (estimator == "sampled")
    assert "exposure_bias" in results_of(tmp_path / "served")["after"]


def test_no_cache_asks_in_every_step(pair):
    stub, _, served = pair
    run_in_process(token_level, **served, cache_teacher=False, api_top_logprobs=4)
    assert max(stub.asked.values()) == 2  # two steps of 6 of 8 rows


# -------------------------------------------------------------------------------- trouble


def damaged(change: Callable[[dict[str, Any]], Any]) -> Callable[[Any], Any]:
    """A reply whose last choice is changed."""

    def damage(reply: Any) -> Any:
        changed = change(reply["choices"][-1])
        return reply if changed is None else changed

    return damage


def set_logprob(value: Any) -> Callable[[dict[str, Any]], None]:
    def change(choice: dict[str, Any]) -> None:
        entry = choice["prompt_logprobs"][9]
        entry[next(iter(entry))]["logprob"] = value

    return change


def shift_ids(choice: dict[str, Any]) -> None:
    choice["prompt_logprobs"][9] = {
        str(int(i) + 1): entry for i, entry in choice["prompt_logprobs"][9].items()
    }


TROUBLES = {
    "short list": damaged(lambda c: c["prompt_logprobs"].pop()),
    "missing position": damaged(lambda c: c["prompt_logprobs"].pop(5)),
    "null": damaged(lambda c: c["prompt_logprobs"].__setitem__(9, None)),
    "no null first": damaged(lambda c: c["prompt_logprobs"].__setitem__(0, {})),
    "null list": damaged(lambda c: c.__setitem__("prompt_logprobs", None)),
    "few": damaged(lambda c: [c["prompt_logprobs"][9].popitem() for _ in range(3)] and None),
    "wrong ids": damaged(shift_ids),
    "words for ids": damaged(lambda c: c["prompt_logprobs"].__setitem__(9, {"a": {"logprob": 0}})),
    "NaN": damaged(set_logprob(math.nan)),
    "-inf": damaged(set_logprob(-math.inf)),
    "clamped -inf": damaged(set_logprob(-9999.0)),
    "above 0": damaged(set_logprob(0.5)),
    "null value": damaged(set_logprob(None)),
    "text": damaged(set_logprob("x")),
    "truncated": damaged(lambda c: c["prompt_token_ids"].pop(0) and None),
    "other ids": damaged(lambda c: c["prompt_token_ids"].reverse()),
    "no choice": lambda reply: {"choices": []},
    "no choices": lambda reply: {"id": "1"},
    "list": lambda reply: [],
    "500": lambda reply: (500, b"{}"),
    "503": lambda reply: (503, b"<html>"),
    "429": lambda reply: (429, b"{}"),
    "half a JSON": lambda reply: (200, json.dumps(reply).encode()[:-40]),
    "nothing": lambda reply: (200, b""),
}


@pytest.fixture(scope="module")
def proven(tmp_path_factory) -> Iterator[tuple[Stub, common.ServerTeacher, TopLogprobs]]:
    """A stub that has passed the proof, its teacher, and what it says of one text."""
    tokenizer = byte_tokenizer()
    stub = started(llama(tokenizer, 1).eval(), tokenizer)
    teacher, _ = teacher_on(stub, tmp_path_factory.mktemp("proven"), api_top_logprobs=8)
    yield stub, teacher, read_one(teacher)
    stub.shutdown()
    stub.server_close()


@pytest.mark.parametrize("name", TROUBLES)
@pytest.mark.usefixtures("serve")  # short pauses
def test_bad_replies_are_asked_again_and_never_used(name, proven, monkeypatch):
    """Once bad, the next reply counts; always bad, the run ends with one sentence."""
    stub, teacher, expected = proven
    bad: list[int] = []

    def trouble(body: dict[str, Any], n: int, reply: Any) -> Any:
        if len(bad) < limit:
            bad.append(1)
            return TROUBLES[name](reply)
        return reply

    stub.trouble, limit = trouble, 2
    got = read_one(teacher)
    assert len(bad) == 2 and got.ids.equal(expected.ids)
    assert got.logprobs.equal(expected.logprobs)
    limit = 10**6
    monkeypatch.setattr(common, "ATTEMPTS", 3)
    with pytest.raises(UsageError, match="gave no answer in 3 attempts, run the same command"):
        read_one(teacher)


@pytest.mark.usefixtures("serve")
def test_many_short_texts(proven):
    """More than a server takes in one request, each with one number of two bytes."""
    stub, teacher, _ = proven
    stub.trouble = lambda body, n, reply: reply
    texts = [common.Tokens([40 + i % 50, 41 + i % 40], [1]) for i in range(2500)]
    got: dict[int, Tensor] = {}
    teacher.read(texts, 0, lambda places, parts: got.update(zip(places, parts, strict=True)))
    assert sorted(got) == [*range(2500)]
    expected = stub.logprobs(texts[7].ids)[0, texts[7].ids[1]]
    assert TopLogprobs.unpack(got[7]).logprobs[0, 0] == pytest.approx(expected.item(), abs=2e-3)


BAD_TEXT = {
    "no ids": damaged(lambda c: c.__setitem__("token_ids", None)),
    "empty": damaged(lambda c: c.__setitem__("token_ids", [])),
    "foreign": damaged(lambda c: c["token_ids"].__setitem__(0, 100_000)),
    "words": damaged(lambda c: c.__setitem__("token_ids", ["a"])),
    "truncated": damaged(lambda c: c["prompt_token_ids"].pop(0) and None),
    "stopped": damaged(lambda c: c.__setitem__("finish_reason", "stop")),
    "aborted": damaged(lambda c: c.__setitem__("finish_reason", "abort")),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_is_no_answer(name, serve, tmp_path, monkeypatch, capsys):
    """It is left out by name, and others are kept."""
    monkeypatch.setattr(common, "ATTEMPTS", 2)
    tokenizer = byte_tokenizer()
    stub = serve(llama(tokenizer, 1).eval(), tokenizer)
    teacher, args = teacher_on(stub, tmp_path, max_new_tokens=3, api_top_logprobs=4)
    talks = [common.Conversation([], None, [], f"row {i}") for i in range(4)]
    prompts = [common.Prompt(t, [40 + i, 50], [40 + i, 50]) for i, t in enumerate(talks)]

    def trouble(body: dict[str, Any], n: int, reply: Any) -> Any:
        return BAD_TEXT[name](reply) if body["prompt"] == [42, 50] else reply

    stub.trouble = trouble
    answers = teacher.complete(prompts, args, temperature=0.0, purpose="test")
    assert [a.finished is None for a in answers] == [False, False, True, False]
    assert all(isinstance(a, Completion) and len(a.ids) <= 3 for a in answers if a.ids)
    assert "\n  row 2: " in capsys.readouterr().out
    assert teacher.lost == (name == "aborted")  # then it may have been started anew
    args.sampling_temperature = 0.0
    examples = common.make_examples(prompts, common.Pair(teacher.reader, teacher), args)
    learned = [[e.student.ids[i] for i in e.student.targets] for e in examples]
    assert learned == [answers[i].ids for i in (0, 1, 3)]
    stub.trouble = lambda body, n, reply: BAD_TEXT[name](reply) if "seed" in body else reply
    args.sampling_temperature = 1.0
    with pytest.raises(UsageError, match="no training prompt got an answer"):
        common.make_examples(prompts, common.Pair(teacher.reader, teacher), args)


def test_processed_log_probabilities_are_refused(serve, tmp_path):
    def colder(body: dict[str, Any], n: int, reply: Any) -> Any:
        for choice in reply["choices"] if body.get("temperature", 1) < 1 else ():
            for entry in choice["prompt_logprobs"][1:]:
                total = math.log(sum(math.exp(e["logprob"] / 0.1) for e in entry.values()))
                for value in entry.values():
                    value["logprob"] = value["logprob"] / 0.1 - total
        return reply

    assert_refused(serve, tmp_path, colder, "depend by .* on the sampling temp.*raw_logprobs")


def test_log_probabilities_of_the_batch_are_refused(serve, tmp_path):
    """A server whose padding leaks into the texts of a batch."""

    def leaking(body: dict[str, Any], n: int, reply: Any) -> Any:
        if len(reply["choices"]) > 1 and isinstance(body["prompt"][0], list):
            for entry in reply["choices"][0]["prompt_logprobs"][1:]:
                for value in entry.values():
                    value["logprob"] -= 1.0
        return reply

    assert_refused(serve, tmp_path, leaking, "depend by 0.44 on what else is in the batch")


def assert_refused(serve, tmp_path, trouble: Any, words: str, **flags: Any) -> Stub:
    tokenizer = byte_tokenizer()
    stub = serve(llama(tokenizer, 1).eval(), tokenizer)
    stub.trouble = trouble
    teacher, _ = teacher_on(stub, tmp_path, **flags)
    with pytest.raises(UsageError, match=words):
        read_one(teacher)
    assert len(stub.bodies) <= 6  # found out by the proof, before any text
    return stub


def capped(reply: Any, k: int) -> Any:
    for choice in reply["choices"]:
        for i, entry in enumerate(choice["prompt_logprobs"][1:], 1):
            choice["prompt_logprobs"][i] = dict([*entry.items()][:k])
    return reply


NO_VLLM = {
    "404": (lambda b, n, r: (404, b'{"detail": "Not Found"}'), "is no server for this.*vLLM"),
    "405": (lambda b, n, r: (405, b"{}"), "is no server for this method"),
    "422": (lambda b, n, r: (422, b'{"error": {"message": "prompt"}}'), "is no server for this"),
    "ignored": (lambda b, n, r: {"choices": [{"index": c["index"]} for c in r["choices"]]},
                "needs vLLM's /v1/completions"),
    "max": (lambda b, n, r: (400, b'{"error": {"message": "greater than max allowed: 20"}}'),
            "is no server .*greater than max allowed: 20"),
    "capped": (lambda b, n, r: capped(r, 5), "is no server .*vllm serve --max-logprobs 64"),
    "key": (lambda b, n, r: (401, b"{}"), "wants a key: set OPENAI_API_KEY"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_VLLM)
def test_a_server_that_cannot_do_it_is_refused_by_name(name, serve, tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    trouble, words = NO_VLLM[name]
    assert_refused(serve, tmp_path, trouble, rf"^http://127.0.0.1:\d+/v1 .*{words}|{words}")


def test_another_tokenizer_is_refused(serve, tmp_path):
    """Two merges more on the server: most texts are equal, some are not."""
    words = word_tokenizer(["Hello", "two"], "{{ messages }}")
    stub = serve(llama(words, 1).eval(), words)
    teacher, _ = teacher_on(stub, tmp_path, tokenizer=byte_tokenizer())
    with pytest.raises(UsageError, match=r"reads '.*' as .*, student as .*two vocabularies"):
        read_one(teacher)


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([{"id": "m"}, {"id": "n"}], "has no served, only m, n"),
        ([{"id": "served", "max_model_len": 639}], "reads 639 tokens.*--max-model-len 640"),
    ],
)
def test_name_and_context(models, words, serve, tmp_path):
    tokenizer = byte_tokenizer()
    stub = serve(llama(tokenizer, 1).eval(), tokenizer)
    stub.models = models
    with pytest.raises(UsageError, match=words):
        read_one(teacher_on(stub, tmp_path)[0])
    stub.models = [{"id": "served", "max_model_len": 640}]
    assert read_one(teacher_on(stub, tmp_path)[0]).ids.shape == (3, 9)


def test_what_the_rest_can_have():
    """1 - the sum where that is more than rounding, never more than V - K tokens can have."""
    tokenizer = byte_tokenizer()
    student = language_model(llama(tokenizer), tokenizer, "student")
    teacher = object.__new__(common.ServerTeacher)
    teacher.reader = student

    def rest(*probabilities: float, k: int) -> float:
        given = {str(i): {"logprob": math.log(p)} for i, p in enumerate(probabilities)}
        return math.exp(teacher._outcomes(given, 0, k)[1][-1])

    assert rest(0.5, 0.3, k=2) == pytest.approx(0.2)
    assert rest(0.5, k=0) == pytest.approx(0.5)
    assert rest(0.999, 1e-3 + 1e-7, k=2) == pytest.approx(1e-6)
    assert rest(1.0, 1e-12, k=2) == pytest.approx(260e-12)
    assert rest(1e-9, 0.6, 0.2, k=2) == pytest.approx(0.2)  # the target is not among the K


# ----------------------------------------------------------------------- kills, and refused flags


def test_killed_while_log_probabilities_are_fetched(pair, tmp_path):
    """What was written is not asked again: each kill loses --api-concurrency requests."""
    stub, _, served = pair
    rows = [{"prompt": f"{i}", "response": "yes " * (1 + i % 5)} for i in range(60)]
    served |= {"dataset": write_rows(tmp_path / "many.jsonl", rows), "api_concurrency": 2}
    served |= {"api_top_logprobs": 262, "max_length": 220, "max_new_tokens": 4}
    words = [w for name, v in served.items() for w in (f"--{name.replace('_', '-')}", str(v))]
    words += ["--resume"]
    permits, waiting = threading.Semaphore(0), []

    def trouble(body: dict[str, Any], n: int, reply: Any) -> Any:
        if isinstance(body["prompt"][0], list) and body["temperature"] == 1.0:
            waiting.append(1)
            permits.acquire()
        return reply

    stub.trouble = trouble
    start = lambda: ForkedScript("token_level.py", words, tmp_path, tmp_path / "out.txt")  # noqa: E731

    def files() -> list[Path]:
        return [*(tmp_path / "cache" / "logprobs").glob("*/states-*.safetensors")]

    for allowed in (3, 5):
        process, waiting[:] = start(), []
        permits.release(allowed)
        # Two requests of the proof, and one more for the evaluation's text.
        assert wait_for(process, lambda n=allowed: len(waiting) == n + 2)
        process.kill()
        process.wait()
        permits.release(2)  # for the requests of the killed process
        time.sleep(0.2)
    kept = {name for f in files() for name in common.read_tensors(f)}
    before = len(stub.bodies)
    permits.release(10_000)
    assert start().wait() == 0, (tmp_path / "out.txt").read_text()
    texts = {name for f in files() for name in common.read_tensors(f)}
    again = [tuple(p) for b in stub.bodies[before:] if "seed" not in b for p in b["prompt"]]
    again = [prompt for prompt in again if prompt not in stub.probes]
    assert len(texts) == 60 + 2 and 20 < len(kept) < 50
    assert len(again) == len(set(again)) == len(texts) - len(kept)


REFUSED = [
    (token_level, {"temperature": 2.0}, "--temperature must be 1 with --api-base-url"),
    (token_level, {"teacher_device_map": "auto"}, "--teacher-device-map is for a teacher that is"),
    (token_level, {"teacher": "x"}, "--teacher is for a teacher that is loaded here"),
    (on_policy, {"teacher_dtype": "bfloat16"}, "--teacher-dtype is for a teacher that is loaded"),
    (on_policy, {"temperature": 2.0}, "--temperature must be 1 with --api-base-url"),
    (token_level, {"api_model": None}, "needs --api-model"),
    (token_level, {"api_top_logprobs": 0}, "--api-top-logprobs must be a finite number, above 0"),
    (sequence_level, {"api_top_logprobs": 9}, "--api-top-logprobs is for methods that learn from"),
    (sequence_level, {"cache_teacher": False}, "--no-cache-teacher is for a teacher that"),
    (cross_tokenizer, {"loss": "uld"}, "needs --loss hybrid and --temperature 1"),
    (cross_tokenizer, {"temperature": 2.0}, "needs --loss hybrid and --temperature 1"),
    (cross_tokenizer, {"teacher_dtype": "bfloat16"}, "--teacher-dtype is for a teacher that is"),
]


@pytest.mark.parametrize(("script", "flags", "words"), REFUSED)
def test_refused_flags(script, flags, words):
    with pytest.raises(UsageError, match=words):
        args = script.Arguments(**{"api_base_url": "https://h/v1", "api_model": "m", **flags})
        common.check_arguments(args)
        if script is cross_tokenizer:
            args.objective(None)
        getattr(args, "check", getattr(args, "objective", None))()
