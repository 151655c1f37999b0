"""Tokens a second of `common.generate` against transformers' own `model.generate`.

    python tests/bench/generation.py --models DIR [--batch-size 32] [--rows 96]

DIR holds the real chat model (../shared/real_models.py): smollm2. The prompts are rows of
data/chat.jsonl, evenly spread over the file, in the model's template; answers are greedy and as
long as they turn out to be, up to --max-new-tokens. `model.generate`, of the model as transformers
loads it, gets the same batch size, once in the file's order and once sorted by length as
`common.generate` sorts. Counted are the
tokens of answers, end-of-turn token included, nothing after it. Greedy answers can differ where
padding rounds two nearly equal logits differently; the table says how many are the same.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
import common  # noqa: E402  (it lies in the repository's root and is not installed)
import token_level  # noqa: E402

Answers = list[list[int]]


def ours(model: common.LanguageModel, prompts: Answers, limit: int, batch_size: int) -> Answers:
    """`common.generate`, its answers in the order of the prompts."""
    found = common.generate(
        model, prompts, [0] * len(prompts),
        max_new_tokens=limit, temperature=0.0, batch_size=batch_size,
    )  # fmt: skip
    return [response.ids for _, response in sorted(found)]


def theirs(
    plain: PreTrainedModel,
    model: common.LanguageModel,
    prompts: Answers,
    limit: int,
    batch_size: int,
) -> Answers:
    """`generate` of the plain model on batches padded on the left, in the order of the prompts."""
    config = GenerationConfig(
        do_sample=False, max_new_tokens=limit, eos_token_id=model.end_ids, pad_token_id=0
    )
    model.tokenizer.padding_side = "left"
    found = []
    for start in range(0, len(prompts), batch_size):
        rows = {"input_ids": prompts[start : start + batch_size]}
        inputs = model.tokenizer.pad(rows, return_tensors="pt").to(model.device)
        written = plain.generate(**inputs, generation_config=config)
        for row in written[:, inputs["input_ids"].shape[1] :].tolist():
            end = next((i for i, token in enumerate(row) if token in model.end_ids), limit)
            found.append(row[: end + 1])
    return found


def theirs_sorted(
    plain: PreTrainedModel, model: common.LanguageModel, prompts: Answers, *rest: int
) -> Answers:
    """The same, prompts of similar length together."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found = theirs(plain, model, [prompts[i] for i in order], *rest)
    return [answer for _, answer in sorted(zip(order, found, strict=True))]


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
        flags = token_level.Arguments(student=name, teacher=name, cache_dir=directory)
        accelerator = common.start("token_level", flags)
        model, _ = common.load_pair(flags, accelerator.device)
    # Not the model above, whose layers this suite has exchanged.
    plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(model.device)
    rows = common.load_conversations(str(ROOT / "data" / "chat.jsonl"))
    rows = rows[:: max(1, len(rows) // args.rows)][: args.rows]
    prompts = common.encode_prompts(model, rows)

    methods: dict[str, Callable[..., Answers]] = {
        "model.generate, file order": functools.partial(theirs, plain),
        "model.generate, sorted": functools.partial(theirs_sorted, plain),
        "common.generate": ours,
    }
    speeds, answers = {}, {}
    for method, write in methods.items():
        write(model, prompts[:4], 4, 4)  # warm-up
        began = time.perf_counter()
        answers[method] = write(model, prompts, args.max_new_tokens, args.batch_size)
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
