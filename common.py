"""What at least two of the four scripts need. Nothing here trains: each script has its own loop.

The sections follow the data: arguments; conversations; models; tokens and masks; text generation;
the teacher's text and hidden states; losses; evaluation; run directory. One line of a data set
takes these forms on its way to the loss:

    {"prompt": "banana"}        a line of data/train.jsonl
      load_conversations   ->   Conversation   messages, the data set's own response, references
      tokenize_prompts     ->   Prompt         the conversation with each model's prompt ids
      generate             ->   Completion     the teacher's answer (teacher_completions keeps it)
      make_examples        ->   Example        prompt and answer as ids, with target positions
      collate              ->   Batch          padded ids (B, L) and the N targets of B examples
      LanguageModel.hidden_states -> (N, d) -> distillation_loss -> nats

Letters in shapes: N target tokens, V vocabulary, d width, B examples, L length in tokens, K top
entries. Losses and divergences are in nats per target token.

    python common.py runs/*        compares finished runs: one table, and runs/comparison.png
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import shlex
import shutil
import signal
import sys
import time
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, broadcast_object_list, gather_object
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.chat_template_utils import render_jinja_template
from transformers.utils.hub import extract_commit_hash

STARTED = time.perf_counter()
DATA = Path(__file__).resolve().parent / "data"


class UsageError(Exception):
    """Wrong input. `launch` prints its message as one sentence and exits with code 2."""

    exit_code = 2


class TrainingError(UsageError):
    """Training failed although the input was right."""

    exit_code = 1


# ------------------------------------------------------------------------------------ arguments


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field that `HfArgumentParser` turns into a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclass
class CommonArguments:
    """The flags that mean the same thing in every script."""

    teacher: str = flag(str(DATA / "teacher"), "teacher model: a directory or a hub id")
    student: str = flag(str(DATA / "student"), "student model: a directory or a hub id")
    revision: str = flag("main", "the student's revision, for a hub id")
    teacher_revision: str = flag("main", "the teacher's revision, for a hub id")
    chat_template: str | None = flag(None, "a Jinja file, for models without a chat template")

    dataset: str = flag(str(DATA / "train.jsonl"), "training prompts: a file, directory or hub id")
    dataset_config: str | None = flag(None, "configuration of a hub data set")
    dataset_split: str = flag("train", "split of a hub data set or directory")
    max_rows: int = flag(0, "use only the first N rows of --dataset (0: all)")
    eval_dataset: str | None = flag(
        None,
        "held-out conversations; default: the embedded ones for the embedded data set, else "
        "--eval-size rows of --dataset, chosen by --seed and not trained on",
    )
    eval_size: int = flag(
        0, "rows to evaluate on (0: 1000, or a tenth of --dataset if held out of it, at most 1000)"
    )
    completions: Literal["teacher", "dataset"] = flag(
        "teacher", "the text to learn from: written by the teacher, or the data set's responses"
    )
    max_length: int = flag(512, "tokens in an example, prompt and response together")
    max_new_tokens: int = flag(128, "tokens generated in a response")

    temperature: float = flag(1.0, "softmax temperature of the distillation loss")
    sampling_temperature: float = flag(1.0, "temperature of the teacher's text (0: greedy)")
    top_p: float = flag(1.0, "sample the teacher's text from this nucleus (1: whole vocabulary)")
    generation_batch_size: int = flag(256, "responses generated at a time")

    epochs: float = flag(3.0, "passes over the training prompts")
    max_steps: int = flag(-1, "optimizer steps; overrides --epochs")
    batch_size: int = flag(64, "examples in an optimizer step, over all processes")
    micro_batch_size: int = flag(16, "examples in a process's backward pass (0: all its share)")
    learning_rate: float = flag(2e-3, "peak of the schedule (linear warm-up, cosine to zero)")
    weight_decay: float = flag(0.01, "decoupled weight decay, on matrices only")
    warmup_steps: int = flag(30, "steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this global norm")
    seed: int = flag(0, "determines data order, held-out rows and every sampled token")
    dtype: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "the student computes in this (weights stay float32); auto: bfloat16 on a GPU"
    )
    teacher_dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "the teacher's weights; auto: bfloat16 on a GPU, float32 on a CPU"
    )
    attn_implementation: str | None = flag(None, "sdpa, eager, flash_attention_2, ...")
    gradient_checkpointing: bool = flag(False, "recompute activations: less memory, slower")
    lora_rank: int = flag(0, "train LoRA adapters of this rank instead of all weights (0: off)")

    output_dir: str | None = flag(None, "default: runs/<script>-<flags>, numbered if taken")
    overwrite: bool = flag(False, "replace an earlier run in --output-dir")
    resume: bool = flag(False, "continue the run in --output-dir from its newest checkpoint")
    save_steps: int = flag(200, "steps between checkpoints (0: only at the end)")
    save_total_limit: int = flag(2, "checkpoints kept (0: all)")
    eval_steps: int = flag(200, "steps between evaluations while training (0: none)")
    logging_steps: int = flag(10, "steps between writes to metrics.jsonl")
    report_to: str = flag("none", "send metrics to a tracker too: tensorboard, wandb, ...")
    cache_dir: str = flag("runs/cache", "where the teacher's text is kept for later runs")
    cache_teacher: bool = flag(
        True, "keep the teacher's final hidden states in --cache-dir too: it reads each text once"
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows one spelling of each flag with its default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = [s for s in action.option_strings if "_" not in s]
        metavar = self._format_args(action, "N" if action.type in (int, float) else "X")
        switch = not action.option_strings or action.const is True or action.nargs == 0
        return ", ".join(spellings) + ("" if switch else f" {metavar}")


class _Parser(HfArgumentParser):
    """Reports a wrong command line in one sentence, with exit code 2."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def parse_arguments(
    kind: type[CommonArguments], description: str, argv: Sequence[str] | None = None
) -> Any:
    """Command line to a validated dataclass. Exits with code 2 on an unknown or invalid flag."""
    parser = _Parser(
        kind, description=description, formatter_class=_HelpFormatter, allow_abbrev=False
    )
    args, unknown = parser.parse_args_into_dataclasses(
        argv, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown argument {unknown[0]}")
    try:
        check_arguments(args)
    except UsageError as problem:
        parser.error(str(problem))
    return args


def check_arguments(args: CommonArguments) -> None:
    """Refuse values that no run could use. A script checks the ranges of its own flags itself."""
    positive = {"temperature", "batch_size", "learning_rate", "max_grad_norm", "max_length",
                "max_new_tokens", "generation_batch_size", "logging_steps"}  # fmt: skip
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name == "max_steps":
            continue
        if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            allowed = "above 0" if name in positive else "0 or more"
            raise UsageError(f"{as_flag(name)} must be a finite number, {allowed}, not {value}")
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p must lie in (0, 1], not {args.top_p}")
    if args.resume and args.overwrite:
        raise UsageError("--resume continues a run and --overwrite removes it: choose one")
    if args.resume and not args.output_dir:
        raise UsageError("--resume needs --output-dir, the directory of the run to continue")
    if args.max_steps <= 0 and args.epochs == 0:
        raise UsageError("nothing to train: --epochs is 0 and --max-steps is not given")
    if args.lora_rank and not importlib.util.find_spec("peft"):
        raise UsageError('--lora-rank needs peft: pip install -e ".[lora]"')
    if args.report_to not in {"none", *LoggerType.list()} - {"all"}:
        raise UsageError(f"--report-to {args.report_to}: accelerate knows no such tracker")
    if args.report_to not in {"none", *map(str, get_available_trackers())}:
        extra = '-e ".[trackers]"' if args.report_to == "tensorboard" else args.report_to
        raise UsageError(f"--report-to {args.report_to} is not installed: pip install {extra}")
    if args.chat_template and not Path(args.chat_template).is_file():
        raise UsageError(f"--chat-template: no file {args.chat_template}")


def launch(main: Callable[[Any], None], kind: type[CommonArguments], description: str) -> None:
    """Entry point of a script: parse and run; errors of the user or the disk are one sentence."""
    args = parse_arguments(kind, description)
    try:
        main(args)
    except UsageError as problem:
        exit_with(problem, problem.exit_code)
    except OSError as problem:
        place = problem.filename or f"{args.output_dir or 'runs'} or {args.cache_dir}"
        exit_with(f"cannot read or write {place}: {problem.strerror or first_line(problem)}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    # Not inside `main`: if DDP's reducer holds the last reference to the process group, it joins
    # the group's thread while holding the interpreter lock that the thread may be waiting for.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def exit_with(problem: Any, code: int = 2) -> None:
    """End the process with one sentence on standard error."""
    print(f"error: {problem}", file=sys.stderr)
    sys.exit(code)


def first_line(problem: Exception) -> str:
    """The first line of an exception's message; libraries append paragraphs of advice."""
    text = str(problem.args[0] if problem.args else problem).strip()
    return (text.splitlines() or [type(problem).__name__])[0][:300]


def as_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def changed_flags(args: CommonArguments) -> dict[str, Any]:
    """The arguments that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    return {name: value for name, value in vars(args).items() if value != defaults[name]}


def command_line(args: CommonArguments, without: set[str]) -> str:
    """The changed flags as part of a shell command."""
    changed = {name: value for name, value in changed_flags(args).items() if name not in without}
    return shlex.join(word for name, v in changed.items() for word in (as_flag(name), str(v)))


# -------------------------------------------------------------------------------- conversations

Messages = list[dict[str, str]]


@dataclass
class Conversation:
    """One row of a data set."""

    messages: Messages  # up to the turn to be answered
    response: str | None  # the data set's own answer, if it has one
    references: list[str]  # right answers
    source: str  # file and line, for messages to the user


def load_conversations(
    source: str, config: str | None = None, split: str = "train", max_rows: int = 0
) -> list[Conversation]:
    """Rows of a JSON, JSON Lines, csv or Parquet file, a directory or a hub data set.

    Raises `UsageError` that names the first unusable row and what it lacks.
    """
    kind = Path(source.removesuffix(".gz")).suffix
    if kind in {".json", ".jsonl", ".ndjson"}:
        records = _json_records(source)
    elif kind == ".csv":
        records = _csv_records(source)
    else:
        records = _dataset_records(source, config, split)
    conversations = []
    for place, record in records:
        if max_rows and len(conversations) == max_rows:
            break
        try:
            conversations.append(_as_conversation(record, place))
        except ValueError as problem:
            raise UsageError(f"{place}: {problem}") from None
    if not conversations:
        raise UsageError(f"{source} holds no rows")
    return conversations


def _read_text(source: str) -> str:
    try:
        raw = Path(source).read_bytes()
        raw = gzip.decompress(raw) if source.endswith(".gz") else raw
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error) as problem:  # the last two: damaged gzip data
        reason = getattr(problem, "strerror", None) or problem
        raise UsageError(f"cannot read {source}: {reason}") from None
    except UnicodeDecodeError as problem:
        line = raw[: problem.start].count(b"\n") + 1
        raise UsageError(f"{source}:{line}: not UTF-8") from None


def _json_records(source: str) -> Iterator[tuple[str, Any]]:
    """The objects of a JSON array, or one from each line, whatever the file is called."""
    text = _read_text(source)
    is_array = text.lstrip().startswith("[")
    for number, part in [(1, text)] if is_array else enumerate(text.split("\n"), 1):
        try:
            record = json.loads(part) if part.strip() else None
        except (ValueError, RecursionError) as problem:
            line = number + getattr(problem, "lineno", 1) - 1
            reason = getattr(problem, "msg", "nested too deeply")
            raise UsageError(f"{source}:{line}: not JSON: {reason}") from None
        if is_array:
            yield from ((f"{source}: row {i}", item) for i, item in enumerate(record, 1))
        elif part.strip():
            yield f"{source}:{number}", record


def _csv_records(source: str) -> Iterator[tuple[str, Any]]:
    """Every cell is text: a reader that guesses types would turn the word `null` into None."""
    reader = csv.DictReader(io.StringIO(_read_text(source), newline=""))
    for record in reader:
        cells = {k: v for k, v in record.items() if k is not None and v not in (None, "")}
        yield f"{source}:{reader.line_num}", cells


def _dataset_records(source: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # takes seconds to import, and the embedded default does not need it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        if Path(source).suffix == ".parquet":
            data = datasets.load_dataset("parquet", data_files=source, split="train")
        else:
            data = datasets.load_dataset(source, config, split=split)
    except Exception as problem:  # `datasets` lets errors of its many back ends through
        raise UsageError(f"cannot load the data set {source}: {first_line(problem)}") from None
    yield from ((f"{source}: row {i}", record) for i, record in enumerate(data, 1))


def _as_conversation(record: Any, source: str) -> Conversation:
    """A record in any of the accepted forms (README, "Your own data"); `ValueError` otherwise."""
    if not isinstance(record, dict):
        raise ValueError("a row must be an object with named columns")
    record = {key: value for key, value in record.items() if value is not None}
    turns = record.get("messages", record.get("conversations"))
    if turns is not None:
        if not isinstance(turns, list):
            raise ValueError("a conversation must be a list of turns")
        messages = [_as_message(turn) for turn in turns]
    elif "instruction" in record:
        parts = [_as_text(record[k]) for k in ("instruction", "input") if record.get(k)]
        messages = [{"role": "user", "content": "\n\n".join(parts)}]
    elif isinstance(record.get("prompt"), list):
        messages = [_as_message(turn) for turn in record["prompt"]]
    elif "prompt" in record:
        messages = [{"role": "user", "content": _as_text(record["prompt"])}]
    else:
        raise ValueError(
            "none of the columns messages, conversations, prompt, instruction is there and not null"
        )
    answer = next((record[k] for k in ("completion", "response", "output") if k in record), None)
    if isinstance(answer, list) and len(answer) == 1:
        answer = _as_message(answer[0])["content"]
    if turns is not None and messages and messages[-1]["role"] == "assistant":
        answer = messages.pop()["content"]
    if not messages:
        raise ValueError("there is no turn to answer")
    if messages[-1]["role"] == "assistant":
        raise ValueError("two assistant turns follow each other")
    if answer is not None:
        _as_text(answer)
    references = record.get("references", [record["reference"]] if "reference" in record else [])
    if not references and answer is not None:
        references = [answer]
    if not isinstance(references, list) or not all(isinstance(r, str) for r in references):
        raise ValueError("references must be a list of strings")
    return Conversation(messages, answer, references, source)


def _as_message(turn: Any) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise ValueError("a turn must be an object with role and content")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    role = {"human": "user", "gpt": "assistant"}.get(role, role)
    if role is None:
        raise ValueError("a turn has no role")
    if content is None:
        raise ValueError(f"the content of a {role} turn is null or missing")
    return {"role": role, "content": _as_text(content)}


def _as_text(value: Any) -> str:
    """A string that can be encoded; JSON can spell half of a surrogate pair, which cannot."""
    if not isinstance(value, str):
        raise ValueError(f"text must be a string, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("text holds half of a surrogate pair") from None
    return value


def load_data(args: CommonArguments) -> tuple[list[Conversation], list[Conversation]]:
    """Training and evaluation conversations, which share no row."""
    train = load_conversations(args.dataset, args.dataset_config, args.dataset_split, args.max_rows)
    unanswered = next((c for c in train if c.response is None), None)
    if args.completions == "dataset" and unanswered:
        raise UsageError(
            f"{unanswered.source}: no assistant turn at the end, which --completions dataset "
            "would train on"
        )
    eval_dataset = args.eval_dataset
    if eval_dataset is None and args.dataset == CommonArguments.dataset:
        eval_dataset = str(DATA / "eval.jsonl")
    if eval_dataset is not None:
        return train, load_conversations(eval_dataset, max_rows=args.eval_size or 1000)
    size = args.eval_size or min(1000, math.ceil(len(train) / 10))
    if size >= len(train):
        raise UsageError(
            f"--eval-size {size} leaves nothing of the {len(train)} rows of {args.dataset}"
        )
    order = torch.randperm(len(train), generator=generator_for(args.seed, "held out")).tolist()
    held_out = [train[i] for i in sorted(order[:size])]
    return [train[i] for i in sorted(order[size:])], held_out


def generator_for(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A generator that depends on its arguments only, so that resuming restores no state."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# --------------------------------------------------------------------------------------- models


class Head(NamedTuple):
    """The output layer: logits = softcap(scale · (hidden @ weightᵀ + bias))."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def cast(self, dtype: torch.dtype, device: torch.device) -> Head:
        """The weight in the dtype that `matmul_fp32` uses for hidden states of `dtype`."""
        if device.type != "cuda":  # no half-precision product with a float32 result there
            dtype = torch.promote_types(
                dtype, torch.promote_types(torch.float32, self.weight.dtype)
            )
        return self._replace(weight=self.weight.to(dtype))

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states (n, d) to logits (n, V) in float32 or wider."""
        logits = matmul_fp32(hidden, self.weight)
        logits = logits if self.bias is None else logits + self.bias
        logits = logits if self.scale == 1.0 else logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def backward(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """The gradient (n, V) at the logits to that before scale and softcap, which needs `logits`."""
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.scale == 1.0 else gradient * self.scale


def matmul_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ bᵀ`, accumulated and returned in float32 (float64 if given float64).

    Rounding logits to bfloat16 costs the divergence's gradient several per cent.
    """
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return F.linear(a.to(wide), b.to(wide))


@dataclass
class LanguageModel:
    """A causal language model with its tokenizer. Its weights are loaded when first used."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    config: PreTrainedConfig
    end_ids: list[int]  # every id that ends a response, first the one to finish a response with
    compute_dtype: torch.dtype
    device: torch.device
    digest: str  # identifies weights, configuration and tokenizer
    load: Callable[[LanguageModel], PreTrainedModel]
    states_dir: Path | None = None  # where its head and hidden states are cached, if they are
    cached_head: Head | None = None  # stands in for the model's own while that is not loaded
    adapters: Any = None  # peft's wrapper of `model`, if LoRA is trained

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        return self.load(self)

    @property
    def loaded(self) -> bool:
        return "model" in vars(self)

    @functools.cached_property
    def vocabulary(self) -> int:
        """The number of ids that are tokens; rows of the head beyond them are padding."""
        return max(self.tokenizer.get_vocab().values()) + 1

    @property
    def max_positions(self) -> int | None:
        """The longest sequence that the configuration allows; None if it sets no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def head(self) -> Head:
        """The output layer without padding rows."""
        if not self.loaded:
            return self.cached_head
        layer = self.model.get_output_embeddings()
        return self._as_head(layer.weight, getattr(layer, "bias", None))

    def _as_head(self, weight: Tensor, bias: Tensor | None) -> Head:
        if len(weight) > self.vocabulary:
            weight, bias = (
                weight[: self.vocabulary],
                None if bias is None else bias[: self.vocabulary],
            )
        config = self.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0  # Cohere
        scale /= getattr(config, "logits_scaling", None) or 1.0  # Granite
        return Head(weight, bias, scale, getattr(config, "final_logit_softcapping", None))  # Gemma

    def save_head(self) -> None:
        """Cache the head, so that later runs need not load the model for it."""
        path = self.states_dir / "head.safetensors"
        if not path.exists():
            head = self.head()
            tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
            save_tensors({name: t.detach().cpu() for name, t in tensors.items()}, path)

    def read_head(self) -> bool:
        """Use the cached head; whether there is one."""
        path = self.states_dir / "head.safetensors"
        if path.exists():
            tensors = read_tensors(path)
            tensors = {name: tensor.to(self.device) for name, tensor in tensors.items()}
            self.cached_head = self._as_head(tensors["weight"], tensors.get("bias"))
        return path.exists()

    def unload(self) -> None:
        """Free the memory of everything but the head; a later use loads the model again."""
        head = self.head()
        bias = None if head.bias is None else head.bias.detach()
        self.cached_head = head._replace(weight=head.weight.detach(), bias=bias)
        vars(self).pop("model", None)

    def backbone(self, **inputs: Any) -> Any:
        """The model without its head, computing in `compute_dtype`."""
        mixed = self.compute_dtype != self.model.dtype
        with torch.autocast(self.device.type, self.compute_dtype, enabled=mixed):
            return self.model.base_model(**inputs)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The final hidden states (N, d) that predict the N targets: one position before each.

        No attention mask: padding is on the right, where a causal model cannot look, and attention
        without a mask takes its fastest path.
        """
        hidden = self.backbone(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return hidden[batch.example, batch.position]

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode without gradients. Gradient checkpointing, which disables the key/value cache,
        is off in eval mode."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(training)

    def complete(self, prompts: Sequence[Prompt], args: Any, **sampling: Any) -> list[Completion]:
        """Answers to the prompts: see `teacher_completions`."""
        return teacher_completions(self, prompts, args, **sampling)


class Pair(NamedTuple):
    """Student and teacher, each with its own tokenizer and chat template."""

    student: LanguageModel
    teacher: Any  # a LanguageModel, or sequence_level.ApiTeacher, which only completes prompts

    @property
    def has_weights(self) -> bool:
        """Whether the teacher is a model in this process rather than behind an API."""
        return isinstance(self.teacher, LanguageModel)

    @property
    def same_vocabulary(self) -> bool:
        """Whether equal ids are equal tokens."""
        vocabulary = self.student.tokenizer.get_vocab()
        return self.has_weights and vocabulary == self.teacher.tokenizer.get_vocab()

    def check_same_vocabulary(self) -> None:
        """Refuse two vocabularies: divergences token by token compare ids."""
        ours, theirs = (model.tokenizer.get_vocab() for model in self)
        different = sorted({t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)})
        if different:
            raise UsageError(
                f"the vocabularies of {self.student.name} and {self.teacher.name} differ in "
                f"{len(different)} tokens (one is {different[0]!r}): use cross_tokenizer.py"
            )


def end_of_turn_ids(
    tokenizer: PreTrainedTokenizerBase, *configs: PreTrainedConfig | GenerationConfig | None
) -> list[int]:
    """Every id that ends a response, without repetition: the special token that the chat template
    prints after an answer, then what tokenizer and model declare."""
    turns = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
    after = tokenize(tokenizer, render(tokenizer, turns).rpartition("answer")[2])[0]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [i for i in after if i in special][:1]
    for end in (tokenizer.eos_token_id, *(getattr(c, "eos_token_id", None) for c in configs)):
        ids += end if isinstance(end, list) else [] if end is None else [end]
    return list(dict.fromkeys(ids))


def load_tokenizer(name: str, revision: str, template_file: str | None) -> PreTrainedTokenizerBase:
    """A fast tokenizer with its chat template, or the one in `template_file` if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as problem:
        raise UsageError(f"no usable tokenizer in {name}: {first_line(problem)}") from None
    if not tokenizer.is_fast:
        raise UsageError(f"{name} has no fast tokenizer; character offsets are needed for masks")
    if not tokenizer.chat_template and template_file:
        tokenizer.chat_template = _read_text(template_file)
    return tokenizer


def open_model(
    args: CommonArguments, device: torch.device, role: str, template: str | None = None
) -> LanguageModel:
    """The student or the teacher, whichever `role` names, its weights not loaded yet.

    A base model without a chat template takes `template`.
    """
    is_teacher = role == "teacher"
    name, revision = getattr(args, role), args.teacher_revision if is_teacher else args.revision
    dtype = args.teacher_dtype if is_teacher else args.dtype
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    tokenizer = load_tokenizer(name, revision, args.chat_template)
    tokenizer.chat_template = tokenizer.chat_template or template
    if not tokenizer.chat_template:
        raise UsageError(f"{name} has no chat template; give one with --chat-template FILE")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"{name} holds no model: there is no config.json in it")
    generation_config = None
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        digest = digest_of_model(name, revision)
        with contextlib.suppress(OSError):  # most models have this file, none needs it
            generation_config = GenerationConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError, KeyError) as problem:
        raise UsageError(f"cannot load the model {name}: {first_line(problem)}") from None
    ends = end_of_turn_ids(tokenizer, config.get_text_config(), generation_config)

    def load(model: LanguageModel) -> PreTrainedModel:
        weights = load_weights(model, args, revision, dtype if is_teacher else "float32")
        return weights.requires_grad_(not is_teacher)

    model = LanguageModel(
        name, tokenizer, config, ends, getattr(torch, dtype), device, digest, load
    )
    if not ends:
        raise UsageError(f"{name}: neither its chat template nor its tokenizer has an end token")
    if model.max_positions and args.max_length > model.max_positions:
        raise UsageError(f"--max-length {args.max_length}: {name} stops at {model.max_positions}")
    return model


def load_weights(
    model: LanguageModel, args: CommonArguments, revision: str, dtype: str
) -> PreTrainedModel:
    """The weights on the model's device, in eval mode; refuses missing ones and unknown heads."""
    try:
        weights, report = AutoModelForCausalLM.from_pretrained(
            model.name,
            revision=revision,
            dtype=dtype,
            attn_implementation=args.attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported, and refused below by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError, ImportError, RuntimeError) as problem:
        raise UsageError(f"cannot load the model {model.name}: {first_line(problem)}") from None
    random = sorted(report["missing_keys"]) + [key for key, *_ in report["mismatched_keys"]]
    if random:
        raise UsageError(
            f"{model.name} lacks {len(random)} tensors of the shape that its config.json asks for, "
            f"which would be random; the first is {random[0]}"
        )
    weights = weights.to(model.device).eval()
    check_head(dataclasses.replace(model, load=lambda _: weights))
    return weights


def load_student(
    args: CommonArguments, device: torch.device, template: str | None = None
) -> LanguageModel:
    """The student with float32 weights, prepared for LoRA or checkpointing if asked."""
    student = open_model(args, device, "student", template)
    if args.lora_rank:
        # LoRA (Hu et al. 2021) on every linear layer but the head; all else is frozen. The layers
        # are replaced in place, so that backbone and head keep their places in the model.
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        config = LoraConfig(
            r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules="all-linear"
        )
        student.adapters = LoraModel(student.model, config, "default")
    if args.gradient_checkpointing:
        if not student.model.supports_gradient_checkpointing:
            raise UsageError(f"--gradient-checkpointing: {student.name} does not support it")
        student.model.activation_checkpointing_enable()
    return student


def load_pair(args: CommonArguments, device: torch.device) -> Pair:
    """Student and teacher; the teacher's weights are loaded only if its head is not cached."""
    teacher = open_model(args, device, "teacher")
    student = load_student(args, device, teacher.tokenizer.chat_template)
    if args.cache_teacher:
        dtype = str(teacher.compute_dtype).removeprefix("torch.")
        teacher.states_dir = Path(args.cache_dir) / "states" / f"{teacher.digest}-{dtype}"
    # Loaded here rather than at the first use, so that wrong weights are an early error.
    loaded = [student.model]
    if not (teacher.states_dir and teacher.read_head()):
        loaded.append(teacher.model)
    return Pair(student, teacher)


def check_head(model: LanguageModel) -> None:
    """Refuse a model whose logits are not those that `Head` computes from its hidden states."""
    layer = model.model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise UsageError(f"{model.name} has no output embeddings, so its head cannot be chunked")
    if len(layer.weight) < model.vocabulary:
        raise UsageError(
            f"{model.name}: the tokenizer knows {model.vocabulary} ids, the model {len(layer.weight)}"
        )
    ids = torch.arange(min(8, model.vocabulary), device=model.device)[None]
    with torch.no_grad():
        expected = model.model(input_ids=ids, use_cache=False).logits[0, :, : model.vocabulary]
        logits = model.head().logits(model.model.base_model(ids, use_cache=False)[0][0])
    tolerance = 1e-4 if model.model.dtype == torch.float32 else 3e-2
    difference = (expected - logits).abs().max() / expected.abs().max().clamp_min(1e-6)
    if not difference <= tolerance:
        raise UsageError(
            f"{model.name} ({type(model.model).__name__}) changes its logits in a way that this "
            f"suite does not know (relative difference {difference:.2g})"
        )


def digest_of_model(name: str, revision: str) -> str:
    """Identifies weights, configuration and tokenizer, without reading the weights.

    For a hub model that is its commit; for a directory the content of its small files, and size and
    time of change of its weight files, because hashing those takes longer than loading them.
    """
    hasher = hashlib.sha256()
    if not Path(name).is_dir():
        commit = extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
        hasher.update(f"{name}@{commit}".encode())
        return hasher.hexdigest()[:20]
    for file in sorted(Path(name).iterdir()):
        if file.suffix == ".safetensors":
            hasher.update(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}".encode())
        elif file.suffix in {".json", ".jinja", ".model", ".txt"}:
            hasher.update(file.name.encode() + file.read_bytes())
    return hasher.hexdigest()[:20]


# ----------------------------------------------------------------------------- tokens and masks

# Llama 3.2's template prints today's date, with which tomorrow's prompts would not be cached.
FIXED_DATE = "26 Jul 2024"
_FIXED_CLOCK = "{% macro strftime_now(format) %}" + FIXED_DATE + "{% endmacro %}"

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


class Completion(NamedTuple):
    """An answer that a model wrote."""

    text: str  # without its end-of-turn token
    finished: bool  # False: cut by the length limit
    length: int  # in tokens, the end-of-turn token included
    ids: list[int] | None  # None from an API, which gives only text


@dataclass(frozen=True)
class Example:
    """A prompt with its answer as each model reads it.

    With one vocabulary the targets' ids are the same for both models; otherwise their text is.
    """

    index: int  # identifies the example in its list
    prompt: Prompt
    text: str  # the answer
    student: Tokens
    teacher: Tokens


class Batch(NamedTuple):
    """B examples padded on the right, and their N targets in order."""

    input_ids: Tensor  # (B, L)
    example: Tensor  # (N,) which of the B examples
    position: Tensor  # (N,) the position before each target, whose hidden state predicts it
    targets: Tensor  # (N,)


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, prompt: bool = False) -> str:
    """The conversation in the model's chat template; `prompt` adds the cue for an answer."""
    return _render(tokenizer, messages, add_generation_prompt=prompt)[0]


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, **options: bool
) -> tuple[str, Spans]:
    """The text, and the spans of it that `{% generation %}` marks if they are asked for."""
    try:
        texts, spans = render_jinja_template(
            [messages],
            chat_template=_FIXED_CLOCK + tokenizer.chat_template,
            date_string=FIXED_DATE,
            **options,
            **tokenizer.special_tokens_map,
        )
    except Exception as problem:  # a template may raise whatever it likes
        raise UsageError(f"the chat template refuses a conversation: {problem}") from None
    return texts[0], spans[0] if spans else []


def assistant_spans(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> tuple[str, Spans]:
    """The rendered conversation, and the character spans in it that the assistant wrote.

    They come from the template's `{% generation %}` marks, else from rendering every prefix. Some
    templates rewrite earlier turns (they drop reasoning, for example); then a prefix rendered alone
    is not a prefix of the whole, what the model would have read is unknown, and it is an error.
    """
    if "generation" in tokenizer.chat_template.replace("add_generation_prompt", ""):
        text, spans = _render(tokenizer, messages, return_assistant_tokens_mask=True)
        if spans:
            return text, spans
    text, spans = render(tokenizer, messages), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render(tokenizer, messages[:i], prompt=True)
            after = render(tokenizer, messages[: i + 1])
            if not (text.startswith(before) and text.startswith(after) and before < after):
                raise UsageError(
                    f"the chat template rewrites earlier turns, so assistant turn {i + 1} cannot "
                    "be located: use --completions teacher, or a template with generation marks"
                )
            spans.append((len(before), len(after)))
    return text, spans


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], Spans]:
    """Ids and character offsets of rendered text, which contains its special tokens already."""
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return out["input_ids"], out["offset_mapping"]


def tokenize_conversation(model: LanguageModel, messages: Messages) -> Tokens:
    """All of the conversation; every assistant turn is a target, its end-of-turn token included."""
    text, spans = assistant_spans(model.tokenizer, messages)
    ids, offsets = tokenize(model.tokenizer, text)
    # Some tokenizers leave leading spaces out of offsets, so a token begins where the last ended.
    ends_before = [0, *(b for _, b in offsets[:-1])]
    begins = [min(a, last) for (a, _), last in zip(offsets, ends_before, strict=True)]
    targets = []
    for start, stop in spans:
        inside = [i for i, begin in enumerate(begins) if start <= begin < stop]
        ends = [i for i in inside if ids[i] in model.end_ids]
        if ends:  # white space that a template prints after the end of a turn is no target
            inside = [i for i in inside if i <= ends[-1]]
        elif inside and inside[-1] + 1 < len(ids) and ids[inside[-1] + 1] in model.end_ids:
            inside.append(inside[-1] + 1)
        targets += inside
    return Tokens(ids, [i for i in targets if i > 0])


def tokenize_prompts(conversations: list[Conversation], pair: Pair, limit: int) -> list[Prompt]:
    """Each conversation up to and including the cue for an answer, in both models' templates.

    Prompts of `limit` tokens or more, which leave no room for an answer, are left out and counted.
    For an API teacher, which tokenises for itself, the student's ids stand in.
    """

    def ids_for(model: LanguageModel) -> list[list[int]]:
        texts = []
        for c in conversations:
            try:
                texts.append(render(model.tokenizer, c.messages, prompt=True))
            except UsageError as problem:
                raise UsageError(f"{c.source}: {problem}") from None
        return model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    ours = theirs = ids_for(pair.student)
    if pair.has_weights:
        templates = {model.tokenizer.chat_template for model in pair}
        if len(templates) > 1 or not pair.same_vocabulary:
            theirs = ids_for(pair.teacher)
    prompts = [
        Prompt(*parts)
        for parts in zip(conversations, ours, theirs, strict=True)
        if 0 < len(parts[1]) < limit and 0 < len(parts[2]) < limit
    ]
    total = len(conversations)
    if not prompts:
        raise UsageError(f"none of the {total} prompts is shorter than --max-length {limit}")
    if len(prompts) < total:
        PartialState().print(
            f"{total - len(prompts)} of {total} prompts left out, as they do not fit into "
            f"--max-length {limit}"
        )
    return prompts


def make_examples(prompts: list[Prompt], pair: Pair, args: CommonArguments) -> list[Example]:
    """The training examples, on the text that --completions names; says what was cut."""
    if args.completions == "teacher":
        completions = pair.teacher.complete(
            prompts, args, temperature=args.sampling_temperature, top_p=args.top_p,
            purpose="training text",
        )  # fmt: skip
        examples = completion_examples(prompts, completions, pair, args.max_length)
        cut = sum(not c.finished for c in completions)
    else:
        examples, cut = dataset_examples(prompts, pair, args.max_length)
    tokens = sum(len(e.student.targets) for e in examples)
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
    shared = pair.same_vocabulary
    if not shared:
        ours = tokenize_completions(pair.student, prompts, completions)
    examples = []
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        response = completion.ids if shared else ours[i]
        sides = [_with_response(prompt.student, response)] * 2
        if pair.has_weights:
            sides[1] = _with_response(prompt.teacher, completion.ids)
        examples.append(Example(i, prompt, completion.text, *_cut(sides, max_length, shared)))
    return examples


def tokenize_completions(
    model: LanguageModel, prompts: Sequence[Prompt], completions: Sequence[Completion]
) -> list[list[int]]:
    """The model's own response ids for text that another model wrote.

    A text is tokenised after its prompt, because SentencePiece marks where text begins. If one
    token would span the boundary between prompt and answer, the answer is tokenised by itself,
    because at generation time the model has read exactly the prompt's own tokens.
    """
    rendered = [render(model.tokenizer, p.conversation.messages, prompt=True) for p in prompts]
    texts = [before + c.text for before, c in zip(rendered, completions, strict=True)]
    encode = functools.partial(model.tokenizer, add_special_tokens=False, verbose=False)
    responses = []
    for prompt, completion, ids in zip(prompts, completions, encode(texts).input_ids, strict=True):
        start = len(prompt.student)
        response = ids[start:]
        if ids[:start] != prompt.student or (completion.text and not response):
            response = encode(completion.text).input_ids
        responses.append(response + model.end_ids[:1] * completion.finished)
    return responses


def dataset_examples(
    prompts: list[Prompt], pair: Pair, max_length: int
) -> tuple[list[Example], int]:
    """Examples on the data set's own responses, and how many of those were cut to fit."""
    examples, cut, shared = [], 0, pair.same_vocabulary or not pair.has_weights
    for i, prompt in enumerate(prompts):
        conversation = prompt.conversation
        turns = [*conversation.messages, {"role": "assistant", "content": conversation.response}]
        try:
            sides = [tokenize_conversation(pair.student, turns)] * 2
            if prompt.student is not prompt.teacher:  # templates or vocabularies differ
                sides[1] = tokenize_conversation(pair.teacher, turns)
        except UsageError as problem:
            raise UsageError(f"{conversation.source}: {problem}") from None
        answers = [[side.ids[i] for i in side.targets] for side in sides]
        if shared and answers[0] != answers[1]:
            raise UsageError(
                f"{conversation.source}: the templates of the two models split the response "
                "differently: use --completions teacher"
            )
        ours, theirs = _cut(sides, max_length, shared)
        cut += len(ours.targets) < len(answers[0])
        if ours.targets:
            examples.append(Example(i, prompt, conversation.response, ours, theirs))
    return examples, cut


def _with_response(prompt_ids: list[int], response_ids: list[int]) -> Tokens:
    ids = prompt_ids + response_ids
    return Tokens(ids, list(range(len(prompt_ids), len(ids))))


def _cut(sides: Sequence[Tokens], max_length: int, same_targets: bool) -> list[Tokens]:
    """Both sequences without what lies beyond `max_length`; with one vocabulary they keep the same
    targets, as many as the longer prompt leaves room for."""
    counts = [sum(i < max_length for i in side.targets) for side in sides]
    counts = [min(counts)] * 2 if same_targets else counts
    return [
        Tokens(ids[:max_length], targets[:n])
        for (ids, targets), n in zip(sides, counts, strict=True)
    ]


def collate(examples: Sequence[Tokens], device: torch.device, pad_id: int = 0) -> Batch:
    """Pad on the right and list the targets, example by example."""
    length = max((len(e.ids) for e in examples), default=1)
    ids = torch.full((max(len(examples), 1), length), pad_id)  # (B, L)
    for i, example in enumerate(examples):
        ids[i, : len(example.ids)] = torch.tensor(example.ids)
    counts = torch.tensor([len(e.targets) for e in examples], dtype=torch.long)
    of_target = torch.repeat_interleave(torch.arange(len(examples)), counts)  # (N,)
    positions = torch.tensor([i for e in examples for i in e.targets], dtype=torch.long)  # (N,)
    parts = [ids, of_target, positions - 1, ids[of_target, positions]]
    if device.type == "cuda":
        parts = [p.pin_memory().to(device, non_blocking=True) for p in parts]
    return Batch(*parts)


def global_batch(items: Sequence[Item], args: CommonArguments, step: int) -> list[Item]:
    """What a step learns from: a function of (seed, step), each epoch in another order."""
    places = range(step * args.batch_size, (step + 1) * args.batch_size)
    size = len(items)
    return [items[_order(args.seed, place // size, size)[place % size]] for place in places]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    return torch.randperm(size, generator=generator_for(seed, "order", epoch)).tolist()


def split_micro_batches(
    batch: list[Example], args: CommonArguments
) -> tuple[list[list[Example]], int]:
    """This process's micro-batches of a global batch, and the target tokens of all of it (1 if it
    has none).

    Micro-batches hold examples of similar length, to carry little padding; every process gets
    equally many of them, and the last one may be empty.
    """
    state = PartialState()
    tokens = sum(len(e.student.targets) for e in batch)
    batch = sorted(batch, key=lambda e: len(e.student.ids))
    share = math.ceil(len(batch) / state.num_processes)
    size = min(args.micro_batch_size or share, share)
    mine = batch[state.process_index :: state.num_processes]
    return [mine[i : i + size] for i in range(0, share, size)], max(tokens, 1)


def length_batches(
    examples: Iterable[Example], length: Callable[[Example], int], tokens: int = 16384
) -> list[list[Example]]:
    """Examples of similar length together, at most `tokens` of padded input in a batch."""
    batches: list[list[Example]] = []
    for example in sorted(examples, key=length):
        if not batches or (len(batches[-1]) + 1) * length(example) > tokens:
            batches.append([])
        batches[-1].append(example)
    return batches


# ------------------------------------------------------------------------------ text generation


def uniforms(seeds: Sequence[int], positions: int) -> Tensor:
    """Numbers in [0, 1), (rows, positions), each a function of (row's seed, position): splitmix64.

    Made on the CPU for a whole batch at once, in float64, which not every device has.
    """
    # The generator's constants as signed numbers: int64 wraps around as required.
    z = torch.arange(1, positions + 1) * -7046029254386353131 + torch.tensor(seeds)[:, None]
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return ((z >> 11) & ((1 << 53) - 1)).double() / 2**53


def row_seed(*parts: Any) -> int:
    """A 63-bit seed from whatever identifies a row, so that its text depends on no other row."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row of logits (n, V), by inverting the cumulative distribution at `draws` (n,).

    Temperature 0 takes the most likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = softmax_with_temperature(logits, temperature)
    order = None
    if top_p < 1:
        probabilities, order = probabilities.sort(-1, descending=True)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # never the most likely one
        probabilities = probabilities.masked_fill(outside, 0)
    mass = probabilities.to(draws.dtype).cumsum(-1)
    tokens = torch.searchsorted(mass, (draws * mass[:, -1])[:, None], right=True)
    tokens = tokens.clamp_max(logits.shape[-1] - 1)
    return (tokens if order is None else order.gather(1, tokens))[:, 0]


def generate(
    model: LanguageModel,
    prompts: Sequence[list[int]],
    seeds: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float = 1.0,
    batch_size: int = 256,
) -> Iterator[tuple[int, Completion]]:
    """Answers to `prompts` (ids) as (index, completion), in batches of prompts of similar length.

    Only the end tokens are taken from the model's generation_config. A row's text depends on the
    rest of its batch through rounding only.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with model.evaluating():
            ids = _generate_batch(
                model, [prompts[i] for i in batch], uniforms([seeds[i] for i in batch],
                max_new_tokens), temperature, top_p,
            )  # fmt: skip
        for i, response in zip(batch, ids, strict=True):
            finished = response[-1] in model.end_ids
            text = model.tokenizer.decode(
                response[:-1] if finished else response, clean_up_tokenization_spaces=False
            )
            yield i, Completion(text, finished, len(response), response)


def _generate_batch(
    model: LanguageModel, prompts: list[list[int]], draws: Tensor, temperature: float, top_p: float
) -> list[list[int]]:
    """Response ids for each prompt; `draws` are `uniforms` of (B, longest response).

    Prompts are padded on the left. Finished rows leave the batch; checking for them synchronises
    with a GPU, so there it is done only every eighth token.
    """
    device, longest = model.device, model.max_positions or sys.maxsize
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (B, L)
    mask = (torch.arange(width) >= width - lengths[:, None]).long().to(device)  # (B, L)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    draws = draws.to(device, torch.float32 if device.type == "mps" else torch.float64)
    limits = (longest - lengths).clamp_max(draws.shape[1]).to(device)
    responses = torch.full(draws.shape, -1, device=device)  # (B, longest response), -1 not written
    ends = torch.tensor(model.end_ids, device=device)
    rows = torch.arange(len(prompts), device=device)  # those that are still generated
    done = torch.zeros_like(rows, dtype=torch.bool)
    head = model.head().cast(model.compute_dtype, device)
    cache = DynamicCache(config=model.config.get_text_config())
    for step in range(draws.shape[1]):
        hidden = model.backbone(
            input_ids=ids, attention_mask=mask, position_ids=positions, cache=cache, use_cache=True
        ).last_hidden_state[:, -1]  # (rows, d)
        tokens = sample(head.logits(hidden), draws[rows, step], temperature, top_p)
        responses[rows, step] = torch.where(done, -1, tokens)
        done = done | torch.isin(tokens, ends) | (step + 1 >= limits[rows])
        if device.type == "cpu" or step % 8 == 7:
            keep = (~done).nonzero()[:, 0]
            if not len(keep):
                break
            if len(keep) < len(rows):
                cache.batch_select_indices(keep)
                rows, done, tokens = rows[keep], done[keep], tokens[keep]
                mask, positions = mask[keep], positions[keep]
        ids, mask = tokens[:, None], F.pad(mask, (0, 1), value=1)
        positions = (positions[:, -1:] + 1).clamp_max(longest - 1)
    return [[i for i in response if i >= 0] for response in responses.tolist()]


# ---------------------------------------------------------- the teacher's text and hidden states


def teacher_completions(
    teacher: LanguageModel, prompts: Sequence[Prompt], args: CommonArguments, **sampling: Any
) -> list[Completion]:
    """The teacher's answers to the prompts, from the cache where it has them."""

    def write(missing: dict[str, int], record: Callable[[str, Completion], None]) -> None:
        keys = list(missing)
        written = generate(
            teacher, [prompts[i].teacher for i in missing.values()],
            [row_seed(args.seed, key) for key in keys], max_new_tokens=args.max_new_tokens,
            temperature=sampling["temperature"], top_p=sampling.get("top_p", 1.0),
            batch_size=args.generation_batch_size,
        )  # fmt: skip
        for place, completion in written:
            record(keys[place], completion)

    identity = [teacher.digest, str(teacher.compute_dtype), teacher.end_ids]
    asked = [p.teacher for p in prompts]
    return cached_completions(prompts, asked, identity, args, write, **sampling)


def cached_completions(
    prompts: Sequence[Prompt],
    asked: Sequence[Any],
    identity: Any,
    args: CommonArguments,
    write: Callable[[dict[str, int], Callable[[str, Completion], None]], None],
    *,
    temperature: float,
    top_p: float = 1.0,
    purpose: str,
) -> list[Completion]:
    """One completion for each prompt; `write` makes the missing ones, shared out over processes.

    They are lines of a file under --cache-dir that is named after the teacher's `identity` and the
    sampling settings, found by what was `asked`, so data sets that overlap share them.
    `write(missing, record)` gets the place of each missing key in `prompts`, and `record(key,
    completion)` appends a line at once, so that an interrupted run loses none.
    """
    if temperature == 0:  # greedy text depends on neither
        top_p, seed = 1.0, 0
    else:
        seed = args.seed
    settings = repr((identity, temperature, top_p, args.max_new_tokens, seed))
    path = Path(args.cache_dir) / "text" / f"{row_seed(settings):016x}.jsonl"
    counts: Counter[str] = Counter()
    keys = []
    for value in asked:  # a prompt that occurs twice gets two samples
        keys.append(f"{row_seed(value, counts[repr(value)]):016x}")
        counts[repr(value)] += temperature > 0
    state = PartialState()
    with exclusive(path.with_suffix(".lock")):
        known = _read_completions(path)
        state.wait_for_everyone()  # so that all processes divide the same missing keys
        missing = {key: i for i, key in enumerate(keys) if key not in known}
        mine = dict(list(missing.items())[state.process_index :: state.num_processes])
        bar = progress(f"teacher writes ({purpose})", len(mine))
        began, tokens = time.perf_counter(), 0
        # One unbuffered write for each line, so that processes that append do not mix their lines.
        with bar, open(path, "ab", buffering=0) as file:

            def record(key: str, completion: Completion) -> None:
                nonlocal tokens
                messages = prompts[missing[key]].conversation.messages
                line = {"key": key, "messages": messages, **completion._asdict()}
                file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
                known[key] = completion
                tokens += completion.length
                speed = tokens / (time.perf_counter() - began)
                bar.set_postfix(tokens_per_second=f"{speed:.0f}", refresh=False)
                bar.update()

            if mine:
                write(mine, record)
        state.wait_for_everyone()
        if state.num_processes > 1:
            known = _read_completions(path)
    return [known[key] for key in keys]


def _read_completions(path: Path) -> dict[str, Completion]:
    """The whole lines of a cache file; the unfinished last line of a killed run is removed."""
    raw = path.read_bytes() if path.exists() else b""
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        os.truncate(path, whole)
    known = {}
    for number, line in enumerate(raw[:whole].split(b"\n")[:-1], 1):
        try:
            entry = json.loads(line)
            known[entry["key"]] = Completion(*(entry[name] for name in Completion._fields))
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{path}:{number} is corrupt: delete the file") from None
    return known


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """One run at a time holds the lock; its processes hold it together."""
    state = PartialState()
    lock.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(lock) if state.is_main_process else contextlib.nullcontext():
        state.wait_for_everyone()
        yield
        state.wait_for_everyone()


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file under another name and rename it, so that `path` is never partial."""
    part = path.with_name(path.name + ".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    os.replace(part, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as problem:
        raise UsageError(f"{path} is corrupt ({problem}): delete the file") from None


def progress(title: str, total: int, done: int = 0) -> tqdm:
    """A bar on the main process's terminal; none where output is not a terminal."""
    disable = None if PartialState().is_main_process else True  # None: tqdm asks the terminal
    return tqdm(total=total, initial=done, desc=title, disable=disable, dynamic_ncols=True)


class TeacherHiddenStates:
    """The teacher's final hidden states at the targets of fixed text, cached or computed live.

    With --cache-teacher they are computed once, before training, into one safetensors file for each
    example, named after its exact ids and targets, so data sets that overlap share files. The run
    that fills the cache reads it too: every run on the same text gets the same bits, whatever its
    temperature or divergence, and loads no backbone.
    """

    def __init__(
        self, teacher: LanguageModel, examples: Sequence[Example], args: CommonArguments,
        purpose: str,
    ) -> None:  # fmt: skip
        """Fill the cache with what it lacks; `purpose` is shown to the user.

        Raises `UsageError` if the disk has no room, before anything is written.
        """
        self.teacher, self.directory = teacher, teacher.states_dir
        if self.directory is None or not examples:
            return
        with exclusive(self.directory / "lock"):
            if PartialState().is_main_process:
                teacher.save_head()
            self._fill(examples, purpose)
        loaded = "is loaded" if teacher.loaded else "is not loaded"
        PartialState().print(f"{purpose}: teacher states from the cache; its backbone {loaded}")

    def __call__(self, examples: Sequence[Example], live: bool = False) -> Tensor:
        """Hidden states (N, d) on the teacher's device, at the N targets of the examples."""
        device = self.teacher.device
        if live or self.directory is None:
            return teacher_hidden_states(self.teacher, examples)
        parts = [read_tensors(self._path(e))["hidden"] for e in examples]
        width = self.teacher.head().weight.shape[1]
        hidden = torch.empty(
            sum(map(len, parts)), width, dtype=self.teacher.compute_dtype,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        torch.cat([hidden[:0], *parts], out=hidden)
        return hidden.to(device, non_blocking=True)

    def _path(self, example: Example) -> Path:
        key = hashlib.sha256(array("q", [*example.teacher.ids, -1, *example.teacher.targets]))
        return self.directory / f"{key.hexdigest()[:20]}.safetensors"

    def _fill(self, examples: Sequence[Example], purpose: str) -> None:
        """Compute the batches of which a file is missing.

        Batches follow from the text alone and are computed whole, so that a run that was killed
        here ends with the same bits as one that was not.
        """
        state, teacher = PartialState(), self.teacher
        paths = {e.index: self._path(e) for e in examples}
        missing = {path for path in paths.values() if not path.exists()}
        state.wait_for_everyone()  # so that all processes see the same files
        unique = {paths[e.index]: e for e in examples}.values()
        batches = [
            batch
            for batch in length_batches(unique, lambda e: len(e.teacher.ids))
            if any(paths[e.index] in missing for e in batch)
        ]
        if not batches:
            return
        bytes_per_token = teacher.head().weight.shape[1] * teacher.compute_dtype.itemsize
        needed = sum(len(e.teacher.targets) for e in unique if paths[e.index] in missing)
        state.print(
            f"{purpose}: writing {needed * bytes_per_token / 1e6:.1f} MB of teacher states to "
            f"{self.directory}, {bytes_per_token} bytes a token"
        )
        free = shutil.disk_usage(self.directory).free
        if needed * bytes_per_token > free:
            raise UsageError(
                f"{self.directory} has only {free / 1e6:.1f} MB left: name another --cache-dir, or "
                "add --no-cache-teacher"
            )
        mine = batches[state.process_index :: state.num_processes]
        with progress(f"teacher states ({purpose})", len(mine)) as bar:
            for batch in mine:
                hidden = teacher_hidden_states(teacher, batch).to("cpu", teacher.compute_dtype)
                parts = hidden.split([len(e.teacher.targets) for e in batch])
                for example, part in zip(batch, parts, strict=True):
                    if paths[example.index] in missing:
                        save_tensors({"hidden": part}, paths[example.index])
                bar.update()


@torch.no_grad()
def teacher_hidden_states(teacher: LanguageModel, examples: Sequence[Example]) -> Tensor:
    """The teacher's final hidden states (N, d) at the N targets of the examples."""
    return teacher.hidden_states(collate([e.teacher for e in examples], teacher.device))


# --------------------------------------------------------------------------------------- losses


def log_softmax_with_temperature(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last axis, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def softmax_with_temperature(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the last axis, in float32 or wider."""
    return log_softmax_with_temperature(logits, temperature).exp()


class Objective(NamedTuple):
    """The loss of a target token: T² · D_T(teacher, student) + ce_weight · cross-entropy (T = 1)."""

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
        share = {"jsd": beta, "forward": a, "reverse": 1 - a}[kl]  # of the teacher in the mixture
        mixture_logprobs = torch.logaddexp(
            teacher_logprobs + math.log(share), student_logprobs + math.log1p(-share)
        )
        if kl == "forward":
            value = (teacher * (teacher_logprobs - mixture_logprobs)).sum(-1)
            slope = (teacher_logprobs - mixture_logprobs).exp() * (a - 1)
        elif kl == "reverse":
            slope = student_logprobs - mixture_logprobs
            value = (student * slope).sum(-1)
            slope = slope - slope.exp() * a
        else:
            slope = student_logprobs - mixture_logprobs
            value = (1 - beta) * (student * slope).sum(-1)
            value += beta * (teacher * (teacher_logprobs - mixture_logprobs)).sum(-1)
            slope = slope * (1 - beta)
    return value, student * (slope - (student * slope).sum(-1, keepdim=True))


def chunks(tokens: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Parts of N target tokens whose (n, V) arrays exist at one time.

    On a CPU those should stay near the caches.
    """
    size = max(16, (2**23 if device.type == "cpu" else 2**26) // vocabulary)
    return [slice(i, min(i + size, tokens)) for i in range(0, tokens, size)]


LossAndGradient = Callable[[Tensor, Any], tuple[Tensor, Tensor]]


class _ChunkedLoss(torch.autograd.Function):
    """See `chunked_loss`. Backward *returns* the gradients and writes no `.grad`, so that tied
    embeddings add up and DDP reduces them once."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, pieces, loss_and_gradient):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        head = head._replace(weight=weight, bias=bias).cast(hidden.dtype, hidden.device)
        grads = [
            torch.zeros_like(t, dtype=dtype) if wanted else None
            for t, dtype, wanted in zip(
                (hidden, weight, bias),
                (hidden.dtype, wide, wide),
                ctx.needs_input_grad,
                strict=False,
            )
        ]
        sums = torch.zeros(2, dtype=wide, device=hidden.device)
        for rows, piece in pieces:
            # Popped, so that `loss_and_gradient` alone holds the logits and can free them.
            logits = [head.logits(hidden[rows])]
            capped = None if head.softcap is None else logits[0]
            part, gradient = loss_and_gradient(logits.pop(), piece)
            sums += part
            gradient = head.backward(gradient, capped)
            if grads[2] is not None:
                grads[2] += gradient.sum(0)
            gradient = gradient.to(hidden.dtype)
            if grads[0] is not None:
                grads[0][rows] = matmul_fp32(gradient, head.weight.t()).to(hidden.dtype)
            if grads[1] is not None:
                accumulate_weight_grad(grads[1], gradient, hidden[rows])
            del gradient, capped  # the next piece's arrays take their memory
        ctx.gradients = grads
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        gradients, ctx.gradients = ctx.gradients, None
        return (*[None if g is None else g.mul_(grad_loss) for g in gradients], None, None, None)


def accumulate_weight_grad(total: Tensor, gradient: Tensor, hidden: Tensor) -> None:
    """`total += gradientᵀ @ hidden`, (V, d), accumulated in `total`'s float32."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), hidden)
    else:
        total += matmul_fp32(gradient.t(), hidden.t())


def chunked_loss(
    hidden: Tensor,
    head: Head,
    pieces: Sequence[tuple[slice, Any]],
    loss_and_gradient: LossAndGradient,
) -> tuple[Tensor, Tensor]:
    """A loss of all logits that never holds all logits.

    A piece's logits (n, V) are made, `loss_and_gradient(logits, piece)` takes the loss *and its
    gradient*, and they are dropped, so that memory beyond the inputs and their gradients does not
    grow with N x V.

    Args:
        hidden: (N, d), the student's hidden states that predict the targets.
        pieces: for each piece its rows of `hidden`, and what `loss_and_gradient` is to know of it.
        loss_and_gradient: logits (n, V), which it may overwrite, and a piece, to the sums (2,) of
            the loss and of the divergence without T², and the gradient (n, V) of the loss with
            respect to the logits.

    Returns:
        The loss, a scalar in nats summed over tokens, differentiable in `hidden` and the head; and
        both sums (2,), detached.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _ChunkedLoss.apply(hidden, head.weight, head.bias, head, pieces, loss_and_gradient)


def distillation_loss(
    student_hidden: Tensor,
    student: Head,
    targets: Tensor,
    objective: Objective,
    teacher_hidden: Tensor | None = None,
    teacher: Head | None = None,
) -> tuple[Tensor, Tensor]:
    """The objective summed over N target tokens with ids `targets` (N,): see `chunked_loss`.

    `teacher_hidden` (N, d') and the teacher's head are None for cross-entropy alone.
    """
    t, ce_weight = objective.temperature, objective.ce_weight
    if teacher is not None:
        teacher = teacher.cast(teacher_hidden.dtype, teacher_hidden.device)

    def loss_and_gradient(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        kl, loss, gradient = logits.new_zeros(()), logits.new_zeros(()), None
        if ce_weight:
            target = targets[rows, None]
            logprobs = log_softmax_with_temperature(logits)
            loss = -ce_weight * logprobs.gather(1, target).sum()
            gradient = logprobs.exp_()
            gradient.scatter_add_(1, target, -torch.ones_like(target, dtype=gradient.dtype))
            gradient.mul_(ce_weight)
        if teacher is not None:
            logprobs = log_softmax_with_temperature(logits, t)
            del logits
            teacher_logprobs = log_softmax_with_temperature(teacher.logits(teacher_hidden[rows]), t)
            values, slope = divergence(logprobs, teacher_logprobs, objective)
            kl = values.sum()
            loss = loss + t**2 * kl
            slope.mul_(t)  # T² from the loss, 1/T from logits / T
            gradient = slope if gradient is None else gradient.add_(slope)
        return torch.stack([loss, kl]), gradient

    rows = chunks(len(targets), len(student.weight), student_hidden.device)
    pieces = list(zip(rows, rows, strict=True))
    return chunked_loss(student_hidden, student, pieces, loss_and_gradient)


# ----------------------------------------------------------------------------------- evaluation

Tally = dict[str, float]  # sums over one evaluation prompt: see `Evaluator`
Scores = dict[str, float]

# Scores with a gap to close: whether more is better, and the teacher's own value if it is fixed.
GAPS = {
    "kl_to_teacher": (False, 0.0),
    "top1_agreement": (True, 1.0),
    "exact_match": (True, None),
    "error_rate": (False, None),
}


class Evaluator:
    """Scores students and their teacher on the same held-out prompts.

    On one fixed set of answers sampled from the teacher (temperature 1): `kl_to_teacher`
    (KL(teacher ‖ student), nats per target token) and `top1_agreement` if the vocabularies are
    equal, `nats_per_token` in each model's own tokens, and `bits_per_byte` of the answers' text
    without end tokens. On greedy answers: `exact_match`, `error_rate` (word edit distance to the
    nearest reference over that reference's words), `response_tokens` and `cut_off`, the share that
    reached the length limit. Without a reference the teacher's greedy answer takes its place. An
    API teacher has no scores that need its distribution.
    """

    def __init__(self, prompts: list[Prompt], pair: Pair, args: CommonArguments) -> None:
        """Have the teacher answer the prompts, and score it."""
        student, teacher = pair
        greedy, samples = (
            teacher.complete(prompts, args, temperature=t, purpose=f"{kind} evaluation answers")
            for t, kind in ((0.0, "greedy"), (1.0, "sampled"))
        )
        self.args, self.comparable = args, pair.same_vocabulary
        self.references = [
            p.conversation.references or [c.text] for p, c in zip(prompts, greedy, strict=True)
        ]
        self.unreferenced = sum(not p.conversation.references for p in prompts)
        examples = completion_examples(prompts, samples, pair, args.max_length)
        self.examples = examples[PartialState().process_index :: PartialState().num_processes]
        self.batches = length_batches(
            self.examples, lambda e: max(len(e.student.ids), len(e.teacher.ids))
        )
        # With one vocabulary the student reads the teacher's ids, its end token included.
        self.ends = {*student.end_ids, *(teacher.end_ids if self.comparable else ())}
        tallies = {e.index: self._answer_tally(e.index, greedy[e.index]) for e in self.examples}
        if pair.has_weights:
            states = TeacherHiddenStates(teacher, examples, args, "evaluation text")
            self.teacher_head = teacher.head()
            self.teacher_hidden = [states(batch).cpu() for batch in self.batches]
            for batch, hidden in zip(self.batches, self.teacher_hidden, strict=True):
                sides = {e.index: e.teacher for e in batch}
                targets = collate(list(sides.values()), teacher.device).targets
                values = compare(hidden.to(teacher.device), self.teacher_head, targets)
                self._add_likelihoods(tallies, sides, teacher, {*teacher.end_ids}, values)
        self.teacher_tallies = gathered(tallies)

    def __call__(self, student: LanguageModel, show: int = 0) -> list[Tally]:
        """One tally per evaluation prompt, on every process; prints `show` answers."""
        answers = generate(
            student, [e.prompt.student for e in self.examples], [0] * len(self.examples),
            max_new_tokens=self.args.max_new_tokens, temperature=0.0,
            batch_size=self.args.generation_batch_size,
        )  # fmt: skip
        tallies = {}
        for place, answer in answers:
            example = self.examples[place]
            tallies[example.index] = self._answer_tally(example.index, answer)
            if example.index < show:
                question = student.tokenizer.decode(example.prompt.student)
                references = self.references[example.index]
                PartialState().print(f"  {question!r}\n    {answer.text!r}  (of {references})")
        with student.evaluating():
            for i, batch in enumerate(self.batches):
                sides = {e.index: e.student for e in batch}
                inputs = collate(list(sides.values()), student.device)
                hidden, theirs = student.hidden_states(inputs), (None, None)
                if self.comparable:
                    theirs = self.teacher_hidden[i].to(student.device), self.teacher_head
                values = compare(hidden, student.head(), inputs.targets, *theirs)
                self._add_likelihoods(tallies, sides, student, self.ends, values)
        return gathered(tallies)

    def _answer_tally(self, i: int, answer: Completion) -> Tally:
        words = answer.text.split()
        edits, length = min(
            (edit_distance(words, reference.split()), len(reference.split()))
            for reference in self.references[i]
        )
        return {
            "exact": float(edits == 0),
            "edits": edits,
            "reference_words": length,
            "response_tokens": answer.length,
            "cut_off": float(not answer.finished),
        }

    def _add_likelihoods(
        self,
        tallies: dict[int, Tally],
        sides: dict[int, Tokens],
        model: LanguageModel,
        ends: set[int],
        values: dict[str, Tensor],
    ) -> None:
        """Sum what `compare` gives for a batch of the teacher's samples over each of them."""
        counts = [len(side.targets) for side in sides.values()]
        parts = {name: v.float().cpu().split(counts) for name, v in values.items()}
        logprobs = parts.pop("logprob")
        for i, (index, side) in enumerate(sides.items()):
            tokens, size = _text_part(model, side, ends)
            tallies[index] |= {
                "tokens": len(logprobs[i]),
                "nats": -logprobs[i].sum().item(),
                "text_nats": -logprobs[i][:tokens].sum().item(),
                "bytes": size,
                **{name: part[i].sum().item() for name, part in parts.items()},
            }


@torch.no_grad()
def compare(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    teacher_hidden: Tensor | None = None,
    teacher: Head | None = None,
) -> dict[str, Tensor]:
    """What evaluation needs of a model at N targets, chunk by chunk, each (N,) and at T = 1.

    `logprob` of the target; with the teacher's hidden states and head also `kl`, KL(teacher ‖
    student) in nats, and `agree`, 1 if both have the same most likely token.
    """
    head = head.cast(hidden.dtype, hidden.device)
    parts: dict[str, list[Tensor]] = {"logprob": []}
    if teacher is not None:
        teacher = teacher.cast(teacher_hidden.dtype, hidden.device)
        parts |= {"kl": [], "agree": []}
    for rows in chunks(len(targets), len(head.weight), hidden.device):
        logprobs = log_softmax_with_temperature(head.logits(hidden[rows]))
        parts["logprob"].append(logprobs.gather(1, targets[rows, None])[:, 0])
        if teacher is not None:
            theirs = log_softmax_with_temperature(teacher.logits(teacher_hidden[rows]))
            parts["agree"].append((logprobs.argmax(-1) == theirs.argmax(-1)).float())
            kl, _ = divergence(logprobs, theirs, Objective())  # last, because it overwrites both
            parts["kl"].append(kl)
    return {name: torch.cat([hidden.new_zeros(0), *values]) for name, values in parts.items()}


def gathered(tallies: dict[int, Tally]) -> list[Tally]:
    """The tallies of all processes in the order of the prompts."""
    everything = dict(gather_object(list(tallies.items())))
    return [everything[i] for i in sorted(everything)]


def _text_part(model: LanguageModel, tokens: Tokens, ends: set[int]) -> tuple[int, int]:
    """Tokens and UTF-8 bytes of an answer's text, without its end-of-turn token."""
    ids, targets = tokens
    count = len(targets) - bool(targets and ids[targets[-1]] in ends)
    if not count:
        return 0, 0
    decode = functools.partial(model.tokenizer.decode, clean_up_tokenization_spaces=False)
    start = targets[0]  # decoded after the prompt: some tokenizers strip what text begins with
    return count, len(decode(ids[: start + count]).encode()) - len(decode(ids[:start]).encode())


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Insertions, deletions and substitutions between two sequences of words (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def scores(tallies: list[Tally]) -> Scores:
    """The numbers of a results table; `Evaluator` tells their meaning."""

    def ratio(top: str, bottom: str) -> float:
        return sum(t[top] for t in tallies) / max(1, sum(t[bottom] for t in tallies))

    result = {}
    if "kl" in tallies[0]:
        result["kl_to_teacher"] = ratio("kl", "tokens")
        result["top1_agreement"] = ratio("agree", "tokens")
    if "nats" in tallies[0]:
        result["nats_per_token"] = ratio("nats", "tokens")
        result["bits_per_byte"] = ratio("text_nats", "bytes") / math.log(2)
    if "own_kl" in tallies[0]:
        result["kl_on_own_text"] = ratio("own_kl", "own_tokens")
        result["exposure_bias"] = result["kl_on_own_text"] / max(result["kl_to_teacher"], 1e-9)
    return result | {
        "exact_match": sum(t["exact"] for t in tallies) / len(tallies),
        "error_rate": ratio("edits", "reference_words"),
        "response_tokens": sum(t["response_tokens"] for t in tallies) / len(tallies),
        "cut_off": sum(t["cut_off"] for t in tallies) / len(tallies),
    }


def gap_recovered(before: list[Tally], after: list[Tally], teacher: list[Tally]) -> Scores:
    """(after − before) / (teacher − before), for scores where the teacher is better by more than
    two standard errors of the paired difference between prompts."""
    per_prompt = {
        "kl_to_teacher": lambda t: t.get("kl", 0.0) / max(1, t["tokens"]),
        "top1_agreement": lambda t: t.get("agree", t["tokens"]) / max(1, t["tokens"]),
        "exact_match": lambda t: t["exact"],
        "error_rate": lambda t: t["edits"] / max(1, t["reference_words"]),
    }
    first, last, goal = scores(before), scores(after), scores(teacher)
    result = {}
    for name, (more_is_better, teacher_value) in GAPS.items():
        if name not in first:
            continue
        value = per_prompt[name]
        gaps = torch.tensor(
            [value(t) - value(b) for t, b in zip(teacher, before, strict=True)], dtype=torch.float64
        )
        mean = gaps.mean().item() * (1 if more_is_better else -1)
        if len(gaps) > 1 and mean > 2 * gaps.std().item() / math.sqrt(len(gaps)):
            target = goal.get(name, teacher_value)
            result[name] = (last[name] - first[name]) / (target - first[name])
    return result


# -------------------------------------------------------------------------------- run directory

# What a resumed run may change: where and how often it writes, nothing that the student learns from.
FLAGS_FREE_ON_RESUME = {
    "output_dir", "overwrite", "resume", "cache_dir", "save_steps", "save_total_limit",
    "eval_steps", "logging_steps", "generation_batch_size", "report_to",
}  # fmt: skip


def start(script: str, args: CommonArguments) -> Accelerator:
    """Start processes and device through accelerate, after the checks that need no model."""
    for kind, path in (("output", args.output_dir or "runs"), ("cache", args.cache_dir)):
        nearest = next(p for p in (Path(path), *Path(path).resolve().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UsageError(
                f"cannot write in {path}: {nearest} is not a writable directory; choose another "
                f"--{kind}-dir"
            )
    directory = Path(args.output_dir or "runs")
    if args.output_dir and directory.exists() and any(directory.iterdir()):
        if args.resume:
            resume_conflict(directory, script, args)
        elif not args.overwrite:
            raise UsageError(f"--output-dir {directory} is not empty: add --overwrite or --resume")
        elif not (directory / "args.json").is_file():
            raise UsageError(
                f"--overwrite would remove {directory}, which holds no run of this suite"
            )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # It warns of tied weights at every checkpoint, although loading ties them again.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    torch.manual_seed(args.seed)  # for the initial weights of adapters
    return Accelerator(mixed_precision="no")  # autocast is entered in LanguageModel.backbone


def resume_conflict(directory: Path, script: str, args: CommonArguments) -> None:
    """Raise `UsageError` if these arguments cannot continue the run in `directory`."""
    refused = f"--resume cannot continue {directory}: "
    try:
        before = json.loads((directory / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UsageError(refused + "it has no readable args.json") from None
    if before.get("script") != script:
        raise UsageError(refused + f"it is a run of {before.get('script')}.py")
    for field in dataclasses.fields(args):
        was, now = before.get(field.name, field.default), getattr(args, field.name)
        if field.name not in FLAGS_FREE_ON_RESUME and was != now:
            raise UsageError(refused + f"it was begun with {as_flag(field.name)} {was}, not {now}")
    if (directory / "results.json").exists():
        raise UsageError(refused + "it is finished")


def total_steps(args: CommonArguments, examples: int) -> int:
    """--max-steps, else --epochs over the examples."""
    epochs = math.ceil(args.epochs * examples / args.batch_size)
    return args.max_steps if args.max_steps > 0 else epochs


def begin_step(
    step: int, steps: int, optimizer: torch.optim.Optimizer, args: CommonArguments
) -> None:
    """Set learning rate and dropout seed, both functions of the step, so that resuming needs no state.

    The rate rises linearly and then falls as a cosine to zero.
    """
    if step < args.warmup_steps:
        factor = (step + 1) / args.warmup_steps
    else:
        done = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
        factor = 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate * factor
    # The only use of torch's global generator while training.
    torch.manual_seed(row_seed(args.seed, "dropout", step, PartialState().process_index))


def make_optimizer(model: nn.Module, args: CommonArguments) -> torch.optim.Optimizer:
    """AdamW (betas 0.9, 0.95) with weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.95), fused=True)


def reduce_gradients(
    accelerator: Accelerator, module: nn.Module, now: bool
) -> contextlib.AbstractContextManager[None]:
    """Processes add up their gradients once for each step, in its last micro-batch."""
    return contextlib.nullcontext() if now else accelerator.no_sync(module)


class Run:
    """A run's directory and progress: what was asked, what was measured, what came out."""

    def __init__(
        self, script: str, args: CommonArguments, accelerator: Accelerator, teacher: str = ""
    ) -> None:
        """Claim the directory, or find the checkpoint to continue; `teacher` names an API's model."""
        self.script, self.args, self.accelerator = script, args, accelerator
        self.teacher = teacher or Path(args.teacher).name
        self.pending: list[tuple[int, dict[str, Any], list[list[Example]]]] = []
        self.clock, self.tokens = time.perf_counter(), 0  # since the last flush
        self.bar: tqdm | None = None
        self.signal = 0  # the signal that asked this process to stop
        self.directory = Path()
        if accelerator.is_main_process:
            self.directory = self._claim()
            if not (self.directory / "args.json").exists():
                write_json(self.directory / "args.json", {"script": script} | vars(args))
            print(f"run directory: {self.directory}")
        self.directory = broadcast_object_list([self.directory])[0]
        self.checkpoint = next(reversed(self._checkpoints()), None)
        self.state = self._read_state()
        self.earlier = self.state["seconds"]
        if args.report_to != "none":
            accelerator.log_with = [LoggerType(args.report_to)]
            accelerator.project_configuration.set_directories(str(self.directory))
            config = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items()}
            accelerator.init_trackers(script, config)
        if args.resume and accelerator.is_main_process:
            self._cut_back()

    def _claim(self) -> Path:
        """Create the directory in a way that no run side by side gets the same."""
        if self.args.overwrite and self.args.output_dir:
            shutil.rmtree(self.args.output_dir, ignore_errors=True)
        if self.args.output_dir:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            return Path(self.args.output_dir)
        flags = [
            f"{name.replace('_', '-')}-{Path(str(value)).name}"
            for name, value in changed_flags(self.args).items()
            if name not in FLAGS_FREE_ON_RESUME | {"cache_teacher"}
        ]
        base = Path("runs") / "-".join([self.script, *flags])[:180]
        base.parent.mkdir(exist_ok=True)
        for number in itertools.count(1):
            directory = base if number == 1 else base.with_name(f"{base.name}-{number}")
            with contextlib.suppress(FileExistsError):
                directory.mkdir()
                return directory

    # ------------------------------------------------------------------------------- metrics

    def log(
        self, step: int, tokens: int, values: dict[str, Any], examples: list[list[Example]]
    ) -> None:
        """Record a step, without waiting for its device tensors, and write when that is due."""
        self.tokens += tokens
        self.pending.append((step, values, examples))
        self.bar.update()
        if step == self.steps or step % self.args.logging_steps == 0:
            self.flush()

    def flush(self) -> None:
        """Write what was logged to metrics.jsonl. A non-finite number ends the run."""
        speed = self.tokens / max(time.perf_counter() - self.clock, 1e-9)
        lines = []
        for step, values, examples in self.pending:
            numbers = {name: float(value) for name, value in values.items()}
            if not all(map(math.isfinite, numbers.values())):
                sources = [e.prompt.conversation.source for part in examples for e in part]
                raise TrainingError(
                    f"loss or gradient is not finite at step {step}: {numbers}; its examples: "
                    f"{', '.join(sources[:3])} and {max(0, len(sources) - 3)} more"
                )
            lines.append({"step": step, **numbers, "speed/tokens_per_second": speed})
            self.bar.set_postfix(
                loss=f"{numbers['train/loss']:.4f}", tokens_per_second=f"{speed:.0f}"
            )
        self.pending = []
        self.write(*lines)
        self.restart_clock()

    def restart_clock(self) -> None:
        self.clock, self.tokens = time.perf_counter(), 0

    def say(self, *lines: str) -> None:
        """Print lines, above the progress bar."""
        for line in lines:
            if self.accelerator.is_main_process:
                self.bar.write(line)

    def write(self, *lines: dict[str, Any]) -> None:
        """Append lines to metrics.jsonl, and send them to the tracker."""
        if self.accelerator.is_main_process:
            with open(self.directory / "metrics.jsonl", "a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        self.state["lines"] += len(lines)
        for line in lines:
            self.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=line["step"])

    def evaluate(self, step: int, evaluator: Evaluator, student: LanguageModel) -> None:
        """Score the student while it trains, if that is due at this step."""
        every = self.args.eval_steps
        if every and step % every == 0 and step < self.steps:
            self.flush()
            self._write_scores(step, scores(evaluator(student)))
            self.restart_clock()  # evaluation is not training time

    def _write_scores(self, step: int, numbers: Scores) -> None:
        self.write({"step": step} | {f"eval/{name}": value for name, value in numbers.items()})

    def evaluate_before(self, evaluator: Evaluator, student: LanguageModel) -> list[Tally]:
        """The evaluation of the untrained student, which a resumed run does not repeat."""
        path = self.directory / "checkpoints" / "before.json"
        if path.exists():
            try:
                tallies = json.loads(path.read_text(encoding="utf-8"))
            except ValueError:
                raise UsageError(f"{path} is corrupt: delete {self.directory}") from None
        else:
            tallies = evaluator(student)
            if self.accelerator.is_main_process:
                write_json(path, tallies)
        if self.checkpoint is None:
            self._write_scores(0, scores(tallies))
        return tallies

    # --------------------------------------------------------------------------- checkpoints

    def _checkpoints(self) -> list[Path]:
        """Checkpoints, oldest first. One is whole when its state.json, written last, is there."""
        return sorted(p.parent for p in self.directory.glob("checkpoints/step-*/state.json"))

    def _read_state(self) -> dict[str, Any]:
        state = {"step": 0, "lines": 0, "seconds": 0.0}
        launched = self.accelerator.distributed_type.value
        if self.checkpoint is not None:
            try:
                state = json.loads((self.checkpoint / "state.json").read_text(encoding="utf-8"))
                was = state["launched"]
            except (ValueError, KeyError, TypeError) as problem:
                raise self._corrupt(problem) from None
            if was != launched:
                raise UsageError(
                    f"{self.checkpoint} was written under accelerate's {was}, and this is "
                    f"{launched}: launch the run as before"
                )
        return state | {"launched": launched}

    def _corrupt(self, problem: Exception) -> UsageError:
        return UsageError(
            f"the checkpoint {self.checkpoint} is corrupt ({first_line(problem)}): delete it, and "
            "--resume continues from the one before"
        )

    def _cut_back(self) -> None:
        """Remove what was written after the checkpoint, partial lines and checkpoints too."""
        for directory in self.directory.glob("checkpoints/step-*"):
            if not (directory / "state.json").exists():
                shutil.rmtree(directory)
        metrics = self.directory / "metrics.jsonl"
        if metrics.exists():
            lines = metrics.read_bytes().splitlines(keepends=True)[: self.state["lines"]]
            metrics.write_bytes(b"".join(lines))

    def resume(self, steps: int, student: LanguageModel) -> int:
        """Load the newest checkpoint, if any, into what accelerate has prepared; the first step.

        From here to the last `save`, SIGTERM and Ctrl-C end the run with a checkpoint.
        """
        if self.checkpoint is not None:
            try:
                # Nothing foreign is unpickled: safetensors, and torch.load(weights_only=True).
                self.accelerator.load_state(str(self.checkpoint))
            except Exception as problem:  # every format has its own errors
                raise self._corrupt(problem) from None
            self.accelerator.print(f"resumed from {self.checkpoint}")
        self.steps, first = steps, self.state["step"]
        self.bar = progress("training", steps, first)
        if first < steps:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._note_signal)
        student.model.train()
        self.restart_clock()
        return first

    def _note_signal(self, number: int, _: Any) -> None:
        """Signal handler: `save` ends the run after the present step; a second signal, at once."""
        self.signal = number
        sys.stdout = sys.stderr  # a reader of the pipe has often died of the same Ctrl-C
        self._default_signals()

    def _default_signals(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def save(self, step: int) -> None:
        """Write a checkpoint if one is due, and end the run if a signal asked for it."""
        stop = self.signal
        if self.accelerator.num_processes > 1:  # all stop together, and agree at logging steps only
            agree = step % self.args.logging_steps == 0 or step == self.steps
            mine = torch.tensor([stop], device=self.accelerator.device)
            stop = int(self.accelerator.gather(mine).max()) if agree else 0
        due = self.args.save_steps and step % self.args.save_steps == 0
        if due or step == self.steps or stop:
            self.flush()
            self._write_checkpoint(step)
            self.restart_clock()
        if step == self.steps:
            self.bar.close()
            self._default_signals()
        if stop:
            flags = command_line(self.args, {"output_dir", "overwrite", "resume"})
            place = shlex.join(["--output-dir", str(self.directory), "--resume"])
            self.accelerator.print(
                f"stopped after step {step}; to continue: python {self.script}.py {flags} {place}"
            )
            self._close()
            sys.exit(128 + stop)

    def _write_checkpoint(self, step: int) -> None:
        """Weights, optimizer and random state of all processes; state.json last."""
        path = self.directory / "checkpoints" / f"step-{step:06}"
        try:
            self.accelerator.save_state(str(path), safe_serialization=True)
        except (OSError, RuntimeError, SafetensorError) as problem:
            shutil.rmtree(path, ignore_errors=True)
            raise UsageError(f"cannot write {path}: {first_line(problem)}") from None
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.state |= {"step": step, "seconds": self._seconds()}
            write_json(path / "state.json", self.state)
            keep = self.args.save_total_limit
            for old in self._checkpoints()[:-keep] if keep else ():
                (old / "state.json").unlink()  # first, so that a cut leaves no partial checkpoint
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _seconds(self) -> float:
        """How long the run took, with what it took before it was resumed."""
        return self.earlier + time.perf_counter() - STARTED

    # ------------------------------------------------------------------------------- results

    def finish(
        self, student: LanguageModel, before: list[Tally], evaluator: Evaluator, **more: Any
    ) -> None:
        """Score the student; write final/, results.json and curves.png; print the table."""
        after = evaluator(student, show=3)
        self._write_scores(self.steps, scores(after))
        if self.accelerator.is_main_process:
            results = {
                "teacher": scores(evaluator.teacher_tallies),
                "before": scores(before),
                "after": scores(after),
                "gap_recovered": gap_recovered(before, after, evaluator.teacher_tallies),
                "evaluation": {"rows": len(before), "unreferenced_rows": evaluator.unreferenced},
                **more,
                "seconds": self._seconds(),
                "versions": {
                    name: importlib.metadata.version(name)
                    for name in ("torch", "transformers", "datasets", "accelerate")
                },
            }
            table = results_table(results)
            save_student(student, self.directory / "final", self._model_card(table))
            write_json(self.directory / "results.json", results)
            draw_curves([self.directory], self.directory / "curves.png")
            print(table)
            if evaluator.unreferenced:
                print(
                    f"{evaluator.unreferenced} of {len(before)} evaluation rows have no reference: "
                    "there exact_match and error_rate compare with the teacher's greedy answer"
                )
            print(f"student: {self.directory / 'final'}")
        self._close()

    def _close(self) -> None:
        """Close the trackers and wait for all processes.

        Not `accelerator.end_training`, which also destroys the process group: see `launch`.
        """
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.wait_for_everyone()

    def _model_card(self, table: str) -> str:
        args = self.args
        flags = command_line(args, {"output_dir", "cache_dir", "overwrite", "resume"})
        return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [distillation]
---

# {Path(args.student).name}, distilled from {self.teacher}

- method: `{self.script}.py`
- teacher: `{self.teacher}`
- student: `{Path(args.student).name}`
- data: `{Path(args.dataset).name}`
- flags: `{flags or "none"}`

```
{table}
```
"""


def save_student(student: LanguageModel, directory: Path, card: str) -> None:
    """Model (adapters merged), tokenizer with its template, and card."""
    student.model.generation_config.eos_token_id = student.end_ids
    if student.adapters is not None:
        student.adapters.merge_and_unload()
    student.model.save_pretrained(directory)
    student.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(card, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Written under another name and renamed, so that a cut leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)


def results_table(results: dict[str, Any]) -> str:
    """Teacher, before and after, a line for each score."""
    lines = [f"{'':16}{'teacher':>10}{'before':>10}{'after':>10}{'gap recovered':>16}"]
    for name in results["after"]:
        cells = [results[column].get(name) for column in ("teacher", "before", "after")]
        row = "".join(f"{'–' if c is None else format(c, '.4f'):>10}" for c in cells)
        gap = results["gap_recovered"].get(name)
        lines.append(f"{name:16}{row}{'' if gap is None else format(gap, '.1%'):>16}".rstrip())
    return "\n".join(lines)


def draw_curves(directories: Sequence[Path], target: Path) -> None:
    """Loss and evaluation against step, one line for each run; says so without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print(f'no {target.name}: it needs matplotlib (pip install -e ".[plots]")')
        return
    panels = ("train/loss", "eval/kl_to_teacher", "eval/exact_match", "eval/error_rate")
    figure, axes = pyplot.subplots(1, len(panels), figsize=(18, 4 + len(directories) / 12))
    for directory in directories:
        text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        for name, axis in zip(panels, axes, strict=True):
            points = [(line["step"], line[name]) for line in lines if name in line]
            marker = "o" if name.startswith("eval") else None
            axis.plot(*zip(*points, strict=True), label=directory.name, marker=marker, markersize=3)
            axis.set(title=name, xlabel="step")
            axis.grid(alpha=0.3)
    if len(directories) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(target, dpi=100)
    pyplot.close(figure)


def compare_runs(paths: Iterable[str]) -> None:
    """`python common.py runs/*`: the scores of finished runs in one table and one picture."""
    runs = [Path(p) for p in paths if (Path(p) / "results.json").is_file()]
    if not runs:
        exit_with("no finished run (a directory with a results.json) among the arguments")
    columns = ("kl_to_teacher", "top1_agreement", "exact_match", "error_rate", "bits_per_byte")
    width = max(len(p.name) for p in runs) + 2
    titles = "".join(f"{c:>16}" for c in columns)
    print(f"{'after training':{width}}{titles}{'gap (exact)':>16}{'seconds':>10}")
    for path in runs:
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        cells = [results["after"].get(c) for c in columns]
        row = "".join(f"{'–' if c is None else format(c, '.4f'):>16}" for c in cells)
        gap = results["gap_recovered"].get("exact_match")
        gap = "–" if gap is None else format(gap, ".1%")
        print(f"{path.name:{width}}{row}{gap:>16}{results['seconds']:>10.0f}")
    picture = runs[0].parent / "comparison.png"
    draw_curves(runs, picture)
    if picture.exists():
        print(f"picture: {picture}")


if __name__ == "__main__":
    compare_runs(sys.argv[1:])
