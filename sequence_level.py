"""Sequence-level distillation: the student is fine-tuned on text that the teacher wrote.

The teacher answers every prompt, and the student learns to write the same, token by token:

    loss = −Σ_i log p_student(y_i | y_<i, prompt) / N,    y the teacher's answer

over the N target tokens of a batch: ordinary cross-entropy, in which the teacher's distribution
over sequences is replaced by its most likely answer (--sampling-temperature 0) or by samples from
it. The student sees only the teacher's text, so any teacher that can generate text works, also one
behind an API (--api-base-url), and the student may have any tokenizer.

Kim & Rush 2016, "Sequence-level knowledge distillation" (section 3.2; they search with a beam, here
the answer is greedy or sampled); DeepSeek-AI 2025, "DeepSeek-R1" (section 2.4: samples of a
reasoning teacher, selected by whether the answer is right, and plain fine-tuning on them). The
student does not learn from answers that the length limit cut, empty ones and repetitions.

    python sequence_level.py
    python sequence_level.py --samples-per-prompt 4 --temperature 1 --keep-matching --max-steps 600
    python sequence_level.py --student data/student_other_tokenizer
    OPENAI_API_KEY=... python sequence_level.py --api-base-url https://HOST/v1 --api-model NAME
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from torch import Tensor, nn

import common
from common import Batch, CommonArguments, Completion, Example, LanguageModel, UsageError, flag

OBJECTIVE = common.Objective(ce_weight=1.0)
KEY = "OPENAI_API_KEY"
ATTEMPTS = 10  # for one answer

# Retry settings change nothing that the student learns from.
common.FLAGS_FREE_ON_RESUME.update({"api_concurrency", "api_timeout"})


@dataclass
class Arguments(CommonArguments):
    temperature: ClassVar[float] = 1.0  # there is no softmax to soften: see the next flag's alias
    sampling_temperature: float = flag(
        0.0, "temperature of the teacher's text (0: greedy)", aliases=["--temperature"]
    )
    samples_per_prompt: int = flag(1, "answers sampled for each prompt; repetitions are dropped")
    keep_matching: bool = flag(
        False,
        "learn only from answers that equal a reference of their row, word by word (of reasoning "
        "text, what follows </think>)",
    )
    api_base_url: str | None = flag(
        None,
        "the teacher is a model behind this OpenAI-compatible server (https://HOST/v1); its key is "
        f"read from the environment, {KEY}",
    )
    api_model: str | None = flag(None, "the teacher's name on that server")
    api_concurrency: int = flag(8, "requests under way at a time")
    api_timeout: float = flag(
        600.0, "seconds for one answer, with its retries, before it is asked again"
    )

    def check(self) -> None:
        """Refuse flags that contradict each other, before anything is loaded."""
        changed = common.changed_flags(self)
        if self.samples_per_prompt < 1 or self.api_concurrency < 1 or self.api_timeout <= 0:
            raise UsageError(
                "--samples-per-prompt, --api-concurrency and --api-timeout must be above 0"
            )
        if self.samples_per_prompt > 1 and self.sampling_temperature == 0:
            raise UsageError(
                f"--samples-per-prompt {self.samples_per_prompt} at --sampling-temperature 0 would "
                "be one answer many times: give a temperature above 0"
            )
        selecting = changed.keys() & {"samples_per_prompt", "keep_matching"}
        if selecting and self.completions == "dataset":
            raise UsageError(
                "--samples-per-prompt and --keep-matching select from the teacher's text, and "
                "--completions dataset trains on the data set's own"
            )
        if self.api_base_url is None:
            for name in changed.keys() & {"api_model", "api_concurrency", "api_timeout"}:
                raise UsageError(f"{common.as_flag(name)} needs --api-base-url")
        else:
            self._check_api(changed)

    def _check_api(self, changed: dict[str, Any]) -> None:
        local = {"teacher", "teacher_revision", "teacher_dtype", "cache_teacher"}
        for name in changed.keys() & local:
            raise UsageError(
                f"{common.as_flag(name)} is for a teacher that is loaded here, and --api-base-url "
                "names one that is not: choose one"
            )
        if self.api_model is None:
            raise UsageError("--api-base-url needs --api-model, the teacher's name on that server")
        if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", self.api_base_url):
            raise UsageError(
                "--api-base-url must look like https://HOST/v1, without user name, password or "
                f"parameters: a key belongs in the environment, {KEY}"
            )
        if not importlib.util.find_spec("openai"):
            raise UsageError('--api-base-url needs the openai client: pip install -e ".[api]"')


class SequenceLevelLoss(nn.Module):
    """The student and its loss in one `forward`, through which DDP synchronises gradients."""

    def __init__(self, student: LanguageModel) -> None:
        super().__init__()
        self.trained, self.student = student.model, student

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cross-entropy summed over the batch's N targets, differentiable and detached."""
        logits = self.student.logits(batch)
        loss, sums = common.distillation_loss(logits, batch.targets, OBJECTIVE)
        return loss, sums[0]


# ------------------------------------------------------------------------------ text to learn from


def training_text(
    train: list[common.Conversation],
    prompts: list[common.Prompt],
    pair: common.Pair,
    args: Arguments,
) -> tuple[list[Example], dict[str, int]]:
    """What --completions names: the teacher's text, of which some is selected, or the data set's.

    Also how many answers were written, kept, and dropped for each reason.
    """
    if args.completions == "dataset":
        return common.make_examples(prompts, common.Pair(pair.student, None), args), {}
    if args.keep_matching and (bare := next((c for c in train if not c.references), None)):
        raise UsageError(f"{bare.source}: no reference that --keep-matching could compare with")
    asked = [p for p in prompts for _ in range(args.samples_per_prompt)]
    answers = pair.teacher.complete(
        asked, args, temperature=args.sampling_temperature, top_p=args.top_p,
        purpose="training text",
    )  # fmt: skip
    examples = common.completion_examples(asked, answers, pair, sys.maxsize, learn_tag=True)
    return select(examples, answers, args)


def select(
    examples: list[Example], answers: list[Completion], args: Arguments
) -> tuple[list[Example], dict[str, int]]:
    """The examples that are fit to learn from, and counts of those that are not, by reason.

    Raises `UsageError` if none is left.
    """
    kept: list[Example] = []
    counts = Counter(written=len(answers), kept=0, cut_short=0, too_long=0, empty=0, duplicates=0)
    if args.keep_matching:
        counts["not_matching"] = 0
    known = set()
    for example, answer in zip(examples, answers, strict=True):
        conversation = example.prompt.conversation
        row = (json.dumps(conversation.messages), answer.text)
        if not answer.finished:
            counts["cut_short"] += 1
        elif len(example.student.ids) > args.max_length:
            counts["too_long"] += 1
        elif not answer.text.removeprefix(example.prompt.given[1]).strip():
            counts["empty"] += 1
        elif args.keep_matching and not matches(answer.text, conversation.references):
            counts["not_matching"] += 1
        elif row in known:
            counts["duplicates"] += 1
        else:
            known.add(row)
            kept.append(example)
    counts["kept"] = len(kept)
    dropped = [f"{n} {name.replace('_', ' ')}" for name, n in counts.items()][2:]
    summary = f"{len(kept)} of {len(answers)} answers kept ({', '.join(dropped)})"
    if not kept:
        raise UsageError(f"nothing is left to learn from: {summary}")
    tokens = sum(len(e.student.targets) for e in kept)
    PartialState().print(f"training text: {summary}, {tokens} target tokens")
    return kept, dict(counts)


def matches(text: str, references: Sequence[str]) -> bool:
    """Whether the answer, without the reasoning before it, equals a reference word by word."""
    words = text.rpartition("</think>")[2].split()
    return any(words == reference.split() for reference in references)


def write_completions(path: Path, examples: list[Example]) -> None:
    """What the student is trained on, as a data set for `--dataset ... --completions dataset`."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        for example in examples:
            conversation = example.prompt.conversation
            turns = [*conversation.messages, {"role": "assistant", "content": example.text}]
            row: dict[str, Any] = {"messages": turns}
            if conversation.references:
                row["references"] = conversation.references
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(part, path)


# -------------------------------------------------------------------------- a teacher behind an API


class ApiTeacher:
    """A model behind an OpenAI-compatible server, of which nothing but its text is known.

    Answers are cached like those of a local teacher, found by server, model, settings, messages and
    the number of the sample. Each is recorded before its worker asks for the next, so that a killed
    run loses at most --api-concurrency of them. The key is in no file, and removed from what a
    server says.
    """

    def __init__(self, args: Arguments, student: LanguageModel) -> None:
        import openai  # takes a second to import, and a local teacher needs none

        self.openai, self.args, self.student = openai, args, student
        self.key = os.environ.get(KEY, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UsageError(f"{KEY} holds characters that no header can carry")
        self.base_url = args.api_base_url.rstrip("/")
        self.limit = "max_tokens"  # the limit's name: some servers want max_completion_tokens
        self.takes_seed = True

    def complete(
        self, prompts: Sequence[common.Prompt], args: Arguments, **sampling: Any
    ) -> list[Completion]:
        """Answers to the prompts' conversations, from the cache if they are there.

        Raises `UsageError` for a refused key, model or request, and for a server that does not
        recover; what it had written until then is kept.
        """
        asked = [p.conversation.messages for p in prompts]

        def write(missing: dict[str, int], record: Callable[[str, Completion], None]) -> None:
            queue = {key: asked[i] for key, i in missing.items()}
            asyncio.run(self._ask_all(queue, record, sampling))

        identity = ["api", self.base_url, args.api_model]
        return common.cached_completions(prompts, asked, identity, args, write, **sampling)

    async def _ask_all(
        self,
        queue: dict[str, list[common.Message]],
        record: Callable[[str, Completion], None],
        sampling: dict[str, Any],
    ) -> None:
        """Ask --api-concurrency at a time, and record each answer as it arrives.

        The client retries what may pass by itself (408, 409, 429, 5xx, broken connections) with
        growing pauses, and obeys Retry-After.
        """
        waiting = iter(queue.items())
        client = self.openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self.key or "none", max_retries=ATTEMPTS - 1,
            timeout=self.args.api_timeout,
        )  # fmt: skip

        async def work() -> None:
            for key, messages in waiting:
                record(key, await self._ask(client, key, messages, sampling))

        workers = max(1, self.args.api_concurrency // PartialState().num_processes)
        async with client:
            await asyncio.gather(*(work() for _ in range(workers)))

    async def _ask(
        self, client: Any, key: str, messages: list[common.Message], sampling: dict[str, Any]
    ) -> Completion:
        """One answer, asked for again if what arrives is none or arrives too late."""
        reason = ""
        for _ in range(ATTEMPTS):
            request = self._request(key, messages, **sampling)
            try:
                async with asyncio.timeout(self.args.api_timeout):
                    return self._completion(await client.chat.completions.create(**request))
            except self.openai.APIStatusError as problem:
                if self._adapted(request, problem):
                    continue
                reason = self._check_refusal(problem)
                break
            except TimeoutError:
                reason = f"no answer within --api-timeout {self.args.api_timeout:g} seconds"
            except self.openai.APIConnectionError as problem:
                reason = f"{self._scrubbed(problem)} ({self._scrubbed(problem.__cause__)})"
                break
            except (self.openai.APIError, ValueError) as problem:  # ValueError: not (whole) JSON
                reason = self._scrubbed(problem)
            await asyncio.sleep(1)
        raise UsageError(
            f"{self.base_url} gave no answer in up to {ATTEMPTS} attempts, the last error: {reason}"
            "; run the same command again later, the answers until now are kept"
        )

    def _request(
        self,
        key: str,
        messages: list[common.Message],
        temperature: float,
        top_p: float = 1.0,
        **_: Any,
    ) -> dict[str, Any]:
        request = {"model": self.args.api_model, "messages": messages, "temperature": temperature}
        request[self.limit] = self.args.max_new_tokens
        if temperature and top_p < 1:
            request["top_p"] = top_p
        if temperature and self.takes_seed:
            # 31 bits, because some servers take no more.
            request["seed"] = common.row_seed(self.args.seed, key) & 0x7FFFFFFF
        return request

    def _completion(self, reply: Any) -> Completion:
        """What the server wrote; `ValueError` for what is no completion."""
        try:  # the client builds its objects from any JSON there is, or returns a page as text
            choice = reply.choices[0]
            text, reason = choice.message.content or "", choice.finish_reason
            reasoning = getattr(choice.message, "reasoning_content", None)
            reasoning = reasoning or getattr(choice.message, "reasoning", None)
        except (AttributeError, TypeError, IndexError):
            reason = None
        if reason is None:
            raise ValueError("what the server sent is no completion")
        if reasoning:  # some servers part it from the answer: joined as the model wrote it
            text = f"<think>\n{reasoning.strip()}\n</think>\n\n{text.lstrip()}"
        text = text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair
        length = getattr(reply.usage, "completion_tokens", None)
        if length is None:
            length = len(common.tokenize(self.student.tokenizer, text)[0])
        return Completion(text, reason not in {"length", "content_filter"}, length, None)

    def _adapted(self, request: dict[str, Any], problem: Any) -> bool:
        """Whether the request can be repeated without, or under another name, what was refused."""
        if problem.status_code not in {400, 422}:
            return False
        if "max_tokens" in request and "max_completion_tokens" in str(problem):
            self.limit = "max_completion_tokens"
        elif "seed" in request and "seed" in str(problem):
            if self.takes_seed:
                print(f"{self.base_url} takes no seed: another run may be given other samples")
            self.takes_seed = False
        else:
            return False
        return True

    def _check_refusal(self, problem: Any) -> str:
        """Raise `UsageError` for a status that asking again does not change; else the reason."""
        status = problem.status_code
        reason = f"({status}) {self._scrubbed(problem)}"
        if status in {401, 403}:
            refused = f"refuses the key in {KEY}" if self.key else f"wants a key: set {KEY}"
            raise UsageError(f"{self.base_url} {refused}: {reason}") from None
        if status == 404:
            raise UsageError(
                f"{self.base_url} has no model {self.args.api_model}, or no chat there: {reason}"
            ) from None
        if (status < 500 and status not in {408, 409, 429}) or problem.code == "insufficient_quota":
            raise UsageError(f"{self.base_url} refuses the request: {reason}") from None
        return reason

    def _scrubbed(self, problem: BaseException | None) -> str:
        """What went wrong, on one line and without the key, which a server may repeat."""
        text = str(problem).replace(self.key, "[key]") if self.key else str(problem)
        return (text.strip().splitlines() or [type(problem).__name__])[0][:300]


def main(args: Arguments) -> None:
    args.check()
    accelerator = common.start("sequence_level", args)
    train, held_out = common.load_data(args)
    if args.api_base_url:
        student = common.load_student(args, accelerator.device)
        pair = common.Pair(student, ApiTeacher(args, student))
    else:
        student, _ = pair = common.load_pair(args, accelerator.device)
    prompts = common.tokenize_prompts(train, pair, args.max_length)
    evaluation = common.tokenize_prompts(held_out, pair, args.max_length)

    examples, selection = training_text(train, prompts, pair, args)
    evaluator = common.Evaluator(evaluation, pair, args)
    del pair  # training needs nothing more of the teacher
    run = common.Run("sequence_level", args, accelerator, evaluator)
    if accelerator.is_main_process and selection:
        write_completions(run.directory / "completions.jsonl", examples)

    module = SequenceLevelLoss(student)
    module, optimizer = accelerator.prepare(module, common.make_optimizer(module, args))
    steps = common.total_steps(args, len(examples))
    for step in range(run.resume(steps), steps):
        run.begin(step, optimizer)
        batch = common.global_batch(examples, args, step)
        micro_batches, tokens = common.split_micro_batches(batch, args)
        total = 0.0
        for micro_batch in micro_batches:
            inputs = common.collate([e.student for e in micro_batch], accelerator.device)
            with common.reduce_gradients(accelerator, module, micro_batch is micro_batches[-1]):
                loss, part = module(inputs)
                # DDP averages gradients over processes: times their number gives the sum.
                accelerator.backward(loss * (accelerator.num_processes / tokens))
            total += part
            del loss  # frees the graph before the next one is made
        norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        mean_loss, lr = accelerator.reduce(total / tokens, "sum"), optimizer.param_groups[0]["lr"]
        numbers = {"train/loss": mean_loss, "optim/lr": lr, "optim/grad_norm": norm}
        run.log(step + 1, tokens, numbers, micro_batches)
        run.evaluate(step + 1)
        run.save(step + 1)
    run.finish(training_text=selection)


if __name__ == "__main__":
    common.launch(main, Arguments, __doc__)
