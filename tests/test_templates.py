"""Chat templates of many kinds: what is printed, what the student learns, and where it stops."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from byte_models import (
    CHATML,
    byte_pair,
    byte_tokenizer,
    llama,
    scripted,
    small_run,
    word_tokenizer,
    write,
    write_rows,
)
from conftest import language_model, run_in_process
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import common
import on_policy
import sequence_level
import token_level
from common import Completion, Conversation, LanguageModel, Pair

# A switch that the caller can set: without reasoning the cue holds an empty block already.
SWITCH = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
PLAIN = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(6)]


def trained_on(capsys: pytest.CaptureFixture[str]) -> int:
    """The number of target tokens that the run announced."""
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("training text"))
    return int(line.split(" target tokens")[0].split()[-1])


def test_template_file_replaces_the_models_own(tmp_path: Path):
    """--chat-template is used although both models have a template, and is saved with final/."""
    pair = byte_pair(tmp_path)
    other = tmp_path / "other.jinja"
    other.write_text(CHATML.replace("{{ m.content }}", "{{ m.content | upper }}"))
    rows = write_rows(tmp_path / "rows.jsonl", PLAIN)
    run_in_process(sequence_level, **small_run(tmp_path, *pair, rows, chat_template=str(other)))
    text = (tmp_path / "run/final/chat_template.jinja").read_text()
    assert text == other.read_text() != CHATML


@pytest.mark.parametrize("kwargs, block", [("{}", 19), ('{"enable_thinking": false}', 0)])
def test_template_kwargs(tmp_path: Path, capsys, kwargs: str, block: int):
    """The empty block of 19 bytes is in the prompt if thinking is off, else the student learns it,
    beside the 8 bytes of "It is 0." and an end token."""
    pair = byte_pair(tmp_path, SWITCH)
    rows = write_rows(tmp_path / "rows.jsonl", PLAIN)
    run_in_process(sequence_level, **small_run(tmp_path, *pair, rows, template_kwargs=kwargs))
    assert trained_on(capsys) == 6 * (block + 8 + 1)


def test_template_kwargs_reach_the_teachers_prompts(tmp_path: Path):
    """Another switch, other prompts: text is not found in the cache of the first run."""
    pair = byte_pair(tmp_path, SWITCH)
    rows = write_rows(tmp_path / "rows.jsonl", PLAIN)
    for name, kwargs in (("a", "{}"), ("b", '{"enable_thinking": false}')):
        flags = {"output_dir": str(tmp_path / name), "template_kwargs": kwargs}
        run = small_run(tmp_path, *pair, rows, completions="teacher", **flags)
        run_in_process(sequence_level, **run)
    paths = (tmp_path / "cache/text").glob("*.jsonl")
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    # Six training prompts, and one for evaluation of which a second sample is another key.
    assert len({line["key"] for line in lines}) == 2 * (6 + 2)


@pytest.mark.parametrize("kwargs", ["[1]", "{", "3"])
def test_template_kwargs_that_are_no_object(tmp_path: Path, kwargs: str):
    with pytest.raises(common.UsageError, match="--template-kwargs"):
        common.check_arguments(sequence_level.Arguments(template_kwargs=kwargs))


def model_of(tokenizer: PreTrainedTokenizerFast, name: str = "tiny") -> LanguageModel:
    return language_model(llama(tokenizer), tokenizer, name)


def row(*texts: str, **options: object) -> Conversation:
    """User and assistant in turn; the last text is the data set's own answer."""
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)
    ]
    return Conversation(turns[:-1], turns[-1], [], "rows.jsonl:1", options)


def examples_of(
    conversation: Conversation, student: LanguageModel, teacher: LanguageModel | None = None
) -> common.Example:
    """The example of a row's own answer."""
    pair = Pair(student, teacher or student)
    prompts = common.tokenize_prompts([conversation], pair, 900)
    ((example,), _) = common.dataset_examples(prompts, pair, 900)
    return example


def learned(model: LanguageModel, tokens: common.Tokens) -> str:
    return model.tokenizer.decode([tokens.ids[i] for i in tokens.targets])


def read(model: LanguageModel, tokens: common.Tokens) -> str:
    return model.tokenizer.decode(tokens.ids)


# ------------------------------------------------------------------------------------ end of turn

# Nothing follows an answer: the next turn's role ends it.
NO_END = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ALPACA = (  # words only; a line end follows an answer
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SEPARATED = (  # an end stands between turns, none after the last
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    "template", [NO_END, ALPACA, MARKED, SEPARATED], ids=["none", "words", "marks", "between"]
)
def test_every_answer_ends_in_a_token_that_stops(template: str):
    """The tokenizer's own end is the last target where the template prints none; "" ends too."""
    model = model_of(byte_tokenizer(template))
    for answers in (("yes",), ("yes", "more?", "fin")):
        example = examples_of(row("ask", *answers), model)
        assert model.end_ids[0] == example.student.ids[-1] == 1
        assert example.student.targets[-1] == len(example.student.ids) - 1
        assert learned(model, example.student).rstrip("\n").endswith(
            answers[-1] + "<|im_end|>"
        ) or (template == ALPACA and learned(model, example.student).endswith("\n\n<|im_end|>"))


def test_the_end_is_known_whatever_the_template_makes_of_an_answer():
    """In capitals, trimmed, or ended by an added token that is not special."""
    loud = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    assert common.end_of_turn_ids(byte_tokenizer(loud)) == [1]
    parts = byte_tokenizer(  # the first closes a part of the answer
        CHATML.replace("{{ m.content }}", "<|part|>{{ m.content }}<|part|>answer")
    )
    parts.add_special_tokens({"additional_special_tokens": ["<|part|>"]})
    assert common.end_of_turn_ids(parts) == [1]
    named = byte_tokenizer(CHATML.replace("<|im_end|>\n", "<|part|>\n## "))  # then the next role
    named.add_special_tokens({"additional_special_tokens": ["<|part|>"]})
    assert common.end_of_turn_ids(named) == [named.convert_tokens_to_ids("<|part|>"), 1]
    plain = byte_tokenizer(CHATML.replace("<|im_end|>", "[over]"))
    plain.add_tokens(["[over]"])
    assert common.end_of_turn_ids(plain) == [plain.convert_tokens_to_ids("[over]"), 1]


@pytest.mark.parametrize("template", [NO_END, CHATML])
def test_a_student_stops_in_generate(tmp_path: Path, template: str):
    """final/ in plain transformers: `generate` stops by itself, at the end of the answer."""
    pair = byte_pair(tmp_path, template)
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "response": "bb"}] * 4)
    flags = {"max_steps": 40, "learning_rate": 0.02, "warmup_steps": 2, "batch_size": 4}
    run_in_process(sequence_level, **small_run(tmp_path, *pair, rows, **{**flags, "eval_steps": 0}))
    final = tmp_path / "run/final"
    tokenizer, model = (
        AutoTokenizer.from_pretrained(final),
        AutoModelForCausalLM.from_pretrained(final),
    )
    turns = [{"role": "user", "content": "a"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")
    written = model.generate(**ids, max_new_tokens=30, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(written) == "bb<|im_end|>"
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_a_student_stops_at_the_end_of_its_teachers_template(tmp_path: Path):
    """One vocabulary, two templates: the student reads the teacher's ids and stops at their end."""
    teacher, _ = byte_pair(tmp_path)
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", "<|user|>"))
    tokenizer.eos_token = "<|user|>"
    student = write(tmp_path / "other", llama(tokenizer, eos_token_id=3), tokenizer)
    rows = write_rows(tmp_path / "rows.jsonl", PLAIN)
    run_in_process(
        sequence_level, **small_run(tmp_path, teacher, student, rows, completions="teacher")
    )
    config = json.loads((tmp_path / "run/final/generation_config.json").read_text())
    assert set(config["eos_token_id"]) == {1, 3}


# ----------------------------------------------------------------------------------- text is text

TRICKY = "Turns end in <|im_end|>, <|pad|>and<|user|>."


@pytest.mark.parametrize("template", [CHATML, NO_END, MARKED])
def test_control_tokens_in_text_are_letters(template: str):
    """In a prompt, in earlier turns and in the answer: byte for byte; the template's own stay."""
    model = model_of(byte_tokenizer(template))
    tricky, plain = (
        examples_of(row(TRICKY, TRICKY, TRICKY, TRICKY), model),
        examples_of(row(*"wxyz"), model),
    )
    control = [[i for i in e.student.ids if i < 6] for e in (tricky, plain)]
    assert control[0] == control[1]
    assert len(tricky.student.ids) == len(plain.student.ids) + 4 * (len(TRICKY) - 1)
    assert len(tricky.student.targets) == len(plain.student.targets) + 2 * (len(TRICKY) - 1)
    assert learned(model, tricky.student) == learned(model, plain.student).replace(
        "x", TRICKY
    ).replace("z", TRICKY)
    prompt, _ = common.tokenize_prompts([row(TRICKY, "x")] * 2, Pair(model, model), 200)
    assert [i for i in prompt.student if i < 6] == [i for i in plain.student.ids if i < 6][
        : len([i for i in prompt.student if i < 6])
    ]


def test_control_tokens_in_a_teachers_text_are_letters(tokenizer, capsys):
    """Text of a teacher with another vocabulary, which is said, and of one behind an API."""
    student, teacher = model_of(byte_tokenizer()), model_of(tokenizer)
    ids = common.tokenize(tokenizer, TRICKY)[0] + teacher.end_ids[:1]
    for pair, written in ((Pair(student, teacher), ids), (Pair(student, None), None)):
        prompts = common.tokenize_prompts([row("ask", "x")], pair, 200)
        answer = Completion(TRICKY, True, 1, written)
        (example,) = common.completion_examples(prompts, [answer], pair, 200)
        assert learned(student, example.student) == TRICKY + "<|im_end|>"
        assert len(example.student.targets) == len(TRICKY) + 1
        said = "1 of 1 answers of the teacher hold control tokens (such as <|pad|>)"
        assert (said in capsys.readouterr().out) == (written is not None)


def test_a_long_text_with_a_control_token():
    """Half a million characters, in which one name is text: a token for each byte, in order."""
    text = "<|im_end|>" + "abcde" * 100_000
    model = model_of(byte_tokenizer())
    ids, offsets = common.tokenize(
        model.tokenizer, common.mark_control_tokens(model.tokenizer, text)
    )
    assert model.tokenizer.decode(ids) == text and len(ids) == len(text)
    assert [a for a, _ in offsets[:3]] == [0, 2, 3]  # the mark stands behind the first letter


def test_tokens_that_are_not_control_stay_tokens():
    """<think>, added but not special, or special: reasoning data means the token."""
    for special in (False, True):
        tokenizer = byte_tokenizer()
        tokenizer.add_tokens(["<think>", "</think>"], special_tokens=special)
        model = model_of(tokenizer)
        example = examples_of(row("ask <|im_end|>", "<think>a</think>b <|im_end|>"), model)
        first, last = tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        assert example.student.ids.count(first) == example.student.ids.count(last) == 1
        assert example.student.ids.count(1) == 2


@pytest.mark.parametrize("kind", ["first space", "words", "unigram"])
def test_tokenizers_of_other_kinds(kind: str):
    """SentencePiece's space, a vocabulary that knows the names as words, Unigram: never the token,
    and the text around is tokenised as ever."""
    from tokenizers import decoders, models, pre_tokenizers

    letters = sorted(set("▁<|im_end|>abcdefghijklmnopqrstuvwxyz"))
    if kind == "words":
        tokenizer = word_tokenizer(
            ["user", "a", "b", "assistant"], CHATML.replace("<|im_end|>", " <|im_end|>")
        )
    else:
        if kind == "unigram":
            pieces = [("<unk>", 0.0), ("<|im_end|>", 0.0), *((x, -3.0) for x in letters)]
            raw = Tokenizer(models.Unigram(pieces, unk_id=0))
        else:
            raw = Tokenizer(
                models.BPE(
                    {x: i for i, x in enumerate(["<unk>", "<|im_end|>", *letters])},
                    [],
                    unk_token="<unk>",
                )
            )
        raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        raw.decoder = decoders.Metaspace(prepend_scheme="first")
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, eos_token="<|im_end|>", unk_token="<unk>"
        )
        tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    model = model_of(tokenizer)
    example = examples_of(row("a <|im_end|> b", "b <|im_end|> a"), model)
    plain = examples_of(row("a xx b", "b xx a"), model)
    end = tokenizer.eos_token_id
    assert example.student.ids.count(end) == plain.student.ids.count(end) == 2
    if kind != "words":  # which has no letters
        assert read(model, example.student).count("<|im_end|>") == 4
        assert "".join(tokenizer.convert_ids_to_tokens(example.student.ids)) == (
            "▁a▁<|im_end|>▁b<|im_end|>b▁<|im_end|>▁a<|im_end|>"
        )


# --------------------------------------------------------------------- what the cue gives of a text

THINK_CUE = CHATML.replace("assistant\n", "assistant\n<think>\n")
# As R1's: of an answer, only what follows the reasoning is rendered.
FORGETFUL = THINK_CUE.replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1].lstrip('\n') }}"
)
# As Qwen3's: reasoning is printed for the last turn alone, always with tags.
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n' }}{% if '</think>' in m.content %}"
    "{{ m.content.split('</think>')[0].split('<think>')[-1].strip('\n') }}{% endif %}"
    "{{ '\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_CUE = QWEN3.replace("assistant\n{%", "assistant\n<think>\n{%")
# As Nemotron 3's: earlier turns have an empty block, which is no role's name.
EMPTY_BLOCKS = THINK_CUE.replace(
    "\n{{ m.content }}",
    "\n{% if m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip('\n') }}",
)
# As R1's, with the marks that trainers add: the marked text does not begin with the cue's tag.
MARKED_CUE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ '\n' + m.content }}<|im_end|>{% endgeneration %}{% else %}{{ '\n' + m.content }}<|im_end|>"
    "{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
REASONED = "<think>\nhm\n</think>\n\nfour"


@pytest.mark.parametrize("text", [REASONED, "hm\n</think>\n\nfour"], ids=["both tags", "one tag"])
@pytest.mark.parametrize(
    "template",
    [CHATML, THINK_CUE, FORGETFUL, QWEN3, QWEN3_CUE, EMPTY_BLOCKS, MARKED_CUE],
    ids=["plain", "cue", "r1", "qwen3", "qwen3 cue", "empty blocks", "marked cue"],
)
def test_reasoning_in_a_single_turn(template: str, text: str):
    """Prompt and targets are the whole answer, with each tag once; the cue's part is no target."""
    model = model_of(byte_tokenizer(template))
    example = examples_of(row("ask", text), model)
    whole = read(model, example.student)
    assert whole.rstrip("\n").endswith(f"assistant\n{REASONED}<|im_end|>")
    opened = "<think>\n" if template not in (CHATML, QWEN3) else ""
    assert learned(model, example.student) == REASONED.removeprefix(opened) + "<|im_end|>"


@pytest.mark.parametrize("template", [THINK_CUE, EMPTY_BLOCKS, MARKED_CUE])
def test_an_answer_without_reasoning_after_a_cue_that_opens_it(template: str):
    """The reasoning is closed, empty, rather than the answer be written inside it."""
    model = model_of(byte_tokenizer(template))
    example = examples_of(row("ask", "four"), model)
    assert learned(model, example.student) == "\n</think>\n\nfour<|im_end|>"
    assert read(model, example.student).endswith("assistant\n<think>\n\n</think>\n\nfour<|im_end|>")


def test_reasoning_in_a_field_after_a_cue_that_opens_it():
    """A template that does not print the field: the answer is written as the model would."""
    model = model_of(byte_tokenizer(THINK_CUE))
    talk = row("ask", "four")
    talk.response["reasoning_content"] = "hm"
    assert learned(model, examples_of(talk, model).student) == "hm\n</think>\n\nfour<|im_end|>"


@pytest.mark.parametrize("block", ["<think>\n\n</think>\n\n", "<think></think>", ""])
@pytest.mark.parametrize("source", ["rows", "api"])
def test_an_answer_after_a_cue_that_has_closed_reasoning(block: str, source: str):
    """An empty block is not written twice, and a row with reasoning is refused."""
    model = model_of(byte_tokenizer(SWITCH))

    def example_of(text: str) -> common.Example:
        talk = row("ask", text, enable_thinking=False)
        if source == "rows":
            return examples_of(talk, model)
        pair = Pair(model, None)
        prompts = common.tokenize_prompts([talk], pair, 900)
        answers = [Completion(text, True, 9, None)]
        return common.completion_examples(prompts, answers, pair, 900)[0]

    example = example_of(f"{block}four")
    assert learned(model, example.student) == "four<|im_end|>"
    ends = "<|im_start|>assistant\n<think>\n\n</think>\n\nfour<|im_end|>"
    assert read(model, example.student).rstrip("\n").endswith(ends)
    if source == "api":  # what a teacher has written does not end the run
        assert learned(model, example_of(REASONED).student) == REASONED + "<|im_end|>"
    else:
        for text in (REASONED, "<think>hm</think>four"):
            with pytest.raises(common.UsageError, match=r"rows.jsonl:1: the answer reasons"):
                example_of(text)


def test_every_example_begins_with_its_prompt():
    """Where a token spans their boundary too: earlier answers and calls are learned as well."""
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>", "{{ m.tool_calls }}<|im_end|>"))
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["ĊĊ"] = 262
    state["model"]["merges"] = [["Ċ", "Ċ"]]  # two line ends are one token
    backend = Tokenizer.from_str(json.dumps(state))
    joined = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    joined.chat_template = tokenizer.chat_template
    model = model_of(joined)
    calls = [{"type": "function", "function": {"name": "look"}}]
    for answer in ("\nfour", "\n\nfour", "four"):
        for more in ({}, {"tool_calls": calls}):
            talk = row("ask", "\none", "again", answer)
            talk.response.update(more)
            (prompt,) = common.tokenize_prompts([talk], Pair(model, model), 900)
            example = examples_of(talk, model).student
            assert example.ids[: len(prompt.student)] == prompt.student
            said = f"{answer}{calls if more else ''}<|im_end|>"
            assert learned(model, example).endswith(f"one<|im_end|>{said}")


def test_marked_turns_are_compared_with_what_was_said(capsys):
    """A template that marks earlier turns without their reasoning: only the last is learned."""
    marked = MARKED.replace(
        "{{ m.content }}{% endgen",
        "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}"
        "{% endif %}{% endgen",
    )
    model = model_of(byte_tokenizer(marked))
    example = examples_of(row("ask", REASONED, "again", REASONED), model)
    assert learned(model, example.student) == f"{REASONED}<|im_end|>"
    assert "only the last answer" in capsys.readouterr().out


def test_marks_that_hold_a_part_of_the_cue():
    """The line end before an answer is the cue's."""
    template = CHATML.replace(
        "{{ m.role }}\n{{ m.content }}<|im_end|>",
        "{{ m.role }}{% if m.role == 'assistant' %}{% generation %}{{ '\n' + m.content }}<|im_end|>"
        "{% endgeneration %}{% else %}{{ '\n' + m.content }}<|im_end|>{% endif %}",
    )
    model = model_of(byte_tokenizer(template))
    talk = row("ask", "four")
    assert learned(model, examples_of(talk, model).student).endswith("four<|im_end|>")
    assert not learned(model, examples_of(talk, model).student).startswith("\n")


@pytest.mark.parametrize("template, turns", [(QWEN3, 1), (FORGETFUL, 1), (CHATML, 2)])
def test_templates_that_rewrite_earlier_turns(template: str, turns: int, capsys):
    """Only the last answer is learned, and the run says so; else every answer is."""
    model = model_of(byte_tokenizer(template))
    example = examples_of(row("ask", REASONED, "again", REASONED), model)
    assert learned(model, example.student).count("<|im_end|>") == turns
    assert learned(model, example.student).endswith("hm\n</think>\n\nfour<|im_end|>")
    assert ("only the last answer" in capsys.readouterr().out) == (turns == 1)


CUES = {
    "plain": CHATML,
    "think": THINK_CUE,
    "role": CHATML.replace("<|im_start|>assistant\n", "<bot>\n").replace(
        "<|im_start|>{{ m.role }}\n", "{{ '<bot>\n' if m.role == 'assistant' else '<human>\n' }}"
    ),
}


@pytest.mark.parametrize("student", CUES)
@pytest.mark.parametrize("teacher", CUES)
@pytest.mark.parametrize("source", ["shared", "other vocabulary", "api", "rows"])
def test_what_a_cue_gives_is_carried_across(teacher: str, student: str, source: str, tokenizer):
    """Every pair of cues, from every source: both models read the whole answer, and learn from the
    same text. A role is no tag, and a teacher that does not know the tag is refused."""
    ours = model_of(byte_tokenizer(CUES[student]))
    theirs = model_of(byte_tokenizer(CUES[teacher]))
    if source == "other vocabulary":
        other = AutoTokenizer.from_pretrained(common.DATA / "teacher")
        other.chat_template = CUES[teacher]
        theirs = model_of(other)
    pair = Pair(ours, None if source == "api" else theirs)
    if source != "api":
        if student == "think" != teacher:
            with pytest.raises(common.UsageError, match="does not write"):
                common.share_tag(pair)
            return
        common.share_tag(pair)
    prompts = common.tokenize_prompts([row("ask", REASONED)], pair, 900)
    opened = "think" in ((student,) if source == "api" else (student, teacher))
    assert prompts[0].given == "<think>\n" * opened
    if source == "rows":
        ((example,), _) = common.dataset_examples(prompts, pair, 900)
    else:
        raw = REASONED.removeprefix("<think>\n" * (teacher == "think"))
        ids = common.tokenize(theirs.tokenizer, raw)[0] + theirs.end_ids[:1]
        answer = Completion(raw, True, len(ids), None if source == "api" else ids)
        (example,) = common.completion_examples(prompts, [answer], pair, 900)
    assert example.text == REASONED
    target = REASONED.removeprefix("<think>\n" * opened) + "<|im_end|>"
    assert learned(ours, example.student) == target
    assert read(ours, example.student).rstrip("\n").endswith(f"\n{REASONED}<|im_end|>")
    if source != "api":
        assert REASONED in read(theirs, example.teacher)
        assert learned(theirs, example.teacher).startswith(target[:3])


def test_templates_that_print_an_answer_differently(tokenizer):
    """Two vocabularies are compared by text: both read what a model would write of the answer. What
    only one prints before it stays."""
    other = AutoTokenizer.from_pretrained(common.DATA / "teacher")
    printed = QWEN3.replace("</think>\n\n", "</think>\n")
    other.chat_template = printed.replace("<|im_end|>", "<|end|>")
    ours, theirs = model_of(byte_tokenizer(QWEN3)), model_of(other)
    example = examples_of(row("ask", REASONED), ours, theirs)
    assert learned(ours, example.student) == REASONED + "<|im_end|>"
    assert learned(theirs, example.teacher).startswith(REASONED)
    plain = model_of(byte_tokenizer(CHATML))
    trimmed = model_of(byte_tokenizer(CHATML.replace("m.content", "m.content | trim")))
    other = AutoTokenizer.from_pretrained(common.DATA / "teacher")
    other.chat_template = CHATML.replace("<|im_end|>", "<|end|>")
    example = examples_of(row("ask", "one", "more", "four\n"), trimmed, model_of(other))
    assert learned(trimmed, example.student) == "one<|im_end|>four<|im_end|>"
    example = examples_of(row("ask", "four"), plain, theirs)
    assert learned(plain, example.student) == "four<|im_end|>"
    assert learned(theirs, example.teacher).startswith("<think>\n\n</think>\nfour")


def test_tags_in_brackets():
    """One that opens an answer, and one that is a role's name."""
    cue = CHATML.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n[THINK]{% endif %}"
    )
    assert model_of(byte_tokenizer(cue)).opens == "[THINK]"
    named = CHATML.replace("<|im_start|>assistant\n", "[BOT] ").replace(
        "<|im_start|>{{ m.role }}\n", "{{ '[BOT] ' if m.role == 'assistant' else '[ASK] ' }}"
    )
    assert model_of(byte_tokenizer(named)).opens == ""


def test_reasoning_of_an_earlier_turn_that_is_not_printed():
    """After a cue that opens it the last turn's is written, but an earlier turn's would be lost."""
    model = model_of(byte_tokenizer(EMPTY_BLOCKS))
    talk = row("ask", "four", "again", "five")
    talk.messages[1]["reasoning_content"] = "hm"
    with pytest.raises(common.UsageError, match="does not print the reasoning_content of turn 2"):
        examples_of(talk, model)


@pytest.mark.parametrize(
    "template",
    [
        CHATML + "{#- the end of generation -#}",
        MARKED.replace(
            "{% generation %}{{ m.content }}", "{% generation %}{{ m.content | tojson }}"
        ),
    ],
    ids=["no marks", "marks around other text"],
)
def test_earlier_answers_are_learned(template: str):
    model = model_of(byte_tokenizer(template))
    example = examples_of(row("ask", "four", "again", "five"), model)
    assert all(word in learned(model, example.student) for word in ("four", "five"))


def test_turns_that_a_template_changes_are_printed():
    """A tool's result as JSON after an earlier call that hides what was said with it."""
    template = CHATML.replace(
        "{{ m.content }}<|im_end|>",
        "{% if m.tool_calls %}[call {{ m.tool_calls[0].function.name }}]"
        "{% elif m.role == 'tool' %}{{ m.content | tojson }}"
        "{% elif m.role == 'user' %}{{ m.content | upper }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>",
    )
    model = model_of(byte_tokenizer(template))
    talk = row("ask", "Let me look.", "so", "four")
    talk.messages[1]["tool_calls"] = [{"type": "function", "function": {"name": "look"}}]
    talk.messages[2] = {"role": "tool", "content": '{"t": 5}'}
    assert learned(model, examples_of(talk, model).student).endswith("four<|im_end|>")


@pytest.mark.parametrize("script", [sequence_level, token_level, on_policy])
@pytest.mark.parametrize("opens", ["teacher", "student"])
def test_runs_with_a_cue_on_one_side(tmp_path: Path, script: ModuleType, opens: str, capsys):
    """A teacher that writes `two and </think> four`, or the same after `<think>`."""
    words, names = ["two", "and", "four", "ask", "so"], ["user", "assistant"]
    cue = (
        "{% for m in messages %}<|im_start|> {{ m.role }} {{ m.content }} <|im_end|> {% endfor %}"
        "{% if add_generation_prompt %}<|im_start|> <|assistant|>"
    )
    made = {}
    for name in ("teacher", "student"):
        end = " <think>{% endif %}" if name == opens else "{% endif %}"
        made[name] = word_tokenizer(words + names, cue + end, added=("<think>", "</think>"))
    first = "<think>" if opens == "teacher" else "<|assistant|> <think>"
    said = made["teacher"](f"{first} two and </think> four", add_special_tokens=False)["input_ids"]
    pair = (
        write(tmp_path / "t", scripted(made["teacher"], said), made["teacher"]),
        write(tmp_path / "s", llama(made["student"]), made["student"]),
    )
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "ask"}, {"prompt": "so"}] * 3)
    run_in_process(script, **small_run(tmp_path, *pair, rows, completions="teacher"))
    if script is sequence_level:
        lines = (tmp_path / "run/completions.jsonl").read_text().splitlines()
        texts = [json.loads(line)["messages"][-1]["content"] for line in lines]
        assert {"".join(text.split()) for text in texts} == {"<think>twoand</think>four"}
        tokens = capsys.readouterr().out.split(" target tokens")[0].split()[-1]
        assert int(tokens) == len(texts) * 5  # four words and the end: the cue gives the tag
        final = AutoTokenizer.from_pretrained(tmp_path / "run/final")
        turns = [{"role": "user", "content": "ask"}]
        cue = final.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert cue.endswith("<think>")
