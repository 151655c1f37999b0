"""Every flag of every script changes something that can be observed, or is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer, llama, small_run, write, write_rows
from conftest import run_in_process
from test_templates import SWITCH

import common
import cross_tokenizer
import on_policy
import sequence_level
import token_level
from common import UsageError

SCRIPTS = {m.__name__: m for m in (sequence_level, token_level, on_policy, cross_tokenizer)}
ENDS = [1, *range(6, 262, 4)]  # so that some answers of random models end
ROWS = [{"prompt": f"{i} " * (i + 1), "response": "yes " * (8 - i)} for i in range(8)]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Two teachers and students, data sets and templates, by the names that the table uses."""
    place = tmp_path_factory.mktemp("files")
    tokenizer = byte_tokenizer()
    made = {
        name: write(place / name, llama(tokenizer, seed), tokenizer, eos_token_id=ENDS)
        for seed, name in enumerate(("teacher", "other teacher", "student", "other student"))
    }
    made["rows"] = write_rows(place / "rows.jsonl", ROWS)
    made["other rows"] = write_rows(place / "other.jsonl", ROWS[4:])
    made["references"] = write_rows(
        place / "references.jsonl", [{**row, "references": ["no"]} for row in ROWS]
    )
    made["template"] = str(place / "template.jinja")
    Path(made["template"]).write_text(SWITCH)
    return made


class Seen:
    """What a run of one script left, in the parts that the table names."""

    def __init__(
        self, script: ModuleType, directory: Path, files: dict[str, str], flags: dict, monkeypatch
    ) -> None:
        sizes: list[tuple] = []
        watch = {
            "_generate_batch": lambda a, out: len(out),
            "split_micro_batches": lambda a, out: len(out[0]),
        }
        watch["load_student"] = lambda a, out: (
            out.model.is_activation_checkpointing, out.model.config._attn_implementation,
            any(m._compiled_call_impl is not None for m in out.model.modules()),
        )  # fmt: skip

        def watched(name: str, original: Any, look: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                out = original(*args, **kwargs)
                sizes.append((name, look(args, out)))
                return out

            return call

        with monkeypatch.context() as patch:
            for name, look in watch.items():
                patch.setattr(common, name, watched(name, getattr(common, name), look))
            base = {"completions": "teacher", "max_steps": 2, "batch_size": 4, "warmup_steps": 1}
            base |= {"learning_rate": 1e-2, "max_new_tokens": 8, "eval_size": 2}
            base |= small_run(directory, files["teacher"], files["student"], files["rows"], **base)
            given = {k: files.get(v, v) if isinstance(v, str) else v for k, v in flags.items()}
            run_in_process(script, **{**base, **given})
        run = Path(given.get("output_dir", directory / "run"))
        lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "train/loss" in line]
        cache = Path(given.get("cache_dir", directory / "cache"))
        self.weights = hashlib.sha256((run / "final/model.safetensors").read_bytes()).hexdigest()
        self.losses = [line["train/loss"] for line in steps]
        self.norms = [line["optim/grad_norm"] for line in steps]
        self.writes = len({line["speed/tokens_per_second"] for line in steps})
        self.evaluations = len(lines) - len(steps)
        self.files = sorted(
            str(p.relative_to(run)) for p in run.rglob("*") if "event" not in p.name
        )
        self.trackers = sum("event" in p.name for p in run.rglob("*"))
        self.cache = sorted(str(p.relative_to(cache)) for p in cache.glob("*/*"))
        texts = cache.glob("text/*.jsonl")
        self.cache_lines = sum(len(path.read_text().splitlines()) for path in texts)
        self.template = (run / "final/chat_template.jinja").read_text()
        results = json.loads((run / "results.json").read_text())
        self.scores = {k: results[k] for k in ("teacher", "before", "evaluation")}
        self.calls = sizes


# Script, flags that both runs have, the flag and its value, and the part that must change.
CHANGES: list[tuple[str, dict[str, Any], str, Any, str]] = [
    ("token_level", {}, "teacher", "other teacher", "scores"),
    ("token_level", {}, "student", "other student", "scores"),
    ("token_level", {}, "chat_template", "template", "template"),
    ("token_level", {"chat_template": "template", "completions": "dataset"}, "template_kwargs",
     '{"enable_thinking": false}', "losses"),
    ("token_level", {}, "dataset", "other rows", "losses"),
    ("token_level", {}, "max_rows", 3, "losses"),
    ("token_level", {}, "eval_dataset", "other rows", "scores"),
    ("token_level", {}, "eval_size", 1, "scores"),
    ("token_level", {}, "grader", "regex:y|$", "scores"),
    ("token_level", {}, "completions", "dataset", "losses"),
    ("token_level", {"completions": "dataset"}, "max_length", 45, "losses"),
    ("token_level", {}, "max_new_tokens", 5, "losses"),
    ("token_level", {}, "temperature", 2.0, "losses"),
    ("token_level", {}, "sampling_temperature", 0.5, "losses"),
    ("token_level", {}, "top_p", 0.3, "losses"),
    ("token_level", {}, "generation_batch_size", 3, "calls"),
    ("token_level", {"max_steps": -1}, "epochs", 1.0, "losses"),
    ("token_level", {}, "max_steps", 3, "losses"),
    ("token_level", {}, "batch_size", 3, "losses"),
    ("token_level", {}, "micro_batch_size", 2, "calls"),
    ("token_level", {}, "learning_rate", 1e-3, "weights"),
    ("token_level", {}, "weight_decay", 0.5, "weights"),
    ("token_level", {}, "warmup_steps", 2, "weights"),
    ("token_level", {}, "max_grad_norm", 1e-3, "weights"),
    ("token_level", {}, "seed", 1, "losses"),
    ("token_level", {}, "dtype", "bfloat16", "losses"),
    ("token_level", {}, "teacher_dtype", "bfloat16", "cache"),
    ("token_level", {}, "attn_implementation", "eager", "calls"),
    ("token_level", {}, "gradient_checkpointing", True, "calls"),
    ("token_level", {}, "compile", True, "calls"),
    ("token_level", {}, "lora_rank", 2, "weights"),
    ("token_level", {}, "save_steps", 1, "files"),
    ("token_level", {"save_steps": 1}, "save_total_limit", 1, "files"),
    ("token_level", {}, "eval_steps", 1, "evaluations"),
    ("token_level", {}, "logging_steps", 1, "writes"),
    ("token_level", {}, "report_to", "tensorboard", "trackers"),
    ("token_level", {}, "cache_teacher", False, "cache"),
    ("token_level", {}, "kl", "reverse", "losses"),
    ("token_level", {"kl": "jsd"}, "jsd_beta", 0.1, "losses"),
    ("token_level", {}, "skew", 0.3, "losses"),
    ("token_level", {}, "ce_weight", 0.5, "losses"),
    ("sequence_level", {}, "sampling_temperature", 1.0, "losses"),
    ("sequence_level", {"sampling_temperature": 1.0}, "samples_per_prompt", 2, "cache_lines"),
    ("sequence_level", {"sampling_temperature": 1.0}, "top_p", 0.3, "losses"),
    ("sequence_level", {}, "completions", "dataset", "losses"),
    ("sequence_level", {}, "learning_rate", 1e-3, "weights"),
    ("sequence_level", {}, "max_grad_norm", 1e-3, "weights"),
    ("on_policy", {"mix": 1.0}, "temperature", 2.0, "losses"),
    ("on_policy", {}, "mix", 1.0, "losses"),
    ("on_policy", {"mix": 1.0}, "mix_warmup_steps", 50, "losses"),
    ("on_policy", {"mix": 1.0}, "estimator", "sampled", "losses"),
    ("on_policy", {"mix": 1.0}, "rollout_temperature", 0.5, "losses"),
    ("on_policy", {"mix": 1.0}, "rollout_steps", 2, "losses"),
    ("on_policy", {"mix": 1.0}, "kl", "forward", "losses"),
    ("on_policy", {"mix": 0.0}, "ce_weight", 0.5, "losses"),
    ("on_policy", {"mix": 1.0}, "max_grad_norm", 1e-3, "weights"),
    ("cross_tokenizer", {}, "loss", "uld", "losses"),
    ("cross_tokenizer", {"loss": "uld"}, "top_k", 4, "losses"),
    ("cross_tokenizer", {}, "ce_weight", 0.5, "losses"),
    ("cross_tokenizer", {}, "temperature", 2.0, "losses"),
    ("cross_tokenizer", {}, "cache_teacher", False, "cache"),
    ("cross_tokenizer", {}, "max_grad_norm", 1e-3, "weights"),
]  # fmt: skip

# Flags with an effect on no run of the table: refused where there is none, or tested elsewhere.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("token_level", {"revision": "v1", "student": "student"}, "--revision"),
    ("token_level", {"teacher_revision": "v1", "teacher": "teacher"}, "--teacher-revision"),
    ("token_level", {"dataset_config": "x", "dataset": "rows"}, "--dataset-config"),
    ("token_level", {"dataset_split": "test", "dataset": "rows"}, "--dataset-split"),
    ("token_level", {"eval_split": "test"}, "--eval-split"),
    ("token_level", {"eval_split": "test", "eval_dataset": "rows"}, "--eval-split"),
    ("token_level", {"resume": True}, "--output-dir"),
    ("token_level", {"overwrite": True}, "--output-dir"),
    ("token_level", {"top_p": 0.5, "completions": "dataset"}, "--top-p"),
    ("token_level", {"sampling_temperature": 0.5, "completions": "dataset"}, "--sampling"),
    ("token_level", {"top_p": 0.5, "sampling_temperature": 0.0}, "--top-p"),
    ("sequence_level", {"top_p": 0.5}, "--top-p"),
    ("token_level", {"jsd_beta": 0.1}, "--jsd-beta"),
    ("token_level", {"skew": 0.1, "kl": "jsd"}, "--skew"),
    ("on_policy", {"mix": 1.0, "top_p": 0.5}, "--top-p"),
    ("on_policy", {"mix": 1.0, "completions": "dataset"}, "--completions"),
    ("on_policy", {"mix": 1.0, "ce_weight": 0.5}, "--ce-weight"),
    ("on_policy", {"mix": 0.0, "rollout_steps": 4}, "--rollout-steps"),
    ("on_policy", {"mix": 0.0, "rollout_temperature": 0.5}, "--rollout-temperature"),
    ("on_policy", {"mix": 0.0, "mix_warmup_steps": 4}, "--mix-warmup-steps"),
    ("cross_tokenizer", {"top_k": 4}, "--top-k"),
    ("sequence_level", {"samples_per_prompt": 2}, "--samples-per-prompt"),
    ("sequence_level", {"keep_matching": True, "completions": "dataset"}, "--keep-matching"),
    ("sequence_level", {"api_model": "m"}, "--api-model"),
    ("sequence_level", {"api_concurrency": 3}, "--api-concurrency"),
    ("sequence_level", {"api_timeout": 3.0}, "--api-timeout"),
    ("sequence_level", {"api_base_url": "https://h/v1"}, "--api-base-url"),
]  # fmt: skip

# Where a run goes, and what is asked of a server: test_resume.py, test_errors.py and test_api.py;
# where a teacher lies: test_fsdp.py; the head's products: test_compiled_loss.py; test_plan.py;
# rollouts: test_rollout_server.py.
ELSEWHERE = {"output_dir", "cache_dir", "teacher_device_map", "head_dtype", "plan"}
ELSEWHERE |= {"rollout_url", "rollout_weights"}


def test_help_where_output_is_not_utf8(monkeypatch):
    output = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", output)
    monkeypatch.setattr(sys, "argv", ["token_level.py", "--help"])
    with pytest.raises(SystemExit) as end:
        common.launch(token_level.main, token_level.Arguments, token_level.__doc__)
    output.flush()
    assert end.value.code == 0 and b"--jsd-beta" in output.buffer.getvalue()


def test_every_flag_is_in_a_table():
    known = {flag for _, _, flag, _, _ in CHANGES} | {f for _, flags, _ in REFUSED for f in flags}
    for script in SCRIPTS.values():
        names = {f.name for f in dataclasses.fields(script.Arguments)}
        assert not names - known - ELSEWHERE - {n for n in names if n.startswith("api_")}


@pytest.fixture(scope="module")
def before() -> dict[str, Seen]:
    """Runs without the flag in question, which several flags share."""
    return {}


@pytest.mark.parametrize(
    "script, base, flag, value, part", CHANGES, ids=[f"{c[0]}-{c[2]}" for c in CHANGES]
)
def test_flag_changes_something(
    script, base, flag, value, part, before, files, tmp_path, tmp_path_factory, monkeypatch
):
    key = f"{script} {base}"
    if key not in before:
        place = tmp_path_factory.mktemp("before")
        before[key] = Seen(SCRIPTS[script], place, files, base, monkeypatch)
    after = Seen(SCRIPTS[script], tmp_path, files, {**base, flag: value}, monkeypatch)
    assert getattr(before[key], part) != getattr(after, part)


@pytest.mark.parametrize("script, flags, word", REFUSED, ids=[f"{r[0]}{r[1]}" for r in REFUSED])
def test_flag_without_effect_is_refused(script, flags, word, files):
    given = {k: files.get(v, v) if isinstance(v, str) else v for k, v in flags.items()}
    args = SCRIPTS[script].Arguments(**given)
    with pytest.raises(UsageError, match=word):
        common.check_arguments(args)
        if script == "sequence_level":
            args.check()
        elif script == "cross_tokenizer":
            args.objective(common.load_pair(args, torch.device("cpu")))
        else:
            args.objective()
