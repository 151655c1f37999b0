"""On-policy distillation: the student writes, and the teacher says what it would have written.

A student trained on its teacher's text meets only prefixes that the teacher wrote; in use it goes
on from its own, mistakes included (exposure bias). Here it learns on those. Each step flips a
coin: with probability --mix the student samples answers to the step's prompts and the teacher
gives its whole next-token distribution at each of their positions; else the step is one of
token_level.py, on text that the teacher wrote:

    loss = T² · Σ_i D( p_teacher(· | x_<i ; T) , p_student(· | x_<i ; T) ) / N  (+  w · CE)

over the N tokens of the answers, x the student's own or the teacher's. D is --kl, by default
KL(student ‖ teacher). No gradient flows through the sampling. --estimator sampled replaces D by
its estimate from the one token that was sampled.

Agarwal et al. 2024, "On-policy distillation of language models" (GKD, algorithm 1; --mix is its
λ); Gu et al. 2024, "MiniLLM" (reverse KL); Thinking Machines 2025, "On-policy distillation" (the
sampled estimate). Departures: the coin falls on a step's whole batch; MiniLLM's gradient through
the sampled sequence is left out, as in GKD; cross-entropy (--ce-weight) is for text of others, as
on samples of its own its expected gradient is zero.

    python on_policy.py
    python on_policy.py --mix 1 --student runs/token_level/final
    python on_policy.py --kl forward
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import common
import token_level
from common import Batch, Example, Head, LanguageModel, Objective, Prompt, UsageError, flag


@dataclass
class Arguments(token_level.Arguments):
    kl: Literal["forward", "reverse", "jsd"] = flag(
        "reverse", "forward: KL(teacher ‖ student); reverse: KL(student ‖ teacher); jsd: between"
    )
    mix: float = flag(
        0.5, "share of steps on the student's own text (0: token_level.py)", aliases=["--lmbda"]
    )
    mix_warmup_steps: int = flag(0, "steps over which that share rises from 0 to --mix")
    estimator: Literal["exact", "sampled"] = flag(
        "exact", "on own text: the whole divergence, or its estimate from the sampled token alone"
    )
    rollout_temperature: float = flag(1.0, "at which the student writes its text (0: greedy)")
    rollout_steps: int = flag(1, "on-policy steps whose text is sampled at once, ahead of them")

    def objective(self) -> Objective:
        objective = super().objective()
        if self.mix > 1:
            raise UsageError(f"--mix is a share of steps, so at most 1, not {self.mix}")
        if self.rollout_steps == 0:
            raise UsageError("--rollout-steps must be 1 or more")
        if self.ce_weight and not self.reads_others:
            raise UsageError("--ce-weight is for text of others, and --mix 1 has none")
        unused = {"estimator", "rollout_temperature", "rollout_steps", "mix_warmup_steps"}
        if self.mix == 0 and (given := sorted(unused & common.changed_flags(self).keys())):
            raise UsageError(
                f"--{given[0].replace('_', '-')} is for steps on own text, and --mix 0 has none"
            )
        if self.estimator == "sampled":
            self._check_sampled()
        return objective

    def _check_sampled(self) -> None:
        wanted = {"kl": "reverse", "skew": 0, "temperature": 1, "rollout_temperature": 1,
                  "rollout_steps": 1}  # fmt: skip
        for name, value in wanted.items():
            if getattr(self, name) != value:
                raise UsageError(
                    "--estimator sampled takes the sampled token for a draw from the student's "
                    f"present distribution in KL(student ‖ teacher): --{name.replace('_', '-')} "
                    f"must be {value}, not {getattr(self, name)}"
                )

    @property
    def reads_others(self) -> bool:
        """Whether some step learns from text that the student did not write."""
        return self.mix < 1 or self.mix_warmup_steps > 0

    def on_policy(self, step: int) -> bool:
        """The step's coin, a function of (seed, step)."""
        coin = torch.rand((), generator=common.generator_for(self.seed, "coin", step)).item()
        risen = min(1.0, step / self.mix_warmup_steps) if self.mix_warmup_steps else 1.0
        return coin < self.mix * risen


class OnPolicyLoss(nn.Module):
    """The student and its loss in one `forward`, which is what DDP and FSDP wrap."""

    def __init__(
        self, student: LanguageModel, teacher_head: Head, objective: Objective, estimator: str
    ) -> None:
        super().__init__()
        self.trained = student.model
        self.student, self.teacher_head, self.objective = student, teacher_head, objective
        self.estimator = estimator

    def forward(
        self, batch: Batch, teacher_states: Tensor, on_policy: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss summed over the batch's N target tokens, and sums (5,) to be logged.

        Those are of D_T and cross-entropy over all targets, and, on the student's own text, of
        the student's and the teacher's entropies over some targets, and the number of these.
        `teacher_states` (N, d) are the teacher's at the same targets.
        """
        states, head = self.student.states(batch), self.student.head()
        if on_policy and self.estimator == "sampled":
            loss, sums = self._sampled(states, head, batch.targets, teacher_states)
        else:
            objective = self.objective
            loss, sums = common.distillation_loss(
                states,
                head,
                batch.targets,
                objective._replace(ce_weight=0.0) if on_policy else objective,
                teacher_states,
                self.teacher_head,
            )
        seen = sums.new_zeros(3)
        if on_policy:
            seen = entropies(states.detach(), head, teacher_states, self.teacher_head).to(sums)
        return loss, torch.cat([sums, seen])

    def _sampled(
        self, states: Tensor, head: Head, targets: Tensor, teacher_states: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Policy gradient of the reverse KL, of which each token's log-ratio is an estimate.

        −[log teacher(y) − log student(y)] · log student(y) with the bracket held constant: over y
        from the student its expected gradient is that of KL(student ‖ teacher) at the position.
        Differentiating the log-ratio instead would give an expected gradient of zero.
        """
        ours = common.token_logprobs(states, head, targets)
        with torch.no_grad():
            theirs = common.token_logprobs(teacher_states, self.teacher_head, targets)
        ratio = ours.detach() - theirs
        return (ratio * ours).sum(), torch.stack([ratio.sum(), ratio.new_zeros(())])


@torch.no_grad()
def entropies(states: Tensor, head: Head, teacher_states: Tensor, teacher: Head) -> Tensor:
    """Sums of the student's and the teacher's entropy in nats, and their number of tokens: (3,).

    Over tokens evenly spread and at most as many as a chunk of the loss has, so that the cost
    does not grow with the batch.
    """
    every = -(-len(states) // common.chunk_rows(len(head.weight), states.device)) or 1
    sums = []
    for chosen, output in ((states[::every], head), (teacher_states[::every], teacher)):
        logprobs = common.log_softmax_with_temperature(output.logits(chosen))
        sums.append(-(logprobs.exp() * logprobs).sum())
    return torch.stack([*sums, sums[0].new_tensor(len(states[::every]))])


class Rollouts:
    """The student's own answers to the prompts of on-policy steps, as token ids.

    Those of the next --rollout-steps such steps are sampled together, in large batches, by the
    student of the first of them. Each token is a function of that student and of (seed, step,
    row, position), so text depends neither on batches nor on the number of processes. What waits
    to be learned from is part of a checkpoint.
    """

    def __init__(
        self,
        student: LanguageModel,
        prompts: list[Prompt],
        args: Arguments,
        steps: int,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.prompts, self.args, self.steps = student, prompts, args, steps
        self.accelerator = accelerator
        # Step: that at which its text was sampled, and the answers in the order of its batch.
        self.waiting: dict[int, tuple[int, list[common.Response]]] = {}
        accelerator.register_save_state_pre_hook(lambda models, weights, path: self.save(path))
        accelerator.register_load_state_pre_hook(lambda models, path: self.load(path))

    def __call__(self, step: int) -> tuple[list[Example], dict[str, float]]:
        """The global batch of an on-policy step, and what is to be said of it."""
        if step not in self.waiting:
            self._sample(step)
        sampled_at, responses = self.waiting.pop(step)
        prompts = common.global_batch(self.prompts, self.args, step)
        ids = [r.ids for r in responses]
        return common.id_examples(prompts, ids, self.args.max_length), {
            "rollout/response_tokens": sum(len(r.ids) for r in responses) / len(responses),
            "rollout/cut_off": sum(not r.finished for r in responses) / len(responses),
            "rollout/staleness": step - sampled_at,
        }

    def _sample(self, step: int) -> None:
        args, accelerator = self.args, self.accelerator
        coming = (s for s in range(step, self.steps) if args.on_policy(s))
        rows = [
            (s, row, prompt.student)
            for s in itertools.islice(coming, args.rollout_steps)
            for row, prompt in enumerate(common.global_batch(self.prompts, args, s))
        ]
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        written = common.generate(
            self.student, [ids for *_, ids in mine],
            [common.row_seed(args.seed, "rollout", s, row) for s, row, _ in mine],
            max_new_tokens=args.max_new_tokens, temperature=args.rollout_temperature,
            batch_size=args.generation_batch_size,
        )  # fmt: skip
        found = dict(gather_object([(mine[place][:2], response) for place, response in written]))
        for s, row, _ in rows:
            self.waiting.setdefault(s, (step, []))[1].append(found[s, row])

    def save(self, directory: str) -> None:
        """Tensors only, so that loading runs no code."""
        if self.accelerator.is_main_process:
            rows = [
                (step, sampled_at, r.finished, len(r.ids))
                for step, (sampled_at, responses) in self.waiting.items()
                for r in responses
            ]
            ids = [i for _, responses in self.waiting.values() for r in responses for i in r.ids]
            kept = {"rows": rows, "ids": ids}
            tensors = {name: torch.tensor(v, dtype=torch.long) for name, v in kept.items()}
            save_file(tensors, Path(directory) / "rollouts.safetensors")

    def load(self, directory: str) -> None:
        tensors = load_file(Path(directory) / "rollouts.safetensors")
        self.waiting, ids = {}, iter(tensors["ids"].tolist())
        for step, sampled_at, finished, length in tensors["rows"].view(-1, 4).tolist():
            response = common.Response(list(itertools.islice(ids, length)), bool(finished))
            self.waiting.setdefault(step, (sampled_at, []))[1].append(response)


class Health:
    """Shows what the student writes, and warns where learning from it goes astray.

    Answers much longer than the teacher's, and a student far surer of its text than its teacher
    is, are how pure on-policy training from a weak student is seen to collapse.
    """

    def __init__(self, student: LanguageModel, teacher_length: float, args: Arguments) -> None:
        self.student, self.teacher_length, self.args = student, teacher_length, args
        self.lengths: list[float] = []
        self.entropies: list[Tensor] = []  # (2,) student's and teacher's
        self.shown = -1
        self.warned: set[str] = set()

    def note(self, length: float, own: Tensor, teachers: Tensor, tokens: Tensor) -> dict[str, Any]:
        """Take up a step's mean length and its sums of entropy; the means, which may be logged."""
        mean = torch.stack([own, teachers]) / tokens.clamp_min(1e-9)
        self.lengths.append(length)
        self.entropies.append(mean)
        return {"rollout/entropy": mean[0], "rollout/teacher_entropy": mean[1]}

    def samples(self, step: int, examples: list[Example]) -> Iterable[str]:
        """Two answers, every --eval-steps steps or so."""
        every = self.args.eval_steps or 200
        if self.shown < 0 or step // every > self.shown // every:
            self.shown = step
            yield f"step {step + 1}, the student writes:"
            for tokens in (e.student for e in examples[:2]):
                start = len(tokens.ids) - len(tokens.targets)
                parts = (tokens.ids[:start], tokens.ids[start:])
                yield "  {!r}\n    {!r}".format(*map(self.student.tokenizer.decode, parts))

    def warnings(self, step: int) -> Iterable[str]:
        """What is wrong since it was asked last, each thing once until it is right again."""
        if not self.lengths:
            return
        length = sum(self.lengths) / len(self.lengths)
        own, teachers = torch.stack(self.entropies).mean(0).tolist()
        self.lengths, self.entropies = [], []
        found = {}
        if length > 2 * self.teacher_length:
            found["length"] = (
                f"the student's answers have {length:.0f} tokens where the teacher's greedy "
                f"ones have {self.teacher_length:.0f}"
            )
        if own < 0.2 * teachers:
            found["entropy"] = (
                f"the student's entropy on its own text is {own:.3f} nats a token where the "
                f"teacher's is {teachers:.3f}"
            )
        for name in found.keys() - self.warned:
            yield (
                f"warning: step {step + 1}: {found[name]}; a lower --mix, --mix-warmup-steps or a "
                "student that was trained on the teacher's text first may help"
            )
        self.warned = set(found)


class Evaluator(common.Evaluator):
    """Scores on the student's own text beside those of `common.Evaluator`.

    On answers that it samples at T = 1 to the same prompts: `kl_on_own_text`, KL(teacher ‖
    student) in nats per token, and `exposure_bias`, the ratio of that to `kl_to_teacher`, the
    same on the teacher's text: above 1 where the student follows its teacher less well after
    words of its own.
    """

    def __init__(
        self,
        prompts: list[Prompt],
        student: LanguageModel,
        teacher: LanguageModel,
        args: Arguments,
        accelerator: Accelerator,
    ) -> None:
        super().__init__(prompts, student, teacher, args, accelerator)
        self.asked = {i: prompts[i] for i in self.prompts}  # this process's share
        self.teacher = teacher

    def __call__(self, student: LanguageModel, show: int = 0) -> list[common.Row]:
        rows = super().__call__(student, show)
        own = self._gathered(self._own_text(student))
        return [row | more for row, more in zip(rows, own, strict=True)]

    @torch.no_grad()
    def _own_text(self, student: LanguageModel) -> dict[int, common.Row]:
        args, prompts = self.args, list(self.asked.values())
        written = common.generate(
            student, [p.student for p in prompts],
            [common.row_seed(args.seed, "own text", i) for i in self.asked],
            max_new_tokens=args.max_new_tokens, temperature=1.0,
            batch_size=args.generation_batch_size,
        )  # fmt: skip
        ids = [response.ids for _, response in sorted(written)]
        examples = common.id_examples(prompts, ids, args.max_length)
        rows = {}
        training = student.model.training
        student.model.eval()
        for batch in common.length_batches(dict(zip(self.asked, examples, strict=True))):
            ours = common.collate([e.student for _, e in batch], student.device)
            theirs = common.collate([e.teacher for _, e in batch], self.teacher.device)
            compared = common.compare(
                student.states(ours), student.head(),
                self.teacher.states(theirs), self.teacher.head(), ours.targets,
            )  # fmt: skip
            parts = compared.kl.float().cpu().split([len(e.student.targets) for _, e in batch])
            for (i, _), part in zip(batch, parts, strict=True):
                rows[i] = {"own_kl": part.sum().item(), "own_tokens": len(part)}
        student.model.train(training)
        return rows


def main(args: Arguments) -> None:
    objective = args.objective()
    accelerator = common.start("on_policy", args)
    device = accelerator.device
    train, held_out = common.load_data(args)
    student, teacher = common.load_pair(args, device)
    common.check_same_vocabulary(student, teacher)
    prompts = common.encode_for_both(train, student, teacher, args.max_length)
    evaluation = common.encode_for_both(held_out, student, teacher, args.max_length)

    examples: list[Example] = []
    if args.reads_others:
        examples = common.make_examples(train, prompts, student, teacher, args, accelerator)
    evaluator = Evaluator(evaluation, student, teacher, args, accelerator)
    if args.reads_others:
        states = common.TeacherStates(teacher, examples, args, accelerator, "training text")
    run = common.Run("on_policy", args, accelerator)
    before = run.before(evaluator, student)

    module = OnPolicyLoss(student, teacher.head(), objective, args.estimator)
    module, optimizer = accelerator.prepare(module, common.make_optimizer(module, args))
    steps = common.total_steps(args, len(examples or prompts))
    rollouts = Rollouts(student, prompts, args, steps, accelerator)
    teacher_length = common.scores(evaluator.teacher_rows)["response_tokens"]
    health = Health(student, teacher_length, args)
    first = run.resume(steps)
    bar = common.progress(accelerator, "training", steps, first)
    student.model.train()
    for step in range(first, steps):
        common.reseed(args, step, accelerator)
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, steps, args)
        on_policy, about = args.on_policy(step), {}
        if on_policy:
            chosen, about = rollouts(step)
            for line in health.samples(step, chosen):
                accelerator.print(line)
        else:
            chosen = common.global_batch(examples, args, step)
        micro_batches, tokens = common.share_out(chosen, args, accelerator)
        tokens = max(tokens, 1)  # a student may answer nothing at all
        sums = 0.0
        for micro_batch in micro_batches:
            batch = common.collate([e.student for e in micro_batch], device)
            if on_policy:
                theirs = common.collate([e.teacher for e in micro_batch], device)
                teacher_states = common.teacher_states(teacher, theirs)
            else:
                teacher_states = states(micro_batch)
            with common.reduce_gradients(accelerator, module, micro_batch is micro_batches[-1]):
                loss, parts = module(batch, teacher_states, on_policy)
                # DDP averages over processes; the sum over them, per token, is what is wanted.
                accelerator.backward(loss * (accelerator.num_processes / tokens))
            sums += parts
            del loss  # its graph would lie between the arrays of the next one
        norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        kl, ce, *seen = accelerator.reduce(sums / tokens)
        if on_policy:
            about |= health.note(about["rollout/response_tokens"], *seen)
        run.log(
            step + 1,
            tokens,
            {
                "train/loss": args.temperature**2 * kl + args.ce_weight * ce,
                "train/kl": kl,
                f"train/kl_on_{'own' if on_policy else 'teacher'}_text": kl,
                "optim/lr": optimizer.param_groups[0]["lr"],
                "optim/grad_norm": norm,
                **about,
            },
            [e.where for micro_batch in micro_batches for e in micro_batch],
        )
        bar.update()
        last = step + 1 == steps
        if last or (step + 1) % args.logging_steps == 0:
            common.show(bar, run.flush())
            for line in health.warnings(step):
                accelerator.print(line)
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
