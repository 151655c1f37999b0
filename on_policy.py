"""On-policy distillation: the student writes, and the teacher says what it would have written.

A student trained on its teacher's text sees only prefixes that the teacher wrote; in use it
continues its own, mistakes included (exposure bias). Here it learns on those. Each step flips a
coin: with probability --mix the student samples answers to the step's prompts, and the teacher
gives its next-token distribution at each of their positions; otherwise the step is one of
token_level.py, on text that the teacher wrote:

    loss = T² · Σ_i D( p_teacher(· | x_<i ; T) , p_student(· | x_<i ; T) ) / N  (+  w · CE)

over the N tokens of the answers x, the student's or the teacher's. D is --kl, by default
KL(student ‖ teacher). No gradient flows through the sampling. --estimator sampled replaces D by
its estimate from the one token that was sampled.

Agarwal et al. 2024, "On-policy distillation of language models" (GKD, algorithm 1; --mix is its
λ); Gu et al. 2024, "MiniLLM" (reverse KL); Thinking Machines 2025, "On-policy distillation" (the
sampled estimate). Departures: MiniLLM's gradient through the sampled sequence is left out, as in
GKD; cross-entropy (--ce-weight) applies to the teacher's text only, because on the student's own
samples its expected gradient is zero.

    python on_policy.py
    python on_policy.py --mix 1 --student runs/token_level/final --learning-rate 5e-4
    python on_policy.py --kl forward --mix 1      # better from a weak student, or with few prompts
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

import common
import token_level
from common import Batch, Completion, Example, Head, LanguageModel, Logits, Objective, flag

# kl_to_teacher above which a student is called weak: at 0.66 nats reverse KL cost 2 to 6 points of
# exact match against forward KL with --mix 1 (tests/bench/README.md).
WEAK = 0.5


@dataclass
class Arguments(token_level.Arguments):
    kl: Literal["forward", "reverse", "jsd"] = flag(
        "reverse",
        "forward: KL(teacher ‖ student), better with --mix 1 from a weak student or with few "
        "prompts; reverse: KL(student ‖ teacher); jsd: between",
    )
    mix: float = flag(
        0.5, "share of steps on the student's own text (0: token_level.py)", aliases=["--lmbda"]
    )
    mix_warmup_steps: int = flag(0, "steps over which that share rises from 0 to --mix")
    estimator: Literal["exact", "sampled"] = flag(
        "exact", "on own text: the whole divergence, or its estimate from the sampled token alone"
    )
    rollout_temperature: float = flag(1.0, "temperature of the student's text (0: greedy)")
    rollout_steps: int = flag(1, "on-policy steps whose text is sampled together in advance")
    rollout_url: str | None = flag(None, "a vLLM server of the student, to write its text")
    rollout_weights: str | None = flag(None, "an empty directory, from which it loads the weights")

    def objective(self) -> Objective:
        """The divergence and its weights; `UsageError` for flags that contradict each other."""
        objective = super().objective()
        if self.mix > 1:
            raise common.UsageError(f"--mix is a share of steps, so at most 1, not {self.mix}")
        if self.rollout_steps == 0:
            raise common.UsageError("--rollout-steps must be 1 or more")
        if bool(self.rollout_url) != bool(self.rollout_weights):
            raise common.UsageError("--rollout-url and --rollout-weights need each other")
        own = {"estimator", "mix_warmup_steps", *(f for f in vars(self) if "rollout" in f)}
        teachers = {"sampling_temperature", "top_p", "completions", "ce_weight"}
        for absent, names, text in (
            (self.mix == 0, own, "steps on own text"),
            (not self.reads_teacher_text, teachers, "the teacher's text"),
        ):
            for name in sorted(names & common.changed_flags(self).keys()) if absent else ():
                shown = common.as_flag(name)
                raise common.UsageError(f"{shown} is for {text}, and --mix {self.mix:g} has none")
        required = {"kl": "reverse", "skew": 0, "temperature": 1, "rollout_temperature": 1}
        for name, value in (required | {"rollout_steps": 1}).items():
            if self.estimator == "sampled" and getattr(self, name) != value:
                raise common.UsageError(
                    "--estimator sampled needs draws from the student's present distribution: "
                    f"{common.as_flag(name)} must be {value}, not {getattr(self, name)}"
                )
        return objective

    @property
    def reads_teacher_text(self) -> bool:
        """Whether some step learns from text that the student did not write."""
        return self.mix < 1 or self.mix_warmup_steps > 0

    def on_policy(self, step: int) -> bool:
        """The step's coin, a function of (seed, step)."""
        coin = torch.rand((), generator=common.generator_for(self.seed, "coin", step)).item()
        risen = min(1.0, step / self.mix_warmup_steps) if self.mix_warmup_steps else 1.0
        return coin < self.mix * risen


class OnPolicyLoss(nn.Module):
    """The student and its loss. What is registered here is trained, synchronised and saved."""

    def __init__(
        self, student: LanguageModel, head: Head | None, objective: Objective, estimator: str
    ) -> None:
        super().__init__()
        self.trained = student.model  # registers its parameters
        self.student, self.teacher_head = student, head
        self.objective, self.estimator = objective, estimator

    def forward(
        self, batch: Batch, teacher_hidden: Tensor, on_policy: bool
    ) -> tuple[Tensor, Tensor]:
        """Loss summed over the batch's N targets, and sums (5,) to be logged.

        Those are of loss and divergence, and, on the student's own text, of the student's and the
        teacher's entropies over some targets, and the number of these. `teacher_hidden` (N, d) are
        the teacher's hidden states at the same targets.
        """
        student = self.student.logits(batch)
        teacher = common.teacher_logits(teacher_hidden, self.teacher_head)
        if on_policy and self.estimator == "sampled":
            loss, sums = sampled_loss(student, batch.targets, teacher)
        else:
            objective = self.objective._replace(ce_weight=0.0) if on_policy else self.objective
            loss, sums = common.distillation_loss(student, batch.targets, objective, teacher)
        more = entropies(student, teacher).to(sums) if on_policy else sums.new_zeros(3)
        return loss, torch.cat([sums, more])


def sampled_loss(
    student: Logits, targets: Tensor, teacher: Logits | common.TopLogprobs
) -> tuple[Tensor, Tensor]:
    """KL(student ‖ teacher), estimated at each target y by log student(y) − log teacher(y).

    Its gradient is that of −[log teacher(y) − log student(y)] · log student(y) with the bracket
    held constant: in expectation over y from the student, the gradient of the KL at that position.
    Differentiating the log-ratio itself would give an expected gradient of zero.
    """
    named = teacher.logprobs[:, :1] if isinstance(teacher, common.TopLogprobs) else None
    pieces = [(r, r, (targets[r], None if named is None else named[r])) for r in student.chunks()]
    logits = teacher if named is None else None
    return common.chunked_loss(student, logits, pieces, _sampled)


def _sampled(
    logits: Tensor, teacher_logits: Tensor | None, inputs: tuple[Tensor, Tensor | None]
) -> tuple[Tensor, Tensor]:
    target, theirs = inputs[0][:, None], inputs[1]  # (n, 1), a server's (n, 1)
    logprobs = common.log_softmax_with_temperature(logits)
    if teacher_logits is not None:
        theirs = common.log_softmax_with_temperature(teacher_logits).gather(1, target)
    ratio = logprobs.gather(1, target) - theirs  # (n, 1)
    gradient = (logprobs.exp() * -ratio).scatter_add(1, target, ratio)
    return ratio.sum().expand(2), gradient


@torch.no_grad()
def entropies(student: Logits, teacher: Logits | common.TopLogprobs) -> Tensor:
    """Sums of the student's and the teacher's entropy in nats, and their number of tokens: (3,).

    They are taken over evenly spread tokens, at most one chunk of the loss, so that the cost does
    not grow with the batch. A server's outcomes give a lower bound of the teacher's.
    """
    chosen, sums = slice(None, None, max(1, len(student.chunks()))), []
    for model in (student.cast(), teacher.cast()):
        values = model.logprobs if isinstance(model, common.TopLogprobs) else model
        logprobs = common.log_softmax_with_temperature(values[chosen])
        sums.append(-(logprobs.exp() * logprobs).sum())
    return torch.stack([*sums, sums[0].new_full((), len(student.hidden[chosen]))])


class Rollouts:
    """The student's own answers to the prompts of on-policy steps, as token ids.

    At the first of --rollout-steps such steps the student samples the text of all. If there are
    several, a server writes the next texts during training. Each token is a function of that
    student and of (seed, step, row, position), so text depends on batches and processes through
    rounding only. Text that waits is part of a checkpoint.
    """

    def __init__(self, pair: common.Pair, prompts: list[common.Prompt], run: common.Run) -> None:
        self.pair, self.prompts, self.run, self.args = pair, prompts, run, run.args
        self.server = common.RolloutServer(run.args, pair.student) if run.args.rollout_url else None
        # Maps a step to the step at which its text was sampled and the answers in batch order.
        self.waiting: dict[int, tuple[int, list[Completion]]] = {}
        # Text being written: its sampling step, its places, a function that waits for it.
        self.coming: tuple[int, list[Any], Callable[[], list[Any]]] | None = None
        run.accelerator.register_save_state_pre_hook(lambda models, weights, path: self.save(path))
        run.accelerator.register_load_state_pre_hook(lambda models, path: self.load(path))

    def __call__(self, step: int) -> tuple[list[Example], dict[str, float]]:
        """The global batch of an on-policy step, and numbers to be logged."""
        self.waiting = {s: text for s, text in self.waiting.items() if s >= step}
        if not self.waiting:
            self._begin(step, step)
            self._finish()
        if self.server and len(self.waiting) <= self.args.rollout_steps > 1:
            self._begin(step, max(self.waiting) + 1)
        sampled_at, answers = self.waiting[step]
        prompts = common.global_batch(self.prompts, self.args, step)
        return common.completion_examples(prompts, answers, self.pair, self.args.max_length), {
            "rollout/response_tokens": sum(a.length for a in answers) / len(answers),
            "rollout/cut_off": sum(not a.finished for a in answers) / len(answers),
            "rollout/staleness": step - sampled_at,
        }

    def _begin(self, now: int, first: int) -> None:
        """Have the present student write for the next on-policy steps, from `first` on."""
        args, student, temperature = self.args, self.pair.student, self.args.rollout_temperature
        coming = (s for s in range(first, self.run.steps) if args.on_policy(s))
        places = [
            ((s, row), prompt)
            for s in itertools.islice(coming, args.rollout_steps)
            for row, prompt in enumerate(common.global_batch(self.prompts, args, s))
        ]
        if self.coming or not places:
            return
        mine = common.my_share(places)
        keys, prompts = [key for key, _ in mine], [prompt.student for _, prompt in mine]
        with student.evaluating():
            if self.server:
                self.server.publish(prompts[:8])
                # A pool's thread does not keep the process from ending.
                wait = ThreadPool(1).apply_async(self.server.write, (mine, temperature)).get
            else:
                seeds = [common.row_seed(args.seed, "rollout", *key) for key in keys]
                written = sorted(common.generate(student, prompts, seeds, args, temperature))
                wait = lambda: [answer for _, answer in written]  # noqa: E731
        self.coming = now, places, lambda: [*zip(keys, wait(), strict=True)]

    def _finish(self) -> None:
        """Wait for what is being written."""
        (now, places, wait), self.coming = self.coming, None
        answers = dict(gather_object(common.in_step(wait)))
        for (s, row), _ in places:
            self.waiting.setdefault(s, (now, []))[1].append(answers[s, row])

    def save(self, directory: str) -> None:
        """Write what waits as tensors, so that loading runs no code."""
        if self.coming:
            with contextlib.suppress(common.ServerLost):  # then it is asked again
                self._finish()
        if self.run.accelerator.is_main_process:
            answers = [(s, at, a) for s, (at, group) in self.waiting.items() for a in group]
            rows = [(s, at, a.finished, a.length) for s, at, a in answers]
            values = {"rows": rows, "ids": [i for *_, a in answers for i in a.ids]}
            tensors = {name: torch.tensor(v, dtype=torch.long) for name, v in values.items()}
            common.save_tensors(Path(directory) / "rollouts.safetensors", **tensors)

    def load(self, directory: str) -> None:
        tensors = common.read_tensors(Path(directory) / "rollouts.safetensors")
        self.waiting, ids = {}, iter(tensors["ids"].tolist())
        for step, sampled_at, finished, length in tensors["rows"].view(-1, 4).tolist():
            answer = Completion("", bool(finished), length, list(itertools.islice(ids, length)))
            self.waiting.setdefault(step, (sampled_at, []))[1].append(answer)


class RolloutMonitor:
    """Shows what the student writes, and warns when learning from it goes wrong.

    Pure on-policy training from a weak student collapses visibly: answers become much longer than
    the teacher's, and the student far surer of its text than its teacher is.
    """

    def __init__(self, student: LanguageModel, teacher_length: float, args: Arguments) -> None:
        self.student, self.teacher_length, self.args = student, teacher_length, args
        self.measured: list[Tensor] = []  # length, student's and teacher's entropy since logging
        self.shown = -1  # the last step whose text was printed
        self.warned: set[str] = set()

    def note(self, length: float, entropy: Sequence[Tensor]) -> dict[str, Any]:
        """Record length and sums of entropy (student, teacher, tokens); the means for the log."""
        student, teacher = (total / entropy[2].clamp_min(1e-9) for total in entropy[:2])
        self.measured.append(torch.stack([torch.full_like(student, length), student, teacher]))
        return {"rollout/entropy": student, "rollout/teacher_entropy": teacher}

    def samples(self, step: int, examples: list[Example]) -> Iterable[str]:
        """Two answers, about every --eval-steps steps."""
        every = self.args.eval_steps or 200
        if self.shown < 0 or step // every > self.shown // every:
            self.shown = step
            yield f"step {step + 1}, the student writes:"
            for prompt, tokens in ((e.prompt.student, e.student) for e in examples[:2]):
                parts = prompt, tokens.ids[len(prompt) :]
                yield "  {!r}\n    {!r}".format(*map(self.student.tokenizer.decode, parts))

    def warnings(self, step: int) -> Iterable[str]:
        """What is wrong, at logging steps; each warning once until its cause is gone."""
        if not self.measured or (step + 1) % self.args.logging_steps:
            return
        length, student, teacher = torch.stack(self.measured).mean(0).tolist()
        self.measured, problems, usual = [], {}, self.teacher_length
        if length > 2 * usual:
            problems["length"] = f"answers have {length:.0f} tokens, the teacher's {usual:.0f}"
        if student < 0.2 * teacher:
            problems["entropy"] = f"entropy is {student:.3f} nats, the teacher's {teacher:.3f}"
        advice = "a lower --mix, or first training on the teacher's text, may help"
        for name in problems.keys() - self.warned:
            yield f"warning: step {step + 1}: the student's {problems[name]}; {advice}"
        self.warned = set(problems)


class Evaluator(common.Evaluator):
    """Scores on the student's own text beside those of `common.Evaluator`.

    On answers that it samples at T = 1 to the same prompts: `kl_on_own_text`, KL(teacher ‖ student)
    in nats per token, and `exposure_bias`, its ratio to `kl_to_teacher` (above 1: worse).
    """

    def __init__(self, prompts: list[common.Prompt], pair: common.Pair, args: Arguments) -> None:
        super().__init__(prompts, pair, args)
        self.pair = pair

    def __call__(self) -> list[common.Tally]:
        with self.student.evaluating():
            tallies, own = super().__call__(), common.gathered(self._own_text())
        return [tally | more for tally, more in zip(tallies, own, strict=True)]

    def _own_text(self) -> dict[int, common.Tally]:
        args, student, teacher = self.args, self.student, self.pair.teacher
        prompts = [e.prompt for e in self.examples]
        seeds = [common.row_seed(args.seed, "own text", e.index) for e in self.examples]
        written = common.generate(student, [p.student for p in prompts], seeds, args, 1.0)
        answers = [answer for _, answer in sorted(written)]
        examples = common.completion_examples(prompts, answers, self.pair, args.max_length)
        tallies = {}
        batches = common.length_batches(examples, lambda e: len(e.teacher.ids))
        most = max(gather_object([len(batches)]))  # a sharded teacher needs all processes
        for batch in batches + [[]] * (most - len(batches)):
            inputs = common.collate([e.student for e in batch], student.device)
            hidden = common.teacher_hidden_states(teacher, batch)
            theirs = common.teacher_logits(hidden, teacher.head())
            values = common.compare(student.logits(inputs), inputs.targets, theirs)
            parts = values["kl"].float().cpu().split([len(e.student.targets) for e in batch])
            for e, part in zip(batch, parts, strict=True):
                tally = {"own_kl": part.sum().item(), "own_tokens": len(part)}
                tallies[self.examples[e.index].index] = tally
        return tallies


def main(args: Arguments) -> None:
    objective = args.objective()
    accelerator = common.start("on_policy", args)
    train, held_out = common.load_data(args)
    student, teacher = pair = common.load_pair(args, accelerator.device)
    pair.check_same_vocabulary()
    prompts = common.tokenize_prompts(train, pair, args.max_length)
    evaluation = common.tokenize_prompts(held_out, pair, args.max_length)

    examples = common.make_examples(prompts, pair, args) if args.reads_teacher_text else []
    evaluator = Evaluator(evaluation, pair, args)
    teacher_hidden = common.TeacherHiddenStates(teacher, examples, "training text")
    top = 0 if args.estimator == "sampled" else None  # K of a server, on the student's text
    run = common.Run("on_policy", args, accelerator, evaluator, examples or prompts)
    nats = common.scores(run.state["before"])["kl_to_teacher"]
    if args.kl == "reverse" and args.estimator == "exact" and nats > WEAK:
        accelerator.print(
            f"the student is weak (kl_to_teacher {nats:.2f} nats): from such a start the student "
            "of --kl forward --mix 1 was better in the README's runs"
        )

    if pair.has_weights and args.mix:
        _ = teacher.model  # loaded before FSDP shards it, even if the cache held all until now
    module = OnPolicyLoss(student, teacher.head(), objective, args.estimator)
    module, optimizer = common.prepare(accelerator, module, args, teacher)
    steps = common.total_steps(args, len(examples or prompts))
    rollouts = Rollouts(pair, prompts, run)
    teacher_length = common.scores(evaluator.teacher_tallies)["response_tokens"]
    monitor = RolloutMonitor(student, teacher_length, args)
    for step in range(run.resume(steps), steps):
        run.begin(step, optimizer)
        if on_policy := args.on_policy(step):
            batch, extra = rollouts(step)
            for line in monitor.samples(step, batch):
                accelerator.print(line)
        else:
            batch, extra = common.global_batch(examples, args, step), {}
        micro_batches, tokens = common.split_micro_batches(batch, args)
        sums = 0.0
        for micro_batch in micro_batches:
            inputs = common.collate([e.student for e in micro_batch], accelerator.device)
            with common.reduce_gradients(accelerator, module, micro_batch is micro_batches[-1]):
                loss, parts = module(inputs, teacher_hidden(micro_batch, on_policy, top), on_policy)
                # Gradients are averaged over processes: times their number gives the sum.
                accelerator.backward(loss * (accelerator.num_processes / tokens))
            sums += parts
            del loss  # frees the graph before the next one is made
        norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        mean_loss, kl, *entropy = accelerator.reduce(sums / tokens, "sum")
        if on_policy:
            extra |= monitor.note(extra["rollout/response_tokens"], entropy)
        lr = optimizer.param_groups[0]["lr"]
        numbers = {"train/loss": mean_loss, "train/kl": kl, "optim/lr": lr, "optim/grad_norm": norm}
        numbers[f"train/kl_on_{'own' if on_policy else 'teacher'}_text"] = kl
        run.log(step + 1, tokens, numbers | extra, micro_batches)
        for line in monitor.warnings(step):
            accelerator.print(line)
        run.evaluate(step + 1)
        run.save(step + 1)
    run.finish()


if __name__ == "__main__":
    common.launch(main, Arguments, __doc__)
