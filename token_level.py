"""Token-level distillation: the student learns the teacher's whole next-token distribution.

At every token of a text the teacher does not say only which token comes next but how likely each
token of the vocabulary is. The student is trained to give the same distribution:

    loss = T² · Σ_i D( p_teacher(· | x_<i ; T) , p_student(· | x_<i ; T) ) / N  +  w · CE

over the N target tokens (those that the assistant wrote) of a batch; D is KL(teacher ‖ student)
(--kl forward), KL(student ‖ teacher) (--kl reverse) or the generalised Jensen-Shannon divergence
(--kl jsd); T is --temperature, w is --ce-weight. Both models must have the same vocabulary;
cross_tokenizer.py is for those that have not.

Hinton, Vinyals & Dean 2015, "Distilling the knowledge in a neural network" (T², section 2);
Agarwal et al. 2024, "On-policy distillation of language models" (the divergences, eq. 1 and 2);
Ko et al. 2024, "DistiLLM" (--skew). Departures: the sum is divided by the tokens of the whole
global batch, not by sentences; the text is sampled from the teacher unless --completions dataset.

    python token_level.py
    python token_level.py --kl reverse
    for T in 1 2 4; do python token_level.py --temperature $T; done; python common.py runs/*
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

import common
from common import Batch, CommonArguments, Head, LanguageModel, Objective, UsageError, flag


@dataclass
class Arguments(CommonArguments):
    kl: Literal["forward", "reverse", "jsd"] = flag(
        "forward", "forward: KL(teacher ‖ student); reverse: KL(student ‖ teacher); jsd: between"
    )
    jsd_beta: float = flag(0.5, "the teacher's share of the jsd mixture, strictly inside (0, 1)")
    skew: float = flag(
        0.0, "mix this share of the compared distribution into the other (DistiLLM: 0.1; 0: off)"
    )
    ce_weight: float = flag(0.0, "weight of cross-entropy on the text's own tokens")

    def objective(self) -> Objective:
        """The divergence and its weights; `UsageError` for values where it degenerates."""
        if not 0 < self.jsd_beta < 1:
            raise UsageError(
                "--jsd-beta must lie inside (0, 1): its ends are --kl forward, reverse"
            )
        if not 0 <= self.skew < 1:
            raise UsageError("--skew must lie in [0, 1)")
        if self.skew and self.kl == "jsd":
            raise UsageError("--skew applies to --kl forward and reverse, not to jsd")
        return Objective(self.kl, self.jsd_beta, self.skew, self.temperature, self.ce_weight)


class TokenLevelLoss(nn.Module):
    """The student and its loss in one `forward`, which is what DDP and FSDP wrap."""

    def __init__(self, student: LanguageModel, teacher_head: Head, objective: Objective) -> None:
        super().__init__()
        self.trained = student.model
        self.student, self.teacher_head, self.objective = student, teacher_head, objective

    def forward(self, batch: Batch, teacher_states: Tensor) -> tuple[Tensor, Tensor]:
        """Loss summed over the batch's N target tokens, and the sums of (D_T, cross-entropy).

        `teacher_states` (N, d) are the teacher's at the same targets.
        """
        return common.distillation_loss(
            self.student.states(batch),
            self.student.head(),
            batch.targets,
            self.objective,
            teacher_states,
            self.teacher_head,
        )


def main(args: Arguments) -> None:
    objective = args.objective()
    accelerator = common.start("token_level", args)
    device = accelerator.device
    train, held_out = common.load_data(args)
    student, teacher = common.load_pair(args, device)
    common.check_same_vocabulary(student, teacher)
    prompts = common.encode_for_both(train, student, teacher, args.max_length)
    evaluation = common.encode_for_both(held_out, student, teacher, args.max_length)

    examples = common.make_examples(train, prompts, student, teacher, args, accelerator)
    evaluator = common.Evaluator(evaluation, student, teacher, args, accelerator)
    states = common.TeacherStates(teacher, examples, args, accelerator, "training text")
    run = common.Run("token_level", args, accelerator)
    before = run.before(evaluator, student)

    module = TokenLevelLoss(student, teacher.head(), objective)
    module, optimizer = accelerator.prepare(module, common.make_optimizer(module, args))
    steps = common.total_steps(args, len(examples))
    first = run.resume(steps)
    bar = common.progress(accelerator, "training", steps, first)
    student.model.train()
    for step in range(first, steps):
        common.reseed(args, step, accelerator)
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, steps, args)
        micro_batches, tokens = common.micro_batches(examples, args, step, accelerator)
        sums = 0.0
        for micro_batch in micro_batches:
            batch = common.collate([e.student for e in micro_batch], device)
            with common.reduce_gradients(accelerator, module, micro_batch is micro_batches[-1]):
                loss, parts = module(batch, states(micro_batch))
                # DDP averages over processes; the sum over them, per token, is what is wanted.
                accelerator.backward(loss * (accelerator.num_processes / tokens))
            sums += parts
            del loss  # its graph would lie between the arrays of the next one
        norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        kl, ce = accelerator.reduce(sums / tokens)
        run.log(
            step + 1,
            tokens,
            {
                "train/loss": args.temperature**2 * kl + args.ce_weight * ce,
                "train/kl": kl,
                "optim/lr": optimizer.param_groups[0]["lr"],
                "optim/grad_norm": norm,
            },
            [e.where for micro_batch in micro_batches for e in micro_batch],
        )
        bar.update()
        last = step + 1 == steps
        if last or (step + 1) % args.logging_steps == 0:
            common.show(bar, run.flush())
        if not last and args.eval_steps and (step + 1) % args.eval_steps == 0:
            run.flush()
            run.write_scores(step + 1, common.scores(evaluator(student)))
        run.save(step + 1)
    bar.close()

    after = evaluator(student, show=3)
    run.write_scores(steps, common.scores(after))
    run.finish(student, before, after, evaluator)


if __name__ == "__main__":
    common.launch(main, Arguments, __doc__)
