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
URL = r"https?://(\[[\w:]+\]|[^][\s/?#@:]+)(:\d+)?(/[^\s?#@]*)?"
ATTEMPTS = 10  # for one answer
FIRST_PAUSE, LAST_PAUSE, LONGEST_PAUSE = 0.5, 8.0, 600.0  # seconds; the longest for Retry-After
FINISHED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"}  # finish_reasons
CUT = {"length", "max_tokens", "model_length"}
HELLO = [{"role": "user", "content": "Hello"}]

# Retry settings change nothing that the student learns from.
common.FLAGS_FREE_ON_RESUME.update({"api_concurrency", "api_timeout", "api_max_failures"})


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
    api_timeout: float = flag(600.0, "seconds for one answer before it is asked again")
    api_max_failures: float = flag(0.1, "share of prompts without an answer that ends the run")
    api_greedy_temperature: float = flag(0.0, "what a server that refuses 0 is asked for instead")

    def check(self) -> None:
        """Refuse flags that contradict each other, before anything is loaded."""
        changed, url = common.changed_flags(self), self.api_base_url
        api = [common.as_flag(name) for name in changed if name.startswith("api_")]
        local = [common.as_flag(name) for name in changed if "teacher" in name]
        selecting = changed.keys() & {"samples_per_prompt", "keep_matching"}
        for wrong, message in (
            (min(self.samples_per_prompt, self.api_concurrency, self.api_timeout) <= 0,
             "--samples-per-prompt, --api-concurrency and --api-timeout must be above 0"),
            (self.api_max_failures > 1, "--api-max-failures is a share, from 0 to 1"),
            (self.samples_per_prompt > 1 and self.sampling_temperature == 0,
             "--samples-per-prompt at --sampling-temperature 0 would be one answer many times"),
            (selecting and self.completions == "dataset",
             "--samples-per-prompt and --keep-matching select from the teacher's text, not others"),
            (api and not url, f"{', '.join(api)} needs --api-base-url"),
            (url and local, f"{', '.join(local)} is for a teacher that is loaded here, not an API"),
            (url and not self.api_model, "--api-base-url needs --api-model, the teacher's name"),
            (url and not re.fullmatch(URL, url),
             "--api-base-url must look like https://HOST/v1, without user name, password or "
             f"parameters: a key belongs in the environment, {KEY}"),
            (url and not importlib.util.find_spec("openai"),
             '--api-base-url needs the openai client: pip install -e ".[api]"'),
        ):  # fmt: skip
            if wrong:
                raise UsageError(message)


class SequenceLevelLoss(nn.Module):
    """The student and its loss in one `forward`, through which gradients are synchronised."""

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
    examples = common.completion_examples(asked, answers, pair, sys.maxsize)
    return select(examples, answers, args)


def select(
    examples: list[Example], answers: list[Completion], args: Arguments
) -> tuple[list[Example], dict[str, int]]:
    """The examples that are fit to learn from, and counts of those that are not, by reason.

    Raises `UsageError` if none is left.
    """
    kept: list[Example] = []
    counts = Counter(written=len(answers), kept=0, cut_short=0, too_long=0, empty=0, duplicates=0)
    known = set()
    for example, answer in zip(examples, answers, strict=True):
        conversation = example.prompt.conversation
        row = (conversation.prompt_key(), answer.text)
        if answer.finished is None:
            counts.update(unanswered=1, written=-1)
        elif not answer.finished:
            counts["cut_short"] += 1
        elif len(example.student.ids) > args.max_length:
            counts["too_long"] += 1
        elif not answer.text.strip():
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
            columns = {"messages": turns, "references": conversation.references}
            columns["chat_template_kwargs"] = conversation.options
            row = {name: value for name, value in columns.items() if value}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(part, path)


# -------------------------------------------------------------------------- a teacher behind an API


class ApiTeacher:
    """A model behind an OpenAI-compatible server, of which nothing but its text is known.

    Answers are cached like those of a local teacher, found by server, model, settings, messages and
    the number of the sample. Each is recorded before its worker asks for the next, so that a killed
    run loses at most --api-concurrency of them. The key is in no file and no message. Greetings
    tell what is wrong with the server from what is wrong with one prompt.
    """

    def __init__(self, args: Arguments, student: LanguageModel) -> None:
        import openai  # takes a second to import, and a local teacher needs none

        self.openai, self.args, self.student = openai, args, student
        self.key = os.environ.get(KEY, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UsageError(f"{KEY} holds characters that no header can carry")
        self.base_url = args.api_base_url.rstrip("/")
        self.limit, self.takes_seed, self.greeted = "max_tokens", True, False

    def complete(
        self, prompts: Sequence[common.Prompt], args: Arguments, **sampling: Any
    ) -> list[Completion]:
        """Answers to the prompts' conversations, from the cache if they are there.

        Where there is none, `finished` is None. Raises `UsageError` for a refused key or setting, a
        server that stays down, and too many prompts without an answer; answers until then are kept.
        """
        talks = [p.conversation for p in prompts]
        for talk in talks:
            if "tools" in talk.options or any("tool_calls" in m for m in talk.messages):
                raise UsageError(f"{talk.source}: tools need a teacher that is loaded here")
        asked = [talk.messages + [talk.options] * bool(talk.options) for talk in talks]
        sampling["temperature"] = sampling["temperature"] or args.api_greedy_temperature

        def write(missing: dict[str, int], record: Callable[[str, Completion], None]) -> None:
            queue = {key: talks[i] for key, i in missing.items()}
            asyncio.run(self._ask_all(queue, record, sampling))

        identity = ["api", self.base_url, args.api_model]
        answers = common.cached_completions(prompts, asked, identity, args, write, **sampling)
        both = zip(prompts, answers, strict=True)
        failed = [f"\n  {p.conversation.source}: {a.text}" for p, a in both if a.finished is None]
        if failed:
            PartialState().print(
                f"{sampling['purpose']}: {len(failed)} of {len(prompts)} prompts got no answer and "
                f"are left out; a new run asks them again:{''.join(failed)}"
            )
        return answers

    async def _ask_all(
        self, queue: dict[str, common.Conversation], record: Callable[..., None], sampling: Any
    ) -> None:
        """Ask --api-concurrency at a time, and record each answer or failure as it arrives."""
        waiting, counts = iter(queue.items()), Counter()

        async def work() -> None:
            for key, talk in waiting:
                answer, _ = await self._ask(client, self._request(key, talk, **sampling))
                if answer.finished is None:
                    await self._greet(client)
                record(key, answer)
                counts[answer.finished is None] += 1
                if counts[True] > self.args.api_max_failures * max(50, counts.total()):
                    raise UsageError(
                        f"{counts[True]} of {counts.total()} prompts got no answer, too many for "
                        f"--api-max-failures; the last: {talk.source}: {answer.text}"
                    )

        workers = max(1, self.args.api_concurrency // PartialState().num_processes)
        async with self.openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self.key or "none", max_retries=0, timeout=None,
        ) as client:  # fmt: skip
            if not self.greeted:
                await self._greet(client)
            await asyncio.gather(*(work() for _ in range(workers)))

    async def _greet(self, client: Any) -> None:
        """Return when a greeting was answered with each setting of the run; else `UsageError`."""
        wanted, greedy = self.args.sampling_temperature, self.args.api_greedy_temperature
        hello = common.Conversation(HELLO, None, [], "", json.loads(self.args.template_kwargs))
        for temperature in sorted({wanted or greedy, greedy, 1.0}):
            top_p = self.args.top_p if temperature == wanted else 1.0
            request = self._request("", hello, temperature, top_p)
            answer, status = await self._ask(client, request)
            if answer.finished is None:
                self._adapt(answer.text, status, request)
                return await self._greet(client)
        self.greeted = True

    def _adapt(self, reason: str, status: int | None, request: dict[str, Any]) -> None:
        """Leave out what a refusal names, if the student learns the same; else `UsageError`."""
        named = reason if status in {400, 422} else ""
        if "max_completion_tokens" in named and self.limit == "max_tokens":
            self.limit = "max_completion_tokens"
        elif "seed" in named and self.takes_seed:
            self.takes_seed = False
            PartialState().print(f"{self.base_url} takes no seed: other runs get other samples")
        else:
            later = f"gave no answer in {ATTEMPTS} attempts, run the same command again later"
            key = f"refuses the key in {KEY}" if self.key else f"wants a key: set {KEY}"
            cause = {401: key, 403: key, 404: f"has no {self.args.api_model}", None: later}
            cause = cause.get(status, "refuses the request")
            if "temperature" in named and request["temperature"] == 0:
                cause = "takes no temperature 0 (--api-greedy-temperature 1 asks for samples)"
            raise UsageError(f"{self.base_url} {cause}: {reason}")

    async def _ask(self, client: Any, request: dict[str, Any]) -> tuple[Completion, int | None]:
        """The answer; else the reason as one with `finished` None, and the status of a refusal."""
        reason, pause = "", 0.0
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(pause)
            pause = min(FIRST_PAUSE * 2**attempt, LAST_PAUSE)
            try:
                async with asyncio.timeout(self.args.api_timeout):
                    raw = await client.chat.completions.with_raw_response.create(**request)
                return self._completion(raw.http_response.json()), None
            except self.openai.APIStatusError as problem:
                status = problem.status_code
                reason = f"({status}) {self._scrubbed(problem)}"
                passes = status >= 500 or status in {408, 409, 429}
                if not passes or problem.code == "insufficient_quota":
                    return Completion(reason, None, 0, None), status
                after = problem.response.headers.get("retry-after", "")  # seconds, or a date
                pause = max(pause, float(after) if after.isdecimal() else 0.0)
                if pause > LONGEST_PAUSE:
                    break
            except TimeoutError:
                reason = f"no answer within --api-timeout {self.args.api_timeout:g} seconds"
            except (self.openai.APIConnectionError, ValueError, RecursionError) as problem:
                reason = f"no completion: {self._scrubbed(problem)}"
        return Completion(reason, None, 0, None), None

    def _request(
        self, key: str, talk: common.Conversation, temperature: float, top_p: float = 1.0, **_: Any
    ) -> dict[str, Any]:
        turns = [{f: m[f] for f in ("role", "content", "name") if f in m} for m in talk.messages]
        request = {"model": self.args.api_model, "messages": turns, "temperature": temperature}
        if talk.options:  # as vLLM, SGLang and llama.cpp name them
            request["extra_body"] = {"chat_template_kwargs": talk.options}
        request[self.limit] = self.args.max_new_tokens
        if temperature and top_p < 1:
            request["top_p"] = top_p
        if temperature and self.takes_seed:
            request["seed"] = common.row_seed(self.args.seed, key) & 0x7FFFFFFF  # some take 31 bits
        return request

    def _completion(self, reply: Any) -> Completion:
        """What the server wrote, or its refusal; `ValueError` for what is no completion."""
        try:
            choice = reply["choices"][0]
            message, reason = choice["message"], choice["finish_reason"].lower()
            text = message.get("content") or ""
            reasoning = message.get("reasoning_content") or message.get("reasoning")
            if reasoning:  # some servers part it from the answer: joined as the model wrote it
                text = f"<think>\n{reasoning.strip()}\n</think>\n\n{text.lstrip()}"
            text = text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair
            length = (reply.get("usage") or {}).get("completion_tokens")
        except (AttributeError, TypeError, LookupError):
            raise ValueError(json.dumps(reply)) from None
        if reason not in FINISHED | CUT or (message.get("refusal") and not text):
            return Completion(self._scrubbed(f"{reason}: {json.dumps(message)}"), None, 0, None)
        if not isinstance(length, int):
            length = len(common.tokenize(self.student.tokenizer, text)[0])
        return Completion(text, reason in FINISHED, length, None)

    def _scrubbed(self, problem: Any) -> str:
        """What went wrong, on one line and without the key, which a server may repeat."""
        words = str(problem)
        if isinstance(problem, self.openai.APIConnectionError):
            while problem := problem.__cause__ or problem.__context__:
                words = str(problem) or words  # the innermost cause tells most
        words = words.replace(self.key or "\0", "[key]").encode("utf-8", "replace").decode()
        return (words.strip().splitlines() or ["nothing"])[0][:300]


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
    module, optimizer = common.prepare(accelerator, module, args)
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
                # Gradients are averaged over processes: times their number gives the sum.
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
