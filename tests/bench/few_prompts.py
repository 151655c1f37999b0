"""The methods on one budget of steps, with few and with many training prompts, and what to do next.

    python tests/bench/few_prompts.py [--prompts 640 2560] [--seeds 1] [--steps 600] [--jobs 1]

Prints the scores on 2000 held-out words, as means over the seeds with the lowest and the highest,
and draws them against the number of prompts, with a band for the seeds: --figure. A run takes one
to four minutes on two cores; the bench says beforehand how many runs are left. Finished runs are
not run again, and a run that was cut is resumed.

With --equal-seconds every method trains as long as token level needs for its --steps, on hidden
states from the cache. The seconds of a step are measured first, in short runs of each method, one
after the other; they count neither the teacher's text nor evaluation.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas

ROOT = Path(__file__).resolve().parents[2]
FIRST, AFTER = "token level", "token level, then "
GENTLY = ["--learning-rate", "5e-4"]
METHODS = {
    "gold labels": ["tests/bench/gold_labels.py"],
    "sequence level": ["sequence_level.py"],
    "sequence level, 4 samples a prompt": [
        "sequence_level.py", "--samples-per-prompt", "4", "--temperature", "1"
    ],
    "sequence level, --temperature 1": ["sequence_level.py", "--temperature", "1"],
    "token level": ["token_level.py"],
    "token level, --kl reverse": ["token_level.py", "--kl", "reverse"],
    "cross-tokenizer (other student)": ["cross_tokenizer.py"],
    "on-policy, --kl reverse --mix 0.5": ["on_policy.py"],
    "on-policy, --kl reverse --mix 1": ["on_policy.py", "--mix", "1"],
    "on-policy, --kl forward --mix 0.5": ["on_policy.py", "--kl", "forward"],
    "on-policy, --kl forward --mix 1": ["on_policy.py", "--kl", "forward", "--mix", "1"],
    # As many steps more of the student that "token level" made of the same prompts.
    f"{AFTER}more of it": ["token_level.py", *GENTLY],
    f"{AFTER}--kl reverse --mix 0.5": ["on_policy.py", *GENTLY],
    f"{AFTER}--kl forward --mix 1": [
        "on_policy.py", "--kl", "forward", "--mix", "1", *GENTLY
    ],
}  # fmt: skip
SCORES = ["exact_match", "error_rate", "kl_to_teacher"]


class Run(NamedTuple):
    """One run of a script."""

    method: str
    prompts: int
    seed: int
    steps: int
    directory: Path


def slug(method: str) -> str:
    """The method's name in that of a directory."""
    return re.sub(r"[^a-z0-9.]+", "-", method)


def finish(run: Run, args: argparse.Namespace, words: int = 2000) -> None:
    """Run what is not finished, and score it on so many held-out words."""
    if (run.directory / "results.json").exists():
        return
    flags = {
        "--max-rows": run.prompts, "--max-steps": run.steps, "--seed": run.seed,
        "--eval-size": words, "--eval-steps": 0, "--output-dir": run.directory,
        "--cache-dir": args.output_dir / "cache",
    }  # fmt: skip
    if run.method.startswith(AFTER):
        name = f"{slug(FIRST)}-{run.prompts}-{args.steps}-{run.seed}"
        flags["--student"] = args.output_dir / name / "final"
    words = [str(word) for pair in flags.items() for word in pair]
    resume = "--resume" if any(run.directory.glob("checkpoints/*/state.json")) else "--overwrite"
    script, *more = METHODS[run.method]
    command = [sys.executable, str(ROOT / script), *more, *words, resume]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(run.directory, flush=True)


def seconds_of_a_step(method: str, args: argparse.Namespace) -> float:
    """Of training, from runs that differ in nothing but their steps, the fastest of three each."""
    seconds: dict[int, list[float]] = {20: [], 120: []}
    for repeat, steps in [(0, 1), *itertools.product(range(3), seconds)]:  # 1: fills the cache
        directory = args.output_dir / f"speed-{slug(method)}-{steps}-{repeat}"
        finish(Run(method, max(args.prompts), 0, steps, directory), args, words=16)
        results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
        seconds.setdefault(steps, []).append(results["seconds"])
    return (min(seconds[120]) - min(seconds[20])) / 100


def draw(table: pandas.DataFrame, target: Path) -> None:
    """The scores of each method against the number of prompts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(SCORES), figsize=(18, 5), layout="constrained")
    for name, axis in zip(SCORES, axes, strict=True):
        for method in METHODS:
            part = table[table["method"] == method].groupby("prompts")[name]
            if len(part):
                (line,) = axis.plot(part.mean(), marker="o", label=method)
                low, high = part.min(), part.max()
                axis.fill_between(low.index, low, high, color=line.get_color(), alpha=0.2)
        axis.axhline(table[table["prompts"] == 0][name].iloc[0], color="gray", linestyle=":")
        axis.set(title=name, xlabel="training prompts", xscale="log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.savefig(target, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[640, 2560])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--equal-seconds", action="store_true", help="not equal steps")
    parser.add_argument("--methods", nargs="+", choices=METHODS)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/few_prompts"))
    parser.add_argument("--figure", type=Path, help="default: scores.png in --output-dir")
    args = parser.parse_args()
    if not args.methods:
        args.methods = [m for m in METHODS if not (args.equal_seconds and m.startswith(AFTER))]
    if FIRST not in args.methods and any(m.startswith(AFTER) for m in args.methods):
        parser.error(f"{AFTER!r}... needs the method {FIRST!r}, too")
    steps = dict.fromkeys(args.methods, args.steps)
    if args.equal_seconds:
        if any(m.startswith(AFTER) for m in args.methods):
            parser.error(f"--equal-seconds is not for {AFTER!r}...")
        speeds = {method: seconds_of_a_step(method, args) for method in {FIRST: 0} | steps}
        steps = {m: round(args.steps * speeds[FIRST] / speeds[m]) for m in args.methods}
        print(f"seconds of a step: {speeds}\nsteps: {steps}", flush=True)
    runs = [
        Run(method, prompts, seed, steps[method], directory)
        for seed in range(args.seeds)
        for prompts in args.prompts
        for method in METHODS
        if method in args.methods
        for directory in [args.output_dir / f"{slug(method)}-{prompts}-{steps[method]}-{seed}"]
    ]
    left = sum(not (run.directory / "results.json").exists() for run in runs)
    print(f"{left} of {len(runs)} runs are left", flush=True)
    with ThreadPoolExecutor(args.jobs) as pool:
        for later in (False, True):
            part = [run for run in runs if run.method.startswith(AFTER) == later]
            list(pool.map(lambda run: finish(run, args), part))

    rows = []
    for run in runs:
        results = json.loads((run.directory / "results.json").read_text(encoding="utf-8"))
        gap = {"gap_recovered": results["gap_recovered"].get("exact_match")}
        row = {"method": run.method, "prompts": run.prompts, **results["after"], **gap}
        rows.append(row)
    start = json.loads((runs[0].directory / "results.json").read_text(encoding="utf-8"))
    rows.append({"method": "the student before", "prompts": 0, **start["before"]})
    rows.append({"method": "the teacher", "prompts": 0, **results["teacher"]})
    table = pandas.DataFrame(rows)
    columns = [*SCORES, "gap_recovered"]  # the latter of exact_match
    groups = table.groupby(["prompts", "method"], sort=False)[columns]
    print(groups.agg(["mean", "min", "max"]).to_string(float_format="{:.4f}".format))
    draw(table, args.figure or args.output_dir / "scores.png")


if __name__ == "__main__":
    main()
