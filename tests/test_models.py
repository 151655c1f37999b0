"""Loading, precision and memory switches: what changes a result, and what must not."""

from __future__ import annotations

import gc
import json
import shutil
import weakref

import pytest
import torch
from conftest import generate
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoTokenizer

import common
from common import LanguageModel, Objective, Pair, Tokens
from token_level import Arguments, TokenLevelLoss

CPU = torch.device("cpu")


def embedded(**changes: object) -> Pair:
    """The embedded pair, its teacher computed live."""
    return common.load_pair(Arguments(cache_teacher=False, **changes), CPU)


def loss_and_gradient(student: LanguageModel, teacher: LanguageModel) -> tuple[Tensor, Tensor]:
    """Of one fixed batch of real prompts and answers."""
    pair = Pair(student, teacher)
    rows = common.load_conversations(str(common.DATA / "train.jsonl"), max_rows=8)
    prompts = common.tokenize_prompts(rows, pair, 512)
    examples, _ = common.dataset_examples(prompts, pair, 512)
    module = TokenLevelLoss(student, teacher.head(), Objective()).train()
    batch = common.collate([e.student for e in examples], CPU)
    loss, _ = module(batch, common.teacher_hidden_states(teacher, examples))
    gradients = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


def test_gradient_checkpointing_changes_memory_only():
    """Same gradient; and generation still uses its cache and gives the same text afterwards."""
    student, teacher = embedded()
    checkpointed, _ = embedded(gradient_checkpointing=True)
    plain, saved = loss_and_gradient(student, teacher), loss_and_gradient(checkpointed, teacher)
    torch.testing.assert_close(saved[1], plain[1], rtol=1e-5, atol=1e-6)
    talk = common.Conversation([{"role": "user", "content": "pa"}], None, [], "")
    (prompt,) = common.tokenize_prompts([talk], Pair(student, teacher), 512)
    checkpointed.model.train()
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    written = [
        list(generate(model, [prompt.student], [0], **settings))
        for model in (student, checkpointed)
    ]
    assert written[0] == written[1]
    assert checkpointed.model.training


class Read(TorchDispatchMode):
    """Notes when the host reads a value from a tensor, for which it would wait on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.values += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral", "gemma2"])
def test_a_training_step_reads_nothing_from_the_device(tiny, kind):
    """Unequal rows, longer than a sliding window."""
    student, teacher = tiny(kind), tiny("llama", seed=1)
    module = TokenLevelLoss(student, teacher.head(), Objective("jsd", ce_weight=1.0))
    texts = [Tokens(list(range(1, n)), list(range(3, n - 1))) for n in (9, 20)]
    batch = common.collate(texts, CPU)
    with Read() as read:
        torch.ones(1).item()
        loss, _ = module(batch, teacher.hidden_states(batch).detach())
        loss.backward()
    assert read.values == 1  # the one above


def test_compiled_layers_give_the_same_gradient():
    """With gradient checkpointing too; generation and evaluation run the layers as they are."""
    student, teacher = embedded()
    compiled, _ = embedded(compile=True, gradient_checkpointing=True)
    plain, fast = loss_and_gradient(student, teacher), loss_and_gradient(compiled, teacher)
    torch.testing.assert_close(fast[0], plain[0], rtol=1e-6, atol=0)
    assert (fast[1] - plain[1]).norm() < 1e-5 * plain[1].norm()  # 1e-6 is float32's rounding
    settings = {"max_new_tokens": 8, "temperature": 0.0}
    before = counters["stats"]["unique_graphs"]
    assert before
    written = [list(generate(m, [[1, 2, 3]], [0], **settings)) for m in (student, compiled)]
    assert written[0] == written[1] and counters["stats"]["unique_graphs"] == before


def test_bfloat16_compute_keeps_float32_weights():
    """Autocast: weights and gradients stay float32, the gradient is within rounding."""
    student, teacher = embedded()
    half, _ = embedded(dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    (loss, gradient), (rounded, approximate) = (
        loss_and_gradient(student, teacher),
        loss_and_gradient(half, teacher),
    )
    assert approximate.dtype == torch.float32
    assert rounded.item() == pytest.approx(loss.item(), rel=0.02)
    assert (approximate - gradient).norm() < 0.1 * gradient.norm()
    assert (approximate - gradient).norm() > 1e-6 * gradient.norm()  # it did compute differently


def test_casts_are_not_kept_until_the_forward_pass_ends():
    """Autocast's cache would hold all layers in bfloat16 beside their float32 weights."""
    student, _ = embedded(dtype="bfloat16")
    cached = []
    layers = common.layers_of(student.model)
    layers[1].register_forward_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))
    student.hidden_states(common.collate([common.Tokens([1, 2, 3], [2])], student.device))
    assert cached == [False] and torch.is_autocast_cache_enabled()


def test_bfloat16_teacher_is_close():
    student, teacher = embedded()
    _, half = embedded(teacher_dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    exact, rounded = loss_and_gradient(student, teacher)[0], loss_and_gradient(student, half)[0]
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


def test_embedded_models_are_what_the_suite_expects(tokenizer):
    """One end token, which their template prints; equal vocabularies; only the student trains."""
    student, teacher = pair = embedded()
    pair.check_same_vocabulary()
    assert pair.same_vocabulary and pair.has_weights
    assert student.end_ids == teacher.end_ids == [tokenizer.convert_tokens_to_ids("<|end|>")]
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert all(p.requires_grad for p in student.model.parameters())
    assert student.digest != teacher.digest


def test_weights_are_loaded_at_the_first_use_and_can_be_unloaded():
    """End ids, limits and digest need no weights; `unload` keeps the head and frees the rest."""
    teacher = common.open_model(Arguments(), CPU, "teacher")
    assert (teacher.vocabulary, teacher.max_positions, teacher.end_ids) == (408, 512, [1])
    assert teacher.digest == common.digest_of_model(Arguments.teacher, "main")
    assert not teacher.loaded
    head = teacher.head()
    assert teacher.loaded
    backbone = weakref.ref(teacher.model)
    teacher.unload()
    gc.collect()
    assert not teacher.loaded and backbone() is None
    assert teacher.head().weight.equal(head.weight) and teacher.head()[2:] == head[2:]
    assert not teacher.loaded
    ids = torch.arange(5, 15)[None]
    assert teacher.model(input_ids=ids).logits.shape == (1, 10, 408)


def test_the_end_that_the_template_prints_comes_first(tokenizer, tmp_path):
    """A base model that declares <|pad|> as its end, in a format whose turns end with <|end|>."""
    shutil.copytree(common.DATA / "student", tmp_path / "base")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "base")
    loaded.eos_token = "<|pad|>"
    loaded.save_pretrained(tmp_path / "base")
    for name in ("config.json", "generation_config.json"):
        path = tmp_path / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 0}))
    student, _ = embedded(student=str(tmp_path / "base"))
    assert student.end_ids == [tokenizer.convert_tokens_to_ids("<|end|>"), 0]


def test_base_student_takes_the_teachers_template(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(common.DATA / "student", base)
    (base / "chat_template.jinja").unlink()
    student, teacher = embedded(student=str(base))
    assert student.tokenizer.chat_template == teacher.tokenizer.chat_template
    assert student.end_ids == teacher.end_ids


def test_digest_follows_the_weights_not_the_path(tmp_path):
    """The cache must survive a move and must not survive other weights or another template."""
    names = ("moved", "weights", "template")
    for name in names:
        shutil.copytree(common.DATA / "student", tmp_path / name)
    weights = tmp_path / "weights" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    template = tmp_path / "template" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    paths = [common.DATA / "student", *(tmp_path / name for name in names)]
    given, moved, *changed = (common.digest_of_model(str(path), "main") for path in paths)
    assert moved == given
    assert len({given, *changed}) == 3
