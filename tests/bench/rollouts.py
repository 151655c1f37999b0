"""Rollout tokens a second on a real student: `common.generate` against `model.generate`.

    python tests/bench/rollouts.py --models DIR [--rows 256] [--max-new-tokens 96]

DIR holds the real pair (../shared/real_models.py): smollm2-8l. The prompts are rows of
data/chat.jsonl, evenly spread over the file, in the model's template, shortest first on both
sides. Everything is sampled at temperature 1 from the whole vocabulary, and no token ends an
answer, so that both sides write the same number of tokens: what `common.generate` saves when rows
finish is not in this figure. Both run at batch 8, TRL's default batch, and at batch 64;
`common.generate` also at 256, its own default. What --rollout-steps gives to a small --batch-size
is the distance between its lines.

The sides take turns, --rounds times, and the best round of each counts. Processor seconds stand
beside the others because they mean something on a busy machine too (with one thread).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
import common  # noqa: E402  (it lies in the repository's root and is not installed)
import on_policy  # noqa: E402

Ids = list[list[int]]


def ours(model: common.LanguageModel, prompts: Ids, limit: int, batch_size: int) -> int:
    """Tokens that `common.generate` wrote."""
    found = common.generate(
        model, prompts, list(range(len(prompts))),
        max_new_tokens=limit, temperature=1.0, batch_size=batch_size,
    )  # fmt: skip
    return sum(len(response.ids) for _, response in found)


def theirs(
    plain: PreTrainedModel, model: common.LanguageModel, prompts: Ids, limit: int, batch_size: int
) -> int:
    """Tokens that `generate` of the plain model wrote, on batches padded on the left."""
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
        max_new_tokens=limit, min_new_tokens=limit,
    )  # fmt: skip
    model.tokenizer.padding_side = "left"
    written = 0
    for start in range(0, len(prompts), batch_size):
        rows = {"input_ids": prompts[start : start + batch_size]}
        inputs = model.tokenizer.pad(rows, return_tensors="pt").to(model.device)
        out = plain.generate(**inputs, generation_config=config)
        written += out[:, inputs["input_ids"].shape[1] :].numel()
    return written


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="holds smollm2-8l")
    parser.add_argument("--rows", type=int, default=256, help="prompts; batch 8 gets 64 of them")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()

    name = str(args.models / "smollm2-8l")
    with tempfile.TemporaryDirectory() as directory:
        flags = on_policy.Arguments(student=name, teacher=name, cache_dir=directory)
        accelerator = common.start("on_policy", flags)
        model, _ = common.load_pair(flags, accelerator.device)
    model.end_ids = []
    # Not the model above, whose layers this suite has exchanged.
    plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(model.device)
    plain.generation_config.eos_token_id = None  # it would step in for the None above
    generate = functools.partial(theirs, plain)
    rows = common.load_conversations(str(ROOT / "data" / "chat.jsonl"))
    rows = rows[:: max(1, len(rows) // args.rows)][: args.rows]
    prompts = sorted(common.encode_prompts(model, rows), key=len)
    few = prompts[:: max(1, len(prompts) // 64)][:64]

    sides = {
        "model.generate, batch 8": (generate, few, 8),
        "model.generate, batch 64": (generate, prompts, 64),
        "common.generate, batch 8": (ours, few, 8),
        "common.generate, batch 64": (ours, prompts, 64),
        "common.generate, batch 256": (ours, prompts, 256),
    }
    wall, cpu = dict.fromkeys(sides, 0.0), dict.fromkeys(sides, 0.0)
    for write, *_ in sides.values():
        write(model, prompts[:2], 2, 2)  # warm-up
    for _ in range(args.rounds):
        for side, (write, asked, batch_size) in sides.items():
            began = time.perf_counter(), time.process_time()
            tokens = write(model, asked, args.max_new_tokens, batch_size)
            assert tokens == len(asked) * args.max_new_tokens, side
            wall[side] = max(wall[side], tokens / (time.perf_counter() - began[0]))
            cpu[side] = max(cpu[side], tokens / (time.process_time() - began[1]))
    print(
        f"{len(prompts)} prompts of {len(prompts[0])} to {len(prompts[-1])} tokens, "
        f"{args.max_new_tokens} new ones each, float32, {model.device.type}, "
        f"{torch.get_num_threads()} threads, best of {args.rounds}"
    )
    small, large = list(sides)[:2]
    print(f"{'':28}{'tokens/s':>10}{'tokens/cpu s':>14}{'of batch 8':>12}{'of batch 64':>13}")
    for side, speed in wall.items():
        ratios = (speed / wall[small], speed / wall[large])
        print(f"{side:28}{speed:>10.0f}{cpu[side]:>14.0f}{ratios[0]:>12.2f}{ratios[1]:>13.2f}")


if __name__ == "__main__":
    main()
