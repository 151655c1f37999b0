"""Token-level distillation: the student learns the teacher's whole next-token distribution.

At every token of a text the teacher says not only which token comes next but how likely each token
of the vocabulary is. The student is trained to give the same distribution:

    loss = T² · Σ_i D( p_teacher(· | x_<i ; T) , p_student(· | x_<i ; T) ) / N  +  w · CE

over the N target tokens of a batch (those that the assistant wrote). D is KL(teacher ‖ student)
(--kl forward), KL(student ‖ teacher) (--kl reverse) or the generalised Jensen-Shannon divergence
(--kl jsd); T is --temperature, w is --ce-weight. Both models must have the same vocabulary; use
cross_tokenizer.py if they do not.

Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network" (T², section 2);
Agarwal et al. 2024, "On-policy distillation of language models" (the divergences, eq. 1 and 2);
Ko et al. 2024, "DistiLLM" (--skew). Departures: the sum is divided by the number of tokens in the
global batch, not by sentences; the teacher samples the text unless --completions dataset.

    python token_level.py
    python token_level.py --kl reverse
    for T in 1 2 4; do python token_level.py --temperature $T; done; python common.py runs/*
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

import common
from common import Batch, Flags, Head, LanguageModel, Objective, flag


@dataclass
class Arguments(Flags):
    kl: Literal["forward", "reverse", "jsd"] = flag(
        "forward", "forward: KL(teacher ‖ student); reverse: KL(student ‖ teacher); jsd: between"
    )
    jsd_beta: float = flag(0.5, "the teacher's share of the jsd mixture, strictly inside (0, 1)")
    skew: float = flag(0.0, "mix this share of p into q in KL(p ‖ q) (DistiLLM: 0.1; 0: off)")
    ce_weight: float = flag(0.0, "weight of cross-entropy on the text's own tokens")

    def objective(self) -> Objective:
        """The divergence and its weights; `UsageError` for values out of range."""
        if not 0 < self.jsd_beta < 1:
            raise common.UsageError(
                "--jsd-beta must lie inside (0, 1); for the limits use --kl forward and reverse"
            )
        if self.skew and not 1e-6 < self.skew < 1:
            raise common.UsageError("--skew must be 0 or lie in (1e-6, 1)")
        if self.jsd_beta != 0.5 and self.kl != "jsd":
            raise common.UsageError("--jsd-beta applies to --kl jsd")
        if self.skew and self.kl not in ("forward", "reverse"):
            raise common.UsageError("--skew applies to --kl forward and reverse, not to jsd")
        if self.api_base_url and self.temperature != 1:
            raise common.UsageError(
                "--temperature must be 1 with --api-base-url: a server gives no total for the "
                "tokens that it does not name at another temperature"
            )
        return Objective(self.kl, self.jsd_beta, self.skew, self.temperature, self.ce_weight)


class TokenLevelLoss(nn.Module):
    """The student and its loss. What is registered here is trained, synchronised and saved."""

    def __init__(
        self, student: LanguageModel, teacher_head: Head | None, objective: Objective
    ) -> None:
        super().__init__()
        self.trained = student.model  # registers its parameters
        self.student, self.teacher_head, self.objective = student, teacher_head, objective

    def forward(self, batch: Batch, teacher_hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The loss in nats, summed over the batch's N targets, and (2,) to log: loss, divergence.

        `teacher_hidden`: the teacher's states (N, d) there, or a server's `TopLogprobs.packed`.
        """
        teacher = common.teacher_logits(teacher_hidden, self.teacher_head)
        logits = self.student.logits(batch)
        return common.distillation_loss(logits, batch.targets, self.objective, teacher)


def main(args: Arguments) -> None:
    objective = args.objective()
    accelerator = common.start("token_level", args)
    train, held_out = common.load_data(args)
    student, teacher = pair = common.load_pair(args, accelerator.device)
    pair.check_same_vocabulary()
    prompts = common.tokenize_prompts(train, pair, args.max_length)
    evaluation = common.tokenize_prompts(held_out, pair, args.max_length)

    examples = common.make_examples(prompts, pair, args)
    evaluator = common.Evaluator(evaluation, pair, args)
    teacher_hidden = common.TeacherHiddenStates(teacher, examples, "training text")
    if args.cache_teacher and pair.has_weights:
        teacher.unload()  # its head and hidden states are all that training needs
    run = common.Run("token_level", args, accelerator, evaluator, examples)

    module = TokenLevelLoss(student, teacher.head(), objective)
    module, optimizer = common.prepare(accelerator, module, args, teacher)
    steps = common.total_steps(args, len(examples))
    for step in range(run.resume(steps), steps):
        run.begin(step, optimizer)
        batch = common.global_batch(examples, args, step)
        micro_batches, tokens = common.split_micro_batches(batch, args)
        sums = 0.0  # (2,): loss, divergence
        for micro_batch in micro_batches:
            inputs = common.collate([e.student for e in micro_batch], accelerator.device)
            with common.reduce_gradients(accelerator, module, micro_batch is micro_batches[-1]):
                loss, parts = module(inputs, teacher_hidden(micro_batch))
                # Gradients are averaged over processes: times their number gives the sum.
                accelerator.backward(loss * (accelerator.num_processes / tokens))
            sums += parts
            del loss  # frees the graph before the next one is made
        norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        mean_loss, kl = accelerator.reduce(sums / tokens, "sum")
        lr = optimizer.param_groups[0]["lr"]
        numbers = {"train/loss": mean_loss, "train/kl": kl, "optim/lr": lr, "optim/grad_norm": norm}
        run.log(step + 1, tokens, numbers, micro_batches)
        run.evaluate(step + 1)
        run.save(step + 1)
    run.finish()


if __name__ == "__main__":
    common.launch(main, Arguments, __doc__)
