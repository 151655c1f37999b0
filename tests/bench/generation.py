"""Tokens a second of `common.generate` and of transformers' own `model.generate`, greedy.

    python tests/bench/generation.py --models DIR [--batch-size 32] [--rows 96]

DIR holds SmolLM2-135M-Instruct as smollm2. The prompts are rows of data/chat.jsonl, evenly spread
over the file, in the model's template. An answer ends with the model's end token or after
--max-new-tokens. `model.generate` gets the same batch size, once with
the prompts in the order of the file and once sorted by length, as `common.generate` sorts them.

Only the tokens of answers are counted, end-of-turn token included. Greedy answers can differ where
padding rounds two nearly equal logits differently; the table says how many are the same.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import GenerationConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
import common  # noqa: E402  (it lies in the repository's root and is not installed)
import token_level  # noqa: E402

Ids = list[list[int]]


def suite_answers(
    model: common.LanguageModel, prompts: Ids, max_new_tokens: int, batch_size: int
) -> Ids:
    """Answers of `common.generate`, in the order of the prompts."""
    args = token_level.Arguments(max_new_tokens=max_new_tokens, generation_batch_size=batch_size)
    completions = common.generate(model, prompts, [0] * len(prompts), args, temperature=0.0)
    return [completion.ids for _, completion in sorted(completions)]


def library_answers(
    model: common.LanguageModel, prompts: Ids, max_new_tokens: int, batch_size: int
) -> Ids:
    """Answers of `model.generate` on batches padded on the left, in the order of the prompts."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=model.end_ids, pad_token_id=0
    )
    model.tokenizer.padding_side = "left"
    answers = []
    for start in range(0, len(prompts), batch_size):
        batch = {"input_ids": prompts[start : start + batch_size]}
        inputs = model.tokenizer.pad(batch, return_tensors="pt").to(model.device)
        sequences = model.model.generate(**inputs, generation_config=config)
        for ids in sequences[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(ids) if token in model.end_ids), max_new_tokens)
            answers.append(ids[: end + 1])
    return answers


def sorted_library_answers(model: common.LanguageModel, prompts: Ids, *sizes: int) -> Ids:
    """The same with prompts of similar length in one batch."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = library_answers(model, [prompts[i] for i in order], *sizes)
    return [answer for _, answer in sorted(zip(order, answers, strict=True))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="holds smollm2")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()

    name = str(args.models / "smollm2")
    with tempfile.TemporaryDirectory() as directory:
        arguments = token_level.Arguments(student=name, teacher=name, cache_dir=directory)
        accelerator = common.start("token_level", arguments)
        model = common.load_student(arguments, accelerator.device)
    rows = common.load_conversations(str(ROOT / "data" / "chat.jsonl"))
    rows = rows[:: max(1, len(rows) // args.rows)][: args.rows]
    tokenized = common.tokenize_prompts(rows, common.Pair(model, model), model.max_positions)
    prompts = [prompt.student for prompt in tokenized]

    methods: dict[str, Callable[..., Ids]] = {
        "model.generate, file order": library_answers,
        "model.generate, sorted": sorted_library_answers,
        "common.generate": suite_answers,
    }
    speeds, answers = {}, {}
    for method, generate in methods.items():
        generate(model, prompts[:4], 4, 4)  # warm-up
        began = time.perf_counter()
        answers[method] = generate(model, prompts, args.max_new_tokens, args.batch_size)
        seconds = time.perf_counter() - began
        speeds[method] = sum(map(len, answers[method])) / seconds
    lengths = sorted(map(len, answers["common.generate"]))
    print(
        f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, "
        f"batches of {args.batch_size}, answers of {lengths[0]} to {lengths[-1]} tokens (median "
        f"{lengths[len(lengths) // 2]}), {model.device.type}, {torch.get_num_threads()} threads"
    )
    print(f"{'':30}{'tokens/s':>10}{'ratio':>8}{'same answers':>15}")
    for method, speed in speeds.items():
        ratio = speed / speeds["model.generate, file order"]
        same = sum(a == b for a, b in zip(answers[method], answers["common.generate"], strict=True))
        print(f"{method:30}{speed:>10.0f}{ratio:>8.2f}{same:>11} of {len(prompts)}")


if __name__ == "__main__":
    main()
