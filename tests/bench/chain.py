"""Four ways to continue from a student that has learned from its teacher's text, compared.

    python tests/bench/chain.py --student runs/sequence_level/final [--steps 200] [--seeds 3]

Each way trains the same student for the same number of steps with its script's own defaults:
on-policy with reverse and with forward KL, token level, and more sequence level. All results are
scored on the same held-out words by on_policy.Evaluator, so that all have an exposure-bias ratio.
The bench prints mean and standard deviation over the seeds; a seed determines the order of the
prompts and the sampled text. Further flags go to every run (--learning-rate 5e-4). Finished runs
are not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (it lies in the repository's root and is not installed)
import on_policy  # noqa: E402

METHODS = {
    "on-policy, reverse KL": ["on_policy.py"],
    "on-policy, forward KL": ["on_policy.py", "--kl", "forward"],
    "token level": ["token_level.py"],
    "sequence level": ["sequence_level.py"],
}
SCORES = ("exact_match", "error_rate", "kl_to_teacher", "kl_on_own_text", "exposure_bias")


def train(method: str, seed: int, args: argparse.Namespace, more: list[str]) -> Path:
    """The directory of a run, with its student in final/."""
    words = map(str, [method, args.student, args.steps, *more, seed])
    directory = args.output_dir / re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words))[-120:]
    if not (directory / "results.json").exists():
        script, *command = METHODS[method]
        flags = {
            "--student": args.student, "--seed": seed, "--max-steps": args.steps,
            "--eval-size": 100, "--eval-steps": 0, "--save-steps": 0,
            "--cache-dir": args.cache_dir, "--output-dir": directory,
        }  # fmt: skip
        command += [str(word) for pair in flags.items() for word in pair]
        subprocess.run(
            [sys.executable, str(ROOT / script), *command, "--overwrite", *more], check=True,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
    return directory


class Scorer:
    """Scores students on the same words."""

    def __init__(self, args: argparse.Namespace) -> None:
        flags = {"eval_size": args.eval_size, "cache_dir": args.cache_dir}
        self.arguments = on_policy.Arguments(student=str(args.student), **flags)
        self.device = common.start("on_policy", self.arguments).device
        _, held_out = common.load_data(self.arguments)
        pair = common.load_pair(self.arguments, self.device)
        prompts = common.tokenize_prompts(held_out, pair, self.arguments.max_length)
        self.evaluator = on_policy.Evaluator(prompts, pair, self.arguments)

    def __call__(self, student: Path, directory: Path) -> common.Scores:
        """Scores of the student in one directory, kept in the other."""
        file = directory / f"scores-of-{self.arguments.eval_size}.json"
        if not file.exists():
            self.arguments.student = str(student)
            self.evaluator.student = common.load_student(self.arguments, self.device)
            common.write_json(file, common.scores(self.evaluator()))
        return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", type=Path, required=True, help="final/ of an earlier run")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--eval-size", type=int, default=5000)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/chain"))
    parser.add_argument("--cache-dir", default="runs/cache")
    args, more = parser.parse_known_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    runs = {
        (method, seed): train(method, seed, args, more)
        for seed in range(args.seeds)
        for method in METHODS
    }

    score = Scorer(args)
    print(f"{args.eval_size} words; {args.steps} steps from {args.student}, {args.seeds} seeds")
    print(f"{'':24}" + "".join(f"{name:>20}" for name in SCORES))
    start = score(args.student, args.output_dir)
    print(f"{'the start':24}" + "".join(f"{start[name]:>20.4f}" for name in SCORES))
    for method in METHODS:
        directories = [runs[method, seed] for seed in range(args.seeds)]
        results = [score(directory / "final", directory) for directory in directories]
        cells = []
        for name in SCORES:
            values = [result[name] for result in results]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        print(f"{method:24}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
