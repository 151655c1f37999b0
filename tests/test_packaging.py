"""Tokenizers and models as people package them: what is read, what is compared, what is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from byte_models import (
    CHATML,
    CONTROL,
    byte_pair,
    byte_tokenizer,
    edit,
    llama,
    rows_of,
    scripted,
    small_run,
    write,
    write_rows,
)
from conftest import language_model, run_in_process
from test_templates import model_of, trained_on
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import cross_tokenizer
import on_policy
import sequence_level
import token_level
from common import Logits, Objective, Pair, UsageError

CPU = torch.device("cpu")
PLAIN = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(6)]
TOOLS = "{% if tools %}[{{ tools[0].name }}]{% endif %}" + CHATML
SCRIPTS = [sequence_level, token_level, on_policy, cross_tokenizer]


def plain_rows(directory: Path) -> str:
    return write_rows(directory / "rows.jsonl", PLAIN)


# -------------------------------------------------------------------------------- named templates


@pytest.mark.parametrize("form", ["list", "directory"])
def test_named_templates(tmp_path: Path, form: str, capsys):
    """The one named default is used, the one named tool_use for rows with tools; both are saved."""
    pair = byte_pair(tmp_path)
    for name in "ts":
        if form == "list":
            (tmp_path / name / "chat_template.jinja").unlink()
            both = {"default": CHATML, "tool_use": TOOLS}
            named = [{"name": n, "template": t} for n, t in both.items()]
            edit(tmp_path / name / "tokenizer_config.json", chat_template=named)
        else:
            (tmp_path / name / "additional_chat_templates").mkdir()
            (tmp_path / name / "additional_chat_templates/tool_use.jinja").write_text(TOOLS)
    run_in_process(sequence_level, **small_run(tmp_path, *pair, plain_rows(tmp_path)))
    assert trained_on(capsys) == 6 * (8 + 1)
    final = AutoTokenizer.from_pretrained(tmp_path / "run/final")
    assert final.chat_template == {"default": CHATML, "tool_use": TOOLS}
    for tools, before in ((None, ""), ([{"name": "clock"}], "[clock]")):
        turns = [{"role": "user", "content": "hi"}]
        text = common.render(final, turns, prompt=True, tools=tools)
        assert text == before + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_named_templates_without_a_default_are_refused(tmp_path: Path):
    pair = byte_pair(tmp_path)
    (tmp_path / "s/chat_template.jinja").unlink()
    named = [{"name": "tool_use", "template": TOOLS}, {"name": "rag", "template": CHATML}]
    edit(tmp_path / "s/tokenizer_config.json", chat_template=named)
    with pytest.raises(UsageError, match="no default"):
        run_in_process(sequence_level, **small_run(tmp_path, *pair, plain_rows(tmp_path)))


# ------------------------------------------------------------------------------------- vocabularies


def with_more(directory: Path, *tokens: str) -> str:
    """More tokens for the tokenizer of a directory than its model has rows."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("script", SCRIPTS)
def test_tokens_beyond_the_models_rows(tmp_path: Path, script: ModuleType):
    """Harmless if no text has them; a row that has one is named."""
    pair = byte_pair(tmp_path)
    for name in "ts":
        with_more(tmp_path / name, "<image>", "<audio>")
    run_in_process(script, **small_run(tmp_path, *pair, plain_rows(tmp_path)))
    run = tmp_path / "run"
    assert AutoTokenizer.from_pretrained(run / "final").convert_tokens_to_ids("<audio>") == 263
    for text in (
        {"prompt": "see <audio>", "response": "b"},
        {"prompt": "a", "response": "<image>"},
    ):
        rows = write_rows(tmp_path / "bad.jsonl", [*PLAIN, text])
        with pytest.raises(UsageError, match=r"bad\.jsonl:7: .*<(audio|image)>"):
            run_in_process(
                script, **small_run(tmp_path, *pair, rows, output_dir=str(tmp_path / "other"))
            )


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_added_token_on_one_side(tmp_path: Path, script: ModuleType, side: str):
    """The models are compared over the ids that both have, and final/ keeps all of its rows."""
    tokenizer, padded = byte_tokenizer(), byte_tokenizer()
    padded.add_tokens(["[PAD]", "[X]"], special_tokens=True)
    more = padded if side != "both" else byte_tokenizer()
    if side == "both":
        more.add_tokens(["[PAD]"])
    ours, theirs = {
        "student": (padded, tokenizer), "teacher": (tokenizer, padded), "both": (padded, more),
    }[side]  # fmt: skip
    said = theirs("\nfine", add_special_tokens=False)["input_ids"]
    teacher = write(tmp_path / "t", scripted(theirs, said), theirs)
    student = write(tmp_path / "s", llama(ours), ours)
    rows = plain_rows(tmp_path)
    run_in_process(script, **small_run(tmp_path, teacher, student, rows, completions="teacher"))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["after"]["kl_to_teacher"] > 0
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run/final")
    assert final.get_input_embeddings().num_embeddings == rows_of(ours)


def test_the_loss_over_common_ids_is_that_of_models_without_the_others():
    """A student with a row more, which would win every argmax: loss, KL and gradient are those of
    the student that lacks it."""
    small, padded = byte_tokenizer(), byte_tokenizer()
    padded.add_tokens(["[PAD]"], special_tokens=True)
    n = rows_of(small)
    wide = llama(padded, tie_word_embeddings=False)
    narrow = llama(small, tie_word_embeddings=False)
    state = {k: v[:n] if len(v) == n + 1 else v for k, v in wide.state_dict().items()}
    narrow.load_state_dict(state)
    wide.lm_head.weight.data[n] = 100 * wide.lm_head.weight.data[5]
    teacher = language_model(llama(small, 3), small, "teacher")
    gradients, losses = [], []
    for model, tokenizer in ((wide, padded), (narrow, small)):
        student = language_model(model, tokenizer, "student")
        Pair(student, teacher).check_same_vocabulary()
        tokens = common.Tokens(list(range(10, 30)), list(range(5, 20)))
        batch = common.collate([tokens], CPU)
        with torch.no_grad():
            theirs = Logits(teacher.hidden_states(batch), teacher.head())
            scores = common.compare(student.logits(batch), batch.targets, theirs)
        loss, sums = common.distillation_loss(
            student.logits(batch), batch.targets, Objective(ce_weight=0.3), theirs
        )
        loss.backward()
        losses.append(torch.stack([loss.detach(), sums[1], scores["kl"].sum()]))
        gradients.append(model.lm_head.weight.grad[:n])
        assert model.lm_head.weight.grad[n:].abs().sum() == 0
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("change", ["renamed", "another order", "more words"])
def test_vocabularies_that_differ_are_still_refused(tmp_path: Path, change: str):
    """Other tokens at common ids, or a larger vocabulary that is not merely added to."""
    teacher, student = byte_pair(tmp_path)
    path = tmp_path / "s/tokenizer.json"
    values = json.loads(path.read_text())
    known = values["model"]["vocab"]
    if change == "renamed":
        known["qq"] = known.pop("q")
    elif change == "another order":
        known["f"], known["z"] = known["z"], known["f"]
    else:
        known["qq"] = len(known)
    path.write_text(json.dumps(values))
    if change == "more words":
        model = llama(byte_tokenizer(), vocab_size=len(known))
        write(tmp_path / "s", model, AutoTokenizer.from_pretrained(tmp_path / "s"))
    with pytest.raises(UsageError, match=r"differ in \d tokens.*cross_tokenizer.py"):
        run_in_process(token_level, **small_run(tmp_path, teacher, student, plain_rows(tmp_path)))


@pytest.mark.parametrize("side", ["teacher", "student"])
def test_an_added_token_that_ends_turns_is_no_mere_addition(tmp_path: Path, side: str):
    """Of a chat model beside its base: each model learns its own end, across tokenizers."""
    plain, more = byte_tokenizer(), byte_tokenizer(CHATML.replace("<|im_end|>", "<|over|>"))
    more.add_tokens(["<|over|>"], special_tokens=True)
    more.eos_token = "<|over|>"
    models = {"teacher": model_of(plain), "student": model_of(plain), side: model_of(more)}
    pair = Pair(models["student"], models["teacher"])
    assert not pair.same_vocabulary
    with pytest.raises(UsageError, match=r"one is '<\|over\|>'\): use cross_tokenizer.py"):
        pair.check_same_vocabulary()
    row = common.Conversation([{"role": "user", "content": "ask"}], None, [], "x:1")
    prompts = common.tokenize_prompts([row], pair, 900)
    ids = common.tokenize(pair.teacher.tokenizer, "four")[0] + pair.teacher.end_ids[:1]
    answer = common.Completion("four", True, len(ids), ids)
    (example,) = common.completion_examples(prompts, [answer], pair, 900)
    for model, tokens in ((pair.student, example.student), (pair.teacher, example.teacher)):
        text = model.tokenizer.decode([tokens.ids[i] for i in tokens.targets])
        assert text == "four" + model.tokenizer.eos_token


def test_a_padded_vocabulary_and_an_added_token(tmp_path: Path):
    """Rows that no token has, on both sides, beside a token that only the student has."""
    tokenizer, more = byte_tokenizer(), byte_tokenizer()
    more.add_tokens(["[PAD]"], special_tokens=True)
    teacher = write(tmp_path / "t", llama(tokenizer, 3, vocab_size=300), tokenizer)
    student = write(tmp_path / "s", llama(more, vocab_size=288), more)
    args = token_level.Arguments(teacher=teacher, student=student, cache_teacher=False)
    pair = common.load_pair(args, CPU)
    pair.check_same_vocabulary()
    assert [len(m.head().weight) for m in pair] == [rows_of(tokenizer)] * 2


# ------------------------------------------------------------------------------------------- final


def config_of(directory: Path, name: str = "tokenizer_config.json") -> dict:
    return json.loads((directory / name).read_text())


def test_final_has_the_students_own_tokenizer_files(tmp_path: Path):
    """Class and special tokens as in the student's directory, as old versions read them."""
    pair = byte_pair(tmp_path)
    path = tmp_path / "s/tokenizer_config.json"
    own = {k: v for k, v in config_of(path.parent).items() if k in ("eos_token", "pad_token")}
    own |= {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": CONTROL[2:]}
    path.write_text(json.dumps(own))
    (tmp_path / "s/special_tokens_map.json").write_text('{"eos_token": "<|im_end|>"}')
    (tmp_path / "s/tokenizer.model").write_bytes(b"sentencepiece")
    (tmp_path / "s/preprocessor_config.json").write_text("{}")
    run_in_process(sequence_level, **small_run(tmp_path, *pair, plain_rows(tmp_path)))
    final = tmp_path / "run/final"
    assert config_of(final) == own | {"chat_template": CHATML}
    assert (final / "tokenizer.json").read_bytes() == (tmp_path / "s/tokenizer.json").read_bytes()
    for name in ("special_tokens_map.json", "tokenizer.model", "preprocessor_config.json"):
        assert (final / name).read_bytes() == (tmp_path / "s" / name).read_bytes()


@pytest.mark.parametrize("way", ["--chat-template", "from the teacher"])
def test_final_has_the_template_that_was_used(tmp_path: Path, way: str):
    """In both places, whatever the student's own files say."""
    template, flags = CHATML.replace("assistant\n", "assistant: "), {}
    pair = byte_pair(tmp_path, template if way == "from the teacher" else CHATML)
    (tmp_path / "s/chat_template.jinja").unlink()
    if way == "--chat-template":
        edit(tmp_path / "s/tokenizer_config.json", chat_template=CHATML)
        (tmp_path / "t.jinja").write_text(template)
        flags = {"chat_template": str(tmp_path / "t.jinja")}
    run_in_process(sequence_level, **small_run(tmp_path, *pair, plain_rows(tmp_path), **flags))
    final = tmp_path / "run/final"
    assert (final / "chat_template.jinja").read_text() == template
    assert config_of(final)["chat_template"] == template
    assert AutoTokenizer.from_pretrained(final).chat_template == template


def test_final_can_be_read_by_older_versions(tmp_path: Path):
    """Names that 4.x does not know are written as it knows them, and the rotary base in its place:
    there it would be 10000 in silence."""
    teacher, _ = byte_pair(tmp_path)
    tokenizer = byte_tokenizer()
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 512}  # fmt: skip
    student = write(tmp_path / "new", llama(tokenizer, rope_parameters=rope), tokenizer)
    assert config_of(tmp_path / "new")["tokenizer_class"] == "TokenizersBackend"
    assert "rope_theta" not in config_of(tmp_path / "new", "config.json")
    run_in_process(sequence_level, **small_run(tmp_path, teacher, student, plain_rows(tmp_path)))
    final = tmp_path / "run/final"
    written = config_of(final)
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == CONTROL[2:]
    assert "extra_special_tokens" not in written
    config = config_of(final, "config.json")
    assert (config["rope_theta"], config["torch_dtype"]) == (5e5, "float32")
    assert config["rope_scaling"]["factor"] == 8.0
    loaded = AutoModelForCausalLM.from_pretrained(final)
    assert loaded.config.rope_parameters == rope
    assert AutoTokenizer.from_pretrained(final).all_special_tokens == tokenizer.all_special_tokens


# ------------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("change", ["tokenizer", "template"])
def test_cached_text_is_found_by_tokenizer_and_template(tmp_path: Path, change: str):
    """Other files of equal size and time of change beside equal weights are another teacher."""
    teacher, student = byte_pair(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    if change == "tokenizer":
        path = other / "tokenizer.json"
        values = json.loads(path.read_text())
        known = values["model"]["vocab"]
        known["f"], known["z"] = known["z"], known["f"]
        text = json.dumps(values, ensure_ascii=False, indent=2)
    else:
        path = other / "chat_template.jinja"
        text = path.read_text().replace("+", "-")
        text = text.replace("assistant\n{% endif", "assistent\n{% endif")
    before = path.stat()
    path.write_text(text)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    digests = {common.digest_of_model(str(name), "main") for name in (teacher, other)}
    assert len(digests) == 2
    texts = []
    for name in (teacher, str(other)):
        flags = {"completions": "teacher", "output_dir": str(tmp_path / Path(name).name / "run")}
        run_in_process(
            sequence_level, **small_run(tmp_path, name, student, plain_rows(tmp_path), **flags)
        )
        lines = (tmp_path / Path(name).name / "run/completions.jsonl").read_text().splitlines()
        texts.append(json.loads(lines[0])["messages"][-1]["content"])
    assert texts == ["fine", "zine" if change == "tokenizer" else "fine"]
