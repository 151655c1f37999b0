"""A training step on a GPU, against arithmetic, TRL's GKDTrainer and Liger's fused loss; rollouts.

    python tests/bench/gpu.py [--part loss step rollouts] [--kl forward reverse jsd]

Models have random weights in the shapes of Qwen2.5 and a tokenizer of bytes with as many tokens as
Qwen's: time and memory do not depend on what is learned. Every measurement runs in its own process.

- loss: `common.distillation_loss`, forward and backward, alone: N target tokens, the student's
  hidden states of 0.5B, the teacher's of 7B. Beside it the same without torch.compile, and Liger's
  fused linear JSD if liger_kernel is installed.
- step: `token_level.py` as it runs, 0.5B learning from 1.5B, with cached hidden states and with a
  live teacher; the parts of its step; and GKDTrainer on the same rows if trl is installed.
- rollouts: `common.generate` and `model.generate` with 0.5B, 96 new tokens.

"floor" is the time of the matrix products at the rate that an 8192³ product in bfloat16 reaches on
this card, plus the fewest bytes of the loss over its copy bandwidth; "share" is floor over time.
Times are medians; memory is the allocator's peak (max_memory_allocated).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import trl_common

os.environ["HF_HUB_OFFLINE"] = "1"
import itertools

import torch

import common

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, tied embeddings
    "0.5b": (896, 4864, 24, 14, 2, True),
    "1.5b": (1536, 8960, 28, 12, 2, True),
    "7b": (3584, 18944, 28, 28, 4, False),
}
VOCABULARY, ROWS = 151_665, 151_936  # tokens of Qwen2.5, rows of its head
LENGTH, PROMPT = 1024, 32  # tokens of a row and of its prompt
GPU = torch.device("cuda", 0)

Numbers = dict[str, Any]


def median_seconds(work: Callable[[], object], rounds: int) -> float:
    """The median over `rounds`, after two that warm up."""
    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[2:])


def ceilings() -> tuple[float, float]:
    """FLOP/s of a large bfloat16 product, and bytes/s of a large copy, on this card."""
    a, b = torch.randn(2, 8192, 8192, device=GPU, dtype=torch.bfloat16)
    flops = 2 * 8192**3 / median_seconds(lambda: a @ b, 10)
    source = torch.empty(2**30, device=GPU, dtype=torch.uint8)
    target = torch.empty_like(source)
    return flops, 2 * 2**30 / median_seconds(lambda: target.copy_(source), 10)


def peak_above(work: Callable[[], object]) -> float:
    """GB that `work` allocates at most beyond what is there before."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


# ---------------------------------------------------------------------------------------- loss


def loss_side(args: argparse.Namespace) -> None:
    """A row for each form of the loss: milliseconds, the floor's share, memory."""
    tokens, (width, *_), (wider, *_) = args.tokens, SHAPES["0.5b"], SHAPES["7b"]
    flops, bandwidth = ceilings()

    def normal(rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, device=GPU, dtype=dtype).mul_(scale)

    hidden = normal(tokens, width, torch.bfloat16).requires_grad_()
    weight = normal(VOCABULARY, width, torch.float32, width**-0.5).requires_grad_()
    theirs = normal(tokens, wider, torch.bfloat16)
    head = common.Head(normal(VOCABULARY, wider, torch.bfloat16, wider**-0.5))
    targets = torch.randint(VOCABULARY, (tokens,), device=GPU)
    # The student's three products and the teacher's one; two arrays of float32 logits written and
    # read, a bfloat16 gradient written and read twice.
    floor = 2 * tokens * VOCABULARY * (3 * width + wider) / flops
    floor += tokens * VOCABULARY * (2 * 2 * 4 + 3 * 2) / bandwidth

    def suite(kl: str) -> Callable[[], object]:
        def work() -> None:
            hidden.grad = weight.grad = None
            student, teacher = (
                common.Logits(hidden, common.Head(weight)),
                common.Logits(theirs, head),
            )
            common.distillation_loss(student, targets, common.Objective(kl), teacher)[0].backward()

        return work

    forms = {f"this suite, {kl}": suite(kl) for kl in args.kl}
    if find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearJSD

        half = weight.detach().to(torch.bfloat16).requires_grad_()

        def liger(beta: float) -> Callable[[], object]:
            loss = LigerFusedLinearJSD(jsd_beta=beta)

            def work() -> None:
                hidden.grad = half.grad = None
                loss(hidden, half, theirs, head.weight, None).backward()

            return work

        betas = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}
        forms |= {f"Liger's fused linear JSD, {kl}": liger(betas[kl]) for kl in args.kl}
    print_head(f"loss of {tokens:,} targets, V = {VOCABULARY:,}", "ms", "share of floor", "GB")

    def measured(name: str, work: Callable[[], object], rounds: int) -> None:
        work()  # compiles
        seconds, memory = median_seconds(work, rounds), peak_above(work)
        print_row(name, f"{1e3 * seconds:.0f}", f"{100 * floor / seconds:.0f} %", f"{memory:.2f}")

    for name, work in forms.items():
        measured(name, work, 5)
    common.compiled = lambda *_: None
    measured(f"this suite, {args.kl[0]}, not compiled", suite(args.kl[0]), 3)
    print_row("floor", f"{1e3 * floor:.0f}", "", "")
    print_row(f"{flops / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s", "", "", "")


# ---------------------------------------------------------------------------------------- step


def make_model(directory: Path, shape: str, dtype: torch.dtype) -> None:
    """A model of random weights with a tokenizer whose text is bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|im_start|>", "<|im_end|>"]
    words += [f"<unused {i}>" for i in range(VOCABULARY - len(words))]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template="{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ).save_pretrained(directory)  # fmt: skip
    hidden, intermediate, layers, heads, kv_heads, tied = SHAPES[shape]
    config = Qwen2Config(
        vocab_size=ROWS, hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        tie_word_embeddings=tied, max_position_embeddings=4096,
        eos_token_id=words.index("<|im_end|>"), bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with GPU:
        model = Qwen2ForCausalLM(config).to(dtype)
    model.save_pretrained(directory)


def make_rows(directory: Path, count: int, args: Any) -> None:
    """Rows of one length for the suite, and their ids and targets for TRL."""
    model = common.open_model(args, GPU, "student")  # loads no weights
    draw = random.Random(0)

    def text(length: int) -> str:
        return "".join(draw.choices(string.ascii_letters, k=length))

    def tokens(answer: str) -> common.Tokens:
        turns = [
            {"role": "user", "content": text(PROMPT)},
            {"role": "assistant", "content": answer},
        ]
        return common.tokenize_conversation(model, turns)

    answer_length = LENGTH - len(tokens("").ids)
    rows = []
    for _ in range(count):
        question, answer = text(PROMPT), text(answer_length)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ids, targets = common.tokenize_conversation(model, turns)
        mask = [int(i in set(targets)) for i in range(len(ids))]
        trl = {"prompt": "", "input_ids": ids, "completion_mask": mask}
        rows.append({"suite": {"prompt": question, "completion": answer}, "trl": trl})
    trl_common.write_suite_rows(directory, [row["suite"] for row in rows])
    ordered = trl_common.suite_order(rows, args)
    (directory / "trl.json").write_text(json.dumps([row["trl"] for row in ordered]))


class Recorder(trl_common.Recorder):
    """As on a CPU, but a step ends when the GPU has finished it, and memory is the GPU's."""

    def end_step(self) -> None:
        torch.cuda.synchronize()
        super().end_step()

    def report(self) -> None:
        # The first two steps compile and warm up.
        ends = [wall for wall, _ in self.ends[1:]]
        seconds = statistics.median(b - a for a, b in itertools.pairwise(ends))
        memory = torch.cuda.max_memory_allocated() / 1e9
        numbers = {"seconds": seconds, "memory": memory, "loss": self.losses[0]}
        print(json.dumps(numbers | {"targets": self.targets[0]}), flush=True)


def suite_arguments(args: argparse.Namespace, cached: bool, compiled: bool = False) -> Any:
    import token_level

    settings = trl_common.SUITE_SETTINGS | {"dtype": "auto", "teacher_dtype": "auto"}
    return token_level.Arguments(
        student=str(args.directory / "0.5b"), teacher=str(args.directory / "1.5b"),
        completions="dataset", max_length=LENGTH, max_new_tokens=1, cache_teacher=cached,
        batch_size=args.batch_size, micro_batch_size=args.micro_batch_size,
        max_steps=args.steps + 2, compile=compiled, **settings,
        **trl_common.suite_files(args.directory),
    )  # fmt: skip


def trl_side(args: argparse.Namespace) -> None:
    """GKDTrainer as it comes, with float32 weights and bfloat16 autocast, as the suite."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    recorder, parts = Recorder(), args.batch_size // args.trl_micro_batch_size

    class Watched(GKDTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            loss = super().training_step(model, inputs, *rest)
            recorder.losses.append(loss.item() * parts)  # that of a micro-batch
            recorder.targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return loss

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(args.directory / shape, dtype=dtype)
        for shape, dtype in (("0.5b", torch.float32), ("1.5b", torch.bfloat16))
    )
    settings = trl_common.TRL_SETTINGS | {"use_cpu": False, "bf16": True}
    config = GKDConfig(
        output_dir=str(args.directory / "trl"), max_steps=args.steps + 2,
        per_device_train_batch_size=args.trl_micro_batch_size, max_length=LENGTH,
        gradient_accumulation_steps=parts,
        train_sampling_strategy="sequential", lmbda=0.0, temperature=1.0, beta=0.0, **settings,
    )  # fmt: skip
    trainer = Watched(
        model=student, teacher_model=teacher, args=config,
        callbacks=[trl_common.trl_callback(recorder)],
        train_dataset=Dataset.from_list(json.loads((args.directory / "trl.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(args.directory / "0.5b"),
    )  # fmt: skip
    trainer.train()
    recorder.report()


def parts_side(args: argparse.Namespace) -> None:
    """The parts of a micro-batch's work and of an optimizer step, against the products' floor."""
    import token_level

    flops, _ = ceilings()
    arguments = suite_arguments(args, cached=True)
    common.start("token_level", arguments)
    pair = common.load_pair(arguments, GPU)
    prompts = common.tokenize_prompts(common.load_data(arguments)[0], pair, LENGTH)
    examples = common.make_examples(prompts, pair, arguments)[: args.micro_batch_size]
    batch = common.collate([e.student for e in examples], GPU)
    tokens, student = len(batch.targets), pair.student
    module = token_level.TokenLevelLoss(student, pair.teacher.head(), arguments.objective())
    optimizer = common.make_optimizer(module, arguments)
    (width, _, layers, *_), teacher_width = SHAPES["0.5b"], SHAPES["1.5b"][0]
    theirs = torch.randn(tokens, teacher_width, device=GPU, dtype=torch.bfloat16)
    body = sum(p.numel() for p in student.model.parameters()) - ROWS * width
    # A causal layer multiplies L²/2 pairs of positions by the width, twice.
    attention = len(examples) * layers * 2 * LENGTH**2 * width
    gradient = torch.randn(tokens, width, device=GPU) / tokens

    def backbone() -> None:
        student.hidden_states(batch).backward(gradient)

    def whole() -> None:
        (module(batch, theirs)[0] / tokens).backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), arguments.max_grad_norm)
        optimizer.step()

    def evaluate() -> None:
        with student.evaluating():
            student.hidden_states(batch)

    print_head(f"a micro-batch of {tokens:,} targets", "ms", "share of the products' floor")

    def add(name: str, seconds: float, products: float | None = None) -> None:
        share = f"{100 * products / flops / seconds:.0f} %" if products else ""
        print_row(name, f"{1e3 * seconds:.1f}", share)

    part, head = median_seconds(backbone, 5), 2 * tokens * VOCABULARY * (3 * width + teacher_width)
    add("backbone, forward and backward", part, 3 * (2 * body * tokens + attention))
    add("loss, the rest of the two passes", median_seconds(whole, 5) - part, head)
    add("clipping and AdamW", median_seconds(update, 5))
    add("evaluation: the inference copy and its forward pass", median_seconds(evaluate, 5))
    print_row("synchronisations in forward and backward", str(count_waits(whole)), "")
    common.compile_layers(student)
    part = median_seconds(backbone, 5)
    add("backbone with --compile", part, 3 * (2 * body * tokens + attention))


def count_waits(work: Callable[[], object]) -> int:
    """How often the host waits for the GPU, by PyTorch's own count (set_sync_debug_mode)."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    for wait in waits[:5]:
        print(f"waits: {wait.filename}:{wait.lineno}", file=sys.stderr)
    return len(waits)


# ------------------------------------------------------------------------------------ rollouts


def rollouts_side(args: argparse.Namespace) -> None:
    """Tokens a second of both generators, on prompts of unequal length."""
    import rollouts

    arguments = suite_arguments(args, cached=False)
    common.start("token_level", arguments)
    model = common.load_student(arguments, GPU)
    model.end_ids = []
    model.model.generation_config.eos_token_id = None
    draw = random.Random(0)
    prompts = [[draw.randrange(256) for _ in range(draw.randrange(32, 129))] for _ in range(256)]
    methods = {
        "common.generate": (rollouts.suite_tokens, model.cache),
        "common.generate without CUDA graphs": (rollouts.suite_tokens, common.MaskedCache),
        "model.generate": (rollouts.library_tokens, model.cache),
    }
    print_head("rollouts of 0.5B", "prompts", "new tokens", "tokens a second")
    with model.evaluating():
        for size, new in ((64, 96), (256, 96), (64, 512)):
            asked = [common.Prompt(None, p, p) for p in sorted(prompts[:size], key=len)]
            for name, (method, model.cache) in methods.items():
                work = partial(method, model, asked, new, size)
                seconds = median_seconds(work, 2)
                print_row(name, str(size), str(new), f"{new * size / seconds:.0f}")


# ----------------------------------------------------------------------------------------- all


def run_side(args: argparse.Namespace, side: str) -> Numbers:
    """Run a side in its own process and print its rows; what its last line says, if it worked."""
    command = [sys.executable, *sys.argv, "--side", side, "--directory", str(args.directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        numbers = {}
        for line in process.stdout:
            if line.startswith('{"'):  # TRL prints lines that begin with a brace, too
                numbers = json.loads(line)
            elif line.startswith("|"):
                print(line, end="", flush=True)
    return numbers


def print_row(*cells: str) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


def print_head(*cells: str) -> None:
    print_row(*cells)
    print_row(*["---"] * len(cells))


def print_steps(args: argparse.Namespace) -> None:
    """token_level.py with cached states and a live teacher, and GKDTrainer."""
    sides = ["suite, live teacher", "suite, cached states"]
    sides[1:1] = ["TRL's GKDTrainer, live teacher"] if find_spec("trl") else []
    sides += [f"{side}, --compile" for side in sides if side.startswith("suite")]
    title = f"a step of {args.batch_size} x {LENGTH} tokens, 1.5B to 0.5B"
    print_head(title, "s", "targets a second", "GB", "first loss")
    targets = 0
    for side in sides:
        if not (numbers := run_side(args, side)):
            print_row(side, "failed", "", "", "")
            continue
        targets = targets or numbers["targets"]  # TRL reports those of a micro-batch
        seconds, memory, loss = (numbers[name] for name in ("seconds", "memory", "loss"))
        speed = f"{targets / seconds:,.0f}"
        print_row(side, f"{seconds:.3f}", speed, f"{memory:.1f}", f"{loss:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = ("loss", "step", "rollouts")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts)
    parser.add_argument("--kl", nargs="+", default=["forward", "reverse", "jsd"])
    parser.add_argument("--tokens", type=int, default=65_536, help="of the loss alone")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--trl-micro-batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4, help="measured, after two to warm up")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this bench needs a GPU")
    if args.side in ("loss", "parts", "rollouts"):
        side = {"loss": loss_side, "parts": parts_side, "rollouts": rollouts_side}[args.side]
        side(args)
    elif args.side == "TRL's GKDTrainer, live teacher":
        trl_side(args)
    elif args.side:
        import token_level

        arguments = suite_arguments(args, "cached" in args.side, "--compile" in args.side)
        trl_common.run_suite(token_level, arguments, Recorder())
    else:
        print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}")
        with tempfile.TemporaryDirectory() as directory:
            args.directory = Path(directory)
            if "loss" in args.part:
                run_side(args, "loss")
            if {"step", "rollouts"} & set(args.part):
                make_model(args.directory / "0.5b", "0.5b", torch.float32)
                make_model(args.directory / "1.5b", "1.5b", torch.bfloat16)
                torch.cuda.empty_cache()
                make_rows(
                    args.directory, args.batch_size * (args.steps + 2), suite_arguments(args, True)
                )
            if "rollouts" in args.part:
                run_side(args, "rollouts")
            if "step" in args.part:
                print_steps(args)
                run_side(args, "parts")


if __name__ == "__main__":
    main()
