"""How runs are started and end: processes that share one run, runs that share a directory, and
what surfaces at the last write."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import byte_models
import pytest
import torch
from byte_models import byte_tokenizer, edit, llama, rows_of, small_run, write, write_rows
from conftest import ROOT, run_in_process
from forked import ForkedRanks, ForkedScript
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import common
import token_level

ROWS = [{"prompt": q, "response": a} for q, a in
        (("one", "Two."), ("red", "Green and blue."), ("up", "Down"), ("a", "Beside the sea."),
         ("yes", "No!"), ("left", "Right, then."))]  # fmt: skip


def of_kind(kind: str, seed: int, **changes: Any) -> PreTrainedModel:
    tokenizer = byte_tokenizer()
    size = {"vocab_size": rows_of(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 16, "max_position_embeddings": 1024, "eos_token_id": 1,
            "pad_token_id": 0, "bos_token_id": None}  # fmt: skip
    if kind == "gemma3":
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
                  "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
        changes = {"text_config": size, "vision_config": vision, "mm_tokens_per_image": 4,
                   "image_token_index": 6, "boi_token_index": 7, "eoi_token_index": 8}  # fmt: skip
        config = AutoConfig.for_model(kind, **changes)
    else:
        config = AutoConfig.for_model(kind, **{**size, **changes})
    return byte_models.randomize(AutoModelForCausalLM.from_config(config), seed, 0.1)


def pair(directory: Path, kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """Flags of a run of one step of a random pair."""
    names = [
        write(directory / role, of_kind(kind, seed, **changes), byte_tokenizer())
        for role, seed in (("teacher", 1), ("student", 2))
    ]
    return small_run(directory, *names, write_rows(directory / "rows.jsonl", ROWS))


def as_flags(flags: dict[str, Any]) -> list[str]:
    return [part for name, v in flags.items() for part in (common.as_flag(name), str(v))]


def start(
    flags: dict[str, Any], output: Path, processes: int = 0, **environment: str
) -> ForkedScript | ForkedRanks:
    """token_level.py on its way, in one process or in several that share the run."""
    given = ["token_level.py", as_flags(flags), ROOT, output]
    if processes:
        return ForkedRanks(processes, *given, **environment)
    return ForkedScript(*given, **environment)


def steps(run: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step."""
    lines = map(json.loads, (Path(run) / "metrics.jsonl").read_text().splitlines())
    return [(m["train/loss"], m["optim/grad_norm"]) for m in lines if "train/loss" in m]


# Of 16 experts each process leaves some without a token.
KINDS = {"gemma3": {}, "mixtral": {"num_local_experts": 16, "num_experts_per_tok": 1}}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_equal_one(kind: str, tmp_path: Path):
    """A vision tower that text does not reach; experts without a token in one process."""
    flags = pair(tmp_path, kind, **KINDS[kind])
    flags |= {"max_steps": 3, "micro_batch_size": 2, "logging_steps": 1}
    two = {**flags, "output_dir": str(tmp_path / "two"), "cache_dir": str(tmp_path / "cache2")}
    process = start(two, tmp_path / "out.txt", processes=2)
    run_in_process(token_level, **flags)
    code, out = process.wait(), (tmp_path / "out.txt").read_text()
    assert code == 0, out[-3000:]
    assert out.count("run directory") == 1 and out.count("frozen") == (kind == "gemma3")
    ours, expected = steps(two["output_dir"]), steps(flags["output_dir"])
    assert len(ours) == len(expected) == 3
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(expected), rtol=1e-3, atol=0)


def test_processes_that_do_not_find_each_other(tmp_path: Path, tmp_path_factory, monkeypatch):
    """Two processes were started, but without a GPU accelerate makes two runs of them."""
    flags, outputs = pair(tmp_path), tmp_path_factory.mktemp("outputs")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    launched = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29477"}
    both = [start(flags, outputs / rank, RANK=rank, LOCAL_RANK=rank, **launched) for rank in "01"]
    assert [process.wait() for process in both] == [2, 2]
    said = [(outputs / rank).read_text() for rank in "01"]
    # The other one may have ended before it was found.
    assert any("2 processes were started, but each is alone: without a GPU" in out for out in said)
    kinds = r"error: (.*set ACCELERATE_USE_CPU=true|cannot start: .*)\n"
    assert all(re.fullmatch(kinds, out) for out in said), said
    assert sorted(tmp_path.rglob("*")) == before


def test_hosts_without_a_shared_disk(tmp_path: Path):
    """Each process has directories of its own: said before the teacher writes."""
    flags = pair(tmp_path) | {"completions": "teacher", "cache_dir": "cache", "output_dir": "run"}
    outputs, store = (
        [tmp_path / "0.txt", tmp_path / "1.txt"],
        ForkedRanks(0, "", [], ROOT, tmp_path),
    )
    processes = []
    for rank, output in zip("01", outputs, strict=True):
        (tmp_path / rank).mkdir()
        environment = store.environment | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        given = ["token_level.py", as_flags(flags), tmp_path / rank, output]
        processes.append(ForkedScript(*given, **environment))
    assert processes[1].wait() == 2
    processes[0].kill()
    assert "error: all processes must see one --cache-dir; one lacks" in outputs[1].read_text()


def test_two_runs_never_share_a_directory(tmp_path: Path, monkeypatch):
    """Runs that start while another one trains end at once, and change nothing there."""
    flags = pair(tmp_path)
    run, begin = Path(flags["output_dir"]), common.Run.begin

    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    def others_start(self: common.Run, *rest: Any) -> None:
        before = content()
        outputs = [tmp_path / f"out{i}.txt" for i in range(3)]
        more = ({}, {"overwrite": True}, {"resume": True})
        others = [start(flags | m, out) for m, out in zip(more, outputs, strict=True)]
        codes = [other.wait() for other in others]
        outs = [out.read_text() for out in outputs]
        assert codes == [2, 2, 2], outs
        errors = [out.splitlines()[-1] for out in outs]
        assert "is not empty" in errors[0]
        assert all(f"another run is writing to --output-dir {run}" in e for e in errors[1:])
        assert content() == before
        begin(self, *rest)

    monkeypatch.setattr(common.Run, "begin", others_start)
    run_in_process(token_level, **flags)
    assert (run / "results.json").exists()


def test_two_runs_that_start_at_the_same_moment(tmp_path: Path):
    """Neither has written anything when the other one looks."""
    flags = pair(tmp_path)
    both = [start(flags | {"cache_dir": str(tmp_path / n)}, tmp_path / f"{n}.txt")
            for n in ("c1", "c2")]  # fmt: skip
    codes = sorted(process.wait() for process in both)
    outs = [(tmp_path / f"{n}.txt").read_text() for n in ("c1", "c2")]
    assert codes == [0, 2], outs
    assert [sum("gap recovered" in out for out in outs)] == [1]
    lines = (Path(flags["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 1]


@pytest.mark.parametrize(
    ("generation", "reason"),
    [
        ({"early_stopping": True}, "could be trained, but not saved: .* `early_stopping`"),
        ({"length_penalty": 2.0}, "could be trained, but not saved: .* `length_penalty`"),
        ({"pad_token_id": -5}, "could be trained, but not saved: .* `pad_token_id`"),
        ({"num_return_sequences": 3}, "cannot load the model .* `num_return_sequences`"),
        ({"watermarking_config": {"a": 1}}, "cannot load the model .* unexpected keyword"),
    ],
)
def test_settings_that_cannot_be_saved_are_refused_at_load(generation, reason, tmp_path: Path):
    tokenizer = byte_tokenizer()
    student = write(tmp_path / "s", llama(tokenizer), tokenizer, **generation)
    with pytest.raises(common.UsageError, match=reason):
        common.load_student(token_level.Arguments(student=student), torch.device("cpu"))


def test_a_tokenizer_that_cannot_be_saved_is_refused_at_load(tmp_path: Path, monkeypatch):
    tokenizer = byte_tokenizer()
    student = write(tmp_path / "s", llama(tokenizer), tokenizer)
    load = common.load_tokenizer

    def unsaveable(*rest: Any) -> common.Tokenizer:
        loaded = load(*rest)
        loaded.init_kwargs["a set"] = {1}  # JSON has none
        return loaded

    monkeypatch.setattr(common, "load_tokenizer", unsaveable)
    with pytest.raises(common.UsageError, match=r"could be trained, but not saved: .*set"):
        common.load_student(token_level.Arguments(student=student), torch.device("cpu"))


def test_sampling_settings_of_a_greedy_student(tmp_path: Path):
    """They are dropped, as save_pretrained would refuse them."""
    flags = pair(tmp_path)
    edit(tmp_path / "student" / "generation_config.json", temperature=0.9, top_p=0.6)
    run_in_process(token_level, **flags)
    AutoModelForCausalLM.from_pretrained(Path(flags["output_dir"]) / "final")


def test_a_trained_student_is_never_lost_to_a_save(tmp_path: Path, monkeypatch):
    """`final` is a file when it is to be written: the message says where the weights are."""
    flags = pair(tmp_path) | {"save_steps": 0}
    final = Path(flags["output_dir"]) / "final"
    finish = common.Run.finish

    def in_the_way(self: common.Run, **more: Any) -> None:
        final.touch()
        finish(self, **more)

    with monkeypatch.context() as patch:
        patch.setattr(common.Run, "finish", in_the_way)
        with pytest.raises(common.UsageError, match=r"cannot write .*final") as problem:
            run_in_process(token_level, **flags)
    checkpoint = final.parent / "checkpoints" / "step-000001"
    assert f"the trained weights are in {checkpoint}; --resume" in str(problem.value)
    assert (checkpoint / "state.json").exists()
    final.unlink()
    run_in_process(token_level, **flags, resume=True)
    AutoModelForCausalLM.from_pretrained(final)


def test_a_trained_student_that_overflows_is_named(tmp_path: Path, monkeypatch):
    finish = common.Run.finish

    def overflowing(run: common.Run) -> None:
        with torch.no_grad():
            run.student.model.model.norm.weight.fill_(torch.inf)
        finish(run)

    monkeypatch.setattr(common.Run, "finish", overflowing)
    monkeypatch.chdir(tmp_path)
    flags = {"max_rows": 8, "max_steps": 1, "eval_size": 2, "max_new_tokens": 4, "batch_size": 4}
    with pytest.raises(common.UsageError, match=r"scored \(the trained .*step-000001.*overflows"):
        run_in_process(token_level, output_dir="run", cache_dir="cache", **flags)


def test_what_is_saved_can_be_read_by_others(tmp_path: Path):
    """As other files can, although safetensors writes its own for their owner alone; the tokenizer
    names no code, which is not copied."""
    shutil.copytree(common.DATA / "student", tmp_path / "s")
    config = json.loads((tmp_path / "s/tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "own.Own"]}
    (tmp_path / "s/tokenizer_config.json").write_text(json.dumps(config))
    args = token_level.Arguments(student=str(tmp_path / "s"))
    student = common.load_student(args, torch.device("cpu"))
    common.save_student(student, tmp_path / "final", "")
    common.save_tensors(tmp_path / "states.safetensors", x=torch.ones(1))
    (tmp_path / "plain").touch()
    for name in ("final/model.safetensors", "states.safetensors"):
        assert (tmp_path / name).stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert "auto_map" not in json.loads((tmp_path / "final/tokenizer_config.json").read_text())


def test_no_room_for_the_weights(tmp_path: Path, monkeypatch):
    flags = pair(tmp_path)
    usage = common.shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    states = {"cache_teacher": False}
    monkeypatch.setattr(common.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(common.UsageError, match=r"no room in .* for 0\.\d MB of weights"):
        run_in_process(token_level, **flags, **states)
    assert not (Path(flags["output_dir"]) / "args.json").exists()


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore"),
        # What a card says that other programs have filled.
        torch.AcceleratorError("CUDA error: out of memory\nSearch for ...", 2),
    ],
    ids=["allocator", "driver"],
)
def test_out_of_memory_is_one_sentence(problem: Exception, monkeypatch, capsys):
    def main(_: Any) -> None:
        raise problem

    monkeypatch.setattr(sys, "argv", ["token_level.py"])
    with pytest.raises(SystemExit) as end:
        common.launch(main, token_level.Arguments, "")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    for flag in (
        "micro-batch-size",
        "gradient-checkpointing",
        "generation-batch-size",
        "lora-rank",
    ):
        assert f"--{flag}" in error


def test_a_lost_server_and_a_full_disk_are_two_sentences(monkeypatch, capsys):
    """The checkpoint that the first error asks for cannot be written."""

    class Full:
        def interrupt(self) -> None:
            raise common.UsageError("cannot write step-000004 (is the disk full?)")

    def main(_: Any) -> None:
        raise common.ServerLost("the server does not answer")

    monkeypatch.setattr(sys, "argv", ["token_level.py"])
    monkeypatch.setattr(common.Run, "current", Full())
    with pytest.raises(SystemExit) as end:
        common.launch(main, token_level.Arguments, "")
    lines = ["error: the server does not answer", "error: cannot write step-000004"]
    assert end.value.code == 2
    for line, said in zip(lines, capsys.readouterr().err.splitlines(), strict=True):
        assert said.startswith(line)


def test_other_runtime_errors_are_not_hidden(monkeypatch):
    def main(_: Any) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    monkeypatch.setattr(sys, "argv", ["token_level.py"])
    with pytest.raises(torch.AcceleratorError):
        common.launch(main, token_level.Arguments, "")


@pytest.mark.parametrize(
    ("dtype", "reason"), [("float16", "--teacher-dtype"), ("float32", "damaged")]
)
def test_logits_that_are_not_finite(dtype: str, reason: str, tmp_path: Path):
    """One layer is so large that float16 overflows; or has a weight that is no number."""
    tokenizer = byte_tokenizer()
    model = llama(tokenizer)
    weight = model.model.layers[0].mlp.down_proj.weight.data
    weight.mul_(3e6) if dtype == "float16" else weight[0].fill_(float("nan"))
    args = token_level.Arguments(
        teacher=write(tmp_path, model, tokenizer), teacher_dtype=dtype, cache_teacher=False
    )
    teacher = common.open_model(args, torch.device("cpu"), "teacher")
    with pytest.raises(common.UsageError, match=f"torch.{dtype} that are not finite: .*{reason}"):
        _ = teacher.model


def test_gradients_are_not_divided_by_the_environment(tmp_path: Path, monkeypatch):
    """accelerate reads a variable of the launcher over what it is told."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    flags = {"output_dir": str(tmp_path / "run"), "cache_dir": str(tmp_path / "cache")}
    accelerator = common.start("token_level", token_level.Arguments(**flags))
    weight = torch.ones(2, requires_grad=True)
    accelerator.backward(weight.sum())
    assert weight.grad.tolist() == [1.0, 1.0]
