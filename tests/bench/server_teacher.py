"""What a server's top-K log-probabilities keep of the teacher's weights: gradient and student.

    vllm serve TEACHER --served-model-name served --max-logprobs 256
    python tests/bench/server_teacher.py --teacher TEACHER --student STUDENT \\
        --url http://127.0.0.1:8000/v1 --name served [--seeds 3 --steps 40]

The server writes --rows answers. On these texts, for each K: the first step's loss, the cosine of
its gradient (all weights) with that of the whole distribution from the loaded teacher, and bytes a
token on disk.

With --seeds it also trains students on --prompts rows of --dataset, answered by the server once
for each seed: by sequence_level.py, by token_level.py with each K, and by token_level.py with the
loaded teacher, all on the same text for --steps steps; with --on-policy also by on_policy.py, with
the largest K and with the loaded teacher. It prints the `kl_to_teacher` of each, as the loaded
teacher's whole distribution gives it on its own held-out text. The number of runs that are left is
printed first; finished runs are not run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pandas
import torch
from accelerate import PartialState
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common
import token_level
from common import Objective

ROOT = Path(common.__file__).parent
TOPICS = "rain bread moon bees clocks paper glass rivers salt trees wind maps boats sleep music"
ASKED = ["What is {}?", "Explain {} to a child.", "Write two sentences about {}."]


def gradient(student: common.LanguageModel, batches, objective: Objective) -> tuple[float, Tensor]:
    """The loss a token, and its gradient with respect to all weights as one vector."""
    student.model.zero_grad()
    total, tokens = 0.0, 0
    for batch, teacher in batches:
        loss, _ = common.distillation_loss(student.logits(batch), batch.targets, objective, teacher)
        loss.backward()
        total, tokens = total + loss.item(), tokens + len(batch.targets)
    flat = [p.grad.flatten() for p in student.model.parameters() if p.grad is not None]
    return total / tokens, torch.cat(flat)


def trained(flags: argparse.Namespace) -> pandas.DataFrame:
    """`kl_to_teacher` of the students by method, a column for each seed."""
    api = ["--api-base-url", flags.url, "--api-model", flags.name]
    teacher = ["--teacher", flags.teacher]
    methods = {f"K = {k}": ["token_level.py", *api, "--api-top-logprobs", k] for k in flags.top}
    methods["whole distribution"] = ["token_level.py", *teacher]
    if flags.on_policy:
        own = ["on_policy.py", "--kl", "forward"]  # mixed with the text
        most = ["--api-top-logprobs", max(flags.top)]
        methods["on-policy, largest K"] = [*own, *api, *most]
        methods["on-policy, whole distribution"] = [*own, *teacher]
    out, table = flags.output_dir, {}
    left = [m for m in ("text", *methods) for s in range(flags.seeds) if not scored(out, m, s)]
    print(f"{len(left)} runs are left", flush=True)
    for seed in range(flags.seeds):
        common_flags = ["--seed", seed, "--max-steps", flags.steps, "--batch-size", 16,
                        "--micro-batch-size", 4, "--learning-rate", flags.learning_rate,
                        "--warmup-steps", 4, "--eval-steps", 0, "--cache-dir", out / "cache",
                        "--max-new-tokens", flags.new_tokens, "--max-length", 256]  # fmt: skip
        rows = ["--dataset", flags.dataset, "--max-rows", flags.prompts, "--eval-size", 32]
        text = ["sequence_level.py", *api, "--temperature", 1, *rows]
        known = ["--completions", "dataset", "--dataset", out / f"text-{seed}/completions.jsonl"]
        known += ["--eval-dataset", out / f"text-{seed}/completions.jsonl", "--eval-size", 4]
        for method, words in {"text": text, **methods}.items():
            run = [*words, *(known if method != "text" else []), "--student", flags.student]
            directory = out / f"{method}-{seed}".replace(" ", "")
            call([*run, *common_flags], directory)
            again = ["token_level.py", *teacher, *rows, "--student", directory / "final"]
            call([*again, *common_flags, "--max-steps", 1], directory / "scored")
            table.setdefault(method, {})[seed] = scored(out, method, seed)
    return pandas.DataFrame(table).T.assign(mean=lambda rows: rows.mean(axis=1))


def call(words: list[Any], directory: Path) -> None:
    """Run a script into the directory, if it has not finished there."""
    if not (directory / "results.json").exists():
        command = [sys.executable, ROOT / words[0], *words[1:], "--output-dir", directory]
        subprocess.run([*map(str, command), "--overwrite"], check=True, stdout=subprocess.DEVNULL)
        print(directory, flush=True)


def scored(out: Path, method: str, seed: int) -> float | None:
    """`kl_to_teacher` of a finished run's student."""
    path = out / f"{method}-{seed}".replace(" ", "") / "scored" / "results.json"
    return json.loads(path.read_text())["before"]["kl_to_teacher"] if path.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("teacher", "student", "url", "name"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--top", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--seeds", type=int, default=0, help="of trained students; 0: none")
    parser.add_argument("--on-policy", action="store_true", help="train by on_policy.py too")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--dataset", type=Path, default=ROOT / "data" / "chat.jsonl")
    parser.add_argument("--prompts", type=int, default=320)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/server_teacher"))
    flags = parser.parse_args()
    device = PartialState(cpu=not torch.cuda.is_available()).device
    shared = {"student": flags.student, "max_new_tokens": flags.new_tokens, "max_length": 256}
    args = token_level.Arguments(
        **shared, api_base_url=flags.url, api_model=flags.name, api_top_logprobs=max(flags.top),
        cache_dir=tempfile.mkdtemp(prefix="server_teacher-"),
    )  # fmt: skip
    student, server = pair = common.load_pair(args, device)
    loaded = common.open_model(
        token_level.Arguments(**shared, teacher=flags.teacher), device, "teacher"
    )
    asked = [form.format(topic) for topic in TOPICS.split() for form in ASKED][: flags.rows]
    talks = [
        common.Conversation([{"role": "user", "content": text}], None, [], text) for text in asked
    ]
    prompts = common.tokenize_prompts(talks, pair, args.max_length)
    examples = common.make_examples(prompts, pair, args)
    groups = common.length_batches(examples, lambda e: len(e.student.ids), 1024)
    batches = [common.collate([e.student for e in group], device) for group in groups]
    hidden = [common.teacher_hidden_states(loaded, group) for group in groups]
    whole = [common.Logits(states, loaded.head()) for states in hidden]
    states = loaded.head().weight.shape[1] * 4
    print(f"{sum(len(b.targets) for b in batches)} tokens; states: {states} bytes a token in fp32")
    for objective in (Objective("forward"), Objective("reverse")):
        loss, full = gradient(student, zip(batches, whole, strict=True), objective)
        print(f"{objective.kl:8} whole    loss {loss:.4f}  norm {full.double().norm():.4f}")
        for k in flags.top:
            top = [
                common.TopLogprobs.unpack(server.live([e.teacher for e in group], k))
                for group in groups
            ]
            part, got = gradient(student, zip(batches, top, strict=True), objective)
            # Sums of so many squares are not exact in float32.
            a, b = got.double(), full.double()
            cosine = (a @ b / (a.norm() * b.norm())).item()
            print(
                f"{objective.kl:8} K = {k:3}  loss {part:.4f}  norm {a.norm():.4f}  cosine "
                f"{cosine:.5f}  {6 * k + 8} bytes a token"
            )
    if flags.seeds:
        print(trained(flags).to_string(float_format="{:.4f}".format))
    with torch.no_grad():
        ours = torch.cat([top.logprobs[:, 0] for top in top])
        theirs = [
            common.compare(logits, b.targets) for logits, b in zip(whole, batches, strict=True)
        ]
        theirs = torch.cat([values["logprob"] for values in theirs])
    print(
        f"log-probabilities of the text, server against weights: {(ours - theirs).abs().mean():.5f}"
    )


if __name__ == "__main__":
    main()
