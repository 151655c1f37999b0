"""Cross-tokenizer distillation: the student's vocabulary differs from its teacher's.

Two tokenizers split the same text into different tokens, and the two models give probabilities to
different sets of tokens. So a divergence between them is not defined token by token.

--loss hybrid (the default) compares the models at every place of the text where a token of either
begins, because there both have read the same bytes. It maps the tokens of both vocabularies to
common outcomes, and takes the KL between the two distributions over the outcomes. Three cases:

    both begin a token     Each token is mapped to its longest prefix in a shared set: all tokens of
                           either vocabulary that are equal to, or a prefix of, a token of the
                           other, unless the training text contradicts this (`shared_prefixes`).
    one is inside a token  It has read the first bytes r of that token. Its distribution is
                           restricted to the tokens that begin with r, and renormalised. Each of
                           these is mapped to the longest token of the other model with which the
                           bytes after r begin, and the token r itself to "stop". The other model's
                           tokens that are no such outcome are mapped to "stop" too.
    the outcomes differ    The two tokens in the text are mapped to different outcomes, so the two
                           distributions do not describe this text and are not compared. If the
                           student begins a token here, it learns this token by cross-entropy.

    loss = ( T² · Σ KL + Σ_(third case) CE ) / N  +  w · CE

over the N target tokens of the student in a batch. KL is KL(teacher ‖ student), T is --temperature,
w is --ce-weight. If one tokenizer only ever splits tokens of the other, then by the chain rule the
first two cases add up to the KL between distributions over whole tokens. With one vocabulary only
the first case occurs, and the loss is token_level.py's forward KL, but that all end tokens count as
one. A server (--api-base-url) names the teacher's most likely tokens; all outcomes that it does not
name become one with "stop".

--loss uld is KL(teacher ‖ student) at temperature T between the K highest probabilities of both
models, each list sorted and renormalised. A token of the student is compared with the teacher's
token that begins nearest in the text. Sorting discards token identity, so w = 1 by default.

Boizard et al. 2024, "Towards cross-tokenizer distillation: the universal logit distillation loss"
(uld; departures: KL of the top K instead of the L1 distance of whole sorted vocabularies; tokens
matched by their place in the text instead of their index). Minixhofer et al. 2025, "Cross-tokenizer
distillation via approximate likelihood matching" (spans of equal text; hybrid conditions a model
that is inside a token instead of comparing likelihoods of spans).

    python cross_tokenizer.py
    python cross_tokenizer.py --loss uld --ce-weight 0.5
"""

from __future__ import annotations

import bisect
import itertools
import json
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

import common
from common import Batch, Example, Flags, Head, LanguageModel, Pair, TopLogprobs, flag
from common import softmax_with_temperature as softmax


@dataclass
class Arguments(Flags):
    two_tokenizers: ClassVar[bool] = True
    student: str = flag(
        str(common.DATA / "student_other_tokenizer"), "student model: a directory or a hub id"
    )
    learning_rate: float = flag(3e-3, "peak of the schedule (linear warm-up, cosine to zero)")
    loss: Literal["hybrid", "uld"] = flag(
        "hybrid", "hybrid: KL over outcomes that both models share; uld: sorted top probabilities"
    )
    top_k: int = flag(32, "how many probabilities of each model uld compares")
    ce_weight: float | None = flag(
        None, "weight of cross-entropy on the text's own tokens (default: 1 with uld, else 0)"
    )

    def objective(self, pair: Pair) -> Objective:
        """The loss and its weights; `UsageError` if --top-k does not fit the vocabularies."""
        if self.api_base_url and (self.loss, self.temperature) != ("hybrid", 1):
            raise common.UsageError("--api-base-url needs --loss hybrid and --temperature 1")
        smallest = min(pair.readers, key=lambda model: model.vocabulary)
        if self.loss == "uld" and not 2 <= self.top_k <= smallest.vocabulary:
            limits = f"from 2 to {smallest.vocabulary}, the vocabulary of {smallest.name}"
            raise common.UsageError(f"--top-k {self.top_k} must be {limits}")
        if self.loss != "uld" and "top_k" in common.changed_flags(self):
            raise common.UsageError("--top-k applies to --loss uld")
        weight = float(self.loss == "uld") if self.ce_weight is None else self.ce_weight
        return Objective(self.loss, self.top_k, self.temperature, weight)


class Objective(NamedTuple):
    """What is minimised; the module's docstring has the formula."""

    loss: str  # hybrid | uld
    top_k: int
    temperature: float
    ce_weight: float


# ----------------------------------------------------------------------------- tokens as bytes

# A special token is written as these bytes and its name, an end-of-turn token as these bytes alone,
# so that the end tokens of both models are equal. No UTF-8 text contains them.
END = b"\xff\xff"


def token_bytes(model: LanguageModel) -> list[bytes]:
    """The bytes of text that each token id stands for; b"" for ids without a token.

    Supports byte-level tokenizers (GPT-2), SentencePiece (▁ for a space) and tokenizers that join
    their tokens unchanged; raises `UsageError` for others.
    """
    tokenizer = model.tokenizer
    decoder = tokenizer.backend_tokenizer.decoder
    config = {"type": "nothing"} if decoder is None else json.loads(decoder.__getstate__())
    steps = {step["type"] for step in config.get("decoders", [config])}
    byte_level = "ByteLevel" in steps
    if not byte_level and not steps & {"ByteFallback", "Metaspace"} and steps != {"Fuse"}:
        raise common.UsageError(
            f"{model.name}: its tokenizer decodes by {', '.join(sorted(steps))}, which does not "
            "tell the bytes that a token stands for: use sequence_level.py"
        )
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    space = " " if byte_level or steps == {"Fuse"} else "▁"

    def as_bytes(token: str) -> bytes:
        if byte_level and all(c in byte_of for c in token):
            return bytes(byte_of[c] for c in token)
        if "ByteFallback" in steps and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return token.replace(space, " ").encode()

    result = [b""] * (max(tokenizer.get_vocab().values()) + 1)
    for token, i in tokenizer.get_vocab().items():
        result[i] = as_bytes(token)
    for i, added in tokenizer.added_tokens_decoder.items():
        text = added.content.encode()
        result[i] = END + text if added.special else text.replace(space.encode(), b" ")
    for i in (i for i in model.end_ids if i < len(result)):
        result[i] = END
    return result[: model.vocabulary]


class Vocabulary:
    """A model's tokens as bytes."""

    def __init__(self, tokens: list[bytes]) -> None:
        """`tokens` is the result of `token_bytes`; several ids may stand for the same bytes."""
        self.tokens = tokens
        self.ids: dict[bytes, list[int]] = {}
        for i, token in enumerate(tokens):
            self.ids.setdefault(token, []).append(i)
        self.ordered = sorted(self.ids)

    def beginning_with(self, prefix: bytes) -> list[bytes]:
        """All tokens that begin with `prefix`."""
        first = bisect.bisect_left(self.ordered, prefix)
        last = bisect.bisect_left(self.ordered, prefix + 2 * END)  # sorts after all of them
        return self.ordered[first:last]


def longest_prefix(token: bytes, known: Container[bytes]) -> bytes:
    """The longest element of `known` that `token` begins with, or b"". A special token has no
    prefix but itself."""
    if token.startswith(END):
        return token if token in known else b""
    return next((token[:n] for n in range(len(token), 0, -1) if token[:n] in known), b"")


# ----------------------------------------------------------------------------------- alignment


class Turn(NamedTuple):
    """One assistant turn of an example. Each tuple: the student's value, then the teacher's."""

    first: tuple[int, int]  # index of its first token among all targets of the example
    tokens: tuple[list[bytes], list[bytes]]
    begins: tuple[list[int], list[int]]  # byte offset of each token, and of the end of the text
    same: int  # how many leading bytes of the two texts are equal

    def pairs(self) -> list[tuple[int, int]]:
        """Indices of the student's and the teacher's token at every place where one of them begins.

        The index of a model that is inside a token stays. The pairs end where the texts differ.
        """
        (ours, theirs), pairs, i, j = self.begins, [], 0, 0
        while i + 1 < len(ours) and j + 1 < len(theirs) and max(ours[i], theirs[j]) <= self.same:
            pairs.append((i, j))
            student_end, teacher_end = ours[i + 1], theirs[j + 1]
            i += student_end <= teacher_end
            j += teacher_end <= student_end
        return pairs

    def boundaries(self) -> list[tuple[int, int]]:
        """The pairs where both models begin a token."""
        return [(i, j) for i, j in self.pairs() if self.begins[0][i] == self.begins[1][j]]

    def bytes_read(self, i: int, j: int) -> tuple[bytes, bytes]:
        """How much of each token precedes the place of this pair: b"" if the token begins there."""
        place, parts = max(self.begins[0][i], self.begins[1][j]), []
        for tokens, begins, k in zip(self.tokens, self.begins, (i, j), strict=True):
            # Counted from the end, because the text may lack the space that its first token has.
            read = len(tokens[k]) - (begins[k + 1] - place)
            parts.append(b"" if begins[k] == place else tokens[k][:read])
        return tuple(parts)

    def nearest(self) -> Iterator[tuple[int, int]]:
        """Each student token with the teacher's that begins nearest (of two the later)."""
        (*begins, end), j = self.begins[1], 0
        whole = any(token.startswith(END) for token in self.tokens[1][-1:])
        for i, start in enumerate(p for p in self.begins[0][:-1] if whole or p < end):
            while j + 1 < len(begins) and abs(begins[j + 1] - start) <= abs(begins[j] - start):
                j += 1
            yield i, j


def turns(example: Example, vocabularies: Sequence[Vocabulary]) -> Iterator[Turn]:
    """The assistant turns of an example, as far as both models have them."""
    sides, both = [], (example.student, example.teacher)
    for (ids, targets), vocabulary in zip(both, vocabularies, strict=True):
        runs = itertools.groupby(enumerate(targets), key=lambda target: target[1] - target[0])
        runs = [list(run) for _, run in runs]  # of consecutive positions
        sides.append([(run[0][0], [vocabulary.tokens[ids[p]] for _, p in run]) for run in runs])
    for turn in zip(*sides, strict=False):  # one model's text may have been cut earlier
        first, tokens = zip(*turn, strict=True)
        texts = [b"".join(side) for side in tokens]
        # SentencePiece and some templates put a space before the text, or a prompt ends inside its
        # first token. The offsets skip a beginning that only one text has.
        begin, short = [len(text) - len(text.lstrip(b" ")) for text in texts], min(texts, key=len)
        if short.endswith(END) and all(text.endswith(short) for text in texts):  # none was cut
            begin = [len(text) for text in texts]
        extra = [n - min(begin) for n in begin]
        begins = tuple(
            [max(0, offset) for offset in itertools.accumulate(map(len, side), initial=-n)]
            for side, n in zip(tokens, extra, strict=True)
        )
        texts = [text[n:] for text, n in zip(texts, extra, strict=True)]
        differences = (n for n, (x, y) in enumerate(zip(*texts, strict=False)) if x != y)
        same = next(differences, min(map(len, texts)))
        yield Turn(first, tokens, begins, same)


# ------------------------------------------------------------------------------------ outcomes

# Outcomes are numbers. Those from 2 on stand for bytes that tokens of both models are mapped to.
LEFT_OUT = 0  # removed from the distribution, which is renormalised
REMAINDER = 1  # no shared prefix, or "stop"


class Context(NamedTuple):
    """The outcomes of all tokens, given the bytes that each model has read of its current token.

    Each tuple: the student's value, then the teacher's.
    """

    outcomes: tuple[dict[bytes, int], dict[bytes, int]]  # by token
    default: tuple[int, int]  # the outcome of the tokens that are not in `outcomes`
    count: int  # outcomes are below this number

    def agrees(self, student_token: bytes, teacher_token: bytes) -> bool:
        """Whether both tokens are mapped to the same bytes."""
        outcome = self.outcomes[0].get(student_token, self.default[0])
        return outcome == self.outcomes[1].get(teacher_token, self.default[1]) > REMAINDER


def shared_prefixes(
    student: Iterable[bytes], teacher: Iterable[bytes], boundaries: set[tuple[bytes, bytes]]
) -> set[bytes]:
    """The set that tokens are mapped to where both models begin one; it contains b"".

    It holds the tokens of either vocabulary that are equal to, or a prefix of, a token of the
    other. `boundaries` are the pairs of a student's and a teacher's token that begin at the same
    place of the training text. If two such tokens are mapped to different elements of which one is
    a prefix of the other, the longer one is removed, unless it is a token of both vocabularies.
    Then both tokens are mapped to the shorter one.
    """
    student, teacher = set(student), set(teacher)
    beginnings = [
        {token[:n] for token in tokens for n in range(1, len(token) + 1)}
        for tokens in (student, teacher)
    ]
    prefixes = {b""} | student & beginnings[1] | teacher & beginnings[0]
    size, both = None, student & teacher
    while size != len(prefixes):  # the next shorter prefix of a token may be contradicted too
        size = len(prefixes)
        for tokens in boundaries:
            short, long = sorted((longest_prefix(t, prefixes) for t in tokens), key=len)
            if short != long and long.startswith(short):
                prefixes -= {long} - both
    return prefixes


def boundary_context(student: Vocabulary, teacher: Vocabulary, prefixes: set[bytes]) -> Context:
    """Both models begin a token, whose outcome is its longest prefix in `shared_prefixes`.

    Outcomes that the student has no token for are left out of the teacher's distribution.
    """
    numbers = {prefix: n for n, prefix in enumerate(sorted(prefixes), REMAINDER)}  # b"" is first
    ours = {token: numbers[longest_prefix(token, prefixes)] for token in student.ids}
    theirs = {token: numbers[longest_prefix(token, prefixes)] for token in teacher.ids}
    possible = set(ours.values())
    theirs = {token: n if n in possible else LEFT_OUT for token, n in theirs.items()}
    return Context((ours, theirs), (LEFT_OUT, LEFT_OUT), len(prefixes) + REMAINDER)


def inside_context(
    student: Vocabulary, teacher: Vocabulary, bytes_read: tuple[bytes, bytes]
) -> Context:
    """One model has read some bytes of its token; the outcomes are the other model's tokens."""
    inside = int(not bytes_read[0])  # 0: the student is inside a token, 1: the teacher
    read = bytes_read[inside]
    model, beginning = (student, teacher) if inside == 0 else (teacher, student)
    named: dict[bytes, int] = {}  # outcomes of the tokens of `beginning`
    continued: dict[bytes, int] = {}  # of `model`
    for token in model.beginning_with(read):
        if token == read:
            continued[token] = REMAINDER
        elif match := longest_prefix(token[len(read) :], beginning.ids):
            continued[token] = named.setdefault(match, len(named) + REMAINDER + 1)
    count = len(named) + REMAINDER + 1
    if inside == 1:
        return Context((named, continued), (REMAINDER, LEFT_OUT), count)
    stop = REMAINDER if read in student.ids else LEFT_OUT  # left out if the student cannot stop
    return Context((continued, named), (LEFT_OUT, stop), count)


# ---------------------------------------------------------------------- what a batch compares

# Contexts are numbers in `Alignments.pairs`. Those from 1 on come from `inside_context`.
BOUNDARY = 0  # `boundary_context`
UNMATCHED = -1  # nothing to compare: the student learns the token by cross-entropy


@dataclass
class Piece:
    """A part of a batch whose logits exist at one time. Not a NamedTuple, because DDP would move
    its tensors to the GPU."""

    rows: slice  # of the student's hidden states
    teacher_rows: slice  # of the teacher's
    pairs: Tensor  # (P, 3) on the CPU: row of the student, row of the teacher, context


class Alignments:
    """Which distributions of the two models are compared, computed once for every example."""

    def __init__(self, examples: Sequence[Example], pair: Pair, objective: Objective) -> None:
        """Align the examples; raises `UsageError` if no two tokens can be compared."""
        self.objective, self.device = objective, pair.student.device
        self.vocabularies = [Vocabulary(token_bytes(model)) for model in pair.readers]
        boundaries = {
            (turn.tokens[0][i], turn.tokens[1][j])
            for example in examples
            for turn in turns(example, self.vocabularies)
            for i, j in turn.boundaries()
        }
        prefixes = shared_prefixes(*(v.ids for v in self.vocabularies), boundaries)
        self.contexts = [boundary_context(*self.vocabularies, prefixes)]
        self.numbers = {(b"", b""): BOUNDARY}  # of contexts, by the bytes read
        self.totals: Counter[str] = Counter()
        bar = common.progress("aligning", items=examples)
        self.pairs = {example.index: self._align(example) for example in bar}
        if not self.totals["compared"]:
            raise common.UsageError(
                f"no token of {pair.student.name} can be compared with one of "
                f"{pair.readers[1].name}: their tokenizers do not give the same text back"
            )
        self.tables = [[self._table(c, side) for side in (0, 1)] for c in self.contexts]

    def _align(self, example: Example) -> Tensor:
        """(P, 3): index of the student's target, index of the teacher's target, context."""
        uld, pairs, compared = self.objective.loss == "uld", [], set()
        for turn in turns(example, self.vocabularies):
            self.totals["boundaries"] += len({turn.begins[0][i] for i, _ in turn.boundaries()})
            for i, j in turn.nearest() if uld else turn.pairs():
                bytes_read = (b"", b"") if uld else turn.bytes_read(i, j)
                if bytes_read not in self.numbers:
                    self.numbers[bytes_read] = len(self.contexts)
                    self.contexts.append(inside_context(*self.vocabularies, bytes_read))
                context = self.numbers[bytes_read]
                if uld or self.contexts[context].agrees(turn.tokens[0][i], turn.tokens[1][j]):
                    pairs.append((turn.first[0] + i, turn.first[1] + j, context))
                    if not bytes_read[0]:
                        compared.add(turn.first[0] + i)
        count = len(example.student.targets)
        pairs += [(i, 0, UNMATCHED) for i in range(count) if not uld and i not in compared]
        self.totals["compared"] += len(compared)
        self.totals["student"] += count
        self.totals["teacher"] += len(example.teacher.targets)
        return torch.tensor(pairs, dtype=torch.int32).view(-1, 3)

    def __call__(self, examples: Sequence[Example]) -> list[Piece]:
        """The pieces of a batch of these examples; their rows cover all its targets in order."""
        counts = [(len(e.student.targets), len(e.teacher.targets), 0) for e in examples]
        starts = torch.tensor([(0, 0, 0), *counts]).cumsum(0)  # (B + 1, 3)
        parts = [self.pairs[e.index] + start for e, start in zip(examples, starts, strict=False)]
        pairs = torch.cat([starts[:0], *parts])  # (P, 3)
        n, m, _ = starts[-1].tolist()
        student_size, teacher_size = (len(v.tokens) for v in self.vocabularies)
        widest = max(student_size, teacher_size * m // max(1, n))
        # Four times, because autograd keeps several arrays.
        return [self._piece(pairs, rows) for rows in common.chunks(n, 4 * widest, self.device)]

    def _piece(self, pairs: Tensor, rows: slice) -> Piece:
        pairs = pairs[(pairs[:, 0] >= rows.start) & (pairs[:, 0] < rows.stop)]
        teacher = pairs[pairs[:, 2] != UNMATCHED, 1].tolist()
        teacher_rows = slice(min(teacher, default=0), max(teacher, default=-1) + 1)
        return Piece(rows, teacher_rows, pairs - torch.tensor([rows.start, teacher_rows.start, 0]))

    def _table(self, context: Context, side: int) -> Tensor:
        """The outcomes of a model in a context: token ids and outcomes (2, n)."""
        ids = self.vocabularies[side].ids
        entries = [(i, n) for token, n in context.outcomes[side].items() for i in ids[token]]
        return torch.tensor(entries, dtype=torch.long, device=self.device).view(-1, 2).t()

    def outcomes(self, contexts: list[int], side: int, named: Tensor | None = None) -> Tensor:
        """The outcomes of all tokens of the student (side 0) or teacher in P contexts: (P, V). With
        ids `named` (P, K + 1) by a server: those of these and of all other tokens (P, K + 2)."""
        rows = contexts if any(contexts) else [BOUNDARY]  # one row, expanded below
        default = torch.tensor([[self.contexts[c].default[side]] for c in rows])
        size = len(self.vocabularies[side].tokens)
        result = common.to_device(default, self.device).expand(-1, size).contiguous()
        tables = [self.tables[c][side] for c in rows]
        lengths = torch.tensor([table.shape[1] for table in tables])
        ids, outcomes = torch.cat(tables, 1)
        result[common.to_device(torch.repeat_interleave(lengths), self.device), ids] = outcomes
        result = result.expand(len(contexts), -1)
        if named is None:
            return result
        # If the teacher is inside a token: hardly any other token begins with what it has read.
        read = torch.tensor([self.contexts[c].default[0] for c in contexts]) == REMAINDER
        others = common.to_device(torch.where(read, LEFT_OUT, REMAINDER)[:, None], self.device)
        return torch.cat([result.gather(1, named), others], 1)

    def report(self) -> dict[str, float]:
        """How well the two vocabularies and the texts match."""
        words = [t for t in self.vocabularies[0].tokens if t and not t.startswith(END)]
        shared = sum(t in self.vocabularies[1].ids for t in words)
        return {
            "vocabulary_overlap": shared / len(words),
            "aligned_tokens": self.totals["boundaries"] / self.totals["student"],
            "compared_tokens": self.totals["compared"] / self.totals["student"],
            "student_tokens_per_span": self.totals["student"] / self.totals["boundaries"],
            "teacher_tokens_per_span": self.totals["teacher"] / self.totals["boundaries"],
        }

    def summary(self, example: Example, width: int = 100) -> str:
        """The example's last turn, the student's tokens above the teacher's; then `report`."""
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in self.report().items())
        *_, turn = [None, *turns(example, self.vocabularies)]
        if turn is None:
            return f"  (an empty response)\nalignment: {numbers}"
        starts, lines = turn.boundaries(), ["  student ", "  teacher "]
        stops = [*starts[1:], tuple(map(len, turn.tokens))]
        for span in zip(starts, stops, strict=True):
            sides = zip(turn.tokens, *span, strict=True)
            cells = ["|".join(map(printable, tokens[a:b])) for tokens, a, b in sides]
            size = max(map(len, cells))
            if len(lines[0]) + size + 3 > width:
                break
            lines = [f"{line}{cell:{size}} ¦ " for line, cell in zip(lines, cells, strict=True)]
        return "\n".join([*(line.rstrip(" ¦") for line in lines), f"alignment: {numbers}"])


def printable(token: bytes) -> str:
    if token.startswith(END):
        return token[len(END) :].decode() or "<end>"
    return repr(token.decode(errors="replace").replace(" ", "␣"))[1:-1]


# ---------------------------------------------------------------------------------------- loss


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ KL(teacher ‖ student) in nats over the rows of two (P, K) arrays, each row renormalised."""
    floor = torch.finfo(torch.float32).tiny ** 0.5  # 1e-19: no gradient overflows
    teacher, student = (p / p.sum(-1, keepdim=True).clamp_min(floor) for p in (teacher, student))
    return torch.sum(teacher * ((teacher + floor).log() - (student + floor).log()))


def sum_by_outcome(probabilities: Tensor, outcomes: Tensor, count: int) -> Tensor:
    """Sum probabilities (P, V) of tokens to (P, count - 1) of outcomes, without `LEFT_OUT`."""
    sums = probabilities.new_zeros(len(probabilities), count)
    return sums.scatter_add(1, outcomes, probabilities)[:, LEFT_OUT + 1 :]


def fold(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Move the student's probability of outcomes that a server did not name to `REMAINDER`, the
    first of (P, K). If that is 0, the student lacks the outcome, and the teacher's is set to 0."""
    named = teacher > 0
    others = student[:, :1] + (student * ~named)[:, 1:].sum(-1, keepdim=True)
    student = torch.cat([others, (student * named)[:, 1:]], 1)
    return student, torch.cat([teacher[:, :1] * (others > 0), teacher[:, 1:]], 1)


def piece_loss(
    logits: Tensor, teacher_logits: Tensor | TopLogprobs, targets: Tensor, pairs: Tensor,
    alignments: Alignments,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The objective summed over a piece, and the divergence in it without T². `logits` (n, V) and
    `targets` (n,) are of the student's rows, `teacher_logits` (m, V') of the teacher's."""
    loss, top_k, t, ce_weight = alignments.objective
    ours, server = softmax(logits, t), isinstance(teacher_logits, TopLogprobs)
    theirs = teacher_logits.logprobs.exp() if server else softmax(teacher_logits, t)
    divergence = logits.new_zeros(())
    for group in (pairs[pairs[:, 2] == BOUNDARY], pairs[pairs[:, 2] > BOUNDARY]):
        rows = common.to_device(group[:, :2], logits.device)
        student, teacher = ours[rows[:, 0]], theirs[rows[:, 1]]  # (P, V), (P, V')
        if loss == "uld":
            student, teacher = (p.topk(top_k).values for p in (student, teacher))
        else:
            contexts = group[:, 2].tolist()
            count = max((alignments.contexts[c].count for c in contexts), default=1)
            student = sum_by_outcome(student, alignments.outcomes(contexts, 0), count)
            named = teacher_logits.ids[rows[:, 1]] if server else None
            teacher = sum_by_outcome(teacher, alignments.outcomes(contexts, 1, named), count)
            if server:
                student, teacher = fold(student, teacher)
        divergence = divergence + kl(teacher, student)
    total = t**2 * divergence
    unmatched = pairs[pairs[:, 2] == UNMATCHED, 0]
    if ce_weight or len(unmatched):
        logprobs = common.log_softmax_with_temperature(logits)
        nats = -logprobs.gather(1, targets[:, None])[:, 0]  # (n,)
        total = total + ce_weight * nats.sum()
        total = total + nats[common.to_device(unmatched, logits.device)].sum()
    return total, divergence


class CrossTokenizerLoss(nn.Module):
    """The student and its loss. What is registered here is trained, synchronised and saved."""

    def __init__(self, student: LanguageModel, head: Head | None, alignments: Alignments) -> None:
        super().__init__()
        self.trained = student.model  # registers its parameters
        self.student, self.teacher_head, self.alignments = student, head, alignments

    def forward(
        self, batch: Batch, teacher_hidden: Tensor, pieces: list[Piece]
    ) -> tuple[Tensor, Tensor]:
        """Loss summed over the batch's N targets, and the sums (2,) of loss and divergence. Of the
        teacher: its hidden states (M, d) at its own M targets, or what a server says of them."""
        student = self.student.logits(batch)
        teacher = common.teacher_logits(teacher_hidden, self.teacher_head)
        inputs = [(batch.targets[p.rows], p.pairs, self.alignments) for p in pieces]
        rows = [(p.rows, p.teacher_rows, more) for p, more in zip(pieces, inputs, strict=True)]
        return common.chunked_loss(student, teacher, rows, loss_and_gradient, pure=False)


def loss_and_gradient(
    logits: Tensor, teacher_logits: Tensor | TopLogprobs, inputs: tuple[Tensor, Tensor, Alignments]
) -> tuple[Tensor, Tensor]:
    """Sums (2,) of `piece_loss`, and the gradient of the first: see `common.chunked_loss`."""
    with torch.enable_grad():
        logits.requires_grad_()
        parts = piece_loss(logits, teacher_logits, *inputs)
    (gradient,) = torch.autograd.grad(parts[0], logits)
    return torch.stack(parts).detach(), gradient


def main(args: Arguments) -> None:
    accelerator = common.start("cross_tokenizer", args)
    train, held_out = common.load_data(args)
    student, teacher = pair = common.load_pair(args, accelerator.device)
    objective = args.objective(pair)
    prompts = common.tokenize_prompts(train, pair, args.max_length)
    evaluation = common.tokenize_prompts(held_out, pair, args.max_length)

    examples = common.make_examples(prompts, pair, args)
    alignments = Alignments(examples, pair, objective)
    accelerator.print(alignments.summary(examples[0]))
    evaluator = common.Evaluator(evaluation, pair, args)
    teacher_hidden = common.TeacherHiddenStates(teacher, examples, "training text")
    if args.cache_teacher and pair.has_weights:
        teacher.unload()  # its head and hidden states are all that training needs
    run = common.Run("cross_tokenizer", args, accelerator, evaluator, examples)

    module = CrossTokenizerLoss(student, teacher.head(), alignments)
    module, optimizer = common.prepare(accelerator, module, args, teacher)
    steps = common.total_steps(args, len(examples))
    for step in range(run.resume(steps), steps):
        run.begin(step, optimizer)
        batch = common.global_batch(examples, args, step)
        micro_batches, tokens = common.split_micro_batches(batch, args)
        sums = 0.0  # (2,): loss, divergence
        for micro_batch in micro_batches:
            inputs = common.collate([e.student for e in micro_batch], accelerator.device)
            with common.reduce_gradients(accelerator, module, micro_batch is micro_batches[-1]):
                loss, parts = module(inputs, teacher_hidden(micro_batch), alignments(micro_batch))
                # Gradients are averaged over processes: times their number gives the sum.
                accelerator.backward(loss * (accelerator.num_processes / tokens))
            sums += parts
            del loss  # frees the graph before the next one is made
        norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        mean_loss, kl = accelerator.reduce(sums / tokens, "sum")
        lr = optimizer.param_groups[0]["lr"]
        numbers = {"train/loss": mean_loss, "train/kl": kl, "optim/lr": lr, "optim/grad_norm": norm}
        run.log(step + 1, tokens, numbers, micro_batches)
        run.evaluate(step + 1)
        run.save(step + 1)
    run.finish(alignment=alignments.report())


if __name__ == "__main__":
    common.launch(main, Arguments, __doc__)
