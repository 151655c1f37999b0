"""Four methods on one budget of steps, with few and with many training prompts.

    python tests/bench/few_prompts.py [--prompts 640 2560] [--seeds 1] [--steps 600]

Prints the scores on 2000 held-out words, as means over the seeds. A run takes one to two minutes
on two cores; the bench says beforehand how many runs are left. Finished runs are not run again, and
a run that was cut is resumed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "sequence level": ["sequence_level.py"],
    "token level": ["token_level.py"],
    "on-policy, --kl reverse --mix 0.5": ["on_policy.py"],
    "on-policy, --kl forward --mix 1": ["on_policy.py", "--kl", "forward", "--mix", "1"],
}
SCORES = ["exact_match", "error_rate", "kl_to_teacher"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, nargs="+", default=[640, 2560])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/few_prompts"))
    args = parser.parse_args()
    runs = [
        (method, prompts, args.output_dir / f"{number}-{prompts}-{args.steps}-{seed}", seed)
        for number, method in enumerate(METHODS)
        for prompts in args.prompts
        for seed in range(args.seeds)
    ]
    left = sum(not (run[2] / "results.json").exists() for run in runs)
    print(f"{left} of {len(runs)} runs are left", flush=True)
    for method, prompts, directory, seed in runs:
        if (directory / "results.json").exists():
            continue
        flags = {
            "--max-rows": prompts, "--max-steps": args.steps, "--seed": seed, "--eval-size": 2000,
            "--eval-steps": 0, "--output-dir": directory, "--cache-dir": args.output_dir / "cache",
        }  # fmt: skip
        words = [str(word) for pair in flags.items() for word in pair]
        resume = "--resume" if any(directory.glob("checkpoints/*/state.json")) else "--overwrite"
        script, *more = METHODS[method]
        command = [sys.executable, str(ROOT / script), *more, *words, resume]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(directory, flush=True)

    rows = []
    for method, prompts, directory, _ in runs:
        results = json.loads((directory / "results.json").read_text(encoding="utf-8"))
        rows.append({"method": method, "prompts": prompts, **results["after"]})
    rows.append({"method": "the student before", "prompts": 0, **results["before"]})
    rows.append({"method": "the teacher", "prompts": 0, **results["teacher"]})
    table = pandas.DataFrame(rows).groupby(["prompts", "method"], sort=False)[SCORES].mean()
    print(table.to_string(float_format="{:.4f}".format))


if __name__ == "__main__":
    main()
