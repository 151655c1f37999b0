"""Losses for two tokenizers, the suite's and published ones, on the same text and steps.

    python tests/bench/cross_losses.py [--jobs 2]
    python tests/bench/cross_losses.py --models DIR [--jobs 1]

Without --models on the embedded pair (2000 held-out words), with it on text to SQL, where DIR holds
`qwen-coder` and `smollm2` as for `sql.py`. Each loss is trained with seed 0 at every learning rate
of a grid; the rate with the lowest error rate on the held-out prompts (with SQL: the most right
answers) is repeated with the other seeds. `published_losses.py` has the formulas.

Prints the mean over the seeds (lowest to highest), and the difference of each loss to `hybrid` in
exact match and error rate with the interval that holds 95 % of 2000 paired bootstrap draws of the
held-out prompts. A run on the embedded pair takes about a minute on one core; the bench says
beforehand how many runs are left. Finished runs are not run again, and cut ones are resumed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sql  # beside this file, as cross_seeds
from cross_seeds import DRAWS, rates
from sql import Job

import common

PUBLISHED = "tests/bench/published_losses.py"
LOSSES = {
    "hybrid": ["cross_tokenizer.py"],
    "hybrid + CE": ["cross_tokenizer.py", "--ce-weight", "1"],
    "uld + CE": ["cross_tokenizer.py", "--loss", "uld"],
    "ALM": [PUBLISHED, "--loss", "alm"],
    "ALM + CE": [PUBLISHED, "--loss", "alm", "--ce-weight", "1"],
    "X-Token, projected KL": [PUBLISHED, "--loss", "projected"],
    "X-Token, projected KL + CE": [PUBLISHED, "--loss", "projected", "--ce-weight", "1"],
    "GOLD, hybrid": [PUBLISHED, "--loss", "gold"],
    "GOLD, hybrid + CE": [PUBLISHED, "--loss", "gold", "--ce-weight", "1"],
}


def make_job(args: argparse.Namespace, loss: str, rate: str, seed: int) -> Job:
    if args.models:
        return sql.make_job(args, loss, LOSSES[loss], rate, seed)
    name = "".join(c if c.isalnum() else "-" for c in loss)
    size = f"{args.rows}-{args.eval_size}"
    directory = args.output_dir / f"{name}-{rate}-{size}-{seed}"
    flags = {
        "learning-rate": rate, "seed": seed, "eval-size": args.eval_size, "eval-steps": 0,
        "max-rows": args.rows, "output-dir": directory, "cache-dir": args.output_dir / "cache",
        "save-total-limit": 1,
    }  # fmt: skip
    words = [str(w) for name, value in flags.items() for w in (f"--{name}", value)]
    return Job(loss, rate, seed, directory, [*LOSSES[loss], *words, *args.flags])


def columns(job: Job) -> Tensor:
    """(prompts, 3): right or not, edits, and the words of the nearest reference."""
    rows = []
    for answer in sql.answers_of(job):
        words = common.final_text(answer["after"]).split()
        references = [common.final_text(r).split() for r in answer["references"]]
        edits, length = min((common.edit_distance(words, r), len(r)) for r in references)
        rows.append((answer["right"]["after"], edits, length))
    return torch.tensor(rows, dtype=torch.float64)


def spread(values: list[float], form: Callable[[float], str]) -> str:
    return f"{form(statistics.mean(values))} ({form(min(values))} to {form(max(values))})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=list(LOSSES))
    parser.add_argument("--learning-rates", nargs="+", help="default: 1e-3 3e-3 6e-3; SQL: 3e-4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=192, help="with --models")
    parser.add_argument("--rows", type=int, default=0, help="training prompts (0: all)")
    parser.add_argument("--eval-size", type=int)
    parser.add_argument("--output-dir", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for every script")
    args = parser.parse_args()
    grid = args.learning_rates or (["3e-4"] if args.models else ["1e-3", "3e-3", "6e-3"])
    args.eval_size = args.eval_size or (500 if args.models else 2000)
    args.output_dir = (
        args.output_dir or Path("runs", "cross_losses", "sql" if args.models else "embedded")
    ).resolve()

    jobs = [make_job(args, loss, rate, 0) for rate in grid for loss in args.losses]
    sql.run(jobs[:1], 1)  # alone, as the others would wait for the text that it writes
    sql.run(jobs, args.jobs)

    def error(job: Job) -> float:
        values = columns(job).sum(0)
        return -values[0].item() if args.models else values[1].item()

    best = {
        loss: min((job for job in jobs if job.method == loss), key=error) for loss in args.losses
    }
    more = [
        make_job(args, loss, job.learning_rate, seed)
        for seed in range(1, args.seeds)
        for loss, job in best.items()
    ]
    sql.run(more, args.jobs)

    print("\n| loss | rate: error rate of seed 0 | exact match | error rate | bits a byte |")
    print("|---|---|---|---|---|")
    answers, count = {}, 0
    for loss in args.losses:
        rate = best[loss].learning_rate
        same = [job for job in [best[loss], *more] if job.method == loss]
        answers[loss] = [columns(job) for job in same]
        count = len(answers[loss][0])
        exact, errors = zip(*(rates(a.sum(0), count).tolist() for a in answers[loss]), strict=True)
        results = [json.loads((job.directory / "results.json").read_text()) for job in same]
        bits = [r["after"]["bits_per_byte"] for r in results]
        tried = [
            f"{job.learning_rate}: {rates(columns(job).sum(0), count)[1]:.3f}"
            for job in jobs
            if job.method == loss
        ]
        print(f"| {loss} | {rate} of {', '.join(tried)} | {spread(exact, '{:.1%}'.format)} | "
              f"{spread(errors, '{:.3f}'.format)} | {spread(bits, '{:.3f}'.format)} |")  # fmt: skip
    for who in ("teacher", "before"):
        print(f"{who}: {results[0][who]}")

    draws = torch.randint(count, (DRAWS, count), generator=torch.Generator().manual_seed(0))
    weights = torch.stack([torch.bincount(d, minlength=count) for d in draws]).double()
    drawn = {
        loss: torch.stack([rates(weights @ a, count) for a in same]).mean(0)
        for loss, same in answers.items()
    }
    print("\nless hybrid, mean over the seeds, with 95 % of the draws: exact match; error rate")
    for loss, values in drawn.items():
        difference = values - drawn[args.losses[0]]
        low, high = difference.quantile(torch.tensor([0.025, 0.975]).double(), 0).tolist()
        cells = [
            f"{mean:+.4f} [{a:+.4f}, {b:+.4f}]"
            for mean, a, b in zip(difference.mean(0).tolist(), low, high, strict=True)
        ]
        print(f"{loss}: {'; '.join(cells)}")


if __name__ == "__main__":
    main()
