"""How much of the gradient a server's top-K log-probabilities keep, against the teacher's weights.

    vllm serve TEACHER --served-model-name served --max-logprobs 256
    python tests/bench/server_teacher.py --teacher TEACHER --student STUDENT \\
        --url http://127.0.0.1:8000/v1 --name served

The server writes --rows answers. On these texts, for each K: the first step's loss, the cosine of
its gradient (all weights) with that of the whole distribution from the loaded teacher, and bytes a
token on disk.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import common
import token_level
from common import Objective

TOPICS = "rain bread moon bees clocks paper glass rivers salt trees wind maps boats sleep music"
ASKED = ["What is {}?", "Explain {} to a child.", "Write two sentences about {}."]


def gradient(student: common.LanguageModel, batches, objective: Objective) -> tuple[float, Tensor]:
    """The loss a token, and its gradient with respect to all weights as one vector."""
    student.model.zero_grad()
    total, tokens = 0.0, 0
    for batch, teacher in batches:
        loss, _ = common.distillation_loss(student.logits(batch), batch.targets, objective, teacher)
        loss.backward()
        total, tokens = total + loss.item(), tokens + len(batch.targets)
    flat = [p.grad.flatten() for p in student.model.parameters() if p.grad is not None]
    return total / tokens, torch.cat(flat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("teacher", "student", "url", "name"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--top", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    flags = parser.parse_args()
    device = PartialState(cpu=not torch.cuda.is_available()).device
    shared = {"student": flags.student, "max_new_tokens": flags.new_tokens, "max_length": 256}
    args = token_level.Arguments(
        **shared, api_base_url=flags.url, api_model=flags.name, api_top_logprobs=max(flags.top),
        cache_dir=tempfile.mkdtemp(prefix="server_teacher-"),
    )  # fmt: skip
    student, server = pair = common.load_pair(args, device)
    loaded = common.open_model(
        token_level.Arguments(**shared, teacher=flags.teacher), device, "teacher"
    )
    asked = [form.format(topic) for topic in TOPICS.split() for form in ASKED][: flags.rows]
    talks = [
        common.Conversation([{"role": "user", "content": text}], None, [], text) for text in asked
    ]
    prompts = common.tokenize_prompts(talks, pair, args.max_length)
    examples = common.make_examples(prompts, pair, args)
    groups = common.length_batches(examples, lambda e: len(e.student.ids), 1024)
    batches = [common.collate([e.student for e in group], device) for group in groups]
    hidden = [common.teacher_hidden_states(loaded, group) for group in groups]
    whole = [common.Logits(states, loaded.head()) for states in hidden]
    states = loaded.head().weight.shape[1] * 4
    print(f"{sum(len(b.targets) for b in batches)} tokens; states: {states} bytes a token in fp32")
    for objective in (Objective("forward"), Objective("reverse")):
        loss, full = gradient(student, zip(batches, whole, strict=True), objective)
        print(f"{objective.kl:8} whole    loss {loss:.4f}  norm {full.double().norm():.4f}")
        for k in flags.top:
            top = [common.TopLogprobs.unpack(server.live(group, k)) for group in groups]
            part, got = gradient(student, zip(batches, top, strict=True), objective)
            # Sums of so many squares are not exact in float32.
            a, b = got.double(), full.double()
            cosine = (a @ b / (a.norm() * b.norm())).item()
            print(
                f"{objective.kl:8} K = {k:3}  loss {part:.4f}  norm {a.norm():.4f}  cosine "
                f"{cosine:.5f}  {6 * k + 8} bytes a token"
            )
    with torch.no_grad():
        ours = torch.cat([top.logprobs[:, 0] for top in top])
        theirs = [
            common.compare(logits, b.targets) for logits, b in zip(whole, batches, strict=True)
        ]
        theirs = torch.cat([values["logprob"] for values in theirs])
    print(
        f"log-probabilities of the text, server against weights: {(ours - theirs).abs().mean():.5f}"
    )


if __name__ == "__main__":
    main()
