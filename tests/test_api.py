"""A teacher behind an API: the real client against servers that answer, misbehave and refuse."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import shutil
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_pair, write_rows
from conftest import run_script, wait_for
from forked import ForkedScript, run_forked
from test_sequence_level import (
    WORDS,
    assert_same_student,
    in_process,
    results,
    text_lines,
    whole_run,  # noqa: F401  (a fixture)
)

import common
import sequence_level
from common import Completion, Conversation, Prompt, UsageError

openai = pytest.importorskip("openai")

KEY = "sk-never-to-be-seen-0123456789"


def completion(text: str, reason: str | None = "stop", **message: Any) -> dict[str, Any]:
    """What an OpenAI-compatible server answers."""
    return {
        "id": "1", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{
            "index": 0, "finish_reason": reason,
            "message": {"role": "assistant", "content": text, **message},
        }],
        "usage": {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8},
    }  # fmt: skip


class Server(ThreadingHTTPServer):
    """Sends what `reply(body, n)` returns; n is how often these messages were asked before.

    A reply is a dictionary or list, sent as JSON; bytes for another body; (status, headers, body);
    or a function that does what it likes with the handler. `log` holds (time, body) of each
    request. A request without the key gets a 401. Greetings are answered, and logged apart, unless
    `reply` is for them too.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply: Callable[[dict[str, Any], int], Any], greetings: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.replies_to_greetings = reply, greetings
        self.log, self.greetings, self.lock = [], [], threading.Lock()
        self.busy = self.busiest = 0
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients are killed here."""

    def times(self, word: str) -> list[float]:
        return [at for at, body in self.log if body["messages"][-1]["content"] == word]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: Any) -> None:
        """Silence."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        greeting = body["messages"] == common.HELLO
        log = self.server.greetings if greeting else self.server.log
        with self.server.lock:
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
            before = sum(b["messages"] == body["messages"] for _, b in log)
            log.append((time.monotonic(), body))
        try:
            replies = not greeting or self.server.replies_to_greetings
            reply = self.server.reply(body, before) if replies else completion("Hello!")
        finally:
            with self.server.lock:
                self.server.busy -= 1
        if self.headers["Authorization"] != f"Bearer {KEY}" or self.path != "/v1/chat/completions":
            reply = (401, {}, json.dumps({"error": {"message": "no key"}}).encode())
        if callable(reply):
            return reply(self)
        if isinstance(reply, dict | list):
            reply = json.dumps(reply).encode()
        if isinstance(reply, bytes):
            reply = (200, {}, reply)
        status, headers, content = reply
        self.send(status, {"Content-Length": str(len(content)), **headers}, content)

    def send(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    servers = []

    def start(reply: Callable[[dict[str, Any], int], Any], greetings: bool = False) -> Server:
        servers.append(Server(reply, greetings))
        threading.Thread(target=servers[-1].serve_forever, args=[0.01], daemon=True).start()
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def ask(tmp_path, tiny, monkeypatch) -> Callable[..., list[Completion]]:
    """Answers of the model on a server to words; the client's own pauses are short."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(common, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(common, "LAST_PAUSE", 0.1)
    student = tiny("llama")

    def ask(server: Server, words: list[str], temperature: float = 0.0, **flags: Any):
        args = sequence_level.Arguments(
            api_base_url=server.url, api_model="m", cache_dir=str(tmp_path / "cache"),
            sampling_temperature=temperature, **flags,
        )  # fmt: skip
        common.check_arguments(args)
        args.check()
        talks = [Conversation([{"role": "user", "content": w}], None, [], w) for w in words]
        teacher = sequence_level.ApiTeacher(args, student)
        prompts = [Prompt(t, [5], [5]) for t in talks]
        sampling = {"temperature": temperature, "top_p": args.top_p}
        return teacher.complete(prompts, args, **sampling, purpose="test")

    return ask


def word_of(body: dict[str, Any]) -> str:
    return body["messages"][-1]["content"]


# ------------------------------------------------------------------------------- what is asked


def test_what_is_asked_and_what_is_kept(serve, ask, tmp_path):
    """Greedy: no seed, no nucleus. Sampled: a seed for each row and sample, the same every time."""
    server = serve(lambda body, n: completion(f"{word_of(body)} {body.get('seed')}"))
    greedy = ask(server, ["a", "b", "a"])
    assert greedy == [Completion(f"{w} None", True, 7, None) for w in "aba"]
    assert sorted((b for _, b in server.log), key=word_of) == [
        {"messages": [{"role": "user", "content": word}], "model": "m", "max_tokens": 128,
         "temperature": 0.0} for word in "ab"
    ]  # fmt: skip
    sampled = ask(server, ["a", "b", "a"], 0.7, top_p=0.9, max_new_tokens=9)
    bodies = [b for _, b in server.log[2:]]
    assert len({b["seed"] for b in bodies}) == 3 and all(b["seed"] < 2**31 for b in bodies)
    assert all((b["top_p"], b["temperature"], b["max_tokens"]) == (0.9, 0.7, 9) for b in bodies)
    assert sampled[0] != sampled[2]
    ask(server, ["a"], 0.7, top_p=0.9, max_new_tokens=9, seed=1)
    # Greetings come first, with each run's settings for training and evaluation.
    greeted = [(b["temperature"], b.get("top_p")) for _, b in server.greetings]
    assert greeted == [(0.0, None), (1.0, None)] + [(0.0, None), (0.7, 0.9), (1.0, None)] * 2
    assert server.log[-1][1]["seed"] not in {b["seed"] for b in bodies}
    asked = len(server.log)
    assert ask(server, ["a", "b", "a"], 0.7, top_p=0.9, max_new_tokens=9) == sampled
    assert ask(server, ["b", "a"]) == greedy[1::-1]
    assert len(server.log) == asked == 6 and len(server.greetings) == 8
    lines = text_lines(tmp_path / "cache")
    assert Counter(word_of(line) for line in lines) == {"a": 4, "b": 2}


def test_no_more_than_concurrency_at_a_time(serve, ask):
    def reply(body: dict[str, Any], _: int) -> dict[str, Any]:
        time.sleep(0.02)
        return completion(word_of(body))

    server = serve(reply)
    words = [str(i) for i in range(30)]
    assert [a.text for a in ask(server, words, api_concurrency=3)] == words
    assert server.busiest == 3


def test_forms_of_an_answer(serve, ask):
    """Cut, empty and reasoned answers, and one without a count of its tokens."""
    bare = completion("N AA1")
    del bare["usage"]
    replies = {
        "cut": completion("N AA1", "length"),
        "cut too": completion("N AA1", "MAX_TOKENS"),
        "empty": completion(None),
        "ended": completion("N", "eos_token"),
        "thinks": completion("\nN", reasoning_content="N or M?\n"),
        "thinks too": completion("N", reasoning="N or M?"),
        "bare": bare,
        "half": completion("N \ud83d"),
    }
    server = serve(lambda body, _: replies[word_of(body)])
    got = dict(zip(replies, ask(server, list(replies)), strict=True))
    assert got["cut"] == Completion("N AA1", False, 7, None)
    assert got["cut too"] == got["cut"]
    assert got["empty"] == Completion("", True, 7, None)
    assert got["ended"] == Completion("N", True, 7, None)
    assert got["thinks"].text == got["thinks too"].text == "<think>\nN or M?\n</think>\n\nN"
    assert got["bare"].length > 0 and got["bare"].length != 7
    assert got["half"].text == "N ?"


# ------------------------------------------------------------------------- what is asked again


def drop(handler: Handler) -> None:
    handler.connection.close()
    handler.close_connection = True


def reset(handler: Handler) -> None:
    linger = struct.pack("ii", 1, 0)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    os.close(handler.connection.detach())
    handler.close_connection = True


def cut_body(handler: Handler) -> None:
    """A body that ends before its length says."""
    content = json.dumps(completion("never")).encode()
    handler.send(200, {"Content-Length": str(len(content))}, content[:50])
    drop(handler)


def half_json(handler: Handler) -> None:
    content = json.dumps(completion("never")).encode()[:50]
    handler.send(200, {"Content-Length": str(len(content))}, content)


def page(handler: Handler) -> None:
    handler.send(200, {"Content-Type": "text/html", "Content-Length": "13"}, b"<html></html>")


def slow(handler: Handler) -> None:
    """Blank lines that keep the connection alive, and never an answer."""
    handler.send(200, {"Transfer-Encoding": "chunked"}, b"")
    with contextlib.suppress(OSError):
        for _ in range(60):
            handler.wfile.write(b"1\r\n\n\r\n")
            time.sleep(0.05)
    drop(handler)


def status(code: int, message: str = "no", **headers: str) -> tuple[int, dict[str, str], bytes]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return code, named, json.dumps({"error": {"message": message}}).encode()


PASSES = {
    "timeout": status(408), "conflict": status(409), "too many": status(429), "error": status(500),
    "gateway": (502, {}, b"<html>"), "overloaded": status(529), "dropped": drop, "reset": reset,
    "cut": cut_body, "half": half_json, "page": page, "nothing": b"", "list": [],
    "no choices": {"id": "1"}, "null choices": {"id": "1", "choices": None},
    "no message": {"choices": [{}]}, "no reason": completion("never", None), "slow": slow,
}  # fmt: skip


def test_everything_that_passes_is_asked_again(serve, ask, monkeypatch):
    """Each of many words meets five troubles, each trouble five words; all get their answers."""
    monkeypatch.setattr(common, "ATTEMPTS", 100)  # a busy machine has time-outs of its own
    troubles = list(PASSES.values())

    def reply(body: dict[str, Any], n: int) -> Any:
        first = int(word_of(body))
        return troubles[(first + n) % len(troubles)] if n < 5 else completion(word_of(body))

    server = serve(reply)
    words = [str(i) for i in range(len(troubles))]
    answers = ask(server, words, api_timeout=1.5, api_concurrency=len(words))
    assert [a.text for a in answers] == words
    assert len(server.log) >= 6 * len(words)


def test_retry_after_is_obeyed(serve, ask):
    """A request is not asked again before the time that its answer named."""
    until = [0.0]

    def reply(body: dict[str, Any], n: int) -> Any:
        if word_of(body) != "3" or n:
            return completion(word_of(body))
        until[0] = time.monotonic() + 1
        return status(429, Retry_After="1")

    server = serve(reply)
    words = [str(i) for i in range(8)]
    assert [a.text for a in ask(server, words, api_concurrency=2)] == words
    _, again = server.times("3")
    assert again >= until[0] - 0.01 and len(server.log) == 9


def test_retry_after_may_be_longer_than_the_timeout(serve, ask):
    """--api-timeout is for an answer, not for the pause before it."""

    def reply(body: dict[str, Any], n: int) -> Any:
        return completion(word_of(body)) if n else status(429, Retry_After="1")

    server = serve(reply)
    assert [a.text for a in ask(server, ["a"], api_timeout=0.6)] == ["a"]
    first, second = server.times("a")
    assert second - first >= 0.99


DOWN = {
    "error": (status(500, f"out of memory {KEY}"), r"\(500\) .*out of memory \[key\]"),
    "no connection": (drop, "no completion: Server disconnected without sending a response"),
    "reset": (reset, ".*Connection reset by peer"),
    "no completion": ({"N": 1}, 'no completion: {"N": 1}'),
    "no answer": (slow, "no answer within --api-timeout 1 seconds"),
}


@pytest.mark.parametrize("name", DOWN)
def test_a_server_that_stays_down(name, serve, ask, monkeypatch, tmp_path):
    """After so many attempts it is an error that says how to continue; what was written is kept."""
    monkeypatch.setattr(common, "ATTEMPTS", 2)
    trouble, message = DOWN[name]
    up = threading.Event()

    def reply(body: dict[str, Any], _: int) -> Any:
        greeting = body["messages"] == common.HELLO
        works = len(server.greetings) < 3 if greeting else word_of(body) != "5"
        return completion(word_of(body)) if works or up.is_set() else trouble

    server = serve(reply, greetings=True)
    words = [str(i) for i in range(8)]
    flags = {"api_timeout": 1.0} if name == "no answer" else {}
    with pytest.raises(
        UsageError, match=f"in 2 attempts, run the same command again later: {message}"
    ):
        ask(server, words, api_concurrency=1, **flags)
    counts = Counter(word_of(b) for _, b in server.log)
    assert counts == {**dict.fromkeys("01234", 1), "5": 2}
    assert Counter(map(word_of, text_lines(tmp_path / "cache"))) == dict.fromkeys("01234", 1)
    up.set()
    assert [a.text for a in ask(server, words)] == words
    again = Counter(word_of(b) for _, b in server.log) - counts
    assert again == dict.fromkeys("567", 1)


# ----------------------------------------------------------------------- one prompt of many


def gone(handler: Handler) -> None:
    """A redirection to itself."""
    handler.send(307, {"Location": "/v1/chat/completions", "Content-Length": "0"}, b"")


# What a server sends for one prompt, always, instead of an answer, and what is said of it.
BAD = {
    "filtered": (status(400, "content filter"), r"\(400\) .*content filter"),
    "long": (status(413, "too long"), r"\(413\) .*too long"),
    "unprocessable": (status(422, "bad turn"), r"\(422\) .*bad turn"),
    "moderated": (status(403, "flagged"), r"\(403\) .*flagged"),
    "legal": (status(451, f"not here {KEY}"), r"\(451\) .*not here \[key\]"),
    "crash": (status(500, "crash"), r"\(500\) .*crash"),
    "too large": (status(429, "limit 10000", Retry_After="86400"), r"\(429\) .*limit 10000"),
    "dropped": (drop, "no completion: Server disconnected"),
    "reset": (reset, ".*Connection reset by peer"),
    "loop": (gone, ".*redirects"),
    "half": (half_json, "no completion: "),
    "page": (page, "no completion: no JSON: <html"),
    "deep": (b"[" * 100_000, "no completion: "),
    "nothing": (b"", "no completion: no JSON:"),
    "no choices": ({"choices": []}, r'no completion: {"choices": \[\]}'),
    "error": ({"error": {"message": f"upstream {KEY}"}}, r"no completion: .*upstream \[key\]"),
    "dictionary": ({"choices": {"0": 1}}, "no completion: "),
    "parts": (completion([{"type": "image", "url": "N"}]), "no completion: .*image"),
    "strange": (completion("N", reasoning_content={"text": "N"}), "no completion: "),
    "number": (completion(5), "no completion: "),
    "unfinished": (completion("N", None), "no completion: "),
    "stopped": (completion("N", "content_filter"), "content_filter: .*N"),
    "safety": (completion(None, "SAFETY"), "safety: "),
    "broken": (completion("N", "error"), "no completion: finish_reason error: .*N"),
    "provider": ((400, {}, json.dumps({"error": {
        "message": "Provider returned error", "metadata": {"raw": "too hot"}}}).encode()),
        r"\(400\) .*Provider returned error .*too hot"),
    "call": (completion(None, "tool_calls", tool_calls=[]), "tool_calls: "),
    "refused": (completion(None, refusal="I cannot"), "stop: .*I cannot"),
}  # fmt: skip


def test_a_bad_prompt_does_not_end_the_run(serve, ask, monkeypatch, capsys, tmp_path):
    """It is named with the reason; all others are answered, and a new run asks for it again."""
    monkeypatch.setattr(common, "ATTEMPTS", 2)
    answers = threading.Event()

    def reply(body: dict[str, Any], _: int) -> Any:
        word = word_of(body)
        return completion(word) if answers.is_set() or word not in BAD else BAD[word][0]

    server = serve(reply)
    words = [w for i, bad in enumerate(BAD) for w in (str(i), bad)]
    flags = {"api_max_failures": 0.6, "output_dir": str(tmp_path / "run")}
    got = ask(server, words, **flags)
    assert [a.text for a in got[::2]] == words[::2] and all(a.finished for a in got[::2])
    assert {a.finished for a in got[1::2]} == {None}
    said = capsys.readouterr().out
    assert (
        f"test: {len(BAD)} of {len(words)} prompts got no answer" in said and KEY[:12] not in said
    )
    for word, (_, reason) in BAD.items():
        assert re.search(f"^  {word}: {reason}", said, re.MULTILINE), (word, said)
    # A run that is continued keeps to the text that it has; a new one asks for what is missing.
    asked = len(server.log)
    answers.set()
    (tmp_path / "run").mkdir()
    assert ask(server, words, resume=True, **flags) == got and len(server.log) == asked
    assert [a.text for a in ask(server, words, **flags)] == words
    assert sorted(word_of(b) for _, b in server.log[asked:]) == sorted(BAD)
    assert [a.text for a in ask(server, words, resume=True, **flags)] == words


def test_samples_fail_one_by_one(serve, ask):
    """Of several samples for a prompt those that arrive are kept."""
    seeds: list[int] = []

    def reply(body: dict[str, Any], _: int) -> Any:
        seeds.append(body["seed"])
        return status(400, "filtered") if len(seeds) == 2 else completion("N")

    got = ask(serve(reply), ["a"] * 4, 1.0, api_concurrency=1)
    assert [a.finished for a in got] == [True, None, True, True]
    assert len(set(seeds)) == 4


@pytest.mark.parametrize(
    ("share", "words", "asked"),
    [(0.1, 2000, 6), (0.0, 20, 1), (0.02, 300, 2), (0.5, 300, 26)],
)
def test_too_many_failures_end_the_run(share, words, asked, serve, ask):
    """Early: a server that refuses every prompt is asked for a share of the first fifty."""
    server = serve(lambda *_: status(400, "no such language"))
    flags = {"api_concurrency": 1, "api_max_failures": share}
    with pytest.raises(UsageError, match=f"{asked} of {asked} prompts got no answer.*such langu"):
        ask(server, [str(i) for i in range(words)], **flags)
    assert len(server.log) == asked


def test_as_many_failures_as_are_allowed(serve, ask, capsys):
    """A tenth of the prompts is the limit, wherever they are beyond the first fifty."""

    def reply(body: dict[str, Any], _: int) -> Any:
        failing = int(word_of(body)) % 10 == 9
        return status(400, "no") if failing else completion("N")

    got = ask(serve(reply), [str(i) for i in range(120)])
    assert sum(a.finished is None for a in got) == 12
    assert "12 of 120 prompts got no answer" in capsys.readouterr().out


REVOKED = {
    "key": (status(401, "revoked"), "refuses the key"),
    "money": (status(402, "no money"), "refuses the request"),
    "credit": (status(400, "your credit balance is too low"), "refuses the request: .*credit"),
    "model": (status(404, "it was retired"), "has no m, or no such path"),
}


@pytest.mark.parametrize("name", REVOKED)
def test_what_is_wrong_with_the_run_is_not_blamed_on_a_prompt(name, serve, ask, tmp_path):
    """When key, money or model go away, the run ends at once, and no prompt counts as failed."""
    trouble, message = REVOKED[name]

    def reply(body: dict[str, Any], _: int) -> Any:
        return completion(word_of(body)) if len(server.log) <= 20 else trouble

    server = serve(reply, greetings=True)
    with pytest.raises(UsageError, match=message):
        ask(server, [str(i) for i in range(90)], api_concurrency=4)
    assert len(server.log) <= 24
    assert [line["finished"] for line in text_lines(tmp_path / "cache")] == [True] * 20


def test_no_reply_is_a_traceback(serve, ask, monkeypatch):
    """Replies with parts replaced at random: each is an answer, or dropped with a reason."""
    monkeypatch.setattr(common, "ATTEMPTS", 1)
    odd = [None, "", "N", [], {}, [[]], [{}], {"0": {}}, 5, -1, 1.5, True, "stop", ["N"], "\ud83d"]
    generator = random.Random(0)

    def mutated(value: Any) -> Any:
        if generator.random() < 0.12:
            return generator.choice(odd)
        if isinstance(value, dict):
            return {k: mutated(v) for k, v in value.items() if generator.random() > 0.03}
        return [mutated(v) for v in value] if isinstance(value, list) else value

    replies = [mutated(completion("N AA1", reasoning="or M?")) for _ in range(400)]
    server = serve(lambda body, _: json.dumps(replies[int(word_of(body))]).encode())
    got = ask(server, [str(i) for i in range(len(replies))], api_max_failures=1.0)
    assert 50 < sum(a.finished is None for a in got) < 350
    for answer, reply in zip(got, replies, strict=True):
        assert isinstance(answer.text, str) and isinstance(answer.length, int)
        if answer.finished is not None:
            message = reply["choices"][0]["message"]
            assert answer.finished == (reply["choices"][0]["finish_reason"] == "stop")
            assert (message.get("content") or "").replace("\ud83d", "?") in answer.text


# ------------------------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (status(401, f"bad key {KEY}"), r"refuses the key in OPENAI_API_KEY: \(401\).*\[key\]"),
        (status(403, f"{'x' * 285} {KEY}"), r"refuses the key in OPENAI_API_KEY: \(403\)"),
        (status(404, "unknown model m"), r"has no m, or no such path .*: \(404\).*unknown model m"),
        (status(400, "context too long"), r"refuses the request: \(400\).*context too long"),
        (status(402, "no money"), r"refuses the request: \(402\)"),
        (status(429, "later", Retry_After="86400"),
         r"in 10 attempts, run the same command again later: \(429\).*later"),
        ((429, {}, b'{"error": {"code": "insufficient_quota", "message": "pay"}}'),
         r"refuses the request: \(429\).*pay"),
    ],
)  # fmt: skip
def test_refusals_are_errors_at_once(reply, words, serve, ask, tmp_path):
    """A greeting finds them out before any prompt is sent; the key is not repeated."""
    server = serve(lambda *_: reply, greetings=True)
    with pytest.raises(UsageError, match=words) as refused:
        ask(server, [str(i) for i in range(30)], api_concurrency=4)
    assert server.log == [] and len(server.greetings) == 1
    assert KEY[:12] not in str(refused.value) and refused.value.__cause__ is None
    assert text_lines(tmp_path / "cache") == []


def test_a_missing_key_is_named(serve, ask, monkeypatch):
    server = serve(lambda *_: completion("A"))
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setattr(common, "KEY", "NOT_SET")
    with pytest.raises(UsageError, match="wants a key: set NOT_SET"):
        ask(server, ["a"])


def test_a_key_that_no_header_can_carry(serve, ask, monkeypatch):
    server = serve(lambda *_: completion("A"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-never\nX: y")
    with pytest.raises(UsageError, match="OPENAI_API_KEY holds characters") as refused:
        ask(server, ["a"])
    assert "sk-never" not in str(refused.value) and server.log == []


def test_the_client_is_asked_for_by_name(monkeypatch):
    """Without the extra, one sentence says how to get it."""
    find = common.find_spec
    monkeypatch.setattr(common, "find_spec", lambda name: None if name == "openai" else find(name))
    args = sequence_level.Arguments(api_base_url="http://h/v1", api_model="m")
    with pytest.raises(UsageError, match=r'pip install -e "\.\[api\]"'):
        common.check_arguments(args)
        args.check()


@pytest.mark.parametrize("turn", [{"tool_calls": [{}]}, {}])
def test_calls_of_tools_are_refused(turn: dict, serve, tiny, tmp_path, monkeypatch):
    """They would be left out of the request, and the row learned without them."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(lambda *_: completion("A"))
    flags = {"api_base_url": server.url, "api_model": "m", "cache_dir": str(tmp_path / "cache")}
    args, student = sequence_level.Arguments(**flags), tiny("llama")
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", **turn}]
    turns.append({"role": "tool", "content": "5"})
    talk = Conversation(turns, None, [], "row 1", {} if turn else {"tools": [{}]})
    with pytest.raises(UsageError, match="row 1: tools need a teacher that is loaded here"):
        sequence_level.ApiTeacher(args, student).complete(
            [Prompt(talk, [5], [5])], args, temperature=0.0, top_p=1.0, purpose="test"
        )
    assert server.log == []


# ------------------------------------------------------------------ what a server does not take


@pytest.mark.parametrize("form", ["OpenAI's", "FastAPI's", "text"])
def test_what_a_server_does_not_take_is_left_out(form: str, serve, ask, capsys):
    """No seed where none is taken, and the limit by its newer name: greetings find that out."""

    def refuse(code: int, words: str) -> Any:
        others = {"FastAPI's": {"detail": [{"msg": words}]}, "text": {"error": words}}
        return (
            (code, {}, json.dumps(others[form]).encode()) if form in others else status(code, words)
        )

    def reply(body: dict[str, Any], _: int) -> Any:
        if "max_tokens" in body:
            return refuse(400, "use max_completion_tokens instead of max_tokens")
        if "seed" in body:
            return refuse(422, "unknown field: seed")
        return completion(f"{word_of(body)} {body['max_completion_tokens']}")

    server = serve(reply, greetings=True)
    answers = ask(server, ["a", "b", "c"], 1.0)
    assert [a.text for a in answers] == ["a 128", "b 128", "c 128"]
    assert len(server.log) == 3
    assert capsys.readouterr().out.count("takes no seed") == 1


def test_settings_that_are_left_out(serve, ask, capsys):
    """The student's template arguments, and a temperature of 1, which is the API's own."""

    def reply(body: dict[str, Any], _: int) -> Any:
        for name in ("chat_template_kwargs", "temperature"):
            if name in body:
                return status(400, f"unknown argument: {name}")
        return completion(word_of(body))

    server = serve(reply, greetings=True)
    flags = {"api_greedy_temperature": 1.0, "template_kwargs": '{"enable_thinking": false}'}
    assert [a.text for a in ask(server, ["a", "b"], 1.0, **flags)] == ["a", "b"]
    said = capsys.readouterr().out
    assert all(f"takes no {name}, so" in said for name in ("chat_template_kwargs", "temperature"))


@pytest.mark.parametrize("greedy", [0.0, 0.01])
def test_a_temperature_is_left_out_only_where_it_is_1(
    greedy: float, serve, tiny, tmp_path, monkeypatch
):
    """A server that takes no temperature beside a nucleus: greedy answers stay greedy."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def reply(body: dict[str, Any], _: int) -> Any:
        both = "temperature" in body and "top_p" in body
        return status(400, "temperature and top_p") if both else completion("N")

    server = serve(reply, greetings=True)
    args = sequence_level.Arguments(
        api_base_url=server.url, api_model="m", cache_dir=str(tmp_path), sampling_temperature=1.0,
        top_p=0.9, api_greedy_temperature=greedy,
    )  # fmt: skip
    teacher = sequence_level.ApiTeacher(args, tiny("llama"))
    prompts = [Prompt(Conversation([{"role": "user", "content": "a"}], None, [], "a"), [5], [5])]
    for temperature, top_p in ((1.0, 0.9), (greedy, 1.0)):
        sampling = {"temperature": temperature, "top_p": top_p, "purpose": "test"}
        teacher.complete(prompts, args, **sampling)
    assert [body.get("temperature") for _, body in server.log] == [None, greedy]


def test_reasoning_in_parts(serve, ask):
    """As Mistral's models answer."""
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}
    answer = {"type": "text", "text": "N"}
    for parts, more in (([thought, answer], {}), ([answer], {"reasoning_content": "hm"})):
        server = serve(lambda *_, parts=parts, more=more: completion(parts, **more))
        assert [a.text for a in ask(server, ["a"])] == ["<think>\nhm\n</think>\n\nN"]


def test_a_quota_of_a_minute(serve, ask, monkeypatch):
    """Pauses grow beyond those of other faults, and fractions of a second are read."""
    pauses, sleep = [], asyncio.sleep
    monkeypatch.setattr(common.asyncio, "sleep", lambda s: pauses.append(s) or sleep(0))
    headers = iter([{}] * 6 + [{"Retry_After": "59.5"}])
    server = serve(lambda _, n: completion("N") if n == 7 else status(429, **next(headers)))
    assert ask(server, ["a"])[0].text == "N"
    grown = [0.02 * 2**n for n in range(6)]
    assert [p for p in pauses if p] == pytest.approx([*grown, 59.5])


@pytest.mark.parametrize(
    ("takes", "said", "flags", "words"),
    [
        (lambda b: b["temperature"] == 1, "temperature", {},
         r"no temperature 0 \(--api-greedy-temperature 1 asks for samples\): \(400\).*temperature"),
        (lambda b: b["temperature"] == 1, "temperature", {"temperature": 1.0},
         r"no temperature 0 \(--api-greedy"),
        (lambda b: b["temperature"] == 1, "temperature",
         {"temperature": 0.7, "api_greedy_temperature": 1.0}, r"request: \(400\).*temperature"),
        (lambda b: b["temperature"] <= 1, "temperature", {"temperature": 1.5}, r"request: \(400\)"),
        (lambda b: "top_p" not in b, "top_p", {"temperature": 1.0, "top_p": 0.9},
         r"request: \(400\).*top_p"),
        (lambda b: b["max_tokens"] <= 100, "max_tokens", {}, r"request: \(400\).*max_tokens"),
    ],
)  # fmt: skip
def test_what_changes_the_text_is_refused(takes, said, flags, words, serve, ask):
    """Before any prompt is sent, with the flag that helps where one does."""

    def reply(body: dict[str, Any], _: int) -> Any:
        return completion("N") if takes(body) else status(400, f"wrong {said}")

    server = serve(reply, greetings=True)
    with pytest.raises(UsageError, match=words):
        ask(server, ["a", "b"], **flags)
    assert server.log == []


def test_greedy_answers_from_a_server_that_only_samples(serve, ask, tmp_path):
    """--api-greedy-temperature: samples, and cached as such, apart from greedy answers."""

    def reply(body: dict[str, Any], _: int) -> Any:
        right = body["temperature"] == 1
        return completion(f"{body['seed']}") if right else status(400, "temperature: only 1")

    server = serve(reply, greetings=True)
    asked = ask(server, ["a", "b"], 0.0, api_greedy_temperature=1.0)
    assert asked == ask(server, ["a", "b"], 1.0, api_greedy_temperature=1.0)
    assert asked[0].text != asked[1].text and len(server.log) == 2
    with pytest.raises(UsageError, match="takes no temperature 0"):
        ask(server, ["a", "b"], 0.0)


# ----------------------------------------------------------------------------------- whole runs


def teacher_of(cache: Path) -> Callable[[dict[str, Any], int], Any]:
    """The local teacher's own answers, as it wrote them into `cache`, from a server."""
    files = sorted((cache / "text").glob("*.jsonl"), key=lambda p: p.stat().st_size)
    texts = []
    for file in files:  # the samples for the evaluation, and the greedy text for everything
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        texts.append({json.dumps(line["messages"]): line for line in lines})
    sampled, greedy = texts

    def reply(body: dict[str, Any], _: int) -> dict[str, Any]:
        line = (sampled if body["temperature"] else greedy)[json.dumps(body["messages"])]
        return completion(line["text"], "stop" if line["finished"] else "length")

    return reply


def api_flags(server: Server, **changes: object) -> dict[str, object]:
    return {"api_base_url": server.url, "api_model": "data/teacher", **changes}


def test_equal_text_gives_equal_weights(whole_run, serve, tmp_path, monkeypatch):  # noqa: F811
    """The same answers, over HTTP: the student is that of the local teacher, bit for bit."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(teacher_of(whole_run.parent / "cache"))
    run = in_process(sequence_level, tmp_path / "run", **api_flags(server, api_concurrency=4))
    assert_same_student(run, whole_run)
    ours, theirs = ((r / "completions.jsonl").read_text() for r in (run, whole_run))
    assert ours == theirs
    ours, theirs = results(run), results(whole_run)
    assert ours["teacher"]["exact_match"] == theirs["teacher"]["exact_match"]
    assert "nats_per_token" not in ours["teacher"] and "kl_to_teacher" not in ours["after"]
    assert ours["after"]["bits_per_byte"] == pytest.approx(theirs["after"]["bits_per_byte"])
    assert "distilled from data/teacher" in (run / "final" / "README.md").read_text()
    assert not list((tmp_path / "cache").glob("states/*"))


def filtering(teacher: Callable[[dict[str, Any], int], Any], *words: str):
    """The teacher behind a content filter."""

    def reply(body: dict[str, Any], n: int) -> Any:
        bad = word_of(body) in words or f"{word_of(body)} {body['temperature']:g}" in words
        return status(400, "content filter") if bad else teacher(body, n)

    return reply


def test_bad_rows_of_a_run(whole_run, serve, tmp_path, monkeypatch, capsys):  # noqa: F811
    """The others are learned and scored; a run that goes on keeps to its text, though the server
    has changed its mind."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    train = common.load_conversations(str(common.DATA / "train.jsonl"), max_rows=64)
    held_out = common.load_conversations(str(common.DATA / "eval.jsonl"), max_rows=8)
    bad = [c.messages[-1]["content"] for c in (train[6], train[9], held_out[2])]
    teacher = teacher_of(whole_run.parent / "cache")
    server = serve(filtering(teacher, *bad, held_out[4].messages[-1]["content"] + " 1"))
    flags = api_flags(server, save_total_limit=0)
    run = in_process(sequence_level, tmp_path / "run", **flags)
    said, scores = capsys.readouterr().out, results(run)
    for conversation in (train[6], train[9], held_out[2], held_out[4]):
        assert f"  {conversation.source}: (400) Error code: 400 - content filter" in said
    assert "training text: 2 of 64 prompts got no answer" in said
    assert "sampled evaluation answers: 2 of 8 prompts got no answer" in said
    written = scores["training_text"]
    assert (written["written"], written["kept"], written["unanswered"]) == (62, 62, 2)
    assert len((run / "completions.jsonl").read_text().splitlines()) == 62
    assert scores["evaluation"]["rows"] == 6
    shutil.rmtree(run / "checkpoints" / "step-000012")
    (run / "results.json").unlink()
    server.reply = teacher
    in_process(sequence_level, tmp_path / "run", **flags, resume=True)
    assert results(run)["after"] == scores["after"] and results(run)["training_text"] == written
    whole = in_process(sequence_level, tmp_path / "whole", **api_flags(server))
    assert_same_student(whole, whole_run)


def test_two_processes_leave_out_the_same_rows(serve, tmp_path):
    """Each process asks for its share; both train on what all of them got."""
    _, student = byte_pair(tmp_path)
    rows = [{"prompt": f"What is {i} plus 1?"} for i in range(13)]
    words = [row["prompt"] for row in rows[3:5]]
    server = serve(filtering(lambda *_: completion("fine"), *words, "How? 0"))
    data = write_rows(tmp_path / "rows.jsonl", rows)
    held_out = write_rows(tmp_path / "eval.jsonl", [{"prompt": w} for w in ("How?", "Why?", "Ah?")])
    flags = {
        **api_flags(server), "student": student, "dataset": data, "eval_dataset": held_out,
        "batch_size": 6, "max_steps": 2, "max_new_tokens": 8, "output_dir": "run",
        "cache_dir": "cache",
    }  # fmt: skip
    words = [w for name, v in flags.items() for w in (f"--{name.replace('_', '-')}", str(v))]
    done = run_forked("sequence_level.py", *words, cwd=tmp_path, processes=2, OPENAI_API_KEY=KEY)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("training text: 2 of 13 prompts got no answer") == 1
    assert done.stdout.count("greedy evaluation answers: 1 of 3 prompts got no answer") == 1
    scores = results(tmp_path / "run")
    assert scores["training_text"]["kept"] == 11 and scores["evaluation"]["rows"] == 2
    assert len(server.log) == 13 + 3 + 3


def test_killed_while_the_server_writes(whole_run, serve, tmp_path):  # noqa: F811
    """What was recorded is not asked again; --api-concurrency answers are lost in each kill."""
    teacher, concurrency = teacher_of(whole_run.parent / "cache"), 4
    permits = threading.Semaphore(0)  # answers that the server may give

    def reply(body: dict[str, Any], _: int) -> dict[str, Any]:
        permits.acquire()
        return teacher(body, 0)

    server = serve(reply)
    flags = api_flags(server, api_concurrency=concurrency, output_dir="run", cache_dir="cache")
    words = [w for name, v in flags.items() for w in (f"--{name.replace('_', '-')}", str(v))]
    words += ["--resume"]

    def begin() -> ForkedScript:
        flags, output = [*WORDS, *words], tmp_path / "out.txt"
        return ForkedScript("sequence_level.py", flags, tmp_path, output, OPENAI_API_KEY=KEY)

    asked = recorded = 0
    for answers in (15, 25):
        permits.release(answers)
        asked += answers + concurrency
        recorded += answers
        process = begin()
        # Killed when the answers have come and the next requests are under way, as many as may be.
        assert wait_for(process, lambda asked=asked: len(server.log) == asked)
        process.kill()
        process.wait()
        assert len(text_lines(tmp_path / "cache")) == recorded
        permits.release(concurrency)  # for the requests of the killed process
    permits.release(1000)
    assert begin().wait() == 0, (tmp_path / "out.txt").read_text()
    lines = text_lines(tmp_path / "cache")
    counts = Counter((str(b["messages"]), b["temperature"]) for _, b in server.log)
    # 64 + 8 words greedy, and the 8 of the evaluation sampled, each recorded once.
    assert len(counts) == len(lines) == 64 + 8 + 8
    assert sum(counts.values()) == len(lines) + 2 * concurrency
    assert_same_student(tmp_path / "run", whole_run)


def test_the_key_is_nowhere(whole_run, serve, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Not in the run, the cache or the output, though the server keeps repeating it."""
    teacher = teacher_of(whole_run.parent / "cache")

    def reply(body: dict[str, Any], n: int) -> Any:
        return teacher(body, n) if n or len(server.log) % 9 else status(500, f"key {KEY} fails")

    server = serve(reply)
    flags = ["--api-base-url", server.url, "--api-model", "data/teacher", "--cache-dir", "cache"]
    done = run_script(
        "sequence_level.py", *WORDS, *flags, cwd=tmp_path, OPENAI_API_KEY=KEY, OPENAI_LOG="debug"
    )
    assert done.returncode == 0, done.stderr
    assert len(server.log) > 80 and "HTTP Response" in done.stderr
    server.reply = lambda *_: status(401, f"Incorrect API key provided: {KEY}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(sys, "argv", ["", *WORDS, *flags, "--max-new-tokens", "9"])
    with pytest.raises(SystemExit) as ended:
        common.launch(sequence_level.main, sequence_level.Arguments, "")
    refused = capfd.readouterr()
    assert ended.value.code == 2 and "provided: [key]" in refused.err
    said = done.stdout + done.stderr + refused.out + refused.err
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 10 and any(p.name == "args.json" for p in files)
    for secret in (KEY, KEY[:12], KEY[-12:]):
        assert secret not in said
        assert not [p for p in files if secret.encode() in p.read_bytes()]


def test_a_server_teaches_another_tokenizer(whole_run, serve, tmp_path, monkeypatch):  # noqa: F811
    """Neither side knows the other's tokens: text in, text out."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = serve(teacher_of(whole_run.parent / "cache"))
    other = {"student": str(common.DATA / "student_other_tokenizer")}
    run = in_process(sequence_level, tmp_path / "run", **api_flags(server, **other))
    local = in_process(
        sequence_level, tmp_path / "local", cache_dir=str(whole_run.parent / "cache"), **other
    )
    assert_same_student(run, local)
