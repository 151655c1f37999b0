"""What the same number of steps on as many gold labels recovers: the yardstick of distillation.

token_level.py's loop, data order and defaults, with cross-entropy on the dictionary's own answers
in the place of the teacher's distribution.

    python tests/bench/gold_labels.py [flags of token_level.py]
"""

from __future__ import annotations

import sys
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import token_level


class GoldLabels(token_level.TokenLevelLoss):
    """Cross-entropy alone; the teacher is only scored."""

    def forward(self, batch: common.Batch, teacher_states: Tensor) -> tuple[Tensor, Tensor]:
        return common.distillation_loss(
            self.student.states(batch),
            self.student.head(),
            batch.targets,
            common.Objective(ce_weight=1.0),
        )


if __name__ == "__main__":
    token_level.TokenLevelLoss = GoldLabels
    sys.argv += ["--completions", "dataset", "--ce-weight", "1"]
    common.launch(token_level.main, token_level.Arguments, __doc__)
