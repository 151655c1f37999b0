"""Rows as people have them: columns of public data sets, message fields, roles, held-out prompts.

What a row of any form trains on is read off the targets of a model with one token for each byte.
"""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from byte_models import CHATML, byte_pair, byte_tokenizer, llama, small_run, write_rows
from conftest import language_model, run_in_process

import common
import sequence_level
import token_level
from common import Conversation, LanguageModel, Pair, UsageError

TOOLS = (
    "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[call {{ c.function.name }} "
    "{{ c.function.arguments | tojson }}]{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Looks at the first turn, as templates with a default system text do.
FIRST_TURN = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    + CHATML
)
# Insists that a turn without calls has content, as Mistral's newer ones do.
STRICT = TOOLS.replace(
    "{% for c in",
    "{% if not m.content and not m.tool_calls %}{{ raise_exception('an empty turn') }}{% endif %}"
    "{% for c in",
    1,
)
ADD = {"name": "add", "description": "a sum", "parameters": {"type": "object"}}
TOOL = {"type": "function", "function": ADD}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 3}}}
CALLED = '[call add {"a": 2, "b": 3}]'
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.fixture(scope="module")
def models() -> dict[str, LanguageModel]:
    """A byte-level model for each template."""
    templates = {"plain": CHATML, "tools": TOOLS, "reasoning": REASONING, "first": FIRST_TURN,
                 "strict": STRICT}  # fmt: skip
    tokenizers = {name: byte_tokenizer(template) for name, template in templates.items()}
    return {name: language_model(llama(t), t, name) for name, t in tokenizers.items()}


def load(path: Path, *rows: Any) -> list[Conversation]:
    return common.load_conversations(write_rows(path / "rows.jsonl", list(rows)))


def learned(
    model: LanguageModel, rows: list[Conversation], limit: int = 20_000
) -> list[tuple[str, str]]:
    """For each row the whole text that the model reads, and its targets."""
    pair = Pair(model, model)
    examples, _ = common.dataset_examples(common.tokenize_prompts(rows, pair, limit), pair, limit)
    decode = model.tokenizer.decode
    return [
        (decode(e.student.ids), decode([e.student.ids[i] for i in e.student.targets]))
        for e in examples
    ]


def chatml(*turns: str) -> str:
    return "".join("<|im_start|>{}\n{}<|im_end|>\n".format(*turn.split(" ", 1)) for turn in turns)


# --------------------------------------------------------------------------------------- columns

# A row of each card, cut short, and what is to be read of it.
PUBLIC = {
    "Alpaca": ({"instruction": "i", "input": "x", "output": "a", "text": "Below is"}, "user i\n\nx",
               {"text"}),
    "Alpaca of LLaMA-Factory": (
        {"instruction": "i", "input": "", "output": "a", "system": "s", "history": [["h", "y"]]},
        "system s|user h|assistant y|user i", set()),
    "Dolly": ({"instruction": "i", "context": "c", "response": "a", "category": "qa"},
              "user i\n\nc", {"category"}),
    "GPTeacher": ({"instruction": "i", "input": "", "response": "a"}, "user i", set()),
    "OpenHermes": (
        {"conversations": [{"from": "system", "value": "s", "weight": None},
                           {"from": "human", "value": "q", "weight": 0.0},
                           {"from": "gpt", "value": "a", "weight": 1.0}],
         "system_prompt": None, "source": "x"},
        "system s|user q", {"source"}),
    "OpenOrca": ({"id": "1", "system_prompt": "s", "question": "q", "response": "a"},
                 "system s|user q", {"id"}),
    "OpenOrca without system": ({"system_prompt": "", "question": "q", "response": "a"}, "user q",
                                set()),
    "UltraChat 200k": ({"prompt": "q", "prompt_id": "1", "messages": [USER, ANSWER]}, "user q",
                       {"prompt", "prompt_id"}),
    "no_robots": ({"prompt": "q", "messages": [USER, ANSWER], "category": "Chat"}, "user q",
                  {"prompt", "category"}),
    "Tulu": ({"id": "1", "messages": [USER, ANSWER], "source": "x"}, "user q", {"id", "source"}),
    "MetaMath": ({"query": "q", "response": "a", "type": "t", "original_question": "o"}, "user q",
                 {"type", "original_question"}),
    "GSM8K": ({"question": "q", "answer": "a"}, "user q", set()),
    "NuminaMath": ({"problem": "q", "solution": "a", "source": "x"}, "user q", {"source"}),
    "LIMA": ({"conversations": ["q", "b", "r", "a"], "source": "x"},
             "user q|assistant b|user r", {"source"}),
    "Magpie": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
                "instruction": "q", "response": "a"}, "user q", {"instruction", "response"}),
    "OpenThoughts": ({"system": "s", "conversations": [{"from": "user", "value": "q"},
                                                       {"from": "assistant", "value": "a"}]},
                     "system s|user q", set()),
    "LMSYS": ({"conversation": [USER, ANSWER], "turn": 1}, "user q", {"turn"}),
    "TRL": ({"prompt": [USER], "completion": [ANSWER]}, "user q", set()),
    "preferences": ({"prompt": "q", "response": "a", "chosen": "c", "rejected": "r"}, "user q",
                    {"chosen", "rejected"}),
    "input and output": ({"input": "q", "output": "a"}, "user q", set()),
    "MATH-500": ({"problem": "q", "solution": "a", "answer": "204", "level": 2}, "user q",
                 {"level"}),
    "an empty result": ({"problem": "q", "solution": "a", "answer": ""}, "user q", {"answer"}),
    "an empty solution": ({"problem": "q", "solution": "", "answer": "a"}, "user q", {"solution"}),
    "Nemotron": ({"input": [USER], "output": "a", "system_prompt": "s"}, "system s|user q", set()),
    "a result beside an answer": (
        {"question": "q", "response": "a", "answer": "204"}, "user q", {"answer"}),
    "a list of results": ({"problem": "q", "solution": "a", "answer": ["204"]}, "user q", set()),
    "SQuAD": ({"question": "q", "context": "c", "answer": "a", "answers": {"text": ["a"]}},
              "user q\n\nc", {"answers"}),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLIC)
def test_rows_of_public_data_sets(name: str, tmp_path: Path, capsys, models):
    """Prompt and target of each card's row; every column that is not used is named."""
    row, prompt, unused = PUBLIC[name]
    rows = load(tmp_path, row)
    (text, targets), *_ = learned(models["plain"], rows)
    assert text == chatml(*prompt.split("|"), "assistant a")
    assert targets.endswith("a<|im_end|>")
    assert rows[0].references == ["204" if name in ("MATH-500", "a list of results") else "a"]
    line = next((x for x in capsys.readouterr().out.splitlines() if "columns" in x), "{}")
    assert json.loads(line[line.index("{") :].replace("'", '"')) == dict.fromkeys(unused, 1)


def test_unused_columns_are_named_once(tmp_path: Path, capsys):
    """With the number of rows that have them; a null is none."""
    rows = [{"prompt": "q", "level": i or None, "x\ud800": 1} for i in range(5)]
    load(tmp_path, *rows)
    out = capsys.readouterr().out
    assert out.count("not used") == 1 and "'level': 4" in out and "'x\\ud800': 5" in out
    load(tmp_path, {"messages": [USER, ANSWER], "references": ["x"], "tools": [TOOL]})
    assert "not used" not in capsys.readouterr().out


@pytest.mark.parametrize("tools", [[TOOL], [ADD], json.dumps([ADD]), [json.dumps(TOOL)]], ids=str)
def test_tools_reach_the_template(tools: Any, tmp_path: Path, models):
    """As a list or as text, in OpenAI's form or bare; a row's own template arguments too."""
    (row,) = load(tmp_path, {"messages": [USER, ANSWER], "tools": tools})
    ((text, _),) = learned(models["tools"], [row])
    assert text == chatml(f"system Tools: {json.dumps([TOOL])}", "user q", "assistant a")
    (row,) = load(tmp_path, {"prompt": "q", "tools": "[]", "chat_template_kwargs": {"x": 1}})
    assert row.options == {"x": 1}
    given = {"role": "system", "content": "s", "tools": [TOOL]}  # of the first turn: the row's
    ((text, _),) = learned(models["tools"], load(tmp_path, {"messages": [given, USER, ANSWER]}))
    assert text == chatml(
        f"system Tools: {json.dumps([TOOL])}", "system s", "user q", "assistant a"
    )


def test_messages_that_begin_with_system_keep_theirs(tmp_path: Path, capsys, models):
    system = {"role": "system", "content": "mine"}
    rows = load(tmp_path, {"messages": [system, USER, ANSWER], "system": "other"})
    assert learned(models["plain"], rows)[0][0] == chatml("system mine", "user q", "assistant a")
    assert "'system': 1" in capsys.readouterr().out


def test_completion_of_several_turns(tmp_path: Path, models):
    """TRL's rows for agents: a call, its result and the answer, of which two are learned."""
    completion = [
        {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}, ANSWER,
    ]  # fmt: skip
    rows = load(tmp_path, {"prompt": [USER], "completion": completion})
    ((_, targets),) = learned(models["tools"], rows)
    assert targets == f"{CALLED}<|im_end|>a<|im_end|>"


BAD = [
    ({"prompt": "q", "history": [["a"]]}, "no turn to answer"),
    ({"prompt": "q", "history": "x"}, "history must be a list"),
    ({"prompt": [USER], "history": [["a", "b"]]}, "role of a turn is None"),
    ({"messages": [USER, "a"]}, "role of a turn is None"),
    ({"prompt": "q", "tools": "add(a, b)"}, "tools must be a list"),
    ({"prompt": "q", "tools": [{"type": "function"}]}, "the name of a tool"),
    ({"prompt": "q", "tools": [5]}, "must be an object"),
    ({"prompt": "q", "system": ["s"]}, "system must be a string, not list"),
    ({"prompt": "q", "references": [{}]}, "a reference must be a string, not dict"),
    ({"prompt": "q", "completion": {"value": "a"}}, "role of a turn is None"),
    ({"prompt": "q", "completion": [USER]}, "not an assistant"),
    ({"prompt": [USER, ANSWER], "completion": "b"}, "two assistant turns"),
    ({"text": "q"}, "columns .* are missing"),
    ({"messages": [{"role": "critic", "content": "q"}]}, "'critic'"),
    ({"messages": [{"role": 3, "content": "q"}]}, "turn is 3"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
     "image_url"),
    ({"messages": [{"role": "user", "content": ["q"]}]}, "not text"),
    ({"messages": [USER, {"role": "assistant", "content": None}]}, "null or missing"),
    ({"messages": [USER, {"role": "gpt", "tool_calls": ["x"]}]}, "must be an object"),
    ({"messages": [USER, ANSWER | {"name": "\ud800"}]}, "surrogate"),
    ({"prompt": "q", "tools": [ADD | {"description": "\udfff"}]}, "surrogate"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "what"), BAD, ids=str)
def test_unusable_rows_are_named(row: dict, what: str, tmp_path: Path):
    with pytest.raises(UsageError, match=rf"rows.jsonl:2: .*({what})"):
        load(tmp_path, {"prompt": "q"}, row)


def test_csv(tmp_path: Path, capsys, models):
    """Cells of any length, JSON in cells; a row whose text has an unquoted comma is refused."""
    long, file = "x" * 150_000, tmp_path / "rows.csv"
    with open(file, "w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["instruction", "output", "history", "tools", "level"])
        writer.writerow(["q", long, json.dumps([["h", "y"]]), json.dumps([ADD]), "1"])
        writer.writerow(["q", "a", "", "", ""])
    first, second = common.load_conversations(str(file))
    assert first.response["content"] == long and first.options == {"tools": [TOOL]}
    assert [m["content"] for m in first.messages] == ["h", "y", "q"] and len(second.messages) == 1
    assert "'level': 1" in capsys.readouterr().out
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert common.load_conversations(str(packed))[0].response == first.response
    file.write_text('prompt,response\nq,"yes\nr,no\n')
    with pytest.raises(UsageError, match="csv:2: unexpected end of data"):
        common.load_conversations(str(file))
    file.write_text("prompt,response\nq,yes, of course\n")
    with pytest.raises(UsageError, match="csv:2: more cells than columns"):
        common.load_conversations(str(file))


def test_directories_of_save_to_disk_and_nulls_of_arrow(tmp_path: Path, models):
    """With splits and without; Arrow's nulls in arguments and fields are no part of the row."""
    other = {"type": "function", "function": {"name": "say", "arguments": {"text": "hm"}}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}],
         "tools": [TOOL]}
        for call in (CALL, other)
    ]  # fmt: skip
    data = datasets.Dataset.from_list(rows)
    assert data[0]["messages"][1]["tool_calls"][0]["function"]["arguments"].keys() > {"a", "text"}
    data.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(str(tmp_path / "two"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    for source in ("one", "two", "rows.parquet"):
        found = learned(models["tools"], common.load_conversations(str(tmp_path / source)))
        assert [t for _, t in found] == [
            f"{CALLED}<|im_end|>", '[call say {"text": "hm"}]<|im_end|>'
        ]  # fmt: skip
    assert len(common.load_conversations(str(tmp_path / "two"), split="test")) == 1
    two = {"dataset": str(tmp_path / "two"), "eval_dataset": str(tmp_path / "two")}
    for split, size in (("train", 2), ("test", 1)):
        args = common.Flags(**two, eval_split=split)
        assert [len(part) for part in common.load_data(args)] == [2, size]
    for directory in ("one", "two"):
        with pytest.raises(UsageError, match=rf"cannot load .*{directory}.*dev"):
            common.load_conversations(str(tmp_path / directory), split="dev")
    (tmp_path / "dates").mkdir()
    write_rows(tmp_path / "dates/train.jsonl", [{"prompt": "when?", "answer": "2024-01-05"}] * 2)
    with pytest.raises(UsageError, match=r"row 1: .*'not text': '2024"):
        common.load_conversations(str(tmp_path / "dates"))
    (tmp_path / "rows.ndjson.gz").write_bytes(gzip.compress(b'{"prompt": "q"}\n'))
    assert len(common.load_conversations(str(tmp_path / "rows.ndjson.gz"))) == 1


# ---------------------------------------------------------------------------------- message fields

CALLS = [
    {"content": "", "tool_calls": [CALL]},
    {"content": None, "tool_calls": [CALL]},
    {"tool_calls": [CALL | {"function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}]},
    {"content": None, "tool_calls": [CALL["function"]]},
    {"content": None, "function_call": {"name": "add", "arguments": '{"a": 2, "b": 3}'}},
]


@pytest.mark.parametrize("template", ["tools", "strict"])
@pytest.mark.parametrize("fields", CALLS, ids=str)
def test_tool_calls_are_learned(fields: dict, template: str, tmp_path: Path, models):
    """In every spelling; such an answer has no text that generated text could be compared with."""
    rows = load(tmp_path, {"messages": [USER, {"role": "assistant", **fields}]})
    ((_, targets),) = learned(models[template], rows)
    assert targets == f"{CALLED}<|im_end|>" and rows[0].references == []


def test_fields_that_are_not_printed(tmp_path: Path, capsys, models):
    """Calls and reasoning that a template does not print are refused; other fields are named."""
    call, result = {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "5"}
    thought = ANSWER | {"reasoning_content": "hm"}
    for answer, template in ((call, "plain"), (call, "reasoning"), (thought, "tools")):
        field = "tool_calls" if answer is call else "reasoning_content"
        with pytest.raises(UsageError, match=rf"rows.jsonl:1: .*does not print the {field} of tur"):
            learned(models[template], load(tmp_path, {"messages": [USER, answer]}))
    with pytest.raises(UsageError, match="does not print the tool_calls"):  # part of the prompt
        rows = load(tmp_path, {"messages": [USER, call, result]})
        common.tokenize_prompts(rows, Pair(models["plain"], models["plain"]), 999)
    without_tools = CHATML.replace("for m in messages", "for m in messages if m.role != 'tool'")
    deaf = language_model(llama(t := byte_tokenizer(without_tools)), t, "deaf")
    said = [USER, {"role": "assistant", "content": "add(2, 3)"}, result]
    common.tokenize_prompts(load(tmp_path, {"messages": said}), Pair(*[models["plain"]] * 2), 999)
    with pytest.raises(UsageError, match=r"rows.jsonl:1: .*does not print the content of turn 3"):
        common.tokenize_prompts(load(tmp_path, {"messages": said}), Pair(deaf, deaf), 999)
    of_parts = CHATML.replace(
        "{{ m.content }}", "{{ m.content[0].text }}{{ 1 // m.content|length }}"
    )
    deaf = language_model(llama(t := byte_tokenizer(of_parts)), t, "deaf")  # it refuses no content
    with pytest.raises(UsageError, match=r"does not print the content of turn 1"):
        common.tokenize_prompts(load(tmp_path, {"prompt": "qq"}), Pair(deaf, deaf), 999)
    capsys.readouterr()
    named = {"messages": [USER | {"name": "Ann", "id": 7, "toxic": None}, ANSWER], "tools": [TOOL]}
    assert learned(models["plain"], load(tmp_path, named, named))[0][1] == "a<|im_end|>"
    out = capsys.readouterr().out
    assert out.count("does not use") == 1
    assert all(f"'{name}': 2" in out for name in ("name", "id", "tools")) and "toxic" not in out


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_learned(field: str, tmp_path: Path, models):
    rows = load(tmp_path, {"messages": [USER, ANSWER | {field: "hm"}, USER, ANSWER]})
    ((_, targets),) = learned(models["reasoning"], rows)
    assert targets == "<think>hm</think>a<|im_end|>a<|im_end|>"
    rows = load(tmp_path, {"messages": [USER, ANSWER | {field: "", "content": "b"}]})
    assert learned(models["plain"], rows)[0][1] == "b<|im_end|>"


def test_content_in_parts(tmp_path: Path, models):
    parts = [{"type": "text", "text": "one, "}, {"type": "text", "text": "two"}]
    rows = load(tmp_path, {"messages": [USER, {"role": "assistant", "content": parts}]})
    assert learned(models["plain"], rows)[0][1] == "one, two<|im_end|>"
    assert rows[0].references == ["one, two"]


def test_empty_answers_are_left_out(tmp_path: Path, capsys, models):
    """A student would learn to end at once. A call without text is no empty answer."""
    answers = [{"content": " ", "id": 7}, {"content": "", "tool_calls": [CALL]}, {"content": "a"}]
    rows = load(tmp_path, *({"messages": [USER, {"role": "assistant"} | a]} for a in answers))
    assert [t for _, t in learned(models["tools"], rows)] == [f"{CALLED}<|im_end|>", "a<|im_end|>"]
    assert "1 of 3 conversations left out: an assistant turn is empty" in capsys.readouterr().out
    args = sequence_level.Arguments(completions="dataset")
    pair = Pair(models["tools"], None)
    prompts = common.tokenize_prompts(rows[:1], pair, 900)
    with pytest.raises(UsageError, match="no answer is left"):
        common.make_examples(prompts, pair, args)


def test_an_earlier_empty_answer_is_not_learned(tmp_path: Path, capsys, models):
    empty = {"role": "assistant", "content": " ", "tool_calls": []}
    rows = load(tmp_path, {"messages": [USER, empty, USER, ANSWER]}, {"messages": [USER, ANSWER]})
    assert [t for _, t in learned(models["plain"], rows)] == ["a<|im_end|>"]
    assert "1 of 2 conversations left out: an assistant turn is empty" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", " \n", "<think>\nwithout end"])
def test_no_answer_is_no_reference(text: str, tmp_path: Path):
    """Else every answer would be wrong, or every one without end right."""
    rows = load(
        tmp_path, {"prompt": "q", "output": text}, {"prompt": "q", "references": [text, "b"]}
    )
    assert [row.references for row in rows] == [[], ["b"]]
    for more in ({"reference": text}, {"references": [text]}):
        assert load(tmp_path, {"prompt": "q", "output": "a"} | more)[0].references == ["a"]


@pytest.mark.parametrize("mark", ["weight", "train", "loss", "label"])
def test_unwanted_answers_are_not_learned(mark: str, tmp_path: Path):
    """OpenAI's, axolotl's and AgentInstruct's marks of a turn; KTO's of a row, whose answer is no
    reference either."""
    answer = ANSWER if mark == "label" else ANSWER | {mark: False}
    row = {"prompt": [USER], "completion": [answer]} | ({"label": False} if mark == "label" else {})
    path = write_rows(tmp_path / "rows.jsonl", [row])
    assert common.load_conversations(path)[0].references == ([] if mark == "label" else ["a"])
    with pytest.raises(UsageError, match=r"rows.jsonl:1: all assistant turns are learned"):
        common.load_data(sequence_level.Arguments(dataset=path, completions="dataset"))


def test_reasoning_in_a_column(tmp_path: Path, models):
    row = {"prompt": "q", "reasoning_content": "hm", "response": "a"}
    ((_, targets),) = learned(models["reasoning"], load(tmp_path, row))
    assert targets == "<think>hm</think>a<|im_end|>"
    row = {"prompt": [USER], "completion": [ANSWER | {"thinking": "r"}], "reasoning_content": "hm"}
    assert load(tmp_path, row)[0].response["reasoning_content"] == "r"


@pytest.mark.parametrize("text", ["[]", json.dumps([USER, ANSWER]), "[" * 999, "[1]", "7", "{}"])
def test_answers_in_json_are_text(text: str, tmp_path: Path, models):
    rows = load(tmp_path, {"prompt": text, "response": text})
    assert learned(models["plain"], rows)[0][0] == chatml(f"user {text}", f"assistant {text}")


def test_turns_that_are_not_to_be_learned(tmp_path: Path):
    """A weight of 0 would be ignored: refused where that turn is a target."""
    file = write_rows(tmp_path / "rows.jsonl", [{"messages": [USER, ANSWER | {"weight": 0}]}] * 9)
    with pytest.raises(UsageError, match=r"rows.jsonl:1: .*weight"):
        common.load_data(token_level.Arguments(dataset=file, completions="dataset", eval_size=1))


@pytest.mark.parametrize("name", ["add_generation_prompt", "messages", "prompt", "model"])
def test_reserved_template_arguments(name: str, tmp_path: Path, models):
    rows = load(tmp_path, {"prompt": "q", "response": "a", "chat_template_kwargs": {name: True}})
    with pytest.raises(UsageError, match=rf"rows.jsonl:1: .*{name}"):
        learned(models["plain"], rows)


def test_a_run_on_tool_calls(tmp_path: Path, capsys):
    """As a user would: own answers, with the calls as targets; then the teacher's answers, written
    with their tools, so that a second run reads the same prompts."""
    pair = byte_pair(tmp_path, TOOLS)
    asked = [{"role": "user", "content": f"What is 2 plus {i}?"} for i in range(6)]
    answer = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    rows = [{"tools": json.dumps([TOOL]), "messages": [turn, answer]} for turn in asked]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    run_in_process(sequence_level, **small_run(tmp_path, *pair, file))
    assert f"6 examples, {6 * (len(CALLED) + 1)} target tokens" in capsys.readouterr().out
    flags = small_run(tmp_path, *pair, file, completions="teacher", overwrite=True)
    run_in_process(sequence_level, **flags)
    written = common.load_conversations(str(tmp_path / "run/completions.jsonl"))
    assert [c.messages for c in written] == [[turn] for turn in asked]
    assert all(c.options["tools"] == [TOOL] for c in written)
    assert {c.response["content"] for c in written} == {"fine"}


# -------------------------------------------------------------------------------------------- roles


NAMES = ["gpt", "chatgpt", "bot", "Model", " AI ", "ASSISTANT", "function_call"]


@pytest.mark.parametrize("role", NAMES)
def test_names_of_the_assistant(role: str, tmp_path: Path, models):
    turns = [{"from": "Prompter", "value": "q"}, {"from": role, "value": "a"}]
    (row,) = load(tmp_path, {"conversations": turns})
    assert row.messages == [USER] and row.response == ANSWER
    assert learned(models["plain"], [row])[0][1] == "a<|im_end|>"


@pytest.mark.parametrize("role", ["function", "tool", "observation", "Function_Response"])
def test_names_of_tools_and_developers(role: str, tmp_path: Path, models):
    """The call is the assistant's text and a target, the result is a tool's turn."""
    call = '{"name": "add", "arguments": [2, 3]}'
    turns = [("developer", "s"), ("human", "q"), ("function_call", call), (role, "5"), ("gpt", "a")]
    rows = load(tmp_path, {"conversations": [{"from": r, "value": text} for r, text in turns]})
    ((text, targets),) = learned(models["plain"], rows)
    assert text == chatml("system s", "user q", f"assistant {call}", "tool 5", "assistant a")
    assert targets == f"{call}<|im_end|>a<|im_end|>"


def test_calls_that_are_text(tmp_path: Path, models):
    """Of rows with tools, in ShareGPT's form, and in that of data sets that know no objects."""
    said = [CALL["function"], [CALL["function"]], CALL]
    share = [
        [{"from": "human", "value": "q"}, {"from": "function_call", "value": json.dumps(call)},
         {"from": "observation", "value": "5"}, {"from": "gpt", "value": "a"}]
        for call in said
    ]  # fmt: skip
    openai = [USER, {"role": "assistant", "content": "", "tool_calls": json.dumps([CALL])},
              {"role": "tool", "content": "5"}, ANSWER | {"tool_calls": "[]"}]  # fmt: skip
    rows = load(tmp_path, *({"messages": m, "tools": [TOOL]} for m in (*share, openai)))
    for _, targets in learned(models["tools"], rows):
        assert targets == f"{CALLED}<|im_end|>a<|im_end|>"


@pytest.mark.parametrize("template", ["first", "plain"])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]], ids=len)
def test_the_assistant_speaks_first(system: list, template: str, tmp_path: Path, models):
    """What it says before anybody asked is part of the prompt; the answers are learned."""
    hello = {"role": "assistant", "content": "Ask me."}
    rows = load(tmp_path, {"messages": [*system, hello, USER, ANSWER]})
    ((text, targets),) = learned(models[template], rows)
    assert targets == "a<|im_end|>" and "assistant\nAsk me.<|im_end|>" in text


# --------------------------------------------------------------------------------- held-out prompts


def split(path: Path, rows: list, **flags: Any) -> list[set[str]]:
    flags = {"dataset": write_rows(path / "rows.jsonl", rows), **flags}
    return [
        {c.prompt_key() for c in part} for part in common.load_data(token_level.Arguments(**flags))
    ]


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_stay_together(seed: int, tmp_path: Path):
    """Ten prompts with four answers each, in any order; other tools make another prompt."""
    rows = [{"prompt": f"p{i}", "response": f"a{j}"} for j in range(4) for i in range(10)]
    train, held_out = split(tmp_path, rows, eval_size=8, seed=seed)
    assert len(held_out) == 2 and len(train) == 8 and not train & held_out
    train, held_out = split(tmp_path, rows, seed=seed)  # a tenth: one prompt
    assert len(held_out) == 1 and len(train) == 9
    tools = [row | {"tools": [TOOL]} for row in rows]
    train, held_out = split(tmp_path, [*rows, *tools], eval_size=40, seed=seed)
    assert len(train) == len(held_out) == 10 and not train & held_out
    with pytest.raises(UsageError, match="holds out all 4 rows"):
        split(tmp_path, rows[:1] * 4)


@pytest.mark.parametrize("seed", range(5))
def test_a_prompt_with_many_answers_does_not_fill_the_held_out_rows(seed: int, tmp_path: Path):
    """60 of 100 rows ask the same: ten others are held out."""
    rows = [{"prompt": f"p{max(i, 59)}", "response": f"a{i}"} for i in range(100)]
    train, held_out = split(tmp_path, rows, seed=seed)
    assert len(held_out) == 10 and len(train) == 31


def test_split_of_different_prompts_is_as_ever(tmp_path: Path):
    """Row numbers drawn by the seed, as in runs of earlier versions, which --resume continues."""
    file = write_rows(tmp_path / "rows.jsonl", [{"prompt": f"word {i}"} for i in range(40)])
    train, held_out = common.load_data(token_level.Arguments(dataset=file, seed=3, eval_size=7))
    order = torch.randperm(40, generator=common.generator_for(3, "held out")).tolist()
    assert [int(c.source.rpartition(":")[2]) - 1 for c in held_out] == sorted(order[:7])
    assert [int(c.source.rpartition(":")[2]) - 1 for c in train] == sorted(order[7:])


def test_prompts_in_both_data_sets_are_counted(tmp_path: Path, capsys):
    rows = [{"prompt": f"p{i % 5}", "response": f"a{i}"} for i in range(10)]
    other = write_rows(tmp_path / "eval.jsonl", [{"prompt": f"p{i}"} for i in (3, 4, 4, 8)])
    train, held_out = split(tmp_path, rows, eval_dataset=other)
    assert len(train) == 5 and len(held_out) == 3
    assert capsys.readouterr().out.count("2 prompts of") == 1
    file = str(tmp_path / "rows.jsonl")
    split(tmp_path, rows, eval_dataset=file)
    assert "5 prompts of" in capsys.readouterr().out
    common.load_data(token_level.Arguments())  # the embedded data set
    assert capsys.readouterr().out == ""
