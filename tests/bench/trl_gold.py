"""A training step across tokenizers here and in TRL's GOLDTrainer: seconds and memory.

    python tests/bench/trl_gold.py --models DIR --trl-python PYTHON [--steps 5] [--cached]

DIR holds smollm2 (../shared/real_models.py), which teaches a small random Llama whose byte-level
tokenizer is trained here, on the texts of data/chat.jsonl and the words of this suite's own files.
Both sides run in a process of their own, one after the other, on CPU in float32: AdamW, gradients
clipped to norm 1, no gradient checkpointing. Here --loss hybrid or uld, with their default
weights; there use_uld_loss with TRL's defaults, extended alignment and cross-entropy with the
weight that the loss has here.

A row is text: questions for a quarter of its length, then an answer, cut so that neither tokenizer
needs more than --length tokens. It is no sense, but neither time nor memory depends on what it
says. Prompts are plain text, the same for both models and both sides, so that the tokens are the
same on both sides; the script fails where the student's targets differ in number. The two losses
have different definitions and are not compared.

The teacher runs live in every step on both sides. With --cached this suite does what its scripts
do by default: the teacher reads all rows before the first step ("seconds before", per step), and
the steps, in a second process like any later run, find its states and do not load its backbone.

Seconds are the median from the end of a step to the end of the next one, without the first step.
Memory is the process's largest resident set, and that less the resident set after both models
were loaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from trl_gkd import ADAM, BATCH, BETAS, ROOT, clock, report, resident

Row = dict[str, str]


def texts() -> list[str]:
    """What there is to read in a fresh checkout."""
    rows = (ROOT / "data" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    return [turn["content"] for row in rows for turn in json.loads(row)["messages"]]


def make_student(directory: Path, vocabulary: int, width: int, layers: int) -> None:
    """A random model with a tokenizer of its own, as a directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    files = [f.read_text(encoding="utf-8") for f in sorted(ROOT.glob("*.py"))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator([*texts(), *files], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 32, tie_word_embeddings=True,
        max_position_embeddings=2048, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def make_rows(models: Path, student: Path, count: int, length: int) -> list[Row]:
    """Prompt and completion; with its end token, either tokenizer needs at most `length`."""
    from transformers import AutoTokenizer

    tokenizers = [AutoTokenizer.from_pretrained(d) for d in (student, models / "smollm2")]
    turns = itertools.cycle(texts())

    def size(text: str) -> int:
        return max(len(t(text, add_special_tokens=False)["input_ids"]) for t in tokenizers)

    rows = []
    for _ in range(count):
        prompt, answer = "", ""
        while size(prompt) < length // 4:
            prompt += next(turns) + "\n"
        while size(prompt) + size(answer) < length:
            answer += next(turns) + " "
        words = answer.split(" ")
        while size(prompt) + size(" ".join(words)) > length - 1:
            words.pop()
        rows.append({"prompt": prompt, "completion": " ".join(words)})
    return rows


def run_suite(
    models: Path, student_dir: Path, rows: list[Row], args: argparse.Namespace, directory: Path
) -> None:
    """The inner loop of cross_tokenizer.main, on its own building blocks."""
    sys.path.insert(0, str(ROOT))
    import common
    import cross_tokenizer

    arguments = cross_tokenizer.Arguments(
        student=str(student_dir), teacher=str(models / "smollm2"), loss=args.loss,
        dtype="float32", teacher_dtype="float32", cache_dir=str(directory), max_length=args.length,
        cache_teacher=args.cached,
        **ADAM,
    )  # fmt: skip
    accelerator = common.start("cross_tokenizer", arguments)
    student, teacher = common.load_pair(arguments, accelerator.device)
    loaded = resident()
    examples = []
    for row in rows:
        sides = []
        for model in (student, teacher):
            ids = [
                common.tokenize(model.tokenizer, row[part]).ids for part in ("prompt", "completion")
            ]
            sides.append(common.with_response(ids[0], [*ids[1], model.tokenizer.eos_token_id]))
        examples.append(common.Example(*sides, ""))
    objective = arguments.objective(student, teacher)
    alignments = cross_tokenizer.Alignments(examples, student, teacher, objective)
    began = time.perf_counter()
    states = common.TeacherStates(teacher, examples, arguments, accelerator, "training text")
    once = time.perf_counter() - began
    module = cross_tokenizer.CrossTokenizerLoss(student, teacher.head(), alignments)
    module, optimizer = accelerator.prepare(module, common.make_optimizer(module, arguments))
    assert all(group["betas"] == BETAS for group in optimizer.param_groups)
    student.model.train()
    common.reuse_freed_memory(False, accelerator.device)  # as Run.resume does
    ends, losses, targets = [], [], []
    for start in range(0, len(examples), BATCH):
        micro_batch = examples[start : start + BATCH]
        batch = common.collate([e.student for e in micro_batch], accelerator.device)
        loss, _ = module(batch, states(micro_batch), alignments(micro_batch))
        accelerator.backward(loss / len(batch.targets))
        accelerator.clip_grad_norm_(module.parameters(), arguments.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        common.reuse_freed_memory(True, accelerator.device)  # as Run.save does after the first step
        losses.append(loss.item() / len(batch.targets))
        del loss
        targets.append(len(batch.targets))
        ends.append(clock())
    report(ends, loaded, losses[0], targets[0], once / len(losses))


def run_trl(
    models: Path, student_dir: Path, rows: list[Row], args: argparse.Namespace, directory: Path
) -> None:
    """GOLDTrainer as it comes, but for the order of the rows; the rest only watches."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    ends, losses, targets = [], [], []

    class Watched(GOLDTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            loss = super().training_step(model, inputs, *rest)
            losses.append(loss.item())
            return loss

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, *rest, **named)

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(clock())

    student, teacher = (
        AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32)
        for d in (student_dir, models / "smollm2")
    )
    loaded = resident()
    config = GOLDConfig(
        output_dir=str(directory), max_steps=len(rows) // BATCH, per_device_train_batch_size=BATCH,
        max_length=args.length, max_completion_length=args.length // 2,
        lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], **ADAM,
        lmbda=0.0, use_uld_loss=True, uld_crossentropy_weight=float(args.loss == "uld"),
        teacher_tokenizer_name_or_path=str(models / "smollm2"),
        use_cpu=True, bf16=False, gradient_checkpointing=False,
        logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    trainer = Watched(
        model=student, teacher_model=teacher, args=config, callbacks=[Clock()],
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(student_dir),
    )  # fmt: skip
    trainer.train()
    report(ends, loaded, losses[0], targets[0])


def measure(python: str, side: str, rows: Path, args: argparse.Namespace) -> dict[str, float]:
    """One side in a process of its own; its last line of output."""
    flags = {"--models": args.models, "--side": side, "--rows": rows}
    flags |= {"--loss": args.loss, "--length": args.length}
    command = [python, __file__, *(str(word) for pair in flags.items() for word in pair)]
    command += ["--cached"] * args.cached
    settings = {"OMP_NUM_THREADS": str(args.threads), "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **settings, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="holds smollm2")
    parser.add_argument("--trl-python", help="the python of an environment that has TRL")
    parser.add_argument("--steps", type=int, default=5, help="measured, after one to warm up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cached", action="store_true", help="the script's default: see above")
    parser.add_argument("--loss", choices=("hybrid", "uld"), default="hybrid")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row, at most")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the student, at most")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--side", choices=("suite", "trl"), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        rows = json.loads(args.rows.read_text(encoding="utf-8"))
        run = run_suite if args.side == "suite" else run_trl
        run(args.models, args.rows.parent / "student", rows, args, args.rows.parent)
        return
    if not args.trl_python:
        parser.error("--trl-python is needed")
    with tempfile.TemporaryDirectory() as directory:
        student, file = Path(directory) / "student", Path(directory) / "rows.json"
        make_student(student, args.vocabulary, args.width, args.layers)
        rows = make_rows(args.models, student, BATCH * (args.steps + 1), args.length)
        file.write_text(json.dumps(rows))
        suite = measure(sys.executable, "suite", file, args)
        if args.cached:  # a second run finds the states and does not load the teacher's backbone
            suite |= {**measure(sys.executable, "suite", file, args), "once": suite["once"]}
        trl = measure(args.trl_python, "trl", file, args)
    assert suite["targets"] == trl["targets"], (suite, trl)
    print(f"{BATCH} x {args.length} tokens at most, {suite['targets']} targets of the student in")
    print(f"the first step, --loss {args.loss}, float32, CPU, {args.threads} threads, median of")
    print(f"{args.steps} steps")
    print(f"{'':34}{'suite':>10}{'TRL':>10}{'suite/TRL':>11}")
    lines = {
        "seconds a step": ("seconds", 1),
        "processor seconds a step": ("cpu", 1),
        "seconds before, for a step's rows": ("once", 1),
        "peak memory, GB": ("peak", 1e9),
        "  above the loaded models, GB": ("added", 1e9),
    }
    for name, (key, unit) in lines.items():
        ours, theirs = suite[key] / unit, trl[key] / unit
        ratio = ours / theirs if theirs else math.nan
        print(f"{name:34}{ours:>10.4g}{theirs:>10.4g}{ratio:>11.4g}")


if __name__ == "__main__":
    main()
