"""The divergences and the chunked loss against brute force in float64, values and gradients."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import example_of
from torch import Tensor

import common
from common import Head, Logits, Objective, Tokens

OBJECTIVES = [
    Objective("forward"),
    Objective("reverse"),
    Objective("jsd", jsd_beta=0.5),
    Objective("jsd", jsd_beta=0.1),
    Objective("forward", skew=0.1),
    Objective("reverse", skew=0.1),
    Objective("forward", ce_weight=0.7),
    Objective("reverse", ce_weight=1.3),
]


def small_chunks(monkeypatch, size: int) -> None:
    """Make every chunked computation take several chunks of `size` tokens."""

    def chunks(logits: Logits) -> list[slice]:
        return [slice(i, i + size) for i in range(0, max(1, len(logits.hidden)), size)]

    monkeypatch.setattr(Logits, "chunks", chunks)


def plain_divergence(student: Tensor, teacher: Tensor, objective: Objective) -> Tensor:
    """Straight from the definitions, on probabilities (n, V), differentiable."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p.log() - q.log())).sum(-1)

    a, beta = objective.skew, objective.jsd_beta
    if objective.kl == "forward":
        return kl(teacher, a * teacher + (1 - a) * student)
    if objective.kl == "reverse":
        return kl(student, a * student + (1 - a) * teacher)
    mixture = beta * teacher + (1 - beta) * student
    return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def plain_loss(
    student_logits: Tensor, teacher_logits: Tensor, targets: Tensor, objective: Objective
) -> Tensor:
    t = objective.temperature
    student, teacher = (torch.softmax(x / t, -1) for x in (student_logits, teacher_logits))
    loss = t**2 * plain_divergence(student, teacher, objective).sum()
    ce = -torch.log_softmax(student_logits, -1).gather(1, targets[:, None]).sum()
    return loss + objective.ce_weight * ce


def random_heads(dtype=torch.float64, n=37, v=53, d=12, bias=True, scale=1.0, softcap=None):
    torch.manual_seed(0)
    hidden, theirs = torch.randn(n, d, dtype=dtype), torch.randn(n, d + 3, dtype=dtype)
    weight, teacher_weight = torch.randn(v, d, dtype=dtype), torch.randn(v, d + 3, dtype=dtype)
    biases = [torch.randn(v, dtype=dtype) if bias else None for _ in range(2)]
    student = Head(weight.requires_grad_(), biases[0], scale, softcap)
    if bias:
        biases[0].requires_grad_()
    teacher = Head(teacher_weight, biases[1], scale, softcap)
    return hidden.requires_grad_(), student, theirs, teacher, torch.randint(0, v, (n,))


def plain_logits(hidden: Tensor, head: Head) -> Tensor:
    raw = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    raw = raw * head.scale
    return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [{}, {"bias": False}, {"softcap": 5.0}, {"scale": 0.3}, {"scale": 2.0, "softcap": 4.0}],
    ids=str,
)
def test_chunked_loss_equals_plain_loss(objective, temperature, shape, monkeypatch):
    """Loss and every gradient to 1e-5 relative (in fact rounding), over several chunks."""
    small_chunks(monkeypatch, 8)
    objective = objective._replace(temperature=temperature)
    hidden, student, theirs, teacher, targets = random_heads(**shape)
    leaves = [x for x in (hidden, student.weight, student.bias) if x is not None]
    logits = plain_logits(hidden, student), plain_logits(theirs, teacher)
    plain = plain_loss(*logits, targets, objective)
    expected = torch.autograd.grad(plain, leaves)
    pair = Logits(hidden, student), Logits(theirs, teacher)
    chunked, sums = common.distillation_loss(pair[0], targets, objective, pair[1])
    gradients = torch.autograd.grad(chunked * 3.0, leaves)
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-9)
    for ours, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, 3.0 * wanted, rtol=1e-8, atol=1e-9)
    assert sums[0] == chunked
    probabilities = [(x / temperature).softmax(-1) for x in logits]
    kl = plain_divergence(*probabilities, objective).sum().item()
    assert sums[1].item() == pytest.approx(kl, rel=1e-9)


@pytest.mark.parametrize("objective", OBJECTIVES[:6], ids=str)
def test_divergence_value_and_gradient(objective):
    """`divergence` alone: value per row, and gradient with respect to the logits."""
    torch.manual_seed(1)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 11, dtype=torch.float64)
    plain = plain_divergence(logits.softmax(-1), teacher.softmax(-1), objective)
    (expected,) = torch.autograd.grad(plain.sum(), logits)
    with torch.no_grad():
        value, gradient = common.divergence(
            logits.log_softmax(-1), teacher.log_softmax(-1), objective
        )
    torch.testing.assert_close(value, plain.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    assert (value > 0).all()
    assert gradient.sum(-1).abs().max() < 1e-12  # logits are free up to a constant
    same = common.divergence(teacher.log_softmax(-1), teacher.log_softmax(-1), objective)
    assert same[0].abs().max() < 1e-12 and same[1].abs().max() < 1e-12


def test_direction_of_the_divergences():
    """Forward KL punishes missing a mode, reverse KL punishes inventing one."""
    teacher = torch.tensor([[0.5, 0.5, 1e-9]]).log()
    covering, seeking = (torch.tensor([x]).log() for x in ([0.34, 0.33, 0.33], [0.98, 0.01, 0.01]))

    def value(student: Tensor, kl: str) -> float:
        return common.divergence(student.clone(), teacher.clone(), Objective(kl))[0].item()

    assert value(covering, "forward") == pytest.approx(math.log(0.5) - math.log(0.335), abs=1e-2)
    assert value(covering, "forward") < value(seeking, "forward")
    assert value(covering, "reverse") > value(seeking, "reverse")


def test_no_target_gives_a_connected_zero():
    """A micro-batch without targets: loss 0 and gradients of zeros, not None and not NaN."""
    hidden, student, theirs, teacher, targets = random_heads()
    none = slice(0, 0)
    pair = Logits(hidden[none], student), Logits(theirs[none], teacher)
    loss, _ = common.distillation_loss(pair[0], targets[none], OBJECTIVES[-1], pair[1])
    gradients = torch.autograd.grad(loss, [hidden, student.weight, student.bias])
    assert loss.item() == 0 and all(g.abs().sum() == 0 for g in gradients)


def test_frozen_head_gets_no_gradient():
    hidden, student, theirs, teacher, targets = random_heads(bias=False)
    frozen = student._replace(weight=student.weight.detach())
    ours, full = (
        torch.autograd.grad(
            common.distillation_loss(
                Logits(hidden, head), targets, Objective(), Logits(theirs, teacher)
            )[0],
            hidden,
        )
        for head in (frozen, student)
    )
    assert torch.equal(ours[0], full[0])


@pytest.mark.parametrize("rows", [4, 6])
def test_as_many_rows_of_the_teacher_as_targets(rows: int):
    hidden, student, theirs, teacher, targets = random_heads(bias=False)
    with pytest.raises(ValueError, match=rf"{rows} rows of the teacher for 5 targets"):
        common.distillation_loss(
            Logits(hidden[:5], student), targets[:5], Objective(), Logits(theirs[:rows], teacher)
        )


def test_without_a_teacher_it_is_cross_entropy():
    hidden, student, _, _, targets = random_heads(bias=False)
    loss, sums = common.distillation_loss(
        Logits(hidden, student), targets, Objective(ce_weight=1.0)
    )
    expected = torch.nn.functional.cross_entropy(
        hidden @ student.weight.T, targets, reduction="sum"
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert sums.tolist() == [loss.item(), 0.0]


@pytest.mark.parametrize("shape", [{}, {"softcap": 3.0}, {"scale": 0.3, "bias": False}], ids=str)
def test_compare_against_plain_log_softmax(shape, monkeypatch):
    """What evaluation reads at each target, over several chunks, at temperature 1."""
    small_chunks(monkeypatch, 5)
    hidden, student, theirs, teacher, targets = random_heads(**shape)
    ours, wanted = (
        plain_logits(*x).log_softmax(-1).detach() for x in ((hidden, student), (theirs, teacher))
    )
    values = common.compare(Logits(hidden, student), targets, Logits(theirs, teacher))
    logprobs = ours.gather(1, targets[:, None])[:, 0]
    kl = plain_divergence(ours.exp(), wanted.exp(), Objective())
    torch.testing.assert_close(values["logprob"], logprobs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(values["kl"], kl, rtol=1e-9, atol=1e-12)
    assert values["agree"].tolist() == (ours.argmax(-1) == wanted.argmax(-1)).tolist()
    alone = common.compare(Logits(hidden, student), targets)
    assert alone.keys() == {"logprob"} and alone["logprob"].equal(values["logprob"])
    empty = Logits(hidden[:0], student), Logits(theirs[:0], teacher)
    none = common.compare(empty[0], targets[:0], empty[1])
    assert {name: len(value) for name, value in none.items()} == {"logprob": 0, "kl": 0, "agree": 0}


def test_bfloat16_products_are_summed_in_float32():
    """Half-precision inputs: the logits are no worse than rounding the inputs makes them."""
    hidden, student, *_ = random_heads(torch.float32, n=64, v=300, d=64)
    rounded = hidden.detach().bfloat16()
    exact = common.matmul_fp32(rounded.float(), student.weight.detach())
    weight = student.weight.detach().bfloat16()
    product = common.matmul_fp32(rounded, weight)
    assert product.dtype == torch.float32
    reference = rounded.double() @ weight.double().T
    assert (product - reference).abs().max() < 1e-4 < (exact - reference).abs().max()


def test_temperature_and_float32():
    logits = torch.tensor([[1000.0, 998.0, -1000.0]], dtype=torch.bfloat16)
    out = common.softmax_with_temperature(logits, 2.0)
    assert out.dtype == torch.float32
    odds = (logits[0, 0].item() - logits[0, 1].item()) / 2
    assert out[0, 0].item() == pytest.approx(1 / (1 + math.exp(-odds)), rel=1e-6)
    log = common.log_softmax_with_temperature(logits, 2.0)
    assert torch.isfinite(log).all()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_head_is_the_models_own(kind, tiny):
    """`Head.logits` of the hidden states are the model's own logits, and `check_head` agrees."""
    model = tiny(kind)
    ids = torch.arange(2, 20).view(2, 9)
    own = model.model(input_ids=ids).logits
    ours = model.head().logits(model.backbone(input_ids=ids).last_hidden_state.flatten(0, 1))
    torch.testing.assert_close(ours, own.flatten(0, 1), rtol=1e-5, atol=1e-5)
    common.check_head(model)
    if kind == "gemma2":
        model.config.final_logit_softcapping = 50.0  # no longer what the model does
        model.model.final_logit_softcapping = 5.0
        ours = model.head().logits(model.backbone(input_ids=ids).last_hidden_state.flatten(0, 1))
        assert (ours - own.flatten(0, 1)).abs().max() > 0.01


def test_a_model_that_changes_its_logits_otherwise_is_refused(tiny):
    model = tiny("llama")
    model.model.lm_head.register_forward_hook(lambda *a: a[-1].tanh())
    with pytest.raises(common.UsageError, match="computes its logits"):
        common.check_head(model)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "gpt2"])
def test_gradient_through_whole_models(kind, tiny):
    """Tied and untied embeddings, bias, softcap: every parameter's gradient equals autograd's."""
    student, teacher = tiny(kind, seed=1), tiny(kind, seed=2)
    examples = [
        Tokens([5, 6, 7, 8, 9, 1], [3, 4, 5]),
        Tokens([9, 8, 7, 6], [1, 3]),
        Tokens([4, 4], [1]),
    ]
    batch = common.collate(examples, torch.device("cpu"))
    objective = Objective("jsd", temperature=2.0, ce_weight=0.5)
    theirs = common.teacher_hidden_states(teacher, [*map(example_of, examples)])
    loss, _ = common.distillation_loss(
        student.logits(batch), batch.targets, objective, Logits(theirs, teacher.head())
    )
    parameters = list(student.model.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    plain = 0.0
    for tokens in examples:  # one by one: no padding at all
        ids = torch.tensor([tokens.ids])
        before = torch.tensor(tokens.targets) - 1
        with torch.no_grad():
            theirs = teacher.model(input_ids=ids).logits[0, before]
        ours = student.model(input_ids=ids).logits[0, before]
        plain = plain + plain_loss(ours, theirs, ids[0, before + 1], objective)
    expected = torch.autograd.grad(plain, parameters)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * theirs.abs().max() + 1e-7)
