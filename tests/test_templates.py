"""Chat templates of many kinds: what is printed, what the student learns, and where it stops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_models import CHATML, byte_pair, small_run, write_rows
from conftest import run_in_process

import common
import sequence_level

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
