"""Rollout tokens a second on a real student: `common.generate`, `model.generate`, a vLLM server.

    python tests/bench/rollouts.py --models DIR [--rows 256] [--max-new-tokens 96]
    python tests/bench/rollouts.py --models DIR --rows 64 --url http://127.0.0.1:8000/v1

DIR holds smollm2-8l (see README.md beside this). The prompts are rows of data/chat.jsonl, evenly
spread over the file, in the model's template, shortest first on both sides. Everything is sampled
at temperature 1 from the whole vocabulary, and no token ends an answer, so that both sides generate
the same number of tokens; what `common.generate` saves when rows finish early is not in this
figure. Both run at batch 8, TRL's default batch, and at batch 64; `common.generate` also at 256,
its own default. The gain that --rollout-steps brings for a small --batch-size is the ratio of its
lines. With --url a server of the same model (vLLM in developer mode) is measured too, as
on_policy.py uses it: it gets the weights before every batch, and that time is included.

The methods take turns, --rounds times, and the best round of each counts. Processor seconds are
comparable on a busy machine too (with one thread).
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
import common  # noqa: E402  (it lies in the repository's root and is not installed)
import on_policy  # noqa: E402

Prompts = list[common.Prompt]


class Server(common.RolloutServer):
    """That writes on after an end token."""

    def request(self, *args: Any, **options: Any) -> dict[str, Any]:
        request = super().request(*args, **options)
        return request | {"extra_body": request["extra_body"] | {"ignore_eos": True}}


def server_tokens(server: Server, prompts: Prompts, max_new_tokens: int, batch_size: int) -> int:
    """The number of tokens that the server generated, with new weights for each batch."""
    server.args.max_new_tokens, tokens = max_new_tokens, 0
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        with server.student.evaluating():
            server.publish([prompt.student for prompt in batch[:8]])
        tokens += sum(answer.length for answer in server.write([*enumerate(batch)], 1.0))
    return tokens


def suite_tokens(
    model: common.LanguageModel, asked: Prompts, max_new_tokens: int, batch_size: int
) -> int:
    """The number of tokens that `common.generate` generated."""
    prompts = [prompt.student for prompt in asked]
    args = common.Flags(max_new_tokens=max_new_tokens, generation_batch_size=batch_size)
    completions = common.generate(model, prompts, range(len(prompts)), args, temperature=1.0)
    return sum(completion.length for _, completion in completions)


def library_tokens(
    model: common.LanguageModel, asked: Prompts, max_new_tokens: int, batch_size: int
) -> int:
    """The number of tokens that `model.generate` generated, on batches padded on the left."""
    prompts = [prompt.student for prompt in asked]
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0,
        max_new_tokens=max_new_tokens, min_new_tokens=max_new_tokens,
    )  # fmt: skip
    model.tokenizer.padding_side = "left"
    tokens = 0
    for start in range(0, len(prompts), batch_size):
        batch = {"input_ids": prompts[start : start + batch_size]}
        inputs = model.tokenizer.pad(batch, return_tensors="pt").to(model.device)
        sequences = model.model.generate(**inputs, generation_config=config)
        tokens += sequences[:, inputs["input_ids"].shape[1] :].numel()
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", type=Path, required=True, help="holds smollm2-8l")
    parser.add_argument("--rows", type=int, default=256, help="prompts; batch 8 gets 64 of them")
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--url", help="of a vLLM server of smollm2-8l in developer mode")
    parser.add_argument("--weights", default="/tmp/rollout-weights", help="that it can read")
    args = parser.parse_args()

    name = str(args.models / "smollm2-8l")
    with tempfile.TemporaryDirectory() as directory:
        arguments = on_policy.Arguments(
            student=name, teacher=name, cache_dir=directory, max_new_tokens=args.max_new_tokens,
            rollout_url=args.url, rollout_weights=args.weights,
        )  # fmt: skip
        accelerator = common.start("on_policy", arguments)
        model = common.load_student(arguments, accelerator.device)
    model.end_ids = []
    model.model.generation_config.eos_token_id = None  # used in the place of the config's None
    rows = common.load_conversations(str(ROOT / "data" / "chat.jsonl"))
    rows = rows[:: max(1, len(rows) // args.rows)][: args.rows]
    tokenized = common.tokenize_prompts(rows, common.Pair(model, model), model.max_positions)
    prompts = sorted(tokenized, key=lambda prompt: len(prompt.student))
    few = prompts[:: max(1, len(prompts) // 64)][:64]

    methods: dict[str, Any] = {
        "model.generate, batch 8": (library_tokens, few, 8),
        "model.generate, batch 64": (library_tokens, prompts, 64),
        "common.generate, batch 8": (suite_tokens, few, 8),
        "common.generate, batch 64": (suite_tokens, prompts, 64),
        "common.generate, batch 256": (suite_tokens, prompts, 256),
    }
    if args.url:
        methods["vLLM, batch 64"] = (server_tokens, prompts, 64)
    server = Server(arguments, model) if args.url else None
    wall, cpu = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0.0)
    for generate, *_ in methods.values():
        generate(server if generate is server_tokens else model, prompts[:2], 2, 2)  # warm-up
    for _ in range(args.rounds):
        for method, (generate, asked, batch_size) in methods.items():
            began = time.perf_counter(), time.process_time()
            what = server if generate is server_tokens else model
            tokens = generate(what, asked, args.max_new_tokens, batch_size)
            assert tokens == len(asked) * args.max_new_tokens, method
            wall[method] = max(wall[method], tokens / (time.perf_counter() - began[0]))
            cpu[method] = max(cpu[method], tokens / (time.process_time() - began[1]))
    print(
        f"{len(prompts)} prompts of {len(prompts[0].student)} to {len(prompts[-1].student)} "
        f"tokens, {args.max_new_tokens} new ones each, float32, {model.device.type}, "
        f"{torch.get_num_threads()} threads, best of {args.rounds}"
    )
    small, large = list(methods)[:2]
    print(f"{'':28}{'tokens/s':>10}{'tokens/cpu s':>14}{'of batch 8':>12}{'of batch 64':>13}")
    for method, speed in wall.items():
        ratios = (speed / wall[small], speed / wall[large])
        print(f"{method:28}{speed:>10.0f}{cpu[method]:>14.0f}{ratios[0]:>12.2f}{ratios[1]:>13.2f}")


if __name__ == "__main__":
    main()
