"""Tiny models of many architectures through training, saving, loading and generating.

The truth is the model's own logits for one text alone: no batch, no padding, no cache.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from byte_models import randomize, word_tokenizer, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    StaticCache,
)

import common
import token_level
from common import LanguageModel, Objective, Tokens, UsageError

CPU = torch.device("cpu")
GENERATION = token_level.Arguments(max_new_tokens=12, generation_batch_size=3)
TEMPLATE = "{% for m in messages %}<|user|> {{ m.content }} <|im_end|> {% endfor %}<|assistant|>"
TOKENIZER = word_tokenizer([f"w{i}" for i in range(73)], TEMPLATE)
V = 84  # rows of the models; the tokenizers know 80 ids, or 81 with one that Qwen2's adds

SIZES = {
    "vocab_size": V, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
ENDS = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
SLIDING = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED = {"shared_expert_intermediate_size": 16}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
STATES = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
GPT2 = {"vocab_size": V, "n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "image_size": 28,
          "num_attention_heads": 2, "patch_size": 14}  # fmt: skip
# Latent attention, and a first layer without experts.
DEEPSEEK = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4,
}  # fmt: skip

# What changes in SIZES; `alone`, what replaces it.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {**GEMMA, "sliding_window": 6},
    "gemma3_text": {**GEMMA, **SLIDING},
    "gemma3": {
        "alone": True, "text_config": {**SIZES, **ENDS, **GEMMA, "sliding_window": 6},
        "vision_config": VISION, "mm_tokens_per_image": 4, "image_token_index": 6,
        "boi_token_index": 7, "eoi_token_index": 8,
    },
    "phi": {},
    "phi3": {"sliding_window": 5},
    "gpt2": {"alone": True, **GPT2},
    "gptj": {"alone": True, **GPT2, "rotary_dim": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"alone": True, "vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "falcon": {"alone": True, "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2,
               "num_attention_heads": 4},
    "olmo2": {},
    "cohere": {},
    "cohere2": SLIDING,
    "granite": {"logits_scaling": 4.0},
    "stablelm": {},
    "starcoder2": {},
    "smollm3": {},
    "glm4": {},
    "nemotron": {},
    "mixtral": LOCAL,
    "qwen3_moe": {**MOE, "head_dim": 8},
    "olmoe": MOE,
    "granitemoe": LOCAL,
    "gpt_oss": {**LOCAL, **SLIDING, "head_dim": 8},
    "deepseek_v3": DEEPSEEK,
    "qwen3_next": {**LINEAR, **MOE, **SHARED, "head_dim": 8},
    "qwen3_5_text": {**LINEAR, "head_dim": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"], "full_attn_idxs": [1], "block_ff_dim": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
              "expert_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
              "use_mamba_kernels": False},
    "bamba": {**MAMBA, "attn_layer_indices": [1], "mamba_n_groups": 1},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "mamba": {"alone": True, **STATES},
    "mamba2": {"alone": True, **STATES, "num_heads": 8, "head_dim": 8, "n_groups": 1},
    # These two have caches of their own, which the suite does without.
    "minimax": {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8, "block_size": 8,
                "layer_types": ["linear_attention", "full_attention"]},
    "rwkv": {"alone": True, "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2,
             "context_length": 512},
}  # fmt: skip
# Whose text a GPU can write with CUDA graphs: none with windows or states, not Bloom, nor Falcon,
# which copies a list to the GPU at every token.
CAPTURED = {
    "cohere", "deepseek_v3", "gemma", "glm4", "gpt2", "gpt_neox", "gptj", "granite",
    "granitemoe", "llama", "mixtral", "nemotron", "olmo2", "olmoe", "opt", "phi", "qwen2", "qwen3",
    "qwen3_moe", "smollm3", "stablelm", "starcoder2",
}  # fmt: skip
WITHOUT_CACHE = {"minimax", "rwkv"}
REFUSED = {
    "recurrent_gemma": (  # its soft cap has another name
        {"lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"],
         "head_dim": 8, "num_key_value_heads": 1, "logits_soft_cap": 1.0},
        r"RecurrentGemmaForCausalLM\) computes its logits in a way that this suite does not know",
    ),
    "bert": ({"is_decoder": True}, "BertLMHeadModel.* does not know"),
    "llama4_text": (  # its base model is itself
        {"num_local_experts": 2, "head_dim": 8, "intermediate_size_mlp": 64, "moe_layers": [1]},
        "cannot use",
    ),
}  # fmt: skip

# Texts with the positions of their targets.
EXAMPLES = [
    Tokens([3, *range(20, 27), 1, 40, 30], [8, 9, 10]),
    Tokens([3, 50, 9, 4, 61, 62, 60, 62, 63, 60, 13, 14, 15, 13, 1], [4, 5, 6, 7, 13, 14]),
]
PROMPTS = [[3, *range(start, start + n)] for start, n in ((10, 2), (60, 11), (30, 5), (70, 2))]


def build(kind: str, changes: dict[str, Any], seed: int = 1) -> PreTrainedModel:
    changes = dict(changes)
    base = ENDS if changes.pop("alone", False) else SIZES | ENDS
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**base, **changes})
    return randomize(AutoModelForCausalLM.from_config(config), seed).eval()


def save(directory: Path, kind: str, changes: dict[str, Any] | None = None, seed: int = 1) -> str:
    changes = ARCHITECTURES[kind] if changes is None else changes
    return write(directory, build(kind, changes, seed), TOKENIZER)


def student_of(directory: str, **flags: Any) -> LanguageModel:
    return common.load_student(token_level.Arguments(student=directory, **flags), CPU)


def logits_alone(model: PreTrainedModel, ids: list[int], vocabulary: int) -> Tensor:
    """(L, vocabulary), from one text alone without a cache."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :, :vocabulary]


def loss_of(student: LanguageModel) -> Tensor:
    """The suite's cross-entropy on EXAMPLES."""
    batch = common.collate(EXAMPLES, CPU)
    objective = Objective(ce_weight=1.0)
    return common.distillation_loss(student.logits(batch), batch.targets, objective)[0]


def plain_loss(model: PreTrainedModel, vocabulary: int) -> Tensor:
    """The same from `transformers` and `torch` alone, text by text."""
    total = torch.zeros(())
    for ids, targets in EXAMPLES:
        logits = logits_alone(model, ids, vocabulary)[[i - 1 for i in targets]]
        right = torch.tensor([ids[i] for i in targets])
        total = total + F.cross_entropy(logits, right, reduction="sum")
    return total


def check_text(model: LanguageModel, temperature: float) -> None:
    """Every token is the one that the logits without cache and the row's draw give."""
    seeds = [7, 8, 9, 10]
    model.end_ids = []
    free = dict(common.generate(model, PROMPTS, seeds, GENERATION, temperature))
    # The token that ends the answers at the most different lengths.
    lengths = [len({[*c.ids, t].index(t) for c in free.values()}) for t in range(V)]
    model.end_ids = [lengths.index(max(lengths))]
    written = dict(common.generate(model, PROMPTS, seeds, GENERATION, temperature))
    assert len({c.length for c in written.values()}) > 1  # rows left the batch
    draws = common.uniforms(seeds, 12)
    for i, completion in written.items():
        ids = PROMPTS[i] + completion.ids
        with torch.no_grad():
            logits = logits_alone(model.model, ids, model.vocabulary)[len(PROMPTS[i]) - 1 : -1]
        logits = logits.double()
        chosen = torch.tensor(completion.ids)[:, None]
        if temperature == 0:
            assert (logits.max(-1).values - logits.gather(1, chosen)[:, 0]).max() < 1e-3
        else:
            mass = (logits / temperature).softmax(-1).cumsum(-1)
            draw = draws[i, : len(chosen)]
            assert (mass.gather(1, chosen)[:, 0] - draw).min() > -1e-3
            below = F.pad(mass, (1, 0)).gather(1, chosen)[:, 0]
            assert (draw - below).min() > -1e-3


@pytest.mark.parametrize("kind", ["qwen3_moe", "olmoe"])
def test_experts_compute_in_bfloat16(kind: str, tmp_path: Path):
    """Under autocast, which leaves grouped products in the dtype of the weights."""
    student = student_of(save(tmp_path / "student", kind), dtype="bfloat16")

    class Products(TorchDispatchMode):
        dtypes: ClassVar = Counter()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "mm" in str(function):
                self.dtypes[tuple(a.dtype for a in args if torch.is_tensor(a))] += 1
            return function(*args, **(kwargs or {}))

    with Products() as products, torch.no_grad():
        student.backbone(input_ids=torch.arange(4, 20)[None])
    assert {d for pair in products.dtypes for d in pair} == {torch.bfloat16}
    assert products.dtypes.total() > 10


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architecture(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Gradients are plain autograd's; final/ holds the trained model; its text is right."""
    student = student_of(save(tmp_path / "s", kind))
    assert ("without" in capsys.readouterr().out) == (kind in WITHOUT_CACHE)
    assert (student.cache is None) == (kind in WITHOUT_CACHE)

    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    plain_loss(reference, student.vocabulary).backward()
    loss = loss_of(student)
    loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    for name, parameter in student.model.named_parameters():
        assert parameter.requires_grad == (expected[name] is not None), name
        if parameter.requires_grad:
            scale = max(1e-3, expected[name].abs().max())
            assert (parameter.grad - expected[name]).abs().max() < 1e-3 * scale, name

    optimizer = common.make_optimizer(student.model, token_level.Arguments(learning_rate=1e-2))
    optimizer.step()
    optimizer.zero_grad()
    assert loss_of(student) < loss
    common.save_student(student, tmp_path / "final", "card")
    loaded = student_of(str(tmp_path / "final"))
    for ids, _ in EXAMPLES:
        with torch.no_grad():
            ours, theirs = (logits_alone(m.model, ids, V) for m in (student, loaded))
        torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)

    check_text(loaded, temperature=0.0)
    check_text(loaded, temperature=1.0)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_rounding_is_no_reason_to_do_without_a_cache(kind: str, tmp_path: Path):
    """In bfloat16 too the cache is used by all models that have one; a wrong mask is noticed."""
    student = student_of(save(tmp_path, kind), dtype="bfloat16")
    assert (student.cache is None) == (kind in WITHOUT_CACHE)
    weights, masked = student.model, []
    student = dataclasses.replace(student, load=lambda _: weights, compute_dtype=torch.float32)
    right = student.backbone

    def without_mask(**inputs: Any) -> Any:
        if inputs.get("attention_mask") is not None:
            masked.append(inputs["attention_mask"].all())
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
        return right(**inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LanguageModel, "backbone", lambda self, **inputs: without_mask(**inputs))
        assert not student.cache or not common.cache_is_exact(student, student.cache)
    assert not student.cache or False in masked


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_inference_copy_is_the_model_loaded_in_bfloat16(kind, tmp_path: Path, graphs):
    """Its dtypes and logits are those that transformers gives the same files: routers and rotary
    frequencies stay in float32. The trained weights stay as they were. The copy generates text with
    the GPU's caches, too."""
    directory = save(tmp_path, kind)
    student = student_of(directory, dtype="bfloat16")
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    trained, before = student.model, copy.deepcopy(student.model.state_dict())
    with student.evaluating():
        assert student.model is not trained
        dtypes = [{n: p.dtype for n, p in m.named_parameters()} for m in (student.model, loaded)]
        assert dtypes[0] == dtypes[1]
        ours, theirs = (logits_alone(m, EXAMPLES[1].ids, V) for m in (student.model, loaded))
    assert student.model is trained
    gpu = dataclasses.replace(student, device=torch.device("cuda"), load=lambda _: trained)
    exact = [cache for cache in common.caches_for(gpu) if common.cache_is_exact(student, cache)]
    assert (common.MaskedCache in exact) == (kind not in WITHOUT_CACHE)
    assert (StaticCache in exact) == (kind in CAPTURED | {"falcon"})
    assert StaticCache not in exact or graphs.replays == 7
    assert all(torch.equal(before[name], t) for name, t in trained.state_dict().items())
    if kind == "falcon_h1":  # a vector of constants, which is not saved, stays in float32
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_architecture(kind: str, tmp_path: Path):
    changes, reason = REFUSED[kind]
    with pytest.raises(UsageError, match=reason) as problem:
        student_of(save(tmp_path, kind, changes))
    assert str(tmp_path) in str(problem.value)


VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "depth": 1,
          "num_attention_heads": 2, "num_heads": 2, "out_hidden_size": 32, "head_dim": 16,
          "image_size": 28, "patch_size": 14}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4}
WRAPPED = {  # the text model of a model that sees, and tokens for its images
    "mistral3": ({"model_type": "mistral", "head_dim": 8}, {"image_token_index": 6}),
    "qwen2_5_vl": (
        {"model_type": "qwen2_5_vl_text", "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}},
        {"image_token_id": 6},
    ),
    "qwen3_5": ({"model_type": "qwen3_5_text", "head_dim": 8, **LINEAR}, {"image_token_id": 6}),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_text_model_in_a_model_that_sees(kind: str, tmp_path: Path):
    """Its text is that of the whole model, its tower is not trained, and final/ can be loaded."""
    text, more = WRAPPED[kind]
    config = AutoConfig.for_model(
        kind, text_config={**SIZES, **ENDS, **text}, vision_config=VISION, **more
    )
    whole = randomize(AutoModelForImageTextToText.from_config(config), 1).eval()
    student = student_of(write(tmp_path / "student", whole, TOKENIZER))
    ids = EXAMPLES[1].ids
    with torch.no_grad():
        expected, before = (logits_alone(m, ids, V) for m in (whole, student.model))
    torch.testing.assert_close(before, expected, rtol=1e-5, atol=1e-5)
    names = {n for n, p in student.model.named_parameters() if p.requires_grad}
    assert names and not any("visual" in n or "vision" in n for n in names)
    check_text(student, 1.0)
    common.save_student(student, tmp_path / "final", "card")
    loaded = student_of(str(tmp_path / "final"))
    assert type(loaded.model) is type(student.model)
    assert torch.equal(logits_alone(loaded.model, ids, V), before)


@pytest.mark.parametrize("extra", ["k_proj.bias", "k_proj.weight_scale"])
def test_tensors_that_would_be_left_out(extra: str, tmp_path: Path):
    """Beside a weight that is loaded: without a bias or a scale it computes something else."""
    directory = Path(save(tmp_path / "student", "llama"))
    weights = load_file(directory / "model.safetensors")
    weights |= {f"model.layers.1.self_attn.{extra}": torch.ones(16), "vision.weight": torch.ones(2)}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=rf"layers.1.self_attn.{extra}, which .* would leave out"):
        student_of(str(directory))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plan_of_experts(kind: str, dtype: str, tmp_path: Path):
    args = token_level.Arguments(student=save(tmp_path / "s", kind), dtype=dtype, max_length=32)
    student = common.open_model(args, CPU, "student")
    parts = common.memory_of_run("token_level", args, student, student, longest_prompt=8)
    assert parts["gradients"] == sum(
        p.nbytes for p in build(kind, ARCHITECTURES[kind]).parameters()
    )


LORA = {
    "llama": "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    "gpt2": "c_attn, c_fc, c_proj",
    "gpt_oss": "down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj",
    "mixtral": "down_proj, gate_up_proj, k_proj, o_proj, q_proj, v_proj",
    "deepseek_v3": "down_proj, gate_proj, gate_up_proj, ",  # also in dense layers
    "jamba": "down_proj, ",  # its expert layers and what is beside them
    "gemma3": "down_proj, ",
}


@pytest.mark.parametrize("kind", LORA)
def test_adapters_reach_experts(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    """They are named, they learn, each gets a gradient, and merged they are the trained model."""
    pytest.importorskip("peft")
    base = save(tmp_path / "s", kind)
    student = student_of(base, lora_rank=2)
    out = capsys.readouterr().out
    assert "LoRA adapts " in out and f"{base}: {LORA[kind]}" in out
    trained = {n: p for n, p in student.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    experts = {name for name in trained if "expert" in name}
    assert bool(experts) == (kind in ("gpt_oss", "mixtral", "deepseek_v3", "jamba"))
    plain = [n for n, m in student.model.named_modules() if type(m) is torch.nn.Linear]
    assert [n for n in plain if ".base_layer" not in n and "lora_" not in n] == ["lm_head"]
    ranks = {p.shape[0] for n, p in trained.items() if "lora_A" in n}
    assert ranks <= {2, 2 * getattr(student.config, "num_local_experts", 4)}, ranks
    optimizer = common.make_optimizer(student.model, token_level.Arguments(learning_rate=1e-2))
    losses = []
    for _ in range(4):
        loss = loss_of(student)
        loss.backward()
        assert all(p.grad is not None for p in trained.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    ids = EXAMPLES[1].ids
    with torch.no_grad():
        before = logits_alone(student.model, ids, V)
        common.save_student(student, tmp_path / "final", "card")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
        torch.testing.assert_close(logits_alone(loaded, ids, V), before, rtol=1e-4, atol=1e-4)
    ours, theirs = dict(build(kind, ARCHITECTURES[kind]).named_parameters()), loaded.state_dict()
    moved = {name for name, p in ours.items() if not torch.equal(p, theirs[name])}
    assert any("expert" in name for name in moved) == bool(experts)


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("mamba2", None, "--lora-rank: .*out_proj"),
        (
            "dbrx",  # all experts in one matrix
            {"alone": True, "vocab_size": V, "d_model": 32, "n_heads": 4, "n_layers": 2,
             "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
             "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8}},
            r"--lora-rank cannot adapt the experts of .*\.experts\.",
        ),
    ],
)  # fmt: skip
def test_adapters_that_would_miss_most_are_refused(kind, changes, reason, tmp_path: Path):
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match=reason):
        student_of(save(tmp_path, kind, changes), lora_rank=2)


def test_adapters_that_a_model_cannot_use(tmp_path: Path):
    """A router that is a linear layer, but returns more than its product."""
    pytest.importorskip("peft")
    directory = save(tmp_path / "s", "phimoe", {"num_local_experts": 4, "num_experts_per_tok": 2})
    with pytest.raises(UsageError, match="cannot train"):
        student_of(directory, lora_rank=2)
