"""cross_tokenizer.py: its losses against plain float64 forms, and runs as a user starts them."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_script, top_of, wait_for
from forked import ForkedScript, run_forked
from safetensors.torch import load_file
from test_alignment import SPECIAL, TEXTS, as_example, byte_level, example, wrapped
from torch import Tensor

import common
import cross_tokenizer
from common import Example, Head, LanguageModel, Pair
from cross_tokenizer import (
    BOUNDARY,
    END,
    LEFT_OUT,
    REMAINDER,
    UNMATCHED,
    Alignments,
    Context,
    CrossTokenizerLoss,
    Objective,
    Vocabulary,
)


@pytest.fixture(scope="module")
def coarse_and_fine() -> list[LanguageModel]:
    """Two tokenizers with different merges: not every token is a prefix of one of the other's."""
    return [
        wrapped(byte_level(size, [*SPECIAL, end], texts), False, end)
        for size, end, texts in (
            (600, "<done>", [*TEXTS, *["ab"] * 4, *["abc"] * 3]),
            (290, "<|im_end|>", [*["bc"] * 4, *["ab"] * 3, "the heory of 12 34 56 7 89"]),
        )
    ]


def random_side(model: LanguageModel, tokens: int, seed: int) -> tuple[Tensor, Head]:
    """Hidden states and a head with bias and softcap, whose logits make peaked distributions."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (tokens, 8), (model.vocabulary, 8), (model.vocabulary,)
    states, weight, bias = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes
    )
    return states, Head(weight, bias, 0.5, 4.0)


def value_and_gradients(
    hidden: Tensor, head: Head, alignments: Alignments, examples: list[Example],
    theirs: Tensor, teacher: Head,
) -> list[Tensor]:  # fmt: skip
    """Sums of loss and divergence, and the gradients of hidden states, weight and bias."""
    leaves = [t.clone().requires_grad_() for t in (hidden, head.weight, head.bias)]
    logits = common.Logits(leaves[0], Head(*leaves[1:], *head[2:]))
    student = SimpleNamespace(model=None, logits=lambda _: logits)
    pieces = alignments(examples)
    rows = [i for piece in pieces for i in range(len(hidden))[piece.rows]]
    assert rows == list(range(len(hidden)))  # every row in one piece
    ids = [e.student.ids[p] for e in examples for p in e.student.targets]
    batch = common.Batch(None, None, None, torch.tensor(ids, dtype=torch.long))
    loss, sums = CrossTokenizerLoss(student, teacher, alignments)(batch, theirs, pieces)
    loss.backward()
    assert sums[0] == loss
    return [sums, *(leaf.grad for leaf in leaves)]


def pieces_of(tokens: int) -> Callable[..., list[slice]]:
    """Replaces `common.chunks`: pieces of this many tokens."""
    return lambda n, *_: [slice(i, min(i + tokens, n)) for i in range(0, n, tokens)]


def xlogy_sum(target: dict[int, Tensor], dist: dict[int, Tensor]) -> Tensor:
    return sum(t * (t.log() - dist[k].log()) for k, t in target.items() if t > 0)


def begun_by(token: bytes, known: list[bytes]) -> bytes:
    """The longest of `known` that the token begins with, by looking at all of them."""
    if token.startswith(END):
        return token if token in known else b""
    return max((k for k in known if k and token.startswith(k)), key=len, default=b"")


def summed(probabilities: Tensor, names: list[object]) -> dict[object, Tensor]:
    found: dict[object, Tensor] = {}
    for name, p in zip(names, probabilities, strict=True):
        if name is not None:
            found[name] = found.get(name, 0) + p
    return found


def goes_on(spelled: list[bytes], other: list[bytes], w: bytes) -> list[bytes | None]:
    """The outcome of each token of a model that has read w: b"" is a stop, None not possible."""
    return [
        b"" if t == w else begun_by(t[len(w) :], other) or None if t.startswith(w) else None
        for t in spelled
    ]


Spelled = tuple[list[bytes], list[bytes]]


def sides_of(examples: list[Example]) -> tuple[list[common.Tokens], list[common.Tokens]]:
    return [e.student for e in examples], [e.teacher for e in examples]


def tokens_and_places(example: Example, spelled: Spelled) -> tuple[list, list]:
    pieces = [
        [side[t.ids[p]] for p in t.targets]
        for side, t in zip(spelled, (example.student, example.teacher), strict=True)
    ]
    return pieces, [[sum(map(len, p[:k])) for k in range(len(p))] for p in pieces]


def plain_prefixes(spelled: Spelled, starts: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The shared prefixes that no text contradicts, removed one at a time, in any order."""
    ours, theirs = (set(side) - {b""} for side in spelled)
    names = [t for t in ours if any(o.startswith(t) for o in theirs)]
    names += [t for t in theirs if any(o.startswith(t) for o in ours)]

    def wrong() -> bytes | None:
        for pair in starts:
            a, b = (begun_by(t, names) for t in pair)
            long = max(a, b, key=len)
            if a != b and long.startswith(min(a, b, key=len)) and long not in ours & theirs:
                return long
        return None

    while (name := wrong()) is not None:
        names = [n for n in names if n != name]
    return sorted(set(names))


def starts_of(examples: list[Example], spelled: Spelled) -> list[tuple[bytes, bytes]]:
    found = set()
    for pieces, begins in (tokens_and_places(e, spelled) for e in examples):
        sides = [dict(zip(b, p, strict=True)) for p, b in zip(pieces, begins, strict=True)]
        found |= {(sides[0][place], sides[1][place]) for place in set(sides[0]) & set(sides[1])}
    return sorted(found)


def plain_hybrid(
    ours: Tensor, theirs: Tensor, example: Example, spelled: Spelled, named: list[bytes],
    told: list[list[int]] | None = None,
) -> tuple[Tensor, set[int]]:  # fmt: skip
    """The script's docstring computed with dictionaries; and the student's tokens compared.

    With `told`, the ids that a server names at each of the teacher's positions, all outcomes that
    it does not name are b"".
    """

    def of_teacher(j: int, names: list[object]) -> dict[object, Tensor]:
        ids = range(len(names)) if told is None else told[j]
        return summed(theirs[j][ids], [names[i] for i in ids])

    def with_others(target: dict, dist: dict, j: int) -> tuple[dict, dict]:
        if told is None:
            return target, dist
        if len(told[j]) < len(theirs[j]):
            target = target | {b"": target.get(b"", 0) + 1 - theirs[j][told[j]].sum()}
        dist = summed(list(dist.values()), [n if n in target else b"" for n in dist])
        return {n: p for n, p in target.items() if n in dist}, dist

    pieces, begins = tokens_and_places(example, spelled)
    classes = [[begun_by(t, named) for t in side] for side in spelled]
    total, compared = torch.zeros((), dtype=torch.float64), set()
    for place in sorted({*begins[0], *begins[1]}):
        i, j = (max(k for k, b in enumerate(side) if b <= place) for side in begins)
        token, other = pieces[0][i], pieces[1][j]
        read, its = place - begins[0][i], place - begins[1][j]
        if not read and not its:
            if begun_by(token, named) == begun_by(other, named) != b"":
                dist = summed(ours[i], classes[0])
                target = {n: p for n, p in of_teacher(j, classes[1]).items() if n in dist}
                target, dist = with_others(target, dist, j)
                whole = sum(target.values())
                total = total + xlogy_sum({n: p / whole for n, p in target.items()}, dist)
                compared.add(i)
        elif its:
            names = goes_on(spelled[1], spelled[0], other[:its])
            if begun_by(other[its:], spelled[0]) == token:
                inside = of_teacher(j, names)
                whole = sum(inside.values())
                target = {name: p / whole for name, p in inside.items()}
                dist = summed(ours[i], [t if t in target and t else b"" for t in spelled[0]])
                total = total + xlogy_sum(target, dist)
                compared.add(i)
        else:
            names = goes_on(spelled[0], spelled[1], token[:read])
            if begun_by(token[read:], spelled[1]) == other:
                inside = summed(ours[i], names)
                whole = sum(inside.values())
                dist = {name: p / whole for name, p in inside.items()}
                target = of_teacher(j, [t if t in dist and t else b"" for t in spelled[1]])
                target = {name: p for name, p in target.items() if name in dist}
                target, dist = with_others(target, dist, j)
                whole = sum(target.values())
                total = total + xlogy_sum({n: p / whole for n, p in target.items()}, dist)
    return total, compared


@pytest.mark.parametrize("student_is", ["finer", "coarser"])
@pytest.mark.parametrize(
    ("temperature", "top_k"),
    [(0.7, None), (1.0, None), (3.0, None), (1.0, 2), (1.0, 30), (1.0, 600)],
)
def test_hybrid_is_its_definition(coarse_and_fine, student_is, temperature, top_k, monkeypatch):
    """Value and gradients, in pieces of 11 tokens, against autograd over whole arrays; also from a
    server's K log-probabilities, which with K = V are the whole distribution."""
    teacher, student = coarse_and_fine if student_is == "finer" else coarse_and_fine[::-1]
    texts = TEXTS[1], TEXTS[9], "abc 2024"
    examples = [example(student, teacher, text, i) for i, text in enumerate(texts)]
    objective = Objective("hybrid", 2, temperature, 0.25)
    alignments = Alignments(examples, Pair(student, teacher), objective)
    counts = [sum(len(side.targets) for side in sides) for sides in sides_of(examples)]
    hidden, head = random_side(student, counts[0], 0)
    theirs, teacher_head = random_side(teacher, counts[1], 1)
    monkeypatch.setattr(common, "chunks", pieces_of(11))
    whole = value_and_gradients(hidden, head, alignments, examples, theirs, teacher_head)
    found, told = whole, None
    if top_k:
        ids = torch.tensor([e.teacher.ids[p] for e in examples for p in e.teacher.targets])
        top = top_of(teacher_head.logits(theirs), ids, min(top_k, teacher.vocabulary))
        known = top.logprobs[:, :-1] > common.ABSENT
        told = [row[mask].tolist() for row, mask in zip(top.ids, known, strict=True)]
        monkeypatch.setattr(common, "teacher_logits", lambda *_: top)
        found = value_and_gradients(hidden, head, alignments, examples, theirs, None)

    leaves = [t.clone().requires_grad_() for t in (hidden, head.weight, head.bias)]
    plain = head._replace(weight=leaves[1], bias=leaves[2])
    ours, likely = (
        common.softmax_with_temperature(plain.logits(leaves[0]), t) for t in (temperature, 1.0)
    )
    taught = common.softmax_with_temperature(teacher_head.logits(theirs), temperature)
    divergence, rest, ce = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    n = m = inside = 0
    spelled = tuple(vocabulary.tokens for vocabulary in alignments.vocabularies)
    named = plain_prefixes(spelled, starts_of(examples, spelled))
    for e in examples:
        (ids, targets), its = e.student, len(e.teacher.targets)
        parts = ours[n : n + len(targets)], taught[m : m + its]
        value, compared = plain_hybrid(*parts, e, spelled, named, told and told[m : m + its])
        divergence = divergence + value
        for k, p in enumerate(targets):
            nats = -likely[n + k, ids[p]].log()
            ce = ce + nats
            rest = rest + (0 if k in compared else nats)
        n, m = n + len(targets), m + its
        contexts = alignments.pairs[e.index][:, 2]
        inside += int((contexts > BOUNDARY).sum())
        assert int((contexts == UNMATCHED).sum()) == len(targets) - len(compared)
    assert inside > 10 and rest > 0
    loss = temperature**2 * divergence + rest + 0.25 * ce
    loss.backward()
    torch.testing.assert_close(found[0], torch.stack([loss, divergence]).detach())
    for gradient, leaf in zip(found[1:], leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)
    assert found[0].allclose(whole[0]) == (top_k in (None, 600))


def test_shared_prefixes():
    """Against their definition, on random vocabularies and the starts of random texts."""
    draw = random.Random(0)
    contradicted = alone = 0
    for _ in range(300):
        vocabularies = tuple(
            [b"", b"a", b"b", *{bytes(draw.choices(b"ab", k=draw.randint(2, 5))) for _ in range(9)}]
            for _ in range(2)
        )
        starts = []
        for _ in range(draw.randint(0, 4)):
            text = bytes(draw.choices(b"ab", k=6))
            begun = ([t for t in side if t and text.startswith(t)] for side in vocabularies)
            starts.append(tuple(draw.choice(tokens) for tokens in begun))
        named = plain_prefixes(vocabularies, starts)
        found = cross_tokenizer.shared_prefixes(*vocabularies, set(starts))
        assert found == {b"", *named}
        contradicted += len(plain_prefixes(vocabularies, [])) - len(named)
        alone += sum(begun_by(a, named) != begun_by(b, named) for a, b in starts)
    assert contradicted > 50 and alone > 50


def test_phonemes_are_kept_apart():
    """` AH` and ` AY`, tokens of the embedded student alone, are not both mapped to ` A`.

    They were when only tokens of both vocabularies were shared, and the choice was never taught.
    """
    student, teacher = (
        wrapped(common.load_tokenizer(str(common.DATA / name), "main", None).backend_tokenizer,
                False, "<|end|>")
        for name in ("student_other_tokenizer", "teacher")
    )  # fmt: skip
    texts = ["K AH1 T", "K AY1 T", "B EH1 L EY0", "S IH1 T IY0", "UH0 OY1"]
    examples = [example(student, teacher, text, i) for i, text in enumerate(texts)]
    objective = Objective("hybrid", 2, 1.0, 0.0)
    alignments = Alignments(examples, Pair(student, teacher), objective)
    written = {e.student.ids[p] for e in examples for p in e.student.targets}
    (outcomes,) = alignments.outcomes([BOUNDARY], 0)
    mapped = outcomes[sorted(written)].tolist()
    assert len(set(mapped)) == len(written) and not {LEFT_OUT, REMAINDER} & set(mapped)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 3.0])
def test_uld_is_its_definition(coarse_and_fine, temperature, monkeypatch):
    student, teacher = coarse_and_fine
    examples = [example(student, teacher, text, i) for i, text in enumerate(TEXTS[1:4])]
    top_k, ce_weight = 5, 0.5
    objective = Objective("uld", top_k, temperature, ce_weight)
    alignments = Alignments(examples, Pair(student, teacher), objective)
    counts = [sum(len(side.targets) for side in sides) for sides in sides_of(examples)]
    hidden, head = random_side(student, counts[0], 0)
    theirs, teacher_head = random_side(teacher, counts[1], 1)
    monkeypatch.setattr(common, "chunks", pieces_of(7))
    found = value_and_gradients(hidden, head, alignments, examples, theirs, teacher_head)

    leaves = [t.clone().requires_grad_() for t in (hidden, head.weight, head.bias)]
    logits = head._replace(weight=leaves[1], bias=leaves[2]).logits(leaves[0])
    ours = (logits / temperature).softmax(-1)
    taught = (teacher_head.logits(theirs) / temperature).softmax(-1)
    divergence, ce, n, m = 0, 0, 0, 0
    for e in examples:
        begins = []
        sides = zip(alignments.vocabularies, (e.student, e.teacher), strict=True)
        for vocabulary, (ids, targets) in sides:
            lengths = [len(vocabulary.tokens[ids[p]]) for p in targets]
            begins.append([sum(lengths[:k]) for k in range(len(lengths))])
        for i, place in enumerate(begins[0]):
            j = min(range(len(begins[1])), key=lambda k: (abs(begins[1][k] - place), -k))
            q = ours[n + i].sort(descending=True).values[:top_k]
            p = taught[m + j].sort(descending=True).values[:top_k]
            p, q = p / p.sum(), q / q.sum()
            divergence = divergence + (p * (p / q).log()).sum()
            ids, targets = e.student
            ce = ce - logits[n + i].log_softmax(-1)[ids[targets[i]]]
        n, m = n + len(begins[0]), m + len(begins[1])
    loss = temperature**2 * divergence + ce_weight * ce
    loss.backward()
    torch.testing.assert_close(found[0], torch.stack([loss, divergence]).detach())
    for gradient, leaf in zip(found[1:], leaves, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_one_vocabulary_is_token_level(tiny, kind, temperature):
    """Same tokenizer on both sides: token_level's forward KL and its gradients, in float32."""
    student, teacher = pair = Pair(tiny(kind, 0), tiny("llama", 1))
    texts = ["N AA1 L AH0 JH", "K AO1 R T SH IH0 P", "the theory of it"]
    examples = []
    for i, text in enumerate(texts):
        parts = "<|user|>word<|end|><|assistant|>", text + "<|end|>"
        prompt, response = (common.tokenize(student.tokenizer, part)[0] for part in parts)
        ids = prompt + response
        tokens = common.Tokens(ids, list(range(len(prompt), len(ids))))
        examples.append(as_example(tokens, tokens, i))
    batch = common.collate([e.student for e in examples], torch.device("cpu"))
    theirs = common.teacher_hidden_states(teacher, examples)
    alignments = Alignments(examples, pair, Objective("hybrid", 2, temperature, 0.0))
    module = CrossTokenizerLoss(student, teacher.head(), alignments)
    results = []
    for crossing in (True, False):
        student.model.zero_grad()
        if crossing:
            loss, sums = module(batch, theirs, alignments(examples))
        else:
            objective = common.Objective(temperature=temperature)
            loss, sums = common.distillation_loss(
                student.logits(batch), batch.targets, objective,
                common.Logits(theirs, teacher.head()),
            )  # fmt: skip
        loss.backward()
        gradients = [p.grad.clone() for p in student.model.parameters() if p.grad is not None]
        results.append([loss.detach(), sums, *gradients])
    per_token = [r[0].item() / len(batch.targets) for r in results]
    assert per_token[0] == pytest.approx(per_token[1], abs=1e-6)
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def context_kl(
    theirs: Tensor, ours: Tensor, context: Context, vocabularies: list[Vocabulary]
) -> Tensor:
    """KL(teacher ‖ student) over a context's outcomes, from whole distributions (V,) of tokens."""
    sums = []
    for side, p in enumerate((ours, theirs)):
        outcomes = [
            context.outcomes[side].get(token, context.default[side])
            for token in vocabularies[side].tokens
        ]
        sums.append(
            cross_tokenizer.sum_by_outcome(p[None], torch.tensor([outcomes]), context.count)
        )
    return cross_tokenizer.kl(sums[1], sums[0])


def test_chain_rule():
    """A student that splits the teacher's tokens: both cases add up to the KL of whole tokens.

    The teacher has the tokens A, A0, A1 and B, the student A, 0, 1 and B. The KL over the teacher's
    tokens, with the student's probability of the same text, equals the KL where both begin a token
    plus the teacher's probability of A, A0 or A1 times the KL after A has been read.
    """
    vocabularies = [Vocabulary([b"A", b"0", b"1", b"B"]), Vocabulary([b"A", b"A0", b"A1", b"B"])]
    generator = torch.Generator().manual_seed(0)
    first, after = torch.rand(2, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    teacher = torch.tensor([0.1, 0.3, 0.2, 0.4], dtype=torch.float64)
    prefixes = cross_tokenizer.shared_prefixes(*(v.ids for v in vocabularies), set())
    assert prefixes == {b"", b"A", b"B"}
    boundary = cross_tokenizer.boundary_context(*vocabularies, prefixes)
    inside = cross_tokenizer.inside_context(*vocabularies, (b"", b"A"))
    both_begin = context_kl(teacher, first.exp(), boundary, vocabularies)
    going_on = context_kl(teacher, after.exp(), inside, vocabularies)
    begins_with_a = teacher[:3].sum()
    stop = 1 - after[1].exp() - after[2].exp()
    ours = [first[0].exp() * stop, *(first[0] + after[1:3]).exp(), first[3].exp()]
    whole = (teacher * (teacher / torch.stack(ours)).log()).sum()
    torch.testing.assert_close(both_begin + begins_with_a * going_on, whole)


def test_zeros_and_empty_batches(coarse_and_fine):
    """Probabilities that underflow give finite gradients; a batch of no examples has loss 0."""
    student, teacher = coarse_and_fine
    e = example(student, teacher, TEXTS[0])
    for loss in ("hybrid", "uld"):
        alignments = Alignments([e], Pair(student, teacher), Objective(loss, 4, 1.0, 0.0))
        counts = len(e.student.targets), len(e.teacher.targets)
        hidden, head = random_side(student, counts[0], 0)
        theirs, teacher_head = random_side(teacher, counts[1], 1)
        sharp = head._replace(scale=500.0, softcap=None)
        both = (hidden.float(), sharp._replace(weight=head.weight.float(), bias=head.bias.float()))
        found = value_and_gradients(*both, alignments, [e], theirs.float(), teacher_head)
        assert all(t.isfinite().all() for t in found) and found[0][1] > 1
        empty = value_and_gradients(hidden[:0], head, alignments, [], theirs[:0], teacher_head)
        assert not any(t.any() for t in empty)


def test_examples_without_a_side(coarse_and_fine):
    """A long prompt left no target on one side: the loss is cross-entropy alone, or nothing."""
    student, teacher = coarse_and_fine
    whole = example(student, teacher, TEXTS[0])
    cut = [common.Tokens(side.ids[:4], []) for side in (whole.student, whole.teacher)]
    bare = dataclasses.replace(whole, index=1, teacher=cut[1])
    silent = dataclasses.replace(whole, index=2, student=cut[0])
    for loss in ("hybrid", "uld"):
        examples = [bare, whole, silent]
        objective = Objective(loss, 4, 1.0, 1.0)
        alignments = Alignments(examples, Pair(student, teacher), objective)
        count = len(whole.student.targets)
        hidden, head = random_side(student, 2 * count, 0)
        theirs, teacher_head = random_side(teacher, 2 * len(whole.teacher.targets), 1)
        given = (theirs, teacher_head)
        together = value_and_gradients(hidden, head, alignments, examples, *given)[0]
        alone = value_and_gradients(hidden[count:], head, alignments, [whole], *given)[0]
        likely = head.logits(hidden[:count]).log_softmax(-1)
        ids = torch.tensor([whole.student.ids[p] for p in whole.student.targets])
        ce = -likely.gather(1, ids[:, None]).sum()
        torch.testing.assert_close(together[0], alone[0] + (2 if loss == "hybrid" else 1) * ce)


# ------------------------------------------------------------------------------- the whole script


SMALL = ("--max-rows", "2560", "--epochs", "2", "--eval-size", "200", "--eval-steps", "0")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cross_tokenizer")


def read(run: Path) -> tuple[dict, list[dict]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads((run / "results.json").read_text()), [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def hybrid(workplace, shared_cache) -> tuple[Path, str]:
    done = run_script("cross_tokenizer.py", *SMALL, "--cache-dir", shared_cache, cwd=workplace)
    assert done.returncode == 0, done.stderr
    name = "cross_tokenizer-max-rows-2560-eval-size-200-epochs-2.0"
    return workplace / "runs" / name, done.stdout


def test_student_learns_on_held_out_words(hybrid):
    """80 steps with a teacher that has another tokenizer."""
    results, lines = read(hybrid[0])
    before, after = results["before"], results["after"]
    assert after["error_rate"] < before["error_rate"]
    assert after["bits_per_byte"] < 0.8 * before["bits_per_byte"]
    assert after["cut_off"] == 0
    assert "kl_to_teacher" not in after and "top1_agreement" not in results["gap_recovered"]
    steps = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 81))
    assert all(s["train/loss"] == pytest.approx(s["train/kl"]) for s in steps)  # all are compared
    kl = [s["train/kl"] for s in steps]
    assert sum(kl[-10:]) < 0.8 * sum(kl[:10])


def test_alignment_is_reported(hybrid):
    """Numbers in results.json are those of the embedded tokenizers, and an example is shown."""
    results, _ = read(hybrid[0])
    numbers = results["alignment"]
    ours, theirs = (
        set(common.load_tokenizer(str(common.DATA / name), "main", None).get_vocab())
        for name in ("student_other_tokenizer", "teacher")
    )
    shared = {t for t in ours & theirs if not t.startswith("<|")}
    plain = [t for t in ours if not t.startswith("<|")]
    assert numbers["vocabulary_overlap"] == pytest.approx(len(shared) / len(plain))
    assert numbers["compared_tokens"] == 1  # the student only splits the teacher's tokens
    assert numbers["teacher_tokens_per_span"] == 1
    assert numbers["student_tokens_per_span"] == pytest.approx(1 / numbers["aligned_tokens"])
    rows = [
        line for line in hybrid[1].splitlines() if line.startswith(("  student ", "  teacher "))
    ]
    assert len(rows) == 2 and all(row.endswith("<end>") for row in rows)
    assert rows[0].replace("|", "").replace(" ", "") == rows[1].replace(" ", "").replace(
        "teacher", "student"
    )


def test_uld_with_cross_entropy(workplace, hybrid, shared_cache):
    """It reads the teacher's text and hidden states from the cache; cross-entropy has weight 1."""
    cache = sorted(shared_cache.rglob("*.*"))
    sizes = [p.stat().st_size for p in cache]
    flags = ("--loss", "uld", "--max-steps", "25", "--warmup-steps", "5")
    flags += ("--learning-rate", "2e-3", "--output-dir", "runs/uld", "--cache-dir", shared_cache)
    done = run_forked("cross_tokenizer.py", *SMALL, *flags, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert [p.stat().st_size for p in cache] == sizes
    results, lines = read(workplace / "runs" / "uld")
    steps = [line for line in lines if "train/loss" in line]
    ce = [s["train/loss"] - s["train/kl"] for s in steps]
    # The first step measures the untrained student, whose cross-entropy on held-out text is known.
    assert ce[0] == pytest.approx(results["before"]["nats_per_token"], rel=0.25)
    assert results["after"]["bits_per_byte"] < results["before"]["bits_per_byte"]


def test_killed_and_resumed(shared_cache, tmp_path):
    """kill -9 between two checkpoints, then --resume: the weights of an uninterrupted run."""
    flags = [
        "--max-rows", "64", "--batch-size", "8", "--max-steps", "24", "--save-steps", "8",
        "--eval-size", "8", "--eval-steps", "0", "--logging-steps", "1",
        "--cache-dir", shared_cache,
    ]  # fmt: skip
    done = run_forked("cross_tokenizer.py", *flags, "--output-dir", "whole", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cut = [*flags, "--output-dir", "cut"]
    process = ForkedScript("cross_tokenizer.py", cut, tmp_path, tmp_path / "out.txt")
    assert wait_for(process, (tmp_path / "cut/checkpoints/step-000008/state.json").exists)
    process.kill()
    process.wait()
    assert not (tmp_path / "cut" / "results.json").exists()
    done = run_forked("cross_tokenizer.py", *cut, "--resume", cwd=tmp_path)
    assert done.returncode == 0 and "resumed from" in done.stdout, done.stderr
    ours, theirs = (
        load_file(tmp_path / run / "final" / "model.safetensors") for run in ("cut", "whole")
    )
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    steps = [[x["train/loss"] for x in read(tmp_path / r)[1] if "train/loss" in x]
             for r in ("cut", "whole")]  # fmt: skip
    assert steps[0] == steps[1] and len(steps[0]) == 24


def test_top_k_must_fit(workplace):
    flags = "--loss", "uld", "--top-k", "401"
    done = run_forked("cross_tokenizer.py", *flags, cwd=workplace)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--top-k 401 must be from 2 to 400" in done.stderr
    assert "student_other_tokenizer" in done.stderr and done.stderr.count("\n") == 1
    sides = [SimpleNamespace(vocabulary=size, name=f"model {size}") for size in (400, 300)]
    pair = SimpleNamespace(readers=sides)
    for top_k, fits in ((1, False), (2, True), (300, True), (301, False)):
        args = cross_tokenizer.Arguments(loss="uld", top_k=top_k)
        if fits:
            assert args.objective(pair) == Objective("uld", top_k, 1.0, 1.0)
        else:
            with pytest.raises(common.UsageError, match=f"{top_k} must .* 300, the .* model 300"):
                args.objective(pair)
