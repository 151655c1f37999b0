"""A teacher behind an API: the real client against servers that answer, misbehave and refuse."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import run_script, wait_for
from forked import ForkedScript
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
    request. A request without the key gets a 401.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply: Callable[[dict[str, Any], int], Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.log, self.lock = reply, [], threading.Lock()
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
        with self.server.lock:
            self.server.busy += 1
            self.server.busiest = max(self.server.busiest, self.server.busy)
            before = sum(b["messages"] == body["messages"] for _, b in self.server.log)
            self.server.log.append((time.monotonic(), body))
        try:
            reply = self.server.reply(body, before)
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

    def start(reply: Callable[[dict[str, Any], int], Any]) -> Server:
        servers.append(Server(reply))
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
    monkeypatch.setattr(sequence_level, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(sequence_level, "LAST_PAUSE", 0.1)
    student = tiny("llama")

    def ask(server: Server, words: list[str], temperature: float = 0.0, **flags: Any):
        args = sequence_level.Arguments(
            api_base_url=server.url, api_model="m", cache_dir=str(tmp_path / "cache"),
            **{"api_timeout": 600.0, **flags},
        )  # fmt: skip
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
    assert server.log[-1][1]["seed"] not in {b["seed"] for b in bodies}
    asked = len(server.log)
    assert ask(server, ["a", "b", "a"], 0.7, top_p=0.9, max_new_tokens=9) == sampled
    assert ask(server, ["b", "a"]) == greedy[1::-1]
    assert len(server.log) == asked == 6
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
    """Cut, filtered, empty and reasoned answers, and one without a count of its tokens."""
    bare = completion("N AA1")
    del bare["usage"]
    replies = {
        "cut": completion("N AA1", "length"),
        "filtered": completion("N", "content_filter"),
        "tools": completion(None, "tool_calls"),
        "thinks": completion("\nN", reasoning_content="N or M?\n"),
        "thinks too": completion("N", reasoning="N or M?"),
        "bare": bare,
        "half": completion("N \ud83d"),
    }
    server = serve(lambda body, _: replies[word_of(body)])
    got = dict(zip(replies, ask(server, list(replies)), strict=True))
    assert got["cut"] == Completion("N AA1", False, 7, None)
    assert got["filtered"].finished is False
    assert got["tools"].text == ""
    assert got["thinks"].text == got["thinks too"].text == "<think>\nN or M?\n</think>\n\nN"
    assert got["bare"].length > 0 and got["bare"].length != 7
    assert got["half"].text == "N ?"


# ------------------------------------------------------------------------- what is asked again


def drop(handler: Handler) -> None:
    handler.connection.close()
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


# What the client asks again by itself, and what only ApiTeacher recognises as no answer.
PASSES = {
    "timeout": status(408), "conflict": status(409), "too many": status(429), "error": status(500),
    "gateway": (502, {}, b"<html>"), "overloaded": status(529), "dropped": drop, "cut": cut_body,
    "half": half_json, "page": page, "nothing": b"", "list": [], "no choices": {"id": "1"},
    "null choices": {"id": "1", "choices": None}, "no message": {"choices": [{}]},
    "no reason": completion("never", None), "slow": slow,
}  # fmt: skip


def test_everything_that_passes_is_asked_again(serve, ask, monkeypatch):
    """Each of many words meets five troubles, each trouble five words; all get their answers."""
    monkeypatch.setattr(sequence_level, "ATTEMPTS", 100)  # a busy machine has time-outs of its own
    troubles = list(PASSES.values())

    def reply(body: dict[str, Any], n: int) -> Any:
        first = int(word_of(body))
        return troubles[(first + n) % len(troubles)] if n < 5 else completion(word_of(body))

    server = serve(reply)
    words = [str(i) for i in range(len(troubles))]
    answers = ask(server, words, api_timeout=1.5, api_concurrency=len(words))
    assert [a.text for a in answers] == words
    assert len(server.log) >= 6 * len(words)


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_obeyed(form, serve, ask):
    """A request is not asked again before the time that its answer named."""
    until = [0.0]

    def reply(body: dict[str, Any], n: int) -> Any:
        if word_of(body) != "3" or n:
            return completion(word_of(body))
        if form == "seconds":
            until[0] = time.monotonic() + 1
            return status(429, Retry_After="1")
        moment = int(time.time()) + 2
        until[0] = time.monotonic() + moment - time.time()
        stamp = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(moment))
        return status(503, Retry_After=stamp)

    server = serve(reply)
    words = [str(i) for i in range(8)]
    assert [a.text for a in ask(server, words, api_concurrency=2)] == words
    _, again = server.times("3")
    assert again >= until[0] - 0.01 and len(server.log) == 9


DOWN = {
    "error": (status(500, f"out of memory {KEY}"), r"last error: \(500\) .*out of memory \[key\]"),
    "no connection": (drop, "in up to 2 attempts, the last error: Connection error"),
    "no completion": ({}, "in up to 2 attempts, .* what the server sent is no completion"),
    "no answer": (slow, "in up to 2 attempts, .* no answer within --api-timeout 1 seconds"),
}


@pytest.mark.parametrize("name", DOWN)
def test_a_server_that_stays_down(name, serve, ask, monkeypatch):
    """After so many attempts it is an error that says how to continue; what was written is kept."""
    monkeypatch.setattr(sequence_level, "ATTEMPTS", 2)
    trouble, message = DOWN[name]
    down = threading.Event()
    down.set()

    def reply(body: dict[str, Any], _: int) -> Any:
        return trouble if down.is_set() and word_of(body) == "5" else completion(word_of(body))

    server = serve(reply)
    words = [str(i) for i in range(8)]
    flags = {"api_timeout": 1.0} if name == "no answer" else {}
    with pytest.raises(UsageError, match=f"{message}.*run the same command again later"):
        ask(server, words, api_concurrency=1, **flags)
    counts = Counter(word_of(b) for _, b in server.log)
    assert counts == {**dict.fromkeys("01234", 1), "5": 2}
    down.clear()
    assert [a.text for a in ask(server, words)] == words
    again = Counter(word_of(b) for _, b in server.log) - counts
    assert again == dict.fromkeys("567", 1)


# ------------------------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (status(401, f"bad key {KEY}"), r"refuses the key in OPENAI_API_KEY: \(401\).*\[key\]"),
        (status(403, f"{'x' * 285} {KEY}"), r"refuses the key in OPENAI_API_KEY: \(403\)"),
        (status(404, "unknown model m"), r"has no model m, .*: \(404\).*unknown model m"),
        (status(400, "context too long"), r"refuses the request: \(400\).*context too long"),
        (status(402, "no money"), r"refuses the request: \(402\)"),
        (status(429, "later", Retry_After="86400"),
         r"in up to 10 attempts, the last error: \(429\).*later; run the same command again later"),
    ],
)  # fmt: skip
def test_refusals_are_errors_at_once(reply, words, serve, ask, tmp_path):
    """Nobody waits, at most the requests under way are lost, and the key is not repeated."""
    server = serve(lambda *_: reply)
    with pytest.raises(UsageError, match=words) as refused:
        ask(server, [str(i) for i in range(30)], api_concurrency=4)
    assert len(server.log) <= 4
    assert KEY[:12] not in str(refused.value) and refused.value.__cause__ is None
    assert text_lines(tmp_path / "cache") == []


def test_an_empty_account_is_a_refusal(serve, ask):
    """The client asks again, as after any 429; in the end it is no matter of waiting."""
    reply = 429, {}, b'{"error": {"code": "insufficient_quota", "message": "pay"}}'
    with pytest.raises(UsageError, match=r"refuses the request: \(429\).*pay"):
        ask(serve(lambda *_: reply), ["a"])


def test_a_missing_key_is_named(serve, ask, monkeypatch):
    server = serve(lambda *_: completion("A"))
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setattr(sequence_level, "KEY", "NOT_SET")
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
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openai" else find(name)
    )
    args = sequence_level.Arguments(api_base_url="http://h/v1", api_model="m")
    with pytest.raises(UsageError, match=r'pip install -e "\.\[api\]"'):
        args.check()


def test_what_a_server_does_not_take_is_left_out(serve, ask, capsys):
    """No seed where none is taken, and the limit by its newer name."""

    def reply(body: dict[str, Any], _: int) -> Any:
        if "max_tokens" in body:
            return status(400, "use max_completion_tokens instead of max_tokens")
        if "seed" in body:
            return status(422, "unknown field: seed")
        return completion(f"{word_of(body)} {body['max_completion_tokens']}")

    server = serve(reply)
    answers = ask(server, ["a", "b", "c"], 1.0, api_concurrency=1)
    assert [a.text for a in answers] == ["a 128", "b 128", "c 128"]
    assert len(server.log) == 5
    assert capsys.readouterr().out.count("takes no seed") == 1


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
    assert len(server.log) > 80 and "Retrying request" in done.stderr
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
