"""What the four scripts share: from arguments to divergences, scores and run directories.

Nothing here trains: the four loops stand in the four scripts. The sections, in order:
arguments, models, chat data and masks, teacher text, distributions and divergences, generation,
evaluation, run state.

    python common.py runs/*        compares finished runs: one table, and runs/comparison.png
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, broadcast_object_list, gather_object
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    DynamicLayer,
    HfArgumentParser,
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
    """Wrong input. `launch` prints the one sentence it carries and exits with code 2."""

    exit_code = 2


class TrainingError(UsageError):
    """Training went wrong rather than its input."""

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
    chat_template: str | None = flag(None, "a Jinja file, for models that bring no chat template")

    dataset: str = flag(str(DATA / "train.jsonl"), "training prompts: a file, directory or hub id")
    dataset_config: str | None = flag(None, "configuration of a hub data set")
    dataset_split: str = flag("train", "split of a hub data set or directory")
    max_rows: int = flag(0, "use the first N rows of --dataset only (0: all)")
    eval_dataset: str | None = flag(
        None,
        "held-out conversations; without it the embedded ones go with the embedded data set, and "
        "--eval-size rows of another --dataset are held out by --seed",
    )
    eval_size: int = flag(
        0, "rows to evaluate on (0: 1000; where held out of --dataset, a tenth but at most 1000)"
    )
    completions: Literal["teacher", "dataset"] = flag(
        "teacher", "the text learned on: written by the teacher, or the data set's own responses"
    )
    max_length: int = flag(512, "tokens in an example, prompt and response together")
    max_new_tokens: int = flag(128, "tokens generated in a response")

    temperature: float = flag(1.0, "softmax temperature of the distillation loss")
    sampling_temperature: float = flag(1.0, "at which the teacher writes its text (0: greedy)")
    top_p: float = flag(1.0, "nucleus from which the teacher's text is sampled (1: everything)")
    generation_batch_size: int = flag(256, "responses generated at a time; does not change them")

    epochs: float = flag(3.0, "passes over the training prompts")
    max_steps: int = flag(-1, "optimizer steps; wins over --epochs")
    batch_size: int = flag(64, "examples in an optimizer step, over all processes")
    micro_batch_size: int = flag(16, "examples in a backward pass of a process (0: all its share)")
    learning_rate: float = flag(2e-3, "peak of the schedule (linear warm-up, cosine to zero)")
    weight_decay: float = flag(0.01, "decoupled weight decay, on matrices only")
    warmup_steps: int = flag(30, "steps of linear warm-up")
    max_grad_norm: float = flag(1.0, "gradients are clipped to this global norm")
    seed: int = flag(0, "data order, held-out rows and every sampled token follow from it")
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
    resume: bool = flag(
        False, "go on with the run in --output-dir, else with the newest unfinished one like this"
    )
    save_steps: int = flag(200, "steps between checkpoints (0: only at the end)")
    save_total_limit: int = flag(2, "checkpoints kept (0: all)")
    eval_steps: int = flag(200, "steps between evaluations while training (0: none)")
    logging_steps: int = flag(10, "steps between writes to metrics.jsonl")
    report_to: str = flag("none", "send metrics to a tracker too: tensorboard, wandb, ...")
    cache_dir: str = flag("runs/cache", "where the teacher's text is kept for the next run")
    cache_teacher: bool = flag(
        True, "keep the teacher's final states there too, so that it reads each text only once"
    )


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """One spelling of each flag, its default beside it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = [s for s in action.option_strings if "_" not in s]
        metavar = self._format_args(action, "N" if action.type in (int, float) else "X")
        switch = not action.option_strings or action.const is True or action.nargs == 0
        return ", ".join(shown) + ("" if switch else f" {metavar}")


class _Parser(HfArgumentParser):
    """One sentence and exit code 2 for a wrong command line."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message} (--help lists the flags)\n")


def parse_arguments(
    kind: type[CommonArguments], description: str, argv: Sequence[str] | None = None
) -> Any:
    """Command line to a validated dataclass. Exits with code 2 on an unknown or impossible flag."""
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
    """Refuse values that no run could use. Ranges of a script's own flags stand in the script."""
    positive = {"temperature", "batch_size", "learning_rate", "max_grad_norm", "max_length",
                "max_new_tokens", "generation_batch_size", "logging_steps"}  # fmt: skip
    for name, value in vars(args).items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name == "max_steps":
            continue
        shown = "--" + name.replace("_", "-")
        if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
            range_ = "above 0" if name in positive else "0 or more"
            raise UsageError(f"{shown} must be a finite number, {range_}, not {value}")
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p must lie in (0, 1], not {args.top_p}")
    if args.resume and args.overwrite:
        raise UsageError("--resume goes on with a run and --overwrite removes it: choose one")
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
    """Entry point of a script: parse, run, and turn a `UsageError` into one sentence and exit 2."""
    args = parse_arguments(kind, description)
    try:
        main(args)
    except UsageError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(problem.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    # Not inside `main`: where DDP's reducer is the last to let go of the group, it waits for the
    # group's thread while holding the interpreter's lock, for which that thread may be waiting.
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def changed_flags(args: CommonArguments) -> dict[str, Any]:
    """The arguments that differ from their defaults."""
    return {
        f.name: getattr(args, f.name)
        for f in dataclasses.fields(args)
        if getattr(args, f.name) != f.default
    }


def spelled(args: CommonArguments, skipped: set[str]) -> list[str]:
    """The changed flags as words of a command line."""
    changed = {name: value for name, value in changed_flags(args).items() if name not in skipped}
    words = (["--" + name.replace("_", "-"), str(value)] for name, value in changed.items())
    return [word for pair in words for word in pair]


# --------------------------------------------------------------------------------------- models


class Head(NamedTuple):
    """What turns a final hidden state into logits: softcap(scale · (states @ weightᵀ + bias))."""

    weight: Tensor  # (V, d)
    bias: Tensor | None  # (V,)
    scale: float = 1.0
    softcap: float | None = None

    def ready(self, dtype: torch.dtype, device: torch.device) -> Head:
        """Weights as `project` wants them beside states of `dtype`, converted once and for all."""
        if device.type != "cuda":  # there it multiplies in float32 at least
            dtype = torch.promote_types(
                torch.promote_types(dtype, self.weight.dtype), torch.float32
            )
        return self._replace(weight=self.weight.to(dtype))

    def logits(self, states: Tensor) -> Tensor:
        """States (n, d) to logits (n, V), in float32 at least: see `project`."""
        return self.transform(project(states, self.weight, self.bias))

    def transform(self, raw: Tensor) -> Tensor:
        """What the model does to its logits after the matrix product (Cohere, Granite, Gemma)."""
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)

    def transform_backward(self, gradient: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient with respect to `logits` to the gradient before `transform`.

        The logits themselves are only looked at where there is a softcap.
        """
        if self.softcap is not None:
            gradient = gradient * (1 - (logits / self.softcap).square())
        return gradient if self.scale == 1.0 else gradient * self.scale


def project(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`states @ weightᵀ + bias` accumulated and returned in float32 (float64 if given float64).

    Rounding logits to bfloat16 first costs the divergence's gradient several per cent, so half
    precision inputs are multiplied as they are but summed into a float32 result.
    """
    if states.is_cuda and weight.dtype == states.dtype != torch.float32:
        out = torch.mm(states, weight.t(), out_dtype=torch.float32)
    else:
        wide = torch.promote_types(torch.promote_types(states.dtype, weight.dtype), torch.float32)
        out = linear(states.to(wide), weight.to(wide))
    return out if bias is None else out + bias


# PyTorch's CPU builds multiply float32 matrices with MKL, which on AMD's processors reaches half of
# what oneDNN does. Each new shape costs oneDNN up to a millisecond, which small products never win
# back: it multiplies where the weight is large, or the whole product.
ONEDNN_WEIGHT = 2**18  # elements of the weight
ONEDNN_PRODUCTS = 2**27
HAS_ONEDNN = torch.backends.mkldnn.is_available() and platform.machine() in ("x86_64", "AMD64")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, by oneDNN where that is faster: x (..., k), weight (n, k), to (..., n)."""
    if weight.is_mkldnn:
        return _by_onednn(x, weight, bias)
    return (_OneDnnLinear.apply if _onednn_wins(x, weight) else F.linear)(x, weight, bias)


def _onednn_wins(x: Tensor, weight: Tensor) -> bool:
    products = x.numel() // max(1, x.shape[-1]) * weight.numel()
    return (
        HAS_ONEDNN
        and products > 0
        and (weight.numel() >= ONEDNN_WEIGHT or products >= ONEDNN_PRODUCTS)
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def packed(weight: Tensor) -> Tensor:
    """A copy in oneDNN's own order, for `linear` without gradients; small weights as they are.

    Otherwise every product puts the weight in order first, which takes half of its time where it
    has few rows, as a step of generation has.
    """
    weight = weight.detach()
    plain = type(weight) is Tensor and weight.device.type == "cpu" and weight.dtype == torch.float32
    if not (HAS_ONEDNN and plain and weight.numel() >= ONEDNN_WEIGHT):
        return weight
    few = 64  # rows; the order is the same for all numbers but the smallest
    return torch.ops.mkldnn._reorder_linear_weight(weight, few)


class _OneDnnLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        return (
            _by_onednn(gradient, weight.t()) if wants_x else None,
            _by_onednn(rows.t(), x.flatten(0, -2).contiguous().t()) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )


class Linear(nn.Linear):
    """A linear layer of a loaded model, on the faster of two libraries: see `linear`."""

    packed: Tensor | None = None  # stands in for the weight while text is written

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight if self.packed is None else self.packed, self.bias)


def linear_layers(model: PreTrainedModel) -> list[Linear]:
    """Those of the backbone: a head is not called as a layer here."""
    return [layer for layer in model.base_model.modules() if type(layer) is Linear]


@contextlib.contextmanager
def packed_layers(model: LanguageModel) -> Iterator[None]:
    """Layers on `packed` copies of their weights, for as long as nothing changes those."""
    layers = linear_layers(model.model)
    if model.compute_dtype == torch.float32:  # autocast knows nothing of the other order
        for layer in layers:
            copy = packed(layer.weight)
            layer.packed = copy if copy.is_mkldnn else None  # FSDP moves weights: keep none of them
    try:
        yield
    finally:
        for layer in layers:
            layer.packed = None


@dataclass
class LanguageModel:
    """A causal model with its tokenizer, and the parts that the methods take from it."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    compute_dtype: torch.dtype
    hash_weights: Callable[[], str]
    vocabulary: int = 0  # ids that stand for tokens; rows of the head beyond them are padding
    adapters: Any = None  # peft's view of `model`, where LoRA is trained

    def __post_init__(self) -> None:
        self.vocabulary = max(self.tokenizer.get_vocab().values()) + 1
        self.end_ids = end_of_turn_ids(self.model, self.tokenizer)

    @functools.cached_property
    def digest(self) -> str:
        """Names the exact weights; hashed when first asked for, as it takes a while and is kept."""
        return self.hash_weights()

    @property
    def end_id(self) -> int:
        """The id that ends what this model is taught to say: its template's own, if it has one."""
        template_end = _template_end(self.tokenizer)
        if template_end or self.tokenizer.eos_token_id is not None:
            return template_end[0] if template_end else self.tokenizer.eos_token_id
        raise UsageError(f"{self.name}: neither template nor tokenizer has an end-of-turn token")

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model has positions for; None where its configuration sets no end."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def keep(self) -> None:
        """Write what stands in for the model in later runs; only a `KeptTeacher` has any."""

    def head(self) -> Head:
        """The output layer, cut to the ids that stand for tokens."""
        layer, config = self.model.get_output_embeddings(), self.model.config.get_text_config()
        bias = getattr(layer, "bias", None)
        scale = getattr(config, "logit_scale", None) or 1.0
        scale /= getattr(config, "logits_scaling", None) or 1.0
        weight = layer.weight
        if len(weight) > self.vocabulary:
            weight = weight[: self.vocabulary]
            bias = None if bias is None else bias[: self.vocabulary]
        return Head(weight, bias, scale, getattr(config, "final_logit_softcapping", None))

    def backbone(self, **inputs: Any) -> Any:
        """The model without its head, computing in `compute_dtype`."""
        mixed = self.compute_dtype != self.model.dtype
        with torch.autocast(self.device.type, self.compute_dtype, enabled=mixed):
            return self.model.base_model(**inputs)

    def states(self, batch: Batch) -> Tensor:
        """Hidden states (N, d) that predict the N targets of the batch: one position before each.

        No attention mask: rows are padded on the right, where a causal model cannot look, and
        without a mask attention takes its fastest path.
        """
        hidden = self.backbone(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        return hidden[batch.rows, batch.columns]


class KeptTeacher(LanguageModel):
    """A teacher whose head lies on disk, and whose backbone is loaded when first asked for.

    The head, the end ids and the number of positions are kept in one file of `directory`, named
    after the weights, their dtype and what the tokenizer adds to them. Where the file is missing
    the model is loaded at once, and `keep` writes it when all input is known to be right.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        dtype: torch.dtype,
        digest: str,
        device: torch.device,
        directory: Path,
        load: Callable[[], LanguageModel],
    ) -> None:
        self.name, self.tokenizer, self.compute_dtype, self.digest = name, tokenizer, dtype, digest
        self.vocabulary = max(tokenizer.get_vocab().values()) + 1
        self._load, self._device = load, device
        depends_on = [digest, str(dtype), self.vocabulary, tokenizer.eos_token_id]
        key = hashlib.sha256(json.dumps([*depends_on, tokenizer.chat_template]).encode())
        self.path = directory / f"head-{key.hexdigest()[:16]}.safetensors"
        if self.path.exists():
            self._head, self.end_ids, self._longest = self._read()
        else:
            whole = self._load()
            self.model = whole.model
            self._head, self.end_ids = whole.head(), whole.end_ids
            self._longest = whole.max_positions

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        return self._load().model

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def max_positions(self) -> int | None:
        return self._longest

    def head(self) -> Head:
        return self._head

    def keep(self) -> None:
        """Write what later runs need in the place of the model, unless it is there."""
        head = self._head
        tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        more = {"scale": head.scale, "softcap": head.softcap}
        more |= {"end_ids": self.end_ids, "longest": self._longest}
        with make_writable(self.path.parent), FileLock(self.path.with_suffix(".lock")):
            if not self.path.exists():
                check_disk(self.path.parent, sum(t.nbytes for t in tensors.values()))
                beside = self.path.with_suffix(".part")
                save_file(tensors, beside, {"more": json.dumps(more)})
                os.replace(beside, self.path)

    def _read(self) -> tuple[Head, list[int], int | None]:
        try:
            with safe_open(self.path, "pt") as file:
                more = json.loads(file.metadata()["more"])
                names = file.keys()
                parts = {name: file.get_tensor(name).to(self.device) for name in names}
            head = Head(parts["weight"], parts.get("bias"), more["scale"], more["softcap"])
            return head, more["end_ids"], more["longest"]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise UsageError(
                f"{self.path}: corrupt head of the teacher; delete the file to write it again"
            ) from None


def end_of_turn_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every id that ends a response: all that the model declares, and the template's own."""
    declared = [tokenizer.eos_token_id, model.config.get_text_config().eos_token_id]
    if model.generation_config is not None:
        declared.append(model.generation_config.eos_token_id)
    found: set[int] = set()
    for ids in declared:
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return sorted(found.union(_template_end(tokenizer)))


def _template_end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special token that the chat template writes after an answer, where it writes one."""
    if not tokenizer.chat_template:
        return []
    turn = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "answer"}]
    after = tokenize(tokenizer, render(tokenizer, turn).rpartition("answer")[2]).ids
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in after if i in special][:1]


def load_tokenizer(name: str, revision: str, template_file: str | None) -> PreTrainedTokenizerBase:
    """A fast tokenizer with a chat template, its own or the one in `template_file`."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as problem:
        raise UsageError(f"no usable tokenizer in {name}: {first_line(problem)}") from None
    if not tokenizer.is_fast:
        raise UsageError(f"{name} has no fast tokenizer; character offsets are needed for masks")
    if not tokenizer.chat_template and template_file:
        tokenizer.chat_template = _text_of(template_file)
    return tokenizer


def load_model(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    revision: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
    attention: str | None,
    device: torch.device,
    cache_dir: str,
) -> LanguageModel:
    """Weights in `dtype` on `device`, in eval mode; refuses a directory with parts missing."""
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise UsageError(f"{name} holds no model: there is no config.json in it")
    reuse_freed_memory(False, device)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # they are reported, and refused below by name
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError, ImportError, RuntimeError) as problem:
        raise UsageError(f"cannot load the model {name}: {first_line(problem)}") from None
    random = sorted(report["missing_keys"]) + [key for key, *_ in report["mismatched_keys"]]
    if random:
        raise UsageError(
            f"{name} lacks {len(random)} tensors of the shape that its config.json asks for, "
            f"which would be random; the first is {random[0]}"
        )
    hash_weights = functools.partial(digest_of_model, name, revision, Path(cache_dir))
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
    model = LanguageModel(name, model.to(device).eval(), tokenizer, compute_dtype, hash_weights)
    reuse_freed_memory(True, device)
    check_head(model)
    return model


def load_student(
    args: CommonArguments, device: torch.device, template: str | None = None
) -> LanguageModel:
    """The student, weights in float32; a base model without a chat template takes `template`."""
    tokenizer = load_tokenizer(args.student, args.revision, args.chat_template)
    tokenizer.chat_template = tokenizer.chat_template or template
    _check_template(args.student, tokenizer)
    student = load_model(
        args.student, tokenizer, revision=args.revision, dtype=torch.float32,
        compute_dtype=_dtype_on(device, args.dtype), attention=args.attn_implementation,
        device=device, cache_dir=args.cache_dir,
    )  # fmt: skip
    _check_positions(student, args)
    if args.lora_rank:
        add_adapters(student, args.lora_rank)
    if args.gradient_checkpointing:
        if not student.model.supports_gradient_checkpointing:
            raise UsageError(f"--gradient-checkpointing: {student.name} does not support it")
        student.model.activation_checkpointing_enable()
    return student


def load_pair(args: CommonArguments, device: torch.device) -> tuple[LanguageModel, LanguageModel]:
    """Student (float32 weights) and teacher, each with its own tokenizer and template."""
    tokenizer = load_tokenizer(args.teacher, args.teacher_revision, args.chat_template)
    _check_template(args.teacher, tokenizer)
    student = load_student(args, device, tokenizer.chat_template)
    dtype = _dtype_on(device, args.teacher_dtype)

    def load_teacher() -> LanguageModel:
        teacher = load_model(
            args.teacher, tokenizer, revision=args.teacher_revision, dtype=dtype,
            compute_dtype=dtype, attention=args.attn_implementation, device=device,
            cache_dir=args.cache_dir,
        )  # fmt: skip
        teacher.model.requires_grad_(False)
        return teacher

    if args.cache_teacher:
        digest = digest_of_model(args.teacher, args.teacher_revision, Path(args.cache_dir))
        directory = Path(args.cache_dir) / "states"
        teacher = KeptTeacher(
            args.teacher, tokenizer, dtype, digest, device, directory, load_teacher
        )
    else:
        teacher = load_teacher()
    _check_positions(teacher, args)
    return student, teacher


def _dtype_on(device: torch.device, name: str) -> torch.dtype:
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    return half if name == "auto" else getattr(torch, name)


def _check_template(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise UsageError(f"{name} has no chat template; give one with --chat-template FILE")


def _check_positions(model: LanguageModel, args: CommonArguments) -> None:
    if model.max_positions and args.max_length > model.max_positions:
        raise UsageError(
            f"--max-length {args.max_length}: {model.name} stops at {model.max_positions}"
        )


def add_adapters(student: LanguageModel, rank: int) -> None:
    """LoRA (Hu et al. 2021) on every linear layer but the head, which stays frozen like the rest.

    The layers are replaced in place, so that backbone and head are found where they were.
    """
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    student.adapters = LoraModel(student.model, config, "default")


def same_vocabulary(student: LanguageModel, teacher: LanguageModel) -> bool:
    """Whether equal ids are equal tokens, so that ids can cross from one model to the other."""
    return student.tokenizer.get_vocab() == teacher.tokenizer.get_vocab()


def check_same_vocabulary(student: LanguageModel, teacher: LanguageModel) -> None:
    """Token-by-token divergences compare ids, so equal ids must be equal tokens."""
    if same_vocabulary(student, teacher):
        return
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    differing = sorted({t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)})
    raise UsageError(
        f"the vocabularies of {student.name} and {teacher.name} differ in {len(differing)} tokens "
        f"(one is {differing[0]!r}): use cross_tokenizer.py"
    )


def check_head(model: LanguageModel) -> None:
    """Refuse a model whose logits are not what `Head` makes of its final states."""
    layer = model.model.get_output_embeddings()
    if layer is None or not hasattr(layer, "weight"):
        raise UsageError(f"{model.name} has no output embeddings, so its head cannot be chunked")
    if layer.weight.shape[0] < model.vocabulary:
        raise UsageError(
            f"{model.name}: the tokenizer knows {model.vocabulary} ids, "
            f"the model {layer.weight.shape[0]}"
        )
    ids = torch.arange(min(8, model.vocabulary), device=model.device)[None]
    with torch.no_grad():
        own = model.model(input_ids=ids, use_cache=False).logits[0, :, : model.vocabulary].float()
        ours = model.head().logits(model.model.base_model(ids, use_cache=False)[0][0])
    tolerance = 1e-4 if model.model.dtype == torch.float32 else 3e-2
    worst = (own - ours).abs().max() / own.abs().max().clamp_min(1e-6)
    if not worst <= tolerance:
        raise UsageError(
            f"{model.name} ({type(model.model).__name__}) changes its logits in a way that this "
            f"suite does not know (relative difference {worst:.2g})"
        )


def digest_of_model(name: str, revision: str, cache_dir: Path) -> str:
    """Names the exact weights without loading them: a hub model's commit, else a hash of files.

    Hashing a large model takes longer than loading it, so `cache_dir`/digests.json remembers the
    hash of every file for as long as its size and its time of change stay.
    """
    directory, hasher = Path(name), hashlib.sha256()
    if not directory.is_dir():
        try:
            file = cached_file(name, "config.json", revision=revision)
        except (OSError, ValueError) as problem:
            raise UsageError(f"cannot load the model {name}: {first_line(problem)}") from None
        hasher.update(f"{name}@{extract_commit_hash(file, None)}".encode())
        return hasher.hexdigest()[:20]
    if not (directory / "config.json").is_file():
        raise UsageError(f"{name} holds no model: there is no config.json in it")
    files = [directory / "config.json", directory / "generation_config.json"]
    files = [f.resolve() for f in files if f.is_file()] + sorted(
        f.resolve() for f in directory.glob("*.safetensors")
    )
    known = _read_digests(cache_dir / "digests.json") | _HASHED
    for file in files:
        state, path = file.stat(), str(file)
        if known.get(path, [])[:2] != [state.st_size, state.st_mtime_ns]:
            with open(file, "rb") as stream:
                hashed = hashlib.file_digest(stream, "sha256").hexdigest()
            known[path] = _HASHED[path] = [state.st_size, state.st_mtime_ns, hashed]
        hasher.update(known[path][2].encode())
    return hasher.hexdigest()[:20]


_HASHED: dict[str, list[Any]] = {}  # file: its size, time of change and hash


def remember_digests(cache_dir: Path) -> None:
    """Note this process's hashes for the next one, once it is known that there will be a run."""
    memory = cache_dir / "digests.json"
    with make_writable(cache_dir), FileLock(memory.with_suffix(".lock")):
        known = _read_digests(memory)
        if known | _HASHED != known:
            write_json(memory, known | _HASHED)


def _read_digests(path: Path) -> dict[str, list[Any]]:
    """What earlier runs remembered; a file that cannot be read costs only hashing again."""
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        return {name: [int(size), int(time_), str(h)] for name, (size, time_, h) in known.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def first_line(problem: Exception) -> str:
    """The beginning of an exception's message: libraries append paragraphs of advice."""
    text = str(problem.args[0] if problem.args else problem).strip()
    return (text.splitlines() or [type(problem).__name__])[0][:300]


# -------------------------------------------------------------------------- chat data and masks

Messages = list[dict[str, str]]
Item = TypeVar("Item")

# Llama 3.2's template prints today's date; with it nothing would be found in the cache tomorrow.
FIXED_DATE = "26 Jul 2024"
_FIXED_CLOCK = "{% macro strftime_now(format) %}" + FIXED_DATE + "{% endmacro %}"


@dataclass
class Conversation:
    """One row of a data set. `response` is the row's own final answer, where it brings one."""

    messages: Messages  # up to the turn to be answered
    response: str | None
    references: list[str]
    where: str  # file and line, for messages about it


class Tokens(NamedTuple):
    """Token ids of an example, and which of them are targets."""

    ids: list[int]
    targets: list[int]  # positions in `ids`, ascending, never 0


class Prompt(NamedTuple):
    """A conversation, and the ids of its rendered prompt for each model."""

    conversation: Conversation
    student: list[int]
    teacher: list[int]


class Example(NamedTuple):
    """What both models read. Each has its own template.

    Where they share a vocabulary the targets' ids are the same; where they do not, the text is.
    """

    student: Tokens
    teacher: Tokens
    where: str


class Answer(NamedTuple):
    """What a teacher wrote, its end-of-turn token not in the text."""

    text: str
    finished: bool  # False: cut by the length limit
    tokens: int  # that it took, the end-of-turn token included
    ids: list[int] | None  # None where only text crosses, as from an API


class Batch(NamedTuple):
    """Examples padded on the right, with the places of their N targets in order."""

    input_ids: Tensor  # (B, T)
    rows: Tensor  # (N,)
    columns: Tensor  # (N,) the position before each target, whose state predicts it
    targets: Tensor  # (N,)


def load_conversations(
    source: str, config: str | None = None, split: str = "train", max_rows: int = 0
) -> list[Conversation]:
    """Rows of a .jsonl, .json, .csv or .parquet file, a directory or a hub data set.

    Raises `UsageError` that names the first unusable row and what it lacks.
    """
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    reader = readers.get(Path(source).suffix)
    rows = reader(source) if reader else _dataset_rows(source, config, split)
    conversations = []
    for where, record in rows:
        if max_rows and len(conversations) == max_rows:
            break
        try:
            conversations.append(_as_conversation(record, where))
        except ValueError as problem:
            raise UsageError(f"{where}: {problem}") from None
    if not conversations:
        raise UsageError(f"{source} holds no rows")
    return conversations


def _text_of(source: str) -> str:
    try:
        raw = Path(source).read_bytes()
        return raw.decode("utf-8-sig")
    except OSError as problem:
        raise UsageError(f"cannot read {source}: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        line = raw[: problem.start].count(b"\n") + 1
        raise UsageError(f"{source}:{line}: not UTF-8") from None


def _parse_json(text: str, source: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        line = first_line + problem.lineno - 1
        raise UsageError(f"{source}:{line}: not JSON: {problem.msg}") from None
    except RecursionError:
        raise UsageError(f"{source}:{first_line}: not JSON: nested too deeply") from None


def _jsonl_rows(source: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_text_of(source).split("\n"), 1):
        if line.strip():
            yield f"{source}:{number}", _parse_json(line, source, number)


def _json_rows(source: str) -> Iterator[tuple[str, Any]]:
    rows = _parse_json(_text_of(source), source)
    if not isinstance(rows, list):
        raise UsageError(f"{source}: expected a list of rows")
    yield from ((f"{source}: row {i}", row) for i, row in enumerate(rows, 1))


def _csv_rows(source: str) -> Iterator[tuple[str, Any]]:
    """Every cell is text: a reader that guesses types turns the word `null` into nothing."""
    reader = csv.DictReader(io.StringIO(_text_of(source), newline=""))
    for row in reader:
        cells = {k: v for k, v in row.items() if k is not None and v not in (None, "")}
        yield f"{source}:{reader.line_num}", cells


def _dataset_rows(source: str, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
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
    yield from ((f"{source}: row {i}", row) for i, row in enumerate(data, 1))


def _as_conversation(record: Any, where: str) -> Conversation:
    """One row in any of the accepted forms (README, "Your own data"); `ValueError` otherwise."""
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
    return Conversation(messages, answer, references, where)


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
    """Training and evaluation conversations, disjoint; held out by seed where only one is given."""
    source = (args.dataset, args.dataset_config, args.dataset_split, args.max_rows)
    train = load_conversations(*source)
    if args.completions == "dataset":
        for conversation in train:
            if conversation.response is None:
                raise UsageError(
                    f"{conversation.where}: no assistant turn at the end, which --completions "
                    "dataset would train on"
                )
    eval_dataset = args.eval_dataset
    if eval_dataset is None and args.dataset == CommonArguments.dataset:
        eval_dataset = str(DATA / "eval.jsonl")
    if eval_dataset is not None:
        held_out = load_conversations(eval_dataset, max_rows=args.eval_size or 1000)
    else:
        size = args.eval_size or min(1000, math.ceil(len(train) / 10))
        if size >= len(train):
            raise UsageError(
                f"--eval-size {size} leaves nothing of the {len(train)} rows of {args.dataset}"
            )
        chosen = torch.randperm(len(train), generator=generator_for(args.seed, "held out")).tolist()
        held_out = [train[i] for i in sorted(chosen[:size])]
        train = [train[i] for i in sorted(chosen[size:])]
    return train, held_out


def generator_for(seed: int, purpose: str, index: int = 0) -> torch.Generator:
    """A generator that is a function of its arguments only: resuming needs no random state."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, prompt: bool, spans: bool
) -> tuple[str, list[tuple[int, int]]]:
    try:
        texts, indices = render_jinja_template(
            conversations=[messages],
            chat_template=_FIXED_CLOCK + tokenizer.chat_template,
            add_generation_prompt=prompt,
            return_assistant_tokens_mask=spans,
            date_string=FIXED_DATE,
            **tokenizer.special_tokens_map,
        )
    except Exception as problem:  # a template may raise whatever it likes
        raise UsageError(f"the chat template refuses a conversation: {problem}") from None
    return texts[0], indices[0] if spans else []


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, prompt: bool = False) -> str:
    """The conversation in the model's own template; `prompt` adds the cue for an answer."""
    return _render(tokenizer, messages, prompt=prompt, spans=False)[0]


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Messages
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the characters in it that the assistant wrote.

    Taken from the template's `{% generation %}` marks, else by rendering every prefix. Some
    templates rewrite earlier turns (dropping their reasoning, say); then a prefix rendered alone
    is no prefix of the whole, nobody can say what the model would have seen, and it is an error.
    """
    if "generation" in tokenizer.chat_template.replace("add_generation_prompt", ""):
        text, spans = _render(tokenizer, messages, prompt=False, spans=True)
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


class Encoded(NamedTuple):
    ids: list[int]
    offsets: list[tuple[int, int]]


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Ids and character offsets of rendered text, which holds its special tokens already."""
    out = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return Encoded(out["input_ids"], out["offset_mapping"])


def encode_conversation(model: LanguageModel, messages: Messages) -> Tokens:
    """Every assistant turn a target, its end-of-turn token included."""
    text, spans = assistant_spans(model.tokenizer, messages)
    ids, offsets = tokenize(model.tokenizer, text)
    # Some tokenizers leave leading spaces out of a token's offsets: it begins where the last ended.
    ends_before = [0, *(b for _, b in offsets[:-1])]
    begins = [min(a, last) for (a, _), last in zip(offsets, ends_before, strict=True)]
    targets = []
    for start, stop in spans:
        inside = [i for i, begin in enumerate(begins) if start <= begin < stop]
        ends = [i for i in inside if ids[i] in model.end_ids]
        if ends:  # templates print white space after the end of a turn, which nobody generates
            inside = [i for i in inside if i <= ends[-1]]
        elif inside and inside[-1] + 1 < len(ids) and ids[inside[-1] + 1] in model.end_ids:
            inside.append(inside[-1] + 1)
        targets += inside
    return Tokens(ids, [i for i in targets if i > 0])


def encode_prompts(model: LanguageModel, conversations: list[Conversation]) -> list[list[int]]:
    """Ids of each conversation up to and including the cue for the assistant's answer."""
    texts = []
    for c in conversations:
        try:
            texts.append(render(model.tokenizer, c.messages, prompt=True))
        except UsageError as problem:
            raise UsageError(f"{c.where}: {problem}") from None
    return model.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def with_response(prompt_ids: list[int], response_ids: list[int]) -> Tokens:
    """Prompt and response ids as one sequence, the response being the targets."""
    ids = prompt_ids + response_ids
    return Tokens(ids, list(range(len(prompt_ids), len(ids))))


def encode_for_both(
    conversations: list[Conversation],
    student: LanguageModel,
    teacher: LanguageModel | None,
    limit: int,
) -> list[Prompt]:
    """Prompts that leave either model room for an answer within `limit` tokens.

    A teacher that is not here (None) encodes for itself: its ids are then the student's.
    """
    ours = encode_prompts(student, conversations)
    shared = teacher is None or (
        student.tokenizer.chat_template == teacher.tokenizer.chat_template
        and same_vocabulary(student, teacher)
    )
    theirs = ours if shared else encode_prompts(teacher, conversations)
    prompts = [
        Prompt(*row)
        for row in zip(conversations, ours, theirs, strict=True)
        if 0 < len(row[1]) < limit and 0 < len(row[2]) < limit
    ]
    if not prompts:
        raise UsageError(
            f"none of the {len(conversations)} prompts is shorter than --max-length {limit}"
        )
    return prompts


def dataset_examples(
    prompts: list[Prompt], student: LanguageModel, teacher: LanguageModel, max_length: int
) -> tuple[list[Example], int]:
    """Examples on the data set's own responses, and how many of those were cut to fit.

    Each model reads its own template; a conversation that both render alike is encoded once.
    """
    examples, cut = [], 0
    one_vocabulary = same_vocabulary(student, teacher)
    for conversation, ours, theirs in prompts:
        whole = [*conversation.messages, {"role": "assistant", "content": conversation.response}]
        try:
            pair = [encode_conversation(student, whole)]
            pair.append(pair[0] if ours is theirs else encode_conversation(teacher, whole))
        except UsageError as problem:
            raise UsageError(f"{conversation.where}: {problem}") from None
        answers = [[t.ids[i] for i in t.targets] for t in pair]
        if one_vocabulary and answers[0] != answers[1]:
            raise UsageError(
                f"{conversation.where}: the templates of the two models split the response "
                "differently: use --completions teacher"
            )
        example = _cut(*pair, conversation.where, max_length, one_vocabulary)
        cut += len(example.student.targets) < len(answers[0])
        if example.student.targets:
            examples.append(example)
    return examples, cut


def encode_answers(
    model: LanguageModel, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> list[Tokens]:
    """The student's own tokens for answers that another tokenizer wrote.

    An answer is tokenised in its place after the prompt, so that tokenizers which mark where
    text begins (SentencePiece) mark it there. Where that would melt the prompt's last characters
    and the answer's first into one token, the answer is tokenised by itself, because at
    generation time the model has read exactly the prompt's own tokens.
    """
    rendered = [render(model.tokenizer, p.conversation.messages, prompt=True) for p in prompts]
    texts = [before + a.text for before, a in zip(rendered, answers, strict=True)]
    encode = functools.partial(model.tokenizer, add_special_tokens=False, verbose=False)
    encoded = encode(texts)["input_ids"] if texts else []
    found = []
    for prompt, answer, ids in zip(prompts, answers, encoded, strict=True):
        start = len(prompt.student)
        response = ids[start:]
        if ids[:start] != prompt.student or (answer.text and not response):
            response = encode(answer.text)["input_ids"]
        found.append(with_response(prompt.student, response + [model.end_id] * answer.finished))
    return found


def _cut(
    student: Tokens, teacher: Tokens, where: str, max_length: int, same_targets: bool
) -> Example:
    """Both sequences cut to fit; same targets stay the same, as a longer prompt leaves fewer."""
    pair = (student, teacher)
    counts = [sum(i < max_length for i in t.targets) for t in pair]
    if same_targets:
        counts = [min(counts)] * 2
    parts = [Tokens(t.ids[:max_length], t.targets[:n]) for t, n in zip(pair, counts, strict=True)]
    return Example(*parts, where)


def collate(examples: Sequence[Tokens], device: torch.device, pad_id: int = 0) -> Batch:
    """Pad on the right and list the targets, row by row."""
    width = max((len(e.ids) for e in examples), default=1)
    ids = torch.full((max(len(examples), 1), width), pad_id)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
    counts = torch.tensor([len(e.targets) for e in examples], dtype=torch.long)
    rows = torch.repeat_interleave(torch.arange(len(examples)), counts)
    positions = torch.tensor([i for e in examples for i in e.targets], dtype=torch.long)
    parts = [ids, rows, positions - 1, ids[rows, positions]]
    if device.type == "cuda":
        parts = [p.pin_memory().to(device, non_blocking=True) for p in parts]
    return Batch(*parts)


def micro_batches(
    examples: Sequence[Example], args: CommonArguments, step: int, accelerator: Accelerator
) -> tuple[list[list[Example]], int]:
    """This process's share of the step's global batch, and the target tokens of the whole of it."""
    return share_out(global_batch(examples, args, step), args, accelerator)


def global_batch(items: Sequence[Item], args: CommonArguments, step: int) -> list[Item]:
    """What a step learns from: a function of (seed, step), each epoch in an order of its own."""
    chosen = []
    for i in range(step * args.batch_size, (step + 1) * args.batch_size):
        epoch, place = divmod(i, len(items))
        chosen.append(items[_order(args.seed, epoch, len(items))[place]])
    return chosen


def share_out(
    chosen: list[Example], args: CommonArguments, accelerator: Accelerator
) -> tuple[list[list[Example]], int]:
    """This process's share of a global batch, and the target tokens of the whole of it.

    The batch is cut by length, so that micro-batches carry little padding; every process gets
    equally many, the last of which may be empty.
    """
    tokens = sum(len(e.student.targets) for e in chosen)
    chosen = sorted(chosen, key=lambda e: len(e.student.ids))
    share = math.ceil(len(chosen) / accelerator.num_processes)
    size = min(args.micro_batch_size or share, share)
    mine = chosen[accelerator.process_index :: accelerator.num_processes]
    return [mine[i : i + size] for i in range(0, share, size)], tokens


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> list[int]:
    return torch.randperm(size, generator=generator_for(seed, "order", epoch)).tolist()


# --------------------------------------------------------------------------------- teacher text


def teacher_responses(
    teacher: LanguageModel,
    prompts: Sequence[list[int]],
    args: CommonArguments,
    accelerator: Accelerator,
    *,
    temperature: float,
    top_p: float = 1.0,
    purpose: str,
) -> list[Answer]:
    """The teacher's answers, written once and kept in `--cache-dir` for every later run.

    The file's name follows from the teacher's weights and tokenizer and from the settings; its
    lines are found by the exact prompt ids, so data sets that overlap share them. Lines are added
    as they are produced: what a cut run wrote is not written again. A lock keeps runs side by side
    from doing the same work.
    """
    settings = {
        "teacher": teacher.digest,
        "dtype": str(teacher.compute_dtype),
        "temperature": temperature,
        "top_p": top_p if temperature else 1.0,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed if temperature else 0,
        "end_ids": teacher.end_ids,
    }
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    path = Path(args.cache_dir) / "text" / f"{name}.jsonl"
    keys = sample_keys(prompts, temperature)
    remember_digests(Path(args.cache_dir))
    with make_writable(path.parent), one_writer(path.with_suffix(".lock"), accelerator):
        known = read_text_cache(path)
        accelerator.wait_for_everyone()  # all must see the same lines, and share out the rest
        missing = list({k: i for i, k in enumerate(keys) if k not in known}.values())
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        written = generate(
            teacher, [prompts[i] for i in mine], [row_seed(args.seed, keys[i]) for i in mine],
            max_new_tokens=args.max_new_tokens, temperature=temperature, top_p=top_p,
            batch_size=args.generation_batch_size,
        )  # fmt: skip
        bar = progress(accelerator, f"teacher writes ({purpose})", len(mine))
        began, tokens, lines = time.perf_counter(), 0, []
        for done, (place, response) in enumerate(written, 1):
            i = mine[place]
            known[keys[i]] = answer = as_answer(teacher, response)
            tokens += answer.tokens
            line = {
                "key": keys[i],
                "prompt": teacher.tokenizer.decode(prompts[i]),
                "response": answer.text,
                "response_ids": answer.ids,
                "finish_reason": "stop" if answer.finished else "length",
            }
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            if len(lines) == args.generation_batch_size or done == len(mine):
                append_lines(path, lines)
                bar.update(len(lines))
                bar.set_postfix(tokens_per_second=f"{tokens / (time.perf_counter() - began):.0f}")
                lines = []
        bar.close()
        accelerator.wait_for_everyone()
        if accelerator.num_processes > 1:
            known = read_text_cache(path)
    return [known[k] for k in keys]


def sample_keys(prompts: Sequence[Any], temperature: float) -> list[str]:
    """What answers are found by in the cache: a prompt that occurs twice gets two samples."""
    seen: dict[str, int] = {}
    keys = []
    for prompt in prompts:
        count = seen.get(repr(prompt), 0) if temperature else 0
        seen[repr(prompt)] = count + 1
        keys.append(f"{row_seed(prompt, count):016x}")
    return keys


@contextlib.contextmanager
def one_writer(lock: Path, accelerator: Accelerator) -> Iterator[None]:
    """One run at a time, whose processes write together."""
    with FileLock(lock) if accelerator.is_main_process else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        yield
        accelerator.wait_for_everyone()


def append_lines(path: Path, lines: list[str]) -> None:
    """Add whole lines to a cache file; in the system's hands when this returns."""
    with FileLock(path.with_suffix(".append")), open(path, "a", encoding="utf-8") as stream:
        stream.writelines(lines)


def read_text_cache(path: Path) -> dict[str, Answer]:
    """Whole lines of the cache file; an unfinished last one, left by a cut, is removed."""
    if not path.exists():
        return {}
    raw = path.read_bytes()
    whole = raw.rfind(b"\n") + 1
    if whole < len(raw):
        os.truncate(path, whole)
    known = {}
    for number, line in enumerate(raw[:whole].split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            ids = row["response_ids"]  # null in the text of a teacher that is not here
            ids = None if ids is None else [int(i) for i in ids]
            tokens = int(row["tokens"]) if ids is None else len(ids)
            finished = {"stop": True, "length": False}[row["finish_reason"]]
            known[row["key"]] = Answer(str(row["response"]), finished, tokens, ids)
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path}:{number}: corrupt cache of teacher text; delete the file to write it again"
            ) from None
    return known


@contextlib.contextmanager
def make_writable(directory: Path) -> Iterator[None]:
    """Create a directory; a full disk or a missing permission inside becomes one sentence."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as problem:
        raise UsageError(f"cannot write in {directory}: {problem.strerror or problem}") from None


def check_disk(directory: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for (bytes)."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UsageError(
            f"the teacher's states need {needed / 1e6:.1f} MB in {directory}, which has only "
            f"{free / 1e6:.1f} MB left: name another --cache-dir, or add --no-cache-teacher"
        )


def progress(accelerator: Accelerator, what: str, total: int, done: int = 0) -> tqdm:
    """A bar on the main process's terminal, and nowhere else."""
    hidden = None if accelerator.is_main_process else True  # None: hidden where no terminal is
    return tqdm(total=total, initial=done, desc=what, disable=hidden, dynamic_ncols=True)


def make_examples(
    conversations: list[Conversation],
    prompts: list[Prompt],
    student: LanguageModel,
    teacher: LanguageModel,
    args: CommonArguments,
    accelerator: Accelerator,
) -> list[Example]:
    """The training examples that --completions asks for; says what was left out or cut."""
    if args.completions == "teacher":
        answers = teacher_responses(
            teacher, [p.teacher for p in prompts], args, accelerator,
            temperature=args.sampling_temperature, top_p=args.top_p, purpose="training text",
        )  # fmt: skip
        examples = teacher_examples(prompts, answers, student, teacher, args.max_length)
        cut = sum(not a.finished for a in answers)
    else:
        examples, cut = dataset_examples(prompts, student, teacher, args.max_length)
    tokens = sum(len(e.student.targets) for e in examples)
    accelerator.print(
        f"training text: {len(examples)} examples, {tokens} target tokens; {cut} responses cut "
        f"short; {len(conversations) - len(prompts)} prompts left out, as they do not fit into "
        f"--max-length {args.max_length}"
    )
    return examples


def teacher_examples(
    prompts: list[Prompt],
    answers: Sequence[Answer],
    student: LanguageModel,
    teacher: LanguageModel | None,
    max_length: int,
) -> list[Example]:
    """Examples on the teacher's text: its ids go to both models as they are.

    Where the vocabularies differ, or the teacher is not here (None), the text crosses instead,
    and the student reads it in tokens of its own. A response cut here to fit into `max_length`
    loses its end token, as it should.
    """
    known = [[] if a.ids is None else a.ids for a in answers]
    if teacher is not None and same_vocabulary(student, teacher):
        return id_examples(prompts, known, max_length)
    theirs = ours = encode_answers(student, prompts, answers)
    if teacher is not None:
        theirs = [with_response(p.teacher, ids) for p, ids in zip(prompts, known, strict=True)]
    return [
        _cut(mine, its, prompt.conversation.where, max_length, False)
        for prompt, mine, its in zip(prompts, ours, theirs, strict=True)
    ]


def id_examples(
    prompts: Sequence[Prompt], responses: Sequence[list[int]], max_length: int
) -> list[Example]:
    """Examples on responses whose ids both models read as they are: they share a vocabulary."""
    return [
        _cut(
            with_response(prompt.student, ids),
            with_response(prompt.teacher, ids),
            prompt.conversation.where,
            max_length,
            True,
        )
        for prompt, ids in zip(prompts, responses, strict=True)
    ]


class TeacherStates:
    """The teacher's final states at the targets of fixed text: run live, or kept on disk.

    With --cache-teacher they are computed first, in batches that do not depend on how a run
    trains, into a file that is then mapped into memory. The run that fills it trains from it, so
    every later run on the same text finds the same bits, whatever its temperature or divergence,
    and needs no backbone. The file is named after the teacher's weights and dtype and after the
    exact ids and targets in their batches. A record beside it gets a line, batch and checksum,
    once the bytes of the batch are safe on disk: what a cut run computed is not computed again.
    """

    def __init__(
        self,
        teacher: LanguageModel,
        examples: Sequence[Example],
        args: CommonArguments,
        accelerator: Accelerator,
        purpose: str,
    ) -> None:
        """Fill the cache, if there is to be one, for `purpose` (shown to the user).

        Raises `UsageError` for a disk without room, before it writes, and for a corrupt file.
        """
        self.teacher, self.examples = teacher, examples
        self.kept: Tensor | None = None  # (tokens of all examples, d)
        if not args.cache_teacher:
            return
        teacher.keep()
        # The teacher's tokens alone decide the batches, as they alone decide the states.
        by_teacher = {i: e._replace(student=e.teacher) for i, e in enumerate(examples)}
        self.batches = [[examples[i] for i, _ in b] for b in length_batches(by_teacher)]
        self.ends = [0]  # rows of `kept` before each batch
        self.places: dict[int, slice] = {}  # by id(): an example is no key, its lists can change
        for batch in self.batches:
            start = self.ends[-1]
            for example in batch:
                stop = start + len(example.teacher.targets)
                self.places[id(example)] = slice(start, stop)
                start = stop
            self.ends.append(start)
        self.width = teacher.head().weight.shape[1]
        self.row_bytes = self.width * teacher.compute_dtype.itemsize
        self.path = Path(args.cache_dir) / "states" / f"{self._key()}.bin"
        with (
            make_writable(self.path.parent),
            one_writer(self.path.with_suffix(".lock"), accelerator),
        ):
            if accelerator.is_main_process:
                self._make_room(purpose)
            accelerator.wait_for_everyone()
            self._fill(accelerator, purpose)
        self.kept = torch.from_file(
            str(self.path), size=self.ends[-1] * self.width, dtype=teacher.compute_dtype
        ).view(-1, self.width)
        loaded = "is loaded" if "model" in vars(teacher) else "is not loaded"
        accelerator.print(f"{purpose}: teacher states from the cache; its backbone {loaded}")

    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """States (N, d) on the teacher's device, at the N targets of `examples` in their order."""
        device = self.teacher.device
        if self.kept is None:
            return teacher_states(self.teacher, collate([e.teacher for e in examples], device))
        pieces = [self.kept[self.places[id(e)]] for e in examples]
        states = torch.empty(
            (sum(map(len, pieces)), self.width),
            dtype=self.kept.dtype,
            pin_memory=device.type == "cuda",
        )
        torch.cat([self.kept[:0], *pieces], out=states)
        return states.to(device, non_blocking=True)

    def _key(self) -> str:
        hasher = hashlib.sha256(f"{self.teacher.digest} {self.teacher.compute_dtype}".encode())
        for batch in self.batches:
            for ids, targets in [e.teacher for e in batch]:
                hasher.update(array("q", [len(ids), len(targets), *ids, *targets]).tobytes())
            hasher.update(b"end of batch")
        return hasher.hexdigest()[:16]

    def _record(self) -> dict[int, int]:
        """Checksums of the batches whose bytes are on disk."""
        try:
            raw = self.path.with_suffix(".done").read_bytes()
        except FileNotFoundError:
            return {}
        lines = raw[: raw.rfind(b"\n") + 1].splitlines()
        try:
            return {int(batch): int(checksum) for batch, checksum in map(bytes.split, lines)}
        except ValueError:
            raise self._corrupt("unreadable record") from None

    def _corrupt(self, how: str) -> UsageError:
        return UsageError(
            f"{self.path}: corrupt cache of teacher states ({how}); delete the file to write it "
            "again"
        )

    def _make_room(self, purpose: str) -> None:
        """Leave a file of the full length with the batches of its record, and a whole record."""
        done, whole = self.path.with_suffix(".done"), self.ends[-1] * self.row_bytes
        if not self.path.exists():
            done.unlink(missing_ok=True)  # whoever deletes the states need not know of the record
        record = self._record()
        if record and self.path.stat().st_size != whole:
            raise self._corrupt(f"{self.path.stat().st_size} bytes instead of {whole}")
        missing = [i for i in range(len(self.batches)) if i not in record]
        needed = sum(self.ends[i + 1] - self.ends[i] for i in missing) * self.row_bytes
        if not needed:
            return
        print(
            f"{purpose}: writing {needed / 1e6:.1f} MB of teacher states to {self.path}, "
            f"{self.row_bytes} bytes a token"
        )
        check_disk(self.path.parent, needed)
        done.write_text("".join(f"{i} {checksum}\n" for i, checksum in record.items()))
        with open(self.path, "r+b" if record else "wb") as stream:
            stream.truncate(whole)

    def _fill(self, accelerator: Accelerator, purpose: str) -> None:
        """Compute the missing batches and check the others, shared out between the processes."""
        record = self._record()
        # Shares do not depend on the record, to which the others may be adding already.
        mine = range(accelerator.process_index, len(self.batches), accelerator.num_processes)
        bar = progress(accelerator, f"teacher states ({purpose})", len(mine))
        with open(self.path, "r+b") as stream:
            for i in mine:
                start, stop = (self.ends[j] * self.row_bytes for j in (i, i + 1))
                stream.seek(start)
                if i in record:
                    if zlib.crc32(stream.read(stop - start)) != record[i]:
                        raise self._corrupt(f"bytes {start} to {stop}")
                else:
                    tokens = [e.teacher for e in self.batches[i]]
                    states = teacher_states(self.teacher, collate(tokens, self.teacher.device))
                    states = states.to("cpu", self.teacher.compute_dtype).view(torch.uint8).numpy()
                    stream.write(states)
                    stream.flush()
                    os.fsync(stream.fileno())
                    append_lines(self.path.with_suffix(".done"), [f"{i} {zlib.crc32(states)}\n"])
                bar.update()
        bar.close()


# ------------------------------------------------------------------ distributions and divergences


def log_softmax_with_temperature(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last axis, in float32 at least."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    scaled = logits.to(wide) if temperature == 1 else logits.to(wide) / temperature
    return F.log_softmax(scaled, dim=-1)


def softmax_with_temperature(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """softmax(logits / temperature) over the last axis, in float32 at least."""
    return log_softmax_with_temperature(logits, temperature).exp()


class Objective(NamedTuple):
    """What is minimised, per target token: T² · D_T(teacher, student) + ce_weight · CE at T = 1."""

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
            overwritten: with V = 150 000, another array each is what memory is short of.

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


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Tokens to project at a time: on a CPU their logits should stay near the caches."""
    elements = 2**23 if device.type == "cpu" else 2**26
    return max(16, elements // vocabulary)


class _ChunkedLoss(torch.autograd.Function):
    """Sum over tokens of the objective, with gradients taken chunk by chunk in the forward pass.

    Logits (chunk, V) are made, used for value and gradient, and dropped, so that memory beyond
    inputs and their gradients does not grow with N x V. The gradients are *returned* from
    backward, never written to `.grad`: tied embeddings add up and DDP reduces them once.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, student, teacher_states, teacher, targets, objective):
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(states.dtype, torch.float32)
        sums = torch.zeros(2, dtype=wide, device=states.device)  # divergence, cross-entropy
        student = student._replace(weight=weight, bias=bias).ready(states.dtype, states.device)
        if teacher is not None:
            teacher = teacher.ready(teacher_states.dtype, states.device)
        grad_states = torch.empty_like(states) if wants_states else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        rows = chunk_rows(weight.shape[0], states.device)
        for start in range(0, len(states), rows):
            piece = slice(start, start + rows)
            gradient = slope = logprobs = logits = None  # those of the last chunk
            logits = student.logits(states[piece])
            if objective.ce_weight:
                logprobs = log_softmax_with_temperature(logits)
                target = targets[piece, None]
                sums[1] -= logprobs.gather(1, target).sum()
                gradient = logprobs.exp_()
                gradient.scatter_add_(1, target, -torch.ones_like(target, dtype=gradient.dtype))
                gradient.mul_(objective.ce_weight)
            if teacher is not None:
                t = objective.temperature
                logprobs = log_softmax_with_temperature(logits, t)
                if student.softcap is None:
                    logits = None  # as large as the rest, and not needed any more
                value, slope = divergence(
                    logprobs,
                    log_softmax_with_temperature(teacher.logits(teacher_states[piece]), t),
                    objective,
                )
                sums[0] += value.sum()
                slope.mul_(t)  # T² from the loss, 1/T from logits / T
                gradient = slope if gradient is None else gradient.add_(slope)
            gradient = student.transform_backward(gradient, logits)
            if wants_bias:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(states.dtype)
            if wants_states:
                grad_states[piece] = project(gradient, student.weight.t())
            if wants_weight:
                add_product(grad_weight, gradient, states[piece])
        ctx.gradients = [grad_states, grad_weight, grad_bias]
        ctx.mark_non_differentiable(sums)
        loss = objective.temperature**2 * sums[0] + objective.ce_weight * sums[1]
        return loss, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        gradients, ctx.gradients = ctx.gradients, None
        scaled = [None if g is None else g.mul_(grad_loss) for g in gradients]
        return (*scaled, *[None] * 5)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += leftᵀ @ right`, accumulated in `total`'s float32 whatever the inputs are."""
    if _onednn_wins(left.t(), right.t()):  # it cannot add; what it returns should fit the caches
        right = right.contiguous()
        for rows, part in zip(total.split(4096), left.split(4096, dim=1), strict=True):
            rows += _by_onednn(part.t(), right.t())
    elif left.dtype == total.dtype:
        total.addmm_(left.t(), right)
    else:
        total += project(left.t(), right.t())


def distillation_loss(
    student_states: Tensor,
    student: Head,
    targets: Tensor,
    objective: Objective,
    teacher_states: Tensor | None = None,
    teacher: Head | None = None,
) -> tuple[Tensor, Tensor]:
    """The objective summed over N target tokens, without ever holding N x V logits.

    Args:
        student_states: (N, d), the states that predict the targets.
        targets: (N,) token ids, used by the cross-entropy term.
        teacher_states, teacher: (N, d') and the teacher's head; None for cross-entropy alone.

    Returns:
        The loss, a scalar in nats summed over tokens, differentiable in the student's states and
        head; and, detached, the sums (2,) of D_T (without T²) and of the cross-entropy (0 where
        `ce_weight` is 0).
    """
    with torch.autocast(student_states.device.type, enabled=False):
        return _ChunkedLoss.apply(
            student_states, student.weight, student.bias, student,
            teacher_states, teacher, targets, objective,
        )  # fmt: skip


def token_logprobs(states: Tensor, head: Head, targets: Tensor) -> Tensor:
    """log p(target) at T = 1 for each token: (N,), differentiable in states and head.

    For losses that couple tokens (spans), whose gradient is not known chunk by chunk: the logits
    of a chunk are computed again in the backward pass instead of being kept.
    """

    def piece(states: Tensor, targets: Tensor) -> Tensor:
        logprobs = log_softmax_with_temperature(head.logits(states))
        return logprobs.gather(1, targets[:, None])[:, 0]

    head = head.ready(states.dtype, states.device)
    rows = chunk_rows(head.weight.shape[0], states.device)
    with torch.autocast(states.device.type, enabled=False):
        chunks = [
            checkpoint(piece, s, t, use_reentrant=False)
            for s, t in zip(states.split(rows), targets.split(rows), strict=True)
        ]
    return torch.cat(chunks) if chunks else states.sum(-1)


class Comparison(NamedTuple):
    """Two models on the same targets, per token and at T = 1."""

    kl: Tensor  # (N,) KL(teacher ‖ student), nats
    agreement: Tensor  # (N,) 1 where both have the same most likely token
    student_logprob: Tensor  # (N,)
    teacher_logprob: Tensor  # (N,)


@torch.no_grad()
def compare(
    student_states: Tensor, student: Head, teacher_states: Tensor, teacher: Head, targets: Tensor
) -> Comparison:
    """What evaluation needs of two models' distributions, chunk by chunk."""
    pieces = []
    student = student.ready(student_states.dtype, student_states.device)
    teacher = teacher.ready(teacher_states.dtype, student_states.device)
    rows = chunk_rows(student.weight.shape[0], student_states.device)
    for start in range(0, len(targets), rows):
        piece = slice(start, start + rows)
        ours = log_softmax_with_temperature(student.logits(student_states[piece]))
        theirs = log_softmax_with_temperature(teacher.logits(teacher_states[piece]))
        target = targets[piece, None]
        agreement = (ours.argmax(-1) == theirs.argmax(-1)).float()
        likelihoods = [logprobs.gather(1, target)[:, 0] for logprobs in (ours, theirs)]
        kl, _ = divergence(ours, theirs, Objective())  # last, as it overwrites both
        pieces.append(Comparison(kl, agreement, *likelihoods))
    return Comparison(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))


# ----------------------------------------------------------------------------------- generation


class Response(NamedTuple):
    ids: list[int]  # the end-of-turn token included, where one was written
    finished: bool  # False: cut by the length limit


def uniforms(seeds: Sequence[int], positions: int) -> Tensor:
    """Numbers in [0, 1), (rows, positions), each a function of (row's seed, position): splitmix64.

    Made on the CPU for a whole batch at once, in float64, which not every device has.
    """
    # The generator's constants as signed numbers: int64 wraps around as it wants.
    z = torch.arange(1, positions + 1) * -7046029254386353131 + torch.tensor(seeds)[:, None]
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    z = z ^ ((z >> 31) & ((1 << 33) - 1))
    return ((z >> 11) & ((1 << 53) - 1)).double() / 2**53


def row_seed(*parts: Any) -> int:
    """A 63-bit seed that names a row: its text does not depend on the rows beside it."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def sample(logits: Tensor, draws: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row: the inverse of the cumulative distribution at `draws` (n,), or greedy."""
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
) -> Iterator[tuple[int, Response]]:
    """Answers to `prompts` (ids), as (index, response) in the order in which they are finished.

    Prompts are taken up shortest first, `batch_size` at a time; where a quarter of the rows have
    left, the next prompts take their places. Nothing is taken from the model's
    generation_config but its end tokens.
    """
    if not prompts:
        return  # a teacher whose text is all known need not be loaded
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    training = model.model.training
    model.model.eval()  # also ends gradient checkpointing, which would switch the KV cache off
    writer = _Writer(model, prompts, seeds, max_new_tokens, temperature, top_p)
    try:
        with packed_layers(model):
            while waiting or writer.rows:
                free = batch_size - len(writer.rows)
                if waiting and (not writer.rows or (4 * free >= batch_size and writer.can_join)):
                    writer.take_up(waiting[:free])
                    waiting = waiting[free:]
                yield from writer.write()
    finally:
        model.model.train(training)


class _RoomyLayer(DynamicLayer):
    """Keys and values with room behind them, so that a new token does not copy all before it."""

    step = 64  # tokens by which the room grows
    rooms: tuple[Tensor, Tensor] | None = None  # (B, heads, room, d) each

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        total = length + key_states.shape[-2]
        if self.rooms is None or total > self.rooms[0].shape[-2]:
            key_states, value_states = super().update(key_states, value_states)
            length = 0
            self.rooms = tuple(
                t.new_empty((*t.shape[:-2], total + self.step, t.shape[-1]))
                for t in (key_states, value_states)
            )
        for room, new in zip(self.rooms, (key_states, value_states), strict=True):
            room[..., length:total, :] = new
        self.keys, self.values = (room[..., :total, :] for room in self.rooms)
        return self.keys, self.values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.rooms = keys, values, None

    def batch_select_indices(self, indices: Tensor) -> None:
        self.replace(self.keys[indices], self.values[indices])


class _Writer:
    """Rows being written side by side, aligned at their last token, padded on the left.

    Rows that are finished leave and others may join: keys know their own positions, so that it
    does not matter in which column of the cache they stand.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[list[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> None:
        self.model, self.prompts, self.seeds = model, prompts, seeds
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.device = model.device
        self.longest = model.max_positions or sys.maxsize
        # Each look at who has finished waits for the device; until then rows write on.
        self.looks = 1 if self.device.type == "cpu" else 8
        head = model.head().ready(model.compute_dtype, self.device)
        self.head = head._replace(weight=packed(head.weight))
        self.ends = torch.tensor(model.end_ids, device=self.device)
        self.rows: list[int] = []  # places in `prompts`, in the order of the state's rows
        self.state: dict[str, Tensor] = {}
        self.cache = DynamicCache()

    @property
    def can_join(self) -> bool:
        """Whether every layer keeps all that it was given, column by column."""
        return all(type(layer) is _RoomyLayer for layer in self.cache.layers)

    @torch.inference_mode()
    def take_up(self, rows: list[int]) -> None:
        """Read the prompts of new rows and write a first token for each."""
        chosen = [self.prompts[i] for i in rows]
        width, columns = max(map(len, chosen)), self.max_new_tokens + self.looks
        left = [width - len(p) for p in chosen]
        ids = torch.tensor([[0] * n + p for n, p in zip(left, chosen, strict=True)])
        limits = [min(self.max_new_tokens, self.longest - len(p)) for p in chosen]
        draws = uniforms([self.seeds[i] for i in rows], columns)
        state = {
            "mask": (torch.arange(width) >= torch.tensor(left)[:, None]).long(),  # (B, T)
            "position": torch.tensor([[len(p) - 1] for p in chosen]),  # of the last token read
            "limit": torch.tensor(limits),
            "written": torch.zeros(len(rows), dtype=torch.long),
            "ended": torch.zeros(len(rows), dtype=torch.bool),
            "out": torch.full((len(rows), columns), -1),
            "draws": draws.to(torch.float32 if self.device.type == "mps" else torch.float64),
        }
        state = {name: t.to(self.device) for name, t in state.items()}
        cache = DynamicCache(config=self.model.model.config)
        cache.layers = [_RoomyLayer() if type(x) is DynamicLayer else x for x in cache.layers]
        positions = (state["mask"].cumsum(-1) - 1).clamp_min(0)
        self._advance(state, cache, ids.to(self.device), positions)
        if self.rows:
            state, cache = self._joined(state, cache)
        self.rows, self.state, self.cache = self.rows + rows, state, cache

    def _advance(
        self, state: dict[str, Tensor], cache: DynamicCache, ids: Tensor, positions: Tensor
    ) -> None:
        """Read `ids` (B, t) and write one more token in every row."""
        states = self.model.backbone(
            input_ids=ids, attention_mask=state["mask"], position_ids=positions,
            cache=cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        place = state["written"][:, None]
        draws = state["draws"].gather(1, place)[:, 0]
        tokens = sample(self.head.logits(states), draws, self.temperature, self.top_p)
        state["out"].scatter_(1, place, tokens[:, None])
        state["written"] = state["written"] + 1
        state["last"] = tokens
        over = state["written"] >= state["limit"]
        state["ended"] = state["ended"] | torch.isin(tokens, self.ends) | over

    def _joined(
        self, state: dict[str, Tensor], cache: DynamicCache
    ) -> tuple[dict[str, Tensor], DynamicCache]:
        """The rows here and new ones below, without leading columns that are padding in all."""
        masks = [self.state["mask"], state["mask"]]
        width = max(mask.shape[1] for mask in masks)
        pads = [width - mask.shape[1] for mask in masks]
        mask = torch.cat([F.pad(m, (n, 0)) for m, n in zip(masks, pads, strict=True)])
        first = int(mask.amax(0).argmax())
        for old, new in zip(self.cache.layers, cache.layers, strict=True):
            both = [
                torch.cat(
                    [
                        F.pad(t, (0, 0, n, 0))[..., first:, :]
                        for t, n in zip(pair, pads, strict=True)
                    ]
                )
                for pair in ((old.keys, new.keys), (old.values, new.values))
            ]
            old.replace(*both)
        merged = {
            name: torch.cat([self.state[name], new])
            for name, new in state.items()
            if name != "mask"
        }
        return merged | {"mask": mask[:, first:]}, self.cache

    @torch.inference_mode()
    def write(self) -> list[tuple[int, Response]]:
        """Let finished rows leave, and write on in the others until it is time to look again."""
        left = self._leave()
        for _ in range(self.looks if self.rows else 0):
            state = self.state
            state["mask"] = F.pad(state["mask"], (0, 1), value=1)
            state["position"] = (state["position"] + 1).clamp_max(self.longest - 1)
            self._advance(state, self.cache, state["last"][:, None], state["position"])
        return left

    def _leave(self) -> list[tuple[int, Response]]:
        stay = (~self.state["ended"]).nonzero()[:, 0]
        if len(stay) == len(self.rows):
            return []
        gone = self.state["ended"].nonzero()[:, 0]
        responses = []
        written = self.state["out"][gone].tolist(), self.state["limit"][gone].tolist()
        for i, row, length in zip(gone.tolist(), *written, strict=True):
            stop = next(
                (k for k, token in enumerate(row[:length]) if token in self.model.end_ids), None
            )
            ids = row[: length if stop is None else stop + 1]
            responses.append((self.rows[i], Response(ids, stop is not None)))
        self.rows = [self.rows[i] for i in stay.tolist()]
        if self.rows:
            self.state = {name: t[stay] for name, t in self.state.items()}
            self.cache.batch_select_indices(stay)
        return responses


def as_answer(model: LanguageModel, response: Response) -> Answer:
    """The response with the text that a person reads."""
    ids = response.ids[:-1] if response.finished else response.ids
    text = model.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return Answer(text, response.finished, len(response.ids), response.ids)


# ----------------------------------------------------------------------------------- evaluation

Row = dict[str, float]  # sums over one evaluation row: see `Evaluator`
Scores = dict[str, float]

# Scores that have a gap to close, whether more is better, and what the teacher itself has.
GAPS = {
    "kl_to_teacher": (False, 0.0),
    "top1_agreement": (True, 1.0),
    "exact_match": (True, None),
    "error_rate": (False, None),
}


class Evaluator:
    """Scores students and their teacher on the same held-out prompts.

    On one fixed set of answers sampled from the teacher (temperature 1): `kl_to_teacher`
    (KL(teacher ‖ student), nats per target token) and `top1_agreement` where both models have one
    vocabulary, `nats_per_token` in each model's own tokens, and `bits_per_byte` of the answers'
    text without end tokens. On greedy answers: `exact_match`, `error_rate` (word edit distance to
    the nearest reference over that reference's words), `response_tokens` and `cut_off`, the share
    that reached the length limit. Rows without a reference are measured against the teacher's own
    greedy answer.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        student: LanguageModel,
        teacher: LanguageModel | None,
        args: CommonArguments,
        accelerator: Accelerator,
        write: Callable[..., list[Answer]] | None = None,
    ) -> None:
        """Have the teacher answer the prompts, and score it.

        `write(temperature=..., purpose=...)` gives the answers of a teacher that is not here;
        `teacher` is then None and has no scores that need its distribution.
        """
        self.args, self.accelerator = args, accelerator
        if write is None:
            ids = [p.teacher for p in prompts]
            write = functools.partial(teacher_responses, teacher, ids, args, accelerator)
        greedy = write(temperature=0.0, purpose="greedy answers to the evaluation prompts")
        samples = write(temperature=1.0, purpose="samples for the evaluation prompts")
        self.references = [
            p.conversation.references or [answer.text]
            for p, answer in zip(prompts, greedy, strict=True)
        ]
        self.unreferenced = sum(not p.conversation.references for p in prompts)
        share = range(accelerator.process_index, len(prompts), accelerator.num_processes)
        self.prompts = {i: prompts[i].student for i in share}
        examples = teacher_examples(prompts, samples, student, teacher, args.max_length)
        self.batches = length_batches({i: examples[i] for i in share})
        self.comparable = teacher is not None and same_vocabulary(student, teacher)
        # What ends an answer and is no text: the teacher's token where its ids are read.
        ends = teacher.end_ids if self.comparable else student.end_ids
        self.text = {i: _text_part(student, examples[i].student, ends) for i in share}
        rows = {i: self._answer_row(i, greedy[i]) for i in share}
        if teacher is not None:
            self._read_with(teacher, examples, rows)
        self.teacher_rows = self._gathered(rows)

    def _read_with(
        self, teacher: LanguageModel, examples: list[Example], rows: dict[int, Row]
    ) -> None:
        """Keep the teacher's states at the targets; add its own likelihoods to its rows."""
        self.teacher_head = teacher.head()
        states = TeacherStates(teacher, examples, self.args, self.accelerator, "evaluation text")
        self.teacher_states = [states([e for _, e in batch]).cpu() for batch in self.batches]
        for batch, kept in zip(self.batches, self.teacher_states, strict=True):
            sides = {i: example.teacher for i, example in batch}
            targets = collate(list(sides.values()), teacher.device).targets
            with torch.no_grad():
                logprobs = token_logprobs(kept.to(teacher.device), self.teacher_head, targets)
            text = {i: _text_part(teacher, side, teacher.end_ids) for i, side in sides.items()}
            self._add_likelihoods(rows, sides, text, logprobs)

    def __call__(self, student: LanguageModel, show: int = 0) -> list[Row]:
        """One row of sums per evaluation prompt, on every process; prints `show` answers."""
        rows = {}
        ids = list(self.prompts.values())
        answers = generate(
            student, ids, [0] * len(ids), max_new_tokens=self.args.max_new_tokens,
            temperature=0.0, batch_size=self.args.generation_batch_size,
        )  # fmt: skip
        for place, response in answers:
            i, answer = list(self.prompts)[place], as_answer(student, response)
            rows[i] = self._answer_row(i, answer)
            if i < show:
                asked = student.tokenizer.decode(ids[place])
                said = f"{answer.text!r}  (of {self.references[i]})"
                self.accelerator.print(f"  {asked!r}\n    {said}")
        training = student.model.training
        student.model.eval()
        for place in range(len(self.batches)):
            self._add_batch(rows, student, place)
        student.model.train(training)
        return self._gathered(rows)

    @torch.no_grad()
    def _add_batch(self, rows: dict[int, Row], student: LanguageModel, place: int) -> None:
        """What the student thinks of one batch of the teacher's samples."""
        sides = {i: example.student for i, example in self.batches[place]}
        inputs = collate(list(sides.values()), student.device)
        states, head = student.states(inputs), student.head()
        if not self.comparable:
            logprobs = token_logprobs(states, head, inputs.targets)
            self._add_likelihoods(rows, sides, self.text, logprobs)
            return
        theirs = self.teacher_states[place].to(student.device)
        compared = compare(states, head, theirs, self.teacher_head, inputs.targets)
        self._add_likelihoods(rows, sides, self.text, compared.student_logprob)
        row_of = inputs.rows.cpu()
        for name, values in (("kl", compared.kl), ("agree", compared.agreement)):
            sums = torch.zeros(len(sides)).index_add_(0, row_of, values.float().cpu())
            for i, value in zip(sides, sums.tolist(), strict=True):
                rows[i][name] = value

    def _answer_row(self, i: int, answer: Answer) -> Row:
        words = answer.text.split()
        edits, length = min(
            (edit_distance(words, reference.split()), len(reference.split()))
            for reference in self.references[i]
        )
        return {
            "exact": float(edits == 0),
            "edits": edits,
            "reference_words": length,
            "response_tokens": answer.tokens,
            "cut_off": float(not answer.finished),
        }

    def _add_likelihoods(
        self,
        rows: dict[int, Row],
        sides: dict[int, Tokens],
        text: dict[int, tuple[int, int]],
        logprobs: Tensor,
    ) -> None:
        counts = [len(side.targets) for side in sides.values()]
        for i, part in zip(sides, logprobs.float().cpu().split(counts), strict=True):
            tokens, size = text[i]
            rows[i] |= {
                "tokens": len(part),
                "nats": -part.sum().item(),
                "text_nats": -part[:tokens].sum().item(),
                "bytes": size,
            }

    def _gathered(self, rows: dict[int, Row]) -> list[Row]:
        everything = dict(gather_object(list(rows.items())))
        return [everything[i] for i in sorted(everything)]


def _text_part(model: LanguageModel, tokens: Tokens, ends: list[int]) -> tuple[int, int]:
    """Tokens and UTF-8 bytes of a single answer's text, without its end-of-turn token."""
    ids, targets = tokens
    count = len(targets) - bool(targets and ids[targets[-1]] in ends)
    if not count:
        return 0, 0
    decode = functools.partial(model.tokenizer.decode, clean_up_tokenization_spaces=False)
    start = targets[0]  # with the prompt before it: some tokenizers strip what text begins with
    return count, len(decode(ids[: start + count]).encode()) - len(decode(ids[:start]).encode())


@torch.no_grad()
def teacher_states(teacher: LanguageModel, batch: Batch) -> Tensor:
    """The teacher's final states (N, d) at the batch's targets, without a graph."""
    return teacher.states(batch)


def length_batches(
    examples: dict[int, Example], tokens: int = 16384
) -> list[list[tuple[int, Example]]]:
    """Examples of similar length together, at most `tokens` of padded input in a batch."""
    batches: list[list[tuple[int, Example]]] = []
    for i, example in sorted(examples.items(), key=lambda item: len(item[1].student.ids)):
        width = max(len(example.student.ids), len(example.teacher.ids))
        if not batches or (len(batches[-1]) + 1) * width > tokens:
            batches.append([])
        batches[-1].append((i, example))
    return batches


def edit_distance(a: Sequence[str], b: Sequence[str]) -> int:
    """Insertions, deletions and substitutions between two sequences of words (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def scores(rows: list[Row]) -> Scores:
    """The numbers of a results table from evaluation rows; `Evaluator` tells their meaning."""

    def ratio(top: str, bottom: str) -> float:
        return sum(r[top] for r in rows) / max(1, sum(r[bottom] for r in rows))

    found = {}
    if "kl" in rows[0]:
        found["kl_to_teacher"] = ratio("kl", "tokens")
        found["top1_agreement"] = ratio("agree", "tokens")
    if "nats" in rows[0]:
        found["nats_per_token"] = ratio("nats", "tokens")
        found["bits_per_byte"] = ratio("text_nats", "bytes") / math.log(2)
    if "own_kl" in rows[0]:
        found["kl_on_own_text"] = ratio("own_kl", "own_tokens")
        found["exposure_bias"] = found["kl_on_own_text"] / max(found["kl_to_teacher"], 1e-9)
    return found | {
        "exact_match": sum(r["exact"] for r in rows) / len(rows),
        "error_rate": ratio("edits", "reference_words"),
        "response_tokens": sum(r["response_tokens"] for r in rows) / len(rows),
        "cut_off": sum(r["cut_off"] for r in rows) / len(rows),
    }


def gap_recovered(before: list[Row], after: list[Row], teacher: list[Row]) -> Scores:
    """(after − before) / (teacher − before), where the teacher is better by more than noise.

    Noise is two standard errors of the paired difference between the rows.
    """
    per_row = {
        "kl_to_teacher": lambda r: r.get("kl", 0.0) / max(1, r["tokens"]),
        "top1_agreement": lambda r: r.get("agree", r["tokens"]) / max(1, r["tokens"]),
        "exact_match": lambda r: r["exact"],
        "error_rate": lambda r: r["edits"] / max(1, r["reference_words"]),
    }
    was, now, goal = scores(before), scores(after), scores(teacher)
    found = {}
    for name, (more_is_better, own) in GAPS.items():
        if name not in was:
            continue
        value = per_row[name]
        gaps = torch.tensor(
            [value(t) - value(b) for t, b in zip(teacher, before, strict=True)], dtype=torch.float64
        )
        mean = gaps.mean().item() * (1 if more_is_better else -1)
        if len(gaps) > 1 and mean > 2 * gaps.std().item() / math.sqrt(len(gaps)):
            target = goal.get(name, own)
            found[name] = (now[name] - was[name]) / (target - was[name])
    return found


# ------------------------------------------------------------------------------------ run state


# What a resumed run may change: where and how often it writes, nothing that the student learns
# from.
MAY_CHANGE = {
    "output_dir", "overwrite", "resume", "cache_dir", "save_steps", "save_total_limit",
    "eval_steps", "logging_steps", "generation_batch_size", "report_to",
}  # fmt: skip


def start(script: str, args: CommonArguments) -> Accelerator:
    """Processes and device through accelerate; quiet libraries; checks that need no model."""
    for kind, place in (
        ("output", Path(args.output_dir or "runs")),
        ("cache", Path(args.cache_dir)),
    ):
        nearest = next(p for p in (place, *place.resolve().parents) if p.exists())
        if not nearest.is_dir() or not os.access(nearest, os.W_OK):
            raise UsageError(
                f"cannot write in {place}: {nearest} is no writable directory; "
                f"choose another --{kind}-dir"
            )
    if args.resume:
        args.output_dir = str(find_run(script, args))
    elif (
        args.output_dir and Path(args.output_dir).exists() and any(Path(args.output_dir).iterdir())
    ):
        if not args.overwrite:
            raise UsageError(
                f"--output-dir {args.output_dir} is not empty: name another, or add --overwrite"
            )
        if not (Path(args.output_dir) / "args.json").is_file():
            raise UsageError(
                f"--overwrite would remove {args.output_dir}, which holds no run of this suite"
            )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # It would warn of tied weights at every checkpoint, which loading ties again.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    torch.manual_seed(args.seed)  # how adapters begin
    accelerator = Accelerator(mixed_precision="no")  # autocast is entered in LanguageModel.backbone
    reuse_freed_memory(True, accelerator.device)
    return accelerator


def reuse_freed_memory(on: bool, device: torch.device) -> None:
    """On a CPU, let freed arrays be used again, or give them back to the system at once.

    glibc gives large arrays back when they are freed, and the next one of the same size is paged
    in anew, zeros first: a tenth of a step. But while weights and optimizer state are allocated
    that is right: they would come to lie between arrays that go, and what comes next would not
    fit where those were, which took a tenth more memory. Other C libraries are left as they are.
    """
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        libc, size = ctypes.CDLL(None), 2**31 - 1 if on else 2**17  # bytes; glibc begins with 2**17
        libc.mallopt(-1, size)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, size)  # M_MMAP_THRESHOLD
        if not on:
            libc.malloc_trim(0)


def find_run(script: str, args: CommonArguments) -> Path:
    """The directory that --resume goes on in; without --output-dir the newest that fits.

    Raises `UsageError` where there is none, where the run is finished, and where it was begun
    with other arguments than those in `MAY_CHANGE`. A named directory that is not there yet, or
    empty, is a run cut before it wrote anything, and starts from step 0.
    """
    if args.output_dir:
        directory = Path(args.output_dir)
        left = {p.name for p in directory.iterdir()} if directory.is_dir() else set()
        if left <= {"args.json.part"}:
            return directory
        if difference := difference_to(directory, script, args):
            raise UsageError(f"--resume cannot go on in {directory}: {difference}")
        if "results.json" in left:
            raise UsageError(f"--resume: the run in {directory} is finished")
        return directory
    found = sorted(Path("runs").glob(f"{script}*/args.json"), key=lambda p: p.stat().st_mtime)
    alike = [p.parent for p in found if not difference_to(p.parent, script, args)]
    for directory in reversed(alike):
        if not (directory / "results.json").exists():
            return directory
    if alike:
        raise UsageError(f"--resume: the run in {alike[-1]} with these arguments is finished")
    raise UsageError(
        "--resume: no run in runs/ was begun with these arguments; name its --output-dir, or "
        "start one without --resume"
    )


def difference_to(directory: Path, script: str, args: CommonArguments) -> str | None:
    """Why these arguments cannot go on with a run: the first that differs, with both values."""
    try:
        was = json.loads((directory / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "it has no readable args.json, so it is no run of this suite"
    if was.get("script") != script:
        return f"it is a run of {was.get('script')}.py"
    for field in dataclasses.fields(args):
        before, now = was.get(field.name, field.default), getattr(args, field.name)
        if field.name not in MAY_CHANGE and before != now:
            return f"it was begun with --{field.name.replace('_', '-')} {before}, not {now}"
    return None


def reseed(args: CommonArguments, step: int, accelerator: Accelerator) -> None:
    """Make dropout a function of (seed, step, process); nothing else uses torch's generator."""
    torch.manual_seed(row_seed(args.seed, "dropout", step, accelerator.process_index))


def total_steps(args: CommonArguments, examples: int) -> int:
    """--max-steps, else --epochs over the examples."""
    return (
        args.max_steps
        if args.max_steps > 0
        else math.ceil(args.epochs * examples / args.batch_size)
    )


def learning_rate(step: int, steps: int, args: CommonArguments) -> float:
    """Linear warm-up, then a cosine to zero: a pure function of the step."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    done = (step - args.warmup_steps) / max(1, steps - args.warmup_steps)
    return args.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


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


def show(bar: tqdm, numbers: dict[str, float]) -> None:
    """Loss and speed beside a progress bar."""
    if numbers:
        speed = numbers["speed/tokens_per_second"]
        bar.set_postfix(loss=f"{numbers['train/loss']:.4f}", tokens_per_second=f"{speed:.0f}")


class Run:
    """A run's directory: what it was asked, what it measured, what it made."""

    def __init__(
        self,
        script: str,
        args: CommonArguments,
        accelerator: Accelerator,
        teacher: str | None = None,
    ) -> None:
        """Claim or find the directory; `teacher` names one that --teacher does not."""
        self.script, self.args, self.accelerator = script, args, accelerator
        self.teacher = teacher or Path(args.teacher).name
        self.pending: list[tuple[int, dict[str, Any], list[str]]] = []
        self.rate = (time.perf_counter(), 0)
        self.earlier = 0.0  # seconds that a resumed run took before
        self.lines = 0  # in metrics.jsonl
        self.steps = 0
        self.signal = 0  # that asked for the end, as this process knows
        self.stop = 0  # the same, as all processes have agreed
        self.handlers: dict[int, Any] = {}  # what the signals did before the loop
        self.directory = Path()
        if accelerator.is_main_process:
            self.directory = self._claim()
            if not (self.directory / "args.json").exists():
                write_json(self.directory / "args.json", {"script": script} | vars(args))
            accelerator.print(f"run directory: {self.directory}")
        self.directory = broadcast_object_list([self.directory])[0]
        found = self.checkpoints()
        self.checkpoint = found[-1] if found else None
        self.state = self._read_state()
        if args.report_to != "none":
            accelerator.log_with = [LoggerType(args.report_to)]
            accelerator.project_configuration.set_directories(str(self.directory))
            shown = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items()}
            accelerator.init_trackers(script, shown)
        if args.resume and accelerator.is_main_process:
            self._cut_back()

    def _claim(self) -> Path:
        """Make the directory, so that no run side by side takes the same."""
        named = self.args.output_dir
        if named and self.args.overwrite and Path(named).exists():
            shutil.rmtree(named)
        parts = [
            f"{name.replace('_', '-')}-{Path(str(value)).name}"
            for name, value in changed_flags(self.args).items()
            if name not in MAY_CHANGE | {"cache_teacher"}
        ]
        base = Path(named or "runs/" + "-".join([self.script, *parts])[:180])
        for number in range(1, 10_000):
            directory = base if number == 1 else base.with_name(f"{base.name}-{number}")
            with make_writable(directory.parent), contextlib.suppress(FileExistsError):
                directory.mkdir(exist_ok=bool(named))
                return directory
        raise UsageError(f"{base} and 9999 numbered ones are taken")

    def log(self, step: int, tokens: int, values: dict[str, Any], examples: list[str]) -> None:
        """Record a training step. Device tensors are not waited for until `flush`."""
        self.rate = (self.rate[0], self.rate[1] + tokens)
        self.pending.append((step, values, examples))

    def flush(self) -> dict[str, float]:
        """Write what was logged; the last line's numbers. A non-finite one ends the run.

        Every process comes here at the same steps, so here they agree on whether to stop.
        """
        self.stop = self.signal
        if self.accelerator.num_processes > 1:
            mine = torch.tensor([self.signal], device=self.accelerator.device)
            self.stop = int(self.accelerator.gather(mine).max())
        if not self.pending:
            return {}
        seconds, now = time.perf_counter() - self.rate[0], time.perf_counter()
        speed = self.rate[1] / max(seconds, 1e-9)
        self.rate = (now, 0)
        lines = []
        for step, values, examples in self.pending:
            numbers = {name: float(value) for name, value in values.items()}
            if not all(map(math.isfinite, numbers.values())):
                raise TrainingError(
                    f"loss or gradient is not finite at step {step}: {numbers}; its examples: "
                    f"{', '.join(examples[:3])} and {max(0, len(examples) - 3)} more"
                )
            lines.append({"step": step, **numbers, "speed/tokens_per_second": speed})
        self.pending = []
        self.write(*lines)
        return lines[-1]

    def write(self, *lines: dict[str, Any]) -> None:
        """Append lines to metrics.jsonl."""
        if self.accelerator.is_main_process:
            with open(self.directory / "metrics.jsonl", "a", encoding="utf-8") as stream:
                stream.writelines(json.dumps(line) + "\n" for line in lines)
            self.lines += len(lines)
        for line in lines:
            values = {name: value for name, value in line.items() if name != "step"}
            self.accelerator.log(values, step=line["step"])

    def write_scores(self, step: int, found: Scores) -> None:
        self.write({"step": step} | {f"eval/{name}": value for name, value in found.items()})
        self.rate = (time.perf_counter(), 0)  # evaluation is not training time

    def before(self, evaluator: Evaluator, student: LanguageModel) -> list[Row]:
        """The evaluation of the untrained student, which a resumed run does not repeat."""
        kept = self.directory / "checkpoints" / "before.json"
        if kept.exists():
            try:
                rows = json.loads(kept.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                raise UsageError(f"{kept} is corrupt: delete {self.directory}") from None
        else:
            rows = evaluator(student)
            if self.accelerator.is_main_process:
                write_json(kept, rows)
        if self.checkpoint is None:
            self.write_scores(0, scores(rows))
        return rows

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = (self.directory / "checkpoints").glob("step-*")
        return sorted((p for p in found if not p.suffix), key=lambda p: int(p.name[5:]))

    def _read_state(self) -> dict[str, Any]:
        if self.checkpoint is None:
            return {"step": 0, "lines": 0, "seconds": 0.0}
        try:
            state = json.loads((self.checkpoint / "state.json").read_text(encoding="utf-8"))
            launched = state["launched"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise self._corrupt(problem) from None
        if launched != (own := self.accelerator.distributed_type.value):
            raise UsageError(
                f"{self.checkpoint} was written under accelerate's {launched}, and this is {own}: "
                "launch the run as before"
            )
        return state

    def _corrupt(self, problem: Exception) -> UsageError:
        return UsageError(
            f"the checkpoint {self.checkpoint} is corrupt ({first_line(problem)}): delete it, and "
            "--resume goes on from the one before"
        )

    def _cut_back(self) -> None:
        """Remove what was written after the checkpoint, half a line or half a checkpoint too."""
        for part in (self.directory / "checkpoints").glob("*.part"):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        metrics = self.directory / "metrics.jsonl"
        if metrics.exists():
            kept = metrics.read_bytes().splitlines(keepends=True)[: self.state["lines"]]
            beside = metrics.with_name("metrics.jsonl.part")
            beside.write_bytes(b"".join(kept))
            os.replace(beside, metrics)
        self.lines = self.state["lines"]

    def resume(self, steps: int) -> int:
        """Load the newest checkpoint, if there is one, into what accelerate has prepared.

        From here to the last `save`, SIGTERM and Ctrl-C end the run with a checkpoint.

        Returns:
            The step to go on with: 0 in a new run, `steps` where only the scores are missing.
        """
        # Until the first step has made the optimizer's state.
        reuse_freed_memory(False, self.accelerator.device)
        if self.checkpoint is not None:
            try:
                # Nothing foreign is unpickled: safetensors, and torch.load(weights_only=True).
                self.accelerator.load_state(str(self.checkpoint))
            except Exception as problem:  # every format has its own errors
                raise self._corrupt(problem) from None
            self.earlier = self.state["seconds"]
            self.accelerator.print(f"resumed from {self.checkpoint}")
        self.steps, first = steps, self.state["step"]
        if first < steps:
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._note)
        self.rate = (time.perf_counter(), 0)
        return first

    def _note(self, number: int, _: Any) -> None:
        """Signal handler: `save` ends the run when the step is complete, a second signal now."""
        self.signal = number
        sys.stdout = sys.stderr  # whoever read it from a pipe has often died of the same Ctrl-C
        self._default_signals()

    def _default_signals(self) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def save(self, step: int) -> None:
        """Write a checkpoint where one is due, and end the run where a signal asked for it."""
        if step == self.state["step"] + 1:
            reuse_freed_memory(True, self.accelerator.device)
        alone = self.accelerator.num_processes == 1
        due = self.args.save_steps and step % self.args.save_steps == 0
        if due or step == self.steps or self.stop or (alone and self.signal):
            self.flush()
            self._write_checkpoint(step)
            self.rate = (time.perf_counter(), 0)
        if step == self.steps:
            self._default_signals()
        if stop := self.stop or (alone and self.signal):
            words = spelled(self.args, {"output_dir", "overwrite", "resume"})
            words += ["--output-dir", str(self.directory), "--resume"]
            command = shlex.join(["python", f"{self.script}.py", *words])
            self.accelerator.print(f"stopped after step {step}; to go on: {command}")
            self._close_trackers()
            sys.exit(128 + stop)

    def _write_checkpoint(self, step: int) -> None:
        """Weights and optimizer state of all processes, written beside and renamed."""
        target = self.directory / "checkpoints" / f"step-{step:06}"
        part = target.with_suffix(".part")
        state = {
            "step": step,
            "lines": self.lines,
            "seconds": self.earlier + time.perf_counter() - STARTED,
            "launched": self.accelerator.distributed_type.value,
        }
        try:
            self.accelerator.save_state(str(part), safe_serialization=True)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_main_process:
                write_json(part / "state.json", state)
                os.replace(part, target)
                for old in self.checkpoints()[: -self.args.save_total_limit or None]:
                    if self.args.save_total_limit:
                        os.replace(old, part)  # a cut must not leave half of one behind
                        shutil.rmtree(part)
        except (OSError, RuntimeError, SafetensorError) as problem:
            shutil.rmtree(part, ignore_errors=True)
            raise UsageError(f"cannot write {target}: {first_line(problem)}") from None
        self.accelerator.wait_for_everyone()

    def finish(
        self,
        student: LanguageModel,
        before: list[Row],
        after: list[Row],
        evaluator: Evaluator,
        **more: Any,
    ) -> None:
        """Write final/, results.json and curves.png, and print the table."""
        if self.accelerator.is_main_process:
            self._write_results(student, before, after, evaluator, more)
        if self.accelerator.num_processes > 1:
            # A process that just exits can abort those that still talk to it.
            self.accelerator.wait_for_everyone()

    def _write_results(
        self,
        student: LanguageModel,
        before: list[Row],
        after: list[Row],
        evaluator: Evaluator,
        more: dict[str, Any],
    ) -> None:
        results = {
            "teacher": scores(evaluator.teacher_rows),
            "before": scores(before),
            "after": scores(after),
            "gap_recovered": gap_recovered(before, after, evaluator.teacher_rows),
            "evaluation": {"rows": len(before), "unreferenced_rows": evaluator.unreferenced},
            **more,
            "seconds": self.earlier + time.perf_counter() - STARTED,
            "versions": {
                name: importlib.metadata.version(name)
                for name in ("torch", "transformers", "datasets", "accelerate")
            },
        }
        table = results_table(results)
        save_student(student, self.directory / "final", self._model_card(table))
        write_json(self.directory / "results.json", results)
        draw_curves([self.directory], self.directory / "curves.png")
        self._close_trackers()
        print(table)
        if evaluator.unreferenced:
            print(
                f"{evaluator.unreferenced} of {len(before)} evaluation rows have no reference: "
                "there exact_match and error_rate compare with the teacher's greedy answer"
            )
        print(f"student: {self.directory / 'final'}")

    def _close_trackers(self) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def _model_card(self, table: str) -> str:
        args = self.args
        flags = shlex.join(spelled(args, {"output_dir", "cache_dir", "overwrite", "resume"}))
        return "\n".join(
            [
                "---", "library_name: transformers", "pipeline_tag: text-generation",
                "tags: [distillation]", "---", "",
                f"# {Path(args.student).name}, distilled from {self.teacher}", "",
                f"- method: `{self.script}.py`", f"- teacher: `{self.teacher}`",
                f"- student: `{Path(args.student).name}`", f"- data: `{Path(args.dataset).name}`",
                f"- flags: `{flags or 'none'}`", "", "```", table, "```", "",
            ]
        )  # fmt: skip


def save_student(student: LanguageModel, directory: Path, card: str) -> None:
    """Model (adapters merged), tokenizer with its template, and card; ends as training did."""
    student.model.generation_config.eos_token_id = student.end_ids
    if student.adapters is not None:
        student.adapters.merge_and_unload()
    with make_writable(directory):
        student.model.save_pretrained(directory)
        student.tokenizer.save_pretrained(directory)
        (directory / "README.md").write_text(card, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Beside and renamed: a cut leaves the old file or the new one."""
    beside = path.with_name(path.name + ".part")
    with make_writable(path.parent):
        beside.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(beside, path)


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
    height = 4 + (0.25 * math.ceil(len(directories) / 3) if len(directories) > 1 else 0)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(18, height), layout="constrained")
    for directory in directories:
        text = (directory / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        for name, axis in zip(panels, axes, strict=True):
            points = [(line["step"], line[name]) for line in lines if name in line]
            marker = "o" if name.startswith("eval") else None
            axis.plot(*zip(*points, strict=True), label=directory.name, marker=marker, markersize=3)
    for name, axis in zip(panels, axes, strict=True):
        axis.set(title=name, xlabel="step")
        axis.grid(alpha=0.3)
    if len(directories) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(target, dpi=100)
    pyplot.close(figure)


def compare_runs(paths: Iterable[str]) -> None:
    """`python common.py runs/*`: the scores of finished runs in one table and one picture."""
    found = [Path(p) for p in paths if (Path(p) / "results.json").is_file()]
    if not found:
        raise UsageError("no finished run (a directory with a results.json) among the arguments")
    columns = ("kl_to_teacher", "top1_agreement", "exact_match", "error_rate", "bits_per_byte")
    width = max(len(p.name) for p in found) + 2
    heads = "".join(f"{c:>16}" for c in columns)
    print(f"{'after training':{width}}{heads}{'gap (exact)':>16}{'seconds':>10}")
    for path in found:
        results = json.loads((path / "results.json").read_text(encoding="utf-8"))
        cells = [results["after"].get(c) for c in columns]
        row = "".join(f"{'–' if c is None else format(c, '.4f'):>16}" for c in cells)
        gap = results["gap_recovered"].get("exact_match")
        shown = "–" if gap is None else format(gap, ".1%")
        print(f"{path.name:{width}}{row}{shown:>16}{results['seconds']:>10.0f}")
    picture = found[0].parent / "comparison.png"
    draw_curves(found, picture)
    if picture.exists():
        print(f"picture: {picture}")


if __name__ == "__main__":
    try:
        compare_runs(sys.argv[1:])
    except UsageError as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
