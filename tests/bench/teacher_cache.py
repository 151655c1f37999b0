"""What --cache-teacher saves in a sweep over five temperatures: seconds, disk, peak memory.

The bench runs token_level.py five times without the cache of hidden states and five times with it,
in a scratch directory. Both sweeps keep the teacher's text; only the states differ. The first run
of each sweep generates the text too, so the sums compare whole sweeps.

    python tests/bench/teacher_cache.py --max-rows 6400 --epochs 2 --eval-size 300
    python tests/bench/teacher_cache.py --teacher DIR/smollm2 --student DIR/smollm2-8l \
        --dataset data/chat.jsonl --max-rows 40 --eval-size 8 --max-new-tokens 64 --epochs 2 \
        --batch-size 8 --micro-batch-size 4 --learning-rate 3e-4 --warmup-steps 2
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "token_level.py"
TEMPERATURES = (1, 1.5, 2, 3, 4)


def sweep(name: str, flags: list[str], directory: str) -> float:
    """Total seconds of the five runs; prints each run, and what it said about the cache."""
    seconds = []
    for temperature in TEMPERATURES:
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *flags, "--temperature", str(temperature),
             "--cache-dir", f"{directory}/{name}",
             "--output-dir", f"{directory}/{name}-{temperature}"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)  # the peak of this run, not of all children
        if status:
            raise SystemExit(f"{SCRIPT.name} failed")
        seconds.append(time.perf_counter() - began)
        peak = usage.ru_maxrss / 1e6
        print(f"{name:8} T = {temperature:<4} {seconds[-1]:8.1f} s {peak:8.2f} GB peak", flush=True)
        for line in re.findall(r"^.*(?:bytes a token|backbone is not).*$", printed, re.M):
            print(f"         {line}")
    return sum(seconds)


def size(directory: Path) -> float:
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _, flags = parser.parse_known_args()  # all flags are token_level.py's
    totals = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        for name in ("live", "cached"):
            more = [] if name == "cached" else ["--no-cache-teacher"]
            totals[name] = sweep(name, [*flags, *more], directory)
            print(f"{name:8} all five {totals[name]:7.1f} s")
        print(f"cache of states and head: {size(Path(directory) / 'cached/states'):.1f} MB")
    print(f"saved: {totals['live'] - totals['cached']:.1f} s of {totals['live']:.1f} s")


if __name__ == "__main__":
    main()
