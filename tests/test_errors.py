"""Every wrong input ends with exit code 2, one sentence that helps, and nothing written.

Most cases drive `common.launch` in this process, from the command line to the exit code: a process
of its own spends five seconds on imports. `SUBPROCESS` names those that are run as a user would.
Below the errors stand the odd inputs that are valid and must train.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import run_script
from safetensors.torch import load_file, save_file

import common
import token_level

WORDS = ["night", "train", "knowledge", "river", "seven", "cloud"]
GOOD = [{"prompt": word, "response": "N AA1 L AH0 JH"} for word in WORDS]
RUN = '{"script": "token_level"}'  # args.json of a run
# A case that wrongly succeeds must not take long; a case's own flags come later and win.
SMALL = [
    "--dataset", "good.jsonl", "--max-steps", "2", "--batch-size", "4", "--max-new-tokens", "4",
    "--warmup-steps", "1",
]  # fmt: skip


def jsonl(*rows: object) -> bytes:
    """Rows as JSON lines; bytes stand for themselves."""
    return b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)


@dataclass
class Case:
    """Flags, the words that the sentence must hold, and what lies in the directory."""

    name: str
    flags: str
    words: Sequence[str]
    data: bytes | None = None  # bad.jsonl, or the file that --dataset names
    prepare: Callable[[Path], object] | None = None


def change_model(**config: Any) -> Callable[[Path], Path]:
    """A copy of the embedded student in broken/, with other entries in its config.json."""

    def prepare(tmp: Path) -> Path:
        shutil.copytree(common.DATA / "student", tmp / "broken")
        file = tmp / "broken" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
        return tmp / "broken"

    return prepare


def no_model(tmp: Path) -> None:
    (change_model()(tmp) / "config.json").unlink()


def truncated_weights(tmp: Path) -> None:
    file = change_model()(tmp) / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def header_only(tmp: Path) -> None:
    file = change_model()(tmp) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**40) + b"{}")


def missing_tensor(tmp: Path) -> None:
    file = change_model()(tmp) / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})


def pickled_weights(tmp: Path) -> None:
    file = change_model()(tmp) / "model.safetensors"
    torch.save(load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def own_code(tmp: Path) -> None:
    code = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    directory = change_model(model_type="own", auto_map=code)(tmp)
    (directory / "own.py").write_text("raise SystemExit('code from outside was run')\n")


def no_template(tmp: Path) -> None:
    shutil.copytree(common.DATA / "teacher", tmp / "broken")
    (tmp / "broken" / "chat_template.jinja").unlink()


def other_template(text: bytes) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        no_template(tmp)
        (tmp / "own.jinja").write_bytes(text)

    return prepare


def full_directory(name: str) -> Callable[[Path], None]:
    def prepare(tmp: Path) -> None:
        (tmp / "mine").mkdir()
        (tmp / "mine" / name).write_text("{}")

    return prepare


def damaged_cache(tmp: Path) -> None:
    """A cache as a run makes it, whose second line then loses its beginning."""
    code, _, problem = launch(tmp, "--max-steps 1 --output-dir once")
    assert code == 0, problem
    shutil.rmtree(tmp / "once")
    texts = {file: file.read_text() for file in (tmp / "runs" / "cache").rglob("*.jsonl")}
    (training,) = (file for file, text in texts.items() if text.count("\n") > 1)
    lines = texts[training].splitlines(keepends=True)
    training.write_text(lines[0] + lines[1][9:] + "".join(lines[2:]))


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda tmp: (tmp / name).write_bytes(content)


A, B = GOOD[:2]
RAISES = b"{{ raise_exception('only system prompts please') }}"
DATASET_COMPLETIONS = "--dataset bad.jsonl --completions dataset"
CASES = [
    # the command line
    Case("unknown flag", "--learning-rat 1", ["--learning-rat", "--help"]),
    Case("abbreviated flag", "--temp 2", ["--temp"]),
    Case("stray word", "sweep", ["sweep"]),
    Case("no such choice", "--kl sideways", ["--kl", "sideways", "forward"]),
    Case("not a number", "--batch-size many", ["--batch-size", "many"]),
    Case("seed beyond 64 bits", f"--seed {2**63}", ["--seed", "2**63"]),
    Case("reserved template argument", "--template-kwargs {\"messages\":1}",
         ["--template-kwargs", "messages"]),
    Case("a run that would remove its cache", "--output-dir run --overwrite --cache-dir run/cache",
         ["--overwrite would remove run/cache"],
         prepare=lambda tmp: ((tmp / "run").mkdir(), (tmp / "run/args.json").write_text(RUN))),
    Case("a run that would remove its student", "--output-dir run --overwrite --student run/final",
         ["--overwrite would remove run/final, which this run reads"],
         prepare=lambda tmp: (shutil.copytree(common.DATA / "student", tmp / "run/final"),
                              (tmp / "run/args.json").write_text(RUN))),
    Case("another program's directory", "--output-dir run --overwrite",
         ["--overwrite would remove run, which is no run (by args.json)"],
         prepare=lambda tmp: ((tmp / "run").mkdir(),
                              (tmp / "run/args.json").write_text('{"lr": 1}'))),
    Case("an adapter as student", "--student adapter",
         ["adapter holds an adapter of peft", "merge it"],
         prepare=lambda tmp: ((tmp / "adapter").mkdir(),
                              (tmp / "adapter/adapter_config.json").write_text("{}"))),
    Case("a template that clears the screen", "--chat-template clear.jinja",
         [r"\x1b[2Jgone"],
         prepare=lambda tmp: (tmp / "clear.jinja").write_text(
             "{{ raise_exception('\x1b[2Jgone') }}")),
    Case("temperature 0", "--temperature 0", ["--temperature", "above 0"]),
    Case("temperature nan", "--temperature nan", ["--temperature", "nan"]),
    Case("temperature negative", "--temperature -1", ["--temperature", "-1"]),
    Case("learning rate inf", "--learning-rate inf", ["--learning-rate", "inf"]),
    Case("batch size 0", "--batch-size 0", ["--batch-size"]),
    Case("jsd beta 0", "--kl jsd --jsd-beta 0", ["--jsd-beta", "(0, 1)", "forward"]),
    Case("jsd beta 1", "--kl jsd --jsd-beta 1", ["--jsd-beta", "(0, 1)"]),
    Case("skew 1", "--skew 1", ["--skew", "(1e-6, 1)"]),
    Case("skew that rounding loses", "--skew 1e-17 --kl reverse", ["--skew", "(1e-6, 1)"]),
    Case("skew with jsd", "--skew 0.1 --kl jsd", ["--skew", "jsd"]),
    Case("top-p 0", "--top-p 0", ["--top-p", "(0, 1]"]),
    Case("resume nothing", "--resume", ["--resume", "--output-dir"]),
    Case("resume and overwrite", "--resume --overwrite --output-dir mine", ["contradict"]),
    Case("nothing to train", "--epochs 0 --max-steps -1", ["--epochs", "--max-steps"]),
    # data
    Case("no data set", "--dataset nosuch.jsonl", ["nosuch.jsonl", "No such file"]),
    Case("no csv", "--dataset nosuch.csv", ["nosuch.csv"]),
    Case("a directory as data", "--dataset .", ["cannot load", "."]),
    Case("no eval data set", "--eval-dataset nosuch.jsonl", ["nosuch.jsonl"]),
    Case("empty data set", "--dataset bad.jsonl", ["bad.jsonl", "no rows"], b"\n\n"),
    Case(
        "malformed line", "--dataset bad.jsonl", ["bad.jsonl:3", "not JSON"],
        jsonl(A, B, b'{"prompt": "riv', A),
    ),
    Case("not UTF-8", "--dataset bad.jsonl", ["bad.jsonl:2", "UTF-8"],
         jsonl(A, b'{"prompt": "na\xefve"}', B)),
    Case("deep nesting", "--dataset bad.jsonl", ["bad.jsonl:1"], b"[" * 100_000),
    Case(
        "null content", "--dataset bad.jsonl", ["bad.jsonl:2", "content", "user", "null"],
        jsonl(A, {"messages": [{"role": "user", "content": None}]}),
    ),
    Case(
        "turn without a role", "--dataset bad.jsonl", ["bad.jsonl:2", "role"],
        jsonl(A, {"messages": [{"content": "night"}]}),
    ),
    Case(
        "no usable column", "--dataset bad.jsonl", ["bad.jsonl:2", "prompt", "messages"],
        jsonl(A, {"text": "night", "prompt": None}),
    ),
    Case("row is no object", "--dataset bad.jsonl", ["bad.jsonl:2", "object"], jsonl(A, "night")),
    Case("content a number", "--dataset bad.jsonl", ["bad.jsonl:2", "string", "int"],
         jsonl(A, {"prompt": 42})),
    Case("content in parts", "--dataset bad.jsonl", ["bad.jsonl:1", "not text", "image"],
         jsonl({"messages": [{"role": "user", "content": [{"type": "image"}]}]})),
    Case("instruction a number", "--dataset bad.jsonl", ["bad.jsonl:2", "string", "int"],
         jsonl(A, {"instruction": 42, "input": "x"})),
    Case("messages a number", "--dataset bad.jsonl", ["bad.jsonl:2", "list"],
         jsonl(A, {"messages": 42})),
    Case("half a surrogate pair", "--dataset bad.jsonl", ["bad.jsonl:2"],
         jsonl(A, b'{"prompt": "\\ud83d"}')),
    Case("no assistant turn", DATASET_COMPLETIONS, ["bad.jsonl:2", "assistant", "--completions"],
         jsonl(A, {"prompt": "night"}, B)),
    Case("unknown role", "--dataset bad.jsonl", ["bad.jsonl:2", "role", "narrator"],
         jsonl(A, {"messages": [{"role": "narrator", "content": "night"}]})),
    Case("one object over several lines", "--dataset bad.json", ["bad.json:1", "not JSON"],
         prepare=write("bad.json", b'{\n"prompt": "night"\n}')),
    Case("malformed array", "--dataset bad.json", ["bad.json:3", "not JSON"],
         prepare=write("bad.json", b'[\n{"prompt": "night"},\n{"prompt" "train"}\n]')),
    Case("row of an array", "--dataset bad.json", ["bad.json: row 2", "content", "null"],
         prepare=write("bad.json", json.dumps([A, {"messages": [{"role": "user"}]}]).encode())),
    Case("no gzip inside", "--dataset bad.jsonl.gz", ["bad.jsonl.gz", "gzip"],
         prepare=write("bad.jsonl.gz", jsonl(A, B))),
    Case("truncated gzip", "--dataset bad.jsonl.gz", ["cannot read bad.jsonl.gz", "ended before"],
         prepare=write("bad.jsonl.gz", gzip.compress(jsonl(A, B))[:-12])),
    Case("csv without columns", "--dataset bad.csv", ["bad.csv", "prompt", "missing or null"],
         prepare=write("bad.csv", b"word,sound\nnight,N AY1 T\n")),
    Case("no parquet inside", "--dataset bad.parquet", ["bad.parquet"],
         prepare=write("bad.parquet", b"PAR1 and no more")),
    Case("all prompts too long", "--max-length 3", ["do not fit", "--max-length 3"]),
    Case("nothing left to train on", "--dataset bad.jsonl --eval-size 2",
         ["--eval-size 2", "2 rows", "bad.jsonl"], jsonl(A, B)),
    # models
    Case("longer than the model", "--max-length 513", ["--max-length 513", "teacher", "512"]),
    Case("empty directory", "--student broken", ["broken"],
         prepare=lambda tmp: (tmp / "broken").mkdir()),
    Case("directory without a model", "--student broken", ["cannot load", "broken", "config.json"],
         prepare=no_model),
    Case("no such directory", "--teacher ./no/such/model", ["./no/such/model"]),
    Case("hub id offline", "--teacher someone/some-model", ["someone/some-model"]),
    Case("truncated weights", "--student broken", ["cannot load", "broken"],
         prepare=truncated_weights),
    Case("no weights in the file", "--student broken", ["cannot load", "broken"],
         prepare=header_only),
    Case("a tensor is missing", "--student broken", ["broken", "layers.1.mlp.up_proj", "lacks"],
         prepare=missing_tensor),
    Case("a tensor of another shape", "--student broken", ["broken", "mlp"],
         prepare=change_model(intermediate_size=128)),
    Case("pickled weights", "--student broken", ["broken", "safetensors"],
         prepare=pickled_weights),
    Case("code of its own", "--student broken", ["broken", "code"], prepare=own_code),
    Case("other vocabulary", f"--student {common.DATA / 'student_other_tokenizer'}",
         ["vocabularies", "student_other_tokenizer", "cross_tokenizer.py"]),
    Case("no chat template", "--teacher broken", ["broken", "chat template", "--chat-template"],
         prepare=no_template),
    Case("no template file", "--chat-template own.jinja", ["--chat-template", "own.jinja"]),
    Case("template is no text", "--teacher broken --chat-template own.jinja", ["own.jinja"],
         prepare=other_template(b"\xff\xfe{{ messages }}")),
    Case("template is no template", "--teacher broken --chat-template own.jinja",
         ["template"], prepare=other_template(b"{% for %}")),
    Case("template raises", "--teacher broken --chat-template own.jinja",
         ["template", "only system prompts please"], prepare=other_template(RAISES)),
    # directories
    Case("a tilde that the shell has left", "--output-dir=~/x", ["--output-dir", "~/x", "shell"]),
    Case("a tilde alone", "--output-dir=~", ["--output-dir", "shell"]),
    Case("an empty value", "--dataset=", ["--dataset is empty"]),
    Case("no steps", "--max-steps 0", ["--max-steps must be 1 or more"]),
    Case("runs on a disk that is gone", "--cache-dir good.jsonl.cache", ["cannot", "runs"],
         prepare=lambda tmp: (tmp / "runs").symlink_to(tmp / "gone")),
    Case("output on a disk that is gone", "--output-dir mine", ["cannot", "mine"],
         prepare=lambda tmp: (tmp / "mine").symlink_to(tmp / "gone")),
    Case("output in use", "--output-dir mine", ["mine", "not empty", "--overwrite"],
         prepare=full_directory("args.json")),
    Case("resume what is not ours", "--output-dir mine --resume",
         ["--resume", "mine", "args.json"], prepare=full_directory("thesis.tex")),
    Case("output is a file", "--output-dir mine", ["--output-dir", "mine"],
         prepare=write("mine", b"")),
    Case("overwrite what is not ours", "--output-dir mine --overwrite",
         ["--overwrite", "mine", "no run"], prepare=full_directory("thesis.tex")),
    Case("output cannot be written", "--output-dir good.jsonl/run", ["good.jsonl", "write"]),
    Case("cache cannot be written", "--cache-dir good.jsonl/cache", ["good.jsonl", "write"]),
    Case("corrupt cache", "", [".jsonl:2", "corrupt", "delete"], prepare=damaged_cache),
]  # fmt: skip
# An early one, and those where a library prints or logs something of its own.
SUBPROCESS = {"unknown flag", "no parquet inside", "a tensor is missing", "hub id offline"}


def launch(tmp: Path, flags: str) -> tuple[int, str, str]:
    """Exit code, standard output and error of `token_level.py` with SMALL and `flags`, in here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp)
        patch.setattr(sys, "argv", ["token_level.py", *SMALL, *flags.split()])
        out, err = tmp.with_name(tmp.name + "-out"), tmp.with_name(tmp.name + "-err")
        with open(out, "w") as a, open(err, "w") as b:
            patch.setattr(sys, "stdout", a)
            patch.setattr(sys, "stderr", b)
            code = 0
            try:
                common.launch(token_level.main, token_level.Arguments, token_level.__doc__)
            except SystemExit as stop:
                code = stop.code
    return code, out.read_text(), err.read_text()


def set_up(tmp: Path, case: Case) -> dict[Path, bytes | None]:
    """Write the case's files; what then lies in its directory."""
    (tmp / "good.jsonl").write_bytes(jsonl(*GOOD))
    if case.data is not None:
        (tmp / "bad.jsonl").write_bytes(case.data)
    if case.prepare:
        case.prepare(tmp)
    return content(tmp)


def content(directory: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in sorted(directory.rglob("*"))}


def check(case: Case, code: int, out: str, err: str, before: dict, after: dict) -> None:
    """One sentence with every word that helps; nothing printed, written or changed beside it."""
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert "Traceback" not in err and len(err) < 600
    for word in case.words:
        assert word in err, (word, err)
    assert out == "", out
    assert [p for p in after if p not in before] == []
    assert before == after


def every_json_form(tmp: Path) -> list[str]:
    """JSON Lines with a byte order mark, CRLF ends, blank lines, odd scripts and every form.

    They are in a .json file, and an array is in a .jsonl file: the content decides.
    """
    turn = {"role": "user", "content": "train"}
    answer = {"role": "assistant", "content": "T R EY1 N"}
    rows = [
        {"prompt": "night", "completion": "😀🏳️‍🌈"},
        {"prompt": "לילה", "response": "שלום עולם"},
        {"messages": [turn, answer, turn, answer], "id": 5, "source": None},
        {"prompt": [turn], "completion": [answer]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "AH0"}]},
        {"instruction": "spell", "input": "cloud", "output": "K L AW1 D"},
        {"instruction": "spell it", "input": "", "output": ""},
        {"prompt": "a\u2028b\x00c", "response": "two\nlines\u2028three", "references": ["x"]},
        {"prompt": "long " * 40, "response": "left out"},
        {"prompt": "longer " * 40, "response": "left out"},
        {"prompt": "cut", "response": "N AA1 L AH0 JH " * 20},
    ]
    text = "\r\n".join(json.dumps(row, ensure_ascii=i % 2 == 0) for i, row in enumerate(rows))
    (tmp / "odd.json").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n\r\n")
    (tmp / "eval.jsonl").write_text(json.dumps([{"prompt": "night"}, {"prompt": "😀"}]))
    return [
        "--dataset", "odd.json", "--completions", "dataset", "--eval-dataset", "eval.jsonl",
        "--max-length", "100", "--max-steps", "2", "--max-new-tokens", "4", "--warmup-steps", "1",
        "--batch-size", "9", "--micro-batch-size", "2", "--output_dir", "named",
    ]  # fmt: skip


def tables(tmp: Path) -> list[str]:
    """CSV in, its cells being text whatever they look like; Parquet to evaluate on."""
    (tmp / "words.csv").write_text('prompt,reference\nnull,N AH1 L\n42,\n"a ""b"", c",x\nNaN,y\n')
    rows = {
        "messages": [[{"role": "user", "content": word}] for word in WORDS[:3]],
        "references": [["N AY1 T", "N"], ["T R EY1 N"], None],
    }
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp / "eval.parquet")
    return [
        "--dataset", "words.csv", "--eval-dataset", "eval.parquet", "--max-steps", "2",
        "--max-new-tokens", "4", "--batch-size", "4", "--sampling-temperature", "0",
        "--warmup-steps", "1", "--output-dir", "named",
    ]  # fmt: skip


ODD = [every_json_form, tables]


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> Iterator[dict[str, tuple[Path, dict, Future]]]:
    """The SUBPROCESS cases and the valid runs, two at a time."""
    started = {}
    with ThreadPoolExecutor(2) as pool:

        def start(name: str, tmp: Path, before: dict, flags: Sequence[str]) -> None:
            job = pool.submit(run_script, "token_level.py", *flags, cwd=tmp)
            started[name] = tmp, before, job

        for case in CASES:
            if case.name in SUBPROCESS:
                tmp = tmp_path_factory.mktemp("process")
                before = set_up(tmp, case)
                start(case.name, tmp, before, [*SMALL, *case.flags.split()])
        for odd in ODD:
            tmp = tmp_path_factory.mktemp("odd")
            start(odd.__name__, tmp, {}, odd(tmp))
        yield started


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.name not in SUBPROCESS], ids=lambda c: c.name
)
def test_error(case: Case, tmp_path: Path):
    """Exit code 2, one sentence, nothing written; from the command line on, in this process."""
    before = set_up(tmp_path, case)
    check(case, *launch(tmp_path, case.flags), before, content(tmp_path))


@pytest.mark.parametrize("case", [c for c in CASES if c.name in SUBPROCESS], ids=lambda c: c.name)
def test_error_as_a_user_sees_it(case: Case, processes: dict):
    """The same as a process of its own, with everything that libraries print."""
    tmp, before, job = processes[case.name]
    done: CompletedProcess[str] = job.result()
    check(case, done.returncode, done.stdout, done.stderr, before, content(tmp))


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.__name__)
def test_odd_but_valid(odd: Callable, processes: dict):
    """Unusual data trains to the end, and what was left out is counted and said."""
    tmp, _, job = processes[odd.__name__]
    done: CompletedProcess[str] = job.result()
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [json.loads(line) for line in (tmp / "named" / "metrics.jsonl").open()]
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line["train/loss"] > 0 and line["optim/grad_norm"] > 0 for line in steps)
    trained = load_file(tmp / "named" / "final" / "model.safetensors")
    untrained = load_file(common.DATA / "student" / "model.safetensors")
    for name, weight in untrained.items():
        assert torch.isfinite(trained[name]).all()
        assert not torch.equal(trained[name], weight.float()), name
    results = json.loads((tmp / "named" / "results.json").read_text())
    if odd is every_json_form:
        assert "8 examples" in done.stdout and "1 of 9 conversations left out" in done.stdout
        assert "not used, by rows: {'id': 1}\n" in done.stdout
        assert "\n2 of 11 prompts left out: they do not fit into --max-length 100\n" in done.stdout
        assert done.stdout.count("prompts left out") == 1 and "1 responses cut" in done.stdout
        assert results["evaluation"] == {"rows": 2, "unreferenced_rows": 2}
        assert "2 of 2 evaluation rows have no reference" in done.stdout
        assert not (tmp / "runs" / "token_level").exists()
    else:
        assert "4 examples" in done.stdout and "left out" not in done.stdout
        assert results["evaluation"] == {"rows": 3, "unreferenced_rows": 1}
        text = "".join(f.read_text() for f in (tmp / "runs" / "cache").rglob("*.jsonl"))
        asked = [json.loads(line)["messages"] for line in text.splitlines()]
        for cell in ("null", "42", 'a "b", c', "NaN"):
            assert [{"role": "user", "content": cell}] in asked


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson", "a.jsonl.gz", "a.json.gz"])
def test_json_is_read_whatever_the_file_is_called(name: str, tmp_path: Path):
    """Lines or an array, with or without gzip: the same conversations, each with its place."""
    compress = gzip.compress if name.endswith(".gz") else bytes
    loaded = {}
    for form, data in (("lines", jsonl(*GOOD)), ("array", json.dumps(GOOD, indent=2).encode())):
        (tmp_path / name).write_bytes(compress(data))
        loaded[form] = common.load_conversations(str(tmp_path / name))
    for i, pair in enumerate(zip(*loaded.values(), strict=True)):
        assert [c.messages[0]["content"] for c in pair] == [WORDS[i]] * 2
        assert [c.response["content"] for c in pair] == [GOOD[i]["response"]] * 2
        assert [c.source.removeprefix(str(tmp_path / name)) for c in pair] == [
            f":{i + 1}", f": row {i + 1}"
        ]  # fmt: skip


def test_a_file_is_not_held_in_memory(tmp_path: Path):
    """What reading takes at most is what is kept; of a first part, next to nothing."""
    rows = [{"prompt": "x" * 2000 + "😀" * (i == 5), "answer": "y"} for i in range(2000)]
    common.write_json_lines(tmp_path / "a.jsonl", rows)
    for count, megabytes in ((0, 8), (10, 0.2)):
        tracemalloc.start()
        kept = common.load_conversations(str(tmp_path / "a.jsonl"), max_rows=count)
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(kept) == (count or 2000) and peak < megabytes * 1e6 and peak < now + 1e5


def test_run_directories_are_numbered_or_replaced(tmp_path: Path):
    """Equal flags again make -2; --overwrite replaces a run of ours and nothing beside it."""
    set_up(tmp_path, Case("", "", []))
    for _ in range(2):
        code, _, err = launch(tmp_path, "--eval-steps 0")
        assert code == 0, err
    first, second = sorted(p for p in (tmp_path / "runs").iterdir() if p.name != "cache")
    assert second.name == first.name + "-2"
    arguments = [json.loads((p / "args.json").read_text()) for p in (first, second)]
    assert arguments[0] == arguments[1] and arguments[0]["temperature"] == 1.0
    assert load_file(first / "final" / "model.safetensors").keys()
    (first / "stale").touch()
    shutil.move(first / "checkpoints", tmp_path / "elsewhere")
    (first / "checkpoints").symlink_to(tmp_path / "elsewhere")
    before = content(second)
    code, _, err = launch(tmp_path, f"--eval-steps 0 --overwrite --output-dir {first}")
    assert code == 0, err
    assert (first / "results.json").exists() and not (first / "stale").exists()
    assert list((tmp_path / "elsewhere").iterdir())
    assert content(second) == before
