"""Loading, precision and memory switches: what changes a result, and what must not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import common
from common import Objective
from token_level import Arguments, TokenLevelLoss

CPU = torch.device("cpu")


def embedded(**changes) -> tuple[Arguments, common.LanguageModel, common.LanguageModel]:
    args = Arguments(**changes)
    return args, *common.load_pair(args, CPU)


def loss_and_gradient(student, teacher) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one fixed batch of real prompts and answers."""
    rows = common.load_conversations(str(common.DATA / "train.jsonl"), max_rows=8)
    prompts = common.encode_for_both(rows, student, teacher, 512)
    examples, _ = common.dataset_examples(prompts, student, teacher, 512)
    module = TokenLevelLoss(student, teacher.head(), Objective()).train()
    batch = common.collate([e.student for e in examples], CPU)
    theirs = common.teacher_states(teacher, common.collate([e.teacher for e in examples], CPU))
    loss, _ = module(batch, theirs)
    gradients = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad])
    return loss.detach(), torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("shape", ((5, 40), (2, 3, 40), (0, 40), (1, 40)))
def test_linear_equals_float64_whichever_library_multiplies(shape, bias, monkeypatch):
    monkeypatch.setattr(common, "ONEDNN_WEIGHT", 0)
    torch.manual_seed(0)
    x, weight, offset = torch.randn(shape), torch.randn(40, 30).t(), torch.randn(30)
    inputs = [t.requires_grad_() for t in (x, weight, offset)[: 2 + bias]]
    out = common.linear(*inputs)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected = torch.nn.functional.linear(*wide)
    slope = torch.randn(out.shape)
    found = torch.autograd.grad(out, inputs, slope)
    wanted = torch.autograd.grad(expected, wide, slope.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not common.HAS_ONEDNN, reason="oneDNN is for x86 processors")
def test_models_run_on_onednn_where_it_takes_the_type(monkeypatch):
    _, student, teacher = embedded()
    plain = loss_and_gradient(student, teacher)
    monkeypatch.setattr(common, "ONEDNN_WEIGHT", 0)
    _, student, teacher = embedded()
    calls, by_onednn = [], common._by_onednn

    def counted(*inputs):
        calls.append(inputs[0].dtype)
        return by_onednn(*inputs)

    monkeypatch.setattr(common, "_by_onednn", counted)
    found = loss_and_gradient(student, teacher)
    assert len(calls) > 2 * 7 * 4  # forward in both models' layers, and backward in the student's
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-5
    calls.clear()
    _, student, teacher = embedded(dtype="bfloat16", teacher_dtype="bfloat16")
    loss_and_gradient(student, teacher)
    assert set(calls) <= {torch.float32}  # heads are multiplied in float32


@pytest.mark.skipif(not common.HAS_ONEDNN, reason="oneDNN is for x86 processors")
def test_packed_weights_write_the_same_text_and_are_gone_after(monkeypatch):
    _, student, _ = embedded()
    prompt = common.encode_prompts(
        student, [common.Conversation([dict(role="user", content="pa")], None, [], "")]
    )

    def written():
        return common.generate(student, 5 * prompt, [*range(5)], max_new_tokens=9, temperature=1.0)

    plain = list(written())
    monkeypatch.setattr(common, "ONEDNN_WEIGHT", 0)
    layers = common.linear_layers(student.model)
    assert len(layers) == 7 * student.model.config.num_hidden_layers
    with common.packed_layers(student):
        assert all(layer.packed.is_mkldnn for layer in layers)
        x = torch.randn(2, 3, layers[0].in_features)
        found, wanted = layers[0](x), x.double() @ layers[0].weight.double().t()
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert list(written()) == plain
    unfinished = written()
    next(unfinished)
    unfinished.close()
    assert all(layer.packed is None for layer in layers)


@pytest.mark.skipif(not common.HAS_ONEDNN, reason="oneDNN is for x86 processors")
@pytest.mark.parametrize("rows", (0, 1, 70))
def test_added_product_equals_float64_beyond_one_block(rows, monkeypatch):
    monkeypatch.setattr(common, "ONEDNN_WEIGHT", 0)
    torch.manual_seed(0)
    total, left = torch.randn(5000, 40), torch.randn(rows, 5000)
    right = torch.randn(40, rows).t()  # not contiguous
    wanted = total.double() + left.double().t() @ right.double()
    common.add_product(total, left, right)
    torch.testing.assert_close(total.double(), wanted, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_memory_only():
    """Same gradient; and generation still uses its cache and gives the same text afterwards."""
    _, student, teacher = embedded()
    _, checkpointed, _ = embedded(gradient_checkpointing=True)
    plain, saved = loss_and_gradient(student, teacher), loss_and_gradient(checkpointed, teacher)
    torch.testing.assert_close(saved[1], plain[1], rtol=1e-5, atol=1e-6)
    prompt = common.encode_prompts(
        student, [common.Conversation([dict(role="user", content="pa")], None, [], "")]
    )
    checkpointed.model.train()
    settings = {"max_new_tokens": 12, "temperature": 0.0}
    written = [list(common.generate(m, prompt, [0], **settings)) for m in (student, checkpointed)]
    assert written[0] == written[1]
    assert checkpointed.model.training


def test_bfloat16_compute_keeps_float32_weights():
    """Autocast: weights and gradients stay float32, the gradient is within rounding."""
    _, student, teacher = embedded()
    _, half, _ = embedded(dtype="bfloat16")
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
    (loss, gradient), (rounded, approximate) = (
        loss_and_gradient(student, teacher),
        loss_and_gradient(half, teacher),
    )
    assert approximate.dtype == torch.float32
    assert rounded.item() == pytest.approx(loss.item(), rel=0.02)
    assert (approximate - gradient).norm() < 0.1 * gradient.norm()
    assert (approximate - gradient).norm() > 1e-6 * gradient.norm()  # it did compute differently


def test_bfloat16_teacher_is_close():
    _, student, teacher = embedded()
    _, _, half = embedded(teacher_dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    exact, rounded = loss_and_gradient(student, teacher)[0], loss_and_gradient(student, half)[0]
    assert rounded.item() == pytest.approx(exact.item(), rel=0.02)


def test_embedded_models_are_what_the_suite_expects(tokenizer):
    """One end token, its template's own; equal vocabularies; and nothing trains the teacher."""
    _, student, teacher = embedded()
    common.check_same_vocabulary(student, teacher)
    assert student.end_ids == teacher.end_ids == [tokenizer.convert_tokens_to_ids("<|end|>")]
    assert not any(p.requires_grad for p in teacher.model.parameters())
    assert student.digest != teacher.digest


def test_template_end_token_is_an_end_even_if_undeclared(tokenizer, tmp_path):
    """A base model that declares <|pad|> as its end, in a format whose turns end with <|end|>."""
    shutil.copytree(common.DATA / "student", tmp_path / "base")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "base")
    loaded.eos_token = "<|pad|>"
    _, student, _ = embedded()
    student.model.config.eos_token_id = student.model.generation_config.eos_token_id = 0
    ends = common.end_of_turn_ids(student.model, loaded)
    assert ends == sorted([0, tokenizer.convert_tokens_to_ids("<|end|>")])


def test_base_student_takes_the_teachers_template(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(common.DATA / "student", base)
    (base / "chat_template.jinja").unlink()
    _, student, teacher = embedded(student=str(base))
    assert student.tokenizer.chat_template == teacher.tokenizer.chat_template
    assert student.end_ids == teacher.end_ids


def test_digest_follows_the_weights_not_the_path(tmp_path):
    """The cache must survive a move and must not survive other weights."""
    moved, changed = tmp_path / "moved", tmp_path / "changed"
    shutil.copytree(common.DATA / "student", moved)
    shutil.copytree(common.DATA / "student", changed)
    weights = changed / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    digests = {}
    for path in (common.DATA / "student", moved, changed):
        digests[Path(path).name] = embedded(student=str(path))[1].digest
    assert digests["student"] == digests["moved"] != digests["changed"]
