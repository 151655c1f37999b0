"""What as many steps on as many gold labels recover: the yardstick of distillation.

sequence_level.py with the dictionary's own answers in the place of the teacher's: the same
prompts, the same turns as targets, one answer to each. (--completions dataset is another thing: of
conversations with several turns it learns every one, which are more labels than prompts.)

    python tests/bench/gold_labels.py [flags of sequence_level.py]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import sequence_level
from common import Answer, LanguageModel, Prompt

load_models = sequence_level.load_models


def with_gold_labels(
    args: sequence_level.Arguments, accelerator: Accelerator
) -> tuple[LanguageModel, LanguageModel, sequence_level.Write]:
    """A teacher that writes the rows' own answers to train on, and is scored as itself."""
    student, teacher, write = load_models(args, accelerator)

    def gold(prompts: Sequence[Prompt], **settings: Any) -> list[Answer]:
        if settings["purpose"] != "training text":
            return write(prompts, **settings)
        answers = [Answer(p.conversation.response, True, 0, None) for p in prompts]
        asked = [p._replace(student=p.teacher) for p in prompts]
        encoded = common.encode_answers(teacher, asked, answers)
        ids = [[tokens.ids[i] for i in tokens.targets] for tokens in encoded]
        return [a._replace(ids=i, tokens=len(i)) for a, i in zip(answers, ids, strict=True)]

    return student, teacher, gold


if __name__ == "__main__":
    sequence_level.load_models = with_gold_labels
    common.launch(sequence_level.main, sequence_level.Arguments, __doc__)
