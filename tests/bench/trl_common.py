"""What trl_gkd.py, trl_distillation.py and trl_gold.py share.

Each of them compares a training step of one script of this suite with the same step in a trainer
of TRL: seconds and memory. Each side runs in its own process, one after the other, on a CPU in
float32. Both optimizers get the same settings, and neither side uses gradient checkpointing.

The suite's side is the script's own `main`. A subclass of `common.Run` reads the clock and the loss
of each step, and writes no checkpoint. TRL's side is the trainer as it comes; a subclass and a
callback read the same numbers. Both sides learn from the same rows in the same order.

The first group of steps warms up. Seconds are the median over the later groups, divided by the
steps of a group (1 except for rollouts that are sampled for several steps at once). Memory is the
largest resident set of the process (getrusage) up to the last step, and that value less the
resident set after the models were loaded: activations, gradients, optimizer state and temporaries.
Processor seconds are comparable on a busy machine too, if --threads is 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

# Both optimizers get these; weight decay applies to matrices only on both sides.
ADAM = {"learning_rate": 1e-4, "weight_decay": 0.01, "max_grad_norm": 1.0}
BETAS = (0.9, 0.95)
# What all TRL configurations share. The learning rate has no influence on time or memory.
TRL_SETTINGS = {
    **ADAM, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "lr_scheduler_type": "constant",
    "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_strategy": "no",
    "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip
# And all runs of this suite: the scores are not wanted here, so one short answer is evaluated.
SUITE_SETTINGS = {
    **ADAM, "dtype": "float32", "teacher_dtype": "float32", "eval_size": 1, "eval_steps": 0,
}  # fmt: skip

Numbers = dict[str, float]
Row = dict[str, Any]


# ------------------------------------------------------------------------------- command line


def make_parser(description: str) -> argparse.ArgumentParser:
    """The flags that all three benches have."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="holds smollm2 and smollm2-8l")
    parser.add_argument(
        "--trl-python", help="the python of an environment that has TRL; without it only this "
        "suite is measured"
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=5, help="measured, after those to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--side", choices=("suite", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    return parser


def add_cached(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cached", action="store_true", help="the teacher's hidden states come from the cache, "
        "which is the script's default; otherwise the teacher runs in every step on both sides"
    )  # fmt: skip


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Numbers]:
    """Each side in its own process: what its last line of output says."""
    sides = {"suite": measure_side("suite", sys.executable, args, directory)}
    if getattr(args, "cached", False):
        # A second run finds the states and does not load the teacher's backbone.
        again = measure_side("suite", sys.executable, args, directory)
        sides["suite"] = again | {"once": sides["suite"]["once"]}
    if args.trl_python:
        sides["TRL"] = measure_side("trl", args.trl_python, args, directory)
    return sides


def measure_side(side: str, python: str, args: argparse.Namespace, directory: Path) -> Numbers:
    command = [python, *sys.argv, "--side", side, "--directory", str(directory)]
    settings = {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def print_table(sides: dict[str, Numbers], compare_losses: bool = True) -> None:
    """A line for each number, a column for each side, and their ratio."""
    lines = {
        "seconds a step": ("seconds", 1),
        "processor seconds a step": ("cpu", 1),
        "seconds before, for a step's rows": ("once", 1),
        "peak memory, GB": ("peak", 1e9),
        "  above the loaded models, GB": ("added", 1e9),
    }
    if compare_losses:
        lines["first loss, nats per target"] = ("loss", 1)
    ratio_title = f"{'suite/TRL':>11}" if len(sides) > 1 else ""
    print(f"{'':34}" + "".join(f"{side:>10}" for side in sides) + ratio_title)
    for title, (name, unit) in lines.items():
        values = [numbers[name] / unit for numbers in sides.values()]
        line = f"{title:34}" + "".join(f"{value:>10.4g}" for value in values)
        if len(values) > 1:
            line += f"{values[0] / values[1] if values[1] else math.nan:>11.4g}"
        print(line)


# ----------------------------------------------------------------------------------- one side


@dataclass
class Recorder:
    """The clock, the loss and the number of target tokens of every step of one side."""

    group: int = 1  # steps that are measured together
    loaded: float = 0.0  # resident set in bytes after the models were loaded
    once: float = 0.0  # seconds before the first step, for the rows of one step
    losses: list[float] = field(default_factory=list)  # nats per target
    targets: list[int] = field(default_factory=list)
    ends: list[tuple[float, float]] = field(default_factory=list)  # see `end_step`

    def end_step(self) -> None:
        """Note wall and processor seconds at the end of a step."""
        self.ends.append((time.perf_counter(), time.process_time()))

    def note_loaded(self) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.loaded = pages * os.sysconf("SC_PAGE_SIZE")

    def report(self) -> None:
        """Print the JSON line that the parent process reads."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        wall, cpu = (
            statistics.median(b - a for a, b in itertools.pairwise(times)) / self.group
            for times in zip(*self.ends[self.group - 1 :: self.group], strict=True)
        )
        numbers = {"seconds": wall, "cpu": cpu, "peak": peak, "added": peak - self.loaded}
        numbers |= {"loss": self.losses[0], "targets": self.targets[0], "once": self.once}
        print(json.dumps(numbers), flush=True)


def run_suite(
    script: ModuleType, arguments: Any, recorder: Recorder, end_ids: list[int] | None = None
) -> None:
    """Run `script.main` on the arguments; `end_ids` replace those of the student if given."""
    import common

    class WatchedRun(common.Run):
        def log(self, step: int, tokens: int, values: dict[str, Any], examples: Any) -> None:
            super().log(step, tokens, values, examples)
            recorder.losses.append(float(values["train/loss"]))
            recorder.targets.append(tokens)

        def save(self, step: int) -> None:
            recorder.end_step()

        def finish(self, *_: Any, **__: Any) -> None:
            recorder.report()

    class TimedHiddenStates(common.TeacherHiddenStates):
        def __init__(self, *rest: Any) -> None:
            began = time.perf_counter()
            super().__init__(*rest)
            if arguments.cache_teacher and rest[-1] == "training text":
                recorder.once = (time.perf_counter() - began) / arguments.max_steps

    load_pair = common.load_pair

    def watched_load_pair(*rest: Any) -> common.Pair:
        pair = load_pair(*rest)
        recorder.note_loaded()
        if end_ids is not None:
            pair.student.end_ids = end_ids
        return pair

    common.Run = WatchedRun
    common.TeacherHiddenStates = TimedHiddenStates
    common.load_pair = watched_load_pair
    common.check_arguments(arguments)
    script.main(arguments)


def load_trl_models(recorder: Recorder, student: Path, teacher: Path) -> tuple[Any, Any]:
    """Both models in float32, as transformers loads them."""
    import torch
    from transformers import AutoModelForCausalLM

    models = [
        AutoModelForCausalLM.from_pretrained(p, dtype=torch.float32) for p in (student, teacher)
    ]
    recorder.note_loaded()
    return models[0], models[1]


def trl_callback(recorder: Recorder) -> Any:
    """The callback that reads the clock at the end of each of TRL's steps."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            recorder.end_step()

    return Clock()


# --------------------------------------------------------------------------------------- rows


def texts() -> list[str]:
    """The turns of data/chat.jsonl. Time and memory do not depend on what the tokens say."""
    lines = (ROOT / "data" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    return [turn["content"] for line in lines for turn in json.loads(line)["messages"]]


def suite_order(rows: list[Row], arguments: Any) -> list[Row]:
    """The rows in the order in which a run of this suite learns from them."""
    import common

    steps = len(rows) // arguments.batch_size
    return [row for step in range(steps) for row in common.global_batch(rows, arguments, step)]


def suite_files(directory: Path) -> dict[str, str]:
    """The arguments that name the files of a run in `directory`."""
    return {
        "dataset": str(directory / "train.jsonl"),
        "eval_dataset": str(directory / "eval.jsonl"),
        "output_dir": str(directory / "run"),
        "cache_dir": str(directory / "cache"),
        "overwrite": True,
    }


def write_suite_rows(directory: Path, rows: list[Row]) -> None:
    """The training rows, and one short row to evaluate on."""
    lines = [json.dumps(row) + "\n" for row in rows]
    (directory / "train.jsonl").write_text("".join(lines), encoding="utf-8")
    held_out = {"prompt": "Say yes.", "completion": "Yes."}
    (directory / "eval.jsonl").write_text(json.dumps(held_out) + "\n", encoding="utf-8")
