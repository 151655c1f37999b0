"""sequence_level.py: its loss, what it selects, what it learns, and what a kill costs: nothing."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from conftest import run_in_process, run_script, wait_for
from forked import ForkedScript
from safetensors.torch import load_file
from torch.nn import functional as F

import common
import sequence_level
import token_level
from common import Completion, Conversation, Example, Pair, Prompt, Tokens, UsageError

FLAGS = {
    "max_rows": 64, "batch_size": 8, "micro_batch_size": 4, "max_steps": 12, "warmup_steps": 2,
    "eval_size": 8, "eval_steps": 0, "save_steps": 4, "generation_batch_size": 4,
}  # fmt: skip
WORDS = [w for name, value in FLAGS.items() for w in (f"--{name.replace('_', '-')}", str(value))]


def in_process(script: ModuleType, output_dir: Path, **changes: object) -> Path:
    cache = str(output_dir.parent / "cache")
    run_in_process(
        script, **{"cache_dir": cache, **FLAGS, "output_dir": str(output_dir), **changes}
    )
    return output_dir


def assert_same_student(run: Path, expected: Path) -> None:
    ours, theirs = (load_file(r / "final" / "model.safetensors") for r in (run, expected))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())


def results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())


def text_lines(directory: Path) -> list[dict]:
    """The lines of the cached teacher text, in the order in which they were written."""
    files = sorted((directory / "text").glob("*.jsonl"))
    return [json.loads(line) for f in files for line in f.read_text().splitlines()]


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    """The directory of a run that a user starts and nothing interrupts; the cache is beside it."""
    return run_once(tmp_path_factory.mktemp)


@functools.cache  # test_api.py imports the fixture, and pytest would run it again there
def run_once(make_directory: Callable[[str], Path]) -> Path:
    directory = make_directory("whole_run")
    flags = (*WORDS, "--output-dir", "run", "--cache-dir", "cache")
    done = run_script("sequence_level.py", *flags, cwd=directory)
    assert done.returncode == 0, done.stderr
    assert "training text: 64 of 64 answers kept (0 cut short, 0 too long, 0 empty, 0 du" in (
        done.stdout
    )
    return directory / "run"


# --------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_gradient_is_that_of_plain_cross_entropy(kind, tiny):
    """In float64 (norms stay float32), against automatic differentiation of plain logits."""
    student = tiny(kind)
    student.model.double()
    student.compute_dtype = torch.float64
    examples = [Tokens([5, 9, 17, 30, 1], [2, 3, 4]), Tokens([7, 8, 40, 41, 42, 43, 1], [3, 6])]
    batch = common.collate(examples, torch.device("cpu"))
    loss, detached = sequence_level.SequenceLevelLoss(student)(batch)
    loss.backward()
    assert detached == loss and not detached.requires_grad
    got = {n: p.grad.clone() for n, p in student.model.named_parameters()}
    student.model.zero_grad()
    plain = 0.0
    for ids, targets in examples:
        logits = student.model(input_ids=torch.tensor([ids])).logits[0]
        wanted = torch.tensor([ids[i] for i in targets])
        rows = logits[[i - 1 for i in targets], : student.vocabulary].double()
        plain = plain + F.cross_entropy(rows, wanted, reduction="sum")
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    for name, parameter in student.model.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------ the selection


class Scripted:
    """A teacher without weights that returns given answers and notes what it was asked."""

    def __init__(self, answers: list[Completion]) -> None:
        self.answers, self.asked = answers, []

    def complete(self, prompts: list[Prompt], args: Any, **sampling: Any) -> list[Completion]:
        self.asked.append(([p.conversation.source for p in prompts], sampling))
        return self.answers


def selected(tiny, talks: list[Conversation], answers: list[Completion], **flags: object):
    """The examples that are kept, the counts, and what the teacher was asked."""
    pair = Pair(tiny("llama"), Scripted(answers))
    prompts = common.tokenize_prompts(talks, pair, 100)
    args = sequence_level.Arguments(**flags)
    return *sequence_level.training_text(talks, prompts, pair, args), pair.teacher.asked


def talk(word: str, *references: str) -> Conversation:
    return Conversation([{"role": "user", "content": word}], None, list(references), f"row {word}")


def rows(examples: list[Example]) -> list[tuple[str, str]]:
    return [(e.prompt.conversation.source, e.text) for e in examples]


def test_what_is_selected(tiny):
    talks = [talk("a", "A B"), talk("b", "B"), talk("a", "A B")]
    said = [
        ("A B", True), ("A  B ", True),  # equal words, another text: kept
        ("B", False), ("<think>\nwhat?\n</think>\n\n", True),  # cut; empty but for its reasoning
        ("A B", True), ("A " * 300, True),  # the first row's answer again, too long
    ]  # fmt: skip
    answers = [Completion(text, finished, 3, None) for text, finished in said]
    flags = {"samples_per_prompt": 2, "sampling_temperature": 0.7, "top_p": 0.9, "max_length": 200}
    examples, counts, asked = selected(tiny, talks, answers, **flags)
    assert asked == [
        (["row a", "row a", "row b", "row b", "row a", "row a"],
         {"temperature": 0.7, "top_p": 0.9, "purpose": "training text"})
    ]  # fmt: skip
    assert counts == {
        "written": 6, "kept": 2, "cut_short": 1, "too_long": 1, "empty": 1, "duplicates": 1,
    }  # fmt: skip
    assert rows(examples) == [("row a", "A B"), ("row a", "A  B ")]
    exact = len(examples[0].student.ids)  # as long as --max-length: fits
    for limit, kept in ((exact, 1), (exact - 1, 0)):
        flags = {"max_length": limit}
        if kept:
            assert len(selected(tiny, talks[:1], answers[:1], **flags)[0]) == 1
        else:
            with pytest.raises(UsageError, match="1 too long"):
                selected(tiny, talks[:1], answers[:1], **flags)


def test_one_question_in_two_modes_of_a_template(tiny):
    """Their prompts differ, so equal answers are no repetition."""
    student = tiny("llama")
    answers = [Completion("A", True, 3, None)] * 3
    prompts = [common.Prompt(talk("a"), ids, ids) for ids in ([5, 6], [5, 7], [5, 6])]
    pair = common.Pair(student, None)
    examples = common.completion_examples(prompts, answers, pair, 900)
    kept, counts = sequence_level.select(examples, answers, sequence_level.Arguments())
    assert len(kept) == 2 and counts["duplicates"] == 1


def test_keep_matching_checks_the_training_references(tmp_path):
    """A reference in which the grader finds nothing could match no answer."""
    lines = [{"prompt": "a", "references": ["1"]}, {"prompt": "b", "references": ["none"]}]
    common.write_json_lines(tmp_path / "rows.jsonl", lines)
    common.write_json_lines(tmp_path / "eval.jsonl", lines[:1])
    flags = {"dataset": str(tmp_path / "rows.jsonl"), "eval_dataset": str(tmp_path / "eval.jsonl")}
    flags |= {"keep_matching": True, "grader": "number", "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UsageError, match=r"rows.jsonl:2: --grader number finds nothing in 'none'"):
        run_in_process(sequence_level, **flags, output_dir=str(tmp_path / "run"))


def test_answers_that_match_a_reference(tiny):
    talks = [talk(w, "A B", "C") for w in "vwxyz"]
    said = ["C", "B A", "<think>\nA or C?\n</think>\n\nA  B", "<think>C</think>D", "A B C"]
    answers = [Completion(text, True, 3, None) for text in said]
    examples, counts, _ = selected(tiny, talks, answers, keep_matching=True)
    assert [e.text for e in examples] == [said[0], said[2]]
    assert counts["not_matching"] == 3
    with pytest.raises(UsageError, match=r"nothing is left .* 0 of 5 answers kept .* 5 not match"):
        selected(tiny, talks, [Completion("E", True, 1, None)] * 5, keep_matching=True)


def test_only_answers_that_are_learned_from_have_duplicates(tiny):
    """The same answer to another prompt, or one that was cut before, is no duplicate."""
    talks = [talk("a"), talk("b"), talk("a")]
    answers = [Completion("A", finished, 1, None) for finished in (False, True, True)]
    examples, _, _ = selected(tiny, talks, answers)
    assert rows(examples) == [("row b", "A"), ("row a", "A")]


def test_completions_are_never_partial(tiny, tmp_path):
    """A write that fails leaves the file that was there."""
    answers = [Completion("A", True, 1, None), Completion("B", True, 1, None)]
    examples, _, _ = selected(tiny, [talk("a", "A"), talk("b")], answers)
    file = tmp_path / "completions.jsonl"
    sequence_level.write_completions(file, examples)
    written = file.read_text()
    assert [json.loads(line) for line in written.splitlines()] == [
        {"messages": [{"role": "user", "content": word},
                      {"role": "assistant", "content": word.upper()}], **more}
        for word, more in (("a", {"references": ["A"]}), ("b", {}))
    ]  # fmt: skip
    broken = dataclasses.replace(examples[1], text=b"no text")
    with pytest.raises(TypeError):
        sequence_level.write_completions(file, [examples[0], broken])
    assert file.read_text() == written


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--samples-per-prompt 2", "one answer many times"),
        ("--samples-per-prompt 0", "--samples-per-prompt must be above 0"),
        ("--keep-matching --completions dataset", "select from the teacher's text"),
        ("--api-model m", "--api-model needs --api-base-url"),
        ("--api-greedy-temperature 1", "--api-greedy-temperature needs --api-base-url"),
        ("--api-base-url http://h/v1", "needs --api-model"),
        ("--api-base-url http://[::1/v1 --api-model m", "must look like https://HOST/v1"),
        ("--api-base-url http://h/v1 --api-model m --api-max-failures 10", "is a share, from 0"),
        ("--api-base-url http://h/v1 --api-model m --teacher t", "--teacher is for a teacher"),
        ("--api-base-url http://h/v1 --api-model m --teacher-dtype float16", "--teacher-dtype is"),
        ("--api-base-url h/v1 --api-model m", "must look like https://HOST/v1"),
        ("--api-base-url http://:secret@h/v1 --api-model m", "a key belongs in the environment"),
        ("--api-base-url http://h/v1?key=secret --api-model m", "a key belongs in the environ"),
        ("--sampling-temperature -1", "--sampling-temperature must be"),
        ("--dataset bare.jsonl --keep-matching", "bare.jsonl:3: no reference that --keep-match"),
    ],
)
def test_wrong_input_ends_with_one_sentence(flags, words, tmp_path, monkeypatch, capsys):
    rows = [{"prompt": "river", "reference": "R"}, {"prompt": "held out"}, {"prompt": "seven"}]
    (tmp_path / "bare.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sequence_level.py", "--eval-size", "1", *flags.split()])
    monkeypatch.setenv("OPENAI_API_KEY", "")
    AcceleratorState._reset_state()
    PartialState._reset_state()
    with pytest.raises(SystemExit) as ended:
        common.launch(sequence_level.main, sequence_level.Arguments, "")
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.count("\n") == 1
    assert "secret" not in said
    assert [p.name for p in tmp_path.iterdir()] == ["bare.jsonl"]


def test_temperature_is_another_name_for_the_sampling_temperature(capsys):
    """Help shows one flag with two names, and nothing speaks of a softmax temperature."""

    def parse(*words: str) -> sequence_level.Arguments:
        return common.parse_arguments(sequence_level.Arguments, "", list(words))

    assert parse("--temperature", "0.6").sampling_temperature == 0.6
    assert parse("--sampling-temperature", "0.6") == parse("--temperature", "0.6")
    assert "temperature" not in vars(parse("--temperature", "0.6"))
    with pytest.raises(SystemExit):
        parse("--help")
    shown = capsys.readouterr().out
    assert "--sampling-temperature N, --temperature N" in shown and "softmax" not in shown


# ------------------------------------------------------------------------------- as a user runs it


def test_the_text_is_that_of_the_other_scripts(whole_run, tmp_path):
    """Equal flags find it: token_level adds its evaluation's samples and nothing else."""
    before = text_lines(whole_run.parent / "cache")
    in_process(
        token_level, tmp_path / "token", cache_dir=str(whole_run.parent / "cache"), max_steps=2,
        sampling_temperature=sequence_level.Arguments.sampling_temperature,
    )  # fmt: skip
    assert text_lines(whole_run.parent / "cache") == before


def test_the_teacher_is_freed_before_training(tmp_path, monkeypatch):
    loaded: list[str] = []
    total_steps = common.total_steps

    def look(*args: Any) -> int:
        gc.collect()
        models = (x for x in gc.get_objects() if isinstance(x, common.LanguageModel) and x.loaded)
        loaded.extend(model.name for model in models if str(tmp_path) in model.name)
        return total_steps(*args)

    monkeypatch.setattr(common, "total_steps", look)
    models = {}
    for role in ("teacher", "student"):
        models[role] = str(tmp_path / role)
        shutil.copytree(common.DATA / role, models[role])
    in_process(sequence_level, tmp_path / "run", max_rows=8, max_steps=1, **models)
    assert loaded == [models["student"]]


def test_more_samples_begin_with_the_one_that_others_find(tmp_path):
    """Of n samples the first is that of n = 1; the rest are others, and are selected from."""
    token = in_process(token_level, tmp_path / "token", max_steps=2, max_rows=24)
    first = {line["key"]: line for line in text_lines(tmp_path / "cache")}
    flags = {"max_steps": 2, "max_rows": 24, "sampling_temperature": 1.0}
    run = in_process(sequence_level, tmp_path / "run", samples_per_prompt=3, **flags)
    assert (token / "results.json").exists()
    lines = {line["key"]: line for line in text_lines(tmp_path / "cache")}
    assert lines.items() >= first.items()
    new = [line for key, line in lines.items() if key not in first]
    written = results(run)["training_text"]
    assert written["written"] == 72 and len(new) == 48
    rows = common.load_conversations(str(run / "completions.jsonl"))
    texts: dict[str, set[str]] = {}
    for row in rows:
        texts.setdefault(str(row.messages), set()).add(row.response["content"])
    assert len(rows) == written["kept"] == sum(map(len, texts.values()))
    assert written["duplicates"] > 0 and {len(t) for t in texts.values()} == {1, 2, 3}


def test_what_was_learned_from_is_a_data_set(whole_run, tmp_path):
    """completions.jsonl trains the same student again, and any other script's.

    On questions without earlier turns: of those a data set's own answers are targets too.
    """
    asked = (common.DATA / "train.jsonl").read_text().splitlines(keepends=True)
    single = [line for line in asked if line.count('"role"') == 2][:48]
    (tmp_path / "single.jsonl").write_text("".join(single))
    cache = str(whole_run.parent / "cache")
    flags = {"eval_dataset": str(common.DATA / "eval.jsonl"), "cache_dir": cache, "max_rows": 0}
    run = in_process(
        sequence_level, tmp_path / "run", dataset=str(tmp_path / "single.jsonl"), **flags
    )
    rows = common.load_conversations(str(run / "completions.jsonl"))
    original = common.load_conversations(str(tmp_path / "single.jsonl"))
    assert [r.messages for r in rows] == [r.messages for r in original]
    assert [r.references for r in rows] == [r.references for r in original]
    assert (
        15 < sum(r.response["content"] in r.references for r in rows) < 45
    )  # the teacher's, errors and all
    flags |= {"dataset": str(run / "completions.jsonl"), "completions": "dataset"}
    again = in_process(sequence_level, tmp_path / "again", **flags)
    assert_same_student(again, run)
    assert not (again / "completions.jsonl").exists()
    assert results(again)["training_text"] == {}
    token = in_process(token_level, tmp_path / "token", **flags | {"max_steps": 2})
    steps = [json.loads(x) for x in (token / "metrics.jsonl").read_text().splitlines()]
    assert 0 < steps[1]["train/kl"] < 3


def test_student_with_another_tokenizer_learns(tmp_path):
    """80 steps on greedy text: better on held-out words in everything that can be compared."""
    run_in_process(
        sequence_level, student=str(common.DATA / "student_other_tokenizer"), max_rows=1280,
        epochs=4.0, eval_size=200, eval_steps=0, output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
    )  # fmt: skip
    before, after = (results(tmp_path / "run")[name] for name in ("before", "after"))
    assert "kl_to_teacher" not in after
    assert after["bits_per_byte"] < 0.9 * before["bits_per_byte"]
    assert after["error_rate"] < 0.97 * before["error_rate"]
    assert after["exact_match"] > before["exact_match"]
    assert after["cut_off"] == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 80 and sum(losses[-10:]) < 0.8 * sum(losses[:10])


# -------------------------------------------------------------------------------------- kills


def test_killed_while_writing_and_while_training(whole_run, tmp_path):
    """No recorded answer is written again, and the student equals that of the whole run."""
    cache, run = tmp_path / "cache" / "text", tmp_path / "run"

    def begin() -> ForkedScript:
        flags = [*WORDS, "--output-dir", "run", "--cache-dir", "cache", "--resume"]
        return ForkedScript("sequence_level.py", flags, tmp_path, tmp_path / "out.txt")

    def written() -> bytes:
        return b"".join(p.read_bytes() for p in sorted(cache.glob("*.jsonl")))

    def kill_when(moment: Callable[[], bool]) -> None:
        process = begin()
        came = wait_for(process, moment)
        process.kill()
        process.wait()
        assert came or moment(), (tmp_path / "out.txt").read_text()

    kill_when(lambda: written().count(b"\n") >= 12)
    recorded = written()
    recorded = recorded[: recorded.rfind(b"\n") + 1]
    assert 12 <= recorded.count(b"\n") < 64
    kill_when((run / "checkpoints" / "step-000004" / "state.json").exists)
    assert written().startswith(recorded) or recorded in written()
    assert begin().wait() == 0, (tmp_path / "out.txt").read_text()
    caches = (tmp_path / "cache", whole_run.parent / "cache")
    ours, theirs = (sorted(text_lines(cache), key=str) for cache in caches)
    assert ours == theirs
    assert_same_student(run, whole_run)
    ours, theirs = ((r / "completions.jsonl").read_text() for r in (run, whole_run))
    assert ours == theirs
    cut, whole = results(run), results(whole_run)
    assert cut["after"] == whole["after"] and cut["training_text"] == whole["training_text"]
