"""Generation against `transformers`, the sampler against probabilities, teacher text, scores."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from conftest import generate, language_model, score, tiny_model
from filelock import FileLock
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache

import common
import token_level
from common import Completion, Conversation, LanguageModel, Pair, Prompt, UsageError

KINDS = ["llama", "qwen2", "gemma2", "gpt2"]
# Attention windows shorter than the texts are, in all layers and in every other one.
WINDOWS = [("mistral", {"sliding_window": 6}), ("gemma2", {"sliding_window": 6})]
ARCHITECTURES = [pytest.param(kind, {}, id=kind) for kind in KINDS] + [
    pytest.param(kind, changes, id=f"{kind}-window") for kind, changes in WINDOWS
]
MASK = 2**64 - 1


def prompts_of(count: int, seed: int = 0, longest: int = 12, vocabulary: int = 400) -> list:
    """Prompts of every length from 1 on, in no order."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [1 + i % longest for i in torch.randperm(count, generator=draw).tolist()]
    return [torch.randint(5, vocabulary, (n,), generator=draw).tolist() for n in lengths]


def write(
    model: LanguageModel, prompts: list, seeds: list | None = None, **settings
) -> list[Completion]:
    """`generate` with its answers in the prompts' order."""
    settings = {"max_new_tokens": 16, "temperature": 1.0} | settings
    seeds = list(range(len(prompts))) if seeds is None else seeds
    answers = dict(generate(model, prompts, seeds, **settings))
    assert sorted(answers) == list(range(len(prompts)))
    return [answers[i] for i in range(len(prompts))]


def ends_somewhere(model: LanguageModel, prompts: list, **settings) -> LanguageModel:
    """Let ids that the model writes end its answers, so that some rows finish before others."""
    model.end_ids = []
    free = write(model, prompts, **settings)
    assert max(len(set(c.ids)) for c in free) > 4  # not one token again and again
    late = {max(c.ids[:10], key=c.ids.index) for c in free[:3]}  # none of them comes at once
    model.end_ids = sorted(late | {free[3].ids[0], 1})
    return model


# ------------------------------------------------------------------------------------ generation


# Rounding depends on the batch and may change text, so models compute in float64 where they can:
# Gemma's attention takes its softmax in float32, where float64's mask value is -inf.


def without_rounding(kind: str) -> torch.dtype:
    return torch.float32 if kind == "gemma2" else torch.float64


@pytest.mark.parametrize(("kind", "changes"), ARCHITECTURES)
def test_greedy_is_the_models_own(kind: str, changes: dict, tiny):
    """Batched, left-padded and shrinking: token by token what `model.generate` writes alone."""
    prompts = prompts_of(10)
    # With tied embeddings, a random Gemma repeats the last token for ever.
    model = tiny(kind, dtype=without_rounding(kind), tie_word_embeddings=False, **changes)
    ends_somewhere(model, prompts, temperature=0.0)
    ours = write(model, prompts, temperature=0.0, batch_size=4)
    assert len({c.finished for c in ours}) == 2 and len({c.length for c in ours}) > 2
    for prompt, answer in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        own = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16,
            eos_token_id=model.end_ids, pad_token_id=0,
        )  # fmt: skip
        assert answer.ids == own[0, len(prompt) :].tolist()
        assert answer.finished == (answer.ids[-1] in model.end_ids)
        assert answer.finished or len(answer.ids) == 16
        assert not set(answer.ids[:-1]) & set(model.end_ids)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "changes"), ARCHITECTURES)
def test_sampled_text_does_not_depend_on_the_batch(kind: str, changes: dict, top_p: float, tiny):
    """A row's text follows from its prompt and seed, whatever else is in its batch."""
    prompts, seeds = prompts_of(9), [common.row_seed("row", i) for i in range(9)]
    model = tiny(kind, dtype=without_rounding(kind), **changes)
    ends_somewhere(model, prompts, seeds=seeds)
    settings = {"temperature": 0.9, "top_p": top_p}
    together = write(model, prompts, seeds, **settings)
    for size in (1, 4):
        assert write(model, prompts, seeds, batch_size=size, **settings) == together
    back = write(model, prompts[::-1], seeds[::-1], batch_size=5, **settings)
    assert back[::-1] == together
    assert write(model, [p for p in prompts for _ in "ab"], [s + k for s in seeds for k in (0, 1)],
                 **settings)[::2] == together  # fmt: skip
    torch.manual_seed(99)  # torch's global generator has no influence
    assert write(model, prompts, seeds, **settings) == together
    assert write(model, prompts, [s + 1 for s in seeds], **settings) != together
    assert len({tuple(c.ids) for c in write(model, prompts[:1] * 8)}) > 4


def test_sampled_tokens_follow_the_models_probabilities(tiny):
    """20 000 second tokens of one prompt: chi-square against the model's own distribution."""
    model, n = tiny("llama", initializer_range=0.2), 20_000
    prompt = [7, 8, 9]
    with torch.no_grad():
        first = model.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        after = model.model(torch.tensor([[*prompt, i] for i in range(len(first))])).logits[:, -1]
    expected = first @ after.double().softmax(-1)  # (V,)
    model.end_ids = []
    answers = write(model, [prompt] * n, max_new_tokens=2, batch_size=n)
    counts = torch.bincount(torch.tensor([c.ids[1] for c in answers]), minlength=len(expected))
    often = expected * n > 10  # chi-square needs some in each bin, so the others share one
    bins, means = (
        torch.cat([x[often], x[~often].sum()[None]]) for x in (counts.double(), expected * n)
    )
    assert chi_square(bins, means) < len(bins) - 1 + 4 * math.sqrt(2 * len(bins))


def test_finished_rows_leave_the_batch(tiny):
    """They cost no more forward passes; when all have finished, there are none."""
    model, prompts = tiny("llama", dtype=torch.float64), prompts_of(12)
    model.end_ids = list(range(5, 100))
    sizes = []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    answers = write(model, prompts, max_new_tokens=100)
    hook.remove()
    lengths = [c.length for c in answers]
    assert max(lengths) < 100
    assert sizes == [sum(n > step for n in lengths) for step in range(max(lengths))]


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_captured_steps_give_the_same_text(kind: str, tiny, graphs, monkeypatch):
    """Finished rows leave when half of the batch is left. Each shape is read once before it is
    captured, and none before the ninth token."""
    model, prompts = tiny(kind, dtype=torch.float64), prompts_of(24)
    model.end_ids = list(range(5, 30))
    expected = write(model, prompts, max_new_tokens=60)
    monkeypatch.setattr(common, "BLOCK", 20)  # the cache of 12 + 20 tokens grows twice
    model.cache, sizes = StaticCache, []
    hook = model.model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    assert write(model, prompts, max_new_tokens=60) == expected
    hook.remove()
    rows, size, warm, passes, replays, watched = 24, 32, False, [24], 0, 0
    for step in range(1, max(lengths := [c.length for c in expected])):
        left = sum(n > step for n in lengths)
        if left <= rows / 2 or 12 + step > size:  # shapes change
            rows = left if left <= rows / 2 else rows
            size, warm, captured = size + 20 * (12 + step > size), False, False
        if not warm or not captured:
            passes.append(rows)
        replays, watched = replays + warm, watched + (not warm)
        warm, captured = warm or step >= 8, warm
    assert (sizes, graphs.replays) == (passes, replays)
    assert graphs.modes == ["error", "default"] * watched  # before a capture nothing may wait
    assert len(set(sizes)) > 2 and size == 72


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_text_of_a_model_that_overflows_is_refused(tiny, temperature: float):
    """Its tokens would be arbitrary, and kept for later runs."""
    model = tiny("llama")
    with torch.no_grad():
        model.model.get_input_embeddings().weight[7] = torch.inf
    assert len(write(model, [[5, 6]], temperature=temperature)) == 1
    with pytest.raises(UsageError, match=r"llama-0 overflows in torch\.float32"):
        write(model, [[5, 6], [7, 8]], temperature=temperature)


def test_a_step_that_waits_for_the_gpu_is_not_captured(tiny, graphs):
    model = tiny("llama")
    assert common.cache_is_exact(model, StaticCache) and graphs.replays
    layer = model.model.model.layers[0]
    with layer.register_forward_pre_hook(lambda _, args: None if args[0].sum().item() else args):
        assert not common.cache_is_exact(model, StaticCache)
        assert common.cache_is_exact(model, DynamicCache)


def test_batches_hold_prompts_of_similar_length(tiny):
    """Answers arrive batch by batch, the shortest prompts first."""
    model, prompts = tiny("llama"), prompts_of(10)
    settings = {"max_new_tokens": 2, "temperature": 1.0, "batch_size": 3}
    arrived = [len(prompts[i]) for i, _ in generate(model, prompts, [0] * 10, **settings)]
    assert arrived == sorted(map(len, prompts))


def test_every_end_id_ends_a_response(tiny):
    """Several end ids: each stops its row and stays in it; without them the limit stops it."""
    model, prompts = tiny("llama"), prompts_of(40)
    model.end_ids = list(range(5, 60))
    answers = write(model, prompts, max_new_tokens=30)
    assert len({c.ids[-1] for c in answers if c.finished}) > 5
    for answer in answers:
        assert not set(answer.ids[:-1]) & set(model.end_ids)
        assert answer.finished == (answer.ids[-1] in model.end_ids)
        assert answer.finished or len(answer.ids) == 30
        assert answer.length == len(answer.ids)
        shown = answer.ids[:-1] if answer.finished else answer.ids
        assert answer.text == model.tokenizer.decode(shown)
    model.end_ids = []
    free = write(model, prompts, max_new_tokens=30)
    assert all(not c.finished and len(c.ids) == 30 for c in free)


def test_end_ids_are_collected(tokenizer):
    """What the template prints, then what tokenizer, model and generation_config declare."""
    model = tiny_model("llama", len(tokenizer.get_vocab()), eos_token_id=7)
    model.generation_config.eos_token_id = [8, 9]
    template_end = tokenizer.convert_tokens_to_ids("<|end|>")
    assert template_end == tokenizer.eos_token_id
    assert language_model(model, tokenizer, "x").end_ids == [template_end, 7, 8, 9]


def test_generation_config_is_ignored(tiny):
    """A model's own top_k, temperature, penalties or length would change the text silently."""
    prompts, model = prompts_of(12), tiny("llama")
    expected = write(model, prompts, temperature=1.5)
    model.model.generation_config.update(
        do_sample=True, top_k=1, temperature=0.1, top_p=0.1, repetition_penalty=3.0,
        max_new_tokens=2, min_new_tokens=12, suppress_tokens=list(range(300)),
    )  # fmt: skip
    assert write(model, prompts, temperature=1.5) == expected


def test_training_state_is_kept(tiny):
    """Generation has no dropout, uses its cache under checkpointing, and leaves train mode on."""
    model, prompts = tiny("llama", attention_dropout=0.5), prompts_of(6)
    expected = write(model, prompts)
    model.model.train()
    model.model.activation_checkpointing_enable()
    assert write(model, prompts) == expected
    assert model.model.training and model.model.model.layers[0].training
    assert model.model.model.layers[0].gradient_checkpointing
    first_only = generate(model, prompts, [0] * 6, max_new_tokens=2, temperature=0.0, batch_size=1)
    next(first_only)
    assert model.model.training  # between batches too
    first_only.close()
    assert model.model.training
    with pytest.raises(IndexError):
        write(model, [[10**6]])
    assert model.model.training
    assert all(p.requires_grad for p in model.model.parameters())


def test_answers_stop_where_positions_end(tiny):
    """GPT-2's positions are a table: an answer ends, unfinished, where the table does."""
    model = tiny("gpt2", dtype=torch.float64)
    model.end_ids = []
    prompts = [[5] * 508, [6] * 500, [7]]
    answers = write(model, prompts, max_new_tokens=12, temperature=0.0)
    assert not any(c.finished for c in answers)
    assert len(answers[1].ids) == len(answers[2].ids) == 12
    assert 4 <= len(answers[0].ids) <= 5  # the last token is not read, so it needs no position
    assert answers[2] == write(model, prompts[2:], max_new_tokens=12, temperature=0.0)[0]


def in_half_precision(model: LanguageModel) -> LanguageModel:
    """Its weights stay as they are; it computes in bfloat16."""
    weights = model.model
    return dataclasses.replace(model, load=lambda _: weights, compute_dtype=torch.bfloat16)


def test_in_float32_evaluation_uses_the_model_itself(tiny, monkeypatch):
    monkeypatch.setattr(common, "without_weights", None)
    model = tiny("llama")
    trained = model.model
    with model.evaluating():
        assert model.model is trained
        write(model, prompts_of(3))


def test_generation_uses_weights_in_the_compute_dtype(tiny, tmp_path, monkeypatch):
    """Keys and values in bfloat16; no weight is converted once the copy is made; the text is
    that of the model loaded in bfloat16; the next copy has the weights of its time."""
    model, prompts, copies = in_half_precision(tiny("llama")), prompts_of(6), []
    make = common.without_weights
    monkeypatch.setattr(common, "without_weights", lambda *m: copies.append(1) or make(*m))
    update, dtypes, converted, weights = DynamicCache.update, set(), [], set()

    def noted(self, keys: Tensor, values: Tensor, *rest, **more):
        dtypes.update({keys.dtype, values.dtype})
        return update(self, keys, values, *rest, **more)

    monkeypatch.setattr(DynamicCache, "update", noted)

    class Conversions(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in weights:
                converted.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    texts = []
    for scale in (1.0, 1.5):
        with torch.no_grad():
            model.model.get_input_embeddings().weight.mul_(scale)
        model.model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        with model.evaluating():
            weights = {p.data_ptr() for p in model.model.parameters()}
            with Conversions():
                texts.append(write(model, prompts))
        assert texts[-1] == write(language_model(loaded, model.tokenizer, "half"), prompts)
    assert texts[0] != texts[1] and len(copies) == 2
    assert dtypes == {torch.bfloat16}
    head = tuple(model.head().weight.shape)  # a CPU has no such product with a float32 result
    assert converted == [head] * 2


@pytest.mark.parametrize("adapted", [False, True])
def test_training_weights_survive_an_evaluation_that_fails(tiny, adapted: bool):
    """The same objects and bits, in train mode, with checkpointing; optimizer steps go on."""
    model = in_half_precision(tiny("llama"))
    if adapted:
        pytest.importorskip("peft")
        common.add_adapters(model, 2)
        for name, parameter in model.model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
    model.model.train()
    model.model.activation_checkpointing_enable()
    trained, adapters = model.model, model.adapters
    before = {n: (p, p.detach().clone()) for n, p in trained.named_parameters()}
    logits = common.with_response([5, 6, 7], [8, 9])
    batch = common.collate([logits], model.device)
    with torch.no_grad():
        right = model.logits(batch)[:]  # by autocast
    with pytest.raises(ZeroDivisionError), model.evaluating():
        assert model.model is not trained and not model.model.training
        assert (model.adapters is not adapters) == adapted
        assert {p.dtype for p in model.model.parameters()} == {torch.bfloat16}
        close = (model.logits(batch)[:] - right).std() / right.std()
        assert 0 < close < 0.03  # adapters included
        with pytest.raises(KeyError), model.evaluating():  # no copy of the copy
            raise KeyError
        assert model.model is not trained
        raise ZeroDivisionError
    assert model.model is trained and model.adapters is adapters and model.copies is None
    assert trained.training and trained.model.layers[0].gradient_checkpointing
    for name, parameter in trained.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])
    model.logits(batch)[:].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in trained.parameters())


def test_a_copy_that_does_not_fit_leaves_the_model(tiny, monkeypatch):
    model = in_half_precision(tiny("llama"))
    trained, fill = model.model, common.fill_weights

    def too_large(copied: nn.Module, source: nn.Module | None, *rest: object) -> None:
        fill(copied, source, *rest)
        if source is not None:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(common, "fill_weights", too_large)
    with pytest.raises(torch.OutOfMemoryError), model.evaluating():
        pass
    assert model.model is trained and model.copies is None
    assert all(p.numel() for p in trained.parameters())
    assert eval_frame._stance.stance == "default"  # later steps compile again


def test_nothing_to_generate(tiny):
    assert write(tiny("llama"), []) == []


# --------------------------------------------------------------------------------------- sampler


def splitmix64(seed: int, position: int) -> float:
    """The published generator in Python's integers: its `position`-th output, 53 bits of it."""
    z = (seed + (position + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return ((z ^ (z >> 31)) >> 11) / 2**53


def test_uniforms_are_splitmix64():
    """Bit for bit, also for the largest seeds."""
    seeds = [0, 1, 12345, 2**62 + 5, 2**63 - 1, common.row_seed("a", 1)]
    draws = common.uniforms(seeds, 40)
    assert draws.dtype == torch.float64 and draws.shape == (6, 40)
    assert draws.tolist() == [[splitmix64(seed, i) for i in range(40)] for seed in seeds]
    assert common.uniforms(seeds[2:3], 7).equal(draws[2:3, :7])


def chi_square(counts: torch.Tensor, expected: torch.Tensor | float) -> float:
    return ((counts - expected) ** 2 / expected).sum().item()


@pytest.mark.parametrize("seeds", ["counted", "hashed", "one"])
def test_uniforms_are_uniform(seeds: str):
    """1e5 draws over rows, over positions and over both: mean, 64 bins, pairs, no repetition."""
    rows, positions = {"counted": (1000, 100), "hashed": (50_000, 2), "one": (1, 100_000)}[seeds]
    given = [common.row_seed(i) if seeds == "hashed" else i + 17 for i in range(rows)]
    draws = common.uniforms(given, positions).flatten()
    assert len(draws) == 100_000 and draws.min() >= 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 4 / math.sqrt(12e5)
    bins = torch.bincount((draws * 64).long(), minlength=64)
    assert chi_square(bins, 1e5 / 64) < 63 + 4 * math.sqrt(2 * 63)
    pairs = (draws[:-1] * 8).long() * 8 + (draws[1:] * 8).long()
    assert chi_square(torch.bincount(pairs, minlength=64), 99_999 / 64) < 63 + 4 * math.sqrt(126)
    assert len(draws.unique()) == 100_000


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_sampled_frequencies_are_the_probabilities(temperature: float):
    """200 000 draws from 12 tokens: chi-square within four standard deviations of its mean."""
    logits = torch.linspace(-3, 2, 12)[torch.randperm(12, generator=common.generator_for(0, "p"))]
    expected = torch.softmax(logits.double() / temperature, -1)
    n = 200_000
    draws = common.uniforms([3], n)[0]
    tokens = common.sample(logits.expand(n, -1), draws, temperature, 1.0)
    counts = torch.bincount(tokens, minlength=12).double()
    assert chi_square(counts, expected * n) < 11 + 4 * math.sqrt(22)
    assert (counts / n - expected).abs().max() < 4 * math.sqrt(0.25 / n)


def test_sampler_inverts_the_distribution():
    """Exactly: probabilities 1/2, 1/4, 0, 1/4, and the draws at their borders; 0 is greedy."""
    logits = torch.tensor([0.5, 0.25, 0.0, 0.25]).log().expand(7, -1)
    draws = torch.tensor([0.0, 0.49, 0.5, 0.74, 0.75, 0.99, 1 - 2**-53], dtype=torch.float64)
    assert common.sample(logits, draws, 1.0, 1.0).tolist() == [0, 0, 1, 1, 3, 3, 3]
    assert common.sample(logits, draws, 0.0, 1.0).tolist() == [0] * 7


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.05, 1), (0.39, 1), (0.41, 2), (0.69, 2), (0.71, 3), (0.94, 4), (0.96, 5), (1.0, 5)],
)
def test_top_p_keeps_the_smallest_sufficient_set(top_p: float, kept: int):
    """The fewest most likely tokens whose mass reaches top_p, renormalised, and no other."""
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    nucleus = probabilities.argsort(descending=True)[:kept]
    assert probabilities[nucleus[:-1]].sum() < top_p <= probabilities[nucleus].sum() + 1e-6
    n = 50_000
    logits = probabilities.log().expand(n, -1)
    tokens = common.sample(logits, common.uniforms([11], n)[0], 1.0, top_p)
    counts = torch.bincount(tokens, minlength=5).double()
    assert set(counts.nonzero()[:, 0].tolist()) == set(nucleus.tolist())
    expected = probabilities[nucleus].double() / probabilities[nucleus].sum() * n
    assert chi_square(counts[nucleus], expected) < 4 + 4 * math.sqrt(8)


@pytest.mark.parametrize("wide", [False, True])
def test_top_p_of_a_large_vocabulary(wide: bool):
    """The same tokens as from sorting all, whether a thousand are enough in every row or not."""
    torch.manual_seed(0)
    logits = torch.randn(300, 6000) * torch.linspace(0 if wide else 4, 6, 300)[:, None]
    draws = common.uniforms([5], 300)[0]
    probabilities, order = logits.softmax(-1).sort(-1, descending=True)
    sizes = (probabilities.cumsum(-1) < 0.9).sum(-1) + 1  # of each nucleus
    assert (sizes.max() > 1024) == wide and sizes.min() < 20
    nucleus = torch.arange(6000) < sizes[:, None]
    mass = (probabilities.double() * nucleus).cumsum(-1)
    places = (mass <= draws[:, None] * mass[:, -1:]).sum(-1, keepdim=True)
    expected = order.gather(1, places)[:, 0]
    assert common.sample(logits, draws, 1.0, 0.9).tolist() == expected.tolist()


def test_top_p_is_taken_at_the_sampling_temperature():
    """The nucleus of softmax(logits / T), not of softmax(logits)."""
    probabilities = torch.tensor([0.6, 0.3, 0.1])
    hot = probabilities.log() * 0.01
    draws = common.uniforms([2], 3000)[0]
    logits = probabilities.log().expand(3000, -1)
    assert set(common.sample(logits, draws, 100.0, 0.9).tolist()) == {0, 1, 2}
    assert set(common.sample(logits, draws, 1.0, 0.9).tolist()) == {0, 1}
    assert set(common.sample(hot.expand(3000, -1), draws, 0.01, 0.9).tolist()) == {0, 1}


# ---------------------------------------------------------------------------------- teacher text


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """How many prompts each call of `generate` was given; the calls themselves are real."""
    calls: list[int] = []
    real = common.generate

    def generate(model, prompts, *rest, **settings):
        calls.append(len(prompts))
        return real(model, prompts, *rest, **settings)

    monkeypatch.setattr(common, "generate", generate)
    return calls


def arguments(tmp_path: Path, **changes: object) -> token_level.Arguments:
    defaults = {"cache_dir": str(tmp_path / "cache"), "max_new_tokens": 6, "max_length": 64}
    return token_level.Arguments(**{**defaults, **changes})


def as_prompts(rows: list[list[int]], references: list[list[str]] | None = None) -> list[Prompt]:
    """Prompts of these ids, each with its references."""
    prompts = []
    for i, ids in enumerate(rows):
        turns = [{"role": "user", "content": f"question {i}"}]
        right = references[i] if references else []
        prompts.append(Prompt(Conversation(turns, None, right, f"row {i}"), ids, ids))
    return prompts


def ask(teacher, prompts, args, temperature=1.0, **settings) -> list[Completion]:
    return teacher.complete(prompts, args, temperature=temperature, purpose="test", **settings)


def files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").rglob("*.jsonl"))


def test_teacher_text_is_written_once(tmp_path, tiny, counted):
    """The second call reads; its lines hold what the contract says; text is the generator's."""
    teacher, prompts = tiny("llama", dtype=torch.float64), as_prompts(prompts_of(8))
    teacher.end_ids = [*range(5, 100)]
    args = arguments(tmp_path)
    first = ask(teacher, prompts, args)
    assert sum(counted) == 8
    assert {c.finished for c in first} == {True, False}
    assert ask(teacher, prompts, args) == first
    assert ask(teacher, prompts[::-1], args) == first[::-1]
    assert sum(counted) == 8
    (file,) = files(tmp_path)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    expected = [
        {
            "messages": prompt.conversation.messages,
            "text": teacher.tokenizer.decode(answer.ids[: answer.length - answer.finished]),
            "finished": answer.finished,
            "length": len(answer.ids),
            "ids": answer.ids,
        }
        for prompt, answer in zip(prompts, first, strict=True)
    ]
    written = [{k: v for k, v in line.items() if k != "key"} for line in lines]
    assert sorted(written, key=str) == sorted(expected, key=str)
    assert len({line["key"] for line in lines}) == 8
    elsewhere = arguments(tmp_path, cache_dir=str(tmp_path / "other"), generation_batch_size=3)
    assert ask(teacher, prompts, elsewhere) == first


def test_teacher_text_resumes_after_a_cut(tmp_path, tiny, counted):
    """A file that ends inside a line: that answer and the missing ones are written, no other."""
    teacher, prompts = tiny("llama", dtype=torch.float64), as_prompts(prompts_of(10))
    args = arguments(tmp_path, generation_batch_size=4)
    first = ask(teacher, prompts, args)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for kept in (7, 0):
        file.write_bytes(b"".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        counted.clear()
        assert ask(teacher, prompts, args) == first
        assert sum(counted) == 10 - kept
        assert file.read_bytes().startswith(b"".join(lines[:kept]))
        assert sorted(file.read_bytes().splitlines(keepends=True)) == sorted(lines)
    file.write_bytes(whole[:-1])  # everything but the last line break
    counted.clear()
    assert ask(teacher, prompts, args) == first and sum(counted) <= 1


def test_text_that_is_there_waits_for_no_other_run(tmp_path, tiny):
    """While a run that holds the lock writes a further line, others read the lines they need."""
    teacher, prompts = tiny("llama", dtype=torch.float64), as_prompts(prompts_of(4))
    args = arguments(tmp_path)
    first = ask(teacher, prompts, args)
    (file,) = files(tmp_path)
    with FileLock(file.with_suffix(".lock")), open(file, "ab") as other:
        other.write(b'{"key": "half a li')
        other.flush()

        def late(*_: object) -> None:
            raise TimeoutError("waits for the lock")

        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(20)
        try:
            assert ask(teacher, prompts[1:], args) == first[1:]
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        assert file.read_bytes().endswith(b"half a li")  # which the other run goes on with


def test_answers_are_on_disk_as_soon_as_their_batch_is_written(tmp_path, tiny):
    """A run that is interrupted in its second batch has kept the first."""
    teacher, prompts = tiny("llama", dtype=torch.float64), as_prompts(prompts_of(10))
    args = arguments(tmp_path, generation_batch_size=4)
    passes = []

    def interrupt(*_) -> None:
        passes.append(1)
        if len(passes) == args.max_new_tokens + 2:
            raise KeyboardInterrupt

    hook = teacher.model.base_model.register_forward_pre_hook(interrupt)
    teacher.end_ids = []
    with pytest.raises(KeyboardInterrupt):
        ask(teacher, prompts, args)
    hook.remove()
    (file,) = files(tmp_path)
    assert len(file.read_text().splitlines()) == 4
    uncut = arguments(tmp_path, cache_dir=str(tmp_path / "uncut"))
    assert ask(teacher, prompts, args) == ask(teacher, prompts, uncut)


@pytest.mark.parametrize(
    "damage",
    [b"{}", b"nonsense", b"[1]", b'"x"', b"\xff\xfe", b"",
     b'{"key": "a", "text": "b", "finished": true, "length": 1}'],
    ids=repr,
)  # fmt: skip
def test_corrupt_line_of_teacher_text(damage: bytes, tmp_path, tiny):
    """A whole line that is wrong comes from no cut: file, line and the way out are named."""
    teacher, prompts, args = tiny("llama"), as_prompts(prompts_of(4)), arguments(tmp_path)
    ask(teacher, prompts, args)
    (file,) = files(tmp_path)
    lines = file.read_bytes().splitlines()
    before = b"\n".join([lines[0], damage, *lines[2:]]) + b"\n"
    file.write_bytes(before)
    with pytest.raises(UsageError, match=r"corrupt.*delete") as problem:
        ask(teacher, prompts, args)
    assert str(problem.value).startswith(f"{file}:2 ")
    assert file.read_bytes() == before


def test_overlapping_prompts_share_teacher_text(tmp_path, tiny, counted):
    """Found by the prompt's ids; one that occurs twice is sampled twice, but greedily once."""
    teacher, prompts, args = tiny("llama"), as_prompts(prompts_of(9)), arguments(tmp_path)
    first = ask(teacher, prompts[:6], args)
    second = ask(teacher, prompts[3:], args)
    assert counted == [6, 3] and second[:3] == first[3:] and len(files(tmp_path)) == 1
    twice = ask(teacher, [prompts[0], prompts[0]], args)
    assert twice[0] == first[0] and twice[1] != first[0] and counted[-1] == 1
    greedy = ask(teacher, [prompts[0], prompts[0]], args, temperature=0.0)
    assert greedy[0] == greedy[1] and counted[-1] == 1


def test_what_teacher_text_depends_on(tmp_path, tiny, counted):
    """Weights, temperature, top_p, length, seed, end ids: another file. The seed not if greedy."""
    teacher, prompts, args = tiny("llama"), as_prompts(prompts_of(5)), arguments(tmp_path)
    changed = [
        {"teacher": tiny("llama", seed=1), "args": args},
        {"teacher": teacher, "args": args, "temperature": 2.0},
        {"teacher": teacher, "args": args, "top_p": 0.5},
        {"teacher": teacher, "args": arguments(tmp_path, max_new_tokens=5)},
        {"teacher": teacher, "args": arguments(tmp_path, seed=1)},
        {"teacher": teacher, "args": args, "temperature": 0.0},
    ]
    first = ask(teacher, prompts, args)
    for number, change in enumerate(changed, 2):
        assert ask(prompts=prompts, **change) != first
        assert len(files(tmp_path)) == number and sum(counted) == 5 * number
    ask(teacher, prompts, arguments(tmp_path, seed=1), temperature=0.0)
    ask(teacher, prompts, args, temperature=0.0, top_p=0.5)
    assert len(files(tmp_path)) == 7 and sum(counted) == 35
    teacher.end_ids = [first[0].ids[0]]
    assert ask(teacher, prompts, args)[0] == Completion("", True, 1, first[0].ids[:1])
    assert len(files(tmp_path)) == 8


# ------------------------------------------------------------------------------------ evaluation


def brute_distance(a: tuple, b: tuple) -> int:
    """Levenshtein from its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        brute_distance(a[1:], b) + 1,
        brute_distance(a, b[1:]) + 1,
        brute_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edit_distance():
    """Against the recursion on 300 random pairs of up to five words."""
    draw = common.generator_for(0, "words")
    for _ in range(300):
        pair = [
            tuple("abc"[i] for i in torch.randint(3, (n,), generator=draw).tolist())
            for n in torch.randint(6, (2,), generator=draw).tolist()
        ]
        assert common.edit_distance(*pair) == brute_distance(*pair)
    assert common.edit_distance(["K", "AE1", "T"], ["K", "AH0", "T", "S"]) == 2


def evaluated(
    teacher: LanguageModel,
    args: token_level.Arguments,
    references: list[list[str]],
    rows: list[list[int]] | None = None,
) -> tuple[common.Evaluator, list[Prompt]]:
    """An evaluator for students of the teacher's vocabulary, and its prompts."""
    prompts = as_prompts(rows or prompts_of(len(references), seed=5), references)
    return common.Evaluator(prompts, Pair(teacher, teacher), args), prompts


class TextTeacher:
    """Gives only text, as `sequence_level.ApiTeacher` does."""

    def __init__(self, completions: list[Completion]) -> None:
        self.completions = completions

    def complete(self, prompts: list[Prompt], args: object, **_: object) -> list[Completion]:
        return self.completions


def test_exact_match_and_error_rate(tmp_path, tiny):
    """Greedy answers against any reference, words counted against the nearest one."""
    student, args = tiny("llama", seed=1), arguments(tmp_path)
    rows = prompts_of(6, seed=5)
    student.end_ids = [*range(5, 30)]
    greedy = write(student, rows, temperature=0.0, max_new_tokens=6)
    texts = [c.text for c in greedy]
    words = [text.split() for text in texts]
    references = [
        ["no relation at all", texts[0]],
        ["zz " + texts[1]],
        ["a b c d e f g h i j k l m n o p", texts[2] + " zz yy"],
        ["nothing of it " * 5],
        [f"  {texts[4]}\n"],
        [],
    ]
    teacher = tiny("llama", seed=2)
    evaluator, _ = evaluated(teacher, args, references, rows)
    assert evaluator.unreferenced == 1
    tallies = score(evaluator, student)
    own_words = write(teacher, rows, temperature=0.0, max_new_tokens=6)[5].text.split()
    far = references[3][0].split()
    own_edits = common.edit_distance(words[5], own_words)
    edits = [0, 1, 2, common.edit_distance(words[3], far), 0, own_edits]
    assert [t["edits"] for t in tallies] == edits
    lengths = [len(words[0]), len(words[1]) + 1, len(words[2]) + 2, 15, len(words[4])]
    assert [t["reference_words"] for t in tallies] == [*lengths, len(own_words)]
    scores = common.scores(tallies)
    assert scores["exact_match"] == pytest.approx((2 + (own_edits == 0)) / 6)
    assert scores["error_rate"] == pytest.approx(
        sum(edits) / sum(t["reference_words"] for t in tallies)
    )
    assert scores["response_tokens"] == sum(len(c.ids) for c in greedy) / 6
    assert scores["cut_off"] == sum(not c.finished for c in greedy) / 6
    assert 0 < scores["cut_off"] < 1
    teachers = common.scores(evaluator.teacher_tallies)
    assert evaluator.teacher_tallies[5]["exact"] == 1 and teachers["kl_to_teacher"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_likelihoods_against_plain_log_softmax(kind: str, tmp_path, tiny):
    """KL, agreement, nats and bits per byte: each row alone, through the models' own logits."""
    teacher, student = tiny(kind, seed=2), tiny("llama", seed=1)
    teacher.end_ids = student.end_ids = [*range(5, 100)]
    args = arguments(tmp_path, max_new_tokens=8)
    evaluator, prompts = evaluated(teacher, args, [["x"]] * 12)
    samples = ask(teacher, prompts, args)
    assert {c.finished for c in samples} == {True, False}
    sums = dict.fromkeys(["kl", "agree", "nats", "text", "tokens", "bytes", "teacher"], 0.0)
    for prompt, sample in zip(prompts, samples, strict=True):
        ids = torch.tensor([prompt.teacher + sample.ids])
        before = slice(len(prompt.teacher) - 1, -1)
        with torch.no_grad():
            ours, theirs = (
                m.model(input_ids=ids).logits[0, before].double().log_softmax(-1)
                for m in (student, teacher)
            )
        picked = ours.gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        text = slice(0, len(sample.ids) - sample.finished)
        sums["kl"] += (theirs.exp() * (theirs - ours)).sum().item()
        sums["agree"] += (theirs.argmax(-1) == ours.argmax(-1)).sum().item()
        sums["nats"] -= picked.sum().item()
        sums["text"] -= picked[text].sum().item()
        sums["teacher"] -= theirs.gather(1, torch.tensor(sample.ids)[:, None]).sum().item()
        sums["tokens"] += len(sample.ids)
        # Decoded with the prompt, because a character may be cut between two tokens.
        whole = [prompt.teacher + sample.ids[text], prompt.teacher]
        sizes = [len(student.tokenizer.decode(ids).encode()) for ids in whole]
        sums["bytes"] += sizes[0] - sizes[1]
    scores = common.scores(score(evaluator, student))
    count = sums["tokens"]
    assert scores["kl_to_teacher"] == pytest.approx(sums["kl"] / count, rel=1e-4)
    assert scores["top1_agreement"] == pytest.approx(sums["agree"] / count)
    assert scores["nats_per_token"] == pytest.approx(sums["nats"] / count, rel=1e-4)
    bits = sums["text"] / sums["bytes"] / math.log(2)
    assert scores["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
    own = common.scores(evaluator.teacher_tallies)
    assert own["nats_per_token"] == pytest.approx(sums["teacher"] / count, rel=1e-4)
    assert scores["kl_to_teacher"] > 0.1


def test_two_vocabularies_share_only_text(tmp_path, tiny, tokenizer):
    """No KL; nats per token are each model's own; bits per byte divide by the same bytes."""
    teacher = tiny("llama", seed=2)
    teacher.end_ids = [*range(5, 100)]
    other = AutoTokenizer.from_pretrained(common.DATA / "student_other_tokenizer")
    inner = tiny_model("llama", len(other.get_vocab()), 3)
    student = language_model(inner, other, "other")
    student.end_ids = [other.eos_token_id]
    talks = [Conversation([{"role": "user", "content": w}], None, ["x"], w) for w in "abcde"]
    pair, args = Pair(student, teacher), arguments(tmp_path)
    prompts = common.tokenize_prompts(talks, pair, 64)
    evaluator = common.Evaluator(prompts, pair, args)
    samples = ask(teacher, prompts, args)
    examples = common.completion_examples(prompts, samples, pair, 64)
    nats = text = tokens = size = 0.0
    for sample, example in zip(samples, examples, strict=True):
        ids, targets = example.student
        with torch.no_grad():
            logprobs = inner(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        picked = [-logprobs[i - 1, ids[i]].item() for i in targets]
        nats += sum(picked)
        text += sum(picked[: len(picked) - sample.finished])
        tokens += len(picked)
        size += len(sample.text.encode())
    scores, own = common.scores(score(evaluator, student)), common.scores(evaluator.teacher_tallies)
    assert "kl_to_teacher" not in scores and "top1_agreement" not in scores
    assert scores["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(text / size / math.log(2), rel=1e-4)
    alone = Pair(teacher, teacher)
    same = common.Evaluator(common.tokenize_prompts(talks, alone, 64), alone, args)
    expected = common.scores(same.teacher_tallies)
    assert own == pytest.approx({name: expected[name] for name in own})


def test_a_teacher_that_gives_only_text(tmp_path, tiny):
    """From texts alone: references and greedy scores of the teacher, likelihoods of the student."""
    student = tiny("llama", seed=1)
    talks = [Conversation([{"role": "user", "content": w}], None, [], w) for w in "abc"]
    answers = [Completion(text, True, 7, None) for text in ("K AE1", "T", "")]
    pair = Pair(student, TextTeacher(answers))
    evaluator = common.Evaluator(
        common.tokenize_prompts(talks, pair, 64), pair, arguments(tmp_path)
    )
    own = common.scores(evaluator.teacher_tallies)
    assert own == {"exact_match": 1.0, "error_rate": 0.0, "response_tokens": 7.0, "cut_off": 0.0}
    tallies = score(evaluator, student)
    scores = common.scores(tallies)
    assert "kl_to_teacher" not in scores and scores["bits_per_byte"] > 0
    assert tallies[2]["tokens"] == 1  # the end token of an empty answer


def test_answers_cut_to_max_length_count_only_what_was_read(tmp_path, tiny):
    """bits_per_byte divides the nats of the tokens that fit by the bytes of just those."""
    teacher, student = tiny("llama", seed=2), tiny("llama", seed=1)
    teacher.end_ids = []
    plain = [i for i in range(5, 95) if teacher.tokenizer.decode([i]).isascii()]
    rows = [plain[i : i + 20] for i in range(6)]
    args = arguments(tmp_path, max_new_tokens=10, max_length=24)
    evaluator, prompts = evaluated(teacher, args, [["x"]] * 6, rows)
    nats = size = 0.0
    for prompt, sample in zip(prompts, ask(teacher, prompts, args), strict=True):
        read = sample.ids[:4]
        ids = torch.tensor([prompt.student + read])
        with torch.no_grad():
            logprobs = student.model(input_ids=ids).logits[0, 19:-1].double().log_softmax(-1)
        nats -= logprobs.gather(1, torch.tensor(read)[:, None]).sum().item()
        size += len(teacher.tokenizer.decode(read).encode())
    scores = common.scores(score(evaluator, student))
    assert scores["nats_per_token"] == pytest.approx(nats / 24, rel=1e-4)
    assert scores["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-4)


def test_teacher_as_its_own_student(tmp_path, tiny, counted):
    """KL 0, agreement 1, and its own greedy answers; train mode survives; text comes from cache."""
    teacher, args = tiny("qwen2"), arguments(tmp_path)
    evaluator, _ = evaluated(teacher, args, [[]] * 8)
    teacher.model.train()
    scores = common.scores(score(evaluator, teacher))
    assert teacher.model.training
    assert scores["kl_to_teacher"] == pytest.approx(0, abs=1e-6)
    assert scores["top1_agreement"] == scores["exact_match"] == 1 and scores["error_rate"] == 0
    own = common.scores(evaluator.teacher_tallies)
    assert {n: scores[n] for n in own} == pytest.approx(own)
    before = sum(counted)
    again, _ = evaluated(teacher, args, [[]] * 8)
    assert sum(counted) == before  # greedy answers and samples are in the cache
    assert again.teacher_tallies == evaluator.teacher_tallies


def tally(exact: float, edits: int, kl: float | None = None, agree: int = 0) -> common.Tally:
    sums = {
        "prompts": 1, "exact": exact, "edits": edits, "reference_words": 4, "response_tokens": 5,
        "cut_off": 0.0, "tokens": 5, "nats": 4.0, "text_bits": 3.0, "bytes": 12,
    }  # fmt: skip
    return sums if kl is None else sums | {"kl": kl, "agree": agree}


def test_gap_recovered():
    """(after - before) / (teacher - before); the teacher's own KL is 0, its agreement 1."""
    before = [tally(0, 2, 4.0 + 0.1 * (i % 2), 1) for i in range(10)]
    after = [tally(float(i < 3), 1, 1.0, 4) for i in range(10)]
    teacher = [tally(float(i < 8), 0, 0.0, 5) for i in range(10)]
    gaps = common.gap_recovered(before, after, teacher)
    assert gaps["exact_match"] == pytest.approx(0.3 / 0.8)
    assert gaps["error_rate"] == pytest.approx(0.5)
    assert gaps["kl_to_teacher"] == pytest.approx((0.2 - 0.81) / (0 - 0.81))
    assert gaps["top1_agreement"] == pytest.approx((0.8 - 0.2) / (1 - 0.2))
    without = [
        {k: v for k, v in t.items() if k not in ("kl", "agree")} for t in before
    ]  # another tokenizer: no distributions to compare
    assert set(common.gap_recovered(without, without, teacher)) == {"exact_match", "error_rate"}


def test_gap_is_absent_where_the_teacher_is_hardly_better():
    """Worse, equal or better within two paired standard errors: no gap to recover, no number."""
    half = [tally(float(i % 2), i % 3, 0.0, 5) for i in range(40)]
    for teacher in (
        half,
        [tally(0, 4, 0.0, 5) for _ in range(40)],
        [tally(float(i % 2), i % 3, 0.0, 5) | ({"exact": 1.0, "edits": 0} if i == 0 else {})
         for i in range(40)],
    ):  # fmt: skip
        assert common.gap_recovered(half, half, teacher) == {}
    # Better on most prompts, and worse on a long one by as many words.
    weak, strong = ([tally(0, edits, 0.0, 5)] * 80 for edits in (1, 0))
    long = [tally(0, edits, 0.0, 5) | {"reference_words": 80} for edits in (0, 80)]
    assert common.gap_recovered([*weak, long[0]], weak + long[:1], [*strong, long[1]]) == {}
    clear = [tally(float(i % 2 or i < 20), 0, 0.0, 5) for i in range(40)]
    assert set(common.gap_recovered(half, half, clear)) == {"exact_match", "error_rate"}
    assert common.gap_recovered(half[:1], half[:1], clear[:1]) == {}
