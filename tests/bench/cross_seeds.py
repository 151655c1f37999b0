"""What different tokenizers cost: five ways to learn from one teacher, over several seeds.

    python tests/bench/cross_seeds.py [--seeds 3] [--epochs 3] [--output-dir runs/cross-seeds]

For each seed, on the same text of the teacher and with the same number of steps of the same size:

    hybrid       cross_tokenizer.py
    uld          cross_tokenizer.py --loss uld (with cross-entropy on the text)
    text alone   sequence_level.py on the same sampled text, same student and learning rate
    token level  token_level.py from data/student: same size and labels, the teacher's tokenizer
    at 3e-3      the same at the learning rate of cross_tokenizer.py, which is higher

Then all students are scored on all the words of data/eval.jsonl, greedy. Recovered is (after −
before) / (teacher − before), each student from its own start. The paired bootstrap draws words, the
same for all students and seeds, 2000 times; its intervals hold 95 % of the draws. Finished runs are
not run again, so an interrupted bench continues with the same command.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (it lies in the repository's root and is not installed)
import cross_tokenizer  # noqa: E402

RATE = str(cross_tokenizer.Arguments.learning_rate)
METHODS = {
    "hybrid": ["cross_tokenizer.py"],
    "uld": ["cross_tokenizer.py", "--loss", "uld"],
    "text alone": [
        "sequence_level.py", "--student", cross_tokenizer.Arguments.student,
        "--learning-rate", RATE, "--sampling-temperature", "1",
    ],
    "token level": ["token_level.py"],
    "at 3e-3": ["token_level.py", "--learning-rate", RATE],
}  # fmt: skip
SAME_TOKENIZER = ("token level", "at 3e-3")
DRAWS = 2000


def score(directory: Path, model: str, args: argparse.Namespace) -> list[common.Tally]:
    """Tallies of one model on all evaluation words, kept beside the runs."""
    file = args.output_dir / f"tallies-{directory.name}.json"
    if not file.exists():
        arguments = cross_tokenizer.Arguments(
            student=model, cache_dir=args.cache_dir, eval_size=args.eval_size
        )
        device = common.start("cross_tokenizer", arguments).device
        pair = common.load_pair(arguments, device)
        _, words = common.load_data(arguments)
        prompts = common.tokenize_prompts(words, pair, arguments.max_length)
        evaluator = common.Evaluator(prompts, pair, arguments)
        common.write_json(file, evaluator())
        common.write_json(args.output_dir / "tallies-teacher.json", evaluator.teacher_tallies)
    return json.loads(file.read_text(encoding="utf-8"))


def columns(tallies: list[common.Tally]) -> Tensor:
    """(words, 3): exact matches, edits, and the words of the reference."""
    return torch.tensor(
        [[t["exact"], t["edits"], t["reference_words"]] for t in tallies], dtype=torch.float64
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
        for name, (script, *command) in METHODS.items():
            run = f"{name.replace(' ', '-')}-{args.epochs:g}-{args.max_rows}-{seed}"
            run = args.output_dir / run
            flags = {
                "--seed": seed, "--epochs": args.epochs, "--max-rows": args.max_rows,
                "--eval-size": 16, "--eval-steps": 0, "--save-steps": 0,
                "--cache-dir": args.cache_dir, "--output-dir": run,
            }  # fmt: skip
            words = [str(word) for pair in flags.items() for word in pair]
            if not (run / "results.json").exists():
                command = [sys.executable, str(ROOT / script), *command, *words, "--overwrite"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            after[name].append(columns(score(run, str(run / "final"), args)))
            exact, errors = rates(after[name][-1].sum(0), len(after[name][-1])).tolist()
            print(f"seed {seed}, {name}: {exact:.1%} exact, error rate {errors:.4f}", flush=True)
    starts = {
        name: columns(score(common.DATA / name, str(common.DATA / name), args))
        for name in ("student_other_tokenizer", "student")
    }
    before = {
        name: starts["student" if name in SAME_TOKENIZER else "student_other_tokenizer"]
        for name in METHODS
    }
    teacher = columns(json.loads((args.output_dir / "tallies-teacher.json").read_text()))
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
        SAME_TOKENIZER, enumerate(("exact match", "error rate"))
    ):
        whole = [recovered[name].mean(0)[column].item() for name in ("hybrid", other)]
        ratio = share("hybrid")[:, column] / share(other)[:, column]
        print(
            f"share of the gap in {what}, hybrid over {other}: {whole[0] / whole[1]:.3f} "
            f"{interval(ratio)}"
        )


if __name__ == "__main__":
    main()
