"""The branches that a GPU takes, on an emulated CUDA device: products, waiting, what is trained.

Skipped where the emulation is not there; it lies beside the repository, in shared/.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT
from emulated import EMULATION, Emulation
from test_architectures import CAPTURED


@pytest.mark.parametrize(
    "script", ["token_level.py", "sequence_level.py", "on_policy.py", "cross_tokenizer.py"]
)
def test_training_steps_on_a_gpu(tmp_path: Path, emulation: Emulation, script: str):
    """Heads multiply in bfloat16 and sum in float32, nothing in a step's loss waits for the device,
    a step's copies are pinned, and the optimizer's parameters are those that move."""
    flags = ["--max-steps", "3", "--max-rows", "16", "--eval-size", "2", "--batch-size", "8",
             "--micro-batch-size", "4", "--max-new-tokens", "9", "--eval-steps", "0",
             "--warmup-steps", "1", "--output-dir", "run"]  # fmt: skip
    report = tmp_path / "report.json"
    command = [EMULATION / "run.py", "--report", report, ROOT / script, *flags]
    done = emulation.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert found["training"]["optimizer_steps"] == 3 and not found["training"]["problems"]

    products = {(p["operator"], p["inputs"], p["output"]): p["share"] for p in found["products"]}
    half, single = "bfloat16 x bfloat16", "float32 x float32"
    assert set(products) == {
        ("mm", half, "bfloat16"),
        ("mm.dtype", half, "float32"),  # heads and their gradients
        ("mm", single, "float32"),  # a few tokens, when a model is loaded
    }
    assert products["mm.dtype", half, "float32"] > 4 * products["mm", single, "float32"]
    rounded = {line for p in found["products"] if p["output"] == "bfloat16" for line in p["lines"]}
    layers = ("backbone", "check_head", "backward pass")  # no product of the loss is among them
    assert all(any(name in line for name in layers) for line in rounded), rounded

    waiting = {sync["line"] for sync in found["syncs"]}
    inside = ("chunked_loss", "forward", "gradient_of_piece", "divergence", "loss", "collate")
    assert not [line for line in waiting if any(name in line for name in inside)]

    # Only what happens before or between steps may wait for a copy: loading, tables, evaluation.
    once = ("load_weights", "cache_utils", "__getitem__", "_table", "<dictcomp>")
    for copy in found["copies"]:
        assert copy["kind"] == "async" or any(name in copy["line"] for name in once), copy
    pinned = sum(copy["count"] for copy in found["copies"] if copy["kind"] == "async")
    assert pinned > 3 * 2 * 4  # of every micro-batch: ids, targets, positions, mask


@pytest.fixture(scope="module")
def decoding(emulation: Emulation) -> dict:
    """For each architecture and kind of prompts, what generating 32 tokens asked of the device."""
    kinds = ["llama", "gemma3_text", "qwen3_5_text", "mamba"]
    done = emulation.run(ROOT / "tests/emulated_decoding.py", *kinds, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == kinds
    return found


@pytest.mark.parametrize("prompts", ["padded", "equal"])
def test_decoding_waits_once_in_eight_tokens(decoding: dict, prompts: str):
    """To see which rows have finished. A batch also waits for its text and, in transformers, at its
    first token: whether a mask is needed, and for the width of a sliding window."""
    for kind, found in decoding.items():
        assert sum(found[prompts]["more"].values()) == 4, (kind, found[prompts])
        assert all("nonzero" in line for line in found[prompts]["more"]), kind
        assert sum(found[prompts]["first"].values()) <= 4, (kind, found[prompts])
        assert all("tolist" in line or "transformers" in line for line in found[prompts]["first"])


def test_steps_that_are_captured_do_not_wait(emulation: Emulation):
    """Only the four looks at which rows have finished; the emulation groups no experts."""
    kinds = sorted(CAPTURED - {"deepseek_v3", "granitemoe", "mixtral", "olmoe", "qwen3_moe"})
    done = emulation.run(ROOT / "tests/emulated_decoding.py", "fixed", *kinds, "falcon", cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    waits = {kind: sum(part["padded"]["more"].values()) for kind, part in found.items()}
    assert waits.pop("falcon") > 32 and waits == dict.fromkeys(kinds, 4)


def test_decoding_in_the_compute_dtype(decoding: dict):
    """Keys and values are bfloat16, and no weights are converted after the copy is made."""
    for kind, found in decoding.items():
        caches = [] if kind == "mamba" else ["bfloat16"]
        assert [part["caches"] for part in found.values()] == [caches] * 2, kind
    for part in decoding["llama"].values():
        assert part["converted"] < 0.5 * part["weights"]
