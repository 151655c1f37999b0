"""Whether a query gives the result of a reference query: `--grader data/sql/grader.py:same_result`.

The database of shop.sql is held in memory. A query may only read, may run a bounded number of the
database's instructions, and gives a bounded number of values of bounded size.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

INSTRUCTIONS = 5_000_000  # of SQLite's virtual machine; the references need below 10 000
READING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}
COSTLY = {"printf", "format", "hex", "zeroblob", "randomblob", "fts3_tokenizer"}


def allow(action: int, _: str | None, name: str | None, *__: str | None) -> int:
    """Whether a query may do this: only read, by functions whose calls are short and leave nothing
    behind."""
    costly = action == sqlite3.SQLITE_FUNCTION and name.lower() in COSTLY
    return sqlite3.SQLITE_OK if action in READING and not costly else sqlite3.SQLITE_DENY


def shop() -> sqlite3.Connection:
    """The database, from now on read-only."""
    database = sqlite3.connect(":memory:")
    database.executescript(Path(__file__).with_name("shop.sql").read_text(encoding="utf-8"))
    database.set_authorizer(allow)
    database.set_progress_handler(lambda: True, INSTRUCTIONS)  # stops the query
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 1000)  # bytes of a value
    database.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, 20)
    return database


DATABASE = shop()


def query_in(text: str) -> str:
    """The query of an answer, after its reasoning: its first fenced block if it has one."""
    text = text.rpartition("</think>")[2]
    fenced = re.search(r"```(?:sql(?:ite)?)?\s*(.*?)(?:```|$)", text, re.DOTALL | re.IGNORECASE)
    return (fenced[1] if fenced else text).strip()


def result_of(query: str) -> list[tuple[Any, ...]]:
    """The query's rows, floats rounded. Raises `sqlite3.Error` for a query that does not run."""
    rows = DATABASE.execute(query).fetchmany(10_000)
    return [tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in rows]


def same_result(text: str, row: dict[str, Any]) -> bool:
    """Whether the answer's query gives a reference's rows, in order if the reference has one."""
    try:
        rows = result_of(query_in(text))
    except sqlite3.Error:
        return False
    for reference in row["references"]:
        right = result_of(reference)
        if rows == right or ("ORDER BY" not in reference and Counter(rows) == Counter(right)):
            return True
    return False
