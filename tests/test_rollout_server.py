"""The student's text from a vLLM server: a stub that loads the weights which a run publishes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer, llama, small_run, write, write_rows
from conftest import run_in_process
from forked import ForkedScript, run_forked
from safetensors.torch import load_file
from test_server_teacher import ROWS, Handler, Stub, results_of, steps_of

import common
import on_policy
from common import UsageError

peft = pytest.importorskip("peft")
pytest.importorskip("openai")


class StudentHandler(Handler):
    def do_POST(self) -> None:
        if self.path.startswith("/v1/completions"):
            return super().do_POST()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.send(*self.server.manage(self.path, body))


class StudentStub(Stub):
    """A vLLM server in developer mode. `loads` counts what it was told to load; from `deaf` on it
    says that it has, and has not."""

    def __init__(self, folder: str, tokenizer: Any) -> None:
        model = common.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        super().__init__(model.eval(), tokenizer)
        self.RequestHandlerClass = StudentHandler
        self.loads, self.resets, self.deaf, self.first = 0, 0, 10**9, model.state_dict()
        self.first = {name: tensor.clone() for name, tensor in self.first.items()}
        self.adapted: Any = None

    def manage(self, path: str, body: dict[str, Any]) -> tuple[int, bytes]:
        with self.lock:
            if path == "/reset_prefix_cache":
                self.resets += 1
                return 200, json.dumps({"success": self.resets % 3 != 1}).encode()
            self.loads += 1
            if self.loads <= self.deaf:
                if path == "/v1/load_lora_adapter":
                    assert body["lora_name"] == "student" and body["load_inplace"]
                    self.model = self.model if self.adapted is None else self.adapted.unload()
                    self.adapted = peft.PeftModel.from_pretrained(self.model, body["lora_path"])
                    self.model = self.adapted.eval()
                    self.models[1:] = [{"id": "student", "max_model_len": None}]
                else:
                    assert path == "/collective_rpc" and body["method"] == "reload_weights"
                    weights = load_file(Path(body["kwargs"]["weights_path"]) / "model.safetensors")
                    kept = self.model.load_state_dict(weights, strict=False)
                    assert not kept.unexpected_keys and set(kept.missing_keys) <= {"lm_head.weight"}
            return 200, b"Success: done" if "lora" in path else b'{"results": [null]}'

    def restart(self) -> None:
        self.model = self.model if self.adapted is None else self.adapted.unload()
        self.adapted = None
        self.model.load_state_dict(self.first)


@pytest.fixture
def rollouts(tmp_path, monkeypatch) -> Iterator[tuple[StudentStub, dict[str, Any]]]:
    """A stub and the flags of a run whose text it writes; greedy, so that it can be compared."""
    monkeypatch.setattr(common, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(common, "LAST_PAUSE", 0.05)
    tokenizer = byte_tokenizer()
    teacher = write(tmp_path / "teacher", llama(tokenizer, 1), tokenizer)
    student = write(tmp_path / "student", llama(tokenizer, 2), tokenizer)
    flags = small_run(tmp_path, teacher, student, write_rows(tmp_path / "rows.jsonl", ROWS))
    flags |= {"max_length": 200, "max_new_tokens": 12, "max_steps": 4, "mix": 1.0}
    flags |= {"rollout_temperature": 0.0, "completions": "teacher", "learning_rate": 0.02}
    stub = StudentStub(student, tokenizer)
    threading.Thread(target=stub.serve_forever, args=[0.01], daemon=True).start()
    yield stub, flags
    stub.shutdown()
    stub.server_close()


def served(stub: StudentStub, flags: dict[str, Any], tmp_path: Path, **more: Any) -> dict[str, Any]:
    own = {"rollout_url": stub.url, "rollout_weights": str(tmp_path / "weights")}
    return flags | own | {"output_dir": str(tmp_path / "served")} | more


def assert_equal_runs(ours: Path, theirs: Path) -> None:
    for a, b in zip(steps_of(ours), steps_of(theirs), strict=True):
        for name in ("train/loss", "train/kl", "optim/grad_norm", "rollout/response_tokens"):
            assert a[name] == pytest.approx(b[name], rel=1e-3, abs=1e-4), (name, a, b)
    ours, theirs = results_of(ours)["after"], results_of(theirs)["after"]
    assert ours == {name: pytest.approx(value, rel=1e-3) for name, value in theirs.items()}


def test_the_models_own_directories_are_not_written_to(rollouts, tmp_path):
    stub, flags = rollouts
    for model in ("student", "teacher"):
        own = served(stub, flags, tmp_path, rollout_weights=flags[model])
        with pytest.raises(UsageError, match="has files that no run has put there"):
            common.check_arguments(on_policy.Arguments(**own))
    run_in_process(on_policy, **served(stub, flags, tmp_path))
    common.check_arguments(on_policy.Arguments(**served(stub, flags, tmp_path)))  # used again
    args = on_policy.Arguments(rollout_url=stub.url, rollout_weights="w", api_timeout=30.0)
    common.check_arguments(args)  # a silent server may be given up earlier


def test_the_server_reads_the_students_prompt(rollouts, tmp_path):
    """Not the teacher's, whose chat template is another one here."""
    stub, flags = rollouts
    place = Path(flags["teacher"]) / "chat_template.jinja"
    place.write_text("{{ 'Be kind. ' }}" + place.read_text())
    run_in_process(on_policy, **flags)
    run_in_process(on_policy, **served(stub, flags, tmp_path))
    assert_equal_runs(flags["output_dir"], tmp_path / "served")


@pytest.mark.parametrize("lora", [0, 1])
def test_a_server_writes_what_the_student_writes(lora, rollouts, tmp_path):
    """Greedy text and all that follows from it are those of the suite's own generator."""
    stub, flags = rollouts
    flags |= {"lora_rank": lora}
    run_in_process(on_policy, **flags)
    run_in_process(on_policy, **served(stub, flags, tmp_path))
    assert_equal_runs(tmp_path / "served", tmp_path / "run")
    assert stub.loads == 1 + 4  # wrong weights once, then the student of each step
    names = {path.name for path in (tmp_path / "weights").iterdir()}
    assert ("adapter_model.safetensors" in names) == bool(lora)
    assert ("model.safetensors" in names) == (not lora)


def test_text_is_sampled_by_seeds_of_rows(rollouts, tmp_path):
    stub, flags = rollouts
    flags |= {"rollout_temperature": 1.0, "max_steps": 2}
    run_in_process(on_policy, **served(stub, flags, tmp_path))
    texts = [b for b in stub.bodies if "prompt_logprobs" not in b]
    assert len({b["seed"] for b in texts}) == len(texts) == 2 * flags["batch_size"]
    assert all(b["temperature"] == 1 and b["top_p"] == 1 and b["top_k"] == 0 for b in texts)


def test_the_next_text_is_written_while_the_present_one_is_learned_from(rollouts, tmp_path):
    stub, flags = rollouts
    run_in_process(on_policy, **served(stub, flags, tmp_path, rollout_steps=2, max_steps=7))
    stale = [line["rollout/staleness"] for line in steps_of(tmp_path / "served")]
    assert stale == [0, 1, 2, 3, 2, 3, 2]
    assert stub.loads == 1 + 4  # by the students of steps 0 (twice), 2 and 4


def test_a_checkpoint_holds_text_that_is_being_written(rollouts, tmp_path):
    """A run that was stopped and continued ends as one that was not."""
    stub, flags = rollouts
    flags |= {"rollout_steps": 2, "max_steps": 7, "save_steps": 3, "save_total_limit": 0}
    run_in_process(on_policy, **served(stub, flags, tmp_path))
    whole = tmp_path / "whole"
    (tmp_path / "served").rename(whole)
    part = tmp_path / "served"
    part.mkdir()
    for name in ("args.json", "metrics.jsonl"):
        (part / name).write_bytes((whole / name).read_bytes())
    (part / "checkpoints").mkdir()
    (whole / "checkpoints" / "step-000003").rename(part / "checkpoints" / "step-000003")
    run_in_process(on_policy, **served(stub, flags, tmp_path, resume=True))
    assert_equal_runs(part, whole)


def test_a_directory_that_the_server_does_not_see(rollouts, tmp_path):
    stub, flags = rollouts
    stub.deaf = 0
    with pytest.raises(UsageError, match=r"does not load what is in .*weights"):
        run_in_process(on_policy, **served(stub, flags, tmp_path))


def test_stale_weights_end_the_run_with_a_checkpoint(rollouts, tmp_path):
    stub, flags = rollouts
    stub.deaf = 3
    words = flags_of(served(stub, flags, tmp_path, max_steps=40, learning_rate=0.1))
    output = tmp_path / "out.txt"
    assert ForkedScript("on_policy.py", words, tmp_path, output).wait() == 2
    assert "nats apart" in output.read_text() and "Traceback" not in output.read_text()
    (checkpoint,) = (tmp_path / "served" / "checkpoints").iterdir()
    assert f"stopped after step {int(checkpoint.name[5:])};" in output.read_text()
    assert 2 <= int(checkpoint.name[5:]) < 20


def flags_of(values: dict[str, Any]) -> list[str]:
    named = {f"--{name.replace('_', '-')}": value for name, value in values.items()}
    return [str(w) for name, value in named.items() for w in (name, value) if w is not True]


def broken(stub: StudentStub, at: int, times: int) -> Callable[[dict, int, Any], Any]:
    """Connections of `times` requests for text break from the `at`th on; then the server starts
    anew, with its first weights."""
    count = [0]

    def trouble(body: dict[str, Any], n: int, reply: Any) -> Any:
        if "prompt_logprobs" not in body:
            count[0] += 1
            if at <= count[0] < at + times:
                stub.restart()
                raise ConnectionError
        if body["model"] == "student" and stub.adapted is None:
            return 404, b"{}"
        return reply

    return trouble


@pytest.mark.parametrize("lora", [0, 64])
def test_a_server_that_comes_back_gets_its_weights_again(lora, rollouts, tmp_path):
    stub, flags = rollouts
    flags |= {"lora_rank": lora}
    run_in_process(on_policy, **flags)
    stub.trouble = broken(stub, 2 * flags["batch_size"] + 2, 3)
    run_in_process(on_policy, **served(stub, flags, tmp_path))
    assert_equal_runs(tmp_path / "served", tmp_path / "run")
    assert stub.loads == 1 + 4 + 1


@pytest.mark.parametrize("which", ["rollouts", "teacher"])
def test_a_server_that_stays_away_leaves_a_checkpoint(which, rollouts, tmp_path):
    """The run ends with one sentence; continued, it ends as an undisturbed one."""
    stub, flags = rollouts
    if which == "rollouts":
        flags = served(stub, flags, tmp_path)
    else:
        teacher = StudentStub(flags.pop("teacher"), stub.tokenizer)
        threading.Thread(target=teacher.serve_forever, args=[0.01], daemon=True).start()
        flags |= {"api_base_url": teacher.url, "api_model": "served", "api_top_logprobs": 262}
        stub = teacher
    run_in_process(on_policy, **flags | {"output_dir": str(tmp_path / "whole")})
    seen, away = [], [True]

    def trouble(body: dict[str, Any], n: int, reply: Any) -> Any:
        training = "seed" in body if which == "rollouts" else body.get("temperature") == 1.0
        if training and isinstance(body["prompt"][0], int if which == "rollouts" else list):
            seen.append(body)
            if away[0] and len(seen) > limit:
                return 401, b"{}"
        return reply

    limit = 3 * flags["batch_size"] + 1 if which == "rollouts" else 6
    stub.trouble = trouble
    words = flags_of(flags | {"output_dir": str(tmp_path / "part")})
    output = tmp_path / "out.txt"
    assert ForkedScript("on_policy.py", words, tmp_path, output).wait() == 2, output.read_text()
    text = output.read_text()
    assert "Traceback" not in text and "wants a key" in text and "--resume continues" in text
    (checkpoint,) = (tmp_path / "part" / "checkpoints").iterdir()
    assert int(checkpoint.name[5:]) in ({3} if which == "rollouts" else {1, 2, 3})
    away[0] = False
    assert ForkedScript("on_policy.py", [*words, "--resume"], tmp_path, output).wait() == 0
    assert_equal_runs(tmp_path / "part", tmp_path / "whole")
    stub.trouble = lambda body, n, reply: reply


@pytest.mark.parametrize("lora", [0, 64])
def test_two_processes_share_the_asking(lora, rollouts, tmp_path):
    stub, flags = rollouts
    flags |= {"lora_rank": lora}
    run_in_process(on_policy, **served(stub, flags, tmp_path, output_dir=str(tmp_path / "one")))
    asked = len([b for b in stub.bodies if "prompt_logprobs" not in b])
    words = flags_of(served(stub, flags, tmp_path))
    assert run_forked("on_policy.py", *words, cwd=tmp_path, processes=2).returncode == 0
    assert_equal_runs(tmp_path / "served", tmp_path / "one")
    texts = [b for b in stub.bodies if "prompt_logprobs" not in b]
    assert len(texts) == 2 * asked
    assert {b["model"] for b in texts} == {"student" if lora else "served"}


REFUSED = [
    ({"rollout_url": "http://h/v1"}, "need each other"),
    ({"rollout_weights": "w"}, "need each other"),
    ({"rollout_url": "h", "rollout_weights": "w"}, "--rollout-url must look like https://HOST/v1"),
    (
        {"rollout_url": "http://h/v1", "rollout_weights": "w", "mix": 0.0},
        "is for steps on own text",
    ),
]


@pytest.mark.parametrize(("flags", "words"), REFUSED)
def test_refused_flags(flags, words):
    with pytest.raises(UsageError, match=words):
        args = on_policy.Arguments(**flags)
        common.check_arguments(args)
        args.objective()
