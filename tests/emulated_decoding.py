"""What text generation asks of an emulated GPU, for models of several architectures, as JSON.

    PYTHONPATH=(where emulated_cuda is) python emulated_decoding.py [fixed] KIND [KIND ...]

With `fixed` from a cache of fixed size, where steps are captured; here they are run. For each kind:
the waits and copies of the first token, those of 32 more, the bytes that conversions read and write
in 33 tokens, the bytes of the weights, and the dtypes of keys and values.
"""

from __future__ import annotations

import collections
import json
import sys
import tempfile
from pathlib import Path

import emulated_cuda  # before torch
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_architectures
from transformers import StaticCache

import common
import token_level

PROMPTS = {"padded": test_architectures.PROMPTS, "equal": [[3, 10, 11, 12], [3, 40, 41, 42]]}


def measure(kind: str, directory: str) -> dict[str, dict]:
    """The report of a student with bfloat16 as its compute dtype, for each kind of prompts."""
    log, args = emulated_cuda.log, token_level.Arguments(student=directory, teacher=directory)
    student = common.load_student(args, torch.device("cuda", 0))
    student.end_ids = []
    if "fixed" in sys.argv:
        student.cache = StaticCache
        common.CachedReader._captured = lambda self, *inputs: self._read(*inputs, self.size)
        torch.cuda.set_sync_debug_mode = lambda mode: None
    weights = sum(p.numel() * p.element_size() for p in student.model.parameters())
    result = {}
    for name, prompts in PROMPTS.items():
        counts = []
        with student.evaluating():
            for args.max_new_tokens in (1, 33):
                log.reset()
                list(common.generate(student, prompts, range(len(prompts)), args, 1.0))
                counts.append(collections.Counter(" in ".join(key) for key in log.syncs.elements()))
        result[name] = {
            "first": counts[0],
            "more": counts[1] - counts[0],
            "converted": log.bytes["_to_copy"],
            "weights": weights,
            "caches": sorted({dtype for _, *dtypes in log.caches for dtype in dtypes}),
        }
    return result


if __name__ == "__main__":
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in [word for word in sys.argv[1:] if word != "fixed"]:
            changes = dict(test_architectures.ARCHITECTURES[kind])
            if kind == "llama":  # wide, so that its weights are more than what it computes with
                changes |= {"hidden_size": 256, "intermediate_size": 4096}
            path = test_architectures.save(Path(folder) / kind, kind, changes)
            with emulated_cuda.device():
                results[kind] = measure(kind, path)
    print(json.dumps(results))
