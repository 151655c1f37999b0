"""--grader: which answers are right, for exact_match and --keep-matching."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest
from conftest import ROOT, run_in_process, run_script

import common
import sequence_level

SQL = f"{ROOT / 'data' / 'sql' / 'grader.py'}:same_result"
CASES = [
    ("exact", "a  b\n", "a b", True),
    ("exact", "A b", "a b", False),
    ("exact", "a b .", "a b", False),
    ("exact", "<think>\nb? no\n</think>\n\na b", "a b", True),
    ("exact", "", "a", False),
    ("exact", "<think>\nhm", "<think>\nno end", False),
    ("exact", "[THINK]hm[/THINK]four", "four", True),
    ("exact", "<seed:think>hm</seed:think>\nfour", "four", True),
    ("exact", "<|channel>thought\nhm\n<channel|>four", "four", True),
    ("exact", "<seed:think>four", "<seed:think>four", False),
    ("number", "So 3 + 4 = 7.", "7", True),
    ("number", "The total is $1,250.50", "#### 1250.5", True),
    ("number", "−3", "-3.0", True),
    ("number", "2024-05", "5", True),
    ("number", "It is -7", "7", False),
    ("number", "7 of 8", "7", False),
    ("number", "seven", "7", False),
    ("number", "<think>8</think> none", "8", False),
    ("choice", "B", "B", True),
    ("choice", "(B) because A is too small", "B", True),
    ("choice", "**B.** A dog", "B", True),
    ("choice", "The answer is (B), not A.", "B", True),
    ("choice", "A careful reader chooses C", "(C)", True),
    ("choice", "Answer: B, not A", "B", True),
    ("choice", "Answer: D", "C", False),
    ("choice", "none", "A", False),
    ("json", '{"a": 1, "b": [true, null]}', '{"b":[true,null],"a":1.0}', True),
    ("json", 'Here:\n```json\n{"a": "x"}\n```', '{"a": "x"}', True),
    ("json", "3", "3.0", True),
    ("json", '{"a": 1}', '{"a": true}', False),
    ("json", '{"a": 1', '{"a": 1}', False),
    ("json", "[1, 2]", "[2, 1]", False),
    ("json", '{"a": 1} is it', '{"a": 1}', True),
    ("json", ' {"a": 1} is it', '{"a": 1}', True),
    ("json", " 3 apples", "3", False),
    ("json", "3 apples", "3", False),
    ("number", r"\boxed{10{,}000}", "10000", True),
    ("number", r"so \(1\,200\)", "1200", True),
    ("number", "one of 1,2,3", "123", False),
    ("number", r"(1,\,200)", "200", True),
    ("number", "1,00,000", "100000", True),
    ("exact", "Use the <think> tag.", "Use the <think> tag.", True),
    ("choice", "Answer (B), not A", "B", True),
    ("choice", "**Answer** B. A is wrong", "B", True),
    ("choice", "Final answer\n\nC\n\nBecause A", "C", True),
    ("number", "<think>\nmaybe 7", "7", False),
    ("choice", "A. Paris is large. B. Rome is old. So the answer is B", "B", True),
    ("choice", "the correct answer is option B because A is wrong", "B", True),
    ("choice", "B. The answer A names is wrong", "B", True),
    (r"regex:answer: (\w+)", "answer: x, or answer: yes", "the answer: yes", True),
    (r"regex:answer: (\w+)", "answer: no", "the answer: yes", False),
    (r"regex:\d+", "7 or 8", "8", True),
    (r"regex:\d+", "none", "8", False),
    (SQL, "SELECT COUNT(id) FROM customers", "SELECT COUNT(*) FROM customers", True),
    (SQL, "```sql\nSELECT count(*) FROM customers;\n```", "SELECT COUNT(*) FROM customers", True),
    (SQL, "SELECT id FROM orders ORDER BY id DESC", "SELECT id FROM orders", True),
    (SQL, "SELECT id FROM orders ORDER BY id DESC", "SELECT id FROM orders ORDER BY id", False),
    (SQL, "SELECT DISTINCT city FROM customers", "SELECT city FROM customers", False),
    (SQL, "SELECT name FROM nowhere", "SELECT name FROM customers", False),
    (SQL, "DROP TABLE items", "SELECT COUNT(*) FROM items", False),
    (SQL, "SELECT 1; SELECT 2", "SELECT 1", False),
    (SQL, "PRAGMA user_version", "SELECT 0", False),
    (SQL, "", "SELECT COUNT(*) FROM items", False),
]


def rows_of(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(("grader", "text", "reference", "right"), CASES)
def test_each_grader_on_answers_and_references(grader, text, reference, right):
    row = common.Conversation([], None, ["?!", reference], "row 1").row()
    if grader == SQL:  # which refuses a reference that is no query
        row["references"] = [reference]
    assert common.load_grader(grader)(text, row) is right


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("SELECT COUNT(*) FROM items a, items b, items c, items d", "interrupted"),
        ("WITH RECURSIVE x(n) AS (SELECT 1 UNION ALL SELECT n FROM x) SELECT n FROM x", "not auth"),
        ("DELETE FROM items", "not authorized"),
        ("SELECT length(hex(zeroblob(300000000)))", "not authorized"),
        ("SELECT group_concat(a.quantity || b.quantity) FROM items a, items b", "too big"),
        (f"SELECT {','.join('x' * 50)} FROM (SELECT name AS x FROM items)", "too many columns"),
        ("SELECT fts3_tokenizer('simple', x'4141414141414141')", "not authorized|no such function"),
    ],
)
def test_a_query_is_bounded(query: str, problem: str):
    """In instructions, in what it may do, and in memory."""
    grade = common.load_grader(SQL)
    result_of = grade.function.__globals__["result_of"]
    with pytest.raises(sqlite3.Error, match=problem):
        result_of(query)
    assert not grade(query, {"references": ["SELECT 1"], "source": ""})


def test_a_query_after_reasoning():
    row = {"references": ["SELECT COUNT(*) FROM customers"], "source": ""}
    for text in ("hm\n</think>\n\n", "<think>```sql\nSELECT 1```</think>"):
        assert common.load_grader(SQL)(text + row["references"][0], row)


@pytest.mark.parametrize(
    ("grader", "message"),
    [
        ("exactly", "--grader is exactly, not exact, number, choice, json, regex:PATTERN or FILE"),
        ("regex:", "--grader is regex:, not exact"),
        ("regex:(", "--grader regex:(: missing ), unterminated subpattern"),
        ("number", "eval.jsonl:2: --grader number finds nothing in 'none'"),
        ("gone.py:right", "--grader gone.py:right cannot be loaded: [Errno 2] No such file"),
        ("own.py", "--grader own.py cannot be loaded"),
        ("own.py:wrong_name", "wrong_name cannot be loaded: module 'grader_own' has no"),
        (
            "own.py:fails",
            "--grader own.py:fails fails on a reference: eval.jsonl:1: KeyError: 'no'",
        ),
        ("own.py:one", "--grader own.py:one fails on a reference: eval.jsonl:1: TypeError"),
        ("own.py:share", "eval.jsonl:1: TypeError: it returned 0.5, not True or False"),
        ("own.py:none", "eval.jsonl:1: TypeError: it returned None, not True or False"),
    ],
)
def test_a_wrong_grader_is_refused_before_anything_is_loaded(
    tmp_path, monkeypatch, grader, message
):
    monkeypatch.chdir(tmp_path)
    Path("neighbour.py").write_text("share = lambda text, row: 0.5\n")
    Path("own.py").write_text(
        "from neighbour import share\n\ndef fails(text, row):\n    return row['no']\n\n"
        "def one(text): ...\n\ndef none(text, row): ...\n"
    )
    rows = [{"prompt": "a", "references": ["1"]}, {"prompt": "b", "references": ["none"]}]
    write_rows(Path("eval.jsonl"), rows)
    args = common.Flags(
        dataset="eval.jsonl", eval_dataset="eval.jsonl", grader=grader, teacher="nowhere"
    )
    with pytest.raises(common.UsageError) as caught:
        common.load_data(args)
    assert message in str(caught.value)


def test_exceptions_and_time_out_count_as_wrong_and_are_said_once(tmp_path, monkeypatch, capsys):
    (tmp_path / "own.py").write_text(
        "import time\n\ndef own(text, row):\n    try:\n        while text == 'slow':\n"
        "            time.sleep(0.01)\n    except Exception:\n        return True\n"
        "    if text == 'exit':\n        exit()\n"
        "    return 1 / (text != 'fails') if text in row['allowed'] else 0\n"
    )
    monkeypatch.setattr(common, "GRADER_SECONDS", 0.2)
    grade = common.load_grader(f"{tmp_path / 'own.py'}:own")
    talk = common.Conversation([], None, [], "rows:7", columns={"allowed": ["good", "fails"]})
    answers = ["good", "bad", "fails", "slow", "exit"]
    assert [grade(text, talk.row()) for text in answers] == [True, *[False] * 4]
    assert grade.failures[1] == "rows:7: TooLong: it ran for more than 0.2 seconds"
    assert capsys.readouterr().err.count("counted as wrong: rows:7: ZeroDivisionError") == 1


def test_built_in_graders_end_too(monkeypatch):
    """A pattern that tries everything is given up; a long list of numbers is read at once."""
    monkeypatch.setattr(common, "GRADER_SECONDS", 0.5)
    row = {"references": ["7"]}
    assert not common.load_grader(r"regex:answer: (\w+\s?)+$")(f"answer: {'a' * 60}!", row)
    assert common.load_grader("number")("10,20,30," * 4000 + " 7", row)
    assert common.load_grader("number")("1,234,567.5", {"references": ["1234567.5"]})


def test_time_limits_nest(tmp_path, monkeypatch):
    """A user's function may call a built-in grader."""
    monkeypatch.setattr(common, "GRADER_SECONDS", 0.5)
    (tmp_path / "nests.py").write_text(
        "import common\n\ndef own(text, row):\n"
        "    common.load_grader('regex:\\\\d')(text, row)\n    while True:\n        pass\n"
    )
    grade = common.load_grader(f"{tmp_path / 'nests.py'}:own")
    assert not grade("1", {"references": ["1"], "source": ""})
    assert "it ran for more than 0.5 seconds" in grade.failures[0]


def test_a_grader_with_dataclasses(tmp_path):
    """They look their module up by its name. The path has a colon of its own."""
    (tmp_path / "a:b").mkdir()
    (tmp_path / "a:b/graders.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Answer:\n    text: str\n\n"
        "def right(text, row):\n    return Answer(text).text == row['references'][0]\n"
    )
    grade = common.load_grader(f"{tmp_path / 'a:b/graders.py'}:right")
    assert [grade(text, {"references": ["a"]}) for text in "ab"] == [True, False]


def test_exact_match_and_keep_matching_use_the_grader(tmp_path):
    """The grader accepts answers with an even number of phonemes; a column says so of half."""
    (tmp_path / "own.py").write_text(
        "def even(text, row):\n    return len(text.split()) % 2 == 0 and row['group'] == 1\n"
    )
    words = rows_of(ROOT / "data" / "eval.jsonl")[:60]
    rows = [row | {"group": i % 2, "note": "half a pair: \ud83d"} for i, row in enumerate(words)]
    train, held_out = (
        write_rows(tmp_path / name, part)
        for name, part in (("train.jsonl", rows[:40]), ("eval.jsonl", rows[40:]))
    )
    run_in_process(
        sequence_level, dataset=str(train), eval_dataset=str(held_out), max_steps=1,
        output_dir=str(tmp_path / "run"), cache_dir=str(tmp_path / "cache"), keep_matching=True,
        grader=f"{tmp_path / 'own.py'}:even",
    )  # fmt: skip
    kept = rows_of(tmp_path / "run" / "completions.jsonl")
    assert kept and all((row["group"], row["note"][-1]) == (1, "\ud83d") for row in kept)
    assert all(len(row["messages"][-1]["content"].split()) % 2 == 0 for row in kept)
    answers = rows_of(tmp_path / "run" / "answers.jsonl")
    assert [a["messages"] for a in answers] == [row["messages"] for row in rows[40:]]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    for name in ("teacher", "before", "after"):
        right = [len(a[name].split()) % 2 == 0 and a["group"] == 1 for a in answers]
        assert [a["right"][name] for a in answers] == right
        assert results[name]["exact_match"] == pytest.approx(sum(right) / len(right))
    assert 0 < results["teacher"]["exact_match"] < 1


def test_sql_references_are_right_and_files_are_what_their_builder_writes(tmp_path):
    grade = common.load_grader(SQL)
    folder = ROOT / "data" / "sql"
    copy = tmp_path / "build.py"
    copy.write_text((folder / "build.py").read_text(encoding="utf-8"), encoding="utf-8")
    done = run_script(str(copy), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("shop.sql", "train.jsonl", "eval.jsonl"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    train, held_out = rows_of(folder / "train.jsonl"), rows_of(folder / "eval.jsonl")
    assert len(train) == 4096 and len(held_out) == 500
    for talk in common.load_conversations(str(folder / "eval.jsonl")):
        assert grade(talk.response["content"], talk.row())
        assert not grade("SELECT 'nothing'", talk.row())
    seen = {row["form"] for row in train}
    assert sum(row["form"] not in seen for row in held_out) == 150
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert not {row["completion"] for row in train} & {row["completion"] for row in held_out}
