"""What to do next with a student that has learned from its teacher's text: four ways, compared.

    python tests/bench/chain.py --student runs/sequence_level/final [--steps 200] [--seeds 3]

Each way goes on from the same student for equally many steps with its script's own defaults:
on-policy with reverse and with forward KL, token level, and more sequence level. Every end is
scored on the same held-out words by the same code, on_policy.Evaluator, so that all have an
exposure-bias ratio. Printed are mean and standard deviation over the seeds, which order the
prompts and draw the text that is sampled. Further flags go to every run (--learning-rate 1e-3);
a run that is finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (it lies in the repository's root and is not installed)
import on_policy  # noqa: E402

WAYS = {
    "on-policy, reverse KL": ["on_policy.py"],
    "on-policy, forward KL": ["on_policy.py", "--kl", "forward"],
    "token level": ["token_level.py"],
    "sequence level": ["sequence_level.py"],
}
SCORES = ("exact_match", "error_rate", "kl_to_teacher", "kl_on_own_text", "exposure_bias")


def train(way: str, seed: int, args: argparse.Namespace, more: list[str]) -> Path:
    """A run's directory, where its student lies in final/."""
    directory = args.output_dir / f"{way.replace(', ', '-').replace(' ', '-')}-{seed}"
    if not (directory / "results.json").exists():
        script, *flags = WAYS[way]
        flags += [
            "--student",
            str(args.student),
            "--seed",
            str(seed),
            "--cache-dir",
            args.cache_dir,
        ]
        flags += ["--max-steps", str(args.steps), "--output-dir", str(directory), "--overwrite"]
        flags += ["--eval-size", "100", "--eval-steps", "0", "--save-steps", "0", *more]
        subprocess.run(
            [sys.executable, str(ROOT / script), *flags], check=True, stdout=subprocess.DEVNULL
        )
    return directory


class Scorer:
    """Scores students on the same words."""

    def __init__(self, args: argparse.Namespace) -> None:
        flags = {"eval_size": args.eval_size, "cache_dir": args.cache_dir}
        self.flags = on_policy.Arguments(student=str(args.student), **flags)
        accelerator = common.start("on_policy", self.flags)
        _, held_out = common.load_data(self.flags)
        student, teacher = common.load_pair(self.flags, accelerator.device)
        prompts = common.encode_for_both(held_out, student, teacher, self.flags.max_length)
        self.evaluator = on_policy.Evaluator(prompts, student, teacher, self.flags, accelerator)

    def __call__(self, student: Path, directory: Path) -> common.Scores:
        """Scores of a student, kept in `directory`."""
        kept = directory / f"scores-of-{self.flags.eval_size}.json"
        if not kept.exists():
            self.flags.student = str(student)
            model, _ = common.load_pair(self.flags, self.evaluator.accelerator.device)
            common.write_json(kept, common.scores(self.evaluator(model)))
        return json.loads(kept.read_text(encoding="utf-8"))


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
    runs = {(way, seed): train(way, seed, args, more) for seed in range(args.seeds) for way in WAYS}

    score = Scorer(args)
    print(f"{args.eval_size} words; {args.steps} steps from {args.student}, {args.seeds} seeds")
    print(f"{'':24}" + "".join(f"{name:>20}" for name in SCORES))
    start = score(args.student, args.output_dir)
    print(f"{'the start':24}" + "".join(f"{start[name]:>20.4f}" for name in SCORES))
    for way in WAYS:
        ends = [runs[way, seed] for seed in range(args.seeds)]
        found = [score(end / "final", end) for end in ends]
        cells = []
        for name in SCORES:
            values = [f[name] for f in found]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.4f}{spread}")
        print(f"{way:24}" + "".join(f"{cell:>20}" for cell in cells))


if __name__ == "__main__":
    main()
