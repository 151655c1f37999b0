"""What crossing tokenizers costs: five ways to learn from one teacher, seed by seed.

    python tests/bench/cross_seeds.py [--seeds 3] [--epochs 3] [--output-dir runs/cross-seeds]

For each seed, the same teacher text and the same number of steps of the same size:

    hybrid      cross_tokenizer.py
    uld         cross_tokenizer.py --loss uld (cross-entropy on the text beside it)
    text alone  the same loop with cross-entropy on the same text and nothing else: sequence level
    token level token_level.py from data/student: same size and labels, the teacher's tokenizer
    at 3e-3     the same at the learning rate of cross_tokenizer.py, which is higher

and then all of them on all the words of data/eval.jsonl, greedy. Recovered is (after − before) /
(teacher − before), each student from its own start. The paired bootstrap draws words, the same
for all students and seeds, 2000 times; its intervals hold 95 % of the draws. Runs that are
finished are not run again, so that a cut call goes on with the same command.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import cross_tokenizer

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "hybrid": [str(ROOT / "cross_tokenizer.py")],
    "uld": [str(ROOT / "cross_tokenizer.py"), "--loss", "uld"],
    "text alone": [__file__, "--text-alone"],
    "token level": [str(ROOT / "token_level.py")],
    "at 3e-3": [str(ROOT / "token_level.py"), "--learning-rate", "3e-3"],
}
ONE_TOKENIZER = ("token level", "at 3e-3")
DRAWS = 2000


class TextAlone(cross_tokenizer.CrossTokenizerLoss):
    """Cross-entropy on the text; the teacher is only scored."""

    def forward(
        self,
        batch: common.Batch,
        teacher_states: Tensor,
        pieces: list[cross_tokenizer.Piece],
    ) -> tuple[Tensor, Tensor]:
        loss, _ = common.distillation_loss(
            self.student.states(batch),
            self.student.head(),
            batch.targets,
            common.Objective(ce_weight=1.0),
        )
        return loss, torch.stack([loss.detach(), loss.new_zeros(())])


def score(directory: Path, model: str, args: argparse.Namespace) -> list[common.Row]:
    """Rows of one model on all evaluation words, kept beside the runs."""
    kept = args.output_dir / f"rows-{directory.name}.json"
    if not kept.exists():
        arguments = cross_tokenizer.Arguments(
            student=model, cache_dir=args.cache_dir, eval_size=args.eval_size
        )
        common.check_arguments(arguments)
        accelerator = common.start("cross_tokenizer", arguments)
        student, teacher = common.load_pair(arguments, accelerator.device)
        words = common.load_data(arguments)[1]
        prompts = common.encode_for_both(words, student, teacher, arguments.max_length)
        evaluator = common.Evaluator(prompts, student, teacher, arguments, accelerator)
        common.write_json(kept, evaluator(student))
        common.write_json(args.output_dir / "rows-teacher.json", evaluator.teacher_rows)
    return json.loads(kept.read_text(encoding="utf-8"))


def columns(rows: list[common.Row]) -> Tensor:
    """(words, 3): exact matches, edits and the words of the reference."""
    return torch.tensor(
        [[r["exact"], r["edits"], r["reference_words"]] for r in rows], dtype=torch.float64
    )


def rates(sums: Tensor, words: int) -> Tensor:
    """(..., 3) sums to (..., 2): exact match and error rate."""
    return torch.stack([sums[..., 0] / words, sums[..., 1] / sums[..., 2]], -1)


def interval(values: Tensor) -> str:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return f"[{low:+.4f}, {high:+.4f}]"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=cross_tokenizer.Arguments.epochs)
    parser.add_argument("--eval-size", type=int, default=5000)
    parser.add_argument("--max-rows", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/cross-seeds"))
    parser.add_argument("--cache-dir", default="runs/cache")
    args = parser.parse_args()

    after: dict[str, list[Tensor]] = {name: [] for name in METHODS}
    for seed in range(args.seeds):
        for name, command in METHODS.items():
            run = args.output_dir / f"{name.replace(' ', '-')}-{seed}"
            flags = {
                "--seed": seed, "--epochs": args.epochs, "--max-rows": args.max_rows,
                "--eval-size": 16, "--eval-steps": 0, "--save-steps": 0,
                "--cache-dir": args.cache_dir, "--output-dir": run,
            }  # fmt: skip
            words = [str(word) for pair in flags.items() for word in pair]
            if not (run / "results.json").exists():
                subprocess.run(
                    [sys.executable, *command, *words, "--overwrite"], check=True,
                    stdout=subprocess.DEVNULL,
                )  # fmt: skip
            after[name].append(columns(score(run, str(run / "final"), args)))
            exact, errors = rates(after[name][-1].sum(0), len(after[name][-1])).tolist()
            print(f"seed {seed}, {name}: {exact:.1%} exact, error rate {errors:.4f}", flush=True)
    starts = {
        name: columns(score(common.DATA / name, str(common.DATA / name), args))
        for name in ("student_other_tokenizer", "student")
    }
    before = {
        name: starts["student" if name in ONE_TOKENIZER else "student_other_tokenizer"]
        for name in METHODS
    }
    teacher = columns(json.loads((args.output_dir / "rows-teacher.json").read_text()))
    count = len(teacher)

    print(f"\n{args.seeds} seeds, {args.epochs:g} epochs, {count} words; mean (lowest to highest)")
    print(f"{'':14}{'exact match':>26}{'error rate':>26}{'recovered: exact':>26}{'errors':>26}")
    for name, start in (("teacher", teacher), *starts.items()):
        exact, errors = rates(start.sum(0), count).tolist()
        print(f"{name[:13]:14}{exact:>26.1%}{errors:>26.4f}")
    recovered = {}
    for name, students in after.items():
        scores = torch.stack([rates(s.sum(0), count) for s in students])
        start, goal = (rates(t.sum(0), count) for t in (before[name], teacher))
        recovered[name] = (scores - start) / (goal - start)
        cells = []
        for table, form in ((scores, (".1%", ".4f")), (recovered[name], (".1%", ".1%"))):
            for column, shown in zip(table.t().tolist(), form, strict=True):
                spread = f"({min(column):{shown}} to {max(column):{shown}})"
                cells.append(f"{statistics.mean(column):{shown}} {spread}")
        print(f"{name:14}" + "".join(f"{cell:>26}" for cell in cells))

    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(count, (DRAWS, count), generator=generator)
    weights = torch.stack([torch.bincount(d, minlength=count) for d in draws]).double()

    def drawn(students: list[Tensor]) -> Tensor:
        """(DRAWS, 2), the mean over seeds."""
        return torch.stack([rates(weights @ s, count) for s in students]).mean(0)

    def share(name: str) -> Tensor:
        start, goal = drawn([before[name]]), drawn([teacher])
        return (drawn(after[name]) - start) / (goal - start)

    print("\npaired bootstrap, means over the seeds:")
    for other in list(METHODS)[1:]:
        difference = drawn(after["hybrid"])[:, 1] - drawn(after[other])[:, 1]
        print(f"error rate, hybrid less {other}: {difference.mean():+.4f} {interval(difference)}")
    for other, (column, what) in itertools.product(
        ONE_TOKENIZER, enumerate(("exact match", "error rate"))
    ):
        whole = [recovered[name].mean(0)[column].item() for name in ("hybrid", other)]
        ratio = share("hybrid")[:, column] / share(other)[:, column]
        print(
            f"share of the gap in {what}, hybrid over {other}: {whole[0] / whole[1]:.3f} "
            f"{interval(ratio)}"
        )


if __name__ == "__main__":
    if "--text-alone" in sys.argv:
        sys.argv.remove("--text-alone")
        cross_tokenizer.CrossTokenizerLoss = TextAlone
        common.launch(cross_tokenizer.main, cross_tokenizer.Arguments, __doc__)
    else:
        main()
