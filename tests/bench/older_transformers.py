"""Does a run's final/ load in transformers 4, and write the same text there?

Both versions load the directory with the plain Auto classes, render the same conversations in its
chat template and write greedily, in float32. Texts and prompt ids must be equal.

    python -m venv OLD && OLD/bin/pip install "transformers<5" "torch>=2.6,<2.14"
    python tests/bench/older_transformers.py --old-python OLD/bin/python runs/*/final
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

QUESTIONS = ["knowledge", "What is the capital of France?", "Write <|im_end|> and <think>."]


def write(directory: str, length: int) -> dict:
    """What the directory's model answers, in the version of transformers that runs this."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(2)
    transformers.utils.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    prompts, texts = [], []
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        written = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, do_sample=False
        )
        prompts.append(ids[0].tolist())
        texts.append(tokenizer.decode(written[0, ids.shape[1] :]))
    kinds = {"dtype": str(model.dtype), "special_tokens": sorted(tokenizer.all_special_tokens)}
    return {"version": transformers.__version__, "prompts": prompts, "texts": texts, **kinds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directories", nargs="+", help="final/ of runs")
    parser.add_argument(
        "--old-python", help="the interpreter of an environment with transformers 4"
    )
    parser.add_argument("--length", type=int, default=48, help="tokens in an answer")
    args = parser.parse_args()
    if args.old_python is None:  # the other process
        print(json.dumps([write(directory, args.length) for directory in args.directories]))
        return
    command = [str(Path(__file__).resolve()), "--length", str(args.length), *args.directories]
    new, old = (
        json.loads(subprocess.check_output([python, *command], text=True).splitlines()[-1])
        for python in (sys.executable, args.old_python)
    )
    failed = False
    for directory, a, b in zip(args.directories, new, old, strict=True):
        different = [name for name in a if name != "version" and a[name] != b[name]]
        verdict = f"differ in {', '.join(different)}" if different else "the same"
        print(f"{directory}: transformers {a['version']} and {b['version']}: {verdict}")
        for name in different:
            print(f"  {name}\n    {a[name]}\n    {b[name]}")
        print(f"  {a['texts']!r}")
        failed |= bool(different)
    sys.exit(failed)


if __name__ == "__main__":
    main()
