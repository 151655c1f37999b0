"""What the four scripts share. Nothing here trains: each script has its own loop.

The sections follow the data: arguments; conversations; grading; models; several devices; tokens and
masks; text generation; the teacher's text and hidden states; a teacher on a server; losses;
evaluation; run directory; plan of the memory. One line of a data set takes these forms on its way
to the loss:

    function                    returns        which holds
    (a line of a data set)      dict           {"prompt": "banana"}, or one of the other forms
    load_conversations          Conversation   messages, the data set's own response, references
    tokenize_prompts            Prompt         the conversation with each model's prompt ids
    make_examples               Example        prompt and answer as ids, with target positions
    collate                     Batch          padded ids (B, L) and the N targets of B examples
    LanguageModel.logits        Logits         hidden states (N, d), for logits a chunk at a time
    distillation_loss           loss, sums     nats, summed over the N targets

Letters in shapes: N target tokens, n of them in a chunk, V vocabulary, d width, B examples, L
length in tokens, K top entries.

    python common.py runs/*        compares finished runs: one table, and runs/comparison.png
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import copy
import csv
import dataclasses
import datetime
import functools
import gc
import gzip
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import math
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import unicodedata
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar
from unittest import mock

import numpy
import pandas
import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    InitProcessGroupKwargs,
    LoggerType,
    align_module_device,
    broadcast_object_list,
    gather_object,
)
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as BackendTokenizer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from tqdm import tqdm
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StaticCache,
    masking_utils,
)
from transformers.cache_utils import StaticLayer
from transformers.integrations import moe
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.chat_template_utils import render_jinja_template

STARTED = time.perf_counter()  # for the seconds in results.json
DATA = Path(__file__).resolve().parent / "data"
Tokenizer = PreTrainedTokenizerBase
UMASK = os.umask(0o077)  # it can only be read by setting it
os.umask(UMASK)
KEY = "OPENAI_API_KEY"  # the environment variable that holds a server's key
PUBLISHED = ".published"  # marks a --rollout-weights directory that may be overwritten
URL = r"https?://(\[[\w:]+\]|[^][\s/?#@:]+)(:\d+)?(/[^\s?#@]*)?"
# transformers lets the host wait for the GPU in every forward pass, to see whether a row is packed
# from several texts. Ours never are.
masking_utils.find_packed_sequence_indices = lambda position_ids: None


class UsageError(Exception):
    """Wrong input: `launch` prints its message as one sentence and exits with code 2."""


@contextlib.contextmanager
def usage_error(prefix: str, *kinds: type[Exception], about: str = "") -> Iterator[None]:
    """Errors of these kinds, if their message contains `about`, become a `UsageError`: the prefix
    and the first line of the message, with the second if the first ends in a colon."""
    try:
        yield
    except kinds as problem:
        if about not in str(problem):
            raise
        lines = (str(problem).strip() or type(problem).__name__).splitlines()
        text = " ".join(lines[: 1 + lines[0].rstrip().endswith(":")])
        raise UsageError(f"{prefix}: {printable(text)[:300]}") from None


def printable(text: str) -> str:
    """Text of models and servers, whose control characters could write over a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


LOAD_ERRORS = (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError)

# ------------------------------------------------------------------------------------ arguments


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that `HfArgumentParser` turns into a command-line flag."""
    metavar = {"metavar": "N"} if type(default) in (int, float) else {}
    return field(default=default, metadata={"help": help, **metavar, **metadata})


@dataclass
class Flags:
    """The flags that mean the same thing in every script."""

    two_tokenizers: ClassVar[bool] = False  # whether a server has the tokenizer of --teacher

    teacher: str = flag(str(DATA / "teacher"), "teacher model: a directory or a hub id")
    student: str = flag(str(DATA / "student"), "student model: a directory or a hub id")
    revision: str = flag("main", "the student's revision, for a hub id")
    teacher_revision: str = flag("main", "the teacher's revision, for a hub id")
    chat_template: str | None = flag(
        None, "a Jinja file that both models use as chat template (not an API, which has its own)"
    )
    template_kwargs: str = flag("{}", """for chat templates, e.g. '{"enable_thinking": false}'""")

    dataset: str = flag(str(DATA / "train.jsonl"), "training prompts: a file, directory or hub id")
    dataset_config: str | None = flag(None, "configuration of a hub data set")
    dataset_split: str = flag("train", "split of a hub data set or directory")
    max_rows: int = flag(0, "use only the first N rows of --dataset (0: all)")
    eval_dataset: str | None = flag(
        None, "held-out conversations (default: data/eval.jsonl, or rows of your own --dataset)"
    )
    eval_split: str = flag("train", "split of --eval-dataset, if that is not a file")
    eval_size: int = flag(0, "evaluation rows (0: 1000, or a tenth of --dataset if that is fewer)")
    grader: str = flag(
        "exact",
        "which answers are right, for exact_match: exact, number, choice, json, regex:PATTERN or "
        "FILE.py:FUNCTION",
    )
    completions: Literal["teacher", "dataset"] = flag("teacher", "whose answers to train on")
    max_length: int = flag(512, "tokens in an example, prompt and response together")
    max_new_tokens: int = flag(128, "tokens generated in a response")

    temperature: float = flag(1.0, "softmax temperature T of the loss, which is scaled by T²")
    sampling_temperature: float = flag(1.0, "temperature of the teacher's text (0: greedy)")
    top_p: float = flag(1.0, "sample the teacher's text from this nucleus (1: whole vocabulary)")
    generation_batch_size: int = flag(256, "responses generated at a time")

    epochs: float = flag(3.0, "passes over the training examples")
    max_steps: int = flag(-1, "optimizer steps; overrides --epochs")
    batch_size: int = flag(64, "examples in an optimizer step, over all processes")
    micro_batch_size: int = flag(16, "examples per process in one backward pass (0: all)")
    learning_rate: float = flag(2e-3, "peak of the schedule (linear warm-up, cosine to zero)")
    weight_decay: float = flag(0.01, "decoupled weight decay, on matrices only")
    warmup_steps: int = flag(30, "steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this global norm")
    seed: int = flag(0, "determines data order, held-out rows and every sampled token")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "the student's autocast dtype (its weights are float32); auto: bfloat16 on a GPU"
    )
    head_dtype: Literal["auto", "float32"] = flag(
        "auto", "products with the student's head; auto: as --dtype on a GPU, float32 on a CPU"
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "the teacher's weights; auto: bfloat16 on a GPU"
    )
    teacher_device_map: Literal["none", "auto"] = flag(
        "none", "auto: spread the teacher's layers over GPUs and, once these are full, CPU memory"
    )
    attn_implementation: str | None = flag(None, "sdpa, eager, flash_attention_2, ...")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, slower")
    compile: bool = flag(False, "compile the student's layers: about a minute, then faster steps")
    lora_rank: int = flag(0, "train LoRA adapters of this rank instead of all weights (0: off)")

    output_dir: str | None = flag(None, "default: runs/<script>-<flags>, numbered if taken")
    overwrite: bool = flag(False, "replace an earlier run in --output-dir")
    resume: bool = flag(False, "continue the run in --output-dir from its newest checkpoint")
    save_steps: int = flag(200, "steps between checkpoints (0: only at the end)")
    save_total_limit: int = flag(2, "checkpoints kept (0: all)")
    eval_steps: int = flag(200, "steps between evaluations while training (0: none)")
    logging_steps: int = flag(10, "steps between writes to metrics.jsonl")
    report_to: str = flag("none", "send metrics to a tracker too: tensorboard, wandb, ...")
    cache_dir: str = flag("runs/cache", "where the teacher's work is kept for later runs")
    cache_teacher: bool = flag(
        True, "keep the teacher's hidden states, or a server's log-probabilities, there (or not)"
    )
    plan: bool = flag(False, "only print the memory that the run would need")

    api_base_url: str | None = flag(
        None,
        "the teacher is a model behind this server (https://HOST/v1): vLLM, or for "
        f"sequence_level.py any OpenAI-compatible one; its key is read from ${KEY}",
    )
    api_model: str | None = flag(None, "the teacher's name on that server")
    api_top_logprobs: int = flag(64, "K: log-probabilities that the server gives at each token")
    api_concurrency: int = flag(8, "requests under way at a time")
    api_timeout: float = flag(600.0, "seconds to wait for one answer before retrying")
    api_max_failures: float = flag(
        0.1, "the run ends if more than this share of prompts (of 50 if fewer) gets no answer"
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and a script's docstring as it is written."""


def parse_arguments(kind: type[Flags], description: str, argv: Sequence[str] | None = None) -> Any:
    """Command line to a validated dataclass. Exits with code 2 on an unknown or invalid flag."""
    parser = HfArgumentParser(
        kind, description=description, allow_abbrev=False, exit_on_error=False,
        formatter_class=HelpFormatter,
    )  # fmt: skip
    try:
        args, unknown = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            raise UsageError(f"unknown flags or words: {' '.join(unknown)}")
        check_arguments(args)
    except (ValueError, argparse.ArgumentError, UsageError) as problem:
        parser.exit(2, f"error: {problem} (--help lists the flags)\n")
    return args


def check_arguments(args: Flags) -> None:
    """Refuse values that no run could use. A script checks the rest of its own flags."""
    positive = {"temperature", "batch_size", "learning_rate", "max_grad_norm", "max_length",
                "max_new_tokens", "generation_batch_size", "logging_steps", "api_top_logprobs",
                "api_concurrency", "api_timeout"}  # fmt: skip
    for name, value in vars(args).items():
        if isinstance(value, str) and (not value or re.match(r"~\w*(/|$)", value)):
            problem = f"{value}: a shell replaces ~ only at the beginning of a word"
            raise UsageError(f"{as_flag(name)} is {problem if value else 'empty'}")
        if isinstance(value, bool) or not isinstance(value, int | float) or name == "max_steps":
            continue
        if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            allowed = "above 0" if name in positive else "0 or more"
            raise UsageError(f"{as_flag(name)} must be a finite number, {allowed}, not {value}")
    with usage_error("--template-kwargs", ValueError):
        if not isinstance(json.loads(args.template_kwargs), dict):
            raise ValueError("must be a JSON object")
    changed, url = changed_flags(args).keys(), args.api_base_url
    urls = {"--api-base-url": url, "--rollout-url": getattr(args, "rollout_url", None)}
    urls = {name: u for name, u in urls.items() if u}
    api = [as_flag(name) for name in changed if name.startswith("api_")]
    api = [name for name in api if not ("--rollout-url" in urls and name == "--api-timeout")]
    weights = {"teacher_dtype", "teacher_device_map"}
    weights |= {*(() if args.two_tokenizers else ("teacher", "teacher_revision"))}
    trackers = ["none", *map(str, get_available_trackers())]
    folder = Path(getattr(args, "rollout_weights", None) or "nowhere")
    foreign = folder.is_dir() and any(folder.iterdir()) and not (folder / PUBLISHED).exists()
    for wrong, message in (
        (not 0 < args.top_p <= 1, f"--top-p must lie in (0, 1], not {args.top_p}"),
        ("top_p" in changed and not args.sampling_temperature,
         "--top-p needs a --sampling-temperature"),
        (changed & {"top_p", "sampling_temperature"} and args.completions == "dataset",
         "--completions dataset samples no text: leave out --sampling-temperature and --top-p"),
        (args.resume and args.overwrite, "--resume and --overwrite contradict each other"),
        (args.resume and not args.output_dir, "--resume needs --output-dir, the run to continue"),
        (args.overwrite and not args.output_dir, "--overwrite needs --output-dir, what to replace"),
        (args.max_steps < 1 and args.max_steps != -1, "--max-steps must be 1 or more"),
        (args.max_steps == -1 and not args.epochs, "--epochs is 0 and --max-steps is not given"),
        *((m.startswith((".", "/")) and not Path(m).is_dir(), f"there is no model directory {m}")
          for m in (args.student, args.teacher)),
        (args.lora_rank and not find_spec("peft"), '--lora-rank needs pip install -e ".[lora]"'),
        (args.report_to not in trackers, f"--report-to: {args.report_to} is not installed, only "
         f"{', '.join(trackers)} (tensorboard: pip install -e \".[trackers]\")"),
        (not Path(args.chat_template or ".").exists(), f"--chat-template: no {args.chat_template}"),
        ("revision" in changed and Path(args.student).is_dir(), "--revision is for hub models"),
        ("teacher_revision" in changed and Path(args.teacher).is_dir(),
         "--teacher-revision is for hub models"),
        (changed & {"dataset_config", "dataset_split"} and Path(args.dataset).is_file(),
         "--dataset-config and --dataset-split are for hub data sets and directories"),
        ("eval_split" in changed and (not args.eval_dataset or Path(args.eval_dataset).is_file()),
         "--eval-split is for a hub data set or directory in --eval-dataset"),
        (args.seed >= 2**63, f"--seed must be below 2**63, not {args.seed}"),
        (foreign, f"--rollout-weights {folder} has files that no run has put there, and would be "
         "overwritten: name an empty directory"),
        (args.api_max_failures > 1, "--api-max-failures is a share, from 0 to 1"),
        (api and not url, f"{', '.join(api)} needs --api-base-url"),
        (url and changed & weights, f"{', '.join(map(as_flag, sorted(changed & weights)))} is for "
         "a teacher that is loaded here, not an API"),
        (url and not args.api_model, "--api-base-url needs --api-model, the teacher's name"),
        *((not re.fullmatch(URL, u),
           f"{name} must look like https://HOST/v1, without user name, password or parameters: a "
           f"key belongs in the environment, {KEY}") for name, u in urls.items()),
        (urls and not find_spec("openai"),
         f'{", ".join(urls)} needs the openai client: pip install -e ".[api]"'),
    ):  # fmt: skip
        if wrong:
            raise UsageError(message)


def launch(main: Callable[[Any], None], kind: type[Flags], description: str) -> None:
    """Entry point of a script: parse and run; errors of the user or the disk are one sentence."""
    with contextlib.suppress(AttributeError):  # a notebook's streams take any text
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="backslashreplace")  # where it does not take UTF-8
    args = parse_arguments(kind, description)
    try:
        with (
            usage_error("cannot read or write (--output-dir, --cache-dir)", OSError),
            usage_error("the reader of the output has gone", BrokenPipeError),
            usage_error("out of memory, which --micro-batch-size, --generation-batch-size, "
                        "--gradient-checkpointing or --lora-rank can lower",
                        RuntimeError, about="out of memory"),
            usage_error("another process of this run has ended", RuntimeError, about="by peer"),
        ):  # fmt: skip
            plan(Path(sys.argv[0]).stem, args) if args.plan else main(args)
    except UsageError as problem:
        sys.stderr.write(f"error: {problem}\n")  # at once: every process may have it
        if isinstance(problem, ServerLost) and Run.current:
            try:
                Run.current.interrupt()
            except (UsageError, OSError) as another:
                sys.stderr.write(f"error: {another}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        end_by(signal.SIGINT)
    # Not inside `main`: if DDP's reducer holds the last reference to the process group, it joins
    # the group's thread while holding the interpreter lock that the thread may be waiting for.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def end_by(number: int) -> None:
    """End this process by a signal: a shell leaves its loop only if Ctrl-C itself ends a run."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def changed_flags(args: Flags) -> dict[str, Any]:
    """The arguments that differ from their defaults."""
    return {name: v for name, v in vars(args).items() if v != getattr(type(args), name)}


# -------------------------------------------------------------------------------- conversations

Message = dict[str, Any]  # role, content, and other fields that a chat template reads
ROLES = {  # and what data sets call them
    "system": "system developer", "user": "user human prompter",
    "assistant": "assistant gpt chatgpt bot model ai function_call tool_call",
    "tool": "tool function observation function_response tool_response ipython environment",
}  # fmt: skip


NOT_TEXT = "not text"  # key of a value that was not text in its file: see `_dataset_records`


@dataclass
class Conversation:
    """One row of a data set."""

    messages: list[Message]  # up to the turn to be answered
    response: Message | None  # the data set's own answer, if it has one
    references: list[str]  # right answers
    source: str  # file and line, for messages to the user
    options: dict[str, Any] = field(default_factory=dict)  # more variables for the chat template
    columns: dict[str, Any] = field(default_factory=dict)  # not read here; for a grader

    def row(self) -> dict[str, Any]:
        """What a grader gets."""
        named = {"messages": self.messages, "references": self.references, "source": self.source}
        more = {"response": self.response, "tools": self.options.get("tools")}
        return more | self.columns | named

    def prompt_key(self) -> str:
        """Equal for rows that ask the same."""
        turns = [(m["role"], m["content"], m.get("tool_calls")) for m in self.messages]
        return json.dumps((turns, self.options.get("tools")))


def load_conversations(
    source: str, config: str | None = None, split: str = "train", max_rows: int = 0
) -> list[Conversation]:
    """Rows of a JSON, JSON Lines, csv or Parquet file, a directory or a hub data set.

    Prints which columns are not used. Raises `UsageError` that names the first unusable row.
    """
    kind = Path(source.removesuffix(".gz")).suffix
    if kind in {".json", ".jsonl", ".ndjson"}:
        records = _json_records(source)
    elif kind == ".csv":
        records = _csv_records(source)
    else:
        records = _dataset_records(source, config, split)
    conversations, unused = [], Counter()
    for place, record in itertools.islice(records, max_rows or None):
        with usage_error(place, ValueError, RecursionError):
            conversations.append(_as_conversation(record, place, unused))
            # Refuses half of a surrogate pair, which JSON can spell and no tokenizer can encode.
            json.dumps(vars(conversations[-1]) | {"columns": None}, ensure_ascii=False).encode()
    if not conversations:
        raise UsageError(f"{source} holds no rows")
    if unused:
        PartialState().print(f"{source}: columns that are not used, by rows: {dict(unused)}")
    return conversations


def _parts(source: str, may_be_array: bool = False) -> Iterator[tuple[int, str]]:
    """The lines of a file, which may be gzipped, with their numbers; a JSON array at once."""
    with (
        usage_error(f"cannot read {source}", OSError, EOFError, zlib.error),
        gzip.open(source) if source.endswith(".gz") else open(source, "rb") as file,
    ):
        array = may_be_array and file.peek(1).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["
        for number, raw in [(1, file.read())] if array else enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig")
            except UnicodeDecodeError as problem:
                line = number + raw[: problem.start].count(b"\n")
                raise UsageError(f"{source}:{line}: not UTF-8") from None


def _json_records(source: str) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON array, or one from each line, whatever the file is called."""
    for number, part in _parts(source, may_be_array=True):
        is_array = number == 1 and part.lstrip().startswith("[")
        try:
            record = json.loads(part.rstrip()) if part.strip() else None
        except (ValueError, RecursionError) as problem:
            line = number + getattr(problem, "lineno", 1) - 1
            reason = getattr(problem, "msg", problem)
            raise UsageError(f"{source}:{line}: not JSON: {reason}") from None
        if is_array:
            yield from ((f"{source}: row {i}", item) for i, item in enumerate(record, 1))
        elif part.strip():
            yield f"{source}:{number}", record


def _csv_records(source: str) -> Iterator[tuple[str, Any]]:
    """Every cell is text: a reader that guesses types would turn the word `null` into None."""
    csv.field_size_limit(2**31 - 1)
    lines = (line for _, part in _parts(source) for line in io.StringIO(part, newline=""))
    reader = csv.DictReader(lines, strict=True)
    try:
        for record in reader:
            if None in record:
                raise UsageError(f"{source}:{reader.line_num}: more cells than columns")
            yield f"{source}:{reader.line_num}", {k: v for k, v in record.items() if v}
    except csv.Error as problem:  # of quotes
        raise UsageError(f"{source}:{reader.line_num + 1}: {problem}") from None


def _dataset_records(source: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # takes seconds to import, and the embedded default does not need it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    # `datasets` lets errors of its many back ends through.
    with usage_error(f"cannot load the data set {source}", Exception):
        if source.endswith(".parquet"):
            data = datasets.load_dataset("parquet", data_files=source, split="train")
        elif any(Path(source).glob("dataset_dict.json")):  # written by save_to_disk
            data = datasets.load_from_disk(str(Path(source, split)))
        elif any(Path(source).glob("state.json")):
            if split != "train":
                raise ValueError(f"it has no splits, and {split} is asked for")
            data = datasets.load_from_disk(source)
        else:
            data = datasets.load_dataset(source, config, split=split)
        # Arrow makes dates of texts that look like some: refused where one would be read.
        as_json = partial(json.dumps, default=lambda value: {NOT_TEXT: str(value)})
        for i, text in enumerate(map(as_json, data), 1):
            # Nulls: Arrow gives each object all keys of its column.
            yield f"{source}: row {i}", json.loads(text, object_hook=_without_nulls)


def _without_nulls(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _take(fields: dict[str, Any], *names: str, kind: type | None = None) -> Any:
    """Remove and return the first of these fields that is present, else None; if it must be of a
    `kind`, as `_parsed`, or an empty one."""
    value = next((fields.pop(name) for name in names if name in fields), None)
    return _parsed(value or kind(), kind, names[0]) if kind else value


def _as_conversation(record: Any, source: str, unused: Counter[str]) -> Conversation:
    """A record in one of the forms that the README lists; `ValueError` otherwise."""
    if not isinstance(record, dict):
        raise ValueError("a row must be an object with named columns")
    take = functools.partial(_take, record := _without_nulls(record))
    turns = take("messages", "conversations", "conversation")
    if turns_hold_answer := turns is not None:  # else a column of its own holds the answer
        turns = _parsed(turns, list, "messages")
    else:
        turns = take("instruction", "prompt", "question", "query", "problem")
        if turns is None and isinstance(record.get("input"), list):
            turns = take("input")
        if not isinstance(turns, list):
            parts = [part for part in (turns, take("input"), take("context")) if part is not None]
            if not parts:
                raise ValueError("columns messages, prompt, instruction, ... are missing or null")
            turns = ["\n\n".join(filter(None, map(_as_text, parts)))]
    tools = take("tools", "functions", kind=list)
    given = turns[0].get("tools") if turns and isinstance(turns[0], dict) else None
    if isinstance(given, list) and all(isinstance(tool, dict) for tool in given):
        tools = tools or given  # some data sets put them there
    as_message = functools.partial(_as_message, has_tools=bool(tools))
    pairs = [_parsed(pair, list, "a pair of history") for pair in take("history", kind=list)]
    turns = [*itertools.chain.from_iterable(pairs), *turns]
    roles = ["user", "assistant"] if all(isinstance(turn, str) for turn in turns) else [None]
    messages = [as_message(turn, roles[i % len(roles)]) for i, turn in enumerate(turns)]
    results = []  # of a worked solution
    if turns_hold_answer and messages and messages[-1]["role"] == "assistant":
        answers = [messages.pop()]
    else:
        worked = record.get("solution")
        both = ("solution", "answer") if worked else ("answer", "solution")
        answers = take("completion", "response", "output", *both)
        if worked and "solution" not in record:
            results = _results(record.get("answer"))
        answers = answers if isinstance(answers, list) else [answers] * (answers is not None)
        answers = [as_message(turn, "assistant") for turn in answers]
        if len(answers) == 1 and (reasoning := take("reasoning_content", kind=str)):
            answers[0].setdefault("reasoning_content", reasoning)
    *between, answer = answers or [None]
    messages += between
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError("there is no turn to answer, or two assistant turns follow each other")
    if answer is not None and answer["role"] != "assistant":
        raise ValueError("the answer is not an assistant's turn")
    if messages[0]["role"] != "system" and (system := take("system", "system_prompt", kind=str)):
        messages.insert(0, {"role": "system", "content": system})
    references, reference = take("references", kind=list), take("reference")
    wanted = answer is not None and record.get("label") is not False  # as in KTO's data sets
    own = [answer["content"]] if wanted and "tool_calls" not in answer else []
    references, results, own = (
        [r for r in texts if final_text(_parsed(r, str, "a reference")).strip()]
        for texts in (references or [reference] * (reference is not None), results, own)
    )
    options = take("chat_template_kwargs", kind=dict)
    if tools:
        options = options | {"tools": [_as_function(tool) for tool in tools]}
    used = {"answer": results, "label": record.get("label") is False}
    unused.update(record.keys() - {name for name, is_used in used.items() if is_used})
    record = {k: v.get(NOT_TEXT, v) if isinstance(v, dict) else v for k, v in record.items()}
    return Conversation(messages, answer, references or results or own, source, options, record)


def _results(value: Any) -> list[str]:
    """The results, or the only one, that stand beside a worked solution."""
    values = value if isinstance(value, list) else [value]
    values = [v.get(NOT_TEXT) if isinstance(v, dict) else v for v in values]
    return [str(v) for v in values if v != "" and isinstance(v, str | int | float)]


def _as_message(turn: Any, role: str | None, has_tools: bool) -> Message:
    """A turn, without its nulls; `role` is that of a turn which is only text. ShareGPT's calls of
    tools are text: if their tools are given too, a template prints both in its own way."""
    turn = {"role": role, "content": turn} if isinstance(turn, str) else turn
    if not isinstance(turn, dict):
        kind = type(turn).__name__
        raise ValueError(f"a turn must be text, or an object with role and content, not {kind}")
    take = functools.partial(_take, turn := _without_nulls(turn))
    name = take("role", "from")
    key = str(name).strip().lower()
    role = next((role for role, names in ROLES.items() if key in names.split()), None)
    if role is None:
        known = " ".join(ROLES.values())
        raise ValueError(f"the role of a turn is {name!r}, none of {known}: {str(turn)[:80]}")
    content, calls = take("content", "value"), take("tool_calls", "function_call")
    with contextlib.suppress(TypeError, LookupError, AttributeError, ValueError):
        if calls is None and has_tools and key in {"function_call", "tool_call"}:
            called = json.loads(content)
            for call in called if isinstance(called, list) else [called]:
                _ = call.get("function", call)["name"]  # else it is no call
            calls, content = called, ""
        calls = json.loads(calls)
    if content is None and not calls:
        raise ValueError(f"the content of a {role} turn is null or missing")
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text":
                raise ValueError(f"a part of the content is not text: {str(part)[:80]}")
        content = "".join(_as_text(part.get("text")) for part in content)
    message = {"role": role, "content": _as_text("" if content is None else content)}
    if reasoning := take("reasoning_content", "reasoning", "thinking", kind=str):
        message["reasoning_content"] = reasoning
    if calls:
        calls = calls if isinstance(calls, list) else [calls]
        message["tool_calls"] = [_as_function(call) for call in calls]
    return message | turn


def _as_function(value: Any) -> dict[str, Any]:
    """A tool or a call in OpenAI's form; arguments as an object, which templates print as JSON."""
    value = _parsed(value, dict, "a tool or tool call")
    value = value if "function" in value else {"type": "function", "function": value}
    function = _parsed(value["function"], dict, "the function of a tool")
    _parsed(function.get("name"), str, "the name of a tool")
    with contextlib.suppress(KeyError, ValueError):  # a tool has none; what is no object stays
        function = function | {"arguments": _parsed(function["arguments"], dict, "")}
    return value | {"function": function}


def _parsed(value: Any, kind: type, what: str) -> Any:
    """The value, or what it spells in JSON, as in csv cells and in some data sets."""
    if isinstance(value, str) and kind is not str:
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, kind):
        needed = {list: "a list", dict: "an object", str: "a string"}[kind]
        raise ValueError(f"{what} must be {needed}, not {type(value).__name__}")
    return value


_as_text = functools.partial(_parsed, kind=str, what="text")


def load_data(args: Flags) -> tuple[list[Conversation], list[Conversation]]:
    """Training and evaluation conversations; rows that are held out here are not trained on."""
    rows = load_conversations(args.dataset, args.dataset_config, args.dataset_split, args.max_rows)
    for c in rows if args.completions == "dataset" else ():
        if c.response is None:
            raise UsageError(f"{c.source}: no assistant turn for --completions dataset")
        turns = [m for m in (*c.messages, c.response) if m["role"] == "assistant"]
        marks = [turn.get(name) for turn in turns for name in ("weight", "train", "loss")]
        if 0 in marks or c.columns.get("label") is False:  # False == 0
            what = "all assistant turns are learned, whatever weight, train, loss and label say"
            raise UsageError(f"{c.source}: {what}")
    eval_dataset = args.eval_dataset
    if eval_dataset is None and Path(args.dataset).resolve() == (DATA / "train.jsonl").resolve():
        eval_dataset = str(DATA / "eval.jsonl")
    if eval_dataset is not None:
        config = args.dataset_config if eval_dataset == args.dataset else None
        size = args.eval_size or 1000
        held_out = load_conversations(eval_dataset, config, args.eval_split, size)
        if both := {c.prompt_key() for c in rows} & {c.prompt_key() for c in held_out}:
            PartialState().print(f"{len(both)} prompts of {eval_dataset} are in {args.dataset} too")
    else:
        left = size = args.eval_size or min(1000, math.ceil(len(rows) / 10))
        sizes, chosen = Counter(c.prompt_key() for c in rows), set()  # equal prompts stay together
        prompts = list(sizes)
        for i in torch.randperm(len(prompts), generator=generator_for(args.seed, "held out")):
            if sizes[prompts[i]] <= left:
                left -= sizes[prompts[i]]
                chosen.add(prompts[i])
        chosen = chosen or {min(prompts, key=sizes.get)}  # the one of the fewest rows
        held_out = [c for c in rows if c.prompt_key() in chosen]
        rows = [c for c in rows if c.prompt_key() not in chosen]
        if not rows:
            what = f"all {len(held_out)} rows of {args.dataset}"
            raise UsageError(f"--eval-size {size} holds out {what}")
    for conversation in itertools.chain(rows, held_out):
        conversation.options = json.loads(args.template_kwargs) | conversation.options
    check_grader(args.grader, held_out)
    return rows, held_out


def check_printed(model: LanguageModel, turns: list[Message], *names: str, **options: Any) -> None:
    """`UsageError` if the rendered text does not change when a turn loses one of these fields."""
    for i, turn in enumerate(turns):
        for name in turn.keys() & names:
            bare = {key: turn[key] for key in turn if key != name}
            texts = ["", None]  # unequal, unless both are rendered
            with contextlib.suppress(UsageError):  # a template may insist on the field
                texts = [render(model.tokenizer, [*turns[:i], t], **options) for t in (turn, bare)]
            if texts[0] == texts[1]:
                raise UsageError(f"the chat template does not print the {name} of turn {i + 1}")


def check_content(model: LanguageModel, turns: list[Message], prompt: str, **options: Any) -> None:
    """`UsageError` if the rendered prompt does not depend on what system, user or tool say."""
    for i, turn in enumerate(turns):
        if turn["role"] == "assistant" or _prints(prompt, turn):
            continue  # a template may change what it prints
        texts = set()
        for content in ("", turn["content"] + "x"):
            changed = [*turns[:i], turn | {"content": content}, *turns[i + 1 :]]
            with contextlib.suppress(UsageError):  # a template may refuse it
                texts.add(render(model.tokenizer, changed, prompt=True, **options))
        if texts == {prompt}:
            raise UsageError(f"the chat template does not print the content of turn {i + 1}")


def generator_for(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A generator that depends on its arguments only, so that resuming restores no state."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# -------------------------------------------------------------------------------------- grading

GRADER_SECONDS = 10.0  # for one call of a user's function


# As most models, Mistral, Seed and MiniMax, and Gemma write them.
REASONING_OPENS = re.compile(r"\s*(<think>|\[THINK\]|<\w+:think>|<\|channel>thought)")
REASONING_ENDS = re.compile(r"</think>|\[/THINK\]|</\w+:think>|<channel\|>")


def final_text(text: str) -> str:
    """An answer without the reasoning before it; "" if that has no end."""
    *reasoning, answer = REASONING_ENDS.split(text)
    return answer if reasoning or not REASONING_OPENS.match(text) else ""


def _last_number(text: str) -> float | None:
    text = re.sub(r"\{,\}|(?<=\d)\\,(?=\d)|\\!", "", text)  # LaTeX: 10{,}000
    whole = r"(?:\d{1,3}(?:,\d{2,3}){0,9},\d{3}(?!\d)|\d+)"
    numbers = re.findall(rf"(?:(?<!\d)[-−])?(?:{whole}(?:\.\d+)?|\.\d+)", text)
    return float(numbers[-1].replace("−", "-").replace(",", "")) if numbers else None


def _chosen_letter(text: str) -> str | None:
    """B in `B`, `(B) because`, `The answer is B, not A.`, else the last letter A to H that stands
    alone."""
    text = text.replace("*", "").strip()
    for pattern in (
        r".*\b[Aa]nswer(?:\s+is\b|\s*:)\W*(?:option\W+)?([A-H])\b",
        r"\(?([A-H])(?:[).:,]|$)",
        r".*\b[Aa]nswer\W+([A-H])\b",
        r".*\b([A-H])\b",
    ):
        if found := re.match(pattern, text, re.DOTALL):
            return found[1]
    return None


def _json_value(text: str) -> str | None:
    """The text's JSON value, or the first object or list in it, written in one way."""
    inside = re.search(r"[\[{].*", text, re.DOTALL)
    for part, must_end in ((text.strip(), True), (inside and inside[0], False)):
        with contextlib.suppress(ValueError, RecursionError, TypeError):
            value, end = json.JSONDecoder(parse_int=float).raw_decode(part)
            if end == len(part) or not must_end:
                return json.dumps(value, sort_keys=True)
    return None


def _last_match(pattern: re.Pattern[str], text: str) -> str | None:
    """The pattern's first group, or all that it matches."""
    with contextlib.suppress(TooLong), time_limit():  # it may try everything
        found = [m[min(1, pattern.groups)] for m in pattern.finditer(text)]
        return found[-1] if found else None


READERS: dict[str, Callable[[str], Any]] = {
    "exact": str.split, "number": _last_number, "choice": _chosen_letter, "json": _json_value,
}  # fmt: skip


@functools.cache
def load_grader(name: str) -> Callable[[str, dict[str, Any]], bool]:
    """The rule that --grader names, of an answer and its row; `UsageError` if there is none.

    A built-in rule reads a value from the answer, and the answer is right if a reference has an
    equal one. A function FILE.py:FUNCTION gets the whole text and the row: its messages, response,
    tools, references, source, and all columns that are not read otherwise.
    """
    kind, _, rest = name.partition(":")
    if kind != "regex" and re.search(r"\.py(:\w*)?$", name):
        return FunctionGrader(name)
    with usage_error(f"--grader {name}", re.error):
        pattern = partial(_last_match, re.compile(rest))
    if (read := pattern if kind == "regex" and rest else READERS.get(name)) is None:
        names = ", ".join(READERS)
        raise UsageError(f"--grader is {name}, not {names}, regex:PATTERN or FILE.py:FUNCTION")

    def grade(text: str, row: dict[str, Any]) -> bool:
        if text.strip() and not final_text(text).strip():
            return False  # reasoning alone is no answer
        value = read(final_text(text))
        return value is not None and value in [read(final_text(r)) for r in row["references"]]

    return grade


class TooLong(BaseException):
    """Ends a grader; not an Exception, which the grader itself could catch."""


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Ends what takes more than `GRADER_SECONDS` by `TooLong`."""

    def stop(*_: Any) -> None:
        raise TooLong(f"it ran for more than {GRADER_SECONDS:g} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    left, _ = signal.setitimer(signal.ITIMER_REAL, GRADER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)  # of a limit around this one


class FunctionGrader:
    """A user's function. Its exceptions, and calls that last too long, count as wrong answers."""

    def __init__(self, name: str) -> None:
        path, _, attribute = name.rpartition(":")
        sys.path.append(str(Path(path).absolute().parent))  # it may import its neighbours
        with usage_error(f"--grader {name} cannot be loaded", Exception):
            spec = spec_from_file_location(f"grader_{Path(path).stem}", path)
            sys.modules[spec.name] = module = module_from_spec(spec)
            spec.loader.exec_module(module)
            self.function = getattr(module, attribute)
        self.name, self.failures = name, list[str]()

    def __call__(self, text: str, row: dict[str, Any]) -> bool:
        try:
            with time_limit():
                right = self.function(text, row)
            if right not in (True, False):
                raise TypeError(f"it returned {right!r:.50}, not True or False")
            return bool(right)
        except (Exception, SystemExit, TooLong) as problem:
            self.failures.append(f"{row['source']}: {type(problem).__name__}: {problem}")
            if len(self.failures) == 1:
                line = f"--grader {self.name} failed, counted as wrong: {self.failures[0]}"
                print(line, file=sys.stderr)
            return False


def check_grader(name: str, conversations: Sequence[Conversation]) -> None:
    """Raise `UsageError` where a built-in rule finds no value in a reference, or a user's function
    fails on the first one."""
    grade = load_grader(name)
    for talk in conversations:
        for reference in talk.references:
            right = grade(reference, talk.row())
            if isinstance(grade, FunctionGrader):
                if grade.failures:
                    raise UsageError(f"--grader {name} fails on a reference: {grade.failures[0]}")
                return
            if not right:
                raise UsageError(f"{talk.source}: --grader {name} finds nothing in {reference!r}")


# --------------------------------------------------------------------------------------- models


class Head(NamedTuple):
    """The output layer: logits = softcap(scale · (hidden @ weightᵀ + bias))."""

    weight: Tensor  # (V, d); (V + padding, d) after `cast`
    bias: Tensor | None = None  # (V,)
    scale: float = 1.0
    softcap: float | None = None
    padding: int = 0

    def cast(self, dtype: torch.dtype) -> Head:
        """The head for products in `dtype`: on CUDA its weight is cast once for each optimizer step
        and padded by zeros to 64·k rows (odd sizes are slow); elsewhere float32 or wider."""
        weight = self.weight
        missing = -len(weight) % 64 if dtype.itemsize == 2 else 0
        if not weight.is_cuda:  # no half-precision product with a float32 result there
            wide = torch.promote_types(dtype, torch.promote_types(torch.float32, weight.dtype))
            return self._replace(weight=weight.to(wide))
        if weight.dtype == dtype and not missing:
            return self
        key, source = (weight._version, dtype), (weight if weight._base is None else weight._base)
        if _casts.get(source, [None])[0] != key:
            _casts[source] = key, F.pad(weight.detach().to(dtype), (0, 0, 0, missing))
        return self._replace(weight=_casts[source][1], padding=missing)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, d) to logits (n, V) in float32 or wider."""
        logits = matmul_fp32(hidden, self.weight)
        logits = logits[:, : -self.padding] if self.padding else logits
        logits = logits if self.bias is None else logits + self.bias
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# Casts by weight: see `Head.cast`. Cleared in each step, as FSDP's updates leave `_version` alone.
_casts = WeakIdKeyDictionary()
register_optimizer_step_post_hook(lambda *_: _casts.clear())


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ bᵀ`, accumulated and returned in float32 (float64 if given float64).

    Under autocast too: logits in bfloat16 cost the divergence's gradient several per cent.
    """
    with torch.autocast(a.device.type, enabled=False):
        if a.is_cuda and a.dtype == b.dtype and a.dtype.itemsize == 2:
            return torch.mm(a, b.t(), out_dtype=torch.float32)
        wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
        return F.linear(a.to(wide), b.to(wide))


@dataclass(frozen=True)
class Logits:
    """Logits (N, V) computed chunk by chunk: `logits[rows]` computes only those rows."""

    hidden: Tensor  # (N, d), at the positions that predict N targets
    head: Head

    def __getitem__(self, rows: slice) -> Tensor:
        return self.head.logits(self.hidden[rows].to(self.head.weight.device))

    def cast(self) -> Logits:
        """With the head's weight in the dtype of the products: see `Head.cast`."""
        return Logits(self.hidden, self.head.cast(self.hidden.dtype))

    def chunks(self) -> list[slice]:
        """Rows whose logits exist at one time."""
        return chunks(len(self.hidden), len(self.head.weight), self.head.weight.device)


def chunks(tokens: int, width: int, device: torch.device) -> list[slice]:
    """Slices of the rows of a (tokens, width) array: of 2²³ elements on a CPU (115 MB in the loss),
    of an 80th of the memory on CUDA (268 MB at least), because each reads and writes the head's
    whole gradient."""
    elements = 2**23 if device.type == "cpu" else 2**26
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        elements = max(elements, memory // 80 // 4)  # of float32
    size = max(16, elements // width)
    return [slice(i, min(i + size, tokens)) for i in range(0, max(tokens, 1), size)]


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer. Its weights are loaded when first used."""

    name: str
    tokenizer: Tokenizer
    config: PreTrainedConfig
    end_ids: list[int]  # every id that ends a response, first the one to finish a response with
    compute_dtype: torch.dtype
    device: torch.device
    digest: str  # identifies weights, configuration, tokenizer, and what limits its vocabulary
    load: Callable[[LanguageModel], PreTrainedModel]
    spread: bool = False  # over devices, by --teacher-device-map
    states_dir: Path | None = None  # cache of its head and hidden states; None: not cached
    cached_head: Head | None = None  # used while the model is not loaded
    adapters: Any = None  # peft's wrapper of `model`, if LoRA is trained
    cache: type[DynamicCache | StaticCache] | None = DynamicCache  # of generation: `caches_for`
    directory: Path | None = None  # where its files lie
    opens: str = ""  # the tag that its generation prompt opens: see `opened_tag`
    copies: tuple[PreTrainedModel, Any] | None = None  # of model and adapters: `inference_copy`
    exact_head: bool = False  # float32 products with the head on CUDA too

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        return self.load(self)

    @property
    def loaded(self) -> bool:
        return "model" in vars(self)

    def unload(self) -> None:
        """Free the memory of everything but the head; a later use loads the model again."""
        self.keep_head()
        vars(self).pop("model", None)

    def keep_head(self) -> None:
        """Keep the head, so that it outlives the model."""
        self.cached_head = Head(*(t if t is None else t.detach() for t in self.head()[:2]))

    @functools.cached_property
    def vocabulary(self) -> int:
        """The number of ids that are tokens; rows of the head beyond them are padding."""
        known = max(self.tokenizer.get_vocab().values()) + 1
        return min(known, self.config.get_text_config().vocab_size)

    def checked(self, ids: list[int]) -> list[int]:
        """The ids; `UsageError` for tokens that the model or its pair lacks."""
        if max(ids, default=0) >= self.vocabulary:
            token = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UsageError(f"the text has the token {token}, which not every model has")
        return ids

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the configuration allows; None if it sets no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def head(self) -> Head:
        """The output layer without padding rows."""
        layer = self.cached_head or self.model.get_output_embeddings()
        weight, bias = layer.weight, getattr(layer, "bias", None)
        if len(weight) > self.vocabulary:
            weight = weight[: self.vocabulary]
            bias = None if bias is None else bias[: self.vocabulary]
        config = self.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return Head(weight, bias, scale, getattr(config, "final_logit_softcapping", None))  # Gemma

    def autocast(self) -> torch.autocast:
        """Computing in `compute_dtype`, if that is not the weights'. No cache of casts, which would
        hold all layers until the forward pass ends, although each is used once."""
        mixed = self.compute_dtype != self.model.dtype
        kind = self.device.type
        return torch.autocast(kind, self.compute_dtype, enabled=mixed, cache_enabled=False)

    def backbone(self, **inputs: Any) -> Any:
        """The model without its head, computing in `compute_dtype`."""
        with self.autocast():
            return self.model.base_model(**inputs)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The final hidden states (N, d) that predict the N targets: one position before each.

        No attention mask: padding is on the right, where a causal model cannot look, and attention
        without a mask takes its fastest path.
        """
        hidden = self.backbone(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return hidden[batch.example, batch.position]

    def logits(self, batch: Batch) -> Logits:
        """The logits that predict the N targets of the batch.

        The final norm gives float32 states under autocast. On a GPU, float32 products with the head
        would dominate a step; those in `compute_dtype` are summed in float32.
        """
        hidden = self.hidden_states(batch)
        dtype = torch.float32 if self.exact_head else self.compute_dtype
        return Logits(hidden.to(dtype) if hidden.is_cuda else hidden, self.head())

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode, without gradients and gradient checkpointing (which allows no KV cache), on
        weights in `compute_dtype`: see `inference_copy`."""
        eager = partial(torch.compiler.set_stance, "force_eager")  # shapes change with every token
        with self.inference_copy(self.compute_dtype), torch.no_grad(), eager():
            training = self.model.training
            self.model.eval()
            try:
                yield
            finally:
                self.model.train(training)

    @contextlib.contextmanager
    def inference_copy(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """Until the context ends, use whole copies of `model` and `adapters` in `dtype`.

        The originals are used if they are whole and have this dtype (None: any) already. All
        processes must enter together if the model is sharded.
        """
        trained, empty = (self.model, self.adapters), self.copies
        if empty == trained or (empty is None and dtype in (None, self.model.dtype)):
            yield
            return
        self.copies = empty or without_weights(*trained)
        self.copies[0].set_experts_implementation(None)  # transformers' own: see `load_weights`
        try:
            fill_weights(self.copies[0], self.model, dtype)
            self.model, self.adapters = self.copies
            yield
        finally:
            for parameter in self.copies[0].parameters():
                parameter.data = parameter.new_empty(0)
            (self.model, self.adapters), self.copies = trained, empty

    def complete(self, prompts: Sequence[Prompt], args: Flags, **sampling: Any) -> list[Completion]:
        """Answers to the prompts, from the cache if they are there: see `cached_completions`."""

        def write(missing: dict[str, int], record: Callable[[str, Completion], None]) -> None:
            ids = [prompts[i].teacher for i in missing.values()]
            keys, seeds = list(missing), [row_seed(args.seed, key) for key in missing]
            shape = sampling["temperature"], sampling.get("top_p", 1.0)
            for place, completion in generate(self, ids, seeds, args, *shape):
                record(keys[place], completion)

        identity = [self.digest, str(self.compute_dtype), self.end_ids]
        asked = [p.teacher for p in prompts]
        return cached_completions(prompts, asked, identity, args, write, **sampling)


class Pair(NamedTuple):
    """Student and teacher, each with its own tokenizer and chat template."""

    student: LanguageModel
    teacher: Any  # a LanguageModel, a Server or, if it is not asked, None

    @property
    def has_weights(self) -> bool:
        """Whether the teacher is a model in this process rather than behind an API."""
        return isinstance(self.teacher, LanguageModel)

    @property
    def same_vocabulary(self) -> bool:
        """Whether equal ids are equal tokens, as far as both models have them."""
        if self.has_weights:
            return not self.different_tokens()
        server = self.teacher  # `greet` proves that it has the reader's tokens
        return isinstance(server, ServerTeacher) and server.reader is self.student

    @property
    def readers(self) -> list[LanguageModel]:
        """The models whose tokenizers are used: the student and the teacher. For a server with
        another tokenizer, the latter has no weights."""
        if self.has_weights:
            return [self.student, self.teacher]
        reader = getattr(self.teacher, "reader", self.student)
        return [self.student] if reader is self.student else [self.student, reader]

    def different_tokens(self) -> list[str]:
        """Tokens that one model lacks or has at another id, except those added at the end that end
        no turn."""
        size = min(model.vocabulary for model in self)
        ends = [(m, i) for m in self for i in m.end_ids[:1] if i >= size]
        ends = [m.tokenizer.convert_ids_to_tokens(i) for m, i in ends]
        return ends + _different_tokens(*(model.tokenizer for model in self), size)

    def check_same_vocabulary(self) -> None:
        """Refuse two vocabularies: divergences token by token compare the ids that both have."""
        if not self.has_weights:
            return  # a `ServerTeacher`
        if different := self.different_tokens():
            raise UsageError(
                f"the vocabularies of {self.student.name} and {self.teacher.name} differ in "
                f"{len(different)} tokens (one is {different[0]!r}): use cross_tokenizer.py"
            )
        self.student.vocabulary = self.teacher.vocabulary = min(m.vocabulary for m in self)


@functools.lru_cache(maxsize=8)
def _different_tokens(student: Tokenizer, teacher: Tokenizer, size: int) -> list[str]:
    ours, theirs = (
        {(token, i) for token, i in t.get_vocab().items() if i < size or i not in added}
        for t, added in ((t, t.added_tokens_decoder) for t in (student, teacher))
    )
    return sorted({token for token, _ in ours ^ theirs})


def end_of_turn_ids(tokenizer: Tokenizer, *configs: Any, **options: Any) -> list[int]:
    """The ids that end a response: first the added token, if possible a special one, that the chat
    template prints after an answer, then the end tokens of tokenizer and configurations."""
    texts = []  # reversed: their common prefix is what the template prints after an answer
    for word in ("ab", "cd"):  # a template may change an answer, or hold its letters itself
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": word}]
        texts.append(render(tokenizer, turns, **options)[::-1])
    pairs = enumerate(zip(*texts, strict=False))
    shared = next((n for n, (a, b) in pairs if a != b), 0)
    after, added = texts[0][:shared][::-1], tokenizer.added_tokens_decoder
    ids = tokenize(tokenizer, after)[0]
    words = [n for n, i in enumerate(ids) if i not in added and tokenizer.decode(i).strip()]
    last = ids[words[-1] + 1 :] if words else ids  # those before may close a part of the answer
    last, every = ([i for i in x if i in added and added[i].content.strip()] for x in (last, ids))
    ids = sorted(last or every, key=lambda i: not added[i].special)[:1]
    for end in (tokenizer.eos_token_id, *(getattr(c, "eos_token_id", None) for c in configs)):
        ids += end if isinstance(end, list) else [] if end is None else [end]
    return list(dict.fromkeys(ids))


def load_tokenizer(name: str, revision: str, template_file: str | None) -> Tokenizer:
    """A fast tokenizer with its own chat template, or with the one in `template_file`."""
    with usage_error(f"no usable tokenizer in {name}", *LOAD_ERRORS):
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        if template_file:
            tokenizer.chat_template = "".join(part for _, part in _parts(template_file))
        if tokenizer.chat_template:
            tokenizer.get_chat_template()  # refuses named templates without a default
    if not tokenizer.is_fast:
        raise UsageError(f"{name} has no fast tokenizer; character offsets are needed for masks")
    return tokenizer


def open_model(
    args: Flags, device: torch.device, role: str, template: str | None = None
) -> LanguageModel:
    """The model of `role`, "student" or "teacher", without loading its weights.

    `template` replaces a missing chat template (of base models).
    """
    is_teacher = role == "teacher"
    name, revision = getattr(args, role), args.teacher_revision if is_teacher else args.revision
    dtype = args.teacher_dtype if is_teacher else args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if Path(name, "adapter_config.json").is_file():
        raise UsageError(f"{name} holds an adapter of peft: merge it into its base model first")
    tokenizer = load_tokenizer(name, revision, args.chat_template)
    tokenizer.chat_template = tokenizer.chat_template or template
    if not tokenizer.chat_template:
        raise UsageError(f"{name} has no chat template; give one with --chat-template FILE")
    generation_config = None
    with usage_error(f"cannot load the model {name}", *LOAD_ERRORS):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        digest = digest_of_model(name, revision)
        with contextlib.suppress(OSError):  # most models have this file, none needs it
            generation_config = GenerationConfig.from_pretrained(name, revision=revision)
    text_config, options = config.get_text_config(), json.loads(args.template_kwargs)
    with usage_error("--template-kwargs", TypeError):  # a name that the template is given anyway
        ends = end_of_turn_ids(tokenizer, text_config, generation_config, **options)
    if not (ends := [i for i in ends if i < text_config.vocab_size]):
        raise UsageError(f"{name}: neither its chat template nor its tokenizer has an end token")

    def load(model: LanguageModel) -> PreTrainedModel:
        weights = load_weights(model, args, revision, dtype if is_teacher else "float32")
        return weights.requires_grad_(not is_teacher)

    compute = getattr(torch, dtype)
    model = LanguageModel(name, tokenizer, config, ends, compute, device, digest, load)
    model.spread = is_teacher and args.teacher_device_map != "none"
    model.exact_head = not is_teacher and args.head_dtype == "float32"
    model.directory = directory_of_model(name, revision)
    model.opens = opened_tag(tokenizer, **options)
    if model.max_positions and args.max_length > model.max_positions:
        what = f"--max-length {args.max_length}"
        raise UsageError(f"{what}: {name} reads at most {model.max_positions} tokens")
    return model


# What quantised checkpoints have beside their weights, or in place of them.
SCALES = {"weight_scale", "weight_scale_inv", "weight_packed", "qweight", "scales", "input_scale"}


def model_class(config: PreTrainedConfig) -> Any:
    """That of language models, or of those with a vision tower that transformers has only so."""
    plain = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not plain
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def load_weights(model: LanguageModel, args: Flags, revision: str, dtype: str) -> PreTrainedModel:
    """The weights on the model's device, in eval mode; refuses missing ones and unknown heads."""
    mixed = model.compute_dtype != getattr(torch, dtype)
    with usage_error(f"cannot load the model {model.name}", *LOAD_ERRORS):
        weights, report = model_class(model.config).from_pretrained(
            model.name, revision=revision, dtype=dtype, use_safetensors=True,
            trust_remote_code=False, attn_implementation=args.attn_implementation,
            experts_implementation="eager" if mixed else None,  # autocast leaves others in float32
            device_map="auto" if model.spread else None, output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are reported, and refused below by name
        )  # fmt: skip
    if missing := [*sorted(report["missing_keys"]), *(k for k, *_ in report["mismatched_keys"])]:
        raise UsageError(
            f"{model.name} lacks {len(missing)} tensors of the shape that its config.json asks for "
            f"(they would be random); the first is {missing[0]}"
        )
    known, prefixes = weights.state_dict().keys(), ("", f"{weights.base_model_prefix}.")
    for name in sorted(report["unexpected_keys"]):
        layer, _, kind = name.rpartition(".")
        beside = any(f"{prefix}{layer}.weight" in known for prefix in prefixes)
        if kind in SCALES or (kind != "weight" and beside):
            raise UsageError(
                f"{model.name} has the tensor {name}, which transformers would leave out: it would "
                "compute something else (was it quantised by another tool?)"
            )
    head, layer = None, weights.get_output_embeddings()
    if not model.spread:
        weights.to(model.device)
    else:  # from now on the backbone returns its states on the device of its inputs
        add_hook_to_module(weights.base_model, AlignDevicesHook(io_same_device=True), append=True)
        if layer is not None:
            with align_module_device(layer, model.device):  # it may have been offloaded
                head = Head(layer.weight.detach(), getattr(layer, "bias", None))
    loaded = dataclasses.replace(model, load=lambda _: weights.eval(), cached_head=head)
    check_head(loaded)
    model.cached_head = head or model.cached_head
    kinds = caches_for(loaded)
    model.cache = next((kind for kind in kinds if cache_is_exact(loaded, kind)), None)
    if model.cache is not kinds[0]:
        lack = "CUDA graphs" if model.cache else f"{type(weights).__name__}'s cache, slowly"
        PartialState().print(f"{model.name}: text is generated without {lack}")
    return weights


def check_head(model: LanguageModel) -> None:
    """Refuse a model whose logits are not those that `Head` computes from its hidden states."""
    layer, size = model.model.get_output_embeddings(), model.vocabulary
    if layer is None or not hasattr(layer, "weight"):
        raise UsageError(f"{model.name} has no output embeddings, so its head cannot be chunked")
    if (rows := len(layer.weight)) < size:
        raise UsageError(f"{model.name}: its config.json has {size} ids, its head {rows}")
    ids = torch.arange(min(8, size), device=model.device)[None]
    dtype = model.compute_dtype
    with torch.no_grad(), model.autocast(), usage_error(f"cannot use {model.name}", RuntimeError):
        expected = model.model(input_ids=ids, use_cache=False).logits[0, :, :size]
        logits = model.head().logits(model.model.base_model(ids, use_cache=False)[0][0])
    if not expected.isfinite().all():
        half = dtype == torch.float16
        advice = "it overflows: set another --teacher-dtype" if half else "its weights are damaged"
        raise UsageError(f"{model.name} gives logits in {dtype} that are not finite: {advice}")
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    difference = (expected - logits).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not difference <= tolerance:
        raise UsageError(
            f"{model.name} ({type(model.model).__name__}) computes its logits in a way that "
            f"this suite does not know (relative difference {difference:.2g})"
        )


def caches_for(model: LanguageModel) -> list[type[DynamicCache | StaticCache]]:
    """Kinds of caches of text generation to try, fastest first.

    A CUDA graph needs a fixed size, and a length that is counted on the GPU, as `StaticLayer` does.
    """
    if model.device.type != "cuda":
        return [DynamicCache]
    if model.spread or not model.model._can_compile_fullgraph:
        return [MaskedCache]
    layers = StaticCache(model.config.get_text_config(), max_cache_len=1).layers
    fixed = all(type(layer) is StaticLayer for layer in layers)
    return [StaticCache, MaskedCache] if fixed else [MaskedCache]


def cache_is_exact(model: LanguageModel, kind: type[DynamicCache | StaticCache]) -> bool:
    """Whether text generation sees the logits that the model computes without a cache.

    Tried on two prompts of unequal length and given answers, of which one is shorter.
    """
    ids = [1 + 7 * i % (model.vocabulary - 1) for i in range(31)]
    prompts, responses = [ids[:3], ids[3:12]], [[*ids[12:15], 0], ids[15:]]
    batch = collate(list(map(with_response, prompts, responses)), model.device)
    draws = nn.utils.rnn.pad_sequence([torch.tensor(r).double() for r in responses], True)
    steps = []

    def choose(logits: Tensor, given: Tensor) -> Tensor:
        steps.append(logits)
        return given.long()

    with usage_error(f"cannot use {model.name}", RuntimeError), model.evaluating():
        expected = model.logits(batch)[:]  # (4 + 16, V)
        try:
            tried = dataclasses.replace(model, end_ids=[0], load=lambda _: model.model, cache=kind)
            _generate_batch(tried, prompts, draws, choose)
        except Exception:  # a model may raise whatever it likes about its cache
            return False
    logits = torch.stack([x[0] for x in steps[:4]] + [x[-1] for x in steps])
    error = (logits - expected).std(-1) / expected.std(-1).clamp_min(1e-6)
    # Not the maximum, as rounding can route one token to another expert. Measured on chat models:
    # up to 5e-6, in bfloat16 0.04; without the mask 0.8 to 1.4.
    worst = max(float(part.sort().values[len(part) * 7 // 10]) for part in error.split([4, 16]))
    return worst <= (0.3 if model.compute_dtype.itemsize == 2 else 1e-2)


def load_student(args: Flags, device: torch.device, template: str | None = None) -> LanguageModel:
    """The student with float32 weights, prepared for LoRA or checkpointing if asked."""
    student = open_model(args, device, "student", template)
    _ = student.model  # loaded now, so that wrong weights are an early error
    if PartialState().is_main_process:
        with (
            tempfile.TemporaryDirectory() as directory,
            usage_error(f"{student.name} could be trained, but not saved", Exception),
        ):
            save_student(student, Path(directory), "", state_dict={})  # all but the weights
    prepare_student(student, args)
    freeze_unreached(student)
    if args.compile:
        compile_layers(student)
    return student


def compile_layers(student: LanguageModel) -> None:
    """Compile what the layers do in training; all layers of a kind share their code."""
    with usage_error("--compile", ValueError):
        layers = layers_of(student.model)
        if problem := compiler_problem(student.device.type):
            raise ValueError(problem)
    for layer in layers:
        layer.compile(dynamic=True)


def prepare_student(student: LanguageModel, args: Flags) -> None:
    """Add adapters or checkpointing if asked."""
    if args.lora_rank:
        add_adapters(student, args.lora_rank)
    if args.gradient_checkpointing:
        if not student.model.supports_gradient_checkpointing:
            raise UsageError(f"--gradient-checkpointing: {student.name} does not support it")
        student.model.activation_checkpointing_enable()


TRANSLATION = "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"


def add_adapters(student: LanguageModel, rank: int) -> None:
    """LoRA on stacked experts and on all linear layers except the head; all else is frozen (Hu et
    al. 2021). Layers are replaced in place, so backbone and head keep their places in the model."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    named = list(student.model.named_parameters())
    stacks = {".".join(n.split(".")[-2:]) for n, p in named if p.ndim == 3 and min(p.shape) > 1}
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", target_parameters=sorted(stacks)
    )
    # peft raises an error for layers that it cannot adapt. Its translation of older adapters would
    # leave out the dense layers of many mixtures of experts.
    with usage_error("--lora-rank", ValueError), mock.patch(TRANSLATION):
        student.adapters = LoraModel(student.model, config, "default")
    reached = {f"{name}.weight" for name in student.adapters.targeted_module_names}
    reached |= set(student.adapters.targeted_parameter_names)
    total, experts = sum(p.numel() for _, p in named), [n for n, _ in named if "expert" in n]
    if not reached & {*experts} and 2 * sum(p.numel() for n, p in named if n in experts) > total:
        raise UsageError(f"--lora-rank cannot adapt the experts of {student.name} ({experts[0]})")
    share = sum(p.numel() for n, p in named if n in reached) / total
    kinds = ", ".join(sorted({n.removesuffix(".weight").rpartition(".")[2] for n in reached}))
    PartialState().print(f"LoRA adapts {share:.1%} of the weights of {student.name}: {kinds}")


def freeze_unreached(student: LanguageModel) -> None:
    """Freeze weights that text gives no gradient (a vision tower): DDP would wait for gradients.

    Experts without a token are not frozen: they are slices of one parameter and get zeros.
    """
    trained = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
    with usage_error(f"cannot train {student.name}", Exception):  # with adapters, for example
        logits = student.logits(collate([Tokens([1, 2, 3, 4], [2, 3])], student.device))[:]
        gradients = torch.autograd.grad(logits.sum(), list(trained.values()), allow_unused=True)
    left = [name for name, g in zip(trained, gradients, strict=True) if g is None]
    for name in left:
        trained[name].requires_grad_(False)
    if left:
        what = f"{left[0]} and {len(left) - 1} other tensors of {student.name}"
        PartialState().print(f"frozen, as text does not reach them: {what}")


def load_pair(args: Flags, device: torch.device) -> Pair:
    """Student and teacher; the teacher's weights are loaded only if its head is not cached, and a
    teacher on a server is asked only for what is not cached."""
    if args.api_base_url:
        reader = open_model(args, device, "teacher") if args.two_tokenizers else None  # no weights
        student = load_student(args, device, reader and reader.tokenizer.chat_template)
        if reader:
            share_tag(Pair(student, reader))
        return Pair(student, ServerTeacher(args, reader or student))
    teacher = open_model(args, device, "teacher")
    # If `alone`, only the main process loads the teacher, and fills the cache for all.
    alone = teacher.spread and PartialState().distributed_type != DistributedType.NO
    if alone and (not args.cache_teacher or hasattr(args, "mix")):
        raise UsageError("--teacher-device-map is for one process in on_policy.py and with "
                         "--no-cache-teacher: FSDP shards the teacher")  # fmt: skip
    student = load_student(args, device, teacher.tokenizer.chat_template)
    pair = Pair(student, teacher)
    share_tag(pair)
    if pair.same_vocabulary:  # the student reads the teacher's ids, its end tokens included
        student.end_ids = list(dict.fromkeys(student.end_ids + teacher.end_ids))
        if student.vocabulary < teacher.vocabulary:
            teacher.vocabulary = student.vocabulary
            teacher.digest += f"-{teacher.vocabulary}"
    if args.cache_teacher:
        dtype = str(teacher.compute_dtype).removeprefix("torch.")
        teacher.states_dir = Path(args.cache_dir) / "states" / f"{teacher.digest}-{dtype}"
        path = teacher.states_dir / "head.safetensors"
        if alone:
            with exclusive(teacher.states_dir / "lock"):
                if PartialState().is_main_process and not path.exists():
                    save_tensors(path, weight=teacher.head().weight, bias=teacher.head().bias)
        if path.exists():
            teacher.cached_head = Head(**read_tensors(path, device))
    _ = teacher.cached_head or teacher.model  # loaded now, as the student
    return pair


def directory_of_model(name: str, revision: str) -> Path:
    """The model's directory, or that of a hub model's commit."""
    if Path(name).is_dir():
        return Path(name)
    return Path(cached_file(name, "config.json", revision=revision)).parent


def digest_of_model(name: str, revision: str) -> str:
    """Identifies weights, configuration and tokenizer: a hub model's commit, or the content of a
    directory's files; of weights name, size and time of change, because hashing them takes longer
    than loading them."""
    directory, parts = directory_of_model(name, revision), []
    if not Path(name).is_dir():
        return f"{row_seed(name, directory.name):016x}"
    for f in sorted(directory.iterdir()):
        if f.suffix == ".safetensors":
            parts.append((f.name, f.stat().st_size, f.stat().st_mtime_ns))
        elif f.suffix in {".json", ".jinja", ".model", ".txt"}:
            parts.append((f.name, hashlib.sha256(f.read_bytes()).hexdigest()))
    return f"{row_seed(parts):016x}"


# ------------------------------------------------------------------------------ several devices

# FSDP 2 shards every parameter over the processes and gathers one layer at a time. A script's
# module (`TokenLevelLoss` and the like) is the root of what is sharded. Embeddings, final norm and
# head are its own: they are gathered when its `forward` begins and stay until its backward pass
# ends, so that the loss, which is outside of all layers, finds the head whole.

UNSUPPORTED = {  # accelerate's variables
    "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG",
    "FSDP_OFFLOAD_PARAMS", "FSDP_IGNORED_MODULES",
}  # fmt: skip


def start_accelerator(**options: Any) -> Accelerator:
    """accelerate as it was launched, with FSDP on CPUs too; `ValueError` for what lacks support."""
    on = {name for name, value in os.environ.items() if value.lower() not in {"", "0", "false"}}
    for name in sorted(on & UNSUPPORTED):
        raise ValueError(f"{name} is not supported: use --use_fsdp --fsdp_version 2 alone")
    if "FSDP_ACTIVATION_CHECKPOINTING" in on:
        raise ValueError("--fsdp_activation_checkpointing: use --gradient-checkpointing instead")
    if "ACCELERATE_USE_FSDP" not in on:
        return Accelerator(**options)
    if os.environ.get("FSDP_VERSION") != "2":
        raise ValueError("FSDP 1 is not supported: add --fsdp_version 2")
    plugin = FullyShardedDataParallelPlugin(
        # Read with weights_only=True. Sharded checkpoints have metadata that would be unpickled.
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,  # each process loads the whole student, and checks it
        auto_wrap_policy="TRANSFORMER_BASED_WRAP",
    )
    accelerator = Accelerator(fsdp_plugin=plugin, **options)
    if accelerator.use_distributed:  # accelerate itself has FSDP on GPUs only
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that are gathered one at a time; `ValueError` if none is known."""
    kinds = set(model._no_split_modules or ())
    if not (layers := [m for m in model.modules() if type(m).__name__ in kinds]):
        raise ValueError(f"transformers names no layers of {type(model).__name__}")
    return layers


def without_weights(model: nn.Module, *others: Any) -> Any:
    """Copies of the model and of objects that refer to it, with empty parameters."""
    empty = {id(p): nn.Parameter(p.new_empty(0), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy((model, *others), empty)


def fill_weights(model: nn.Module, source: nn.Module, dtype: torch.dtype | None) -> None:
    """Gather the weights of `source` into its copy, in every process.

    They get `dtype` as if they were loaded in it: transformers exempts some, such as routers, and
    computes buffers that are not saved, such as rotary frequencies, in float32.
    """
    saved = model.state_dict().keys()
    exempt = [re.compile(k.replace("*", ".*")) for k in source._keep_in_fp32_modules_strict or ()]
    targets, sources = ([*m.named_parameters(), *m.named_buffers()] for m in (model, source))
    for (name, target), (_, weight) in zip(targets, sources, strict=True):
        part = weight.detach()
        if dtype and name in saved and part.is_floating_point():
            name = name.replace(".base_layer", "")  # peft's name for an adapted layer
            part = part if any(kind.search(name) for kind in exempt) else part.to(dtype)
        target.data = part.full_tensor() if isinstance(part, DTensor) else part


# ----------------------------------------------------------------------------- tokens and masks

# Llama 3.2's template prints today's date, which would change every cache key each day.
FIXED_DATE = "26 Jul 2024"
_FIXED_CLOCK = "{% macro strftime_now(format) %}" + FIXED_DATE + "{% endmacro %}\n"

Spans = list[tuple[int, int]]
Item = TypeVar("Item")


class Tokens(NamedTuple):
    """Token ids of an example for one model, and which of them are targets."""

    ids: list[int]
    targets: list[int]  # positions in `ids`, ascending, never 0


class Prompt(NamedTuple):
    """A conversation, and the ids of its rendered prompt for each model."""

    conversation: Conversation
    student: list[int]
    teacher: list[int]
    given: str = ""  # what both prompts end with, a part of the answer: see `opened_tag`


class Completion(NamedTuple):
    """An answer that a model wrote."""

    text: str  # without its end-of-turn token
    finished: bool | None  # False: cut by the length limit; None: no answer, `text` says why
    length: int  # in tokens, the end-of-turn token included
    ids: list[int] | None  # None from a data set, and from an API that gives only text


@dataclass(frozen=True)
class Example:
    """A prompt with its answer as each model reads it.

    With one vocabulary the targets have the same ids for both models, with two only the same text.
    """

    index: int  # identifies the example in its list
    prompt: Prompt
    text: str  # the answer
    student: Tokens
    teacher: Tokens


def with_reasoning(prompt: Prompt, answer: Completion) -> str:
    """An answer to be graded, with the tag of its reasoning if its prompt has opened that."""
    opened = answer.ids is not None and REASONING_OPENS.match(prompt.given)
    return prompt.given * bool(opened) + answer.text


class Batch(NamedTuple):
    """B examples padded on the right, and their N targets in order."""

    input_ids: Tensor  # (B, L)
    example: Tensor  # (N,) which of the B examples
    position: Tensor  # (N,) the position before each target, whose hidden state predicts it
    targets: Tensor  # (N,)


# In messages: inside a name that must stay text. In `_text_tokenizer`: before a control token.
_MARK = "\ufdd0"


@functools.lru_cache(maxsize=8)
def _control(tokenizer: Tokenizer) -> re.Pattern[str]:
    """The names of control tokens. Reasoning tags are none: in text they are meant as tokens."""
    tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    names = [t for t in tokens if len(t) > 1 and "think" not in t.lower()]
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def mark_control_tokens(tokenizer: Tokenizer, value: Any) -> Any:
    """The value, with a mark in each control token's name in its strings: see `tokenize`."""
    if isinstance(value, str):
        return _control(tokenizer).sub(lambda m: m[0][0] + _MARK + m[0][1:], value)
    if isinstance(value, dict):
        return {key: mark_control_tokens(tokenizer, v) for key, v in value.items()}
    return [mark_control_tokens(tokenizer, v) for v in value] if isinstance(value, list) else value


@functools.lru_cache(maxsize=8)
def _text_tokenizer(tokenizer: Tokenizer) -> BackendTokenizer:
    """A copy whose control tokens are spelled `_MARK` + name, so that a bare name is text."""
    state = tokenizer.backend_tokenizer.to_str()
    names = f'"({_control(tokenizer).pattern})"'
    return BackendTokenizer.from_str(re.sub(names, f'"{_MARK}\\1"', state))


def render(tokenizer: Tokenizer, turns: list[Message], prompt: bool = False, **options: Any) -> str:
    """The conversation in the model's chat template; `prompt` adds the generation prompt."""
    return _render(tokenizer, turns, add_generation_prompt=prompt, **options)[0]


def _render(tokenizer: Tokenizer, messages: list[Message], **options: Any) -> tuple[str, Spans]:
    """The text, and the spans of it that `{% generation %}` marks if they are asked for."""
    messages, options = (mark_control_tokens(tokenizer, part) for part in (messages, options))
    # A template may raise whatever it likes.
    with usage_error("the chat template refuses a conversation", Exception):
        texts, spans = render_jinja_template(
            [messages],
            chat_template=_FIXED_CLOCK + tokenizer.get_chat_template(tools=options.get("tools")),
            **{"date_string": FIXED_DATE, **tokenizer.special_tokens_map, **options},
        )
    return texts[0], spans[0] if spans else []


def opened_tag(tokenizer: Tokenizer, **options: Any) -> str:
    """The tag that the generation prompt opens, with the white space after it: `<think>`.

    "" if it ends in none, or in one that begins every answer, as a role's name may.
    """
    asked, turns = (
        [{"role": role, "content": "x"} for role in roles]
        for roles in (["user"], ["user", "assistant", "user"])
    )
    prompt = render(tokenizer, asked, prompt=True, **options)
    cue = prompt.removeprefix(render(tokenizer, asked, **options))
    tag = re.search(r"[<\[]\w+[>\]]\s*\Z", cue)
    if tag is None:
        return ""
    name, text = tag[0].strip(), render(tokenizer, turns, **options)
    empty = re.escape(name) + r"\s*" + re.escape(f"{name[0]}/{name[1:]}")  # of earlier turns
    return "" if name in re.sub(empty, "", text) else tag[0]


def share_tag(pair: Pair) -> None:
    """Where one model's generation prompt opens a tag, let the other's open it too, so that both
    read one answer.

    Raises `UsageError` if the teacher does not know the tag, or the other opens another one.
    """
    for model, other in (pair, pair[::-1]):
        if not other.opens or model.opens.strip() == other.opens.strip():
            continue
        templates, tag = model.tokenizer.chat_template, other.opens.strip()
        known = tag in model.tokenizer.get_vocab() or tag in json.dumps(templates)
        if model.opens or not (known or model is pair.student):
            raise UsageError(
                f"the generation prompt of {other.name} opens {other.opens!r}, which {model.name} "
                "does not write: give both one --chat-template"
            )
        cue = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(other.opens)} }}}}{{% endif %}}"
        model.opens, added = other.opens, lambda text, cue=cue: text.removesuffix("\n") + cue
        model.tokenizer.chat_template = (
            {name: added(text) for name, text in templates.items()}
            if isinstance(templates, dict)
            else added(templates)
        )
        PartialState().print(f"{model.name}: its chat template opens {model.opens!r} from now on")


def after_tag(answer: str, tag: str) -> str:
    """What is left to write of an answer after a prompt that has opened this tag."""
    if answer.startswith(tag):
        return answer[len(tag) :]
    if answer.startswith(tag.strip()):
        return answer[len(tag.strip()) :].lstrip()
    return f"\n{tag[0]}/{tag.strip()[1:]}\n\n{answer}"  # an answer without reasoning


def whole_answer(text: str) -> str:
    """The text of an API or a row, with `<think>` if its generation prompt had opened that."""
    reasoning, closed, _ = text.partition("</think>")
    return f"<think>\n{text}" if closed and "<think>" not in reasoning else text


def assistant_spans(
    tokenizer: Tokenizer, messages: list[Message], **options: Any
) -> tuple[str, Spans]:
    """The rendered conversation, and the character spans in it that the assistant wrote.

    They come from the template's `{% generation %}` marks, else from rendering every prefix. Some
    templates rewrite earlier turns (they drop reasoning, for example), so that a prefix rendered
    alone is not a prefix of the whole. Then there is only the last turn's span, or none.
    """
    if re.search(r"{%-?\s*generation", tokenizer.get_chat_template(tools=options.get("tools"))):
        text, spans = _render(tokenizer, messages, return_assistant_tokens_mask=True, **options)
        asked = [render(tokenizer, messages[:-1], prompt=p, **options) for p in (True, False)]
        cue = asked[0].removeprefix(asked[1])  # some templates mark it too, or its end
        cues = [text.rfind(cue, 0, a + len(cue)) for a, _ in spans]  # -1: the text has none
        both = zip(spans, cues, strict=True)
        spans = [(max(a, cue_at + len(cue) * (cue_at >= 0)), b) for (a, b), cue_at in both]
        thoughts = [m.get("reasoning_content") or m["content"].rpartition("</think>")[0]
                    for m in messages[:-1] if m["role"] == "assistant"]  # fmt: skip
        if spans:
            before = text[: spans[-1][0]]
            whole = all(_prints(before, {"content": thought}) for thought in thoughts)
            return text, spans if whole else spans[-1:]
    text, spans = render(tokenizer, messages, **options), []
    for i, message in enumerate(messages):
        # What the assistant says before the user does has no prompt that a template could render.
        has_prompt = i + 1 == len(messages) or any(m["role"] != "system" for m in messages[:i])
        if message["role"] == "assistant" and has_prompt:
            before = render(tokenizer, messages[:i], prompt=True, **options)
            after = render(tokenizer, messages[: i + 1], **options)
            if not text.startswith(after):  # an end of text may follow the last turn alone
                after = after.removesuffix(tokenizer.eos_token or "")
            located = text.startswith(before) and text.startswith(after)
            spans.append((len(before), len(after)) if located else (0, 0))
    return text, [(a, b) for a, b in spans[0 if all(b for _, b in spans) else -1 :] if a < b]


def tokenize(tokenizer: Tokenizer, text: str) -> tuple[list[int], Spans]:
    """Ids and character offsets of rendered text, which contains its special tokens already.

    Marked names lose their mark and are text; others get one, as `_text_tokenizer` spells them.
    """
    if _MARK not in text:
        out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return out["input_ids"], out["offset_mapping"]
    names, places = [], []
    for part in re.finditer(f"{_control(tokenizer).pattern}|.", text, re.DOTALL):
        names.append("" if part[0] == _MARK else _MARK * (len(part[0]) > 1) + part[0])
        places += [part.start()] * len(names[-1])
    with usage_error("the tokenizer cannot encode control tokens as text", Exception):
        out = _text_tokenizer(tokenizer).encode("".join(names), add_special_tokens=False)
    places.append(len(text))
    return out.ids, [(places[a], places[b]) for a, b in out.offsets]


def tokenize_answer(
    model: LanguageModel, talk: Conversation, prompt_ids: list[int], text: str
) -> list[int]:
    """The ids of an answer that another model wrote.

    It is tokenised after its prompt, because SentencePiece marks where text begins. If one token
    would span the boundary, it is tokenised by itself, because at generation time the model has
    read exactly the prompt's own tokens.
    """
    before = render(model.tokenizer, talk.messages, prompt=True, **talk.options)
    if before.rstrip().endswith("</think>"):  # it holds the empty block already
        text = re.sub(r"\A\s*<think>\s*</think>\s*", "", text)
    text, start = mark_control_tokens(model.tokenizer, text), len(prompt_ids)
    ids = tokenize(model.tokenizer, before + text)[0]
    if ids[:start] != prompt_ids or (text and len(ids) == start):
        return model.checked(tokenize(model.tokenizer, text)[0])
    return model.checked(ids[start:])


def tokenize_conversation(
    model: LanguageModel, messages: list[Message], prompt_ids: Sequence[int] = (), **options: Any
) -> Tokens:
    """The conversation; all tokens of assistant turns are targets, end-of-turn tokens included.

    It begins with the prompt's ids: if one token would span the end of the prompt, what the
    template prints after the prompt is tokenised by itself, as `tokenize_answer` does. If the
    template prints no end after the last turn, the model's own is appended. If it does not print
    the last turn as it is, or prints two blocks of reasoning before it, there are no targets.
    """
    check_printed(model, messages, "tool_calls", **options)
    # Where the prompt opens reasoning, `dataset_examples` can write that of the last turn itself.
    reasoned = messages[:-1] if model.opens.startswith("<think>") else messages
    check_printed(model, reasoned, "reasoning_content", **options)
    text, spans = assistant_spans(model.tokenizer, messages, **options)
    if spans:
        before, answer = text[: spans[-1][0]].rstrip(), text[slice(*spans[-1])]
        twice = before.endswith("</think>") and answer.lstrip().startswith("<think>")
        spans = spans if _prints(answer, messages[-1]) and not twice else []
    ids, offsets = tokenize(model.tokenizer, text)
    if ids[: len(prompt_ids)] != [*prompt_ids]:
        before = render(model.tokenizer, messages[:-1], prompt=True, **options)
        if text.startswith(before):
            (ids, offsets), n = tokenize(model.tokenizer, before), len(before)
            more, places = tokenize(model.tokenizer, text[n:])
            ids, offsets = ids + more, offsets + [(a + n, b + n) for a, b in places]
    # Some tokenizers leave leading spaces out of offsets, so a token begins where the last ended.
    ends_before = [0, *(b for _, b in offsets[:-1])]
    begins = [min(a, last) for (a, _), last in zip(offsets, ends_before, strict=True)]
    targets, inside = [], []
    for start, stop in spans:
        inside = [i for i, begin in enumerate(begins) if start <= begin < stop]
        ends = [i for i in inside if ids[i] in model.end_ids]
        # An end of text that follows the end of the last turn is no target.
        while ends[1:] and not model.tokenizer.decode(ids[ends[-2] + 1 : ends[-1]]).strip():
            ends.pop()
        if ends:  # white space that a template prints after the end of a turn is no target
            inside = [i for i in inside if i <= ends[-1]]
        elif inside and inside[-1] + 1 < len(ids) and ids[inside[-1] + 1] in model.end_ids:
            inside.append(inside[-1] + 1)
        targets += inside
    if inside and ids[inside[-1]] not in model.end_ids:
        ids = [*ids[: inside[-1] + 1], model.end_ids[0]]
        targets.append(len(ids) - 1)
    return Tokens(model.checked(ids), [i for i in targets if i > 0])


def _prints(span: str, message: Message) -> bool:
    """Whether the rendered turn holds the message's text, but for white space and a tag at its
    beginning, which the prompt may hold."""
    texts = message.get("content"), message.get("reasoning_content")
    texts = [re.sub(r"^\s*[<\[]\w+[>\]]", "", t) for t in texts if isinstance(t, str)]
    span, *texts = ("".join(t.split()) for t in (span.replace(_MARK, ""), *texts))
    return all(t in span for t in texts)


def tokenize_prompts(conversations: list[Conversation], pair: Pair, limit: int) -> list[Prompt]:
    """Each conversation with the generation prompt, in both models' templates.

    Prompts of `limit` tokens or more, which leave no room for an answer, are left out and counted.
    For an API that is given text, both fields hold the student's ids.
    """

    def read_by(model: LanguageModel) -> list[tuple[list[int], str]]:
        texts, unused, sides = [], Counter(), []
        template = model.tokenizer.chat_template  # or several, by name
        texts_of = template.values() if isinstance(template, dict) else [template]
        words = set(re.findall(r"\w+", " ".join(texts_of)))
        words |= {"reasoning_content"} if "thinking" in words else set()  # its other name
        for c in progress("rendering prompts", items=conversations):
            with usage_error(c.source, UsageError, TypeError):  # TypeError: a reserved option
                check_printed(model, c.messages, "tool_calls", **c.options)
                texts.append(render(model.tokenizer, c.messages, prompt=True, **c.options))
                check_content(model, c.messages, texts[-1], **c.options)
            names = {name for m in (*c.messages, c.response or {}, c.options) for name in m}
            unused.update(names - words - {"role", "content"})
        if unused:
            title = f"the chat template of {model.name} does not use, by rows"
            PartialState().print(f"{title}: {dict(unused)}")
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        parts = (texts[i : i + 1000] for i in range(0, len(texts), 1000))  # for memory's sake
        encoded = (ids for part in parts for ids in model.tokenizer(part, **options)["input_ids"])
        for c, text, ids in zip(conversations, texts, encoded, strict=True):
            with usage_error(c.source, UsageError):
                ids = tokenize(model.tokenizer, text)[0] if _MARK in text else ids
                sides.append((model.checked(ids), model.opens * text.endswith(model.opens)))
        return sides

    ours = theirs = read_by(pair.student)
    if len(pair.readers) == 2:
        templates = [model.tokenizer.chat_template for model in pair.readers]
        if templates[0] != templates[1] or not pair.same_vocabulary:
            theirs = read_by(pair.readers[1])
    sides = zip(conversations, ours, theirs, strict=True)
    prompts = [Prompt(c, ids, their_ids, given) for c, (ids, given), (their_ids, _) in sides]
    prompts = [p for p in prompts if all(0 < len(ids) < limit for ids in (p.student, p.teacher))]
    left_out = f"{len(conversations) - len(prompts)} of {len(conversations)} prompts"
    if not prompts:
        raise UsageError(f"{left_out} do not fit into --max-length {limit}")
    if len(prompts) < len(conversations):
        PartialState().print(f"{left_out} left out: they do not fit into --max-length {limit}")
    return prompts


def make_examples(prompts: list[Prompt], pair: Pair, args: Flags) -> list[Example]:
    """The training examples, on the text that --completions names; says what was cut."""
    if args.completions == "teacher":
        completions = pair.teacher.complete(
            prompts, args, temperature=args.sampling_temperature, top_p=args.top_p,
            purpose="training text",
        )  # fmt: skip
        both = zip(prompts, completions, strict=True)  # a server may have given no answer
        if not (both := [(p, c) for p, c in both if c.finished is not None]):
            raise UsageError("no training prompt got an answer")
        prompts, completions = zip(*both, strict=True)
        examples = completion_examples(prompts, completions, pair, args.max_length)
        ends = [e.student.ids[e.student.targets[-1]] if e.student.targets else -1 for e in examples]
        cut = sum(end not in pair.student.end_ids for end in ends)
    else:
        examples, cut = dataset_examples(prompts, pair, args.max_length)
    if not (tokens := sum(len(e.student.targets) for e in examples)):
        raise UsageError("no answer is left to learn from")
    PartialState().print(
        f"training text: {len(examples)} examples, {tokens} target tokens; {cut} responses cut"
    )
    return examples


def completion_examples(
    prompts: Sequence[Prompt], completions: Sequence[Completion], pair: Pair, max_length: int
) -> list[Example]:
    """Examples on text that a model wrote, one for each prompt.

    With one vocabulary both models read the generated ids. Otherwise the student tokenises the text
    itself, and its tokens stand in for those of an API teacher.
    """
    shared, examples, names = pair.same_vocabulary, [], _control(pair.readers[-1].tokenizer)
    by_api = isinstance(pair.teacher, Server)
    found = [names.search(c.text) for c in completions if (c.ids or by_api) and not shared]
    if marked := [match[0] for match in found if match]:
        PartialState().print(
            f"{len(marked)} of {len(completions)} answers of the teacher hold control tokens (such "
            f"as {marked[0]}), which the student reads as text"
        )
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        text, written, sides = completion.text, completion.ids, []
        if written is None:  # by an API or in a data set, where answers are whole
            text = after_tag(whole_answer(text), prompt.given)
        for model, ids in zip(pair.readers, (prompt.student, prompt.teacher), strict=False):
            response = written if shared or model is not pair.student else None
            if response is None:
                with usage_error(prompt.conversation.source, UsageError):
                    response = tokenize_answer(model, prompt.conversation, ids, text)
                response = response + model.end_ids[:1] * bool(completion.finished)
            written = response if shared else written
            sides.append(with_response(ids, response))
        sides = _cut([sides[0], sides[-1]], max_length, shared)
        examples.append(Example(i, prompt, prompt.given + text, *sides))
    return examples


def dataset_examples(prompts: list[Prompt], pair: Pair, limit: int) -> tuple[list[Example], int]:
    """Examples on the data set's own responses, and how many of those were cut to fit.

    A response that the template does not print as it is follows the prompt as a completion does.
    """
    examples, cut, shared = [], 0, pair.same_vocabulary or len(pair.readers) == 1
    empty = last_only = 0  # the latter: conversations with earlier answers that cannot be located
    for i, prompt in enumerate(progress("tokenising answers", items=prompts)):
        conversation, response = prompt.conversation, prompt.conversation.response
        turns = [*conversation.messages, response]
        said = {"tool_calls", "reasoning_content"}
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        if not all(turn["content"].strip() or turn.keys() & said for turn in answers):
            empty += 1
            continue
        turns[-1] = response = response | {"content": whole_answer(response["content"])}
        with usage_error(conversation.source, UsageError):
            asked, options = (prompt.student, prompt.teacher), conversation.options
            sides = [tokenize_conversation(pair.student, turns, asked[0], **options)] * 2
            if len(pair.readers) == 2 and asked[0] is not asked[1]:  # read differently
                sides[1] = tokenize_conversation(pair.readers[1], turns, asked[1], **options)
            if not (
                all(t and ids[: len(p)] == p for (ids, t), p in zip(sides, asked, strict=True))
                and (shared or "tool_calls" in response or _hold_one_text(pair.readers, sides))
            ):
                before = render(pair.student.tokenizer, turns[:-1], prompt=True, **options)
                answer = Completion(_unrendered(response, before), True, 0, None)
                (example,) = completion_examples([prompt], [answer], pair, sys.maxsize)
                sides = [example.student, example.teacher]
        begins = [sorted({*ts} - {t + 1 for t in ts}) for _, ts in sides]  # of each turn
        if not shared and len(begins[0]) != len(begins[1]):  # one template rewrites earlier turns
            last = zip(sides, (turn_begins[-1] for turn_begins in begins), strict=True)
            sides = [Tokens(ids, [t for t in ts if t >= begin]) for (ids, ts), begin in last]
        answers = [[side.ids[i] for i in side.targets] for side in sides]
        if shared and answers[0] != answers[1]:
            raise UsageError(
                f"{conversation.source}: the templates of the two models split the response "
                "differently: use --completions teacher"
            )
        earlier = any(turn["role"] == "assistant" for turn in conversation.messages)
        last_only += earlier and sides[0].targets[0] >= len(prompt.student)
        ours, theirs = _cut(sides, limit, shared)
        cut += len(ours.targets) < len(answers[0])
        if ours.targets:
            examples.append(Example(i, prompt, response["content"], ours, theirs))
    if empty:
        left_out = f"{empty} of {len(prompts)} conversations left out"
        PartialState().print(f"{left_out}: an assistant turn is empty")
    if last_only:
        PartialState().print(
            f"of {last_only} of {len(prompts)} conversations only the last answer is learned: the "
            "chat template rewrites earlier ones, or has no prompt for them"
        )
    return examples, cut


def _hold_one_text(models: list[LanguageModel], sides: list[Tokens]) -> bool:
    """Whether the last answer is one text on both sides, but for what only one begins with."""
    texts = []
    for model, (ids, targets) in zip(models, sides, strict=True):
        start = max({*targets} - {t + 1 for t in targets})
        answer = [ids[t] for t in targets if t >= start and ids[t] not in model.end_ids]
        text = model.tokenizer.decode(answer, clean_up_tokenization_spaces=False)
        texts.append(unicodedata.normalize("NFC", text).strip())  # as some tokenizers do
    short, long = sorted(texts, key=len)
    return long.endswith(short)


def _unrendered(response: Message, prompt: str) -> str:
    """A response as a model would write it after the rendered prompt; `UsageError` for tool calls,
    which only a template prints, and for reasoning after a prompt that has closed it."""
    if response.get("tool_calls"):
        raise UsageError(
            "the chat template does not print the answer's tool_calls after its generation prompt "
            "(--template-kwargs may turn reasoning off)"
        )
    reasoning, text = response.get("reasoning_content"), response["content"]
    text = f"<think>\n{reasoning.strip()}\n</think>\n\n{text}" if reasoning else text
    if prompt.rstrip().endswith("</think>") and re.match(r"\s*<think>(?!\s*</think>)", text):
        raise UsageError("the answer reasons, and its generation prompt has closed </think>")
    return text


def with_response(prompt_ids: list[int], response_ids: list[int]) -> Tokens:
    """Tokens of a prompt and its response, of which every token is a target."""
    ids = prompt_ids + response_ids
    return Tokens(ids, list(range(len(prompt_ids), len(ids))))


def _cut(sides: Sequence[Tokens], max_length: int, same_targets: bool) -> list[Tokens]:
    """Both sequences truncated to `max_length`; with one vocabulary they keep equally many targets,
    as many as the longer prompt leaves room for."""
    counts = [sum(i < max_length for i in side.targets) for side in sides]
    counts = [min(counts)] * 2 if same_targets else counts
    both = zip(sides, counts, strict=True)
    return [Tokens(side.ids[:max_length], side.targets[:n]) for side, n in both]


def collate(examples: Sequence[Tokens], device: torch.device, pad_id: int = 0) -> Batch:
    """Pad on the right and list the targets, example by example."""
    rows = [torch.tensor(e.ids) for e in examples] or [torch.zeros(1, dtype=torch.long)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)  # (B, L)
    counts = torch.tensor([len(e.targets) for e in examples], dtype=torch.long)
    of_target = torch.repeat_interleave(torch.arange(len(examples)), counts)  # (N,)
    positions = torch.tensor([i for e in examples for i in e.targets], dtype=torch.long)  # (N,)
    parts = (ids, of_target, positions - 1, ids[of_target, positions])
    return Batch(*(to_device(part, device) for part in parts))


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; to a CUDA device without waiting."""
    if device.type != "cuda":  # MPS may copy after the tensor's memory has been used again
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def my_share(items: Sequence[Item], alone: bool = False) -> Sequence[Item]:
    """The items of this process, dealt out in turn among all processes; with `alone` the main
    process gets all of them."""
    state = PartialState()
    if alone:
        return items if state.is_main_process else items[:0]
    return items[state.process_index :: state.num_processes]


def global_batch(items: Sequence[Item], args: Flags, step: int) -> list[Item]:
    """The examples of an optimizer step; the seed determines another order for each epoch."""
    places = range(step * args.batch_size, (step + 1) * args.batch_size)
    size = len(items)
    return [items[_order(args.seed, place // size, size)[place % size]] for place in places]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    return torch.randperm(size, generator=generator_for(seed, "order", epoch)).tolist()


def split_micro_batches(batch: list[Example], args: Flags) -> tuple[list[list[Example]], int]:
    """This process's micro-batches, and the global batch's number of target tokens (at least 1).

    Micro-batches hold examples of similar length, to carry little padding; every process gets
    equally many of them, and the last one may be empty.
    """
    tokens = sum(len(e.student.targets) for e in batch)
    mine = my_share(sorted(batch, key=lambda e: len(e.student.ids)))
    share = math.ceil(len(batch) / PartialState().num_processes)
    size = min(args.micro_batch_size or share, share)
    return [mine[i : i + size] for i in range(0, share, size)], max(tokens, 1)


def length_batches(
    items: Iterable[Item], length: Callable[[Item], int], tokens: int = 16384
) -> list[list[Item]]:
    """Items of similar length together, at most `tokens` of padded input in a batch."""
    batches: list[list[Item]] = []
    for item in sorted(items, key=length):
        if not batches or (len(batches[-1]) + 1) * length(item) > tokens:
            batches.append([])
        batches[-1].append(item)
    return batches


# ------------------------------------------------------------------------------ text generation


def uniforms(seeds: Sequence[int], positions: int) -> Tensor:
    """Numbers in [0, 1), (rows, positions); a row depends on its seed alone (splitmix64).

    Made on the CPU for a whole batch at once, in float64, which not every device has.
    """
    # The generator's constants as signed numbers: int64 wraps around as required.
    z = torch.arange(1, positions + 1) * -7046029254386353131 + torch.tensor(seeds)[:, None]
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return ((z >> 11) & ((1 << 53) - 1)).double() / 2**53


def row_seed(*parts: Any) -> int:
    """A 63-bit hash of the parts: a sampling seed, a cache key or part of a file name."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row of logits (n, V), by inverting the cumulative distribution at `draws` (n,).

    Temperature 0 takes the most likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = softmax_with_temperature(logits, temperature)
    order = None
    if top_p < 1:
        # The likeliest tokens mostly suffice, and finding them takes a tenth of sorting them all.
        full, likeliest = probabilities, min(1024, probabilities.shape[-1])
        probabilities, order = full.topk(likeliest)
        if likeliest < full.shape[-1] and (probabilities.sum(-1) < top_p).any():
            probabilities, order = full.sort(-1, descending=True)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # never the most likely one
        probabilities = probabilities.masked_fill(outside, 0)
    mass = probabilities.to(draws.dtype).cumsum(-1)
    tokens = torch.searchsorted(mass, (draws * mass[:, -1])[:, None], right=True)
    tokens = tokens.clamp_max(mass.shape[-1] - 1)
    return (tokens if order is None else order.gather(1, tokens))[:, 0]


def generate(
    model: LanguageModel, prompts: Sequence[list[int]], seeds: Sequence[int], args: Flags,
    temperature: float, top_p: float = 1.0,
) -> Iterator[tuple[int, Completion]]:  # fmt: skip
    """Answers to `prompts` (ids) as (index, completion), in batches of prompts of similar length.

    Only the end tokens are taken from the model's generation_config. A row's text depends on the
    rest of its batch through rounding only.
    """
    batch_size, longest = args.generation_batch_size, args.max_new_tokens
    choose = functools.partial(sample, temperature=temperature, top_p=top_p)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        draws = uniforms([seeds[i] for i in batch], longest)
        with model.evaluating():
            responses = _generate_batch(model, [prompts[i] for i in batch], draws, choose)
        for i, response in zip(batch, responses, strict=True):
            finished = response[-1] in model.end_ids
            ids = response[:-1] if finished else response
            text = model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            yield i, Completion(text, finished, len(response), response)


BLOCK = 256  # tokens by which a cache of fixed size grows


class MaskedCache(DynamicCache):
    """A cache for which transformers does not ask the GPU, at every token, for padding."""

    is_compileable = True  # as it then may not ask


class CachedReader:
    """Reads texts as they are written, and gives the hidden states that predict their next tokens.

    With a `StaticCache`, which hides what is not written yet, each token is one CUDA graph: one
    launch in place of hundreds, for which a GPU would wait. The graph is captured again when a
    shape changes, after one token that warms up. Short answers end before the first capture.
    """

    def __init__(self, model: LanguageModel, mask: Tensor, width: int) -> None:
        """`mask` (rows, longest text) hides what stands left of the prompts, of `width` tokens."""
        self.model, self.mask, self.width = model, mask, width
        self.positions = (mask.cumsum(-1) - 1).clamp(0, (model.max_positions or sys.maxsize) - 1)
        self.size = min(width + BLOCK, mask.shape[1])
        self.fixed = model.cache is StaticCache
        options = {"max_cache_len": self.size} if self.fixed else {}
        self.cache = model.cache(config=model.config.get_text_config(), **options)
        self.graph, self.warm = None, False

    def __call__(self, ids: Tensor, seen: int) -> Tensor:
        """(rows, d) from the last ids of the texts, whose tokens are `seen` with these."""
        at = self.positions[:, seen - ids.shape[1] : seen]
        if not self.fixed or seen == self.width:
            return self._read(ids, at, seen)
        if seen > self.size:
            self.size = min(self.size + BLOCK, self.mask.shape[1])
            for layer in self.cache.layers:
                more = 0, 0, 0, self.size - layer.max_cache_len
                layer.keys, layer.values = F.pad(layer.keys, more), F.pad(layer.values, more)
                layer.max_cache_len = self.size
            self.graph, self.warm = None, False
        if self.warm:
            return self._captured(ids, at)
        self.warm = seen >= self.width + 8
        torch.cuda.set_sync_debug_mode("error")  # PyTorch does not recover from a failed capture
        try:
            return self._read(ids, at, self.size)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def _read(self, ids: Tensor, at: Tensor, seen: int) -> Tensor:
        # Layers that keep a state instead of keys have taken the padding into account.
        blind = seen > self.width and all(self.cache.is_linear)
        return self.model.backbone(
            input_ids=ids, attention_mask=None if blind else self.mask[:, :seen], position_ids=at,
            cache=self.cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip

    def _captured(self, ids: Tensor, at: Tensor) -> Tensor:
        if self.graph is None:
            self.inputs, self.graph = (ids.clone(), at.clone()), torch.cuda.CUDAGraph()
            # Other threads, such as NCCL's, may use the GPU meanwhile.
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.output = self._read(*self.inputs, self.size)
        for mine, given in zip(self.inputs, (ids, at), strict=True):
            mine.copy_(given)
        self.graph.replay()
        return self.output

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows."""
        self.cache.reorder_cache(rows)  # `batch_select_indices` knows no recurrent layers
        self.mask, self.positions = self.mask[rows], self.positions[rows]
        self.graph, self.warm = None, False


def _generate_batch(
    model: LanguageModel, prompts: list[list[int]], draws: Tensor,
    choose: Callable[[Tensor, Tensor], Tensor],
) -> list[list[int]]:  # fmt: skip
    """Response ids for each prompt; `draws` are `uniforms` of (B, longest response).

    `choose(logits, draws)` picks the next tokens. Prompts are padded on the left. Finished rows
    leave the batch; checking for them synchronises with a GPU, so there it is done only every
    eighth token. Where shapes are captured they leave when half of them have finished.
    """
    device, longest = model.device, model.max_positions or sys.maxsize
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts])  # (B, L)
    mask = (torch.arange(width + draws.shape[1]) >= width - lengths[:, None]).long()
    limits = (longest - lengths).clamp_max(draws.shape[1])
    if device.type == "mps":
        draws = draws.float().clamp_max(1 - 2**-24)  # it rounds to 1, where no token is
    inputs = ids, mask, limits, draws, torch.tensor(model.end_ids)
    ids, mask, limits, draws, ends = (to_device(tensor, device) for tensor in inputs)
    responses = torch.full(draws.shape, -1, device=device)  # (B, longest response), -1 not written
    rows = torch.arange(len(prompts), device=device)  # those that are still generated
    done, finite = torch.zeros_like(rows, dtype=torch.bool), torch.ones((), device=device).bool()
    head = model.head().cast(model.compute_dtype)
    reader = CachedReader(model, mask, width) if model.cache else None
    for step in range(draws.shape[1]):
        if reader:
            hidden = reader(ids, width + step)
        else:
            written = [[i for i in r if i >= 0] for r in responses.tolist()]
            texts = [with_response(prompts[i] + written[i], [0]) for i in rows.tolist()]
            hidden = model.hidden_states(collate(texts, device))  # reads all of each text again
        finite = finite & hidden.isfinite().all()
        tokens = choose(head.logits(hidden), draws[rows, step])
        responses[rows, step] = torch.where(done, -1, tokens)
        done = done | torch.isin(tokens, ends) | (step + 1 >= limits[rows])
        if device.type == "cpu" or step % 8 == 7:
            left = (~done).nonzero()[:, 0]
            if not len(left):
                break
            if len(left) <= (len(rows) // 2 if model.cache is StaticCache else len(rows) - 1):
                rows, done, tokens = rows[left], done[left], tokens[left]
                if reader:
                    reader.keep(left)
        ids = tokens[:, None]
    written = torch.where(finite, responses, -2).tolist()  # waits for the GPU once
    if written[0][0] == -2:
        raise UsageError(f"{model.name} overflows in {hidden.dtype} (or its weights are damaged)")
    return [[i for i in response if i >= 0] for response in written]


# ---------------------------------------------------------- the teacher's text and hidden states


def cached_completions(
    prompts: Sequence[Prompt], asked: Sequence[Any], identity: Any, args: Flags,
    write: Callable[[dict[str, int], Callable[[str, Completion], None]], None], *,
    temperature: float, top_p: float = 1.0, purpose: str,
) -> list[Completion]:  # fmt: skip
    """One completion for each prompt, from a file under --cache-dir; `write` makes missing ones.

    The file is named after a hash of the teacher's `identity` and the sampling settings; a line's
    key is a hash of what was `asked`, so data sets that overlap share lines. `write(missing,
    record)` gets the place of each missing key in `prompts` and calls `record(key, completion)`,
    which appends a line at once, so that an interrupted run loses none.
    """
    seed, top_p = (args.seed, top_p) if temperature else (0, 1.0)  # greedy text needs neither
    settings = repr((identity, temperature, top_p, args.max_new_tokens, seed))
    path = Path(args.cache_dir) / "text" / f"{row_seed(settings):016x}.jsonl"
    counts: Counter[str] = Counter()
    keys = []
    for value in asked:  # a prompt that occurs twice gets two samples
        keys.append(f"{row_seed(value, counts[repr(value)]):016x}")
        counts[repr(value)] += temperature > 0

    keeps_gaps = args.resume and Path(args.output_dir).exists()

    def missing_of(known: dict[str, Completion]) -> dict[str, int]:
        done = {key for key, c in known.items() if keeps_gaps or c.finished is not None}
        return {key: i for i, key in enumerate(keys) if key not in done}

    known = _read_completions(path)
    if not any(gather_object([bool(missing_of(known))])):  # then no lock is needed
        return [known[key] for key in keys]
    with exclusive(path.with_suffix(".lock")):
        missing = missing_of(_read_completions(path, repair=True))
        mine = dict(my_share(list(missing.items()), args.teacher_device_map != "none"))
        PartialState().wait_for_everyone()  # all must divide the same missing keys
        began, tokens = time.perf_counter(), 0
        # One unbuffered write for each line, so that processes that append do not mix their lines.
        with (progress(f"teacher writes ({purpose})", len(mine)) as bar,
              open(path, "ab", buffering=0) as file):  # fmt: skip

            def record(key: str, completion: Completion) -> None:
                nonlocal tokens
                messages = prompts[missing[key]].conversation.messages
                line = {"key": key, "messages": messages, **completion._asdict()}
                data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
                if file.write(data) < len(data):  # then the next run removes what was written
                    raise OSError(f"no room for a line of {path}")
                tokens += completion.length
                speed = f"{tokens / (time.perf_counter() - began):.0f}"
                bar.set_postfix(tokens_per_second=speed, refresh=False)
                bar.update()

            if mine:
                write(mine, record)
        PartialState().wait_for_everyone()
        known = _read_completions(path)
    return [known[key] for key in keys]


def _read_completions(path: Path, repair: bool = False) -> dict[str, Completion]:
    """The whole lines of a cache file; `repair`, under its lock, removes the unfinished last line
    of a killed run."""
    raw = path.read_bytes() if path.exists() else b""
    whole = raw.rfind(b"\n") + 1
    if repair and whole < len(raw):
        os.truncate(path, whole)
    known = {}
    for number, line in enumerate(raw[:whole].splitlines(), 1):
        with usage_error(f"{path}:{number} is corrupt, delete the file", Exception):
            entry = json.loads(line)
            known[entry["key"]] = Completion(*(entry[name] for name in Completion._fields))
    return known


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """A lock between runs: a run's main process takes it, and its other processes wait for that."""
    state, held = PartialState(), FileLock(lock)
    lock.parent.mkdir(parents=True, exist_ok=True)
    if state.is_main_process:
        try:
            held.acquire(timeout=1)
        except Timeout:
            print(f"waiting for another run, which has locked {lock}")
            held.acquire()
    try:
        state.wait_for_everyone()
        if not lock.exists():
            raise UsageError(f"all processes must see one --cache-dir; one lacks {lock}")
        yield
        state.wait_for_everyone()
    finally:
        held.release()  # nothing in the other processes


def save_tensors(path: Path, **tensors: Tensor | None) -> None:
    """Write a safetensors file and rename it, so that `path` is never partial."""
    part = path.with_name(path.name + ".part")
    given = {name: t for name, t in tensors.items() if t is not None}
    with usage_error(f"cannot write {path}", SafetensorError):  # a full disk
        save_file({name: t.detach().cpu().contiguous() for name, t in given.items()}, part)
    make_readable(part)
    os.replace(part, path)


def make_readable(*paths: Path) -> None:
    """Set the permissions of other files: safetensors writes its own for their owner alone."""
    for path in paths:
        with contextlib.suppress(OSError):  # a disk may know no owners
            path.chmod(0o666 & ~UMASK)


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    with usage_error(f"{path} is corrupt, delete the file", SafetensorError):
        return {name: t.to(device) for name, t in load_file(path).items()}  # which refuses "cpu:0"


def progress(
    title: str, total: int | None = None, done: int = 0, items: Sequence[Item] | None = None
) -> tqdm:
    """A bar on the main process's terminal, around `items` or until `total`; none where output is
    not a terminal."""
    disable = None if PartialState().is_main_process else True  # None: tqdm asks the terminal
    return tqdm(items, title, total, disable=disable, initial=done, dynamic_ncols=True)


@functools.lru_cache(maxsize=4096)  # a process may map some 65 000 files
def _open(path: Path) -> Any:
    return safe_open(path, "pt")


class TeacherHiddenStates:
    """The teacher's final hidden states, or what a server says of its distribution, at the targets
    of fixed text: cached or live.

    With --cache-teacher they are computed once, before training, into one safetensors file for each
    batch. A tensor's name follows from its example's exact ids and targets, so data sets that
    overlap share it. Every run reads the cached values, even the one that wrote them, so that runs
    on the same text get the same bits whatever their divergence; later runs load no backbone.
    """

    def __init__(self, teacher: Any, examples: Sequence[Example], purpose: str) -> None:
        """Fill the cache with what it lacks; `purpose` is shown to the user.

        Raises `UsageError` if the disk has no room, before anything is written.
        """
        self.teacher, self.directory = teacher, teacher.states_dir
        if self.directory is None or not examples:
            return
        head = teacher.head()
        self.width = head.weight.shape[1] if head else 3 * teacher.top + 4
        with exclusive(self.directory / "lock"):
            self._fill({self._key(e): e for e in examples}, purpose)
        self.files = self._list()  # after all processes have written
        if head:
            loaded = "is loaded" if teacher.loaded else "is not loaded"
            PartialState().print(f"{purpose}: teacher states from the cache; its backbone {loaded}")

    def __call__(self, examples: list[Example], live: bool = False, k: int | None = None) -> Tensor:
        """Hidden states (N, d) on the teacher's device, at the N targets of the examples; `k` is
        the K of a server's live log-probabilities, if not --api-top-logprobs."""
        if live or self.directory is None:
            return teacher_hidden_states(self.teacher, examples, k if live else None)
        keys = map(self._key, examples)
        parts = [_open(self.files[key]).get_tensor(key) for key in keys]
        empty = torch.empty(0, self.width, dtype=self.teacher.compute_dtype)
        return to_device(torch.cat([empty, *parts]), self.teacher.device)

    @staticmethod
    def _key(example: Example) -> str:
        return f"{row_seed(*example.teacher):016x}"

    def _list(self) -> dict[str, Path]:
        """The file that holds each key."""
        files = {}
        for path in sorted(self.directory.glob("states-*.safetensors")):
            damaged = usage_error(f"{path} is corrupt, delete the file", SafetensorError)
            with damaged, safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
        return files

    def _fill(self, examples: dict[str, Example], purpose: str) -> None:
        """Compute each batch with a missing tensor, and write the missing tensors.

        Batches depend on the text alone and are computed whole, so an interrupted run gives the
        same bits. A server is asked only for what is missing, and each of its replies is written
        before its worker asks for the next.
        """
        teacher, head_file = self.teacher, self.directory / "head.safetensors"
        head, missing = teacher.head(), examples.keys() - self._list().keys()
        PartialState().wait_for_everyone()  # nobody writes before all have looked
        per_token = self.width * teacher.compute_dtype.itemsize
        size = sum(len(examples[key].teacher.targets) for key in missing) * per_token
        size += head.weight.nbytes if head and not head_file.exists() else 0
        if size > (free := shutil.disk_usage(self.directory).free):
            raise UsageError(
                f"the teacher's states need {size / 1e6:.1f} MB and {self.directory} has "
                f"{free / 1e6:.1f} MB left: name another --cache-dir, or add --no-cache-teacher"
            )
        if size:
            place = f"{self.directory}, {per_token} bytes a token"
            PartialState().print(f"{purpose}: {size / 1e6:.1f} MB of teacher states to {place}")
        if head and PartialState().is_main_process and not head_file.exists():
            save_tensors(head_file, weight=head.weight, bias=head.bias)
        by_length = length_batches(examples.items(), lambda item: len(item[1].teacher.ids))
        lacking = [batch for batch in by_length if any(key in missing for key, _ in batch)]
        mine = my_share(lacking, teacher.spread)
        items = [item for batch in mine for item in batch if item[0] in missing]
        with progress(f"teacher states ({purpose})", len(items)) as bar:

            def record(batch: list[tuple[str, Example]], parts: Sequence[Tensor]) -> None:
                named = {k: part for (k, _), part in zip(batch, parts, strict=True) if k in missing}
                name = f"states-{row_seed(*named):016x}.safetensors"
                save_tensors(self.directory / name, **named)
                bar.update(len(named))

            for batch in mine if head else ():
                hidden = teacher_hidden_states(teacher, [e for _, e in batch])
                if not hidden.isfinite().all():
                    raise UsageError(
                        f"{teacher.name} overflows in {hidden.dtype}: set another --teacher-dtype"
                    )
                counts = [len(e.teacher.targets) for _, e in batch]
                record(batch, hidden.to("cpu", teacher.compute_dtype).split(counts))
            if not head:
                texts = [e.teacher for _, e in items]
                teacher.read(texts, teacher.top, lambda i, got: record([items[j] for j in i], got))


@torch.no_grad()
def teacher_hidden_states(
    teacher: LanguageModel | ServerTeacher, examples: Sequence[Example], top: int | None = None
) -> Tensor:
    """The teacher's final hidden states (N, d) at the N targets of the examples.

    If you change what it returns, name another --cache-dir: the cache does not know.
    """
    if isinstance(teacher, ServerTeacher):
        texts = [e.teacher for e in examples]
        ask = partial(teacher.live, texts, teacher.top if top is None else top)
        return in_step(ask) if Run.current else ask()  # before training, processes ask unequally
    return teacher.hidden_states(collate([e.teacher for e in examples], teacher.device))


# ------------------------------------------------------------------------- a teacher on a server

ATTEMPTS = 10  # for one answer
FIRST_PAUSE, LAST_PAUSE, LONGEST_PAUSE = 0.5, 8.0, 600.0  # seconds; the longest for Retry-After
HELLO = [{"role": "user", "content": "Hello"}]
TROUBLE = [  # texts that tokenizers split differently
    "  two  spaces,\n\n\ttabs \r\n and a long     gap", "don't DON'T 3.14159 1234567890 AbC_dEf",
    "naïve e\u0301 日本語 🙂 ﷽ \u200b\ufeff \u202e𝔘 ﬁ", "<s> [INST] </s> <|endoftext|> <unk> # ",
]  # fmt: skip


class ServerLost(UsageError):
    """A server that a step needs cannot be used, raised in every process: see `in_step`."""


class NoAnswer(Exception):
    """Why a server gave no answer, with the status of its refusal; None: it may answer later."""

    def __init__(self, reason: str, status: int | None) -> None:
        super().__init__(reason)
        self.status = status


class Server:
    """A model behind an OpenAI-compatible server. A subclass says how it is asked for text, by
    `request` and `completion`, and what the server must be able to do, by `greet`.

    Answers are cached like those of a local teacher, found by `identity`, settings, what is `asked`
    and the number of the sample. Each is recorded before its worker asks for the next, so that a
    killed run loses at most --api-concurrency of them. The key is in no file and no message.
    """

    def __init__(self, args: Flags, reader: LanguageModel) -> None:
        import openai  # takes a second to import, and a local teacher needs none

        self.openai, self.args, self.reader = openai, args, reader
        self.key = os.environ.get(KEY, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UsageError(f"{KEY} holds characters that no header can carry")
        self.base_url = args.api_base_url.rstrip("/")
        self.identity, self.greeted = ["api", self.base_url, args.api_model], False
        self.lost = False  # whether a connection broke: the server may have been started anew

    def complete(self, prompts: Sequence[Prompt], args: Flags, **sampling: Any) -> list[Completion]:
        """Answers to the prompts, from the cache if they are there; `finished` is None where there
        is none. Raises `UsageError` for a refused key or setting, a server that stays down, and too
        many prompts without an answer; answers until then are kept."""

        def write(missing: dict[str, int], record: Callable[[str, Completion], None]) -> None:
            counts: Counter[bool] = Counter()

            async def work(client: Any, item: tuple[str, int]) -> None:
                key, prompt = item[0], prompts[item[1]]
                request = self.request(key, prompt, **sampling)
                try:
                    answer = await self.ask(client, request, partial(self.completion, prompt))
                except NoAnswer as problem:
                    answer = Completion(str(problem), None, 0, None)
                if answer.finished is None:
                    await self.greet(client)
                record(key, answer)
                counts[answer.finished is None] += 1
                if counts[True] > self.args.api_max_failures * max(50, counts.total()):
                    raise UsageError(
                        f"{counts[True]} of {counts.total()} prompts got no answer, too many for "
                        f"--api-max-failures; the last: {prompt.conversation.source}: {answer.text}"
                    )

            self.each(missing.items(), work)

        asked = [self.asked(prompt) for prompt in prompts]
        answers = cached_completions(prompts, asked, self.identity, args, write, **sampling)
        both = zip(prompts, answers, strict=True)
        failed = [f"\n  {p.conversation.source}: {a.text}" for p, a in both if a.finished is None]
        if failed:
            PartialState().print(
                f"{sampling['purpose']}: {len(failed)} of {len(prompts)} prompts got no answer and "
                f"are left out; a new run asks them again:{''.join(failed)}"
            )
        return answers

    def each(self, items: Iterable[Item], work: Callable[[Any, Item], Any]) -> None:
        """`await work(client, item)` for all items, --api-concurrency at a time."""
        waiting = iter(items)

        async def worker(client: Any) -> None:
            for item in waiting:
                await work(client, item)

        async def run() -> None:
            workers = max(1, self.args.api_concurrency // PartialState().num_processes)
            where = f"{self.base_url} (its proxy or certificates, set in the environment)"
            with usage_error(where, ImportError, ValueError, OSError):
                client = self.openai.AsyncOpenAI(
                    base_url=self.base_url, api_key=self.key or "none", max_retries=0, timeout=None
                )
            async with client:
                if not self.greeted:
                    await self.greet(client)
                await asyncio.gather(*(worker(client) for _ in range(workers)))

        asyncio.run(run())

    async def ask(self, client: Any, request: dict[str, Any], read: Callable[[Any], Any]) -> Any:
        """Send a request and return `read(reply)`; ask again if `read` raises `ValueError`, and
        finally raise `NoAnswer`."""
        reason, pause = "", 0.0
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(pause)
            pause = min(FIRST_PAUSE * 2**attempt, LAST_PAUSE)
            try:
                async with asyncio.timeout(self.args.api_timeout):
                    raw = await self.send(client, request)
                try:
                    reply = json.loads(raw)
                except ValueError:
                    raise ValueError(f"no JSON: {raw.decode(errors='replace')}") from None
                try:
                    return read(reply)
                except (AttributeError, TypeError, LookupError, OverflowError):
                    raise ValueError(json.dumps(reply)) from None
            except self.openai.APIStatusError as problem:
                status = problem.status_code
                reason = f"({status}) {self.scrubbed(problem)}"
                passes = status >= 500 or status in {408, 409, 429}
                self.lost |= status in {502, 503}  # of a proxy before a server that restarts
                if not passes or problem.code == "insufficient_quota":
                    raise NoAnswer(reason, status) from None
                if status == 429:  # many quotas are those of a minute
                    pause = min(FIRST_PAUSE * 2**attempt, 8 * LAST_PAUSE)
                after = problem.response.headers.get("retry-after", "")  # seconds, or a date
                with contextlib.suppress(ValueError):
                    pause = max(pause, float(after))
                if pause > LONGEST_PAUSE:
                    break
            except TimeoutError:
                reason = f"no answer within --api-timeout {self.args.api_timeout:g} seconds"
            except (self.openai.APIConnectionError, ValueError, RecursionError) as problem:
                self.lost |= isinstance(problem, self.openai.APIConnectionError)
                reason = f"no completion: {self.scrubbed(problem)}"
        raise NoAnswer(reason, None)

    async def send(self, client: Any, request: dict[str, Any]) -> bytes:
        """The reply to a request for text or to a path, or the models if it is empty."""
        if "path" in request:  # the reply may be any text
            url = self.base_url.removesuffix("/v1") + request["path"]
            return json.dumps(await client.post(url, body=request["body"], cast_to=str)).encode()
        text = client.chat.completions if "messages" in request else client.completions
        raw = (text if request else client.models).with_raw_response
        return (await (raw.create(**request) if request else raw.list())).http_response.content

    def refused(self, problem: NoAnswer, cause: str = "") -> UsageError:
        """The error that ends the run."""
        later = f"gave no answer in {ATTEMPTS} attempts, run the same command again later"
        key = f"refuses the key in {KEY}" if self.key else f"wants a key: set {KEY}"
        causes = {401: key, 403: key, None: later}
        causes[404] = f"has no {self.args.api_model}, or no such path (most addresses end in /v1)"
        cause = cause or causes.get(problem.status, "refuses the request")
        return UsageError(f"{self.base_url} {cause}: {problem}")

    def scrubbed(self, problem: Any) -> str:
        """What went wrong, on one line and without the key, which a server may repeat."""
        words = str(problem)
        status, body = (getattr(problem, name, None) for name in ("status_code", "body"))
        if body and words.endswith(str(status)):  # the reason is not in OpenAI's form
            with contextlib.suppress(TypeError, LookupError, AttributeError):  # as FastAPI says it
                for part in body["detail"]:
                    part.pop("input", None)  # the request
            body = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False)
            words = f"{words}: {body}"
        elif isinstance(body, dict):  # OpenRouter's reason, and the parameter that is meant
            more = {k: body[k] for k in ("param", "metadata") if body.get(k)}
            words += f" {json.dumps(more, ensure_ascii=False)}" * bool(more)
        if isinstance(problem, self.openai.APIConnectionError):
            while problem := problem.__cause__ or problem.__context__:
                words = str(problem) or words  # the innermost cause tells most
        words = words.replace(self.key or "\0", "[key]").encode("utf-8", "replace").decode()
        return printable((words.strip().splitlines() or ["nothing"])[0])[:300]


class ServerTeacher(Server):
    """A model on a vLLM server that has the reader's tokens: text and log-probabilities.

    The reader is the student, or a model of other tokens without its weights. The server is given
    ids of its template and tokenizer, never text, and each reply must say that it has read these.
    `greet` proves what training relies on. `TeacherHiddenStates` keeps its log-probabilities, as
    `TopLogprobs.packed`.
    """

    compute_dtype = torch.int16  # of what is kept
    spread = False  # over devices

    def __init__(self, args: Flags, reader: LanguageModel) -> None:
        super().__init__(args, reader)
        self.top, self.device = args.api_top_logprobs, reader.device
        self.identity += ["ids", row_seed(sorted(reader.tokenizer.get_vocab().items()))]
        name = f"{row_seed(self.identity, self.top):016x}"
        self.states_dir = Path(args.cache_dir) / "logprobs" / name if args.cache_teacher else None
        self.identity.append(reader.end_ids)  # of its text

    def head(self) -> None:
        """There is none: see `teacher_logits`."""

    def asked(self, prompt: Prompt) -> list[int]:
        return prompt.teacher

    def request(
        self, key: str, prompt: Prompt, temperature: float, top_p: float = 1.0, **_: Any
    ) -> dict[str, Any]:
        """What is not set here, the model's generation_config.json would set."""
        return {
            "model": self.args.api_model, "prompt": prompt.teacher, "temperature": temperature,
            "top_p": top_p, "max_tokens": self.args.max_new_tokens,
            "seed": row_seed(self.args.seed, key),
            "extra_body": {"min_p": 0.0, "top_k": 0, "repetition_penalty": 1.0,
                           "return_token_ids": True, "stop_token_ids": self.reader.end_ids},
        }  # fmt: skip

    def completion(self, prompt: Prompt, reply: Any) -> Completion:
        """What the server wrote; `ValueError` for what is no completion of the prompt."""
        (choice,), tokenizer = _choices(reply, [prompt.teacher]), self.reader.tokenizer
        ids, reason = choice["token_ids"], choice["finish_reason"]
        if not ids or not all(0 <= i < self.reader.vocabulary for i in ids):
            raise ValueError(f"token_ids {ids}")
        finished = ids[-1] in self.reader.end_ids
        if reason == "abort":  # the server stops, and may come back with its first weights
            self.lost = True
            raise ValueError("finish_reason abort")
        if reason not in ({"stop", "length"} if finished else {"length"}):
            last = tokenizer.convert_ids_to_tokens(ids[-1])
            return Completion(f"finish_reason {reason} after {last}", None, 0, None)
        text = tokenizer.decode(ids[: len(ids) - finished], clean_up_tokenization_spaces=False)
        return Completion(text, finished, len(ids), ids)

    def read(self, texts: list[Tokens], k: int, record: Callable[..., None]) -> None:
        """Ask for the log-probabilities at the targets of texts, several texts in a request.

        `record(places, parts)` gets the places of a request's texts, and for each its `packed`.
        """
        size = 2**16 // (k + 1)  # JSON takes some 80 bytes for each
        least = math.ceil(size / 1024)  # vLLM reads at most 1024 texts in a request
        batches = length_batches(range(len(texts)), lambda i: max(len(texts[i].ids), least), size)

        async def work(client: Any, places: list[int]) -> None:
            try:
                record(places, await self._packed(client, [texts[i] for i in places], k))
            except NoAnswer as problem:
                raise self.refused(problem) from None

        if batches:
            self.each(batches, work)

    def live(self, texts: list[Tokens], k: int) -> Tensor:
        """The server's log-probabilities at the texts' targets: `packed` (N, 3k + 4)."""
        parts = {-1: TopLogprobs.packed([], k)}
        self.read(texts, k, lambda places, got: parts.update(zip(places, got, strict=True)))
        return to_device(torch.cat([parts[i] for i in sorted(parts)]), self.device)

    async def _packed(
        self, client: Any, texts: list[Tokens], k: int, temperature: float = 1.0
    ) -> list[Tensor]:
        prompts = [text.ids for text in texts]

        def read(reply: Any) -> list[Tensor]:
            parts = []
            for text, choice in zip(texts, _choices(reply, prompts), strict=True):
                given = choice["prompt_logprobs"]
                if len(given) != len(text.ids) or given[0] is not None:
                    raise ValueError(f"{len(given)} positions for {len(text.ids)} tokens")
                rows = [self._outcomes(given[i], text.ids[i], k) for i in text.targets]
                parts.append(TopLogprobs.packed(rows, k))
            return parts

        return await self.ask(client, self._scoring(prompts, k, temperature), read)

    def _scoring(self, prompts: list[Any], k: int, temperature: float = 1.0) -> dict[str, Any]:
        extra = {"prompt_logprobs": k, "return_token_ids": True, "add_special_tokens": False}
        asked = {"prompt": prompts, "max_tokens": 1, "temperature": temperature}
        return {"model": self.args.api_model, "extra_body": extra, **asked}

    def _outcomes(self, given: Any, target: int, k: int) -> tuple[list[int], list[float]]:
        """Ids and log-probabilities for `TopLogprobs`; `ValueError` if they are impossible."""
        logprobs = {int(i): float(entry["logprob"]) for i, entry in given.items()}
        size, likeliest = self.reader.vocabulary, sorted(logprobs.values(), reverse=True)
        if target not in logprobs or not min(k, size) <= len(logprobs) <= k + 1:
            raise ValueError(f"{len(logprobs)} log-probabilities, not {k} and that of {target}")
        total = math.fsum(map(math.exp, likeliest))
        if not all(-1000 < x < 1e-3 for x in likeliest) or not total < 1.001:
            raise ValueError(f"{likeliest[:3]}, ... with sum {total} are no log-probabilities")
        named = {i: logprobs[i] for i in {target: 0} | logprobs if 0 <= i < size}
        # 1 - the sum is rounding if it is small; none of the rest is likelier than the Kth.
        bound = (size - len(named)) * math.exp(likeliest[:k][-1]) if k else 1.0
        rest, absent = min(max(1 - total, 1e-6), bound), k + 1 - len(named)
        values = [*named.values(), *[ABSENT] * absent, math.log(rest) if rest else ABSENT]
        return [*named, *[target] * absent], values

    async def greet(self, client: Any) -> None:
        """Raise `UsageError` unless the server has the model, room for prompt and answer, the
        reader's tokens, and K log-probabilities at T = 1 that do not depend on the batch."""
        needs = "is no server for this method, which needs vLLM's /v1/completions with token ids, "
        needs += f"return_token_ids and prompt_logprobs (vllm serve --max-logprobs {self.top})"
        try:
            await self._check_model(client)
            probes = [with_response(i[:1], i[1:]) for i in await self._check_tokens(client, needs)]
            alone, cold, together = [
                TopLogprobs.unpack((await self._packed(client, texts, self.top, t))[0])
                for texts, t in ((probes[:1], 1.0), (probes[:1], 0.1), (probes, 1.0))
            ]
        except NoAnswer as problem:
            raise self.refused(problem, needs * (problem.status in {400, 404, 405, 422})) from None
        except (TypeError, ValueError, LookupError, AttributeError) as problem:
            raise UsageError(f"{self.base_url} {needs}: {self.scrubbed(problem)}") from None
        for changed, cause in (
            (cold, "the sampling temperature: vllm serve --logprobs-mode raw_logprobs"),
            (together, "what else is in the batch"),
        ):
            nats = (changed.logprobs - alone.logprobs)[:, 0].abs().mean()
            if nats > 0.25:  # bfloat16 logits from 16 to 32 are 0.125 apart
                words = f"the log-probabilities of {self.base_url} depend by {nats:.2f} on {cause}"
                raise UsageError(words)
        self.greeted = True

    async def _check_model(self, client: Any) -> None:
        def read(reply: Any) -> dict[str, int | None]:
            return {model["id"]: model.get("max_model_len") for model in reply["data"]}

        models = await self.ask(client, {}, read)
        name = self.args.api_model = self.args.api_model or next(iter(models), None)
        if name not in models:
            raise UsageError(f"{self.base_url} has no {name}, only {', '.join(models)}")
        size = self.args.max_length + self.args.max_new_tokens
        if (models[name] or size) < size:
            raise UsageError(
                f"{name} on {self.base_url} reads {models[name]} tokens, not --max-length and "
                f"--max-new-tokens: vllm serve --max-model-len {size}"
            )

    async def _check_tokens(self, client: Any, needs: str) -> list[list[int]]:
        """Ids of troublesome texts, and of tokens from all of the vocabulary, if they are equal."""
        tokenizer, size = self.reader.tokenizer, self.reader.vocabulary
        places = [[*range(i, size, max(1, size // 32))] for i in range(8)]
        texts = [render(tokenizer, HELLO, prompt=True, **json.loads(self.args.template_kwargs))]
        texts += TROUBLE + [tokenizer.decode(ids, skip_special_tokens=True) for ids in places]
        read = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        read = {text: ids for text, ids in zip(texts, read, strict=True) if len(ids) > 1}
        choices = await self.ask(client, self._scoring([*read], self.top), _choices)
        for (text, ours), choice in zip(read.items(), choices, strict=True):
            theirs, logprobs = choice.get("prompt_token_ids"), choice.get("prompt_logprobs")
            if theirs and theirs != ours:
                raise UsageError(
                    f"{self.args.api_model} on {self.base_url} reads {text!r} as {theirs[:9]}, "
                    f"{self.reader.name} as {ours[:9]}: two vocabularies are for "
                    "cross_tokenizer.py, whose --teacher has those of the server"
                )
            if not theirs or len((logprobs or [()])[-1]) < min(self.top, size):
                raise UsageError(f"{self.base_url} {needs}")
        return [*read.values()]


def in_step(work: Callable[[], Item]) -> Item:
    """Return `work()`. If it raises `UsageError` in one process, all raise `ServerLost`, so that
    all can write a checkpoint. All processes must call this together."""
    result, problem = None, None
    try:
        result = work()
    except UsageError as error:
        problem = str(error)
    if problems := [p for p in gather_object([problem]) if p]:
        raise ServerLost(problems[0])
    return result


class RolloutServer(ServerTeacher):
    """A vLLM server of the student, which writes its text.

    `publish` puts the student's weights, or its adapters alone, into a directory that the server
    sees, and has the server load them in place. The server must then give the log-probabilities
    that the student gives, on text that the student wrote.
    """

    LIMIT = 0.1  # nats between them, on average over tokens
    ADAPTER = "student"  # its name on the server

    def __init__(self, args: Any, student: LanguageModel) -> None:
        """`args` are those of on_policy.py."""
        own = {"api_base_url": args.rollout_url, "api_model": None, "api_top_logprobs": 0}
        many = args.generation_batch_size
        super().__init__(dataclasses.replace(args, api_concurrency=many, **own), student)
        self.student, self.texts = student, []
        self.directory = Path(args.rollout_weights).resolve()

    def publish(self, prompts: list[list[int]]) -> None:
        """In `evaluating()`: give the server the present weights, and compare its log-probabilities
        of the student's answers to these prompts. `ServerLost` if they differ."""

        def work() -> None:
            if not PartialState().is_main_process:
                return
            if not self.texts:
                few = min(32, self.args.max_new_tokens)
                args = dataclasses.replace(self.args, max_new_tokens=few)
                written = generate(self.student, prompts, range(len(prompts)), args, 1.0)
                self.texts = [with_response(prompts[i], answer.ids) for i, answer in written]
                self._update(wrong=True)  # the server may have started with the right ones
                if self._nats_apart() < self.LIMIT:
                    raise UsageError(f"{self.base_url} does not load what is in {self.directory}")
            self._update()
            if not (nats := self._nats_apart()) < self.LIMIT:
                raise UsageError(
                    f"{self.base_url} and the student give log-probabilities that are {nats:.2f} "
                    f"nats apart: is it this student, and does it see {self.directory}?"
                )

        in_step(work)
        if self.student.adapters is not None:  # the main process alone has loaded them
            self.args.api_model = self.ADAPTER

    def _update(self, wrong: bool = False) -> None:
        student, lora = self.student, self.student.adapters is not None
        weights = {n: t for n, t in student.model.state_dict().items() if not lora or ".lora_" in n}
        if wrong:
            shift = 0.1 if lora else 0.01  # half of an adapter begins at 0
            weights = {n: t / 2 + shift if t.is_floating_point() else t for n, t in weights.items()}
        elif not lora:  # vLLM reloads a tied head only if the file has it too
            first = {t.data_ptr(): n for n, t in reversed(weights.items())}
            weights = {n: t if first[t.data_ptr()] == n else t.clone() for n, t in weights.items()}
        kinds = OSError, RuntimeError, ValueError, SafetensorError
        with usage_error(f"cannot write in {self.directory}", *kinds):
            self.directory.mkdir(parents=True, exist_ok=True)
            (self.directory / PUBLISHED).touch()
            if lora:
                student.adapters.peft_config["default"].save_pretrained(self.directory)
                own = "base_model.model."
                named = {own + n.replace(".default", ""): t for n, t in weights.items()}
                save_tensors(self.directory / "adapter_model.safetensors", **named)
            else:
                student.model.save_pretrained(self.directory, state_dict=weights)
                make_readable(*self.directory.glob("*.safetensors"))
        self.load()

    def load(self) -> None:
        """Have the server load what is in the directory."""
        folder = str(self.directory)
        if self.student.adapters is not None:
            path = "/v1/load_lora_adapter"
            body = {"lora_name": self.ADAPTER, "lora_path": folder, "load_inplace": True}
        else:
            path = "/collective_rpc"
            body = {"method": "reload_weights", "kwargs": {"weights_path": folder}}

        async def work(client: Any, request: dict[str, Any]) -> None:
            def read(reply: str) -> None:
                if '"success":false' in reply.replace(" ", ""):
                    raise ValueError(reply)  # while requests are under way

            try:
                await self.ask(client, request, read)
            except NoAnswer as problem:
                switches = "VLLM_SERVER_DEV_MODE=1, and for LoRA VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
                cause = f"cannot load weights (start it with {switches})" * bool(problem.status)
                raise self.refused(problem, cause) from None

        for request in ({"path": path, "body": body}, {"path": "/reset_prefix_cache", "body": {}}):
            self.each([request], work)
        if self.student.adapters is not None:
            self.args.api_model = self.ADAPTER

    def _nats_apart(self) -> float:
        theirs = TopLogprobs.unpack(self.live(self.texts, 0)).logprobs[:, 0]
        batch = collate(self.texts, self.student.device)
        ours = compare(self.student.logits(batch), batch.targets)["logprob"]
        return (ours - theirs).abs().mean().item()

    def write(self, prompts: Sequence[tuple[Any, Prompt]], temperature: float) -> list[Completion]:
        """The student's answers to pairs (seed, prompt)."""

        async def work(client: Any, item: tuple[Any, Prompt]) -> None:
            prompt = item[1]._replace(teacher=item[1].student)  # the ids that the server is given
            request = self.request(item[0], prompt, temperature)
            try:
                answer = await self.ask(client, request, partial(self.completion, prompt))
            except NoAnswer as problem:
                if self.lost and problem.status == 404:
                    return  # it has been started anew, and has lost its adapter
                raise self.refused(problem) from None
            if answer.finished is None:
                raise UsageError(f"{self.base_url}: {answer.text}")
            answers[item[0]] = answer

        for _ in range(ATTEMPTS):
            self.lost, answers = False, {}
            self.each(prompts, work)
            if not self.lost:
                return [answers[key] for key, _ in prompts]
            self.load()  # a server that was started anew has its first weights
        raise UsageError(f"{self.base_url} was lost in each of {ATTEMPTS} attempts")


def _choices(reply: Any, prompts: list[list[int]] | None = None) -> list[dict[str, Any]]:
    """A reply's choices in order; `ValueError` if it has read other prompts than these."""
    choices = sorted(reply["choices"], key=lambda choice: choice["index"])
    if prompts is not None and [choice["prompt_token_ids"] for choice in choices] != prompts:
        raise ValueError("it has read other tokens than it was given")
    return choices


ABSENT = -1e4  # the logarithm of 0, finite also in half precision


@dataclass(frozen=True)
class TopLogprobs:
    """A server's probabilities at N targets: of K + 2 outcomes that sum to 1.

    Column 0 is the target itself. The next K are the other tokens that the server named; an unused
    place holds the target's id and `ABSENT`. The last outcome is every other token.
    """

    ids: Tensor  # (N, K + 1)
    logprobs: Tensor  # (N, K + 2)

    @staticmethod
    def packed(rows: Sequence[tuple[list[int], list[float]]], k: int) -> Tensor:
        """Ids in 32 bits and log-probabilities in 16 as one tensor (N, 3k + 4) of int16."""
        ids = torch.tensor([ids for ids, _ in rows], dtype=torch.int32).view(-1, k + 1)
        logprobs = torch.tensor([values for _, values in rows]).view(-1, k + 2)
        return torch.cat([ids.view(torch.int16), logprobs.half().view(torch.int16)], 1)

    @staticmethod
    def unpack(packed: Tensor) -> TopLogprobs:
        k = (packed.shape[1] - 4) // 3
        ids, logprobs = (part.contiguous() for part in packed.split([2 * k + 2, k + 2], 1))
        # Rounding has changed the sum, without which a divergence could be negative.
        logprobs = logprobs.view(torch.float16).float().log_softmax(-1)
        return TopLogprobs(ids.view(torch.int32).long(), logprobs)

    def __getitem__(self, rows: Any) -> TopLogprobs:
        return TopLogprobs(self.ids[rows], self.logprobs[rows])

    def cast(self) -> TopLogprobs:
        """Itself: there is no head to convert."""
        return self


def outcomes(student: Tensor, ids: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The student's and the teacher's log-probabilities of a server's outcomes (n, K + 2), and the
    student's within the last outcome (n, V), in place of `student` (n, V)."""
    named = student.gather(1, ids).masked_fill_(teacher[:, :-1] < ABSENT / 2, ABSENT)
    others = student.scatter_(1, ids, -math.inf)
    # Not log(1 - the sum of the named ones), which is rounding where the student is sure.
    rest = others.logsumexp(-1, keepdim=True).clamp_min_(ABSENT)
    return torch.cat([named, rest], 1), teacher.to(student.dtype, copy=True), others.sub_(rest)


def teacher_logits(hidden: Tensor, head: Head | None) -> Logits | TopLogprobs:
    """The teacher's `Logits`, or a server's `TopLogprobs`, which has no head."""
    return Logits(hidden, head) if head else TopLogprobs.unpack(hidden)


# --------------------------------------------------------------------------------------- losses


def log_softmax_with_temperature(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last axis, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def softmax_with_temperature(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the last axis, in float32 or wider."""
    return log_softmax_with_temperature(logits, temperature).exp()


class Objective(NamedTuple):
    """A target token's loss: T² · D_T(teacher, student) + ce_weight · cross-entropy at T = 1, with
    the divergences D that `divergence` lists."""

    kl: str = "forward"  # forward | reverse | jsd
    jsd_beta: float = 0.5
    skew: float = 0.0
    temperature: float = 1.0
    ce_weight: float = 0.0


def divergence(
    student_logprobs: Tensor, teacher_logprobs: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """A divergence between two distributions, and its gradient.

    forward  KL(teacher ‖ student), skewed: KL(teacher ‖ a·teacher + (1−a)·student)
    reverse  KL(student ‖ teacher), skewed: KL(student ‖ a·student + (1−a)·teacher)
    jsd      β·KL(teacher ‖ M) + (1−β)·KL(student ‖ M), M = β·teacher + (1−β)·student

    with a = `skew` (DistiLLM, Ko et al. 2024) and β = `jsd_beta` (GKD, Agarwal et al. 2024, eq. 1).

    Args:
        student_logprobs, teacher_logprobs: (n, V), both at the temperature in use. They may be
            overwritten, because at V = 150 000 every further array counts.

    Returns:
        The divergence (n,) in nats, and its gradient (n, V) with respect to the *logits* whose
        log-softmax the student's log-probabilities are. With f = ∂D/∂student that gradient is
        student · (f − Σ student · f); constants in f drop out.
    """
    kl, a, beta = objective.kl, objective.skew, objective.jsd_beta
    teacher = teacher_logprobs.exp()
    if kl == "forward" and a == 0:
        value = teacher_logprobs.sub_(student_logprobs).mul_(teacher).sum(-1)
        return value, student_logprobs.exp_().sub_(teacher)
    student = student_logprobs.exp()
    if kl == "reverse" and a == 0:
        slope = student_logprobs - teacher_logprobs
        value = (student * slope).sum(-1)
    else:
        # w·KL(teacher ‖ M) + (1−w)·KL(student ‖ M); `share` is the teacher's in the mixture M.
        w, share = {"jsd": (beta, beta), "forward": (1.0, a), "reverse": (0.0, 1 - a)}[kl]
        mixture_logprobs = torch.logaddexp(
            teacher_logprobs + math.log(share), student_logprobs + math.log1p(-share)
        )
        of_teacher = teacher_logprobs - mixture_logprobs
        of_student = student_logprobs - mixture_logprobs
        value = (w * teacher * of_teacher + (1 - w) * student * of_student).sum(-1)
        slope = of_teacher.exp().mul_(w).add_(of_student.exp(), alpha=1 - w).mul_(share - 1)
        slope.add_(of_student, alpha=1 - w)
    return value, student * (slope - (student * slope).sum(-1, keepdim=True))


COMPILED_FROM = 2**14  # vocabulary on a CPU; a smaller one hardly repays ten seconds of compiling


@functools.cache
def compiled(device: str, vocabulary: int) -> Callable | None:
    """`gradient_of_piece` compiled, if that pays; None, said once, without a compiler."""
    if device != "cuda" and (device != "cpu" or vocabulary < COMPILED_FROM):
        return None
    if problem := compiler_problem(device):
        return PartialState().print(f"the loss is not compiled, so it is slower: {problem}")
    return torch.compile(gradient_of_piece, fullgraph=True)


def compiler_problem(device: str) -> str | None:
    """Why `torch.compile` does not work here; None if it does."""
    if device == "cuda" and not find_spec("triton"):
        return "triton is not installed"
    try:
        torch.compile(torch.square)(torch.ones(2, device=device))
    except Exception as problem:  # of the compiler, the linker, their files
        return f"{problem!r:.200}"
    return None


def gradient_of_piece(
    body: Callable, head: Head, dtype: torch.dtype, logits: list[Tensor | None], inputs: tuple
) -> tuple[Tensor, Tensor]:
    """What `chunked_loss` computes between a piece's products: the sums (2,), and in `dtype` the
    gradient at `hidden @ weightᵀ`. Empties `logits`, so that `body` can free the arrays."""
    capped = None if head.softcap is None else logits[0]
    sums, gradient = body(logits.pop(0), logits.pop(), inputs)
    if head.softcap is not None:
        gradient = gradient * (1 - (capped / head.softcap).square())
    gradient = (gradient if head.scale == 1 else gradient * head.scale).to(dtype)
    return sums, F.pad(gradient, (0, head.padding)) if head.padding else gradient


class _ChunkedLoss(torch.autograd.Function):
    """See `chunked_loss`. Backward *returns* the gradients and writes no `.grad`, so that tied
    embeddings add up and DDP reduces them once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, teacher, pieces, body, pure):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head, wanted = head.cast(hidden.dtype), ctx.needs_input_grad
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(head.weight, dtype=wide) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wanted[2] else None
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        fast = compiled(hidden.device.type, len(weight)) if pure else None
        form = body, head._replace(weight=None, bias=None), hidden.dtype
        adds_to_float32 = hidden.is_cuda and torch.version.cuda and torch.__version__ >= "2.11"
        for rows, teacher_rows, inputs in pieces:
            logits = [head.logits(hidden[rows]), teacher and teacher[teacher_rows]]
            run = fast if fast and len(logits[0]) > 1 else gradient_of_piece
            for tensor in filter(torch.is_tensor, (*logits, *inputs)) if run is fast else ():
                torch._dynamo.mark_dynamic(tensor, 0)  # compiled once for any number above 1
            part, gradient = run(*form, logits, inputs)
            sums += part
            if wanted[0]:
                grad_hidden[rows] = matmul_fp32(gradient, head.weight.t()).to(hidden.dtype)
            if wanted[1] and (gradient.dtype == wide or adds_to_float32):
                options = {} if gradient.dtype == wide else {"out_dtype": wide}
                torch.addmm(grad_weight, gradient.t(), hidden[rows], out=grad_weight, **options)
            elif wanted[1]:
                grad_weight += matmul_fp32(gradient.t(), hidden[rows].t())
            if wanted[2]:
                grad_bias += gradient[:, : len(bias)].sum(0, dtype=wide)
            del gradient  # the next piece's arrays take its memory
        grad_weight = grad_weight[: len(weight)] if wanted[1] else None
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        gradients, ctx.gradients = ctx.gradients, None
        return (*[None if g is None else g.mul_(grad_loss) for g in gradients], *[None] * 5)


def chunked_loss(
    student: Logits, teacher: Logits | None, pieces: Sequence[tuple[slice, slice, tuple]],
    body: Callable[[Tensor, Tensor | None, tuple], tuple[Tensor, Tensor]], pure: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A loss of N x V logits that never holds them whole.

    For each piece, a triple (rows of the student, rows of the teacher, inputs), it computes the
    logits (n, V) and (m, V') and calls `body(logits, teacher_logits, inputs)`, which returns the
    sums (2,) of the loss and of the divergence without T², *and the gradient* (n, V) of the loss
    with respect to the student's logits. A `pure` function of tensors may be compiled.

    Returns the loss, a scalar in nats summed over tokens, differentiable in the student's hidden
    states and head; and both sums (2,), detached.
    """
    hidden, head, teacher = student.hidden, student.head, teacher and teacher.cast()
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, head, teacher, pieces, body, pure)


def distillation_loss(
    student: Logits, targets: Tensor, objective: Objective,
    teacher: Logits | TopLogprobs | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The objective summed over N target tokens with ids `targets` (N,); without a teacher it is
    cross-entropy alone. Returns what `chunked_loss` returns."""
    server = [teacher.ids, teacher.logprobs] if isinstance(teacher, TopLogprobs) else []
    rows = server[0] if server else teacher and teacher.hidden
    if rows is not None and len(rows) != len(targets):
        raise ValueError(f"{len(rows)} rows of the teacher for {len(targets)} targets")
    given, teacher = [targets, *server], None if server else teacher
    pieces = [(rows, rows, (objective, *(t[rows] for t in given))) for rows in student.chunks()]
    return chunked_loss(student, teacher, pieces, _distillation)


def _distillation(
    logits: Tensor, teacher_logits: Tensor | None, inputs: tuple[Any, ...]
) -> tuple[Tensor, Tensor]:
    """`inputs` are the objective, the targets (n,), and the ids and log-probabilities of a server
    (T = 1). Merging tokens into one outcome lowers a divergence, so that of its K + 2 outcomes is a
    lower bound of that of the whole vocabulary, and never negative."""
    objective, target, *server = inputs
    t, weight = objective.temperature, objective.ce_weight
    kl, loss, gradient = logits.new_zeros(()), logits.new_zeros(()), None
    if weight:
        logprobs = log_softmax_with_temperature(logits)
        loss = -weight * logprobs.gather(1, target[:, None]).sum()
        gradient = logprobs.exp_().mul_(weight)
    if server or teacher_logits is not None:
        logprobs = log_softmax_with_temperature(logits, t)
        del logits
        if server:
            logprobs, theirs, others = outcomes(logprobs, *server)
        else:
            theirs = log_softmax_with_temperature(teacher_logits, t)
        del teacher_logits
        values, slope = divergence(logprobs, theirs, objective)
        kl = values.sum()
        loss = loss + t**2 * kl
        slope = slope if t == 1 else slope.mul_(t)  # T² from the loss, 1/T from logits / T
        if server:  # the last outcome's logit is the logsumexp of its tokens' logits
            slope = others.exp_().mul_(slope[:, -1:]).scatter_add_(1, server[0], slope[:, :-1])
        gradient = slope if gradient is None else gradient.add_(slope)
    if weight:
        # Not `full_like`, whose number a compiled graph would keep from the first weight.
        step = torch.ones_like(target[:, None], dtype=gradient.dtype) * -weight
        gradient.scatter_add_(1, target[:, None], step)
    return torch.stack([loss, kl]), gradient


# ----------------------------------------------------------------------------------- evaluation

Tally = dict[str, Any]  # sums over one evaluation prompt: see `Evaluator`; and the answer
Scores = dict[str, float]

# Each score is the ratio of two sums over all evaluation prompts.
SCORES = {
    "kl_to_teacher": ("kl", "tokens"),
    "top1_agreement": ("agree", "tokens"),
    "nats_per_token": ("nats", "tokens"),
    "bits_per_byte": ("text_bits", "bytes"),
    "kl_on_own_text": ("own_kl", "own_tokens"),
    "exact_match": ("exact", "prompts"),
    "error_rate": ("edits", "reference_words"),
    "response_tokens": ("response_tokens", "prompts"),
    "cut_off": ("cut_off", "prompts"),
}
# Scores compared with the teacher's; the sign says whether higher is better.
GAPS = {"kl_to_teacher": -1, "top1_agreement": 1, "exact_match": 1, "error_rate": -1}


class Evaluator:
    """Scores students and their teacher on the same held-out prompts.

    The README explains the scores. Those of likelihood are taken on one fixed set of answers that
    the teacher samples at temperature 1; `bits_per_byte` leaves out their end tokens. The others
    are taken on greedy answers; `error_rate` compares with the nearest reference. A teacher that
    returns only text gets no scores of likelihood.
    """

    def __init__(self, prompts: list[Prompt], pair: Pair, args: Flags) -> None:
        """Have the teacher answer the prompts, and score it."""
        teacher = pair.teacher
        greedy, samples = (
            teacher.complete(prompts, args, temperature=t, purpose=f"{kind} evaluation answers")
            for t, kind in ((0.0, "greedy"), (1.0, "sampled"))
        )
        rows = zip(prompts, greedy, samples, strict=True)
        rows = [row for row in rows if all(answer.finished is not None for answer in row[1:])]
        if not rows:
            raise UsageError("no evaluation prompt got an answer")
        prompts, greedy, samples = zip(*rows, strict=True)
        self.args, self.student, self.grade = args, pair.student, load_grader(args.grader)
        self.comparable = pair.same_vocabulary  # then the student reads the teacher's ids
        self.prompts, self.answers = prompts, (greedy, samples)  # of the teacher
        self.rows = [
            p.conversation.row() | {"references": p.conversation.references or [text]}
            for p, text in zip(prompts, map(with_reasoning, prompts, greedy), strict=True)
        ]
        self.unreferenced = sum(not p.conversation.references for p in prompts)
        examples = completion_examples(prompts, samples, pair, args.max_length)
        self.examples = my_share(examples)
        self.batches = length_batches(
            self.examples, lambda e: max(len(e.student.ids), len(e.teacher.ids))
        )
        tallies = {e.index: self._answer_tally(e.index, greedy[e.index]) for e in self.examples}
        if isinstance(teacher, LanguageModel | ServerTeacher):
            states = TeacherHiddenStates(teacher, examples, "evaluation text")
            head, reader = teacher.head(), pair.readers[-1]
            self.teacher_logits = [teacher_logits(states(b).cpu(), head) for b in self.batches]
            for i, logits in enumerate(self.teacher_logits):
                self._add_likelihoods(tallies, i, reader, logits)
        self.teacher_tallies = gathered(tallies)

    def __call__(self) -> list[Tally]:
        """One tally per evaluation prompt, on every process."""
        student, prompts = self.student, [e.prompt.student for e in self.examples]
        tallies = {}
        with student.evaluating():
            answers = generate(student, prompts, [0] * len(prompts), self.args, temperature=0.0)
            for place, answer in answers:
                i = self.examples[place].index
                tallies[i] = self._answer_tally(i, answer)
            for i, batch in enumerate(self.batches):
                logits = student.logits(collate([e.student for e in batch], student.device))
                self._add_likelihoods(tallies, i, student, logits)
        return gathered(tallies)

    def _answer_tally(self, i: int, answer: Completion) -> Tally:
        text, row = with_reasoning(self.prompts[i], answer), self.rows[i]
        words = final_text(text).split()
        references = [final_text(reference).split() for reference in row["references"]]
        edits, length = min((edit_distance(words, r), len(r)) for r in references)
        tally = {"prompts": 1, "edits": edits, "reference_words": length, "answer": answer.text}
        tally["exact"] = self.grade(text, row)
        return tally | {"response_tokens": answer.length, "cut_off": not answer.finished}

    def _add_likelihoods(
        self, tallies: dict[int, Tally], i: int, model: LanguageModel, logits: Logits | TopLogprobs
    ) -> None:
        """Add a model's likelihoods of the teacher's samples in batch `i`."""
        batch, teacher = self.batches[i], self.teacher_logits[i] if self.comparable else None
        sides = [e.student if model is self.student else e.teacher for e in batch]
        targets = collate(sides, model.device).targets
        values = compare(logits, targets, teacher)
        counts = [len(side.targets) for side in sides]
        parts = {name: v.float().cpu().split(counts) for name, v in values.items()}
        logprobs = parts.pop("logprob")
        for j, (example, side) in enumerate(zip(batch, sides, strict=True)):
            tally = {name: part[j].sum().item() for name, part in parts.items()}
            tally |= {"tokens": counts[j], "nats": -logprobs[j].sum().item()}
            # The text alone, without its end token; decoded after the prompt, because some
            # tokenizers strip what text begins with.
            start = side.targets[0] if side.targets else len(side.ids)
            answer = side.ids[start : start + counts[j]]
            count = counts[j] - bool(answer and answer[-1] in model.end_ids)
            texts = side.ids[:start], side.ids[: start + count]
            decode = partial(model.tokenizer.decode, clean_up_tokenization_spaces=False)
            before, after = (len(decode(ids).encode()) for ids in texts)
            tally["text_bits"] = -logprobs[j][:count].sum().item() / math.log(2)
            tally["bytes"] = after - before
            tallies[example.index] |= tally


@torch.no_grad()
def compare(
    student: Logits | TopLogprobs, targets: Tensor, teacher: Logits | TopLogprobs | None = None
) -> dict[str, Tensor]:
    """Values of a model at N targets, chunk by chunk, each (N,), at T = 1 and without gradient:

    `logprob` of the target; with a teacher also `kl`, KL(teacher ‖ student) in nats, and `agree`, 1
    if both have the same most likely token. With a server's teacher the KL is a lower bound, of
    K + 2 outcomes. `student` is a `TopLogprobs` where that teacher itself is scored.
    """
    if isinstance(student, TopLogprobs):
        logprob = student.logprobs[:, 0]
        same, none = torch.ones_like(logprob), torch.zeros_like(logprob)
        return {"logprob": logprob} | ({"agree": same, "kl": none} if teacher else {})
    student, teacher, parts = student.cast(), teacher and teacher.cast(), []
    for rows in student.chunks():
        logprobs = log_softmax_with_temperature(student[rows])
        values = {"logprob": logprobs.gather(1, targets[rows, None])[:, 0]}
        if isinstance(teacher, TopLogprobs):
            of_server = teacher.ids, teacher.logprobs  # on the CPU
            ids, theirs = (part[rows].to(logprobs.device) for part in of_server)
            best = ids.gather(1, theirs[:, :-1].argmax(-1, keepdim=True))[:, 0]
            values["agree"] = (logprobs.argmax(-1) == best).float()
            both = outcomes(logprobs, ids, theirs)[:2]
            values["kl"], _ = divergence(*both, Objective())
        elif teacher is not None:
            theirs = log_softmax_with_temperature(teacher[rows])
            if logprobs.shape[1] > theirs.shape[1]:  # only the ids that both have
                logprobs = log_softmax_with_temperature(logprobs[:, : theirs.shape[1]])
            values["agree"] = (logprobs.argmax(-1) == theirs.argmax(-1)).float()
            values["kl"], _ = divergence(logprobs, theirs, Objective())  # overwrites both
        parts.append(values)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def gathered(tallies: dict[int, Tally]) -> list[Tally]:
    """The tallies of all processes in the order of the prompts."""
    everything = dict(gather_object(list(tallies.items())))
    return [everything[i] for i in sorted(everything)]


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Insertions, deletions and substitutions between two sequences of words (Levenshtein)."""
    numbers = {word: number for number, word in enumerate({*a, *b})}
    theirs = numpy.array([numbers[word] for word in b], dtype=int)
    row = places = numpy.arange(len(b) + 1)
    for i, word in enumerate(a, 1):
        changed = numpy.minimum(row[1:] + 1, row[:-1] + (theirs != numbers[word]))
        row = numpy.minimum.accumulate(numpy.append(i, changed) - places) + places  # insertions
    return int(row[-1])


def scores(tallies: list[Tally]) -> Scores:
    """The numbers of a results table; `Evaluator` tells their meaning."""
    sums = {key: sum(t[key] for t in tallies) for key in tallies[0] if key != "answer"}
    known = {name: (a, b) for name, (a, b) in SCORES.items() if a in sums}
    result = {name: sums[a] / max(1, sums[b]) for name, (a, b) in known.items()}
    if "kl_on_own_text" in result:
        result["exposure_bias"] = result["kl_on_own_text"] / max(result["kl_to_teacher"], 1e-9)
    return result


def gap_recovered(before: list[Tally], after: list[Tally], teacher: list[Tally]) -> Scores:
    """(after − before) / (teacher − before), for scores where the teacher is better by more than
    two standard errors of the paired difference between prompts."""
    first, last, goal = scores(before), scores(after), scores(teacher)
    tables, result = [pandas.DataFrame(tallies) for tallies in (teacher, before)], {}
    for name, sign in GAPS.items():
        if name in first:
            top, bottom = SCORES[name]
            best, ours = (table[top] / table[bottom].clip(lower=1) for table in tables)
            gaps = sign * (best - ours)  # of each prompt
            clear = gaps.mean() > 2 * gaps.sem()  # of one prompt alone it is not a number
            if clear and sign * (goal[name] - first[name]) > 0:  # long references weigh more here
                result[name] = (last[name] - first[name]) / (goal[name] - first[name])
    return result


# -------------------------------------------------------------------------------- run directory

# Flags that may differ on --resume: they change training by rounding, or who writes its samples.
FLAGS_FREE_ON_RESUME = {
    "output_dir", "overwrite", "resume", "cache_dir", "save_steps", "save_total_limit",
    "eval_steps", "logging_steps", "generation_batch_size", "report_to", "plan",
    "api_concurrency", "api_timeout", "api_max_failures", "rollout_url", "rollout_weights",
}  # fmt: skip


def start(script: str, args: Flags) -> Accelerator:
    """Set up accelerate, and refuse directories that cannot be used."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # accelerate warns of tied weights at every checkpoint, although loading ties them again.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    # A process may wait long: for the teacher's text, or for another run's. LanguageModel.backbone
    # enters autocast by itself.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    with usage_error("cannot start", ValueError, RuntimeError):  # e.g. no peer answers
        accelerator = start_accelerator(mixed_precision="no", kwargs_handlers=[patience])
    accelerator.gradient_accumulation_steps = 1  # whatever the environment says
    if (launched := os.environ.get("WORLD_SIZE", "1")) != str(accelerator.num_processes):
        raise UsageError(
            f"{launched} processes were started, but each is alone: without a GPU, set "
            "ACCELERATE_USE_CPU=true"
        )
    directory = Path(args.output_dir or "runs")
    for name, path in {"--output-dir": directory, "--cache-dir": Path(args.cache_dir)}.items():
        # A link to a disk that is gone counts too.
        nearest = next(p for p in (path, *path.absolute().parents) if os.path.lexists(p))
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UsageError(f"cannot write in {name} {path}: {nearest} is no writable directory")
    # A run that was killed before it wrote anything may have left half of its args.json.
    left = {path.name for path in directory.glob("*")} - {"args.json.part", ".lock"}
    if args.resume and left:
        check_resume(directory, script, args)
    elif args.resume:
        PartialState().print(f"--resume: {directory} holds no run yet, so a new one begins")
    elif args.output_dir and left and not args.overwrite:
        raise UsageError(f"--output-dir {directory} is not empty: add --overwrite or --resume")
    elif args.overwrite and left and not is_run(directory):
        raise UsageError(f"--overwrite would remove {directory}, which is no run (by args.json)")
    read = [args.student, args.teacher, args.dataset, args.eval_dataset, args.cache_dir,
            args.chat_template, args.grader.rpartition(":")[0]] * args.overwrite  # fmt: skip
    for path in (Path(name) for name in read if name):
        there = path.exists() or path == Path(args.cache_dir)  # may not exist yet
        if there and path.resolve().is_relative_to(directory.resolve()):
            raise UsageError(f"--overwrite would remove {path}, which this run reads")
    torch.manual_seed(args.seed)  # for the initial weights of adapters
    return accelerator


def is_run(directory: Path) -> bool:
    """Whether its args.json is one of this suite."""
    try:
        return "script" in dict(json.loads((directory / "args.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return False


def check_resume(directory: Path, script: str, args: Flags) -> None:
    """Raise `UsageError` if these arguments cannot continue the run in `directory`."""
    refused = f"--resume cannot continue {directory}"
    with usage_error(f"{refused}, which has no readable args.json", OSError, ValueError, TypeError):
        before = dict(json.loads((directory / "args.json").read_text(encoding="utf-8")))
    now = all_arguments(script, args)
    for name in now.keys() - FLAGS_FREE_ON_RESUME:
        if (was := before.get(name, getattr(type(args), name, None))) != now[name]:
            shown = as_flag(name) if name in vars(args) else name
            raise UsageError(f"{refused}: it was started with {shown} {was}, not {now[name]}")
    if (directory / "results.json").exists():
        raise UsageError(f"{refused}: it is finished")


def all_arguments(script: str, args: Flags) -> dict[str, Any]:
    """The content of args.json: what was run, how accelerate launched it, and every flag."""
    return {"script": script, "launched": PartialState().distributed_type.value, **vars(args)}


def total_steps(args: Flags, examples: int) -> int:
    """--max-steps, else --epochs over the examples."""
    steps = args.max_steps
    if steps <= 0:  # rounded, as 1.1 · 100 is a little more than 110
        steps = max(1, math.ceil(round(args.epochs * examples / args.batch_size, 6)))
    if args.warmup_steps >= steps:
        PartialState().print(f"--warmup-steps {args.warmup_steps}: all {steps} steps are warm-up")
    return steps


def make_optimizer(model: nn.Module, args: Flags) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.95) with weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def prepare(
    accelerator: Accelerator, module: nn.Module, args: Flags, teacher: Any = None
) -> tuple[nn.Module, Any]:
    """Prepare the student's module and its optimizer for the launched processes; FSDP shards the
    student, and `teacher` if it is loaded."""
    gc.collect()  # a teacher with accelerate's hooks is a cycle, which would stay beside training
    torch.cuda.empty_cache()  # it may have lain on GPUs where other processes train
    if accelerator.is_fsdp2:
        student = module.student
        with usage_error("cannot shard the models", ValueError):
            kinds = {type(layer).__name__ for layer in layers_of(student.model)}
            accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = list(kinds)
            student.copies = without_weights(student.model, student.adapters)
            if isinstance(teacher, LanguageModel) and teacher.loaded:
                teacher.keep_head()
                for layer in layers_of(teacher.model):  # a forward pass gathers one at a time, so
                    fully_shard(layer)  # every process must run equally many
                fully_shard(teacher.model.base_model, reshard_after_forward=True)
    return accelerator.prepare(module, make_optimizer(module, args))


def reduce_gradients(
    accelerator: Accelerator, module: nn.Module, now: bool
) -> contextlib.AbstractContextManager[None]:
    """Gradients are synchronised between processes only in a step's last micro-batch; with FSDP in
    each, because gradients that wait are not sharded."""
    now = now or accelerator.is_fsdp2
    return contextlib.nullcontext() if now else accelerator.no_sync(module)


class Run:
    """Run directory, metrics, checkpoints and results of one run."""

    current: Run | None = None  # the run that trains in this process

    def __init__(
        self, script: str, args: Flags, accelerator: Accelerator, evaluator: Evaluator,
        examples: Sequence[Example] | Sequence[Prompt],
    ) -> None:  # fmt: skip
        """Claim the directory, or find the checkpoint to continue, and score the student.

        Raises `UsageError` if a run that is continued had other `examples` to learn from.
        """
        self.script, self.args, self.accelerator = script, args, accelerator
        self.evaluator, self.student = evaluator, evaluator.student
        self.pending: list[tuple[int, dict[str, Any], list[list[Example]]]] = []
        self.clock, self.tokens = time.perf_counter(), 0  # since metrics were written
        self.signal = 0  # the signal that asked this process to stop
        self.directory = Path()
        if accelerator.is_main_process:
            self.directory = self._claim()
            # final/ and one checkpoint, which also holds two moments of what is trained.
            parameters = self.student.model.parameters()
            size = sum(p.nbytes * (4 if p.requires_grad else 2) for p in parameters)
            if size > shutil.disk_usage(self.directory).free:
                raise UsageError(f"no room in {self.directory} for {size / 1e6:.1f} MB of weights")
            if not (self.directory / "args.json").exists():
                write_json(self.directory / "args.json", all_arguments(script, args))
            print(f"run directory: {self.directory}")
        self.directory = broadcast_object_list([self.directory])[0]
        if not self.directory.is_dir():
            raise UsageError(f"all processes must see one --output-dir; one lacks {self.directory}")
        self.checkpoint = next(reversed(self._checkpoints()), None) if args.resume else None
        text = hashlib.sha256()
        for item in (*examples, *evaluator.prompts):
            text.update(repr((item.student, item.teacher)).encode())
        talks = [prompt.conversation for prompt in evaluator.prompts]
        scored = [(t.references, t.columns) for t in talks], evaluator.answers
        # The address of an image, in a column, is another in every process.
        text.update(re.sub(" at 0x[0-9a-fA-F]+", "", repr(scored)).encode())
        # What a checkpoint holds beside weights, optimizer and random state.
        start = {"step": 0, "lines": 0, "seconds": 0.0, "before": None, "text": text.hexdigest()}
        self.state = start
        if self.checkpoint is not None:
            with self._corrupt():
                text = (self.checkpoint / "state.json").read_text(encoding="utf-8")
                self.state = start | json.loads(text)
            if self.state["text"] != start["text"]:
                raise UsageError(
                    f"--resume cannot continue {self.directory}: the text that it learns from, its "
                    "evaluation prompts, or the teacher's answers to them are not what they were; "
                    "--overwrite starts it anew"
                )
        self.began = STARTED - self.state["seconds"]  # as if it had not been interrupted
        if accelerator.is_main_process and args.resume:  # drop what the checkpoint lacks
            with open(self.directory / "metrics.jsonl", "ab+") as file:
                if file.tell() and self.checkpoint is None:
                    print(f"{self.directory} has no checkpoint, so the run begins anew")
                file.seek(0)
                lines = list(itertools.islice(file, self.state["lines"]))
                lines = [line for line in lines if line.endswith(b"\n")]  # one may have been torn
                file.truncate(sum(map(len, lines)))
            self.state["lines"] = len(lines)
        if args.report_to != "none":
            accelerator.log_with = [LoggerType(args.report_to)]
            accelerator.project_configuration.set_directories(str(self.directory))
            config = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items()}
            accelerator.init_trackers(script, config)
        if self.state["before"] is None:
            self.state["before"] = evaluator()
            self._write_scores(0, self.state["before"])

    def _claim(self) -> Path:
        """Create the directory and lock it, so that two runs never share one."""
        free, named = FLAGS_FREE_ON_RESUME | {"cache_teacher"}, self.args.output_dir
        flags = [(n, v) for n, v in changed_flags(self.args).items() if n not in free]
        flags = [f"{name.replace('_', '-')}-{Path(str(value)).name}" for name, value in flags]
        name = re.sub(r"[^\w.,=+-]+", "_", "-".join([self.script, *flags]))
        name = name.encode()[:180].decode(errors="ignore")
        base = Path(named or f"runs/{name}")
        base.parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(1):
            directory = base if number == 1 else base.with_name(f"{base.name}-{number}")
            with contextlib.suppress(*[FileExistsError] * (not named)):
                directory.mkdir(exist_ok=bool(named))
                break
        # Held until the process ends.
        self.lock = FileLock(directory / ".lock", blocking=False, is_singleton=True)
        with usage_error(f"another run is writing to --output-dir {directory}", Timeout):
            self.lock.acquire()
        if self.args.resume and (directory / "args.json").exists():
            check_resume(directory, self.script, self.args)  # it may be new since `start` looked
        elif (directory / "args.json").exists():
            if not self.args.overwrite:
                raise UsageError(f"another run has used --output-dir {directory} meanwhile")
            left = set(directory.iterdir()) - {directory / ".lock"}
            for path in sorted(left, key=lambda path: path.name == "args.json"):  # args.json last
                whole = path.is_dir() and not path.is_symlink()
                shutil.rmtree(path) if whole else path.unlink()
        return directory

    def _checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first. One is whole when its state.json, written last, is there."""
        whole = (path for path in self._steps() if (path / "state.json").exists())
        return sorted(whole, key=lambda path: int(path.name.removeprefix("step-")))

    def _steps(self) -> list[Path]:
        """Whole checkpoints and others; no copies that a user has made."""
        directories = self.directory.glob("checkpoints/step-*")
        return [path for path in directories if path.name.removeprefix("step-").isdecimal()]

    def _corrupt(self) -> contextlib.AbstractContextManager[None]:
        advice = "if it is corrupt, delete it, and --resume continues from the one before"
        return usage_error(f"cannot load the checkpoint {self.checkpoint} ({advice})", Exception)

    def resume(self, steps: int) -> int:
        """Load the newest checkpoint, if any; returns the first step to run.

        From here to the last `save`, SIGTERM and Ctrl-C end the run with a checkpoint.
        """
        if self.checkpoint is not None:
            with self._corrupt():
                # Nothing foreign is unpickled: safetensors, and torch.load(weights_only=True).
                self.accelerator.load_state(str(self.checkpoint))
            self.accelerator.print(f"resumed from {self.checkpoint}")
        self.steps, first = steps, self.state["step"]
        Run.current, self.done = self, first
        self.bar = progress("training", steps, first)
        for number in (signal.SIGTERM, signal.SIGINT) if first < steps else ():
            signal.signal(number, self._note_signal)
        self.student.model.train()
        self.clock = time.perf_counter()
        return first

    def _note_signal(self, number: int, _: Any) -> None:
        """Signal handler: `save` ends the run after the present step; a second signal, at once."""
        self.signal = number
        sys.stdout = sys.stderr  # stdout may be a pipe whose reader got the same Ctrl-C
        default_signals()

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Set every group's learning rate (linear warm-up, cosine to zero) and the dropout seed.

        Both are functions of the step, so that resuming needs no state.
        """
        warmup = self.args.warmup_steps
        done = (step - warmup) / max(1, self.steps - warmup)
        factor = (step + 1) / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = self.args.learning_rate * factor
        # The only use of torch's global generator while training.
        torch.manual_seed(row_seed(self.args.seed, "dropout", step, self.accelerator.process_index))

    def log(
        self, step: int, tokens: int, values: dict[str, Any], micro_batches: list[list[Example]]
    ) -> None:
        """Record a step, without waiting for its device tensors, and write when that is due."""
        self.tokens, self.done = self.tokens + tokens, step
        self.pending.append((step, values, micro_batches))
        self.bar.update()
        if step == self.steps or step % self.args.logging_steps == 0:
            self.flush()

    def flush(self) -> None:
        """Write what was logged to metrics.jsonl. A non-finite number ends the run."""
        speed = self.tokens / max(time.perf_counter() - self.clock, 1e-9)
        for step, values, micro_batches in self.pending:
            whole = {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in values.items()}
            numbers = {name: float(value) for name, value in whole.items()}
            if not all(map(math.isfinite, numbers.values())):
                sources = [e.prompt.conversation.source for batch in micro_batches for e in batch]
                sys.exit(
                    f"error: loss or gradient is not finite at step {step}: {numbers}; its "
                    f"examples: {', '.join(sources[:3])} and {max(0, len(sources) - 3)} more"
                )
            loss = f"{numbers['train/loss']:.4f}"
            self.bar.set_postfix(loss=loss, tokens_per_second=f"{speed:.0f}", refresh=False)
            self._write({"step": step, **numbers, "speed/tokens_per_second": speed})
        self.pending, self.clock, self.tokens = [], time.perf_counter(), 0

    def _write(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl, and send it to the tracker."""
        if self.accelerator.is_main_process:
            with open(self.directory / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        self.state["lines"] += 1
        self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def _write_scores(self, step: int, tallies: list[Tally]) -> None:
        self._write({"step": step} | {f"eval/{k}": v for k, v in scores(tallies).items()})
        self.clock = time.perf_counter()  # evaluation is not training time

    def evaluate(self, step: int) -> None:
        """Score the student while it trains, if that is due at this step."""
        every = self.args.eval_steps
        if every and step % every == 0 and step < self.steps:
            self.flush()
            self._write_scores(step, self.evaluator())

    def save(self, step: int) -> None:
        """Write a checkpoint if one is due, and end the run if a signal asked for it."""
        last, stop = step == self.steps, self.signal
        if self.accelerator.num_processes > 1:  # all must stop at the same step
            agree = last or step % self.args.logging_steps == 0
            stop = max(gather_object([stop])) if agree else 0
        if last or stop or (self.args.save_steps and step % self.args.save_steps == 0):
            self.flush()
            self._write_checkpoint(step)
            self.clock = time.perf_counter()
        if last:
            self.bar.close()
            default_signals()
            several = self.accelerator.num_processes > 1  # a signal may have come meanwhile
            stop = max(gather_object([self.signal])) if several else self.signal
        if stop:
            self._stopped(step)
            end_by(stop)

    def interrupt(self) -> None:
        """Write a checkpoint of what is done, in all processes, before an error ends the run."""
        if self.done > self.state["step"]:
            self.flush()
            self._write_checkpoint(self.done)
        self._stopped(self.done)

    def _stopped(self, step: int) -> None:
        flags = shlex.join(["--output-dir", str(self.directory), "--resume"])
        change = f"with {flags}" + " and without --overwrite" * self.args.overwrite
        self.accelerator.print(f"stopped after step {step}; the same command {change} continues")
        self._close()

    def _write_checkpoint(self, step: int) -> None:
        """Weights, optimizer and random state of all processes; state.json last."""
        path = self.directory / "checkpoints" / f"step-{step:06}"
        full = f"cannot write {path} (is the disk full?)"
        with usage_error(full, OSError, RuntimeError, SafetensorError):
            self.accelerator.save_state(str(path), safe_serialization=True)
        self.accelerator.wait_for_everyone()
        self.state |= {"step": step, "seconds": time.perf_counter() - self.began}
        if self.accelerator.is_main_process:
            write_json(path / "state.json", self.state)
            keep = self._checkpoints()[-self.args.save_total_limit :]  # 0: all that are whole
            for old in [p for p in self._steps() if p not in keep and not p.is_symlink()]:
                (old / "state.json").unlink(missing_ok=True)  # first: then it does not count
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def finish(self, **more: Any) -> None:
        """Score the student; write final/, results.json and curves.png; print the table."""
        kept = f"the trained weights are in {self._checkpoints()[-1]}; --resume tries again"
        with usage_error(f"the student cannot be scored ({kept})", UsageError, about="overflows"):
            after, evaluator = self.evaluator(), self.evaluator
        before, teacher = self.state["before"], evaluator.teacher_tallies
        self._write_scores(self.steps, after)
        packages = ("torch", "transformers", "datasets", "accelerate")
        results = {
            "teacher": scores(teacher),
            "before": scores(before),
            "after": scores(after),
            "gap_recovered": gap_recovered(before, after, teacher),
            "evaluation": {"rows": len(after), "unreferenced_rows": evaluator.unreferenced},
            **more,
            "seconds": time.perf_counter() - self.began,
            "versions": {name: importlib.metadata.version(name) for name in packages},
        }
        table = results_table(results)
        with (usage_error(f"cannot write {self.directory / 'final'} ({kept})", Exception),
              self.student.inference_copy()):  # fmt: skip
            if self.accelerator.is_main_process:
                save_student(self.student, self.directory / "final", self._model_card(table))
        if self.accelerator.is_main_process:
            write_json_lines(self.directory / "answers.jsonl", self._answers(before, after))
            write_json(self.directory / "results.json", results)
            draw_curves([self.directory], self.directory / "curves.png")
            shown = zip(evaluator.prompts[:3], evaluator.rows, after, strict=False)
            for prompt, row, tally in shown:
                question = self.student.tokenizer.decode(prompt.student)
                print(f"  {question!r}\n    {tally['answer']!r}  (of {row['references']})")
            print(table)
            if evaluator.unreferenced:
                print(
                    f"{evaluator.unreferenced} of {len(after)} evaluation rows have no reference: "
                    "there exact_match and error_rate compare with the teacher's greedy answer"
                )
            print(f"student: {self.directory / 'final'}")
        self._close()

    def _answers(self, before: list[Tally], after: list[Tally]) -> Iterator[dict[str, Any]]:
        """Each held-out prompt with the greedy answers of teacher and student."""
        every = {"teacher": self.evaluator.teacher_tallies, "before": before, "after": after}
        for i, row in enumerate(self.evaluator.rows):
            answers = {name: tallies[i]["answer"] for name, tallies in every.items()}
            right = {name: tallies[i]["exact"] for name, tallies in every.items()}
            yield row | answers | {"right": right}

    def _close(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()  # a process that exits can abort those that talk to it

    def _model_card(self, table: str) -> str:
        changed = changed_flags(self.args).items()
        flags = [(as_flag(n), str(v)) for n, v in changed if n not in FLAGS_FREE_ON_RESUME]
        flags = shlex.join(itertools.chain.from_iterable(flags)) or "none"
        paths = Path(self.args.student).absolute(), Path(self.args.teacher).absolute()
        student, teacher = (p.parent.name if p.name == "final" else p.name for p in paths)
        teacher = self.args.api_model or teacher
        lines = [
            "---", "library_name: transformers", "pipeline_tag: text-generation",
            "tags: [distillation]", "---", "", f"# {student}, distilled from {teacher}", "",
            f"- method: `{self.script}.py`", f"- teacher: `{teacher}`", f"- student: `{student}`",
            f"- data: `{Path(self.args.dataset).name}`", f"- flags: `{flags}`",
            "", "```", table, "```", "",
        ]  # fmt: skip
        return "\n".join(lines)


def default_signals() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def save_student(student: LanguageModel, directory: Path, card: str, **options: Any) -> None:
    """Model (adapters merged), tokenizer with its template, and card."""
    config = student.model.generation_config
    config.eos_token_id = student.end_ids
    if not config.do_sample:  # save_pretrained refuses sampling settings of a greedy model
        for name in ("temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff",
                     "eta_cutoff"):  # fmt: skip
            setattr(config, name, None)
    if student.adapters is not None:
        student.adapters.merge_and_unload()
    student.model.save_pretrained(directory, **options)
    make_readable(*directory.glob("*.safetensors"))
    student.tokenizer.save_pretrained(directory)
    restore_own_files(student, directory)
    (directory / "README.md").write_text(card, encoding="utf-8")


# What a tokenizer or processor consists of, but for chat templates.
OWN_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt",
             "*.model", "*.tiktoken", "tekken.json", "*processor_config.json")  # fmt: skip


def restore_own_files(student: LanguageModel, directory: Path) -> None:
    """Put the student's own tokenizer files in place of what this version of transformers made of
    them, and write configurations so that older versions can read them too."""
    for path in itertools.chain.from_iterable(map(student.directory.glob, OWN_FILES)):
        if path.is_file():
            shutil.copyfile(path, directory / path.name)
    paths = [folder / "config.json" for folder in (student.directory, directory)]
    paths.append(directory / "tokenizer_config.json")
    own, config, tokenizer = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    own = own if own["model_type"] == config["model_type"] else {}  # else the text model's wrapper
    config = own | config | {"torch_dtype": config.get("dtype")}
    config.pop("auto_map", None)  # it would name files that are not here
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        scaling = None if rope.get("rope_type") == "default" else rope
        config |= {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    write_json(directory / "config.json", config)
    template = student.tokenizer.chat_template
    if isinstance(template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    tokenizer["chat_template"] = template
    tokenizer.pop("auto_map", None)
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    write_json(directory / "tokenizer_config.json", tokenizer)


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # Half of a surrogate pair, in a column that only a grader reads, becomes its JSON escape.
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def table_text(table: pandas.DataFrame) -> str:
    return table.to_string(float_format="{:.4f}".format, na_rep="-")


def results_table(results: dict[str, Any]) -> str:
    """Teacher, before and after, a line for each score."""
    table = pandas.DataFrame({name: results[name] for name in ("teacher", "before", "after")})
    gaps = pandas.Series(results["gap_recovered"], dtype=float)
    table["gap recovered"] = gaps.map("{:.1%}".format)
    return table_text(table.reindex(list(results["after"])))


def draw_curves(directories: Sequence[Path], target: Path) -> None:
    """Loss and evaluation against step, one line for each run; says so without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f'no {target.name}: it needs matplotlib (pip install -e ".[plots]")')
        return
    panels = ("train/loss", "eval/kl_to_teacher", "eval/exact_match", "eval/error_rate")
    figure = Figure(figsize=(18, 4 + len(directories) / 12), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for directory in directories:
        lines = pandas.read_json(directory / "metrics.jsonl", lines=True).set_index("step")
        for name, axis in zip(panels, axes, strict=True):
            values = lines.reindex(columns=[name])[name].dropna()
            axis.plot(values, label=directory.name, marker="o" * name.startswith("eval"))
            axis.set(title=name, xlabel="step")
            axis.grid(alpha=0.3)
    if len(directories) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(target, dpi=100)


# --------------------------------------------------------------------------- plan of the memory

# What allocators hold beyond the tensors, and what compiler and threads take on a CPU. Both were
# measured: see tests/bench/README.md.
SLACK, LIBRARIES = 1.12, 300e6


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators make, until these are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}  # of each storage

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
        return result

    def _free(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def plan(script: str, args: Flags) -> None:
    """`--plan`: print the memory that a run needs in one process, and with other flags.

    It loads no weights: a step and a batch of answers run on tensors that have shapes and no data.
    On a CPU the peak includes Python and its libraries.
    """
    device = torch.device(start(script, args).device.type)  # fake tensors know no "cpu:0"
    teacher = None if args.api_base_url else open_model(args, device, "teacher")
    student = open_model(args, device, "student", teacher and teacher.tokenizer.chat_template)
    rows, few = load_data(args)[0], max(1, args.generation_batch_size // 4)
    prompts = tokenize_prompts(rows, Pair(student, teacher or student), args.max_length)
    longest = max(len(ids) for p in prompts for ids in (p.student, p.teacher))
    micro_batch = max(1, (args.micro_batch_size or args.batch_size) // 4)
    columns = {}
    for title, change in {
        "as given": {},
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        f"--micro-batch-size {micro_batch}": {"micro_batch_size": micro_batch},
        f"--generation-batch-size {few}": {"generation_batch_size": few},
        "--lora-rank 16": {"lora_rank": 16},
    }.items():
        changed = dataclasses.replace(args, **change)
        if find_spec("peft") or not changed.lora_rank:
            columns[title] = memory_of_run(script, changed, student, teacher, longest)
    table = pandas.DataFrame(columns)
    table.loc["peak"] = table.filter(like="peak", axis=0).max() * SLACK
    available = psutil.virtual_memory().total
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        table.loc["peak"] += psutil.Process().memory_info().rss + LIBRARIES
    say = PartialState().print
    say(f"{script}.py needs, in MB (this device has {available / 1e6:,.0f}):")
    say((table / 1e6).to_string(float_format="{:,.0f}".format))
    fits = [name for name, peak in table.loc["peak"].items() if peak < available]
    if "as given" not in fits:
        say(f"it does not fit; what would: {', '.join(fits) or 'none of these alone'}")
    if teacher and args.cache_teacher and script != "sequence_level":
        width = teacher.config.get_text_config().hidden_size
        say(f"and on disk {width * teacher.compute_dtype.itemsize} bytes for each target token")


def memory_of_run(
    script: str, args: Flags, student: LanguageModel, teacher: LanguageModel | None,
    longest_prompt: int,
) -> dict[str, int]:  # fmt: skip
    """Bytes of a run's parts in one process, with sequences as long as its flags allow.

    cross_tokenizer.py's loss is taken to need what token_level.py's does.
    """
    written = args.max_new_tokens if args.completions == "teacher" else args.max_length
    length = min(args.max_length, longest_prompt + written)
    models = [dataclasses.replace(model) for model in (student, teacher) if model]
    for model in models:  # with weights that have no data
        dtype = torch.float32 if model is models[0] else model.compute_dtype
        with torch.device("meta"), usage_error(f"no plan for {model.name}", *LOAD_ERRORS):
            model.model = (
                model_class(model.config)
                .from_config(
                    model.config, dtype=dtype, attn_implementation=args.attn_implementation
                )
                .eval()
            )
    with contextlib.redirect_stdout(io.StringIO()):  # what `add_adapters` prints
        prepare_student(models[0], args)
    parts, eager = {}, torch.compiler.set_stance("force_eager")
    untraced = usage_error(f"no plan for {student.name}", Exception)  # of a cache of its own
    plain = mock.patch.object(moe, "_can_use_grouped_mm", return_value=False)  # it takes no fakes
    with untraced, plain, FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, eager:
        for name, model in zip(("student's weights", "teacher's weights"), models, strict=False):
            before = live.now
            model.model.to_empty(device=model.device).tie_weights()
            parts[name] = live.now - before
        peaks = [_peak_of_generation(model, args, longest_prompt, live) for model in models]
        parts["peak of generation"] = max(peaks)
        if teacher and args.cache_teacher and not hasattr(args, "mix"):
            models[1].unload()
        trained = [p for p in models[0].model.parameters() if p.requires_grad]
        parts["gradients"] = sum(p.nbytes for p in trained)
        parts["optimizer"] = 2 * parts["gradients"]
        reader = None if script == "sequence_level" or not teacher else models[1]
        return parts | _peak_of_step(models[0], reader, args, (length, written), live)


def _peak_of_step(
    student: LanguageModel, teacher: LanguageModel | None, args: Flags,
    shape: tuple[int, int], live: LiveBytes,
) -> dict[str, int]:  # fmt: skip
    """What a step holds after its forward pass and adds in its loss, and its peak."""
    rows, (length, written) = args.micro_batch_size or args.batch_size, shape
    ids = torch.zeros(rows, length, dtype=torch.long, device=student.device)
    batch = Batch(ids, *ids.new_empty(3, rows * min(written, length - 1)))
    objective = args.objective() if teacher and hasattr(args, "kl") else Objective(ce_weight=1.0)
    trained, logits = [p for p in student.model.parameters() if p.requires_grad], None
    moments = [torch.empty_like(p) for p in trained for _ in range(2)]  # the optimizer's state
    student.model.train()
    before = live.peak = live.now
    if teacher:
        head, size = teacher.head(), len(student.head().weight)
        if len(head.weight) != size:  # of cross_tokenizer.py
            head = Head(head.weight.new_empty(size, head.weight.shape[1]))
        with torch.no_grad():
            hidden = (
                teacher.hidden_states(batch) if teacher.loaded
                else head.weight.new_empty(len(batch.targets), head.weight.shape[1])
            )  # fmt: skip
        logits = Logits(hidden, head)
    loss, _ = distillation_loss(student.logits(batch), batch.targets, objective, logits)
    parts = {"kept for backward": live.now - before, "added in the loss": live.peak - live.now}
    torch.autograd.grad(loss, trained, allow_unused=True)  # freeze_unreached has not run
    del moments
    return parts | {"peak of training": live.peak}


def _peak_of_generation(model: LanguageModel, args: Flags, longest: int, live: LiveBytes) -> int:
    """Peak while a batch of the longest prompts is answered to the length limit."""
    rows, device = args.generation_batch_size, model.device
    ids = torch.zeros(rows, longest, dtype=torch.long, device=device)
    cache = DynamicCache(config=model.config.get_text_config())
    live.peak = live.now
    with model.evaluating():
        before = live.now
        hidden = model.backbone(input_ids=ids, cache=cache, use_cache=True).last_hidden_state[:, -1]
        held = live.now - before  # mostly keys and values
        block = min(BLOCK, args.max_new_tokens) * (device.type == "cuda")
        prefill, live.peak = live.peak + held * block // longest, live.now
        held += held * args.max_new_tokens // longest
        draws = torch.zeros(rows, dtype=torch.float64, device=device)
        sample(model.head().cast(model.compute_dtype).logits(hidden), draws, 1.0, args.top_p)
        return max(prefill, before + held + live.peak - live.now)


def compare_runs(paths: Iterable[str]) -> None:
    """`python common.py runs/*`: the scores of finished runs in one table and one picture."""
    files = ("results.json", "metrics.jsonl")
    runs = [Path(p) for p in paths if all((Path(p) / name).is_file() for name in files)]
    if not runs:
        print(f"error: no finished run (a directory with {' and '.join(files)})", file=sys.stderr)
        sys.exit(2)
    results = [json.loads((path / "results.json").read_text(encoding="utf-8")) for path in runs]
    columns = ["kl_to_teacher", "top1_agreement", "exact_match", "error_rate", "bits_per_byte"]
    names = pandas.Index([path.name for path in runs], name="after training")
    table = pandas.DataFrame([r["after"] for r in results], names).reindex(columns=columns)
    table["gap (exact)"] = [r["gap_recovered"].get("exact_match") for r in results]
    table["seconds"] = [f"{r['seconds']:.0f}" for r in results]
    print(table_text(table))
    picture = runs[0].parent / "comparison.png"
    draw_curves(runs, picture)
    if picture.exists():
        print(f"picture: {picture}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as of any command before `| head`
    compare_runs(sys.argv[1:])
