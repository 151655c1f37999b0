"""A whole step of on_policy.py and of TRL's DistillationTrainer: seconds and memory.

    python tests/bench/trl_distillation.py --models DIR --trl-python PYTHON [--steps 4]

In DIR smollm2 teaches smollm2-8l (see README.md beside this). Reverse KL at T = 1
on text that the student samples at T = 1 from the whole vocabulary. A step is --batch-size prompts
of data/chat.jsonl, the same on both sides and in the same order, and exactly --max-new-tokens
tokens after each prompt: no token ends an answer. trl_common.py says how both sides are measured.

The two sides sample different text, so the losses differ. Both are the divergence of the same pair
of models on text of the same kind; the bench fails if they differ by more than a tenth and noise.

--rollout-steps is the flag of on_policy.py. At 1 (the default here) every step samples for itself,
as in TRL. --micro-batch-size divides the backward pass; TRL gets it as gradient accumulation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import trl_common


def suite_arguments(args: argparse.Namespace, directory: Path) -> Any:
    import on_policy

    return on_policy.Arguments(
        student=str(args.models / "smollm2-8l"), teacher=str(args.models / "smollm2"),
        mix=1.0, rollout_steps=args.rollout_steps, cache_teacher=False,
        batch_size=args.batch_size, micro_batch_size=args.micro_batch_size,
        max_new_tokens=args.max_new_tokens, max_steps=args.steps + args.rollout_steps,
        **trl_common.SUITE_SETTINGS, **trl_common.suite_files(directory),
    )  # fmt: skip


def write_rows(args: argparse.Namespace, directory: Path) -> None:
    """Prompts of data/chat.jsonl, as lists of turns."""
    lines = (trl_common.ROOT / "data" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    count = (args.steps + args.rollout_steps) * args.batch_size
    if count > len(lines):
        raise SystemExit(f"{count} prompts are needed, and data/chat.jsonl has {len(lines)}")
    rows = [{"prompt": json.loads(line)["messages"]} for line in lines[:count]]
    trl_common.write_suite_rows(directory, rows)
    ordered = trl_common.suite_order(rows, suite_arguments(args, directory))
    (directory / "trl.json").write_text(json.dumps(ordered))


def run_trl(args: argparse.Namespace, directory: Path) -> None:
    """DistillationTrainer as it comes; the subclass only reads its loss and its lengths."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import DistillationConfig, DistillationTrainer

    recorder = trl_common.Recorder(args.rollout_steps)

    class Watched(DistillationTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            loss = super().training_step(model, inputs, *rest)
            recorder.losses.append(loss.item())
            recorder.targets.append(int(self._buffered_inputs[0]["completion_mask"].sum()))
            return loss

    student, teacher = trl_common.load_trl_models(
        recorder, args.models / "smollm2-8l", args.models / "smollm2"
    )
    size = args.micro_batch_size or args.batch_size
    pieces = args.batch_size // size
    config = DistillationConfig(
        output_dir=str(directory / "trl"), max_steps=args.steps + args.rollout_steps,
        per_device_train_batch_size=size, gradient_accumulation_steps=pieces,
        beta=1.0,  # reverse KL
        temperature=1.0, top_k=0, top_p=1.0, max_completion_length=args.max_new_tokens,
        generation_kwargs={"min_new_tokens": args.max_new_tokens}, shuffle_dataset=False,
        **trl_common.TRL_SETTINGS,
    )  # fmt: skip
    trainer = Watched(
        model=student, teacher_model=teacher, args=config,
        callbacks=[trl_common.trl_callback(recorder)],
        train_dataset=Dataset.from_list(json.loads((directory / "trl.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(args.models / "smollm2-8l"),
    )  # fmt: skip
    trainer.train()
    # The loss of a micro-batch is its share of the step's loss.
    recorder.losses = [sum(recorder.losses[:pieces])]
    recorder.targets = [recorder.targets[0] * pieces]
    recorder.report()


def main() -> None:
    parser = trl_common.make_parser(__doc__)
    parser.set_defaults(steps=4)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--micro-batch-size", type=int, default=0, help="0: the whole batch")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rollout-steps", type=int, default=1, help="must divide --steps")
    args = parser.parse_args()
    if args.steps % args.rollout_steps:
        parser.error("--steps must be a multiple of --rollout-steps")
    if args.side == "suite":
        import on_policy

        arguments = suite_arguments(args, args.directory)
        recorder = trl_common.Recorder(args.rollout_steps)
        trl_common.run_suite(on_policy, arguments, recorder, end_ids=[])
    elif args.side == "trl":
        run_trl(args, args.directory)
    else:
        with tempfile.TemporaryDirectory() as directory:
            write_rows(args, Path(directory))
            sides = trl_common.measure(args, Path(directory))
        suite = sides["suite"]
        assert suite["targets"] == args.batch_size * args.max_new_tokens, sides
        if trl := sides.get("TRL"):
            assert suite["targets"] == trl["targets"], sides
            # A token's divergence varies about as much as its mean.
            noise = 2 / suite["targets"] ** 0.5
            assert abs(suite["loss"] / trl["loss"] - 1) < 0.1 + noise, sides
        print(f"{args.batch_size} prompts, {args.max_new_tokens} new tokens each, float32, CPU")
        print(f"{args.threads} threads, median of {args.steps // args.rollout_steps} measurements")
        trl_common.print_table(sides)


if __name__ == "__main__":
    main()
