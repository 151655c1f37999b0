"""A training step of token_level.py and of TRL's GKDTrainer: seconds and memory.

    python tests/bench/trl_gkd.py --models DIR --trl-python PYTHON [--steps 5] [--cached]

In DIR smollm2 teaches smollm2-8l (see README.md beside this). Forward KL at T = 1,
no cross-entropy, 4 x 512 tokens. trl_common.py says how both sides are measured.

A row is a conversation made of data/chat.jsonl: some of its texts fill a quarter of the 512 tokens
as a question, and further texts fill the rest as an answer. Both sides get the same token ids and
the same targets. The loss of the first step shows that both do the same work; the bench fails if
the two losses differ by more than 1e-3.

Without --cached the teacher runs in every step on both sides. With --cached this suite does what
its script does by default: the teacher reads all rows before the first step ("seconds before", for
the rows of one step), and the steps are measured in a second process, which finds the states and
does not load the teacher's backbone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trl_common

BATCH, LENGTH = 4, 512


def suite_arguments(args: argparse.Namespace, directory: Path) -> Any:
    import token_level

    return token_level.Arguments(
        student=str(args.models / "smollm2-8l"), teacher=str(args.models / "smollm2"),
        completions="dataset", max_length=LENGTH, max_new_tokens=1, cache_teacher=args.cached,
        batch_size=BATCH, micro_batch_size=BATCH, max_steps=args.steps + 1,
        **trl_common.SUITE_SETTINGS, **trl_common.suite_files(directory),
    )  # fmt: skip


def write_rows(args: argparse.Namespace, directory: Path) -> None:
    """Conversations for the suite, and their token ids and targets for TRL's collator."""
    import torch

    import common

    arguments = suite_arguments(args, directory)
    model = common.open_model(arguments, torch.device("cpu"), "student")  # loads no weights
    texts = itertools.cycle(trl_common.texts())

    def tokens(*contents: str) -> common.Tokens:
        roles = ("user", "assistant")
        turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
        return common.tokenize_conversation(model, turns)

    def contents(texts: Iterator[str]) -> tuple[str, str]:
        question, answer = next(texts), next(texts)
        while len(tokens(question).ids) < LENGTH // 4:
            question += "\n" + next(texts)
        while len(tokens(question, answer).ids) < LENGTH + 8:  # no end of turn among the targets
            answer += "\n" + next(texts)
        return question, answer

    rows = []
    for question, answer in (contents(texts) for _ in range(BATCH * (args.steps + 1))):
        ids, targets = tokens(question, answer)
        mask = [int(i in set(targets)) for i in range(LENGTH)]
        trl = {"prompt": "", "input_ids": ids[:LENGTH], "completion_mask": mask}
        rows.append({"suite": {"prompt": question, "completion": answer}, "trl": trl})
    trl_common.write_suite_rows(directory, [row["suite"] for row in rows])
    ordered = trl_common.suite_order(rows, arguments)
    (directory / "trl.json").write_text(json.dumps([row["trl"] for row in ordered]))


def run_trl(args: argparse.Namespace, directory: Path) -> None:
    """GKDTrainer as it comes; the subclass only reads its loss and its targets."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    recorder = trl_common.Recorder()

    class Watched(GKDTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            loss = super().training_step(model, inputs, *rest)
            recorder.losses.append(loss.item())
            recorder.targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return loss

    student, teacher = trl_common.load_trl_models(
        recorder, args.models / "smollm2-8l", args.models / "smollm2"
    )
    config = GKDConfig(
        output_dir=str(directory / "trl"), max_steps=args.steps + 1,
        per_device_train_batch_size=BATCH, max_length=LENGTH,
        train_sampling_strategy="sequential",
        lmbda=0.0, temperature=1.0,
        beta=0.0,  # F.kl_div(student, teacher): KL(teacher ‖ student)
        **trl_common.TRL_SETTINGS,
    )  # fmt: skip
    trainer = Watched(
        model=student, teacher_model=teacher, args=config,
        callbacks=[trl_common.trl_callback(recorder)],
        train_dataset=Dataset.from_list(json.loads((directory / "trl.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(args.models / "smollm2-8l"),
    )  # fmt: skip
    trainer.train()
    recorder.report()


def main() -> None:
    parser = trl_common.make_parser(__doc__)
    trl_common.add_cached(parser)
    args = parser.parse_args()
    if args.side == "suite":
        import token_level

        arguments = suite_arguments(args, args.directory)
        trl_common.run_suite(token_level, arguments, trl_common.Recorder())
    elif args.side == "trl":
        run_trl(args, args.directory)
    else:
        with tempfile.TemporaryDirectory() as directory:
            write_rows(args, Path(directory))
            sides = trl_common.measure(args, Path(directory))
        suite = sides["suite"]
        if trl := sides.get("TRL"):
            assert suite["targets"] == trl["targets"], sides
            assert abs(suite["loss"] / trl["loss"] - 1) < 1e-3, sides
        print(
            f"{BATCH} x {LENGTH} tokens, {suite['targets']} targets in the first step, float32, CPU"
        )
        print(f"{args.threads} threads, median of {args.steps} steps")
        trl_common.print_table(sides)


if __name__ == "__main__":
    main()
