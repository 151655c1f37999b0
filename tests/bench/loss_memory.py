"""Memory that the chunked loss takes beyond its inputs and their gradients, as N and V grow.

    python tests/bench/loss_memory.py [--threads 2]

Forward KL at T = 1, forward and backward, float32 on a CPU, width 256; N target tokens, vocabulary
V. "plain" is the form that keeps the logits: two matrix products, log-softmax and F.kl_div. It is
left out where its ten N x V arrays would not fit into 6 GB. Both losses must agree.

Each cell runs in its own process, forked after the imports and before any computation. The bench
reports the growth of the largest resident set, which Linux can reset (/proc/self/clear_refs),
less the gradients, which are the result. glibc's malloc is told to return every large array to the
system at once: otherwise it keeps some of them, and the resident set of the same computation
varies by a factor of two. The figure is the memory in use at one time, including the work space of
the products.
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

WIDTH = 256
TOKENS, VOCABULARIES = (256, 1024, 4096), (8_192, 32_768, 131_072)
PLAIN_LIMIT = 6e9  # bytes
M_MMAP_THRESHOLD = -3  # malloc.h


def high_water() -> int:
    """The largest resident set since the last reset, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this bench needs Linux")


def chunked_loss(
    hidden: torch.Tensor, head: common.Head, teacher_hidden: torch.Tensor, teacher: common.Head
) -> torch.Tensor:
    targets = torch.zeros(len(hidden), dtype=torch.long)
    student, theirs = common.Logits(hidden, head), common.Logits(teacher_hidden, teacher)
    return common.distillation_loss(student, targets, common.Objective(), theirs)[0]


def plain_loss(
    hidden: torch.Tensor, head: common.Head, teacher_hidden: torch.Tensor, teacher: common.Head
) -> torch.Tensor:
    logprobs = F.log_softmax(hidden @ head.weight.T, dim=-1)
    teacher_logprobs = F.log_softmax(teacher_hidden @ teacher.weight.T, dim=-1)
    return F.kl_div(logprobs, teacher_logprobs, reduction="sum", log_target=True)


LOSSES = {"chunked": chunked_loss, "plain": plain_loss}


def measure(form: str, tokens: int, vocabulary: int, threads: int) -> tuple[float, float]:
    """(bytes, loss) of one form; runs in its own process."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    hidden, teacher_hidden = torch.randn(2, tokens, WIDTH)
    weight, teacher_weight = (torch.randn(vocabulary, WIDTH) / 16 for _ in range(2))
    head, teacher = common.Head(weight, None), common.Head(teacher_weight, None)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    hidden.detach()[:1] @ weight.detach()[:64].T  # starts the threads and loads the kernels
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()
    loss = LOSSES[form](hidden, head, teacher_hidden, teacher)
    loss.backward()
    gradients = sum(leaf.grad.nbytes for leaf in leaves)
    return high_water() - before - gradients, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    print(f"MB beyond inputs and gradients, width {WIDTH}, float32, {threads} threads")
    print(f"{'V':>8}{'N':>8}{'N x V logits':>15}{'chunked':>10}{'plain':>10}")
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for vocabulary in VOCABULARIES:
            for tokens in TOKENS:
                logits = tokens * vocabulary * 4
                chunked = pool.apply(measure, ("chunked", tokens, vocabulary, threads))
                shown = "–"
                if 10 * logits < PLAIN_LIMIT:
                    plain = pool.apply(measure, ("plain", tokens, vocabulary, threads))
                    assert abs(chunked[1] / plain[1] - 1) < 1e-4, (chunked, plain)
                    shown = f"{plain[0] / 1e6:.0f}"
                row = f"{vocabulary:>8}{tokens:>8}{logits / 1e6:>15.0f}{chunked[0] / 1e6:>10.0f}"
                print(f"{row}{shown:>10}", flush=True)


if __name__ == "__main__":
    main()
