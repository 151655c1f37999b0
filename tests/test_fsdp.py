"""FSDP 2 with two processes (gloo, CPU): a sharded student, and a sharded teacher that runs live.

Every run is compared with the run of the same command with one process. One run is started by
`accelerate launch`, as in the README; the others are forks (forked.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate import DistributedType, PartialState
from byte_models import byte_tokenizer, edit, llama, write
from conftest import ROOT, generate, tiny_model, wait_for
from forked import ForkedRanks, run_forked
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import common
import on_policy
import token_level

# A script that also leaves in NAME-PROCESS.pt what the process holds after the first backward pass,
# and in NAME.pt the first step's gradients before clipping and the student gathered by torch.
SCRIPT = f"""
import contextlib, importlib, sys
sys.path.insert(0, {str(ROOT)!r})
import accelerate, torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
import common

name, script = sys.argv.pop(), importlib.import_module(sys.argv.pop())
clip, prepare, finish = accelerate.Accelerator.clip_grad_norm_, common.prepare, common.Run.finish
load_weights, kept, left = common.load_weights, {{"loads": []}}, {{"gradients": None}}

def load_and_note(model, *rest):
    kept["loads"].append(model.name)
    return load_weights(model, *rest)

reduce_gradients = common.reduce_gradients

@contextlib.contextmanager
def reduce_and_note(accelerator, module, now):
    with reduce_gradients(accelerator, module, now):
        yield
    if not now:  # only then sharded parameters have gradients: others wait whole
        kept["reduced"] = [p.grad is not None for p in module.parameters() if p.requires_grad]

def prepare_and_keep(accelerator, module, args, teacher=None):
    kept["teacher"] = teacher
    kept["module"], optimizer = prepare(accelerator, module, args, teacher)
    return kept["module"], optimizer

def held(model):
    local = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() for p in local), sum(p.numel() for p in model.parameters())

def clip_and_keep(self, parameters, *rest):
    parameters = list(parameters)
    if left["gradients"] is None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        left["gradients"] = torch.cat([g.flatten() for g in whole])
        own, teacher = {{"student": held(kept["module"])}}, kept["teacher"]
        own["units"] = sum(isinstance(m, FSDPModule) for m in kept["module"].modules())
        own["loads"], own["reduced"] = kept["loads"], kept.get("reduced")
        if teacher is not None and teacher.loaded:
            own["teacher"], own["head"] = held(teacher.model), teacher.head().weight.numel()
        torch.save(own, f"{{name}}-{{self.process_index}}.pt")
    return clip(self, parameters, *rest)

def finish_and_keep(self, **more):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    left["student"] = get_model_state_dict(kept["module"], options=options)
    if self.accelerator.is_main_process:
        torch.save(left, f"{{name}}.pt")
    finish(self, **more)

accelerate.Accelerator.clip_grad_norm_ = clip_and_keep
common.prepare, common.Run.finish = prepare_and_keep, finish_and_keep
common.load_weights, common.reduce_gradients = load_and_note, reduce_and_note
common.length_batches.__defaults__ = (32,)  # so that the processes evaluate 4 and 3 batches
common.launch(script.main, script.Arguments, "")
"""
LAUNCHED = "cross_tokenizer"
ENVIRONMENT = {"ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
CASES = {
    "token_level": ["--no-cache-teacher", "--gradient-checkpointing"],
    "on_policy": ["--student", "tied", "--rollout-temperature", "0", "--rollout-steps", "2"],
    "cross_tokenizer": ["--no-cache-teacher", "--lora-rank", "4"],
    "sequence_level": ["--completions", "dataset", "--lora-rank", "4", "--gradient-checkpointing"],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer) -> Path:
    """A directory with tiny models and the script. Most of the teacher's weights are in layers."""
    directory = tmp_path_factory.mktemp("fsdp")
    size = len(tokenizer.get_vocab())
    for name, model in (
        ("teacher", tiny_model("llama", size, 0, num_hidden_layers=8)),
        ("student", tiny_model("llama", size, 1)),
        ("tied", tiny_model("qwen2", size, 2)),
    ):
        model.save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    (directory / "script.py").write_text(SCRIPT)
    return directory


def words(script: str, name: str, *flags: str) -> list[str]:
    """A run of 20 steps; of 7 examples one process gets 4 and the other 3, three at a time."""
    options = {
        "teacher": "teacher", "student": "student", "max-rows": 32, "eval-size": 7,
        "max-new-tokens": 8, "max-steps": 20, "warmup-steps": 2, "batch-size": 7,
        "micro-batch-size": 3, "logging-steps": 1, "eval-steps": 9, "output-dir": name,
        "cache-dir": "cache",
    }  # fmt: skip
    given = [str(part) for flag, value in options.items() for part in (f"--{flag}", value)]
    return [*given, *flags, script, name]


def accelerate_launch(place: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Two processes, as the README starts them."""
    start = ["-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version=2",
             "--num_processes=2", "--main_process_port=0", "script.py"]  # fmt: skip
    return subprocess.run(
        [sys.executable, *start, *flags], cwd=place, env={**os.environ, **ENVIRONMENT},
        capture_output=True, text=True, timeout=1800,
    )  # fmt: skip


def train(place: Path, script: str, name: str, processes: int, *flags: str) -> tuple[Any, list]:
    """What the run left in NAME.pt, and its metrics without what depends on the clock."""
    given = words(script, name, *flags)
    if script == LAUNCHED and processes == 2:
        done = accelerate_launch(place, *given)
    else:
        script_file = place / "script.py"
        done = run_forked(script_file, *given, cwd=place, processes=processes, **ENVIRONMENT)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert done.stdout.count("run directory") == done.stdout.count("gap recovered") == 1
    lines = [json.loads(line) for line in (place / name / "metrics.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in m.items() if not k.startswith("speed/")} for m in lines]
    return torch.load(place / f"{name}.pt"), plain


@pytest.fixture(scope="module")
def runs(place) -> Callable[[str], tuple[Any, list]]:
    """The run of a script with two processes, made once."""
    known: dict[str, tuple[Any, list]] = {}

    def run(script: str) -> tuple[Any, list]:
        if script not in known:
            if "--lora-rank" in CASES[script]:
                pytest.importorskip("peft")
            known[script] = train(place, script, f"{script}-2", 2, *CASES[script])
        return known[script]

    return run


@pytest.mark.parametrize("script", CASES)
def test_sharded_processes_train_as_one(place, runs, script):
    """First gradients agree to 1e-5 of their norm, the losses of all steps and scores to 1e-3."""
    two, lines = runs(script)
    one, expected = train(place, script, f"{script}-1", 1, *CASES[script], "--micro-batch-size=0")
    difference = (two["gradients"] - one["gradients"]).norm()
    assert 0 < difference <= 1e-5 * one["gradients"].norm()
    losses = [[m["train/loss"] for m in run if "train/loss" in m] for run in (lines, expected)]
    assert len(losses[0]) == 20 and losses[0] == pytest.approx(losses[1], rel=1e-3)
    norms = [[m["optim/grad_norm"] for m in run if "train/loss" in m] for run in (lines, expected)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    scores = [[m for m in run if "eval/nats_per_token" in m] for run in (lines, expected)]
    assert len(scores[0]) == 4
    for ours, theirs in zip(*scores, strict=True):
        rel = 1e-3 if ours["step"] else 1e-6
        assert ours == pytest.approx(theirs, rel=rel)
    assert scores[0][-1]["eval/nats_per_token"] != scores[0][0]["eval/nats_per_token"]
    launched = [json.loads((place / f"{script}-{n}/args.json").read_text()) for n in (2, 1)]
    assert [a["launched"] for a in launched] == ["FSDP", "MULTI_CPU"]


@pytest.mark.parametrize("script", CASES)
def test_each_process_holds_half(place, runs, script):
    """Of the student, and of a live teacher but for its head, measured after a backward pass."""
    runs(script)
    for own in (torch.load(place / f"{script}-2-{process}.pt") for process in (0, 1)):
        assert own["units"] == 3  # two layers and the rest, gathered one after the other
        assert own["reduced"] and all(own["reduced"])  # gradients too, after each micro-batch
        held, total = own["student"]
        assert held == pytest.approx(total / 2, rel=0.02)
        if script != "sequence_level":
            (held, total), head = own["teacher"], own["head"]
            assert held - head == pytest.approx((total - head) / 2, rel=0.02)
            assert held < 0.6 * total


@pytest.mark.parametrize("script", CASES)
def test_final_is_the_gathered_student(place, runs, script):
    """Bit for bit; with LoRA what is not adapted, and the adapters merged to within rounding."""
    gathered, final = runs(script)[0]["student"], place / f"{script}-2" / "final"
    gathered = {k.removeprefix("trained."): v for k, v in gathered.items()}
    saved = load_file(final / "model.safetensors")
    assert len(saved) > 20
    adapted = 0
    for name, tensor in saved.items():
        layer, _, kind = name.rpartition(".")
        if (base := f"{layer}.base_layer.{kind}") in gathered:
            a, b = (gathered[f"{layer}.lora_{x}.default.weight"].double() for x in "AB")
            assert b.abs().max() > 0
            merged = gathered[base].double() + 2.0 * b @ a  # lora_alpha is twice the rank
            torch.testing.assert_close(tensor.double(), merged, rtol=1e-5, atol=1e-6)
            adapted += 1
        else:
            assert torch.equal(tensor, gathered[name]), name
    assert (adapted > 0) == ("--lora-rank" in CASES[script])
    assert AutoModelForCausalLM.from_pretrained(final)  # loads with its own class


@pytest.mark.parametrize("script", ["on_policy"])
def test_a_sharded_run_stops_and_resumes(place, runs, script):
    """SIGTERM: one checkpoint, then the same metrics and weights as those of the whole run."""
    gathered, lines = runs(script)
    flags = [*CASES[script], "--save-steps", "4"]
    given, out = words(script, f"{script}-cut", *flags), place / "cut.txt"
    process = ForkedRanks(2, place / "script.py", given, place, out, **ENVIRONMENT)
    checkpoints = place / f"{script}-cut/checkpoints"
    assert wait_for(process, (checkpoints / "step-000004/state.json").exists), out.read_text()
    process.terminate()
    assert process.wait() != 0
    assert out.read_text().count("stopped after step") == 1
    resumed, again = train(place, script, f"{script}-cut", 2, *flags, "--resume")
    assert again == lines
    for own in (torch.load(place / f"{script}-cut-{process}.pt") for process in (0, 1)):
        (held, total), head = own["teacher"], own["head"]  # though the cache held all until then
        assert held - head == pytest.approx((total - head) / 2, rel=0.02)
    for name, tensor in gathered["student"].items():
        assert torch.equal(resumed["student"][name], tensor), name
    newest = max(checkpoints.iterdir())
    for file in ("pytorch_model_fsdp.bin", "optimizer.bin"):  # whole, and no code in them
        state = torch.load(newest / file, weights_only=True)
        assert not any("DTensor" in type(value).__name__ for value in state.values())


def test_with_a_device_map_one_process_fills_the_cache(place, runs):
    """Only the main process loads the teacher; the student is trained as with a live teacher."""
    flags = ["--gradient-checkpointing", "--teacher-device-map", "auto", "--cache-dir", "cache-map"]
    _, lines = train(place, "token_level", "map", 2, *flags)
    loads = [torch.load(place / f"map-{i}.pt")["loads"] for i in (0, 1)]
    assert loads == [["student", "teacher"], ["student"]]
    assert lines == [pytest.approx(line, rel=1e-4) for line in runs("token_level")[1]]
    started = (place / "map/metrics.jsonl").stat().st_mtime
    states = list((place / "cache-map/states").glob("*/states-*.safetensors"))
    assert states and all(path.stat().st_mtime <= started for path in states)


@pytest.mark.parametrize(
    "args", [token_level.Arguments(cache_teacher=False), on_policy.Arguments()]
)
def test_a_device_map_and_a_live_teacher_in_several_processes_are_refused(monkeypatch, args):
    args.teacher_device_map = "auto"
    monkeypatch.setattr(PartialState(), "distributed_type", DistributedType.MULTI_CPU)
    with pytest.raises(common.UsageError, match="--teacher-device-map is for one process"):
        common.load_pair(args, torch.device("cpu"))


def test_a_teacher_spread_by_a_device_map_is_the_same_teacher(tmp_path, monkeypatch):
    """Offloaded layers, final norm and head: same states, logits and text; unloading frees it."""
    tokenizer = byte_tokenizer()
    model = llama(tokenizer, num_hidden_layers=3, tie_word_embeddings=False)
    edit(Path(write(tmp_path / "t", model, tokenizer)) / "config.json", dtype="float32")
    load = AutoModelForCausalLM.from_pretrained
    offloaded = dict.fromkeys(("model.layers.1", "model.layers.2", "model.norm", "lm_head"), "disk")
    kept = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.rotary_emb"), "cpu")

    def load_offloaded(*args: Any, device_map: Any, **options: Any) -> Any:
        device_map = {**kept, **offloaded} if device_map == "auto" else device_map
        folder = tmp_path / "offloaded"
        return load(*args, device_map=device_map, offload_folder=folder, **options)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", load_offloaded)
    teachers = []
    for device_map in ("none", "auto"):
        args = token_level.Arguments(
            teacher=str(tmp_path / "t"), teacher_device_map=device_map, max_length=64
        )
        teachers.append(common.open_model(args, torch.device("cpu"), "teacher"))
    plain, spread = teachers
    assert {p.device.type for p in plain.model.parameters()} == {"cpu"}
    assert spread.model.lm_head.weight.is_meta and spread.model.model.norm.weight.is_meta
    assert spread.cache
    batch = common.collate([common.Tokens(list(range(10, 30)), list(range(5, 20)))], plain.device)
    assert torch.equal(spread.hidden_states(batch), plain.hidden_states(batch))
    assert torch.equal(spread.logits(batch)[:], plain.logits(batch)[:])
    texts = [
        list(generate(t, [[5, 6, 7], [8, 9]], [1, 2], max_new_tokens=12, temperature=1.0))
        for t in teachers
    ]
    assert texts[0] == texts[1]
    backbone = weakref.ref(spread.model.model)
    spread.unload()
    assert not spread.loaded and torch.equal(spread.head().weight, plain.head().weight)
    assert not spread.loaded
    common.prepare(accelerate.Accelerator(cpu=True), torch.nn.Linear(2, 2), args)
    assert backbone() is None  # although accelerate's hooks refer to themselves


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DEEPSPEED .* --use_fsdp --fsdp_version 2"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "MEGATRON_LM .* --use_fsdp --fsdp_version 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP 1 is not supported: add --fsdp_version 2"),
        ({**ENVIRONMENT, "FSDP_VERSION": "1"}, "FSDP 1 is not supported: add --fsdp_version 2"),
        ({**ENVIRONMENT, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS is not supported"),
        ({**ENVIRONMENT, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "use --gradient-checkpointing"),
    ],
)  # fmt: skip
def test_launches_that_are_not_supported_are_refused(monkeypatch, told, message):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(common.UsageError, match=f"cannot start: .*{message}"):
        common.start("token_level", token_level.Arguments())


def test_a_model_without_named_layers_is_refused(tiny):
    """Without layers a forward pass would gather all weights at once."""
    model = tiny("llama").model
    assert {type(m).__name__ for m in common.layers_of(model)} == {"LlamaDecoderLayer"}
    model._no_split_modules = None
    with pytest.raises(ValueError, match="names no layers of LlamaForCausalLM"):
        common.layers_of(model)
