"""From files to batches: accepted rows, masks on several templates, batches and their gradients."""

from __future__ import annotations

import copy
import datetime
import itertools
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from byte_models import word_tokenizer
from conftest import example_of, generate, language_model, tiny_model, with_response
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

import common
import token_level
from common import Completion, Conversation, Example, LanguageModel, Pair, Tokens, UsageError

CPU = torch.device("cpu")
API_TEACHER = object()  # stands for any teacher that is no LanguageModel and gives only text

# Turns end with a token and a line break that nobody writes. No generation marks.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As CHATML, with marks around what the assistant wrote but not around its end token.
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Prints its own BOS, a system turn with today's date, and trims contents, as Llama 3.2's does.
LLAMA = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    '{%- set date_string = strftime_now("%d %b %Y") %}{%- else %}'
    '{%- set date_string = "1 Jan 1970" %}{%- endif %}{%- endif %}'
    "{{- '<|start|>system<|sep|>\n\nToday Date: ' + date_string + '<|eot|>' }}"
    "{%- for m in messages %}"
    "{{- '<|start|>' + m.role + '<|sep|>\n\n' + m.content | trim + '<|eot|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant<|sep|>\n\n' }}{%- endif %}"
)
CLOCK = "{{ strftime_now('%A %d %B %Y') }}" + CHATML
# Drops the reasoning of every turn but the last, as Qwen 3 and DeepSeek R1 do.
FORGETFUL = (
    "{% for m in messages %}{% set text = m.content %}"
    "{% if m.role == 'assistant' and not loop.last %}"
    "{% set text = m.content.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<|bos|>", "<|start|>", "<|sep|>", "<|eot|>"]


def byte_tokenizer(
    template: str, eos: str = "<|im_end|>", *, trim: bool = False, add_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A token for each byte and for a pair of spaces: what is a target can be read off exactly."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, "ĠĠ"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "Ġ")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    steps = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if add_bos:
        bos = vocabulary["<|bos|>"]
        steps.append(processors.TemplateProcessing("<|bos|> $A", None, [("<|bos|>", bos)]))
    inner.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|bos|>", eos_token=eos, pad_token="<|pad|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def as_model(
    tokenizer: PreTrainedTokenizerBase, kind: str = "llama", seed: int = 0, **changes: object
) -> LanguageModel:
    """A tiny model with that tokenizer, which declares the tokenizer's end token as its own."""
    rows = changes.pop("vocab_size", max(tokenizer.get_vocab().values()) + 1)
    eos = tokenizer.eos_token_id
    model = tiny_model(kind, rows, seed, eos_token_id=eos, **changes)
    model.generation_config.eos_token_id = eos
    return language_model(model, tokenizer, f"{kind}-{seed}-{rows}")


def talk(*contents: str, system: str | None = None) -> list[common.Message]:
    """User and assistant in turns."""
    roles = itertools.cycle(["user", "assistant"])
    turns = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def answer(text: str) -> common.Message:
    return {"role": "assistant", "content": text}


def runs_of_targets(model: LanguageModel, tokens: Tokens) -> list[str]:
    """The text of each unbroken run of targets."""
    runs: list[list[int]] = []
    for before, i in zip([-9, *tokens.targets], tokens.targets, strict=False):
        if i != before + 1:
            runs.append([])
        runs[-1].append(tokens.ids[i])
    return [model.tokenizer.decode(run) for run in runs]


def completion_of(model: LanguageModel, text: str, *, finished: bool = True) -> Completion:
    """The text as if that model had written it, with its end token if it is finished."""
    ids = common.tokenize(model.tokenizer, text)[0] + model.end_ids[:1] * finished
    return Completion(text, finished, len(ids), ids)


def tokenize_prompts(
    conversations: list[Conversation], student: LanguageModel, teacher: object, limit: int = 100
) -> list[common.Prompt]:
    return common.tokenize_prompts(conversations, Pair(student, teacher), limit)


# ---------------------------------------------------------------------------------------- masks


def test_embedded_template_exact_ids(tokenizer):
    """Ids and targets of the embedded format, spelled out from its special tokens."""
    model = as_model(tokenizer)
    end, system, user, assistant = tokenizer.convert_tokens_to_ids(
        ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    )
    parts = [common.tokenize(tokenizer, t)[0] for t in ("be brief", "cat", "K AE1 T", "dog", "D")]
    s, a, b, c, d = parts
    tokens = common.tokenize_conversation(
        model, talk("cat", "K AE1 T", "dog", "D", system="be brief")
    )
    first = [system, *s, end, user, *a, end, assistant]
    second = [user, *c, end, assistant]
    assert tokens.ids == [*first, *b, end, *second, *d, end]
    first_answer = range(len(first), len(first) + len(b) + 1)
    assert tokens.targets == [*first_answer, *range(len(tokens.ids) - len(d) - 1, len(tokens.ids))]
    assert runs_of_targets(model, tokens) == ["K AE1 T<|end|>", "D<|end|>"]
    assert model.end_ids == [end]


TEXTS = [
    "K AE1 T",
    "",
    "x",
    "é😀 שלום\u2028",
    "line\n\n  indented\n",
    "the user said <user>",
    "assistant\n",
]


@pytest.mark.parametrize("trim", [False, True], ids=["plain", "trimmed offsets"])
@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED], ids=["prefixes", "marks"])
@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_every_turn_and_its_end_token(template: str, text: str, trim: bool):
    """Each assistant turn with its end token, the line break after it never: byte for byte.

    With marks that leave the end token out it is a target all the same, except after nothing.
    Some tokenizers (trim_offsets) report a space as having no width; it is a target too.
    """
    model = as_model(byte_tokenizer(template, trim=trim))
    tokens = common.tokenize_conversation(model, talk("ask", text, "again", "answer  "))
    if text or template == CHATML:
        assert runs_of_targets(model, tokens) == [text + "<|im_end|>", "answer  <|im_end|>"]
    else:
        assert runs_of_targets(model, tokens)[-1] == "answer  <|im_end|>"
    whole = model.tokenizer.decode(tokens.ids)
    assert whole.count("<|im_start|>") == 4 and whole.endswith("<|im_end|>\n")
    assert tokens.targets == sorted(set(tokens.targets)) and min(tokens.targets) > 0


@pytest.mark.parametrize("content", ["  return 1", "    return 1\n", " x"], ids=repr)
def test_answer_that_begins_with_space(content: str):
    """Indentation at the beginning of an answer is written by the assistant."""
    for trim in (False, True):
        model = as_model(byte_tokenizer(CHATML, trim=trim))
        tokens = common.tokenize_conversation(model, talk("code?", content))
        assert runs_of_targets(model, tokens) == [content + "<|im_end|>"]


def test_pad_is_end(tokenizer):
    """A tokenizer whose padding token is its end token: the end stays a target."""
    own = byte_tokenizer(CHATML)
    own.pad_token = own.eos_token
    model = as_model(own)
    assert own.pad_token_id == own.eos_token_id
    examples = [
        common.tokenize_conversation(model, talk("ask", text)) for text in ("a", "long answer")
    ]
    batch = common.collate(examples, CPU, pad_id=own.pad_token_id)
    texts = [own.decode(batch.targets[batch.example == row]) for row in (0, 1)]
    assert texts == ["a<|im_end|>", "long answer<|im_end|>"]
    assert batch.input_ids.shape == (2, len(examples[1].ids))


def test_template_that_prints_bos_and_date():
    """Llama 3.2's habits: one BOS, a fixed date, trimmed contents; the end is the template's own.

    The tokenizer would add a BOS itself, and declares another end token than turns have.
    """
    tokenizer = byte_tokenizer(LLAMA, eos="<|im_end|>", add_bos=True)
    assert tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id
    model = as_model(tokenizer)
    assert model.end_ids == tokenizer.convert_tokens_to_ids(["<|eot|>", "<|im_end|>"])
    tokens = common.tokenize_conversation(model, talk("ask", " answer ", "again", "fin"))
    assert Counter(tokens.ids)[tokenizer.bos_token_id] == 1
    assert tokens.ids[0] == tokenizer.bos_token_id and 0 not in tokens.targets
    assert runs_of_targets(model, tokens) == ["answer<|eot|>", "fin<|eot|>"]
    assert f"Today Date: {common.FIXED_DATE}<|eot|>" in tokenizer.decode(tokens.ids)
    row = Conversation(talk("ask"), None, [], "x:1")
    (prompt,) = tokenize_prompts([row], model, model)
    assert tokens.ids[: len(prompt.student)] == prompt.student == prompt.teacher
    assert prompt.student.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [LLAMA, CLOCK], ids=["date_string", "strftime_now"])
def test_prompts_are_the_same_tomorrow(template: str, monkeypatch):
    """A template that prints the date gets a fixed one; otherwise no cache would ever be hit."""
    tokenizer = byte_tokenizer(template)
    fixed, plain = set(), set()
    for day in (1, 2):

        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None, day=day):
                return cls(2031, 5, day)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        fixed.add(common.render(tokenizer, talk("ask"), prompt=True))
        plain.add(tokenizer.apply_chat_template(talk("ask"), tokenize=False))
    assert len(plain) == 2  # the test's template does print the date
    assert len(fixed) == 1 and common.FIXED_DATE in fixed.pop()


def test_template_that_rewrites_earlier_turns(capsys):
    """A template that drops reasoning from earlier turns: the last is learned, and that is said."""
    model = as_model(byte_tokenizer(FORGETFUL))
    once = common.tokenize_conversation(model, talk("ask", "<think>hm</think>yes"))
    assert runs_of_targets(model, once) == ["<think>hm</think>yes<|im_end|>"]
    harmless = common.tokenize_conversation(model, talk("ask", "yes", "again", "no"))
    assert runs_of_targets(model, harmless) == ["yes<|im_end|>", "no<|im_end|>"]
    turns = talk("ask", "<think>hm</think>yes", "again")
    row = Conversation(turns, answer("no"), ["no"], "file.jsonl:7")
    prompts = tokenize_prompts([row], model, model, 200)
    ((example,), _) = common.dataset_examples(prompts, Pair(model, model), 200)
    assert runs_of_targets(model, example.student) == ["no<|im_end|>"]
    assert "of 1 of 1 conversations only the last answer is learned" in capsys.readouterr().out


def test_marks_around_the_generation_prompt():
    """SmolLM3's template marks what the prompt gives too, in its last turn also empty reasoning."""
    marked = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' + m.content + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|im_start|>assistant\n<think>\n\n</think>\n' }}{% endif %}"
    )
    model = as_model(byte_tokenizer(marked))
    tokens = common.tokenize_conversation(model, talk("ask", "one", "again", "two"))
    assert runs_of_targets(model, tokens) == ["one<|im_end|>", "two<|im_end|>"]


def test_an_end_of_text_after_the_last_turn():
    """As Phi-3's template prints: all turns are located, and one end token is learned for each."""
    template = CHATML.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}")
    model = as_model(byte_tokenizer(template, eos="<|eot|>"))
    model.end_ids = [model.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|eot|>")]
    tokens = common.tokenize_conversation(model, talk("ask", "one", "again", "two", "so", "six"))
    assert runs_of_targets(model, tokens) == [f"{x}<|im_end|>" for x in ("one", "two", "six")]


def test_turns_of_two_tokenizers_are_the_same_turns(tokenizer, capsys):
    """Where one template rewrites earlier turns, neither model learns them."""
    forgetful, whole = as_model(byte_tokenizer(FORGETFUL)), as_model(tokenizer)
    turns = talk("ask", "<think>hm</think>yes", "again")
    for pair in (Pair(forgetful, whole), Pair(whole, forgetful)):
        prompts = tokenize_prompts([Conversation(turns, answer("N AA"), [], "x:1")], *pair, 300)
        ((example,), _) = common.dataset_examples(prompts, pair, 300)
        for model, side in zip(pair, (example.student, example.teacher), strict=True):
            (text,) = runs_of_targets(model, side)
            assert text.startswith("N AA")
        assert "of 1 of 1 conversations only the last answer" in capsys.readouterr().out


def test_answers_that_max_length_cuts_are_counted(tiny, tmp_path, capsys):
    model = as_model(byte_tokenizer(CHATML))
    rows = [Conversation(talk("ask"), None, [], f"x:{i}") for i in range(3)]
    prompts = tokenize_prompts(rows, model, model)
    texts = ["short", "a long answer that does not fit", "unfinished"]
    answers = [completion_of(model, text, finished=text != "unfinished") for text in texts]
    teacher = copy.copy(model)
    teacher.complete = lambda *_, **__: answers
    args = common.Flags(max_length=len(prompts[0].student) + 12)
    common.make_examples(prompts, Pair(model, teacher), args)
    assert "; 2 responses cut" in capsys.readouterr().out


def test_text_of_both_kinds_of_completions():
    """Every assistant turn under `dataset`, the final one under `teacher`; a cut has no end."""
    model, long = as_model(byte_tokenizer(CHATML)), "a response that is cut, as it is too long"
    rows = [
        Conversation(talk("ask", "one", "again"), answer("two"), ["two"], "x:1"),
        Conversation(talk("ask"), answer(long), ["r"], "x:2"),
    ]
    prompts, pair = tokenize_prompts(rows, model, model, 80), Pair(model, model)
    examples, cut = common.dataset_examples(prompts, pair, 60)
    assert runs_of_targets(model, examples[0].student) == ["one<|im_end|>", "two<|im_end|>"]
    assert cut == 1 and len(examples[1].student.ids) == 60
    (piece,) = runs_of_targets(model, examples[1].student)
    assert long.startswith(piece) and len(piece) == 60 - len(prompts[1].student)
    assert sources_of([examples]) == ["x:1", "x:2"]
    assert [(e.index, e.text) for e in examples] == [(0, "two"), (1, long)]

    answers = [completion_of(model, text) for text in ("deux", long)]
    examples = common.completion_examples(prompts, answers, pair, 60)
    assert runs_of_targets(model, examples[0].student) == ["deux<|im_end|>"]
    assert examples[0].student.ids[: len(prompts[0].student)] == prompts[0].student
    assert runs_of_targets(model, examples[1].student) == [piece]
    assert [(e.index, e.text) for e in examples] == [(0, "deux"), (1, long)]


def test_text_is_tokenised_again_for_another_vocabulary(tokenizer):
    """The student gets its own prompt, its own tokens of the same text and its own end token."""
    teacher, student = as_model(tokenizer), as_model(byte_tokenizer(CHATML))
    pair = Pair(student, teacher)
    assert not pair.same_vocabulary and Pair(student, student).same_vocabulary
    row = Conversation(talk("ask"), None, [], "x:1")
    prompts = tokenize_prompts([row] * 3, student, teacher)
    answers = [
        completion_of(teacher, "N AA1 é"),
        completion_of(teacher, "N AA", finished=False),
        completion_of(teacher, ""),
    ]
    examples = common.completion_examples(prompts, answers, pair, 100)
    assert runs_of_targets(student, examples[0].student) == ["N AA1 é<|im_end|>"]
    assert runs_of_targets(student, examples[1].student) == ["N AA"]
    assert runs_of_targets(student, examples[2].student) == ["<|im_end|>"]
    for prompt, answer, example in zip(prompts, answers, examples, strict=True):
        assert example.student.ids[: len(prompt.student)] == prompt.student
        assert example.teacher == with_response(prompt.teacher, answer.ids)
    only_text = [answer._replace(ids=None) for answer in answers]
    alone = common.completion_examples(prompts, only_text, Pair(student, API_TEACHER), 100)
    assert [e.student for e in alone] == [e.student for e in examples]
    assert all(e.teacher == e.student for e in alone)
    cut = common.completion_examples(prompts, answers, pair, len(prompts[0].student) + 4)
    assert runs_of_targets(student, cut[0].student) == ["N AA"]


def test_no_token_spans_the_boundary_between_prompt_and_answer():
    """A prompt that ends with a space, an answer that begins with one: two tokens, as written."""
    spaced = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant ")
    student = as_model(byte_tokenizer(spaced))
    row = Conversation(talk("ask"), None, [], "x:1")
    prompts, pair = tokenize_prompts([row], student, API_TEACHER), Pair(student, API_TEACHER)
    assert student.tokenizer.decode(prompts[0].student).endswith(" ")
    answer = Completion(" yes", False, 4, None)
    (tokens,) = (e.student for e in common.completion_examples(prompts, [answer], pair, 100))
    assert tokens.ids[: len(prompts[0].student)] == prompts[0].student
    assert runs_of_targets(student, tokens) == [" yes"]
    assert len(tokens.targets) == 4


def test_dataset_response_cut_to_nothing_is_left_out():
    """If the prompt alone fills --max-length, there is no target and so no example."""
    model = as_model(byte_tokenizer(CHATML))
    row = Conversation(talk("ask"), answer("answer"), ["answer"], "x:1")
    prompts = tokenize_prompts([row], model, model)
    width = len(prompts[0].student)
    examples, cut = common.dataset_examples(prompts, Pair(model, model), width)
    assert examples == [] and cut == 1
    with pytest.raises(UsageError, match="1 of 1 prompts do not fit"):
        tokenize_prompts([row], model, model, width)


def test_bytes_of_text_are_those_of_its_tokens():
    """A tokenizer that would tidy the text: the space before its full stop counts."""
    tokenizer = word_tokenizer(["a", "."], "{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.clean_up_tokenization_spaces = True
    model, ids = as_model(tokenizer), tokenizer("a . a . a", add_special_tokens=False)["input_ids"]
    side = common.with_response(ids[:2], ids[2:])
    example = common.Example(0, None, "a . a", side, side)
    scorer, tallies = object.__new__(common.Evaluator), {0: {}}
    scorer.student, scorer.comparable, scorer.batches = model, False, [[example]]
    logits = common.Logits(torch.zeros(3, 8), common.Head(torch.zeros(300, 8)))
    scorer._add_likelihoods(tallies, 0, model, logits)
    assert tallies[0]["bytes"] == len(" a . a")


@pytest.mark.parametrize(("epochs", "steps"), [(1.1, 11), (1.0, 10), (0.05, 1), (1.01, 11)])
def test_steps_of_epochs(epochs: float, steps: int):
    assert common.total_steps(arguments(epochs=epochs, batch_size=10), 100) == steps


def test_each_model_reads_its_own_template():
    """Different templates, same targets; the longer prompt decides what fits for both."""
    short, long = as_model(byte_tokenizer(CHATML)), as_model(byte_tokenizer(CHATML_MARKED))
    long.tokenizer.chat_template = "{{ '<|start|>a longer beginning ' }}" + CHATML
    row = Conversation(talk("ask"), answer("an answer"), ["an answer"], "x:1")
    prompts, pair = tokenize_prompts([row], short, long), Pair(short, long)
    width = len(prompts[0].teacher)
    assert width > len(prompts[0].student)
    answers = [completion_of(short, "an answer")]
    for examples in (
        common.dataset_examples(prompts, pair, width + 3)[0],
        common.completion_examples(prompts, answers, pair, width + 3),
    ):
        (example,) = examples
        assert runs_of_targets(short, example.student) == ["an "]
        assert runs_of_targets(long, example.teacher) == ["an "]
        assert "longer" in long.tokenizer.decode(example.teacher.ids)
        # Evaluation counts the bytes of the text that was kept, of either model.
        for model, side in ((short, example.student), (long, example.teacher)):
            scorer, tallies = object.__new__(common.Evaluator), {0: {}}
            scorer.student, scorer.comparable, scorer.batches = short, False, [examples]
            logits = common.Logits(torch.zeros(3, 8), common.Head(torch.zeros(300, 8)))
            scorer._add_likelihoods(tallies, 0, model, logits)
            assert tallies[0]["bytes"] == 3 and tallies[0]["tokens"] == len(side.targets)
        assert "longer" not in short.tokenizer.decode(example.student.ids)


# ------------------------------------------------------------------------------------------ rows

TURN = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SHAREGPT = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]
ROWS = [
    ({"messages": [TURN, ANSWER]}, ["user q"], "a", ["a"]),
    ({"messages": [TURN]}, ["user q"], None, []),
    ({"messages": [TURN], "response": "a"}, ["user q"], "a", ["a"]),
    ({"messages": [TURN, ANSWER], "references": ["x", "y"]}, ["user q"], "a", ["x", "y"]),
    ({"messages": [TURN, ANSWER, TURN, ANSWER]}, ["user q", "assistant a", "user q"], "a", ["a"]),
    ({"conversations": [*SHAREGPT, {"from": "gpt", "value": "a"}]}, ["system s", "user q"], "a",
     ["a"]),
    ({"prompt": "q"}, ["user q"], None, []),
    ({"prompt": "q", "completion": None, "reference": "x"}, ["user q"], None, ["x"]),
    ({"prompt": "q", "completion": "a"}, ["user q"], "a", ["a"]),
    ({"prompt": "q", "response": "", "extra": 3}, ["user q"], "", []),
    ({"prompt": [TURN], "completion": [ANSWER]}, ["user q"], "a", ["a"]),
    ({"instruction": "i", "input": "q", "output": "a"}, ["user i\n\nq"], "a", ["a"]),
    ({"instruction": "i", "input": "", "output": "a"}, ["user i"], "a", ["a"]),
    ({"instruction": "i"}, ["user i"], None, []),
]  # fmt: skip


@pytest.mark.parametrize(("row", "asked", "response", "references"), ROWS, ids=lambda v: str(v))
def test_accepted_rows(row: dict, asked: list, response: str | None, references: list, tmp_path):
    """Each form of a row, through a file, to the same conversation."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n" + json.dumps(row) + "\n")
    (conversation,) = common.load_conversations(str(file))
    assert [f"{m['role']} {m['content']}" for m in conversation.messages] == asked
    assert (conversation.response or {}).get(
        "content"
    ) == response and conversation.references == references
    assert conversation.source == f"{file}:2"


BAD_ROWS = [
    ([], "object"),
    ({}, "messages"),
    ({"messages": []}, "no turn to answer"),
    ({"messages": [ANSWER]}, "no turn to answer"),
    ({"messages": [TURN, ANSWER, ANSWER]}, "two assistant turns"),
    ({"messages": [5]}, "role and content"),
    ({"messages": "q"}, "list"),
    ({"messages": [{"role": "user"}]}, "content of a user turn"),
    ({"messages": [{"content": "q"}]}, "role of a turn is None"),
    ({"prompt": {"text": "q"}}, "string, not dict"),
    ({"prompt": "q", "response": 5}, "object with role and content"),
    ({"prompt": "q", "response": ["a", "b"]}, "two assistant turns"),
    ({"prompt": "q", "references": "a"}, "references must be a list"),
    ({"prompt": "q", "references": [None]}, "a string, not NoneType"),
    ({"prompt": "q", "reference": 7}, "a string, not int"),
]


@pytest.mark.parametrize(("row", "what"), BAD_ROWS, ids=str)
def test_refused_rows_are_named(row: object, what: str, tmp_path):
    """File, line and what is missing; blank lines count as lines."""
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "q"}) + "\n\n" + json.dumps(row) + "\n")
    with pytest.raises(UsageError, match=what) as problem:
        common.load_conversations(str(file))
    assert str(problem.value).startswith(f"{file}:3: ")


def test_max_rows_reads_no_further(tmp_path):
    """--max-rows N takes the first N rows, and a fault behind them does not matter."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a"}\n{"prompt": "b"}\n{"prompt": 3}\n')
    rows = common.load_conversations(str(file), max_rows=2)
    assert [r.messages[0]["content"] for r in rows] == ["a", "b"]


def arguments(**changes: object) -> token_level.Arguments:
    return token_level.Arguments(**changes)


def held_out(tmp_path: Path, **changes: object) -> tuple[set[str], set[str]]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"word {i}"}) + "\n" for i in range(40)))
    train, evaluation = common.load_data(arguments(dataset=str(file), **changes))
    sets = tuple({r.messages[0]["content"] for r in rows} for rows in (train, evaluation))
    assert len(sets[0]) == len(train) and len(sets[1]) == len(evaluation)
    return sets


def test_held_out_rows(tmp_path):
    """Disjoint, complete, a function of the seed; a tenth unless --eval-size says otherwise."""
    everything = {f"word {i}" for i in range(40)}
    train, evaluation = held_out(tmp_path, seed=3)
    assert not train & evaluation and train | evaluation == everything and len(evaluation) == 4
    assert held_out(tmp_path, seed=3) == (train, evaluation)
    assert held_out(tmp_path, seed=4)[1] != evaluation
    larger = held_out(tmp_path, seed=3, eval_size=30)
    assert len(larger[1]) == 30 and not larger[0] & larger[1] and evaluation < larger[1]
    with pytest.raises(UsageError, match="--eval-size 40 holds out all"):
        held_out(tmp_path, eval_size=40)
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "x"}\n{"prompt": "y"}\n')
    train, evaluation = held_out(tmp_path, eval_dataset=str(own), eval_size=1)
    assert train == everything and evaluation == {"x"}


def test_embedded_rows_are_held_out():
    """The embedded data set brings its own, with references, none of which is trained on."""
    train, evaluation = common.load_data(arguments())
    assert len(evaluation) == 1000 and all(r.references for r in evaluation)
    words = [{r.messages[-1]["content"] for r in rows} for rows in (train, evaluation)]
    assert not words[0] & words[1]
    assert len(common.load_data(arguments(eval_size=7, max_rows=9))[0]) == 9
    assert len(common.load_data(arguments(eval_size=7, max_rows=9))[1]) == 7


# --------------------------------------------------------------------------------------- batches


def random_examples(count: int, seed: int = 0, vocabulary: int = 400) -> list[Example]:
    """Lengths from 3 to 20, and some positions of each are targets."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        length = int(torch.randint(3, 21, (), generator=draw))
        ids = torch.randint(5, vocabulary, (length,), generator=draw).tolist()
        first = int(torch.randint(1, length, (), generator=draw))
        examples.append(example_of(Tokens(ids, list(range(first, length))), i))
    return examples


@pytest.mark.parametrize("pad_id", [0, 1], ids=["pad", "pad == eos"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_padding_changes_no_hidden_state(kind: str, pad_id: int, tiny):
    """Hidden states of a padded batch are those of its examples alone, one before each target."""
    model = tiny(kind)
    examples = [e.student for e in random_examples(6)]
    batch = common.collate(examples, CPU, pad_id)
    assert (batch.input_ids == pad_id).any()
    with torch.no_grad():
        together = model.hidden_states(batch)
        alone = torch.cat([model.hidden_states(common.collate([e], CPU)) for e in examples])
        own = [
            model.model(input_ids=torch.tensor([e.ids])).logits[0, torch.tensor(e.targets) - 1]
            for e in examples
        ]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.head().logits(together), torch.cat(own), rtol=1e-4, atol=2e-4)
    assert batch.targets.tolist() == [e.ids[i] for e in examples for i in e.targets]
    assert batch.example.tolist() == [i for i, e in enumerate(examples) for _ in e.targets]
    assert batch.position.tolist() == [i - 1 for e in examples for i in e.targets]


def test_batch_without_examples_or_targets(tiny):
    """A process without a share still takes part: no target, no failure."""
    model = tiny("llama")
    for examples in ([], [Tokens([5, 6, 7], [])]):
        batch = common.collate(examples, CPU)
        assert model.hidden_states(batch).shape == (0, 32) and len(batch.targets) == 0


def sources_of(batches: Iterable[list[Example]]) -> list[str]:
    return [e.prompt.conversation.source for batch in batches for e in batch]


def micro_batches(
    examples: list[Example], args: token_level.Arguments, step: int
) -> tuple[list[list[Example]], int]:
    """This process's part of a step's global batch, and the target tokens of all of it."""
    return common.split_micro_batches(common.global_batch(examples, args, step), args)


def test_global_batch_is_a_function_of_seed_and_step():
    """Not of the order of calls, the micro-batch size or the number of processes."""
    examples = random_examples(30)
    args = arguments(batch_size=8, micro_batch_size=3, seed=5)
    first, tokens = micro_batches(examples, args, 2)
    assert [len(b) for b in first] == [3, 3, 2]
    micro_batches(examples, arguments(batch_size=8, seed=6), 7)
    again, _ = micro_batches(examples, args, 2)
    assert sources_of(again) == sources_of(first)
    for size in (0, 1, 8, 100):
        changed = arguments(batch_size=8, micro_batch_size=size, seed=5)
        batches, count = micro_batches(examples, changed, 2)
        assert sorted(sources_of(batches)) == sorted(sources_of(first)) and count == tokens
        assert len(batches) == {0: 1, 1: 8, 8: 1, 100: 1}[size]
    for changed, step in ((arguments(batch_size=8, seed=6), 2), (args, 3)):
        batches, _ = micro_batches(examples, changed, step)
        assert sorted(sources_of(batches)) != sorted(sources_of(first))


def test_every_example_once_an_epoch():
    """Also where the batch size does not divide the data set, or exceeds it."""
    examples = random_examples(10)
    for size in (4, 10, 25):
        args = arguments(batch_size=size, seed=1)
        drawn = [common.global_batch(examples, args, step) for step in range(100 // size)]
        counts = Counter(sources_of(drawn))
        assert set(counts.values()) == {10} and len(counts) == 10
    args = arguments(batch_size=10, seed=1)
    epochs = [sources_of([common.global_batch(examples, args, epoch)]) for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert all(sorted(epoch) == sorted(epochs[0]) for epoch in epochs)


@pytest.mark.parametrize("batch_size", [8, 7, 3, 1])
@pytest.mark.parametrize("processes", [2, 3])
def test_shares_of_processes(processes: int, batch_size: int, monkeypatch):
    """Disjoint and complete; equally many micro-batches; the tokens are those of the whole."""
    examples = random_examples(20)
    args = arguments(batch_size=batch_size, micro_batch_size=2)
    whole, tokens = micro_batches(examples, args, 1)
    shares = []
    for index in range(processes):
        state = SimpleNamespace(num_processes=processes, process_index=index)
        monkeypatch.setattr(common, "PartialState", lambda state=state: state)
        share, count = micro_batches(examples, args, 1)
        assert count == tokens
        assert all(len(micro_batch) <= 2 for micro_batch in share)
        shares.append(share)
    assert len({len(share) for share in shares}) == 1
    together = itertools.chain.from_iterable(map(sources_of, shares))
    assert sorted(together) == sorted(sources_of(whole))
    assert tokens == sum(len(e.student.targets) for batch in whole for e in batch)


def test_a_global_batch_without_targets_divides_by_one():
    """Empty answers, as a student may write, must not divide the loss by zero."""
    examples = [example_of(Tokens([5, 6, 7], []), i) for i in range(3)]
    batches, tokens = common.split_micro_batches(examples, arguments(micro_batch_size=0))
    assert tokens == 1 and sources_of(batches) == ["row 0", "row 1", "row 2"]


def test_length_batches_hold_every_example_once():
    """Padded to the longest of a batch, none exceeds the limit, unless one example does alone."""
    examples = random_examples(40, seed=2)
    batches = common.length_batches(examples, lambda e: len(e.student.ids), tokens=50)
    assert sorted(sources_of(batches)) == sorted(sources_of([examples]))
    sizes = [[len(e.student.ids) for e in batch] for batch in batches]
    assert all(len(size) * max(size) <= 50 for size in sizes)
    assert list(itertools.chain(*sizes)) == sorted(itertools.chain(*sizes))
    assert [len(b) for b in common.length_batches(examples[:3], lambda e: 99, tokens=50)] == [1] * 3


# ------------------------------------------------------------------------------------- gradients


def gradients(
    student: LanguageModel, teacher: LanguageModel, examples: list[Example], size: int
) -> tuple[dict[str, torch.Tensor], float]:
    """What token_level.main accumulates over a global batch in micro-batches of `size`."""
    args = arguments(batch_size=8, micro_batch_size=size, kl="jsd", temperature=2.0, ce_weight=0.3)
    module = token_level.TokenLevelLoss(student, teacher.head(), args.objective())
    student.model.zero_grad()
    batches, tokens = micro_batches(examples, args, 0)
    total = 0.0
    for micro_batch in batches:
        batch = common.collate([e.student for e in micro_batch], CPU)
        loss, _ = module(batch, common.teacher_hidden_states(teacher, micro_batch))
        (loss / tokens).backward()
        total += loss.item() / tokens
    return {n: p.grad.clone() for n, p in student.model.named_parameters()}, total


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_micro_batches_give_the_gradient_of_one_batch(kind: str, tiny):
    """Examples of 1 to 17 targets: 8 x 1, 4 x 2, 2 x 5 and 1 x 8 agree to 1e-5 of the norm."""
    student, teacher = tiny(kind, seed=1), tiny("llama", seed=2)
    examples = random_examples(8, seed=3)
    assert len({len(e.student.targets) for e in examples}) > 4
    whole, loss = gradients(student, teacher, examples, 8)
    norm = torch.cat([g.flatten() for g in whole.values()]).norm()
    assert norm > 1e-3
    for size in (1, 2, 5):
        parts, value = gradients(student, teacher, examples, size)
        difference = torch.cat([(parts[n] - whole[n]).flatten() for n in whole]).norm()
        assert difference / norm < 1e-5
        assert value == pytest.approx(loss, rel=1e-5)


def test_padded_vocabularies(tokenizer):
    """Heads of 512 and 448 rows over one tokenizer: compared on its ids, the others get nothing."""
    known = len(tokenizer.get_vocab())
    student, other = as_model(tokenizer, vocab_size=512), as_model(tokenizer, vocab_size=448)
    Pair(student, other).check_same_vocabulary()
    common.check_head(student)
    assert len(student.head().weight) == len(other.head().weight) == known
    assert student.vocabulary == known < 448
    examples = random_examples(8, seed=4, vocabulary=known)
    with torch.no_grad():
        student.model.lm_head.weight[known:] *= 100  # padding rows that would win every argmax
    padded, loss = gradients(student, other, examples, 2)
    assert padded["lm_head.weight"][known:].abs().max() == 0
    assert padded["lm_head.weight"][:known].abs().max() > 0

    inner = copy.deepcopy(student.model)
    inner.resize_token_embeddings(known)
    cut = language_model(inner, tokenizer, "cut")
    exact, value = gradients(cut, other, examples, 2)
    assert value == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(exact["lm_head.weight"], padded["lm_head.weight"][:known])
    for temperature in (0.0, 5.0):
        written = generate(
            student, [[5, 6]] * 20, list(range(20)), max_new_tokens=8, temperature=temperature
        )
        assert all(max(response.ids) < known for _, response in written)
