"""Fixtures: tiny random models of several architectures, and the scripts as a user runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from captured import Graph, capture
from emulated import EMULATION, Emulation
from forked import ForkedScript
from transformers import (
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
# One thread for each process, this one and those that it starts: the models are tiny, and on a busy
# machine threads that wait for one another take several times longer than one thread.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
if torch.backends.mps.is_available():  # which does not survive the forks of `forked.py`
    os.environ["ACCELERATE_USE_CPU"] = "true"

import common  # noqa: E402  (the modules lie in the repository's root and are not installed)


def run_script(
    script: str, *flags: str | Path, cwd: Path, timeout: int = 1800, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a script in `cwd` as a user would, and return what it printed.

    The limit only ends a run that hangs: a busy machine may take ten times longer than a quiet one.
    """
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **environment},
    )


def run_in_process(script: ModuleType, **flags: object) -> None:
    """Call a script's `main`, which saves the seconds that a process takes to start, and those
    that curves take to draw."""
    AcceleratorState._reset_state()
    PartialState._reset_state()
    with mock.patch.object(common, "draw_curves"):
        script.main(script.Arguments(**flags))


def wait_for(process: subprocess.Popen[bytes] | ForkedScript, moment: Callable[[], bool]) -> bool:
    """Wait until `moment()` is true; False if the process ends before that."""
    while process.poll() is None:
        if moment():
            return True
        time.sleep(0.001)
    return False


def tiny_model(kind: str, vocabulary: int, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random float32 model; each architecture computes its logits in another way."""
    torch.manual_seed(seed)
    size = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "initializer_range": 0.3,
        **changes,
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**{"tie_word_embeddings": False, **size})).eval()
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**{"tie_word_embeddings": True, **size})).eval()
    if kind == "mistral":  # all layers have the window; of Gemma 2's, every other one
        return MistralForCausalLM(MistralConfig(**{"sliding_window": 6, **size})).eval()
    if kind == "gemma2":
        cap = {"final_logit_softcapping": 5.0, "head_dim": 8, "query_pre_attn_scalar": 8}
        return Gemma2ForCausalLM(Gemma2Config(**{**size, **cap})).eval()
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=vocabulary, n_positions=512, n_embd=32, n_layer=2, n_head=4,
            eos_token_id=1, pad_token_id=0, initializer_range=0.3,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        return GPT2LMHeadModel(config).eval()
    raise ValueError(kind)


def language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> common.LanguageModel:
    """A model that is in memory already as a `LanguageModel`, with its name as its digest."""
    ends = common.end_of_turn_ids(tokenizer, model.config, model.generation_config)
    opens = common.opened_tag(tokenizer) if tokenizer.chat_template else ""
    return common.LanguageModel(
        name, tokenizer, model.config, ends, model.dtype, model.device, name, lambda _: model,
        opens=opens,
    )  # fmt: skip


def with_response(prompt_ids: list[int], response_ids: list[int]) -> common.Tokens:
    """A prompt with its response, of which every token is a target."""
    ids = prompt_ids + response_ids
    return common.Tokens(ids, list(range(len(prompt_ids), len(ids))))


def example_of(tokens: common.Tokens, index: int = 0) -> common.Example:
    """An example that both models read alike; its prompt is what precedes the first target."""
    prompt_ids = tokens.ids[: tokens.targets[0]] if tokens.targets else tokens.ids
    conversation = common.Conversation([], None, [], f"row {index}")
    prompt = common.Prompt(conversation, prompt_ids, prompt_ids)
    return common.Example(index, prompt, "", tokens, tokens)


def generate(
    model: common.LanguageModel, prompts: Sequence[list[int]], seeds: Sequence[int], *,
    max_new_tokens: int, temperature: float, top_p: float = 1.0, batch_size: int = 256,
) -> Iterator[tuple[int, common.Completion]]:  # fmt: skip
    """`common.generate` without a script's arguments."""
    args = common.Flags(max_new_tokens=max_new_tokens, generation_batch_size=batch_size)
    return common.generate(model, prompts, seeds, args, temperature, top_p)


def score(evaluator: common.Evaluator, student: common.LanguageModel) -> list[common.Tally]:
    """Tallies of a student other than the one that the evaluator was made for."""
    evaluator.student = student
    return evaluator()


@pytest.fixture(autouse=True)
def handlers():
    """Restores the signal handlers that a training loop left by an exception leaves behind."""
    before = [(s, signal.getsignal(s)) for s in (signal.SIGTERM, signal.SIGINT)]
    yield
    for number, handler in before:
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(common.DATA / "teacher")


@pytest.fixture(scope="session")
def emulation(tmp_path_factory) -> Iterator[Emulation]:
    """Runs scripts on an emulated CUDA device, where there is one."""
    if not EMULATION.exists():
        pytest.skip("no emulated CUDA device here")
    emulation = Emulation(tmp_path_factory.mktemp("emulation"))
    yield emulation
    emulation.close()


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory) -> Path:
    """A --cache-dir for runs of the embedded pair, so that the teacher answers each prompt once."""
    return tmp_path_factory.mktemp("shared") / "cache"


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> type[Graph]:
    """CUDA graphs are emulated; `replays` counts theirs."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: Graph.modes.append(mode))
    monkeypatch.setattr(Graph, "replays", 0)
    monkeypatch.setattr(Graph, "modes", [])
    return Graph


@pytest.fixture(scope="session")
def tiny(tokenizer):
    """A tiny model with the embedded tokenizer, as a `LanguageModel`."""

    def make(
        kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: object
    ) -> common.LanguageModel:
        model = tiny_model(kind, len(tokenizer.get_vocab()), seed, **changes).to(dtype)
        return language_model(model, tokenizer, f"{kind}-{seed}")

    return make


def top_of(teacher_logits: torch.Tensor, targets: torch.Tensor, k: int) -> common.TopLogprobs:
    """What a server would say, in the precision of the logits and with its entries in any order."""
    logprobs, rows = teacher_logits.log_softmax(-1), []
    for row, target in zip(logprobs, targets.tolist(), strict=True):
        named = [target, *(i for i in row.topk(k).indices.tolist() if i != target)]
        others = [i for i in range(len(row)) if i not in named]
        absent = k + 1 - len(named)
        values = [*row[named].tolist(), *[common.ABSENT] * absent]
        values.append(row[others].logsumexp(-1).item() if others else common.ABSENT)
        rows.append(([*named, *[target] * absent], values))
    ids, values = zip(*rows, strict=True)
    return common.TopLogprobs(torch.tensor(ids), torch.tensor(values, dtype=logprobs.dtype))
