"""The losses of tests/bench/published_losses.py against plain forms in float64."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch import Tensor

sys.path.insert(0, str(ROOT / "tests" / "bench"))

import published_losses
from published_losses import Spans, alm, gold, projected

# Three spans: of 3 and 2 tokens, 1 and 3, 2 and 1.
RANGES = torch.tensor([[0, 3, 0, 2], [3, 4, 2, 5], [4, 6, 5, 6]])
SIZES = 11, 13  # vocabularies; the first nine tokens are equal


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, tuple[Tensor, Tensor], Spans, SimpleNamespace]:
    """Log-probabilities of both models, the text's ids, spans, and how the vocabularies match:
    the student's token 9 is the teacher's 9 then 10, its 10 is the teacher's 11; 12 is reached by
    none."""
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, size, generator=draw, dtype=torch.float64) for size in SIZES]
    ids = tuple(torch.randint(9, (6,), generator=draw) for _ in SIZES)
    weights = [*[1.0] * 9, 1 / (1 + math.exp(-1)), math.exp(-1) / (1 + math.exp(-1)), 1.0]
    matrix = (
        torch.tensor([*range(9), 9, 9, 10]),
        torch.tensor([*range(9), 9, 10, 11]),
        torch.tensor(weights, dtype=torch.float64),
    )
    match = SimpleNamespace(matrix=matrix, equal=torch.arange(9).repeat(2, 1))
    ours, theirs = (x.log_softmax(-1) for x in logits)
    return ours, theirs, ids, Spans(RANGES, ids[1]), match


def plain(loss: str, ours: Tensor, theirs: Tensor, ids: tuple[Tensor, Tensor], match) -> Tensor:
    """From the docstring, one span after the other."""
    total = torch.zeros((), dtype=torch.float64)
    for a, b, c, d in RANGES.tolist():
        sides = (ours, ids[0], a, b), (theirs, ids[1], c, d)
        chosen = [[x[i, t[i]] for i in range(start, end)] for x, t, start, end in sides]
        if loss == "alm":
            q, p = (torch.stack(side).sum().exp() ** 0.01 for side in chosen)
            total = total + 100 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        elif loss == "projected":
            carried = torch.zeros(6, 13, dtype=torch.float64)
            for s, t, w in zip(*match.matrix, strict=True):
                carried[:, t] = carried[:, t] + w * ours[:, s].exp()
            q, p = carried[a:b, :12].log().mean(0).softmax(0), theirs[c:d, :12].mean(0).softmax(0)
            total = total + (p * (p / q).log()).sum()
        else:
            q, p = (
                x[start].exp() * torch.stack([*side[1:], torch.zeros(())]).sum().exp()
                for (x, _, start, _), side in zip(sides, chosen, strict=True)
            )
            m = (p[:9] + q[:9]) / 2
            jsd = sum((x[:9] * (x[:9] / m).log()).sum() / 2 for x in (p, q))
            rest = sorted(p[9:].tolist(), reverse=True), sorted(q[9:].tolist(), reverse=True)
            distance = sum(abs(x - y) for x, y in zip(rest[0], [*rest[1], 0, 0], strict=True))
            total = total + 9 / 13 * jsd + 4 / 13 * distance
    return total


@pytest.mark.parametrize("loss", [alm, projected, gold])
def test_loss_is_its_definition(loss, inputs):
    ours, theirs, ids, spans, match = inputs
    found = loss(ours, theirs, ids, spans, match)
    torch.testing.assert_close(
        found, plain(loss.__name__, ours, theirs, ids, match), rtol=1e-5, atol=0
    )
    logits = ours.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: loss(x.log_softmax(-1), theirs, ids, spans, match), logits
    )


def test_pieces_of_a_token():
    """The longest prefixes, at most four; what no token begins is left."""
    known = {b"he": 0, b"h": 0, b"l": 0, b"lo": 0}
    assert published_losses.pieces(b"hello", known) == [b"he", b"l", b"lo"]
    assert published_losses.pieces(b"hellolo", known) == [b"he", b"l", b"lo", b"lo"]
    assert published_losses.pieces(b"hxl", known) == [b"h"]
