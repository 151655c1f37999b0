"""A training step of cross_tokenizer.py and of TRL's GOLDTrainer: seconds and memory.

    python tests/bench/trl_gold.py --models DIR --trl-python PYTHON [--steps 5] [--cached]

DIR holds SmolLM2-135M-Instruct as smollm2, which teaches a small random Llama. The bench trains
the student's byte-level tokenizer on the texts of data/chat.jsonl and the words of this suite's own
files. This suite runs --loss hybrid or uld with their default weights; TRL runs use_uld_loss with
its defaults, extended alignment, and cross-entropy with the weight that it has here.
trl_common.py says how both sides are measured.

A row is text: questions for a quarter of its length, then an answer, so that neither tokenizer
needs more than --length tokens. Prompts are plain text, the same for both models and both sides
(the models get a chat template that adds nothing), so the tokens are the same on both sides; the
bench fails if the numbers of the student's targets differ. The two losses have different
definitions and are not compared.

Without --cached the teacher runs in every step on both sides. With --cached this suite does what
its script does by default: the teacher reads all rows before the first step ("seconds before", for
the rows of one step), and the steps are measured in a second process, which finds the states and
does not load the teacher's backbone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import trl_common

BATCH = 4
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def make_student(directory: Path, vocabulary: int, width: int, layers: int) -> None:
    """A random model with its own tokenizer, as a directory."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    files = [f.read_text(encoding="utf-8") for f in sorted(trl_common.ROOT.glob("*.py"))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "<end>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator([*trl_common.texts(), *files], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", pad_token="<pad>")
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
        num_hidden_layers=layers, num_attention_heads=width // 32, tie_word_embeddings=True,
        max_position_embeddings=2048, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)


def make_teacher(model: Path, directory: Path) -> None:
    """The model with the plain template in the place of its own."""
    directory.mkdir()
    for file in model.iterdir():
        (directory / file.name).symlink_to(file.resolve())
    template = directory / "chat_template.jinja"
    template.unlink(missing_ok=True)
    template.write_text(PLAIN_TEMPLATE)


def suite_arguments(args: argparse.Namespace, directory: Path) -> Any:
    import cross_tokenizer

    return cross_tokenizer.Arguments(
        student=str(directory / "student"), teacher=str(directory / "teacher"), loss=args.loss,
        completions="dataset", max_length=args.length, max_new_tokens=1, cache_teacher=args.cached,
        batch_size=BATCH, micro_batch_size=BATCH, max_steps=args.steps + 1,
        **trl_common.SUITE_SETTINGS, **trl_common.suite_files(directory),
    )  # fmt: skip


def write_rows(args: argparse.Namespace, directory: Path) -> None:
    """Prompt and completion; with the end token both tokenizers need at most --length tokens."""
    from transformers import AutoTokenizer

    names = ("student", "teacher")
    tokenizers = [AutoTokenizer.from_pretrained(directory / name) for name in names]
    texts = itertools.cycle(trl_common.texts())

    def size(text: str) -> int:
        return max(len(t(text, add_special_tokens=False)["input_ids"]) for t in tokenizers)

    rows = []
    for _ in range(BATCH * (args.steps + 1)):
        prompt, answer = "", ""
        while size(prompt) < args.length // 4:
            prompt += next(texts) + "\n"
        while size(prompt) + size(answer) < args.length:
            answer += next(texts) + " "
        words = answer.split(" ")
        while size(prompt) + size(" ".join(words)) > args.length - 1:
            words.pop()
        rows.append({"prompt": prompt, "completion": " ".join(words)})
    trl_common.write_suite_rows(directory, rows)
    ordered = trl_common.suite_order(rows, suite_arguments(args, directory))
    (directory / "trl.json").write_text(json.dumps(ordered))


def run_trl(args: argparse.Namespace, directory: Path) -> None:
    """GOLDTrainer as it comes except for the order of the rows; the rest only reads numbers."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.gold import GOLDConfig, GOLDTrainer

    recorder = trl_common.Recorder()

    class Watched(GOLDTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
            loss = super().training_step(model, inputs, *rest)
            recorder.losses.append(loss.item())
            return loss

        def compute_loss(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            recorder.targets.append(int((inputs["labels"][:, 1:] != -100).sum()))
            return super().compute_loss(model, inputs, *rest, **named)

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return torch.utils.data.SequentialSampler(dataset or self.train_dataset)

    student, teacher = trl_common.load_trl_models(
        recorder, directory / "student", directory / "teacher"
    )
    config = GOLDConfig(
        output_dir=str(directory / "trl"), max_steps=args.steps + 1,
        per_device_train_batch_size=BATCH,
        max_length=args.length, max_completion_length=args.length // 2,
        lmbda=0.0, use_uld_loss=True, uld_crossentropy_weight=float(args.loss == "uld"),
        teacher_tokenizer_name_or_path=str(directory / "teacher"),
        **trl_common.TRL_SETTINGS,
    )  # fmt: skip
    trainer = Watched(
        model=student, teacher_model=teacher, args=config,
        callbacks=[trl_common.trl_callback(recorder)],
        train_dataset=Dataset.from_list(json.loads((directory / "trl.json").read_text())),
        processing_class=AutoTokenizer.from_pretrained(directory / "student"),
    )  # fmt: skip
    trainer.train()
    recorder.report()


def main() -> None:
    parser = trl_common.make_parser(__doc__)
    trl_common.add_cached(parser)
    parser.add_argument("--loss", choices=("hybrid", "uld"), default="hybrid")
    parser.add_argument("--length", type=int, default=512, help="tokens in a row, at most")
    parser.add_argument("--vocabulary", type=int, default=8192, help="of the student, at most")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    if args.side == "suite":
        import cross_tokenizer

        arguments = suite_arguments(args, args.directory)
        trl_common.run_suite(cross_tokenizer, arguments, trl_common.Recorder())
    elif args.side == "trl":
        run_trl(args, args.directory)
    else:
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            make_student(directory / "student", args.vocabulary, args.width, args.layers)
            make_teacher(args.models / "smollm2", directory / "teacher")
            write_rows(args, directory)
            sides = trl_common.measure(args, directory)
        if trl := sides.get("TRL"):
            assert sides["suite"]["targets"] == trl["targets"], sides
        print(f"{BATCH} x {args.length} tokens at most, {sides['suite']['targets']} targets of the")
        print(
            f"student in the first step, --loss {args.loss}, float32, CPU, {args.threads} threads,"
        )
        print(f"median of {args.steps} steps")
        trl_common.print_table(sides, compare_losses=False)


if __name__ == "__main__":
    main()
