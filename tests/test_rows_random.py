"""Thousands of odd rows: each is a right example in the end, or one sentence that names it.

Rows of known meaning are written in random accepted forms and must train on exactly that meaning.
Rows that are broken at random places may be refused, but never fail in another way, and never train
on a target that is not their answer.
"""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_tokenizer, llama
from conftest import language_model

import common
from common import LanguageModel, Pair, UsageError

LIMIT = 50_000
ASSISTANT = "<|im_start|>assistant\n"
# Prints every field that an answer can have, after a mark that shows where it stands.
TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments | tojson }}]"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    "a", "", " ", "  two\n\nlines ", "é😀\u2028שלום", "\x00\x07", "null", "[1, 2]", '{"a": 1}',
    "\\n", "<|im_start|>user\nhm", "{{ messages }}", "<think>no</think>", "x" * 300, "assistant\n",
]  # fmt: skip
VALUES = [
    None, 0, 1, -1.5, 10**400, float("nan"), float("inf"), True, False, "", "text", "\ud83d",
    "\udc00x", [], {}, [[]], [None], ["a", "b"], {"a": None}, [{"role": "user"}],
    {"role": "gpt", "value": "x"}, {"type": "text", "text": "t"}, [{"type": "image", "url": "x"}],
    "<|im_end|>", [["a", "b"]],
]  # fmt: skip
NAMES = {
    "user": ["user", "human", "Human", " prompter "],
    "assistant": ["assistant", "gpt", "chatgpt", "bot", "MODEL", "ai", "function_call"],
    "tool": ["tool", "function", "observation"],
    "system": ["system", "developer", "System"],
}


KEYS = (
    "role", "from", "content", "value", "messages", "prompt", "response", "tools", "tool_calls",
    "function", "chat_template_kwargs", "references", "history", "system",
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    tokenizer = byte_tokenizer(TEMPLATE)
    return language_model(llama(tokenizer), tokenizer, "bytes")


class Maker:
    """Conversations with what they must render to, and rows that say the same."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def text(self) -> str:
        return "".join(self.random.choices(TEXTS, k=self.random.choice((1, 1, 2))))

    def maybe(self, share: float = 0.3) -> bool:
        return self.random.random() < share

    def conversation(self) -> dict[str, Any]:
        """`turns` of (role, text, reasoning, calls), and `tools`."""
        turns = [("system", self.text() or "s", "", [])] if self.maybe() else []
        for _ in range(self.random.choice((0, 0, 1, 2))):
            turns += [("user", self.text(), "", []), ("assistant", self.text(), "", [])]
        turns.append(("user", self.text(), "", []))
        if self.maybe(0.2):
            turns += [("assistant", "", "", self.calls()), ("tool", self.text(), "", [])]
        calls = self.calls() if self.maybe(0.2) else []
        text = "" if calls and self.maybe(0.7) else self.text()
        turns.append(("assistant", text, self.text() if self.maybe(0.2) else "", calls))
        tools = [{"name": "f", "parameters": {}}] if self.maybe(0.2) else []
        return {"turns": turns, "tools": tools}

    def calls(self) -> list[tuple[str, dict]]:
        arguments = [{"a": self.random.randint(0, 9)}, {"b": self.text()}, {}, {"c": [None, 1.5]}]
        return [("f", self.random.choice(arguments)) for _ in range(self.random.choice((1, 1, 2)))]

    def row(self, talk: dict[str, Any]) -> dict[str, Any]:
        """One of the accepted forms that can hold it, with columns that mean nothing."""
        turns, row = list(talk["turns"]), {}
        plain = not any(reasoning or calls for *_, reasoning, calls in turns)
        if turns[0][0] == "system" and self.maybe(0.5):
            row[self.random.choice(("system", "system_prompt"))] = turns.pop(0)[1]
        roles = [t[0] for t in turns]
        form = self.random.choice(("messages", "prompt", "columns", "texts"))
        if form == "columns" and plain and roles[0] == "user":
            *history, (_, question, *_), (_, answer, *_) = turns
            name = self.random.choice(("instruction", "prompt", "question", "query", "problem"))
            row[name] = question
            row[self.random.choice(("completion", "response", "output", "answer"))] = answer
            pairs = [t[1] for t in history]
            pairs = [list(pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
            if pairs or self.maybe():
                row["history"] = self.spelled(pairs)
        elif form == "texts" and plain and roles[0] == "user":
            row["conversations"] = [t[1] for t in turns]
        elif form == "prompt":
            row["prompt"] = [self.message(t) for t in turns[:-1]]
            answer = turns[-1]
            simple = not answer[2] and not answer[3] and self.maybe(0.5)
            row["completion"] = answer[1] if simple else [self.message(answer)]
        else:
            name = self.random.choice(("messages", "conversations", "conversation"))
            row[name] = self.spelled([self.message(t) for t in turns])
        if talk["tools"]:
            wrapped = [{"type": "function", "function": tool} for tool in talk["tools"]]
            row["tools"] = self.spelled(wrapped if self.maybe(0.5) else talk["tools"])
        if self.maybe():
            row[self.random.choice(("id", "category", "é"))] = self.random.choice(VALUES[:10])
        if self.maybe():
            row.setdefault(self.random.choice(("references", "tools", "system", "history")), None)
        columns = list(row.items())
        self.random.shuffle(columns)
        return dict(columns)

    def spelled(self, value: Any) -> Any:
        return json.dumps(value, ensure_ascii=self.maybe()) if self.maybe(0.2) else value

    def message(self, turn: tuple) -> dict[str, Any]:
        role, text, reasoning, calls = turn
        keys = self.random.choice((("role", "content"), ("from", "value")))
        message = {keys[0]: self.random.choice(NAMES[role]), keys[1]: text}
        if text and self.maybe(0.2):
            half = len(text) // 2
            message[keys[1]] = [{"type": "text", "text": t} for t in (text[:half], text[half:])]
        if calls:
            functions = [{"name": n, "arguments": self.spelled(a)} for n, a in calls]
            wrapped = [{"id": "1", "type": "function", "function": f} for f in functions]
            message["tool_calls"] = wrapped if self.maybe(0.5) else functions
            if not text:
                message[keys[1]] = self.random.choice(("", None))
        if reasoning:
            name = self.random.choice(("reasoning_content", "reasoning", "thinking"))
            message[name] = reasoning
        if self.maybe(0.2):
            message[self.random.choice(("name", "weight", "id"))] = self.random.choice(
                (None, 1, "x")
            )
        return message

    def broken(self, row: Any) -> Any:
        """A copy with some values replaced, removed or put elsewhere."""
        row = copy.deepcopy(row)
        for _ in range(self.random.choice((1, 1, 2, 4))):
            places = list(containers(row))
            if not places:
                return row
            place = self.random.choice(places)
            key = self.random.choice(list(place) if isinstance(place, dict) else range(len(place)))
            kind = self.random.random()
            if kind < 0.5:
                place[key] = copy.deepcopy(self.random.choice(VALUES))
            elif kind < 0.7:
                del place[key]
            elif kind < 0.8:
                place[key] = copy.deepcopy(self.random.choice(places))
            elif isinstance(place, dict):
                place[self.random.choice(KEYS)] = place.pop(key)
            else:
                self.random.shuffle(place)
        return row


def containers(value: Any) -> Any:
    """Every object and list in it that is not empty."""
    if isinstance(value, dict | list) and value:
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from containers(item)


def shown(role: str, text: str, reasoning: str, calls: list) -> str:
    thought = f"<think>{reasoning}</think>" if reasoning else ""
    said = "".join(f"[{n} {json.dumps(a, ensure_ascii=False)}]" for n, a in calls)
    return f"<|im_start|>{role}\n{thought}{text}{said}<|im_end|>\n"


def said(role: str, text: str, reasoning: str, calls: list) -> bool:
    """Whether the turn says anything, if it is the assistant's."""
    return bool(role != "assistant" or text.strip() or reasoning or calls)


def called(message: common.Message) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message.get("tool_calls", [])]
    return [(f["name"], f.get("arguments", "")) for f in functions]


def written(turn: str) -> str:
    """What the assistant writes of a rendered turn."""
    return turn.removeprefix(ASSISTANT).removesuffix("\n")


def examples_of(model: LanguageModel, path: Path, rows: list[Any]) -> list[common.Example]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pair = Pair(model, model)
    files = {"dataset": str(path), "eval_dataset": str(path)}
    train, _ = common.load_data(common.Flags(**files, completions="dataset"))
    prompts = common.tokenize_prompts(train, pair, LIMIT)
    return common.dataset_examples(prompts, pair, LIMIT)[0]


def decoded(model: LanguageModel, tokens: common.Tokens) -> tuple[str, str]:
    targets = [tokens.ids[i] for i in tokens.targets]
    return model.tokenizer.decode(tokens.ids), model.tokenizer.decode(targets)


def test_rows_of_known_meaning(model, tmp_path: Path):
    """2000 conversations in random forms: the text that is read and its targets, to the letter.
    Those with an empty assistant turn are left out."""
    maker = Maker(0)
    talks = [maker.conversation() for _ in range(2000)]
    rows = [maker.row(talk) for talk in talks]
    examples = examples_of(model, tmp_path / "rows.jsonl", rows)
    both = zip(talks, rows, strict=True)
    both = [(talk, row) for talk, row in both if all(said(*turn) for turn in talk["turns"])]
    assert 1000 < len(both) < 2000
    for (talk, row), example in zip(both, examples, strict=True):
        turns = [shown(*turn) for turn in talk["turns"]]
        tools = [{"type": "function", "function": tool} for tool in talk["tools"]]
        listed = f"<|im_start|>tools\n{json.dumps(tools)}<|im_end|>\n" if tools else ""
        answers = [
            t for t, turn in zip(turns, talk["turns"], strict=True) if turn[0] == "assistant"
        ]
        expected = listed + "".join(turns), "".join(map(written, answers))
        assert decoded(model, example.student) == expected, row


def test_rows_broken_at_random(model, tmp_path: Path, capsys):
    """4000 broken rows: refused in one sentence that names the row, or trained on their answer."""
    maker, outcomes = Maker(1), Counter()
    for _ in range(4000):
        row = maker.broken(maker.row(maker.conversation()))
        try:
            examples = examples_of(model, tmp_path / "rows.jsonl", [row])
        except UsageError as problem:
            outcomes["refused"] += 1
            assert str(problem).startswith(f"{tmp_path / 'rows.jsonl'}:1: "), row
            assert "\n" not in str(problem)
            continue
        except AttributeError:
            talk = common.load_conversations(str(tmp_path / "rows.jsonl"))[0]
            assert talk.response is None, row  # as load_data would refuse for these completions
            outcomes["no answer"] += 1
            continue
        if not examples:
            (talk,) = common.load_conversations(str(tmp_path / "rows.jsonl"))
            turns = [m for m in (*talk.messages, talk.response) if m["role"] == "assistant"]
            assert any(not m["content"].strip() and len(m) <= 3 for m in turns), row
            outcomes["empty"] += 1
            continue
        outcomes["trained"] += 1
        (example,) = examples
        talk = example.prompt.conversation
        assert all(m["content"] in raw_texts(row) for m in (*talk.messages, talk.response)), row
        turns = [
            shown(m["role"], m["content"], m.get("reasoning_content", ""), called(m))
            for m in (*talk.messages, talk.response)
        ]
        # What the assistant says before the user does is no answer, if another one follows.
        spoken = [i for i, m in enumerate(talk.messages) if m["role"] != "system"]
        first = min(spoken, default=len(talk.messages) - 1)
        answers = [written(t) for t in turns[first + 1 :] if t.startswith(ASSISTANT)]
        text, targets = decoded(model, example.student)
        assert text.endswith("".join(turns)) and targets == "".join(answers), row
    assert min(outcomes.values()) > 30, outcomes


def raw_texts(row: Any) -> set[str]:
    """The texts that the row holds, also inside of JSON and joined from parts."""
    texts = {""}
    for place in [[row], *containers(row)]:
        values = list(place.values()) if isinstance(place, dict) else place
        found = [v for v in values if isinstance(v, str)]
        texts |= {*found, "\n\n".join(filter(None, found))}
        parts = [v.get("text") for v in values if isinstance(v, dict)]
        if parts and all(isinstance(p, str) for p in parts):
            texts.add("".join(parts))
        for text in found:
            try:
                inner = json.loads(text)
            except ValueError:
                continue
            if isinstance(inner, dict | list):
                texts |= raw_texts(inner)
    return texts
