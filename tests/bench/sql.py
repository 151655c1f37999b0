"""Text to SQL: a coder of another model family teaches a small chat model one shop's database.

    python tests/bench/sql.py --models DIR

DIR holds the teacher (`qwen-coder`), the student (`smollm2`) and an 8-layer cut of that student
before training (`smollm2-8l`): any chat models, of which the last two share a tokenizer.

Every method learns from the same 4096 prompts (`data/sql/`) in the same number of steps, each at
its own learning rate, the best of a grid on the held-out prompts; the best two are repeated with
other seeds. Then the best student teaches the cut, by the methods for one tokenizer. Prints the
share of held-out questions whose query gives the right result: for forms of questions that occur in
training, with other values, and for forms that do not.

Two runs took 250 and 273 seconds on one H100 with `--jobs 8`, text included; two CPU cores would
take hours. The bench says beforehand how many runs are left. Finished runs are not run again, and
cut ones are resumed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
SQL = ROOT / "data" / "sql"
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (from the repository's root, which is not installed)

GRADER = f"{SQL / 'grader.py'}:same_result"
KEPT = "sequence level, 4 samples, right ones"
METHODS = {
    KEPT: ["sequence_level.py", "--keep-matching", "--samples-per-prompt", "4",
           "--temperature", "1"],
    "gold labels": ["sequence_level.py", "--completions", "dataset"],
    "sequence level": ["sequence_level.py"],
    "sequence level, right answers": ["sequence_level.py", "--keep-matching"],
    "cross-tokenizer": ["cross_tokenizer.py"],
    "cross-tokenizer, greedy text": ["cross_tokenizer.py", "--sampling-temperature", "0"],
}  # fmt: skip
ON_KEPT_TEXT = {"cross-tokenizer, right samples": ["cross_tokenizer.py"]}
CHAIN = {
    "8 layers: sequence level": ["sequence_level.py"],
    "8 layers: token level": ["token_level.py"],
    "8 layers: on-policy": ["on_policy.py"],
    "8 layers: on-policy, --kl forward --mix 1": ["on_policy.py", "--kl", "forward", "--mix", "1"],
}


class Job(NamedTuple):
    """One run of a script."""

    method: str
    learning_rate: str
    seed: int
    directory: Path
    command: list[str]


def make_job(
    args: argparse.Namespace, method: str, words: list[str], rate: str, seed: int, **changes: Any
) -> Job:
    name = "".join(c if c.isalnum() else "-" for c in method)
    size = f"{args.steps}-{args.rows}-{args.eval_size}"
    directory = args.output_dir / f"{name}-{rate}-{size}-{seed}"
    flags = {
        "teacher": args.models / "qwen-coder", "student": args.models / "smollm2",
        "dataset": SQL / "train.jsonl", "eval-dataset": SQL / "eval.jsonl", "grader": GRADER,
        "max-rows": args.rows, "eval-size": args.eval_size, "max-new-tokens": 96,
        "max-steps": args.steps, "eval-steps": max(1, args.steps // 2), "seed": seed,
        "learning-rate": rate, "output-dir": directory, "cache-dir": args.output_dir / "cache",
        "save-total-limit": 1, **{name.replace("_", "-"): v for name, v in changes.items()},
    }  # fmt: skip
    words = [*words, *(str(w) for name, v in flags.items() for w in (f"--{name}", v)), *args.flags]
    return Job(method, rate, seed, directory, words)


def run(jobs: list[Job], side_by_side: int) -> None:
    """Run what is not finished."""
    left = [job for job in jobs if not (job.directory / "results.json").exists()]
    print(f"{len(left)} of {len(jobs)} runs are left", flush=True)

    def start(job: Job) -> None:
        cut = any(job.directory.glob("checkpoints/*/state.json"))
        command = [sys.executable, str(ROOT / job.command[0]), *job.command[1:]]
        job.directory.parent.mkdir(parents=True, exist_ok=True)
        log = job.directory.with_suffix(".log")
        with open(log, "w") as output:
            words = [*command, "--resume" if cut else "--overwrite"]
            done = subprocess.run(words, stdout=output, stderr=output)
        print(f"{job.directory} exit {done.returncode}", flush=True)
        if done.returncode:
            print(log.read_text(encoding="utf-8")[-1500:], flush=True)
        else:
            shutil.rmtree(job.directory / "checkpoints")  # 1.6 GB

    with ThreadPoolExecutor(side_by_side) as pool:
        list(pool.map(start, left))


def accuracy(answers: list[dict[str, Any]], who: str) -> dict[str, float]:
    """Shares of right answers: of all, of forms with training rows, and of the others."""
    train = (SQL / "train.jsonl").read_text(encoding="utf-8").splitlines()
    trained = {json.loads(line)["form"] for line in train}
    right = {True: [], False: []}
    for answer in answers:
        right[answer["form"] in trained].append(answer["right"][who])
    parts = {"all": right[True] + right[False], "seen": right[True], "unseen": right[False]}
    return {name: statistics.fmean(part or [0]) for name, part in parts.items()}


def answers_of(job: Job) -> list[dict[str, Any]]:
    lines = (job.directory / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def best(jobs: list[Job], method: str) -> Job:
    """The run of a method with the most right answers."""
    finished = [j for j in jobs if j.method == method and (j.directory / "answers.jsonl").exists()]
    return max(finished, key=lambda job: accuracy(answers_of(job), "after")["all"])


def print_rows(jobs: list[Job], teacher: float) -> None:
    """A line for each method: mean (lowest to highest) over the seeds of its best rate."""
    for method in dict.fromkeys(job.method for job in jobs):
        rate = best(jobs, method).learning_rate
        same = [j for j in jobs if (j.method, j.learning_rate) == (method, rate)]
        scores = [accuracy(answers_of(job), "after") for job in same]
        cells = []
        for name in ("all", "seen", "unseen"):
            values = [score[name] for score in scores]
            spread = f" ({min(values):.1%} to {max(values):.1%})" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1%}{spread}")
        share = statistics.fmean(score["all"] for score in scores) / max(teacher, 1e-9)
        print(f"| {method} | {rate} | {' | '.join(cells)} | {share:.0%} |")


def plain_check(directory: Path, size: int) -> str:
    """Answer held-out questions with `transformers` alone: accuracy, tokens a second, memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device)
    talks = common.load_conversations(str(SQL / "eval.jsonl"), max_rows=size)
    grade, right, tokens, seconds = common.load_grader(GRADER), 0, 0, 0.0
    for first in range(0, len(talks), 64):
        part = talks[first : first + 64]
        inputs = tokenizer.apply_chat_template(
            [talk.messages for talk in part], add_generation_prompt=True, return_tensors="pt",
            padding=True, return_dict=True,
        ).to(device)  # fmt: skip
        start = time.perf_counter()
        ids = model.generate(**inputs, max_new_tokens=96, do_sample=False)
        texts = tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], True)
        seconds += time.perf_counter() - start
        tokens += sum(len(tokenizer(text)["input_ids"]) + 1 for text in texts)
        right += sum(grade(text, talk.row()) for text, talk in zip(texts, part, strict=True))
    size_gb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    return (
        f"{directory}: {right} of {len(talks)} right with plain transformers, "
        f"{tokens / seconds:.0f} tokens a second, {size_gb:.2f} GB of bfloat16 weights on {device}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/sql"))
    parser.add_argument("--learning-rates", nargs="+", default=["1e-4", "3e-4", "1e-3"])
    parser.add_argument("--seeds", type=int, default=3, help="of the best two methods")
    parser.add_argument("--steps", type=int, default=192)
    parser.add_argument("--rows", type=int, default=0, help="training prompts (0: all)")
    parser.add_argument("--eval-size", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="for every script")
    args = parser.parse_args()
    args.output_dir, args.models = args.output_dir.resolve(), args.models.resolve()

    jobs = [
        make_job(args, method, words, rate, 0)
        for rate in args.learning_rates
        for method, words in METHODS.items()
    ]
    run(jobs[:1], 1)  # alone, as the others would wait for the text that it writes
    run(jobs, args.jobs)
    text = best(jobs, KEPT).directory / "completions.jsonl"
    further = [
        make_job(args, method, words, rate, 0, dataset=text, completions="dataset")
        for method, words in ON_KEPT_TEXT.items()
        for rate in args.learning_rates
    ]
    bests = [best(jobs, method) for method in METHODS if method != "gold labels"]
    bests.sort(key=lambda job: -accuracy(answers_of(job), "after")["all"])
    further += [
        make_job(
            args,
            job.method,
            METHODS[job.method],
            job.learning_rate,
            seed,
            eval_steps=max(1, args.steps // 8),
        )
        for job in bests[:2]
        for seed in range(1, args.seeds)
    ]
    student = bests[0].directory / "final"
    cut = args.models / "smollm2-8l"
    chain = [
        make_job(args, method, words, rate, 0, teacher=student, student=cut)
        for method, words in CHAIN.items()
        for rate in args.learning_rates[1:]
    ]
    run(further + chain, args.jobs)

    answers = answers_of(jobs[0])
    rows = {"the teacher": accuracy(answers, "teacher"), "the student": accuracy(answers, "before")}
    print("\n| | learning rate | all | seen forms | unseen forms | share of the teacher's |")
    for name, score in rows.items():
        share = score["all"] / max(rows["the teacher"]["all"], 1e-9)
        print(f"| {name} | | {score['all']:.1%} | {score['seen']:.1%} | {score['unseen']:.1%} | "
              f"{share:.0%} |")  # fmt: skip
    print_rows(jobs + further, rows["the teacher"]["all"])
    print_rows(chain, accuracy(answers_of(bests[0]), "after")["all"])
    for directory in (args.models / "qwen-coder", args.models / "smollm2", student):
        print(plain_check(directory, args.eval_size), flush=True)


if __name__ == "__main__":
    main()
