"""The methods on answers of 44 to 99 phonemes: where in an answer does a student go wrong?

    python tests/bench/long_answers.py [--seeds 3] [--steps 300] [--jobs 1]

The task is data/sentences: ten to fourteen words in a row, answered by their phonemes, with nothing
that tells where a word ends. Prints, as means over the seeds with lowest and highest, the scores on
500 held-out sentences, `kl_on_own_text` and `exposure_bias` of every student that has the teacher's
tokens, and the error rate of each tenth of the answers; draws the last as --figure,
data/long_answers.png. Three more methods continue from the student of token level, for half of the
steps at a quarter of the learning rate.

Then, whether errors compound: sentences are grouped by the errors in the first half of the
student's answer, and student and teacher both write on from there. A student that has lost its
place makes more errors in the second half than one that has not.

A run takes two to nine minutes on one core; the bench says beforehand how many runs are left.
Finished runs are not run again, and a run that was cut is resumed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common

ROOT = Path(common.__file__).parent
TASK = ROOT / "data" / "sentences"
OTHER = ["--student", str(TASK / "student_other_tokenizer")]
METHODS = {
    "gold labels": ["tests/bench/gold_labels.py"],
    "sequence level": ["sequence_level.py"],
    "token level": ["token_level.py"],
    "on-policy, --kl reverse --mix 0.5": ["on_policy.py"],
    "on-policy, --kl forward --mix 1": ["on_policy.py", "--kl", "forward", "--mix", "1"],
    "cross-tokenizer (other student)": ["cross_tokenizer.py", *OTHER],
}
MORE = {
    "token level, then token level": ["token_level.py"],
    "token level, then on-policy, --kl reverse --mix 0.5": ["on_policy.py"],
    "token level, then on-policy, --kl forward --mix 1": METHODS["on-policy, --kl forward --mix 1"],
}
SCORES = ["exact_match", "error_rate", "kl_to_teacher", "kl_on_own_text", "exposure_bias"]
PARTS = 10
GROUPS = {"0": 0, "1-2": 2, "3-5": 5, "6 or more": sys.maxsize}  # errors in the first half


class Run(NamedTuple):
    """One run of a script."""

    method: str
    seed: int
    directory: Path


def call(words: Sequence[str], directory: Path, seed: int, steps: int, cache: Path) -> None:
    """Run a script into the directory, if it has not finished there."""
    if (directory / "results.json").exists():
        return
    flags = {
        "--teacher": TASK / "teacher", "--dataset": TASK / "train.jsonl",
        "--eval-dataset": TASK / "eval.jsonl", "--eval-size": 500, "--eval-steps": 0,
        "--max-new-tokens": 160, "--max-steps": steps, "--batch-size": 32, "--seed": seed,
        "--output-dir": directory, "--cache-dir": cache,
    }  # fmt: skip
    given = [str(word) for pair in flags.items() for word in pair]
    if "--student" not in words:
        given += ["--student", str(TASK / "student")]
    resume = "--resume" if any(directory.glob("checkpoints/*/state.json")) else "--overwrite"
    command = [sys.executable, str(ROOT / words[0]), *words[1:], *given, resume]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(directory, flush=True)


def finish(run: Run, args: argparse.Namespace) -> None:
    """Run what is not finished, and score the student on its own text, as on_policy.py does."""
    cache, steps = args.output_dir / "cache", args.steps
    words = (METHODS | MORE)[run.method]
    if run.method in MORE:
        start, steps = place("token level", run.seed, args) / "final", steps // 2
        words = [*words, "--student", str(start), "--learning-rate", "5e-4"]
    call(words, run.directory, run.seed, steps, cache)
    if words[0] not in ("on_policy.py", "cross_tokenizer.py"):
        own = ["on_policy.py", "--mix", "1", "--student", str(run.directory / "final")]
        call(own, run.directory / "own_text", run.seed, 1, cache)


def place(method: str, seed: int, args: argparse.Namespace) -> Path:
    """The directory of a run."""
    number = [*METHODS, *MORE].index(method)
    return args.output_dir / f"{number}-{args.steps}-{seed}"


def scores(directory: Path, stage: str) -> dict[str, float]:
    """Of the student before or after a run, on its own text too."""
    after = json.loads((directory / "results.json").read_text(encoding="utf-8"))[stage]
    if stage == "after" and (directory / "own_text").exists():
        after |= {k: v for k, v in scores(directory / "own_text", "before").items() if "own" in k}
        after["exposure_bias"] = after["kl_on_own_text"] / after["kl_to_teacher"]
    return after


def wrong_places(answer: Sequence[str], reference: Sequence[str]) -> Iterator[int]:
    """Places in the reference of the fewest edits that make it the answer."""
    distance = [[*range(len(answer) + 1)]]
    for i, word in enumerate(reference, 1):
        row = [i]
        for j, said in enumerate(answer, 1):
            above = distance[-1]
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != said)))
        distance.append(row)
    i, j = len(reference), len(answer)
    while i or j:
        here = distance[i][j]
        if i and j and here == distance[i - 1][j - 1] + (reference[i - 1] != answer[j - 1]):
            i, j = i - 1, j - 1
            if reference[i] != answer[j]:
                yield i
        elif i and here == distance[i - 1][j] + 1:
            i -= 1
            yield i
        else:
            j -= 1
            yield min(i, len(reference) - 1)


def errors_by_part(directory: Path, stage: str) -> list[float]:
    """Edits in each tenth of the references, over their length."""
    edits, lengths = [0] * PARTS, [0] * PARTS
    for line in (directory / "answers.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        reference = row["references"][0].split()
        for i in range(len(reference)):
            lengths[i * PARTS // len(reference)] += 1
        for i in wrong_places(row[stage].split(), reference):
            edits[i * PARTS // len(reference)] += 1
    return [e / n for e, n in zip(edits, lengths, strict=True)]


def further_errors(directory: Path) -> pandas.DataFrame:
    """Edits in the second half of an answer over its length, by the edits in the first half, if
    student or teacher writes it after the student's first half."""
    rows = [json.loads(x) for x in (directory / "answers.jsonl").open(encoding="utf-8")]
    halves, table = [], {}
    for row in rows:
        said, reference = row["after"].split(), row["references"][0].split()
        half = said[: len(said) // 2]
        edits = min(common.edit_distance(half, reference[:n]) for n in range(len(reference) + 1))
        halves.append((half, edits, reference))
    for name, path in (("student", directory / "final"), ("teacher", TASK / "teacher")):
        args = common.Flags(student=str(path), max_new_tokens=130)
        model = common.open_model(args, common.PartialState(cpu=True).device, "student")
        texts = [
            common.render(model.tokenizer, row["messages"], prompt=True) + " ".join(half)
            for row, (half, *_) in zip(rows, halves, strict=True)
        ]
        prompts = [common.tokenize(model.tokenizer, text)[0] for text in texts]
        written = sorted(common.generate(model, prompts, [0] * len(prompts), args, 0.0))
        counts = {}
        for (_, answer), (half, edits, reference) in zip(written, halves, strict=True):
            group = next(name for name, most in GROUPS.items() if edits <= most)
            n, more, left = counts.get(group, (0, 0, 0))
            more += common.edit_distance(half + answer.text.split(), reference) - edits
            counts[group] = n + 1, more, left + len(reference) - len(half)
        table["sentences"] = {g: n for g, (n, *_) in counts.items()}
        table[name] = {g: more / left for g, (_, more, left) in counts.items()}
    return pandas.DataFrame(table).sort_index()


def draw(table: pandas.DataFrame, target: Path) -> None:
    """The error rate against the place in the answer, with a band over the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 7), layout="constrained")
    parts = [(part + 0.5) / PARTS for part in range(PARTS)]
    for method, rows in table.groupby("method", sort=False):
        values = rows[[*range(PARTS)]]
        (line,) = axis.plot(parts, values.mean(), marker="o", label=method)
        axis.fill_between(parts, values.min(), values.max(), color=line.get_color(), alpha=0.2)
    axis.set(title="phoneme error rate", xlabel="place in the answer (share of its length)")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(target, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    every = [*METHODS, *MORE]
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/long_answers"))
    parser.add_argument("--figure", type=Path, default=ROOT / "data" / "long_answers.png")
    args = parser.parse_args()
    if "token level" not in args.methods:
        parser.error("--methods must have 'token level', which gives the start of three others")
    runs = [
        Run(method, seed, place(method, seed, args))
        for seed in range(args.seeds)
        for method in every
        if method in args.methods
    ]
    left = sum(not (run.directory / "results.json").exists() for run in runs)
    print(f"{left} of {len(runs)} runs are left", flush=True)
    for part in (METHODS, MORE):  # the second begin with students of the first
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda run: finish(run, args), [r for r in runs if r.method in part]))

    rows = []
    for method, _, directory in runs:
        parts = dict(enumerate(errors_by_part(directory, "after")))
        rows.append({"method": method, **scores(directory, "after"), **parts})
    first = next(run.directory for run in runs if "other" not in run.method)
    for name, stage in (("the student before", "before"), ("the teacher", "teacher")):
        parts = dict(enumerate(errors_by_part(first, stage)))
        rows.append({"method": name, **scores(first, stage), **parts})
    table = pandas.DataFrame(rows)
    groups = table.groupby("method", sort=False)
    for kind in ("mean", "min", "max"):
        values = getattr(groups[[*SCORES, *range(PARTS)]], kind)()
        print(f"{kind}\n{values.to_string(float_format='{:.3f}'.format, na_rep='')}")
    draw(table[table["method"] != "the student before"], args.figure)
    for method, seed, directory in runs:
        if not seed and "cross" not in method:
            print(
                f"\n{method}\n{further_errors(directory).to_string(float_format='{:.3f}'.format)}"
            )


if __name__ == "__main__":
    main()
