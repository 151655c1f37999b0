"""The compiled loss against the eager one and float64; the head's products and casts on a GPU."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulated import Emulation
from torch import Tensor
from torch._dynamo.utils import counters

import common
import on_policy
from common import Head, Logits, Objective

CASES = [
    (Objective("forward"), {}),
    (
        Objective("jsd", jsd_beta=0.1, temperature=2.0, ce_weight=0.7),
        {"scale": 0.5, "softcap": 4.0},
    ),
    (Objective("reverse", skew=0.1), {}),
    ("sampled", {}),
]
CHUNKS = [slice(i, min(i + 16, 37)) for i in range(0, 37, 16)]  # the last has 5 tokens


def loss_and_gradients(objective: Objective | str, dtype: torch.dtype, **head) -> list[Tensor]:
    """Loss, sums, and gradients of hidden states, weight and bias, on the same random numbers."""
    draw = torch.Generator().manual_seed(0)
    n, size = 37, 301
    shapes = (n, 8), (size, 8), (size,), (n, 6), (size, 6)
    tensors = [torch.randn(shape, generator=draw).to(dtype) for shape in shapes]
    leaves = [t.requires_grad_() for t in tensors[:3]]
    student = Logits(leaves[0], Head(*leaves[1:], **head))
    teacher, targets = Logits(tensors[3], Head(tensors[4])), torch.arange(n)
    if objective == "sampled":
        loss, sums = on_policy.sampled_loss(student, targets, teacher)
    else:
        loss, sums = common.distillation_loss(student, targets, objective, teacher)
    return [loss.detach(), sums, *torch.autograd.grad(loss, leaves)]


@pytest.fixture
def compiling(monkeypatch):
    """Vocabularies of any size are compiled; three chunks, of which the last is shorter."""
    monkeypatch.setattr(common, "COMPILED_FROM", 0)
    monkeypatch.setattr(Logits, "chunks", lambda logits: [c for c in CHUNKS if len(logits.hidden)])
    torch._dynamo.reset()
    cached = common.compiled
    cached.cache_clear()
    if cached("cpu", 301) is None:
        pytest.skip("no compiler here")
    counters.clear()
    yield
    cached.cache_clear()


@pytest.mark.parametrize(("objective", "head"), CASES, ids=str)
def test_compiled_is_eager_and_compiled_once(objective, head, compiling, monkeypatch):
    """Over chunks of 16, 16 and 5 tokens; a second batch compiles nothing either."""
    compiled = loss_and_gradients(objective, torch.float32, **head)
    assert counters["stats"]["unique_graphs"] == 1
    monkeypatch.setattr(Logits, "chunks", lambda _: [slice(0, 1), slice(1, 37)])
    again = loss_and_gradients(objective, torch.float32, **head)
    assert counters["stats"]["unique_graphs"] == 1  # a single token is left to the eager form
    monkeypatch.setattr(common, "compiled", lambda *_: None)
    eager = loss_and_gradients(objective, torch.float32, **head)
    exact = loss_and_gradients(objective, torch.float64, **head)
    for results in (compiled, again, eager):
        for ours, wanted in zip(results, exact, strict=True):
            error = (ours - wanted).abs().max() / wanted.abs().max()
            assert error < 5e-6, (ours, wanted)


def test_other_weights_of_cross_entropy_in_one_process(compiling):
    """A compiled graph keeps no number of the first ones."""
    draw = torch.Generator().manual_seed(0)
    logits = [torch.randn(16, 301, generator=draw) for _ in range(2)]
    form, targets = (common._distillation, Head(None), torch.float32), torch.arange(16)
    for weight in (0.5, 0.25, 0.75, 0.3):
        inputs = Objective("reverse", ce_weight=weight), targets
        results = [
            run(*form, [tensor.clone() for tensor in logits], inputs)
            for run in (common.compiled("cpu", 301), common.gradient_of_piece)
        ]
        torch.testing.assert_close(*results, msg=f"{weight}")


def test_small_vocabularies_stay_eager():
    """The embedded models' default runs are shorter than compiling takes."""
    assert common.compiled("cpu", common.COMPILED_FROM - 1) is None
    assert common.compiled("mps", 10**6) is None


def test_without_a_compiler_the_loss_is_eager(compiling, monkeypatch, capsys):
    """One line says so, once, and the numbers are the eager ones."""
    expected = loss_and_gradients(Objective(), torch.float64)

    def no_compiler(*_, **__):
        def fail(*_):
            raise RuntimeError("no g++\nhere")

        return fail

    common.compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", no_compiler)
    for _ in range(2):
        found = loss_and_gradients(Objective(), torch.float64)
        for ours, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, wanted)
    lines = [x for x in capsys.readouterr().out.splitlines() if "compiled" in x]
    assert len(lines) == 1 and "no g++" in lines[0]


ON_A_GPU = """
import emulated_cuda, torch, common
from common import Head, Logits, Objective

def products():
    found = {{(p["operator"], p["inputs"]) for p in emulated_cuda.log.report()["products"]}}
    emulated_cuda.log.reset()
    return found

def error(found, wanted):
    return float((found.cpu().double() - wanted).norm() / wanted.norm())

with emulated_cuda.device() as cuda:
    torch.manual_seed(0)
    n, size, width = 40, 301, 16
    weight = torch.nn.Parameter(torch.randn(330, width).to(cuda))  # rows beyond 301 are no tokens
    bias = torch.nn.Parameter(torch.randn(size).to(cuda))
    states = torch.randn(n, width)
    other = torch.randn(size, width).bfloat16()
    targets = torch.arange(n).to(cuda)
    optimizer = torch.optim.AdamW([weight, bias], lr=0.1, fused=True)

    def gradients(dtype, device, weight, bias):
        hidden = states.to(device, dtype).requires_grad_()
        student = Logits(hidden, Head(weight[:size], bias, 0.5, 4.0))
        there = torch.float64 if dtype == torch.float64 else torch.bfloat16
        theirs = states.bfloat16().to(device, there)
        teacher = Logits(theirs, Head(other.to(device, there)))
        objective = Objective("jsd", ce_weight=0.5)
        loss, _ = common.distillation_loss(student, targets.to(device), objective, teacher)
        return torch.autograd.grad(loss, [hidden, weight, bias])

    def exact():
        leaves = [t.detach().cpu().double().requires_grad_() for t in (weight, bias)]
        return gradients(torch.float64, "cpu", *leaves)

    {body}
"""


@pytest.fixture
def on_a_gpu(emulation: Emulation, tmp_path: Path) -> Callable[[str], None]:
    """Runs code on the emulated device."""

    def run(body: str) -> None:
        body = textwrap.indent(textwrap.dedent(body), "    ").strip()
        (tmp_path / "code.py").write_text(ON_A_GPU.format(body=body))
        done = emulation.run(tmp_path / "code.py", cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_products_of_an_odd_vocabulary(on_a_gpu):
    """301 tokens of 330 rows: products of 320 rows in bfloat16, gradients of the rest are zero.

    In float32 the gradients are exact, and nothing waits for the device either way.
    """
    on_a_gpu("""
    wanted = exact()
    for dtype, worst in ((torch.bfloat16, 1e-2), (torch.float32, 1e-5)):
        name = str(dtype).removeprefix("torch.")
        emulated_cuda.log.reset()
        found = gradients(dtype, cuda, weight, bias)
        assert not [s for s in emulated_cuda.log.report()["syncs"] if "common.py" in s["line"]]
        assert ("mm.dtype" if name == "bfloat16" else "mm", f"{name} x {name}") in products()
        errors = [error(*pair) for pair in zip(found, wanted)]
        print(name, errors)
        assert max(errors) < worst, (name, errors)
        assert not found[1][size:].any() and found[1].shape == weight.shape
    head = Head(weight[:size], bias).cast(torch.bfloat16)
    assert head.weight.shape == (320, width) and head.padding == 19
    assert head.logits(states.to(cuda, torch.bfloat16)).shape == (n, size)
    assert Head(weight[:size]).cast(torch.float32).weight.data_ptr() == weight.data_ptr()
    """)


def test_a_student_is_compared_with_a_server(on_a_gpu):
    """The log-probabilities that evaluation keeps on the CPU."""
    on_a_gpu("""
    ids = torch.arange(4).repeat(n, 1)
    teacher = common.TopLogprobs(ids, torch.full((n, 5), 0.2).log())
    values = common.compare(
        Logits(states.to(cuda), Head(weight[:size])), ids[:, 0].to(cuda), teacher
    )
    assert values["kl"].shape == (n,) and values["kl"].min() >= 0
    """)


def test_a_cast_is_made_once_a_step_and_never_stale(on_a_gpu):
    """By the optimizer, by loading, or by an update that hides its version, as FSDP's does."""
    on_a_gpu("""
    def cast():
        return Head(weight[:size]).cast(torch.bfloat16).weight

    def fresh():
        return cast()[:size].equal(weight[:size].bfloat16())

    first = cast()
    assert cast() is first and fresh()
    weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
    optimizer.step()
    assert cast() is not first and fresh()
    second = cast()
    with torch.no_grad():
        weight.copy_(torch.randn(330, width).to(cuda))
    assert cast() is not second and fresh()
    third = cast()
    weight.data.mul_(2)  # changes no version counter
    optimizer.step()
    assert cast() is not third and fresh()
    assert Head(weight[:size]).cast(torch.float16).weight.dtype == torch.float16 and fresh()
    """)


def test_head_dtype_reaches_the_students_head(on_a_gpu):
    """--head-dtype float32: no product of a head in bfloat16 but the teacher's."""
    for value, wanted in (("auto", "bfloat16"), ("float32", "float32")):
        on_a_gpu(f"""
        args = common.Flags(head_dtype="{value}")
        student, teacher = (common.open_model(args, cuda, role) for role in ("student", "teacher"))
        batch = common.collate([common.Tokens([1, 2, 3, 4], [2, 3])], cuda)
        student, teacher = student.logits(batch), teacher.logits(batch)
        assert student.hidden.dtype == torch.{wanted} and teacher.hidden.dtype == torch.bfloat16
        products()
        student.cast()[:]
        assert {{inputs for _, inputs in products()}} == {{"{wanted} x {wanted}"}}
        """)


def test_head_dtype_has_two_values(capsys):
    with pytest.raises(SystemExit) as stop:
        common.parse_arguments(common.Flags, "", ["--head-dtype", "float16"])
    assert stop.value.code == 2 and "--head-dtype" in capsys.readouterr().err
