"""The teacher's hidden states on disk: always the same bits, whole after a kill, no backbone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import random
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import example_of, run_in_process, tiny_model
from safetensors.torch import load_file
from torch import Tensor

import common
import token_level
from common import Example, LanguageModel, TeacherHiddenStates, Tokens, UsageError

KINDS = ("llama", "qwen2", "gemma2", "gpt2")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Several batches even of a tiny text."""
    batches = functools.partial(common.length_batches, tokens=64)
    monkeypatch.setattr(common, "length_batches", batches)


@pytest.fixture
def examples(tokenizer) -> list[Example]:
    pick = random.Random(0)
    examples = []
    for i in range(30):
        ids = [pick.randrange(5, len(tokenizer)) for _ in range(pick.randrange(4, 20))]
        examples.append(example_of(Tokens(ids, list(range(pick.randrange(1, 4), len(ids)))), i))
    return examples


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """The number of examples in each batch that the teacher reads."""
    sizes: list[int] = []
    real = common.teacher_hidden_states

    def counted(teacher, examples):
        sizes.append(len(examples))
        return real(teacher, examples)

    monkeypatch.setattr(common, "teacher_hidden_states", counted)
    return sizes


def cached(teacher: LanguageModel, examples: list[Example], directory: Path) -> TeacherHiddenStates:
    teacher.states_dir = directory
    return TeacherHiddenStates(teacher, examples, "some text")


def batches_of(examples: list[Example]) -> list[list[Example]]:
    return common.length_batches(examples, lambda e: len(e.teacher.ids))


def files(directory: Path) -> dict[str, bytes]:
    """The content of every file of hidden states; a name ends in .part while it is written."""
    return {path.name: path.read_bytes() for path in sorted(directory.glob("states-*"))}


def tensors(directory: Path) -> dict[str, Tensor]:
    """The hidden states of each example, by the name that they have in its file."""
    stored = [load_file(path) for path in sorted(directory.glob("states-*.safetensors"))]
    together = {name: tensor for file in stored for name, tensor in file.items()}
    assert len(together) == sum(map(len, stored))  # none is in two files
    return together


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


# -------------------------------------------------------------------------- the hidden states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teachers_own_bits_come_back(tiny, examples, tmp_path, dtype):
    """One file for each batch, with a tensor for each example in the teacher's dtype."""
    teacher = tiny("llama", dtype=dtype)
    states = cached(teacher, examples, tmp_path)
    assert len(batches_of(examples)) > 3
    for batch in batches_of(examples):
        expected = common.teacher_hidden_states(teacher, batch)
        assert expected.dtype == states(batch).dtype == dtype
        assert states(batch).view(torch.uint8).equal(expected.view(torch.uint8))
    assert len(files(tmp_path)) == len(batches_of(examples))
    stored = tensors(tmp_path).values()
    assert sorted(map(len, stored)) == sorted(len(e.teacher.targets) for e in examples)
    assert {(part.shape[1], part.dtype) for part in stored} == {(32, dtype)}


def test_any_grouping_agrees_with_the_live_teacher(tiny, examples, tmp_path):
    teacher = tiny("gemma2")
    states = cached(teacher, examples, tmp_path)
    for count in (1, 7, 30):
        group = random.Random(count).sample(examples, count)
        live = states(group, live=True)
        assert live.equal(common.teacher_hidden_states(teacher, group))
        torch.testing.assert_close(states(group), live, rtol=1e-5, atol=1e-5)
        assert states(group).equal(torch.cat([states([e]) for e in group]))
    assert states([]).shape == states([], live=True).shape == (0, 32)


def test_without_a_directory_the_teacher_is_live(tiny, examples):
    teacher = tiny("llama")
    states = TeacherHiddenStates(teacher, examples, "some text")
    assert states(examples[:3]).equal(common.teacher_hidden_states(teacher, examples[:3]))


def test_a_killed_fill_is_completed_and_equal(tiny, examples, tmp_path, monkeypatch, computed):
    """Bit for bit what an uninterrupted run writes, and no whole batch is computed twice."""
    teacher = tiny("llama")
    cached(teacher, examples, tmp_path / "uncut")
    whole, batches = files(tmp_path / "uncut"), batches_of(examples)
    assert len(computed) == len(whole) == len(batches) > 3
    computed.clear()
    saved, save = [], common.save_tensors

    def interrupt(path, **tensors):
        """Die in the middle of the third batch's file, which is left half written."""
        saved.append(path.name)
        if len(saved) == 4:  # the head is the first
            path.with_name(path.name + ".part").write_bytes(b"half")
            raise KeyboardInterrupt
        save(path, **tensors)

    with monkeypatch.context() as patch:
        patch.setattr(common, "save_tensors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cached(teacher, examples, tmp_path / "cut")
    assert [name.endswith(".part") for name in files(tmp_path / "cut")].count(True) == 1
    assert len(tensors(tmp_path / "cut")) == len(batches[0]) + len(batches[1])
    cached(teacher, examples, tmp_path / "cut")
    assert files(tmp_path / "cut") == whole
    assert computed == [len(b) for b in [*batches[:3], *batches[2:]]]


def test_data_sets_that_overlap_share_tensors(tiny, examples, tmp_path, computed):
    """One added example: its batch is computed, and nothing but its tensor is written."""
    teacher = tiny("llama")
    cached(teacher, examples[:-1], tmp_path)
    before, known = files(tmp_path), tensors(tmp_path)
    computed.clear()
    states = cached(teacher, examples, tmp_path)
    (batch,) = [b for b in batches_of(examples) if examples[-1] in b]
    assert computed == [len(batch)]
    assert before.items() < files(tmp_path).items()
    (added,) = tensors(tmp_path).keys() - known.keys()
    assert len(tensors(tmp_path)[added]) == len(examples[-1].teacher.targets)
    live = common.teacher_hidden_states(teacher, examples[-3:])
    torch.testing.assert_close(states(examples[-3:]), live, rtol=1e-5, atol=1e-5)
    computed.clear()
    cached(teacher, examples[5:20], tmp_path)  # a part of it needs nothing
    cached(teacher, [dataclasses.replace(e, index=99 - e.index) for e in examples], tmp_path)
    assert computed == [] and len(tensors(tmp_path)) == 30


def test_an_example_that_occurs_twice_has_one_tensor(tiny, examples, tmp_path):
    teacher = tiny("llama")
    twin = dataclasses.replace(examples[0], index=30)
    states = cached(teacher, [*examples, twin], tmp_path)
    assert len(tensors(tmp_path)) == 30
    assert states([twin]).equal(states([examples[0]]))


def test_two_lists_may_be_joined_though_both_count_from_0(tiny, examples, tmp_path):
    other = [dataclasses.replace(e, index=i) for i, e in enumerate(examples[::-1])]
    states = cached(tiny("llama"), [*examples, *other], tmp_path)
    live = states(examples[:4], live=True)
    torch.testing.assert_close(states(examples[:4]), live, rtol=1e-5, atol=1e-5)


def test_a_disk_too_small_is_an_error_before_anything_is_written(
    tiny, examples, tmp_path, monkeypatch, capsys, computed
):
    """A byte less than hidden states and head need is too little."""
    teacher = tiny("llama")
    needed = sum(len(e.teacher.targets) for e in examples) * 32 * 4 + teacher.head().weight.nbytes
    usage = shutil.disk_usage(tmp_path)

    def free(size: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size))

    free(needed - 1)
    with pytest.raises(UsageError, match=rf"{tmp_path} has .* MB left: name another --cache-dir"):
        cached(teacher, examples, tmp_path)
    assert not computed and [p.name for p in tmp_path.iterdir()] == ["lock"]
    assert capsys.readouterr().out == ""
    free(needed)
    cached(teacher, examples, tmp_path)
    said = capsys.readouterr().out
    assert f"{needed / 1e6:.1f} MB of teacher states" in said and "128 bytes a token" in said


def test_a_truncated_file_is_named_and_deleting_it_helps(tiny, examples, tmp_path):
    teacher = tiny("llama")
    cached(teacher, examples, tmp_path)
    whole = files(tmp_path)
    path = tmp_path / sorted(whole)[2]
    truncate(path)
    with pytest.raises(UsageError, match=f"{path}.*delete the file"):
        cached(teacher, examples, tmp_path)
    path.unlink()
    cached(teacher, examples, tmp_path)
    assert files(tmp_path) == whole


def test_a_tensor_is_named_after_the_teachers_ids_and_targets(tiny, examples, tmp_path):
    """Not after what the student reads, nor after the example's place in its list."""
    teacher, example = tiny("llama"), examples[3]
    ids, targets = example.teacher
    changed = [
        {"teacher": Tokens(ids, targets[1:])},
        {"teacher": Tokens([7, *ids[1:]], targets)},
        {"teacher": Tokens([*ids, 7], targets)},
    ]
    same = [{"student": Tokens([7, *ids], targets)}, {"index": 9}, {"text": "other"}]
    cached(teacher, [example], tmp_path)
    for change in same:
        cached(teacher, [dataclasses.replace(example, **change)], tmp_path)
    assert len(tensors(tmp_path)) == 1
    for count, change in enumerate(changed, 2):
        cached(teacher, [dataclasses.replace(example, **change)], tmp_path)
        assert len(tensors(tmp_path)) == count


# ---------------------------------------------------------------------- the head, and the digest


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cached_head_replaces_loading_the_model(kind, dtype, tokenizer, examples, tmp_path):
    """Bit for bit the model's own, without padding rows; until it is there the model is loaded."""
    name = tmp_path / "model"
    rows = len(tokenizer.get_vocab()) + 8
    tiny_model(kind, rows).to(dtype).save_pretrained(name)
    tokenizer.save_pretrained(name)
    args = token_level.Arguments(
        teacher=str(name), student=str(name), cache_dir=str(tmp_path / "cache"),
        teacher_dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip

    def opened() -> LanguageModel:
        return common.load_pair(args, torch.device("cpu")).teacher

    first = opened()
    assert first.loaded
    TeacherHiddenStates(first, examples[:2], "some text")
    later = opened()
    ours, theirs = later.head(), first.head()
    assert torch.equal(ours.weight, theirs.weight) and ours.weight.dtype == dtype
    assert len(ours.weight) == len(later.tokenizer.get_vocab()) < rows  # Qwen's class adds a token
    assert (ours.bias is None) == (theirs.bias is None)
    assert ours[2:] == theirs[2:] and (ours.softcap is not None) == (kind == "gemma2")
    TeacherHiddenStates(later, examples[:2], "some text")
    assert not later.loaded
    truncate(later.states_dir / "head.safetensors")
    with pytest.raises(UsageError, match=r"head\.safetensors.*delete the file"):
        opened()


def test_unload_frees_the_backbone_and_keeps_head_and_states(tokenizer, examples, tmp_path):
    vocabulary, loads = len(tokenizer.get_vocab()), []

    def load(_: LanguageModel) -> torch.nn.Module:
        model = tiny_model("llama", vocabulary)
        loads.append(weakref.ref(model))
        return model

    config = tiny_model("llama", vocabulary).config
    teacher = LanguageModel(
        "llama", tokenizer, config, [1], torch.float32, torch.device("cpu"), "llama", load
    )
    states = cached(teacher, examples, tmp_path)
    head, hidden = teacher.head().weight.clone(), states(examples)
    teacher.unload()
    gc.collect()
    assert not teacher.loaded and loads[0]() is None
    assert teacher.head().weight.equal(head) and states(examples).equal(hidden)
    assert not teacher.head().weight.requires_grad
    assert len(loads) == 1 and not teacher.loaded
    live = states(examples[:2], live=True)  # loads it again
    assert len(loads) == 2
    torch.testing.assert_close(live, states(examples[:2]), rtol=1e-5, atol=1e-5)


def test_the_directory_is_named_after_weights_and_dtype(tmp_path):
    def directory(**changes: object) -> Path:
        args = token_level.Arguments(cache_dir=str(tmp_path / "cache"), **changes)
        return common.load_pair(args, torch.device("cpu")).teacher.states_dir

    given, half = directory(), directory(teacher_dtype="bfloat16")
    other = directory(teacher=str(common.DATA / "student"))
    assert given.name.endswith("-float32") and half.name.endswith("-bfloat16")
    assert half.name.partition("-")[0] == given.name.partition("-")[0] != other.name[:20]
    assert directory(cache_teacher=False) is None
    assert not (tmp_path / "cache").exists()  # nothing is written before it is needed


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
        digests.append(common.digest_of_model("some/model", "main"))
    assert len(set(digests)) == 2
    absent = token_level.Arguments(teacher="some/other")
    with pytest.raises(UsageError, match="some/other"):
        common.open_model(absent, torch.device("cpu"), "teacher")


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
        "warmup_steps": 1, "logging_steps": 1, "output_dir": str(output), "cache_dir": str(cache),
    }  # fmt: skip
    run_in_process(token_level, **{**options, **changes})
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line["train/loss"] for line in map(json.loads, lines) if "train/loss" in line]


def test_later_runs_are_bit_equal_and_load_no_backbone(place, tmp_path, monkeypatch, capsys):
    """Losses and final weights, whatever else the run changes about what it learns."""
    cache = tmp_path / "cache"
    first = train(place, tmp_path / "1", cache)
    printed = capsys.readouterr().out
    assert "bytes a token" in printed and "training text: teacher states from the cache" in printed
    written = {p: p.stat().st_mtime_ns for p in (cache / "states").rglob("*.safetensors")}
    (states,) = {path.parent for path in written}
    assert len(tensors(states)) == 6 + 54  # the evaluation's text and the training text
    with no_backbone_of(place / "teacher", monkeypatch):
        assert train(place, tmp_path / "2", cache) == first
        printed = capsys.readouterr().out
        assert printed.count("teacher states from the cache; its backbone is not loaded") == 2
        one, two = (tmp_path / n / "final" / "model.safetensors" for n in ("1", "2"))
        assert one.read_bytes() == two.read_bytes()
        for i, changes in enumerate(({"temperature": 2.0, "kl": "jsd"}, {"batch_size": 7})):
            assert train(place, tmp_path / f"3{i}", cache, **changes) != first
        with pytest.raises(AssertionError, match="backbone"):
            train(place, tmp_path / "4", cache, max_length=10)  # another text
    assert written == {p: p.stat().st_mtime_ns for p in written}
    live = train(place, tmp_path / "5", cache, cache_teacher=False)
    assert "from the cache; " not in capsys.readouterr().out.rpartition("run directory")[2]
    assert live[0] == pytest.approx(first[0], rel=1e-5)
    other = train(place, tmp_path / "6", cache, teacher=str(place / "other_teacher"))
    assert other[0] != pytest.approx(first[0], rel=1e-3)


def test_the_run_that_fills_the_cache_trains_without_the_backbone(place, tmp_path, monkeypatch):
    """The teacher's model is freed before the first step; a bfloat16 cache serves later runs."""
    models, load = [], common.load_weights

    def loaded(model, *rest):
        weights = load(model, *rest)
        if model.name == str(place / "teacher"):
            models.append(weakref.ref(weights))
        return weights

    alive, begin = [], common.Run.begin

    def first_step(run, step, optimizer):
        if step == 0:
            gc.collect()
            alive.append([model() is not None for model in models])
        begin(run, step, optimizer)

    monkeypatch.setattr(common, "load_weights", loaded)
    monkeypatch.setattr(common.Run, "begin", first_step)
    first = train(place, tmp_path / "1", tmp_path / "cache", teacher_dtype="bfloat16")
    assert alive == [[False]]
    with no_backbone_of(place / "teacher", monkeypatch):
        assert train(place, tmp_path / "2", tmp_path / "cache", teacher_dtype="bfloat16") == first


def test_states_that_overflow_are_not_kept(tiny, examples, tmp_path):
    """The check at load reads a few tokens; here another token's states are not finite."""
    teacher = tiny("llama", dtype=torch.float16)
    token = examples[3].teacher.ids[1]
    teacher.model.model.embed_tokens.weight.data[token] = float("inf")
    with pytest.raises(UsageError, match=r"overflows in torch\.float16: .*--teacher-dtype"):
        cached(teacher, examples, tmp_path)
    assert all(stored.isfinite().all() for stored in tensors(tmp_path).values())
