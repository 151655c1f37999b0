"""cross_tokenizer.py with the losses of three publications, for comparison.

    python tests/bench/published_losses.py --loss alm|projected|gold [flags of cross_tokenizer.py]

All of them compare the models on spans, the shortest pieces of text at whose ends both models end a
token. Sums are over spans; temperature 1; no cross-entropy unless --ce-weight asks for it.

alm        Minixhofer et al. 2025, "Universal cross-tokenizer distillation via approximate
           likelihood matching": p^(1/τ) of a whole span as the outcome of a coin, τ = 100, the KL
           between both models' coins, times τ. Departure: no spans are left out by their bias.
projected  Sreenivas et al. 2026, "X-Token" (P-KL): the student's distribution is carried to the
           teacher's vocabulary by a fixed matrix, KL(teacher ‖ student) there; log-probabilities
           are averaged over the positions of a span. A student's token goes to the equal teacher's
           token, else to its first four pieces, each weighted 1/e of the one before. Departures:
           the pieces are longest prefixes in bytes; teacher's tokens that the matrix does not
           reach are left out and the rest renormalised.
gold       Patiño et al. 2025, "Unlocking on-policy distillation for any model family", as in TRL's
           GOLDTrainer with `uld_use_hybrid_loss`: at the first position of a span, times the
           probabilities of its further tokens, JSD (β = 0.5) over equal tokens and the L1 distance
           of the other, sorted probabilities, weighted by the share of the teacher's vocabulary
           that has an equal token. Departure: the end token is learned too.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import common
import cross_tokenizer
from common import Example, flag
from cross_tokenizer import Piece, longest_prefix

TAU = 100.0
PIECES = 4
TINY = 1e-6


@dataclass
class Arguments(cross_tokenizer.Arguments):
    loss: Literal["alm", "projected", "gold"] = flag("alm", "see above")


class Spans(NamedTuple):
    """The spans of a batch: rows of both models, from the first to the one after the last."""

    ranges: Tensor  # (S, 4): student's first, student's end, teacher's first, teacher's end
    teacher_ids: Tensor  # (m,), of the teacher's targets

    def tokens(self, side: int) -> tuple[Tensor, Tensor]:
        """Row and span of every token in a span of the student (side 0) or teacher: (R,), (R,)."""
        first, end = self.ranges[:, 2 * side], self.ranges[:, 2 * side + 1]
        lengths = end - first
        span = torch.repeat_interleave(lengths)
        skipped = lengths.cumsum(0) - lengths
        return torch.arange(len(span)) + (first - skipped)[span], span


class SpanAlignments(cross_tokenizer.Alignments):
    """Spans instead of pairs of positions."""

    def __init__(self, examples: Sequence[Example], *rest: Any) -> None:
        self.teacher_ids = {
            e.index: torch.tensor([e.teacher.ids[p] for p in e.teacher.targets]) for e in examples
        }
        super().__init__(examples, *rest)
        ours, theirs = self.vocabularies
        entries = []  # student's id, teacher's id, weight
        for token, ids in ours.ids.items():
            targets = [token] if token in theirs.ids else pieces(token, theirs.ids)
            weights = [math.exp(-k) for k in range(len(targets))]
            for k, target in enumerate(targets):
                entries += [(i, theirs.ids[target][0], weights[k] / sum(weights)) for i in ids]
        student, teacher, weights = zip(*entries, strict=True)
        self.matrix = (
            torch.tensor(student, device=self.device), torch.tensor(teacher, device=self.device),
            torch.tensor(weights, device=self.device),
        )  # fmt: skip
        equal = [(ids[0], theirs.ids[t][0]) for t, ids in ours.ids.items() if t in theirs.ids]
        self.equal = torch.tensor(equal, device=self.device).t()  # (2, K)

    def _align(self, example: Example) -> Tensor:
        spans = []
        for turn in cross_tokenizer.turns(example, self.vocabularies):
            starts = turn.boundaries()
            whole = turn.begins[0][-1] == turn.begins[1][-1] == turn.same
            ends = starts[1:] + [tuple(map(len, turn.tokens))] * whole
            (first, teacher_first) = turn.first
            for (i, j), (k, m) in zip(starts, ends, strict=False):
                spans.append((first + i, first + k, teacher_first + j, teacher_first + m))
        self.totals["boundaries"] += len(spans)
        self.totals["compared"] += sum(end - first for first, end, *_ in spans)
        self.totals["student"] += len(example.student.targets)
        self.totals["teacher"] += len(example.teacher.targets)
        return torch.tensor(spans, dtype=torch.long).view(-1, 4)

    def __call__(self, examples: Sequence[Example]) -> list[Piece]:
        counts = [(len(e.student.targets), len(e.teacher.targets)) for e in examples]
        starts = torch.tensor([(0, 0), *counts]).cumsum(0).repeat_interleave(2, 1)  # (B + 1, 4)
        parts = [self.pairs[e.index] + start for e, start in zip(examples, starts, strict=False)]
        teacher_ids = torch.cat([self.teacher_ids[e.index] for e in examples])
        n, _, m, _ = starts[-1].tolist()
        return [Piece(slice(0, n), slice(0, m), Spans(torch.cat(parts), teacher_ids))]


def pieces(token: bytes, known: dict[bytes, Any]) -> list[bytes]:
    """At most four tokens of `known` that the token begins with, each the longest prefix."""
    result: list[bytes] = []
    while token and len(result) < PIECES and (piece := longest_prefix(token, known)):
        result.append(piece)
        token = token[len(piece) :]
    return result


def span_sums(values: Tensor, spans: Spans, side: int, skip_first: bool = False) -> Tensor:
    """Sum values (R, ...) of rows over spans to (S, ...)."""
    rows, span = spans.tokens(side)
    if skip_first:
        later = rows != spans.ranges[span, 2 * side]
        rows, span = rows[later], span[later]
    rows, span = (common.to_device(index, values.device) for index in (rows, span))
    sums = values.new_zeros(len(spans.ranges), *values.shape[1:])
    return sums.index_add(0, span, values[rows])


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0."""
    return (-torch.expm1(x)).log()


def alm(ours: Tensor, theirs: Tensor, ids: tuple[Tensor, Tensor], spans: Spans, _: Any) -> Tensor:
    sides = zip((theirs, ours), reversed(ids), strict=True)
    sums = [
        span_sums(logprobs.gather(1, targets[:, None])[:, 0], spans, side)
        for side, (logprobs, targets) in zip((1, 0), sides, strict=True)
    ]
    teacher, student = ((s - TINY) / TAU for s in sums)  # (S,): log p^(1/τ)
    heads = teacher.exp() * (teacher - student)
    tails = -torch.expm1(teacher) * (log1mexp(teacher) - log1mexp(student))
    return TAU * (heads + tails).sum()


def projected(
    ours: Tensor, theirs: Tensor, ids: tuple[Tensor, Tensor], spans: Spans, alignments: Any
) -> Tensor:
    student_ids, teacher_ids, weights = alignments.matrix
    mass = ours.exp().index_select(1, student_ids) * weights  # (n, entries)
    carried = torch.zeros_like(ours[:, :1]).expand(-1, theirs.shape[1])
    carried = carried.index_add(1, teacher_ids, mass)  # (n, V')
    reached = teacher_ids.unique()
    sides = ((carried[:, reached] + 1e-12).log(), 0), (theirs[:, reached], 1)
    means = []
    for logprobs, side in sides:
        first, end = spans.ranges[:, 2 * side], spans.ranges[:, 2 * side + 1]
        lengths = common.to_device(end - first, ours.device)
        means.append((span_sums(logprobs, spans, side) / lengths[:, None]).log_softmax(-1))
    student, teacher = means
    return (teacher.exp() * (teacher - student)).sum()


def gold(
    ours: Tensor, theirs: Tensor, ids: tuple[Tensor, Tensor], spans: Spans, alignments: Any
) -> Tensor:
    merged = []
    for side, (logprobs, targets) in enumerate(zip((ours, theirs), ids, strict=True)):
        chosen = logprobs.gather(1, targets[:, None])[:, 0]
        later = span_sums(chosen, spans, side, skip_first=True)
        first = common.to_device(spans.ranges[:, 2 * side], ours.device)
        merged.append((logprobs[first] + later[:, None]).exp())  # (S, V), (S, V')
    student, teacher = (p[:, same] for p, same in zip(merged, alignments.equal, strict=True))
    mean = (student + teacher).clamp_min(1e-12) / 2
    jsd = sum((p * (p.clamp_min(1e-12) / mean).log()).sum() / 2 for p in (student, teacher))
    others = []
    for p, same in zip(merged, alignments.equal, strict=True):
        other = torch.ones(p.shape[1], dtype=torch.bool, device=p.device)
        other[same] = False
        others.append(p[:, other].sort(-1, descending=True).values)
    width = max(p.shape[1] for p in others)
    student, teacher = (torch.nn.functional.pad(p, (0, width - p.shape[1])) for p in others)
    share = len(alignments.equal[0]) / theirs.shape[1]
    return share * jsd + (1 - share) * (student - teacher).abs().sum()


def piece_loss(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, spans: Spans, alignments: Any
) -> tuple[Tensor, Tensor]:
    """As `cross_tokenizer.piece_loss`."""
    loss = {"alm": alm, "projected": projected, "gold": gold}[alignments.objective.loss]
    ours, theirs = logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    ids = targets, common.to_device(spans.teacher_ids, logits.device)
    divergence = loss(ours, theirs, ids, spans, alignments)
    nats = -ours.gather(1, targets[:, None]).sum()
    return divergence + alignments.objective.ce_weight * nats, divergence


if __name__ == "__main__":
    cross_tokenizer.Alignments, cross_tokenizer.piece_loss = SpanAlignments, piece_loss
    common.launch(cross_tokenizer.main, Arguments, __doc__)
