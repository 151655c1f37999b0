"""Memory that the chunked loss takes beyond its inputs and their gradients, as N and V grow.

    python tests/bench/loss_memory.py [--threads 2]

Forward KL at T = 1, forward and backward, float32 on CPU, hidden size 256; N target tokens,
vocabulary V. "plain" is the form that keeps the logits: two head products, log-softmax and
F.kl_div; it is left out where its ten N x V arrays would not fit into 6 GB. Both losses must agree.

Every cell is a process of its own, forked after the imports and before any computation. Counted is
the growth of its largest resident set, which Linux lets a process reset (/proc/self/clear_refs),
less the gradients that are the result. glibc's malloc is told to give every large array back at
once: its habit of keeping some of them makes the resident set of one and the same computation vary
by a factor of two. What is left is what is alive at a time, work space of the products included.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import sys
from pathlib import Path

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import common

HIDDEN = 256
TOKENS, VOCABULARIES = (256, 1024, 4096), (8_192, 32_768, 131_072)
PLAIN_LIMIT = 6e9  # bytes
M_MMAP_THRESHOLD = -3  # malloc.h


def high_water() -> int:
    """The largest resident set since the last reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this bench needs Linux")


def chunked(states: torch.Tensor, head: common.Head, *teacher: object) -> torch.Tensor:
    targets = torch.zeros(len(states), dtype=torch.long)
    return common.distillation_loss(states, head, targets, common.Objective(), *teacher)[0]


def plain(
    states: torch.Tensor, head: common.Head, teacher_states: torch.Tensor, teacher: common.Head
) -> torch.Tensor:
    ours = F.log_softmax(states @ head.weight.T, dim=-1)
    theirs = F.log_softmax(teacher_states @ teacher.weight.T, dim=-1)
    return F.kl_div(ours, theirs, reduction="sum", log_target=True)


def cell(form: str, tokens: int, vocabulary: int, threads: int) -> tuple[float, float]:
    """(bytes, loss) of one form; runs in a process of its own."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    states, theirs = torch.randn(2, tokens, HIDDEN)
    weight, teacher = (torch.randn(vocabulary, HIDDEN) / 16 for _ in range(2))
    leaves = [states.requires_grad_(), weight.requires_grad_()]
    states.detach()[:1] @ weight.detach()[:64].T  # starts the threads and loads the kernels
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    loss = globals()[form](states, common.Head(weight, None), theirs, common.Head(teacher, None))
    loss.backward()
    gradients = sum(leaf.grad.nbytes for leaf in leaves)
    return high_water() - before - gradients, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    print(f"MB beyond inputs and gradients, hidden size {HIDDEN}, float32, {threads} threads")
    print(f"{'V':>8}{'N':>8}{'N x V logits':>15}{'chunked':>10}{'plain':>10}")
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for vocabulary in VOCABULARIES:
            for tokens in TOKENS:
                logits = tokens * vocabulary * 4
                found = pool.apply(cell, ("chunked", tokens, vocabulary, threads))
                shown = "–"
                if 10 * logits < PLAIN_LIMIT:
                    other = pool.apply(cell, ("plain", tokens, vocabulary, threads))
                    assert abs(found[1] / other[1] - 1) < 1e-4, (found, other)
                    shown = f"{other[0] / 1e6:.0f}"
                row = f"{vocabulary:>8}{tokens:>8}{logits / 1e6:>15.0f}{found[0] / 1e6:>10.0f}"
                print(f"{row}{shown:>10}", flush=True)


if __name__ == "__main__":
    main()
