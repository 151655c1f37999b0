"""A real server's text against the local run's: `transformers serve` with the embedded teacher.

Runs sequence_level.py twice on the same rows, greedy: with the teacher loaded, and with the same
teacher behind HTTP. Prints the share of equal texts and every pair that differs; then, from the
rows whose texts are equal, trains a student on either text and compares the weights bit for bit.

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
    """The server, once it says that it is well."""
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(TEACHER), "--dtype", "float32"]
    where = ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    with open(log, "wb") as out:
        server = subprocess.Popen([*command, *where], stdout=out, stderr=out)
    while server.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health"):
                return server
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.5)
    raise SystemExit(f"the server ended: {log.read_text()[-2000:]}")


def distil(place: Path, name: str, *flags: str) -> Path:
    run = place / name
    small = ["--max-steps", "30", "--eval-size", "50", "--eval-steps", "0", "--temperature", "0"]
    where = ["--output-dir", str(run), "--cache-dir", str(place / "cache")]
    command = [sys.executable, str(ROOT / "sequence_level.py"), *small, *where, *flags]
    subprocess.run(command, check=True)
    return run


def texts(run: Path) -> dict[str, str]:
    """Prompt to answer, from the text that a run trained on."""
    rows = map(json.loads, (run / "completions.jsonl").read_text(encoding="utf-8").splitlines())
    return {json.dumps(r["messages"][:-1]): r["messages"][-1]["content"] for r in rows}


def only(run: Path, wanted: set[str]) -> Path:
    """The run's completions.jsonl without the rows whose texts differ."""
    kept = run.with_suffix(".jsonl")
    lines = (run / "completions.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept.write_text(
        "".join(x for x in lines if json.dumps(json.loads(x)["messages"][:-1]) in wanted)
    )
    return kept


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "model.safetensors")


def same(ours: Path, theirs: Path) -> bool:
    a, b = weights(ours), weights(theirs)
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def main(rows: int) -> None:
    place, port = Path(tempfile.mkdtemp(prefix="api_server-")), free_port()
    os.environ["HF_HUB_OFFLINE"] = "1"
    server = serve(port, place / "server.log")
    try:
        api = ["--api-base-url", f"http://127.0.0.1:{port}/v1", "--api-model", str(TEACHER)]
        runs = [distil(place, "local", "--max-rows", str(rows))]
        runs.append(distil(place, "served", "--max-rows", str(rows), *api))
    finally:
        server.terminate()
        server.wait()
    local, served = map(texts, runs)
    equal = {prompt for prompt, text in local.items() if served.get(prompt) == text}
    print(f"{len(equal)} of {len(local)} texts are equal: {len(equal) / len(local):.1%}")
    for prompt in sorted(local.keys() - equal):
        asked = json.loads(prompt)[-1]["content"]
        print(f"  {asked}: {local[prompt]!r} here, {served.get(prompt)!r} there")
    if len(equal) < len(local):
        evaluation = ["--eval-dataset", str(ROOT / "data" / "eval.jsonl")]
        data = [[*evaluation, "--completions", "dataset", "--dataset", str(only(r, equal))]
                for r in runs]  # fmt: skip
        runs = [distil(place, f"{r.name}-equal", *d) for r, d in zip(runs, data, strict=True)]
    print(f"equal weights from the {len(equal)} equal texts: {same(*runs)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=300)
    main(parser.parse_args().rows)
