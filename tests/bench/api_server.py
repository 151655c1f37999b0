"""The text of a real server compared with that of a local run: `transformers serve`.

Runs sequence_level.py twice on the same rows, greedy: with the embedded teacher loaded, and with
the same teacher behind HTTP. Prints the share of equal texts and every pair that differs. Then it
trains a student on each of the two texts, on rows whose texts are equal, and compares the weights
bit for bit.

    pip install "transformers[serving]" && python tests/bench/api_server.py --rows 300
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "data" / "teacher"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def serve(port: int, log: Path) -> subprocess.Popen[bytes]:
    """Start the server and wait until it reports that it is healthy."""
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(TEACHER), "--dtype", "float32"]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out)
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return server
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")


def distil(directory: Path, name: str, *flags: str) -> Path:
    """The directory of a short run of sequence_level.py."""
    run = directory / name
    command = [
        sys.executable, str(ROOT / "sequence_level.py"), "--max-steps", "30", "--eval-size", "50",
        "--eval-steps", "0", "--temperature", "0",
        "--output-dir", str(run), "--cache-dir", str(directory / "cache"), *flags,
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return run


def texts(run: Path) -> dict[str, str]:
    """Prompt to answer, from the text that a run trained on."""
    rows = map(json.loads, (run / "completions.jsonl").read_text(encoding="utf-8").splitlines())
    return {json.dumps(r["messages"][:-1]): r["messages"][-1]["content"] for r in rows}


def select(run: Path, prompts: set[str]) -> Path:
    """A data set of those rows of the run's completions.jsonl that have one of the prompts."""
    file = run.with_suffix(".jsonl")
    lines = (run / "completions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    selected = [x for x in lines if json.dumps(json.loads(x)["messages"][:-1]) in prompts]
    file.write_text("".join(selected), encoding="utf-8")
    return file


def equal_weights(run: Path, other: Path) -> bool:
    """Whether the students of two runs are equal bit for bit."""
    a, b = (load_file(directory / "final" / "model.safetensors") for directory in (run, other))
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def main(rows: int) -> None:
    directory, port = Path(tempfile.mkdtemp(prefix="api_server-")), free_port()
    os.environ["HF_HUB_OFFLINE"] = "1"
    server = serve(port, directory / "server.log")
    try:
        api = ["--api-base-url", f"http://127.0.0.1:{port}/v1", "--api-model", str(TEACHER)]
        runs = [
            distil(directory, "local", "--max-rows", str(rows)),
            distil(directory, "served", "--max-rows", str(rows), *api),
        ]
    finally:
        server.terminate()
        server.wait()
    local, served = map(texts, runs)
    equal = {prompt for prompt, text in local.items() if served.get(prompt) == text}
    print(f"{len(equal)} of {len(local)} texts are equal: {len(equal) / len(local):.1%}")
    for prompt in sorted(local.keys() - equal):
        word = json.loads(prompt)[-1]["content"]
        print(f"  {word}: {local[prompt]!r} here, {served.get(prompt)!r} there")
    if len(equal) < len(local):
        shared = ["--eval-dataset", str(ROOT / "data" / "eval.jsonl"), "--completions", "dataset"]
        runs = [
            distil(directory, f"{run.name}-equal", "--dataset", str(select(run, equal)), *shared)
            for run in runs
        ]
    print(f"equal weights from the {len(equal)} equal texts: {equal_weights(*runs)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=300)
    main(parser.parse_args().rows)
