"""Sequence-level distillation: the student is fine-tuned on text that the teacher wrote.

The teacher answers every prompt, and the student learns to write the same, token by token:

    loss = −Σ_i log p_student(y_i | y_<i, prompt) / N,    y the teacher's answer

over the N target tokens of a batch: ordinary cross-entropy, in which the teacher's distribution
over sequences is replaced by its most likely answer (--sampling-temperature 0) or by samples from
it. The student sees only the teacher's text, so any teacher that can generate text works, also one
behind an API (--api-base-url), and the student may have any tokenizer.

Kim & Rush 2016, "Sequence-level knowledge distillation" (section 3.2; they search with a beam, here
the answer is greedy or sampled); DeepSeek-AI 2025, "DeepSeek-R1" (section 2.4: samples of a
reasoning teacher, selected by whether the answer is right, and plain fine-tuning on them). Of the
teacher's answers the student does not learn those that are cut, empty or repeated.

    python sequence_level.py
    python sequence_level.py --samples-per-prompt 4 --temperature 1 --keep-matching --max-steps 600
    python sequence_level.py --student data/student_other_tokenizer
    OPENAI_API_KEY=... python sequence_level.py --api-base-url https://HOST/v1 --api-model NAME
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from accelerate import PartialState
from torch import Tensor, nn

import common
from common import Batch, Completion, Example, Flags, LanguageModel, UsageError, flag

OBJECTIVE = common.Objective(ce_weight=1.0)
FINISHED = {"stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"}  # finish_reasons
CUT = {"length", "max_tokens", "model_length"}
PASSING = {"abort", "error", "network_error", "insufficient_system_resource"}  # to be asked again


@dataclass
class Arguments(Flags):
    temperature: ClassVar[float] = 1.0  # there is no softmax to soften: see the next flag's alias
    sampling_temperature: float = flag(
        0.0, "temperature of the teacher's text (0: greedy)", aliases=["--temperature"]
    )
    samples_per_prompt: int = flag(1, "answers sampled for each prompt; repetitions are dropped")
    keep_matching: bool = flag(
        False,
        "learn only from answers that --grader accepts (exact: equal to a reference of their row, "
        "word by word)",
    )
    api_greedy_temperature: float = flag(0.0, "temperature sent instead of 0, where 0 is refused")

    def check(self) -> None:
        """Refuse flags that contradict each other, before anything is loaded."""
        changed = common.changed_flags(self).keys()
        selecting = changed & {"samples_per_prompt", "keep_matching"}
        for wrong, message in (
            (self.samples_per_prompt <= 0, "--samples-per-prompt must be above 0"),
            (self.samples_per_prompt > 1 and self.sampling_temperature == 0,
             "--samples-per-prompt at --sampling-temperature 0 would be one answer many times"),
            (selecting and self.completions == "dataset",
             "--samples-per-prompt and --keep-matching select from the teacher's text, not others"),
            ("api_top_logprobs" in changed, "--api-top-logprobs is for methods that learn from "
             "log-probabilities, not from text alone"),
            (self.api_base_url and not self.cache_teacher,
             "--no-cache-teacher is for a teacher that is asked for more than text"),
        ):  # fmt: skip
            if wrong:
                raise UsageError(message)


class SequenceLevelLoss(nn.Module):
    """The student and its loss. What is registered here is trained, synchronised and saved."""

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
    function = isinstance(common.load_grader(args.grader), common.FunctionGrader)
    if args.keep_matching and not function:  # a function may do without references
        if bare := next((c for c in train if not c.references), None):
            raise UsageError(f"{bare.source}: no reference that --keep-matching could compare with")
        common.check_grader(args.grader, train)
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
    known, grade = set(), common.load_grader(args.grader)
    both = list(zip(examples, answers, strict=True))
    texts = [common.with_reasoning(e.prompt, answer) for e, answer in both]
    fit = [
        i for i, (e, a) in enumerate(both) if a.finished and len(e.student.ids) <= args.max_length
    ]
    # Each is judged in one process: a user's function may judge otherwise elsewhere.
    mine = common.my_share(fit) if args.keep_matching else []
    rows = (examples[i].prompt.conversation.row() for i in mine)
    judged = [(i, grade(texts[i], row)) for i, row in zip(mine, rows, strict=True)]
    right = dict(common.gather_object(judged))
    for i, (example, answer) in enumerate(both):
        row = (tuple(example.prompt.student), answer.text)
        if answer.finished is None:
            counts.update(unanswered=1, written=-1)
        elif not answer.finished:
            counts["cut_short"] += 1
        elif len(example.student.ids) > args.max_length:
            counts["too_long"] += 1
        elif not common.final_text(texts[i]).strip():
            counts["empty"] += 1
        elif args.keep_matching and not right[i]:
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


def write_completions(path: Path, examples: list[Example]) -> None:
    """What the student is trained on, as a data set for `--dataset ... --completions dataset`."""
    rows = []
    for example in examples:
        conversation = example.prompt.conversation
        turns = [*conversation.messages, {"role": "assistant", "content": example.text}]
        columns = {"messages": turns, "references": conversation.references}
        columns["chat_template_kwargs"] = conversation.options
        rows.append(conversation.columns | {k: v for k, v in columns.items() if v})
    common.write_json_lines(path, rows)


# -------------------------------------------------------------------------- a teacher behind an API


class ApiTeacher(common.Server):
    """A model that returns only text and is asked with conversations.

    A greeting separates a faulty server from a refused prompt.
    """

    def __init__(self, args: Arguments, student: LanguageModel) -> None:
        super().__init__(args, student)
        self.limit, self.left_out = "max_tokens", set[str]()  # settings that the server refuses

    def complete(
        self, prompts: Sequence[common.Prompt], args: Arguments, **sampling: Any
    ) -> list[Completion]:
        """See `common.Server.complete`."""
        for talk in (p.conversation for p in prompts):
            if "tools" in talk.options or any("tool_calls" in m for m in talk.messages):
                raise UsageError(f"{talk.source}: tools need a teacher that is loaded here")
        sampling["temperature"] = sampling["temperature"] or args.api_greedy_temperature
        return super().complete(prompts, args, **sampling)

    def asked(self, prompt: common.Prompt) -> list[Any]:
        talk = prompt.conversation
        return talk.messages + [talk.options] * bool(talk.options)

    async def greet(self, client: Any) -> None:
        """Return when a greeting was answered with each setting of the run; else `UsageError`."""
        wanted, greedy = self.args.sampling_temperature, self.args.api_greedy_temperature
        options = json.loads(self.args.template_kwargs)
        hello = common.Prompt(common.Conversation(common.HELLO, None, [], "", options), [], [])
        for temperature in sorted({wanted or greedy, greedy, 1.0}):
            top_p = self.args.top_p if temperature == wanted else 1.0
            request = self.request("", hello, temperature, top_p)
            try:
                answer = await self.ask(client, request, partial(self.completion, hello))
                if answer.finished is None:
                    raise common.NoAnswer(answer.text, 200)
            except common.NoAnswer as problem:
                self._adapt(problem, request)
                return await self.greet(client)
        self.greeted = True

    def _adapt(self, problem: common.NoAnswer, request: dict[str, Any]) -> None:
        """Leave out or rename what a refusal names, and say so; `UsageError` for what must stay."""
        named = str(problem) if problem.status in {400, 422} else ""
        sent, temperature = request | request.get("extra_body", {}), request.get("temperature")
        if "max_completion_tokens" in named and self.limit == "max_tokens":
            self.limit = "max_completion_tokens"
            return
        for name in ("seed", "chat_template_kwargs", "temperature"):
            if name in named and name in sent and (name != "temperature" or temperature == 1):
                self.left_out.add(name)
                PartialState().print(f"{self.base_url} takes no {name}, so it is left out")
                return
        advice = "takes no temperature 0 (--api-greedy-temperature 1 asks for samples)"
        raise self.refused(problem, advice * ("temperature" in named and temperature == 0))

    def request(
        self, key: str, prompt: common.Prompt, temperature: float, top_p: float = 1.0, **_: Any
    ) -> dict[str, Any]:
        talk = prompt.conversation
        turns = [{f: m[f] for f in ("role", "content", "name") if f in m} for m in talk.messages]
        request = {"model": self.args.api_model, "messages": turns, "temperature": temperature}
        # As vLLM, SGLang and llama.cpp name them.
        if talk.options and "chat_template_kwargs" not in self.left_out:
            request["extra_body"] = {"chat_template_kwargs": talk.options}
        request[self.limit] = self.args.max_new_tokens
        if temperature and top_p < 1:
            request["top_p"] = top_p
        if temperature:
            request["seed"] = common.row_seed(self.args.seed, key) & 0x7FFFFFFF  # some take 31 bits
        left_out = self.left_out - ({"temperature"} if temperature != 1 else set())
        return {name: value for name, value in request.items() if name not in left_out}

    def completion(self, prompt: common.Prompt, reply: Any) -> Completion:
        """What the server wrote, or its refusal; an error for what is no completion."""
        choice = reply["choices"][0]
        message, reason = choice["message"], choice["finish_reason"].lower()
        text = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        if isinstance(text, list):  # Mistral's way to part reasoning from an answer
            thoughts = "".join(p["text"] for part in text for p in part.get("thinking", []))
            reasoning = thoughts or reasoning
            text = "".join(part["text"] for part in text if part["type"] != "thinking")
        if reasoning:  # some servers part it from the answer: joined as the model wrote it
            text = f"<think>\n{reasoning.strip()}\n</think>\n\n{text.lstrip()}"
        text = text.encode("utf-8", "replace").decode()  # JSON can spell half a surrogate pair
        length = (reply.get("usage") or {}).get("completion_tokens")
        if reason in PASSING:
            raise ValueError(f"finish_reason {reason}: {json.dumps(message)}")
        if reason not in FINISHED | CUT or (message.get("refusal") and not text):
            return Completion(self.scrubbed(f"{reason}: {json.dumps(message)}"), None, 0, None)
        if not (isinstance(length, int) and length < 2**31):
            length = len(common.tokenize(self.reader.tokenizer, text)[0])
        return Completion(text, reason in FINISHED, length, None)


def main(args: Arguments) -> None:
    args.check()
    accelerator = common.start("sequence_level", args)
    train, held_out = common.load_data(args)
    if args.api_base_url:
        student = common.load_student(args, accelerator.device)
        pair = common.Pair(student, ApiTeacher(args, student))
    else:
        pair = common.load_pair(args, accelerator.device)
        student = pair.student
    prompts = common.tokenize_prompts(train, pair, args.max_length)
    evaluation = common.tokenize_prompts(held_out, pair, args.max_length)

    examples, selection = training_text(train, prompts, pair, args)
    evaluator = common.Evaluator(evaluation, pair, args)
    del pair  # training needs nothing more of the teacher
    run = common.Run("sequence_level", args, accelerator, evaluator, examples)
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
