"""A training step of token-level distillation here and in TRL's GKDTrainer: seconds and memory.

    python tests/bench/trl_gkd.py --models DIR --trl-python PYTHON [--steps 5] [--cached]

DIR holds the real pair (../shared/real_models.py): smollm2 teaches smollm2-8l. Both sides run in
a process of their own, one after the other, on CPU in float32: forward KL at T = 1, no
cross-entropy, 4 x 512 tokens, AdamW, gradients clipped to norm 1, no gradient checkpointing.

The rows are made of data/chat.jsonl: some of its questions, in the model's chat template, fill a
quarter of the 512 tokens; texts of further conversations stand in for the answer and are cut to
fill the rest. That is no sense, but neither time nor memory depends on what the tokens say. Both
sides get the same token ids, and TRL's own collator gets the place where the answer starts, so
the targets are the same: everything after the prompt. The loss of the first step, per target,
shows that both do the same work; the script fails where the two differ by more than 1e-3.

The teacher runs live in every step on both sides. With --cached this suite does what its scripts
do by default: the teacher reads all rows before the first step ("seconds before", per step), and
the steps, in a second process like any later run, find its states and do not load its backbone.

Seconds are the median from the end of a step to the end of the next one, without the first step;
with --threads 1, processor seconds mean something on a busy machine too.
Memory is the process's largest resident set (getrusage), and that less the resident set after
both models were loaded: activations, gradients, optimizer state and temporaries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BATCH, LENGTH = 4, 512
# What both optimizers are given; weight decay falls on matrices only on both sides.
ADAM = {"learning_rate": 1e-4, "weight_decay": 0.01, "max_grad_norm": 1.0}
BETAS = (0.9, 0.95)
Row = dict[str, Any]


def make_rows(models: Path, count: int) -> list[Row]:
    """Rows of exactly LENGTH tokens in the form that TRL's collator takes."""
    sys.path.insert(0, str(ROOT))
    import common

    tokenizer = common.load_tokenizer(str(models / "smollm2-8l"), "main", None)
    conversations = common.load_conversations(str(ROOT / "data" / "chat.jsonl"))
    texts = itertools.cycle(m["content"] for c in conversations for m in c.messages)

    def row(texts: Iterator[str]) -> Row:
        asked, prompt, answer = [], [], []
        while len(prompt) < LENGTH // 4:
            asked.append(next(texts))
            turn = [{"role": "user", "content": "\n".join(asked)}]
            prompt = common.tokenize(tokenizer, common.render(tokenizer, turn, prompt=True)).ids
        while len(prompt) + len(answer) < LENGTH:
            answer += common.tokenize(tokenizer, next(texts) + "\n").ids
        ids = [*(prompt + answer)[: LENGTH - 1], tokenizer.eos_token_id]
        mask = [0] * len(prompt) + [1] * (LENGTH - len(prompt))
        return {"prompt": "", "input_ids": ids, "completion_mask": mask}

    return [row(texts) for _ in range(count)]


def resident() -> float:
    """This process's resident set in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def clock() -> tuple[float, float]:
    """Wall and processor time, in seconds."""
    return time.perf_counter(), time.process_time()


def report(
    ends: list[tuple[float, float]], loaded: float, loss: float, targets: int, once: float = 0.0
) -> None:
    """The JSON line that the parent process reads; `once` is spent before the first step."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    wall, cpu = (
        statistics.median(b - a for a, b in itertools.pairwise(times))
        for times in zip(*ends, strict=True)
    )
    found = {"seconds": wall, "cpu": cpu, "peak": peak, "added": peak - loaded}
    print(json.dumps({**found, "loss": loss, "targets": targets, "once": once}))


def run_suite(models: Path, rows: list[Row], directory: Path, cached: bool) -> None:
    """The inner loop of token_level.main, on its own building blocks."""
    sys.path.insert(0, str(ROOT))
    import common
    import token_level

    args = token_level.Arguments(
        student=str(models / "smollm2-8l"), teacher=str(models / "smollm2"),
        dtype="float32", teacher_dtype="float32", cache_dir=str(directory),
        cache_teacher=cached,
        **ADAM,
    )  # fmt: skip
    accelerator = common.start("token_level", args)
    student, teacher = common.load_pair(args, accelerator.device)
    loaded = resident()
    examples = []
    for row in rows:
        ids, answer = row["input_ids"], row["completion_mask"].index(1)
        tokens = common.with_response(ids[:answer], ids[answer:])
        examples.append(common.Example(tokens, tokens, ""))
    began = time.perf_counter()
    states = common.TeacherStates(teacher, examples, args, accelerator, "training text")
    once = time.perf_counter() - began
    module = token_level.TokenLevelLoss(student, teacher.head(), args.objective())
    module, optimizer = accelerator.prepare(module, common.make_optimizer(module, args))
    assert all(group["betas"] == BETAS for group in optimizer.param_groups)
    student.model.train()
    common.reuse_freed_memory(False, accelerator.device)  # as Run.resume does
    ends, losses, targets = [], [], []
    for start in range(0, len(examples), BATCH):
        micro_batch = examples[start : start + BATCH]
        batch = common.collate([e.student for e in micro_batch], accelerator.device)
        loss, _ = module(batch, states(micro_batch))
        accelerator.backward(loss / len(batch.targets))
        accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        common.reuse_freed_memory(True, accelerator.device)  # as Run.save does after the first step
        losses.append(loss.item() / len(batch.targets))
        del loss
        targets.append(len(batch.targets))
        ends.append(clock())
    report(ends, loaded, losses[0], targets[0], once / len(losses))


def run_trl(models: Path, rows: list[Row], directory: Path) -> None:
    """GKDTrainer as it comes; the subclass only reads its loss, its targets and the clock."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    ends, losses, targets = [], [], []

    class Watched(GKDTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            loss = super().training_step(model, inputs, *rest)
            losses.append(loss.item())
            targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return loss

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock())

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(models / name, dtype=torch.float32)
        for name in ("smollm2-8l", "smollm2")
    )
    loaded = resident()
    config = GKDConfig(
        output_dir=str(directory), max_steps=len(rows) // BATCH, per_device_train_batch_size=BATCH,
        max_length=LENGTH, train_sampling_strategy="sequential", lr_scheduler_type="constant",
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], **ADAM,
        lmbda=0.0, temperature=1.0,
        beta=0.0,  # F.kl_div(student, teacher): KL(teacher ‖ student)
        use_cpu=True, bf16=False, gradient_checkpointing=False,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Watched(
        model=student, teacher_model=teacher, args=config, callbacks=[Clock()],
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(models / "smollm2-8l"),
    )  # fmt: skip
    trainer.train()
    report(ends, loaded, losses[0], targets[0])


def measure(python: str, side: str, rows: Path, args: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own; its last line of output."""
    command = [python, __file__, "--models", str(args.models), "--side", side, "--rows", str(rows)]
    command += ["--cached"] * args.cached
    settings = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="holds smollm2 and smollm2-8l")
    parser.add_argument("--trl-python", help="the python of an environment that has TRL")
    parser.add_argument("--steps", type=int, default=5, help="measured, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cached", action="store_true", help="the script's default: see above")
    parser.add_argument("--side", choices=("suite", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rows = json.loads(args.rows.read_text(encoding="utf-8"))
        if args.side == "suite":
            run_suite(args.models, rows, args.rows.parent, args.cached)
        else:
            run_trl(args.models, rows, args.rows.parent)
        return
    if not args.trl_python:
        parser.error("--trl-python is needed")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.json"
        file.write_text(json.dumps(make_rows(args.models, BATCH * (args.steps + 1))))
        suite = measure(sys.executable, "suite", file, args)
        if args.cached:  # a second run finds the states and does not load the teacher's backbone
            suite |= {**measure(sys.executable, "suite", file, args), "once": suite["once"]}
        trl = measure(args.trl_python, "trl", file, args)
    assert suite["targets"] == trl["targets"], (suite, trl)
    assert abs(suite["loss"] / trl["loss"] - 1) < 1e-3, (suite, trl)
    print(f"{BATCH} x {LENGTH} tokens, {suite['targets']} targets in the first step, float32, CPU")
    print(f"{args.threads} threads, median of {args.steps} steps")
    print(f"{'':34}{'suite':>10}{'TRL':>10}{'suite/TRL':>11}")
    lines = {
        "seconds a step": ("seconds", 1),
        "processor seconds a step": ("cpu", 1),
        "seconds before, for a step's rows": ("once", 1),
        "peak memory, GB": ("peak", 1e9),
        "  above the loaded models, GB": ("added", 1e9),
        "first loss, nats per target": ("loss", 1),
    }
    for name, (key, unit) in lines.items():
        ours, theirs = suite[key] / unit, trl[key] / unit
        ratio = ours / theirs if theirs else math.nan
        print(f"{name:34}{ours:>10.4g}{theirs:>10.4g}{ratio:>11.4g}")


if __name__ == "__main__":
    main()
