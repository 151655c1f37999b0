"""What --cache-teacher saves in a sweep of five temperatures: seconds, disk, peak memory.

Runs token_level.py five times without the cache of states and five times with it, in a scratch
directory. The teacher's text is kept in both sweeps; only its states differ. The first run of
either sweep writes the text too, so that the sums compare whole sweeps.

    python tests/bench/teacher_cache.py --max-steps 200
    python tests/bench/teacher_cache.py --teacher DIR/smollm2 --student DIR/smollm2-8l \
        --dataset data/chat.jsonl --max-rows 40 --eval-size 8 --max-new-tokens 64 --epochs 3 \
        --batch-size 8 --micro-batch-size 4 --learning-rate 3e-4 --warmup-steps 2
"""

from __future__ import annotations

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "token_level.py"
TEMPERATURES = (1, 1.5, 2, 3, 4)


def sweep(name: str, flags: list[str], directory: str) -> float:
    """Seconds of the five runs together; prints each, and what was said about the cache."""
    seconds = []
    for temperature in TEMPERATURES:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *flags, "--temperature", str(temperature),
             "--cache-dir", f"{directory}/{name}",
             "--output-dir", f"{directory}/{name}-{temperature}"],
            cwd=Path.cwd(), stdout=subprocess.PIPE, text=True, check=True,
        )  # fmt: skip
        seconds.append(time.perf_counter() - began)
        print(f"{name:8} T = {temperature:<4} {seconds[-1]:8.1f} s", flush=True)
        for line in re.findall(r"^.*(?:bytes a token|backbone is not).*$", done.stdout, re.M):
            print(f"         {line}")
    return sum(seconds)


def size(directory: Path) -> float:
    return sum(f.stat().st_size for f in directory.rglob("*") if f.is_file()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=("live", "cached"), help="one of the two sweeps (for its peak memory)"
    )
    own, flags = parser.parse_known_args()  # all other flags are token_level.py's
    totals = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        # Cached last: the peak of all children so far is then the live sweep's, if it is higher.
        for name in [own.only] if own.only else ["live", "cached"]:
            more = [] if name == "cached" else ["--no-cache-teacher"]
            totals[name] = sweep(name, [*flags, *more], directory)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
            print(f"{name:8} all five {totals[name]:7.1f} s, peak memory so far {peak:.2f} GB")
        if "cached" in totals:
            print(f"cache of states and head: {size(Path(directory) / 'cached/states'):.1f} MB")
    if len(totals) == 2:
        print(f"saved: {totals['live'] - totals['cached']:.1f} s of {totals['live']:.1f} s")


if __name__ == "__main__":
    main()
