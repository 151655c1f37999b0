"""The baseline of distillation: as many steps on as many gold labels.

sequence_level.py, but the student learns from the dictionary's own answers instead of the
teacher's: the same prompts, the same turns as targets, one answer for each prompt. (--completions
dataset differs: it trains on every assistant turn of a conversation, so it has more labels than
prompts.) The teacher is evaluated as usual.

    python tests/bench/gold_labels.py [flags of sequence_level.py]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import sequence_level
from common import Completion, LanguageModel, Pair, Prompt

load_pair = common.load_pair


def gold_completions(teacher: LanguageModel, prompts: Sequence[Prompt]) -> list[Completion]:
    """The data set's own answers in the teacher's tokens, as if the teacher had written them."""
    completions = []
    for prompt in prompts:
        text = prompt.conversation.response["content"]
        ids = common.tokenize_answer(teacher, prompt.conversation, prompt.teacher, text)
        ids = ids + teacher.end_ids[:1]
        completions.append(Completion(text, True, len(ids), ids))
    return completions


def load_pair_with_gold_labels(args: sequence_level.Arguments, device: torch.device) -> Pair:
    """The pair; the teacher completes training prompts with gold labels."""
    pair = load_pair(args, device)
    complete = pair.teacher.complete

    def complete_with_gold_labels(
        prompts: Sequence[Prompt], args: sequence_level.Arguments, **sampling: Any
    ) -> list[Completion]:
        if sampling["purpose"] == "training text":
            return gold_completions(pair.teacher, prompts)
        return complete(prompts, args, **sampling)

    pair.teacher.complete = complete_with_gold_labels
    return pair


if __name__ == "__main__":
    common.load_pair = load_pair_with_gold_labels
    common.launch(sequence_level.main, sequence_level.Arguments, __doc__)
