"""Sequence-level distillation: the student is fine-tuned on text that the teacher wrote.

The teacher answers every prompt, and the student learns to write the same, token by token:

    loss = −Σ_i log p_student(y_i | y_<i, prompt) / N,    y the teacher's answer

over the N target tokens of a batch: ordinary cross-entropy, in which the teacher's distribution
over sequences is replaced by its most likely answer (--sampling-temperature 0) or by samples
from it. Only text crosses, so any teacher will do that can write, also one that is known only as a
server (--api-base-url), and the student may have any tokenizer.

Kim & Rush 2016, "Sequence-level knowledge distillation" (section 3.2; they search with a beam,
here the answer is greedy or sampled); DeepSeek-AI 2025, "DeepSeek-R1" (section 2.4: samples of a
reasoning teacher, selected by whether the answer is right, and plain fine-tuning on them). Answers
that the length limit cut, empty ones and repetitions are not learned from.

    python sequence_level.py
    python sequence_level.py --samples-per-prompt 4 --temperature 1 --keep-matching --max-steps 600
    python sequence_level.py --student data/student_other_tokenizer
    OPENAI_API_KEY=... python sequence_level.py --api-base-url https://HOST/v1 --api-model NAME
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import hashlib
import importlib.util
import json
import os
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import common
from common import (
    Answer,
    Batch,
    CommonArguments,
    Conversation,
    Example,
    LanguageModel,
    Objective,
    Prompt,
    UsageError,
    flag,
)

OBJECTIVE = Objective(ce_weight=1.0)

KEY = "OPENAI_API_KEY"
ATTEMPTS = 10  # for one answer
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds; each pause is twice the one before
LONGEST_RETRY_AFTER = 600.0  # a server that asks for more is asked again by another run

# How patiently a server is asked changes nothing that the student learns from.
common.MAY_CHANGE.update({"api_concurrency", "api_timeout"})


@dataclass
class Arguments(CommonArguments):
    temperature: ClassVar[float] = 1.0  # no softmax to soften: here the flag is the next one's
    sampling_temperature: float = flag(
        0.0, "at which the teacher writes its text (0: greedy)", aliases=["--temperature"]
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
    api_timeout: float = flag(600.0, "seconds to wait for one answer before asking again")

    def check(self) -> None:
        """Refuse what contradicts itself, before anything is loaded."""
        changed = common.changed_flags(self)
        if self.samples_per_prompt < 1 or self.api_concurrency < 1 or self.api_timeout <= 0:
            raise UsageError(
                "--samples-per-prompt and --api-concurrency must be 1 or more, "
                "--api-timeout above 0"
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
                raise UsageError(f"--{name.replace('_', '-')} needs --api-base-url")
            return
        here = {"teacher", "teacher_revision", "teacher_dtype", "cache_teacher"}
        for name in changed.keys() & here:
            raise UsageError(
                f"--{name.replace('_', '-')} is for a teacher that is loaded here, and "
                "--api-base-url names one that is not: choose one"
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
    """The student and its loss in one `forward`, which is what DDP and FSDP wrap."""

    def __init__(self, student: LanguageModel) -> None:
        super().__init__()
        self.trained, self.student = student.model, student

    def forward(self, batch: Batch) -> Tensor:
        """Cross-entropy summed over the batch's N target tokens."""
        loss, _ = common.distillation_loss(
            self.student.states(batch), self.student.head(), batch.targets, OBJECTIVE
        )
        return loss


# ------------------------------------------------------------------------------ text to learn from


Write = Callable[..., list[Answer]]  # (prompts, temperature=, top_p=, purpose=)


class Text(NamedTuple):
    """What the student is trained on, and what became of the teacher's answers."""

    examples: list[Example]
    rows: list[tuple[Conversation, str]]  # each example's conversation and the answer to it
    selection: dict[str, int]  # answers written, kept, and dropped for each reason


def load_models(
    args: Arguments, accelerator: Accelerator
) -> tuple[LanguageModel, LanguageModel | None, Write]:
    """The student; the teacher, unless it is on a server; and how the teacher writes."""
    if args.api_base_url:
        student = common.load_student(args, accelerator.device)
        return student, None, ApiTeacher(args, accelerator, student)
    student, teacher = common.load_pair(args, accelerator.device)

    def write(prompts: Sequence[Prompt], **settings: Any) -> list[Answer]:
        ids = [p.teacher for p in prompts]
        return common.teacher_responses(teacher, ids, args, accelerator, **settings)

    return student, teacher, write


def check_references(train: list[Conversation], args: Arguments) -> None:
    """Refuse --keep-matching where a row has nothing that an answer could match."""
    bare = next((c for c in train if not c.references), None)
    if args.keep_matching and bare:
        raise UsageError(f"{bare.where}: no reference that --keep-matching could compare with")


def training_text(
    train: list[Conversation],
    prompts: list[Prompt],
    student: LanguageModel,
    teacher: LanguageModel | None,
    write: Write,
    args: Arguments,
    accelerator: Accelerator,
) -> Text:
    """What --completions asks for: the teacher's text, selected, or the data set's own."""
    if args.completions == "dataset":
        source = teacher or student
        return Text(
            common.make_examples(train, prompts, student, source, args, accelerator), [], {}
        )
    text = select(prompts, student, teacher, write, args)
    tokens = sum(len(e.student.targets) for e in text.examples)
    accelerator.print(
        f"training text: {described(text.selection)}, {tokens} target tokens; "
        f"{len(train) - len(prompts)} prompts left out, as they do not fit into --max-length "
        f"{args.max_length}"
    )
    return text


def select(
    prompts: list[Prompt],
    student: LanguageModel,
    teacher: LanguageModel | None,
    write: Write,
    args: Arguments,
) -> Text:
    """--samples-per-prompt answers to every prompt, and those of them that are fit to learn from.

    Raises `UsageError` where nothing is left.
    """
    asked = [p for p in prompts for _ in range(args.samples_per_prompt)]
    answers = write(
        asked, temperature=args.sampling_temperature, top_p=args.top_p, purpose="training text"
    )
    examples = common.teacher_examples(asked, answers, student, teacher, sys.maxsize)
    kept: list[int] = []
    dropped = Counter(cut_short=0, too_long=0, empty=0, duplicates=0)
    if args.keep_matching:
        dropped["not_matching"] = 0
    seen = set()
    for i, (prompt, answer, example) in enumerate(zip(asked, answers, examples, strict=True)):
        row = (json.dumps(prompt.conversation.messages), answer.text)
        if not answer.finished:
            dropped["cut_short"] += 1
        elif len(example.student.ids) > args.max_length:
            dropped["too_long"] += 1
        elif not answer.text.strip():
            dropped["empty"] += 1
        elif args.keep_matching and not matches(answer.text, prompt.conversation.references):
            dropped["not_matching"] += 1
        elif row in seen:
            dropped["duplicates"] += 1
        else:
            seen.add(row)
            kept.append(i)
    selection = {"written": len(answers), "kept": len(kept), **dropped}
    if not kept:
        raise UsageError(f"nothing is left to learn from: {described(selection)}")
    rows = [(asked[i].conversation, answers[i].text) for i in kept]
    return Text([examples[i] for i in kept], rows, selection)


def matches(text: str, references: Sequence[str]) -> bool:
    """Whether the answer, without the reasoning before it, equals a reference word by word."""
    words = text.rpartition("</think>")[2].split()
    return any(words == reference.split() for reference in references)


def described(selection: dict[str, int]) -> str:
    """What was kept, and what was dropped for which reason."""
    dropped = [f"{n} {name.replace('_', ' ')}" for name, n in selection.items()][2:]
    return f"{selection['kept']} of {selection['written']} answers kept ({', '.join(dropped)})"


def write_completions(path: Path, rows: list[tuple[Conversation, str]]) -> None:
    """What the student is trained on, as a data set for `--dataset ... --completions dataset`."""
    beside = path.with_name(path.name + ".part")
    with common.make_writable(path.parent), open(beside, "w", encoding="utf-8") as stream:
        for conversation, text in rows:
            turns = [*conversation.messages, {"role": "assistant", "content": text}]
            row = {"messages": turns}
            if conversation.references:
                row["references"] = conversation.references
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        stream.flush()
        os.replace(beside, path)


# --------------------------------------------------------------------------- a teacher on a server


class ApiTeacher:
    """A model behind an OpenAI-compatible server: it writes, and that is all that is known of it.

    Answers are kept under --cache-dir like those of a teacher that is loaded here, in a file named
    after server, model and settings, whose lines are found by the messages and the number of the
    sample. Each is recorded before its worker asks for the next, so that a cut loses at most
    --api-concurrency of them. The key is in no file, and taken out of what a server says.
    """

    def __init__(self, args: Arguments, accelerator: Accelerator, student: LanguageModel) -> None:
        import openai  # takes a second to import, and a teacher that is loaded here needs none

        self.openai, self.args, self.accelerator, self.student = openai, args, accelerator, student
        self.key = os.environ.get(KEY, "").strip()
        if not (self.key.isascii() and self.key.isprintable()):
            raise UsageError(f"{KEY} holds characters that no header can carry")
        self.base_url = args.api_base_url.rstrip("/")
        self.limit = "max_tokens"  # the limit's name: some servers want max_completion_tokens
        self.takes_seed = True
        self.not_before = 0.0  # when the server wants to be asked again (time.monotonic)
        self.pauses = 0

    def __call__(
        self,
        prompts: Sequence[Prompt],
        *,
        temperature: float,
        top_p: float = 1.0,
        purpose: str,
    ) -> list[Answer]:
        """Answers to the prompts' conversations, from the cache where they are known.

        Raises `UsageError` for a refused key, model or request, and for a server that does not
        recover; what it had written until then is kept.
        """
        settings = {
            "base_url": self.base_url,
            "model": self.args.api_model,
            "temperature": temperature,
            "top_p": top_p if temperature else 1.0,
            "max_new_tokens": self.args.max_new_tokens,
            "seed": self.args.seed if temperature else 0,
        }
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        path = Path(self.args.cache_dir) / "text" / f"api-{name}.jsonl"
        asked = [p.conversation.messages for p in prompts]
        keys = common.sample_keys(asked, temperature)
        processes, lock = self.accelerator.num_processes, path.with_suffix(".lock")
        with common.make_writable(path.parent), common.one_writer(lock, self.accelerator):
            known = common.read_text_cache(path)
            self.accelerator.wait_for_everyone()
            missing = {k: m for k, m in zip(keys, asked, strict=True) if k not in known}
            mine = dict(list(missing.items())[self.accelerator.process_index :: processes])
            if mine:
                asyncio.run(self._ask_all(mine, settings, path, purpose))
            self.accelerator.wait_for_everyone()
            known = common.read_text_cache(path)
        return [known[k] for k in keys]

    async def _ask_all(
        self, missing: dict[str, Any], settings: dict[str, Any], path: Path, purpose: str
    ) -> None:
        """Ask for what is missing, --api-concurrency at a time, and record it as it arrives."""
        client = self.openai.AsyncOpenAI(
            base_url=self.base_url, api_key=self.key or "none", max_retries=0, timeout=None
        )
        bar = common.progress(self.accelerator, f"API writes ({purpose})", len(missing))
        began, tokens, queue = time.perf_counter(), 0, iter(missing.items())

        async def work() -> None:
            nonlocal tokens
            for key, messages in queue:
                answer = await self._ask(client, key, messages, settings)
                line = {
                    "key": key,
                    "messages": messages,
                    "response": answer.text,
                    "response_ids": None,
                    "tokens": answer.tokens,
                    "finish_reason": "stop" if answer.finished else "length",
                }
                common.append_lines(path, [json.dumps(line, ensure_ascii=False) + "\n"])
                tokens += answer.tokens
                speed = f"{tokens / (time.perf_counter() - began):.0f}"
                bar.set_postfix(tokens_per_second=speed, pauses=self.pauses, refresh=False)
                bar.update()

        workers = max(1, self.args.api_concurrency // self.accelerator.num_processes)
        with bar:
            async with client:
                await asyncio.gather(*(work() for _ in range(workers)))

    async def _ask(
        self, client: Any, key: str, messages: common.Messages, settings: dict[str, Any]
    ) -> Answer:
        """One answer, asked for again after whatever may pass by itself."""
        said = ""
        for attempt in range(ATTEMPTS):
            if attempt:
                if self.pauses == 0:
                    tqdm.write(f"{self.base_url}: {said}; asking again after a pause", sys.stderr)
                self.pauses += 1
                pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1))
                await asyncio.sleep(pause * random.uniform(0.5, 1))
            while (wait := self.not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            request = self._request(key, messages, settings)
            try:
                async with asyncio.timeout(self.args.api_timeout):
                    return self._answer(await client.chat.completions.create(**request))
            except self.openai.APIStatusError as problem:
                said = f"({problem.status_code}) {self._scrubbed(problem)}"
                if not self._adapted(request, problem):
                    self._check_refusal(problem, said)
                    self._obey(problem.response.headers.get("retry-after"), said)
            except TimeoutError:
                said = f"no answer within --api-timeout {self.args.api_timeout:g} seconds"
            except (self.openai.APIError, ValueError) as problem:  # ValueError: not (whole) JSON
                said = self._scrubbed(problem.__cause__ or problem)
        raise UsageError(
            f"{self.base_url} failed {ATTEMPTS} times in a row, the last time so: {said}; "
            "start the same command later, the answers until now are kept"
        )

    def _request(
        self, key: str, messages: common.Messages, settings: dict[str, Any]
    ) -> dict[str, Any]:
        request = {
            "model": self.args.api_model,
            "messages": messages,
            "temperature": settings["temperature"],
            self.limit: self.args.max_new_tokens,
        }
        if settings["top_p"] < 1:
            request["top_p"] = settings["top_p"]
        if settings["temperature"] and self.takes_seed:
            # 31 bits, as some servers take no more.
            request["seed"] = common.row_seed(self.args.seed, key) & 0x7FFFFFFF
        return request

    def _answer(self, completion: Any) -> Answer:
        """What the server wrote; `ValueError` for what is no completion."""
        try:  # the client builds its objects from whatever JSON there is, or gives a page as text
            choice = completion.choices[0]
            text, reason = choice.message.content or "", choice.finish_reason
            thoughts = getattr(choice.message, "reasoning_content", None)
            thoughts = thoughts or getattr(choice.message, "reasoning", None)
            if thoughts:  # parted from the answer by the server: together as the model wrote them
                text = f"<think>\n{thoughts.strip()}\n</think>\n\n{text.lstrip()}"
            text = text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair
        except (AttributeError, TypeError, IndexError):
            reason = None
        if reason is None:
            raise ValueError("what the server sent is no completion")
        tokens = getattr(completion.usage, "completion_tokens", None)
        if tokens is None:
            tokens = len(common.tokenize(self.student.tokenizer, text).ids)
        return Answer(text, reason not in {"length", "content_filter"}, tokens, None)

    def _adapted(self, request: dict[str, Any], problem: Any) -> bool:
        """Ask without, or by another name, for what this server does not take; whether there is."""
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

    def _check_refusal(self, problem: Any, said: str) -> None:
        """Raise `UsageError` for a status that asking again does not change."""
        status = problem.status_code
        if status in {401, 403}:
            refused = f"refuses the key in {KEY}" if self.key else f"wants a key: set {KEY}"
            raise UsageError(f"{self.base_url} {refused}: {said}") from None
        if status == 404:
            raise UsageError(
                f"{self.base_url} has no model {self.args.api_model}, or no chat there: {said}"
            ) from None
        passes = status >= 500 or status in {408, 409, 425, 429}
        if not passes or problem.code == "insufficient_quota":
            raise UsageError(f"{self.base_url} refuses the request: {said}") from None

    def _obey(self, header: str | None, said: str) -> None:
        """Let nobody ask before the time that a Retry-After header names."""
        seconds = retry_after(header)
        if seconds > LONGEST_RETRY_AFTER:
            raise UsageError(
                f"{self.base_url} wants to be left alone for {seconds:.0f} seconds: start the same "
                f"command then, the answers until now are kept; it said: {said}"
            ) from None
        self.not_before = max(self.not_before, time.monotonic() + seconds)

    def _scrubbed(self, problem: BaseException) -> str:
        """What went wrong, on one line and without the key, which a server may repeat."""
        text = str(problem).replace(self.key, "[key]") if self.key else str(problem)
        return common.first_line(Exception(text))


def retry_after(header: str | None) -> float:
    """Seconds that a Retry-After header asks for, in either of its forms; 0 without one."""
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        date = email.utils.parsedate_tz(header)
        return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else 0.0


def main(args: Arguments) -> None:
    args.check()
    accelerator = common.start("sequence_level", args)
    device = accelerator.device
    train, held_out = common.load_data(args)
    check_references(train, args)
    student, teacher, write = load_models(args, accelerator)
    prompts = common.encode_for_both(train, student, teacher, args.max_length)
    evaluation = common.encode_for_both(held_out, student, teacher, args.max_length)

    text = training_text(train, prompts, student, teacher, write, args, accelerator)
    examples = text.examples
    written = functools.partial(write, evaluation)
    evaluator = common.Evaluator(evaluation, student, teacher, args, accelerator, written)
    del teacher, write, written  # from here on nobody needs the teacher's weights
    run = common.Run("sequence_level", args, accelerator, args.api_model)
    if accelerator.is_main_process and text.rows:
        write_completions(run.directory / "completions.jsonl", text.rows)
    before = run.before(evaluator, student)

    module = SequenceLevelLoss(student)
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
        total = 0.0
        for micro_batch in micro_batches:
            batch = common.collate([e.student for e in micro_batch], device)
            with common.reduce_gradients(accelerator, module, micro_batch is micro_batches[-1]):
                loss = module(batch)
                # DDP averages over processes; the sum over them, per token, is what is wanted.
                accelerator.backward(loss * (accelerator.num_processes / tokens))
            total += loss.detach()
            del loss  # its graph would lie between the arrays of the next one
        norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        run.log(
            step + 1,
            tokens,
            {
                "train/loss": accelerator.reduce(total / tokens),
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
    run.finish(student, before, after, evaluator, training_text=text.selection)


if __name__ == "__main__":
    common.launch(main, Arguments, __doc__)
