"""The teacher's states on disk: the same bits every time, whole after a cut, no backbone needed."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_model

import common
import token_level
from common import Example, KeptTeacher, LanguageModel, TeacherStates, Tokens, UsageError

KINDS = ("llama", "qwen2", "gemma2", "gpt2")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several batches even of a tiny text."""
    batches = functools.partial(common.length_batches, tokens=64)
    monkeypatch.setattr(common, "length_batches", batches)


@pytest.fixture
def examples(tokenizer) -> list[Example]:
    pick = random.Random(0)
    rows = []
    for i in range(30):
        ids = [pick.randrange(5, len(tokenizer)) for _ in range(pick.randrange(4, 20))]
        tokens = Tokens(ids, list(range(pick.randrange(1, 4), len(ids))))
        rows.append(Example(tokens, tokens, f"row {i}"))
    return rows


def arguments(directory: Path, **changes: object) -> token_level.Arguments:
    options = {"cache_dir": str(directory), "cache_teacher": True, **changes}
    return token_level.Arguments(**options)


def states_of(teacher, examples, directory: Path) -> TeacherStates:
    return TeacherStates(teacher, examples, arguments(directory), Accelerator(), "some text")


def stop_after(monkeypatch, calls: int) -> None:
    """The run is cut when the teacher has done this many batches."""
    whole, left = common.teacher_states, iter(range(calls))

    def cut(*inputs):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return whole(*inputs)

    monkeypatch.setattr(common, "teacher_states", cut)


def the_file(directory: Path) -> Path:
    (path,) = (directory / "states").glob("*.bin")
    return path


# -------------------------------------------------------------------------------- the states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teachers_own_bits_come_back(tiny, examples, tmp_path, dtype):
    live = tiny("llama")
    teacher = LanguageModel("llama", live.model.to(dtype), live.tokenizer, dtype, lambda: "llama")
    states = states_of(teacher, examples, tmp_path)
    assert len(states.batches) > 3
    for batch in states.batches:
        theirs = common.collate([e.teacher for e in batch], teacher.device)
        expected = common.teacher_states(teacher, theirs)
        assert expected.dtype == dtype
        assert states(batch).view(torch.uint8).equal(expected.view(torch.uint8))
    assert the_file(tmp_path).stat().st_size == sum(len(e.teacher.targets) for e in examples) * (
        32 * dtype.itemsize
    )


def test_any_grouping_agrees_with_the_live_teacher(tiny, examples, tmp_path):
    teacher = tiny("gemma2")
    kept = states_of(teacher, examples, tmp_path)
    live = TeacherStates(
        teacher, examples, token_level.Arguments(), Accelerator(), "the same, live"
    )
    group = random.Random(1).sample(examples, 7)
    torch.testing.assert_close(kept(group), live(group), rtol=1e-5, atol=1e-5)
    assert kept([]).shape == live([]).shape == (0, 32)


def test_a_cut_is_completed_and_equal(tiny, examples, tmp_path, monkeypatch):
    teacher = tiny("llama")
    states_of(teacher, examples, tmp_path / "uncut")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            states_of(teacher, examples, tmp_path / "cut")
    path = the_file(tmp_path / "cut")
    record = path.with_suffix(".done")
    assert len(record.read_text().splitlines()) == 2
    record.write_text(record.read_text() + "2 17")  # a line that the cut has torn
    with monkeypatch.context() as patch:
        batches = len(states_of(teacher, examples, tmp_path / "uncut").batches)
        stop_after(patch, batches - 2)
        states_of(teacher, examples, tmp_path / "cut")
    assert path.read_bytes() == the_file(tmp_path / "uncut").read_bytes()
    assert len(record.read_text().splitlines()) == batches


def test_a_disk_too_small_is_an_error_before_anything_is_written(
    tiny, examples, tmp_path, monkeypatch, capsys
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UsageError, match="--cache-dir"):
        states_of(tiny("llama"), examples, tmp_path)
    assert not list(tmp_path.rglob("*.bin")) and not list(tmp_path.rglob("*.done"))
    assert "128 bytes a token" in capsys.readouterr().out


def short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def unreadable(path: Path) -> None:
    path.with_suffix(".done").write_text("nonsense\n")


@pytest.mark.parametrize("damage", [short, flipped, unreadable])
def test_a_damaged_file_is_named_and_deleting_it_helps(tiny, examples, tmp_path, damage):
    teacher = tiny("llama")
    states_of(teacher, examples, tmp_path)
    path = the_file(tmp_path)
    whole = path.read_bytes()
    damage(path)
    with pytest.raises(UsageError, match=f"{path}.*delete the file"):
        states_of(teacher, examples, tmp_path)
    path.unlink()
    states_of(teacher, examples, tmp_path)
    assert path.read_bytes() == whole


def test_the_key_is_the_teacher_its_dtype_and_the_text(tiny, examples, tmp_path):
    teacher = tiny("llama")
    half = LanguageModel(
        "llama", teacher.model, teacher.tokenizer, torch.bfloat16, lambda: teacher.digest
    )
    tokens = examples[3].teacher
    fewer = examples.copy()
    fewer[3] = examples[3]._replace(teacher=tokens._replace(targets=tokens.targets[1:]))
    other = examples.copy()
    other[3] = examples[3]._replace(teacher=tokens._replace(ids=[7, *tokens.ids[1:]]))
    student = examples.copy()
    student[3] = examples[3]._replace(student=Tokens([7, *tokens.ids], tokens.targets))
    cases = [(teacher, examples), (tiny("llama", 1), examples), (half, examples)]
    cases += [(teacher, fewer), (teacher, other)]
    paths = {states_of(*case, tmp_path).path for case in cases}
    assert len(paths) == len(cases)
    assert states_of(teacher, student, tmp_path).path in paths


# ---------------------------------------------------------------------- the head, and the digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_of_a_teacher_is_what_it_has(kind, dtype, tokenizer, tmp_path):
    model = tiny_model(kind, len(tokenizer.get_vocab()) + 8).to(dtype)
    eager = LanguageModel(kind, model, tokenizer, dtype, lambda: "digest")
    loads = []

    def load() -> LanguageModel:
        loads.append(1)
        return eager

    for time in range(2):
        kept = KeptTeacher(kind, tokenizer, dtype, "digest", eager.device, tmp_path, load)
        ours, theirs = kept.head(), eager.head()
        assert torch.equal(ours.weight, theirs.weight) and ours.weight.dtype == dtype
        assert (ours.bias is None) == (theirs.bias is None)
        assert ours[2:] == theirs[2:]
        assert (kept.end_ids, kept.max_positions, kept.vocabulary) == (
            eager.end_ids, eager.max_positions, eager.vocabulary,
        )  # fmt: skip
        assert kept.path.exists() == bool(time)  # nothing is written before it is asked for
        kept.keep()
    assert len(loads) == 1
    short(kept.path)
    with pytest.raises(UsageError, match="delete the file"):
        KeptTeacher(kind, tokenizer, dtype, "digest", eager.device, tmp_path, load)


def test_a_digest_follows_the_files_and_is_remembered(tokenizer, tmp_path, monkeypatch):
    name, cache = tmp_path / "model", tmp_path / "cache"
    tiny_model("llama", 50).save_pretrained(name)
    first = common.digest_of_model(str(name), "main", cache)
    assert not cache.exists()  # asking is free of traces
    common.remember_digests(cache)
    common._HASHED.clear()  # as in the next process
    with monkeypatch.context() as patch:
        patch.setattr(common.hashlib, "file_digest", None)
        assert common.digest_of_model(str(name), "main", cache) == first
    (cache / "digests.json").write_text("nonsense")
    assert common.digest_of_model(str(name), "main", cache) == first
    tiny_model("llama", 50, seed=1).save_pretrained(name)
    assert common.digest_of_model(str(name), "main", cache) != first


def test_a_hub_model_is_named_by_its_commit(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    digests = []
    for commit in ("0" * 40, "1" * 40):
        repository = tmp_path / "models--some--model"
        tiny_model("llama", 50).config.save_pretrained(repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / "main").write_text(commit)
        digests.append(common.digest_of_model("some/model", "main", tmp_path))
    assert len(set(digests)) == 2
    with pytest.raises(UsageError, match="some/other"):
        common.digest_of_model("some/other", "main", tmp_path)


# ---------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """Tiny teacher and student directories, and a text to learn."""
    directory = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("teacher", "other_teacher", "student")):
        model = tiny_model("llama", len(tokenizer.get_vocab()), seed)
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    rows = common.load_conversations(str(common.DATA / "eval.jsonl"), max_rows=60)
    lines = [
        json.dumps({"prompt": row.messages[-1]["content"], "response": row.references[0]})
        for row in rows
    ]
    (directory / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return directory


@contextlib.contextmanager
def no_backbone_of(name: Path, monkeypatch):
    """Loading this model fails."""
    load = common.AutoModelForCausalLM.from_pretrained

    def refuse(asked, *rest, **more):
        assert asked != str(name), "the teacher's backbone is loaded"
        return load(asked, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(common.AutoModelForCausalLM, "from_pretrained", refuse)
        yield


def train(place: Path, output: Path, cache: Path, **changes: object) -> list[float]:
    """Losses of a short run of token_level.py in this process."""
    options = {
        "teacher": str(place / "teacher"), "student": str(place / "student"),
        "dataset": str(place / "text.jsonl"), "eval_size": 6, "completions": "dataset",
        "max_new_tokens": 8, "batch_size": 12, "micro_batch_size": 4, "max_steps": 5,
        "warmup_steps": 1, "logging_steps": 1, "output_dir": str(output),
    }  # fmt: skip
    token_level.main(arguments(cache, **{**options, **changes}))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]


def test_later_runs_are_bit_equal_and_load_no_backbone(place, tmp_path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    first = train(place, tmp_path / "1", cache)
    said = capsys.readouterr().out
    assert "bytes a token" in said and "training text: teacher states from the cache" in said
    files = {p: p.stat().st_mtime_ns for p in (cache / "states").glob("*.*") if p.stat().st_size}
    with no_backbone_of(place / "teacher", monkeypatch):
        assert train(place, tmp_path / "2", cache) == first
        said = capsys.readouterr().out
        assert said.count("teacher states from the cache; its backbone is not loaded") == 2
        for i, changes in enumerate(({"temperature": 2.0}, {"kl": "jsd"}, {"batch_size": 7})):
            assert train(place, tmp_path / f"3{i}", cache, **changes) != first
        with pytest.raises(AssertionError, match="backbone"):
            train(place, tmp_path / "4", cache, max_length=10)  # another text
    assert files == {p: p.stat().st_mtime_ns for p in files}
    live = train(place, tmp_path / "5", cache, cache_teacher=False)
    assert "cache; " not in capsys.readouterr().out.rpartition("run directory")[2]
    assert live[0] == pytest.approx(first[0], rel=1e-5)
    other = train(place, tmp_path / "6", cache, teacher=str(place / "other_teacher"))
    assert other[0] != pytest.approx(first[0], rel=1e-3)


def test_the_state_file_serves_what_made_it(place, tmp_path):
    """Final weights, not only losses, are those of the run that filled the cache."""
    for name in ("1", "2"):
        train(place, tmp_path / name, tmp_path / "cache", teacher_dtype="bfloat16")
    one, two = (tmp_path / n / "final" / "model.safetensors" for n in ("1", "2"))
    assert one.read_bytes() == two.read_bytes()
