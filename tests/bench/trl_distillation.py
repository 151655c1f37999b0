"""A whole on-policy step here and in TRL's DistillationTrainer: seconds and memory.

    python tests/bench/trl_distillation.py --models DIR --trl-python /path/to/venv/bin/python

DIR holds the real pair (../shared/real_models.py): smollm2 teaches smollm2-8l. Both sides run in
a process of their own, one after the other, on CPU in float32, with reverse KL at T = 1 on text
that the student samples at T = 1 from the whole vocabulary, AdamW, gradients clipped to norm 1, no
gradient checkpointing. A step is --batch-size prompts of data/chat.jsonl, the same on both sides
and in the same order, and exactly --max-new-tokens tokens after each: no token ends an answer.
The draws differ, so the losses do too, but both are the divergence of the same pair of models on
text of the same kind, and the script fails where they differ by more than a tenth and noise.

--rollout-steps is on_policy.py's; at 1 (the default here) every step samples for itself, as TRL
does. --micro-batch-size cuts the backward pass; TRL gets it as gradient accumulation.

As many steps as one bulk of rollouts serves warm up, and whole bulks are measured: the mean from
the end of the warm-up to the end of the last step. With --threads 1, processor seconds mean
something on a busy machine too. Memory is the process's largest resident set (getrusage), and that
less the resident set after both models were loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What both optimizers are given; weight decay falls on matrices only on both sides.
ADAM = {"learning_rate": 1e-4, "weight_decay": 0.01, "max_grad_norm": 1.0}
BETAS = (0.9, 0.95)


def resident() -> float:
    """This process's resident set in bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def clock() -> tuple[float, float]:
    """Wall and processor time, in seconds."""
    return time.perf_counter(), time.process_time()


def report(ends: list[tuple[float, float]], steps: int, loaded: float, loss: float, written: int):
    """The JSON line that the parent process reads: of the last `steps` steps."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    first, last = ends[-steps - 1], ends[-1]
    wall, cpu = ((b - a) / steps for a, b in zip(first, last, strict=True))
    found = {"seconds": wall, "cpu": cpu, "peak": peak, "added": peak - loaded}
    print(json.dumps({**found, "loss": loss, "written": written}))


def run_suite(args: argparse.Namespace, conversations: list[Any], directory: Path) -> None:
    """The inner loop of on_policy.main, on its own building blocks."""
    sys.path.insert(0, str(ROOT))
    import common
    import on_policy

    flags = on_policy.Arguments(
        student=str(args.models / "smollm2-8l"), teacher=str(args.models / "smollm2"),
        dtype="float32", teacher_dtype="float32", cache_dir=str(directory), cache_teacher=False,
        mix=1.0, rollout_steps=args.rollout_steps, batch_size=args.batch_size,
        micro_batch_size=args.micro_batch_size, max_new_tokens=args.max_new_tokens, **ADAM,
    )  # fmt: skip
    accelerator = common.start("on_policy", flags)
    student, teacher = common.load_pair(flags, accelerator.device)
    loaded = resident()
    student.end_ids = []
    rows = [common.Conversation(messages, None, [], "") for messages in conversations]
    prompts = common.encode_for_both(rows, student, teacher, flags.max_length)
    assert len(prompts) == len(rows)
    steps = args.steps + args.rollout_steps
    # The prompts in the order of the file, as TRL reads them.
    common.global_batch = lambda items, a, step: items[
        step * a.batch_size : (step + 1) * a.batch_size
    ]
    objective = flags.objective()
    module = on_policy.OnPolicyLoss(student, teacher.head(), objective, flags.estimator)
    module, optimizer = accelerator.prepare(module, common.make_optimizer(module, flags))
    assert all(group["betas"] == BETAS for group in optimizer.param_groups)
    rollouts = on_policy.Rollouts(student, prompts, flags, steps, accelerator)
    student.model.train()
    common.reuse_freed_memory(False, accelerator.device)  # as Run.resume does
    ends, losses, written = [], [], []
    for step in range(steps):
        chosen, _ = rollouts(step)
        micro_batches, tokens = common.share_out(chosen, flags, accelerator)
        sums = 0.0
        for micro_batch in micro_batches:
            batch = common.collate([e.student for e in micro_batch], accelerator.device)
            theirs = common.collate([e.teacher for e in micro_batch], accelerator.device)
            loss, parts = module(batch, common.teacher_states(teacher, theirs), True)
            accelerator.backward(loss / tokens)
            sums += parts
            del loss
        accelerator.clip_grad_norm_(module.parameters(), flags.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        common.reuse_freed_memory(True, accelerator.device)  # as Run.save does after the first step
        losses.append((sums[0] / tokens).item())
        written.append(tokens)
        ends.append(clock())
    report(ends, args.steps, loaded, losses[0], written[0])


def run_trl(args: argparse.Namespace, conversations: list[Any], directory: Path) -> None:
    """DistillationTrainer as it comes; the subclass only reads its loss and its lengths."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    ends, losses, written = [], [], []

    class Watched(DistillationTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            loss = super().training_step(model, inputs, *rest)
            losses.append(loss.item())
            written.append(int(self._buffered_inputs[0]["completion_mask"].sum()))
            return loss

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock())

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(args.models / name, dtype=torch.float32)
        for name in ("smollm2-8l", "smollm2")
    )
    loaded = resident()
    size = args.micro_batch_size or args.batch_size
    pieces = args.batch_size // size
    config = DistillationConfig(
        output_dir=str(directory), max_steps=args.steps + args.rollout_steps,
        lr_scheduler_type="constant",
        per_device_train_batch_size=size, gradient_accumulation_steps=pieces,
        adam_beta1=BETAS[0], adam_beta2=BETAS[1], **ADAM,
        beta=1.0,  # reverse KL
        temperature=1.0, top_k=0, top_p=1.0, max_completion_length=args.max_new_tokens,
        generation_kwargs={"min_new_tokens": args.max_new_tokens}, shuffle_dataset=False,
        use_cpu=True, bf16=False, gradient_checkpointing=False,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Watched(
        model=student, teacher_model=teacher, args=config, callbacks=[Clock()],
        train_dataset=Dataset.from_list([{"prompt": messages} for messages in conversations]),
        processing_class=AutoTokenizer.from_pretrained(args.models / "smollm2-8l"),
    )  # fmt: skip
    trainer.train()
    # A micro-batch's loss is its share of the step's.
    report(ends, args.steps, loaded, sum(losses[:pieces]), written[0] * pieces)


def measure(python: str, side: str, args: argparse.Namespace, rows: Path) -> dict[str, float]:
    """One side in a process of its own; its last line of output."""
    command = [python, __file__, "--side", side, "--rows", str(rows)]
    for name in ("models", "steps", "batch_size", "micro_batch_size", "max_new_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--rollout-steps", str(args.rollout_steps)]
    settings = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def make_rows(args: argparse.Namespace) -> list[Any]:
    """Prompts of data/chat.jsonl, as lists of turns."""
    sys.path.insert(0, str(ROOT))
    import common

    rows = common.load_conversations(str(ROOT / "data" / "chat.jsonl"))
    count = (args.steps + args.rollout_steps) * args.batch_size
    if count > len(rows):
        raise SystemExit(f"{count} prompts are wanted, and data/chat.jsonl has {len(rows)}")
    return [row.messages for row in rows[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="holds smollm2 and smollm2-8l")
    parser.add_argument("--trl-python", help="the python of an environment that has TRL")
    parser.add_argument(
        "--steps", type=int, default=4, help="measured, a multiple of --rollout-steps"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=0, help="0: the whole batch")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rollout-steps", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("suite", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rows = json.loads(args.rows.read_text(encoding="utf-8"))
        run = run_suite if args.side == "suite" else run_trl
        run(args, rows, args.rows.parent)
        return
    if args.steps % args.rollout_steps:
        parser.error("--steps must be a multiple of --rollout-steps")
    if not args.trl_python:
        parser.error("--trl-python is needed")
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "rows.json"
        file.write_text(json.dumps(make_rows(args)), encoding="utf-8")
        suite = measure(sys.executable, "suite", args, file)
        trl = measure(args.trl_python, "trl", args, file)
    assert suite["written"] == trl["written"] == args.batch_size * args.max_new_tokens, (suite, trl)
    noise = 2 / suite["written"] ** 0.5  # a token's divergence varies about as much as its mean
    assert abs(suite["loss"] / trl["loss"] - 1) < 0.1 + noise, (suite, trl)
    print(f"{args.batch_size} prompts, {args.max_new_tokens} new tokens each, float32, CPU")
    print(f"{args.threads} threads, mean of {args.steps} steps")
    print(f"{'':34}{'suite':>10}{'TRL':>10}{'suite/TRL':>11}")
    lines = {
        "seconds a step": ("seconds", 1),
        "processor seconds a step": ("cpu", 1),
        "peak memory, GB": ("peak", 1e9),
        "  above the loaded models, GB": ("added", 1e9),
        "first loss, nats per target": ("loss", 1),
    }
    for name, (key, unit) in lines.items():
        ours, theirs = suite[key] / unit, trl[key] / unit
        print(f"{name:34}{ours:>10.4g}{theirs:>10.4g}{ours / theirs:>11.4g}")


if __name__ == "__main__":
    main()
