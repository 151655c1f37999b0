"""Tiny models whose tokens can be counted by hand: one token for each byte, or for each word.

A `scripted` model has weights set by hand: each token has one successor, so what it writes is known
in advance. All are directories, as a user would name them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ids 0 to 5; the tokenizer's end token is <|im_end|>, 1.
CONTROL = ["<|pad|>", "<|im_end|>", "<|im_start|>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """The six control tokens, then one token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(CONTROL + alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return _wrapped(raw, template)


def word_tokenizer(words: list[str], template: str, added: tuple = ()) -> PreTrainedTokenizerFast:
    """The six control tokens, `added` ones, <unk>, then one token for each word."""
    vocabulary = {word: i for i, word in enumerate([*CONTROL, *added, "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = _wrapped(raw, template)
    tokenizer.add_tokens(list(added))
    return tokenizer


def _wrapped(raw: Tokenizer, template: str | None) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>",
        additional_special_tokens=CONTROL[2:],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def rows_of(tokenizer: PreTrainedTokenizerFast) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def write(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **generation: Any
) -> str:
    """Save both; `generation` goes into generation_config.json as it is, unchecked."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if generation:
        edit(directory / "generation_config.json", **generation)
    return str(directory)


def edit(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2))


def randomize(model: PreTrainedModel, seed: int, std: float = 0.2) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, std, generator=generator)
    return model


def llama(tokenizer: PreTrainedTokenizerFast, seed: int = 2, **changes: Any) -> LlamaForCausalLM:
    """One random layer."""
    size = {"vocab_size": rows_of(tokenizer), "hidden_size": 32, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 1024,
            "eos_token_id": 1, "bos_token_id": None, "pad_token_id": 0}  # fmt: skip
    return randomize(LlamaForCausalLM(LlamaConfig(**{**size, **changes})), seed)


def scripted(tokenizer: PreTrainedTokenizerFast, said: list[int]) -> LlamaForCausalLM:
    """A model that writes the ids of `said` one after the other, and then ends.

    The first of them is what the cue for an answer ends in, and is not written; none occurs twice.
    """
    size = -(-rows_of(tokenizer) // 4) * 4
    model = llama(tokenizer, hidden_size=size, intermediate_size=8, tie_word_embeddings=False)
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    model.model.embed_tokens.weight.data.copy_(torch.eye(rows_of(tokenizer), size))
    head = model.lm_head.weight.data.zero_()
    head[tokenizer.eos_token_id] = 1.0  # what follows any other token
    for before, after in zip(said, [*said[1:], tokenizer.eos_token_id], strict=True):
        head[:, before] = 0.0
        head[after, before] = 2.0
    return model


def byte_pair(directory: Path, template: str = CHATML, **generation: Any) -> tuple[str, str]:
    """A teacher that answers "fine" to everything after a cue that ends in a line end, and a random
    student with `generation` in its generation_config.json."""
    tokenizer = byte_tokenizer(template)
    said = tokenizer("\nfine", add_special_tokens=False)["input_ids"]
    teacher = write(directory / "t", scripted(tokenizer, said), tokenizer)
    return teacher, write(directory / "s", llama(tokenizer), tokenizer, **generation)


def write_rows(path: Path, rows: list[Any]) -> str:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small_run(directory: Path, teacher: str, student: str, dataset: str, **flags: Any) -> dict:
    """Flags of a run of one step on all rows of `dataset`, for `conftest.run_in_process`."""
    held_out = write_rows(directory / "eval.jsonl", [{"prompt": "How?", "response": "So."}] * 2)
    return {
        "teacher": teacher, "student": student, "dataset": dataset, "eval_dataset": held_out,
        "completions": "dataset", "batch_size": 6, "max_steps": 1, "max_new_tokens": 16,
        "cache_dir": str(directory / "cache"), "output_dir": str(directory / "run"), **flags,
    }  # fmt: skip
