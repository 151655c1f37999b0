"""Cross-tokenizer distillation: a student whose vocabulary is not its teacher's.

Two models with different vocabularies cut one text into different tokens and put their
distributions on different sets, so that a divergence between them is not defined token by token.

--loss hybrid (the default) compares what both say about the same bytes. Wherever a token of
either model begins, both have read the same text; three cases, i the student's token, j the
teacher's:

    both begin a token     KL between the probabilities of classes: a token counts for the longest
                           name that begins it. Names are the tokens of either vocabulary that
                           are, or begin, a token of the other, as far as no training text has the
                           two models begin with different ones
    one is inside a token  its distribution is restricted to the tokens that begin with the bytes w
                           that it has read of this one, renormalised, and says how the text goes
                           on: each of them counts for the longest token of the other model that
                           begins what follows w, and the token that ends with w for a stop. KL
                           between that and the other model's own next token, over those outcomes
    neither can be said    as the text shows another token than those rules foretell: the
                           text speaks for the teacher, -log p_student(token)

    loss = ( T² · Σ KL + Σ_(third case) CE ) / N  +  w · CE

over the N target tokens of the student in a batch; T is --temperature, w is --ce-weight. By the
chain rule the first two cases add up to the KL between the texts' distributions where one model's
tokens are cut finer than the other's. With one vocabulary only the first is left, and it is
token_level.py's forward KL.

--loss uld compares, for every token of the student, the top K probabilities of both models at the
place where the teacher's text so far ends nearest: each sorted and renormalised, KL(teacher ‖
student) at temperature T. Which token is which is thrown away, so cross-entropy on the text goes
with it (w = 1).

Boizard et al. 2024, "Towards cross-tokenizer distillation: the universal logit distillation loss"
(uld; departures: KL of the top K where they take the L1 distance of whole sorted vocabularies,
and tokens are matched by their place in the text where they match by number). Minixhofer et al.
2025, "Cross-tokenizer distillation via approximate likelihood matching" (spans of equal text, from
which hybrid departs: it conditions a model that is inside a token instead of comparing
likelihoods of whole spans).

    python cross_tokenizer.py
    python cross_tokenizer.py --loss uld
    python cross_tokenizer.py --ce-weight 0.5
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

import common
from common import Batch, CommonArguments, Example, Head, LanguageModel, UsageError, flag


@dataclass
class Arguments(CommonArguments):
    student: str = flag(
        str(common.DATA / "student_other_tokenizer"), "student model: a directory or a hub id"
    )
    learning_rate: float = flag(3e-3, "peak of the schedule (linear warm-up, cosine to zero)")
    loss: Literal["hybrid", "uld"] = flag(
        "hybrid", "hybrid: KL where both texts can be compared; uld: sorted top probabilities"
    )
    top_k: int = flag(32, "how many probabilities of each model uld compares")
    ce_weight: float | None = flag(
        None, "weight of cross-entropy on the text's own tokens (default: 1 with uld, else 0)"
    )

    def objective(self, student: LanguageModel, teacher: LanguageModel) -> Objective:
        """The loss and its weights; `UsageError` for a --top-k that has nothing to compare."""
        smallest = min((student, teacher), key=lambda model: model.vocabulary)
        if not 2 <= self.top_k <= smallest.vocabulary:
            raise UsageError(
                f"--top-k {self.top_k} must be at least 2 and at most {smallest.vocabulary}, the "
                f"vocabulary of {smallest.name}"
            )
        weight = float(self.loss == "uld") if self.ce_weight is None else self.ce_weight
        return Objective(self.loss, self.top_k, self.temperature, weight)


class Objective(NamedTuple):
    """What is minimised; the module's docstring has the formula."""

    loss: str  # hybrid | uld
    top_k: int
    temperature: float
    ce_weight: float


# -------------------------------------------------------------------------- bytes and alignment


# Special tokens are spelled as this and their name, an end-of-turn token as this alone: no UTF-8
# text and no token of any text holds these bytes.
END = b"\xff\xff"


def byte_alphabet() -> dict[str, int]:
    """Byte-level tokenizers' printable character for each byte (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


def token_bytes(model: LanguageModel) -> list[bytes]:
    """The bytes of text that each id stands for; special tokens have spellings of their own.

    Raises `UsageError` for a tokenizer that neither spells bytes (GPT-2), nor marks spaces with ▁
    (SentencePiece), nor joins its tokens as they stand.
    """
    tokenizer, alphabet = model.tokenizer, byte_alphabet()
    decoder = tokenizer.backend_tokenizer.decoder
    state = {"type": "nothing"} if decoder is None else json.loads(decoder.__getstate__())
    steps = {step["type"] for step in state.get("decoders", [state])}
    byte_level = "ByteLevel" in steps
    if not byte_level and not steps & {"ByteFallback", "Metaspace"} and steps != {"Fuse"}:
        raise UsageError(
            f"{model.name}: its tokenizer decodes by {', '.join(sorted(steps))}, which does not "
            "tell the bytes that a token stands for: use sequence_level.py"
        )

    def spelled(token: str) -> bytes:
        if byte_level and all(c in alphabet for c in token):
            return bytes(alphabet[c] for c in token)
        if "ByteFallback" in steps and len(token) == 6 and token.startswith("<0x"):
            return bytes.fromhex(token[3:5])
        return (token if byte_level or steps == {"Fuse"} else token.replace("▁", " ")).encode()

    found, added = [b""] * model.vocabulary, tokenizer.added_tokens_decoder
    for token, i in tokenizer.get_vocab().items():
        if i not in added:
            found[i] = spelled(token)
        else:
            found[i] = (END if added[i].special else b"") + added[i].content.encode()
    for i in model.end_ids:
        found[i] = END
    return found


def align(student_ends: Sequence[int], teacher_ends: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of overlapping tokens, in order: one for each place where a token of either begins.

    Args:
        student_ends, teacher_ends: where each token ends in the one text, ascending.

    Returns:
        Student's and teacher's token at each place. Both numbers rise where both begin a token;
        the one that stays is of the model that is inside a token there.
    """
    pairs, i, j = [], 0, 0
    while i < len(student_ends) and j < len(teacher_ends):
        pairs.append((i, j))
        ours, theirs = student_ends[i], teacher_ends[j]
        i += ours <= theirs
        j += theirs <= ours
    return pairs


class Turn(NamedTuple):
    """One assistant turn in the tokens of both models."""

    first: tuple[int, int]  # number of its first target, of the student and of the teacher
    pieces: tuple[list[bytes], list[bytes]]
    begins: tuple[list[int], list[int]]  # of each token in bytes, and at last the end of the text
    same: int  # bytes that both texts begin with

    def pairs(self) -> list[tuple[int, int]]:
        """`align`, as far as both models have read the same."""
        ours, theirs = self.begins
        pairs = align(ours[1:], theirs[1:])
        return [(i, j) for i, j in pairs if max(ours[i], theirs[j]) <= self.same]

    def spans(self) -> list[tuple[int, int]]:
        """The pairs where both begin a token."""
        ours, theirs = self.begins
        return [(i, j) for i, j in self.pairs() if ours[i] == theirs[j]]


def turns(example: Example, student_bytes: list[bytes], teacher_bytes: list[bytes]) -> list[Turn]:
    """The assistant turns of an example: runs of targets, which are numbered through all turns."""
    sides = []
    for (ids, targets), spelled in zip(example[:2], (student_bytes, teacher_bytes), strict=True):
        cuts = [k for k in range(1, len(targets)) if targets[k] != targets[k - 1] + 1]
        runs = zip([0, *cuts], [*cuts, len(targets)], strict=True) if targets else ()
        sides.append([(a, [spelled[ids[p]] for p in targets[a:b]]) for a, b in runs])
    found = []
    for (a, ours), (b, theirs) in zip(*sides, strict=False):  # one side may have been cut sooner
        texts = b"".join(ours), b"".join(theirs)
        # SentencePiece puts a space before the text, and templates may.
        spaces = [len(text) - len(text.lstrip(b" ")) for text in texts]
        extra = [n - min(spaces) for n in spaces]
        whole = [text[n:] for text, n in zip(texts, extra, strict=True)]
        differ = (n for n, (x, y) in enumerate(zip(*whole, strict=False)) if x != y)
        begins = []
        for pieces, skipped in zip((ours, theirs), extra, strict=True):
            places = [-skipped]
            for piece in pieces:
                places.append(places[-1] + len(piece))
            begins.append([max(p, 0) for p in places])
        same = next(differ, min(map(len, whole)))
        found.append(Turn((a, b), (ours, theirs), tuple(begins), same))
    return found


class Ragged(NamedTuple):
    """Rows of different lengths, one after the other."""

    values: Tensor
    begins: Tensor  # of each row in `values`
    counts: Tensor  # how long it is

    def take(self, rows: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """(which of `rows`, place in `values`) for all their elements; `total`: how many."""
        counts = self.counts[rows]
        owner = torch.repeat_interleave(counts, output_size=total)
        shift = self.begins[rows] - (counts.cumsum(0) - counts)
        return owner, torch.arange(total, device=rows.device) + shift[owner]


def ragged(rows: list[list[int]], device: torch.device) -> Ragged:
    counts = torch.tensor([len(row) for row in rows], dtype=torch.long)
    values = torch.tensor([v for row in rows for v in row], dtype=torch.long)
    return Ragged(*(t.to(device) for t in (values, counts.cumsum(0) - counts, counts)))


class Continuations:
    """How a model that has read w, the first bytes of a token, goes on, in another's tokens."""

    def __init__(self, inside: list[bytes], other: list[bytes]) -> None:
        self.inside = sorted((b, i) for i, b in enumerate(inside) if b)
        self.other = {b: i for i, b in enumerate(other) if b}
        self.numbers: dict[bytes, int] = {}  # of every w met so far
        self.foretold: list[dict[int, int]] = []  # by w: token inside, first token of its rest
        self.stops: list[list[int]] = []  # by w: the tokens inside that are w and no more

    def number(self, w: bytes) -> int:
        """The row of w in the tables."""
        if w not in self.numbers:
            self.numbers[w] = len(self.numbers)
            foretold, stops = {}, []
            first = bisect.bisect_left(self.inside, (w, -1))
            last = bisect.bisect_left(self.inside, (w + 2 * END, -1))
            for token, i in self.inside[first:last]:
                rest = token[len(w) :]
                if not rest:
                    stops.append(i)
                elif longest := longest_prefix(rest, self.other):
                    foretold[i] = self.other[longest]
            self.foretold.append(foretold)
            self.stops.append(stops)
        return self.numbers[w]

    def tables(self, device: torch.device) -> Tables:
        outcomes = [sorted(set(foretold.values())) for foretold in self.foretold]
        tokens, places = [], []
        for foretold, stops, names in zip(self.foretold, self.stops, outcomes, strict=True):
            place = {name: k for k, name in enumerate(names)}
            tokens.append([*foretold, *stops])
            places.append([place[v] for v in foretold.values()] + [len(names)] * len(stops))
        stops = torch.tensor([bool(s) for s in self.stops], device=device)
        rows = [ragged(table, device) for table in (tokens, places, outcomes)]
        return Tables(rows[0], rows[1].values, rows[2], stops)


class Tables(NamedTuple):
    """`Continuations` on a device. Outcomes of a w: tokens of the other model, and a stop."""

    tokens: Ragged  # by w: ids of the model inside that begin with w
    outcome: Tensor  # of each of these, counted within its w
    other: Ragged  # by w: the other model's id for each outcome but the stop
    stops: Tensor  # by w: whether a token of the model inside is w and no more


def common_names(
    student: list[bytes], teacher: list[bytes], starts: set[tuple[bytes, bytes]]
) -> dict[bytes, int]:
    """What a token of either vocabulary can count for, as bytes, numbered from 1; b"" is 0.

    These are the tokens of either vocabulary that are, or begin, a token of the other, less those
    that a text contradicts: `starts` are a student's and a teacher's token that begin at one place.
    As both have to count for the same, the longer of two names goes, unless both have that token.
    """
    shared = set(student) & set(teacher)
    names = shared | {b""}
    for tokens, others in ((student, sorted(teacher)), (teacher, sorted(student))):
        for token in set(tokens) - shared:
            first = bisect.bisect_left(others, token)
            if first < len(others) and others[first].startswith(token):
                names.add(token)
    before = 0
    while before != len(names):  # the name that a token falls back on may be contradicted too
        before = len(names)
        for pair in starts:
            short, long = sorted((longest_prefix(token, names) for token in pair), key=len)
            if short != long and long.startswith(short):
                names -= {long} - shared
    return {name: n for n, name in enumerate(sorted(names))}


def longest_prefix(token: bytes, known: Container[bytes]) -> bytes:
    """The longest key of `known` that `token` begins with; empty where none is."""
    if token.startswith(END):
        return token if token in known else b""
    return next((token[:n] for n in range(len(token), 0, -1) if token[:n] in known), b"")


class Pairs(NamedTuple):
    """States to compare, by their places in a piece, and what was read of the token inside."""

    student: Tensor
    teacher: Tensor
    w: Tensor  # row in the tables of `Continuations`
    sizes: tuple[int, int]  # tokens and outcomes of these rows together


class Piece(NamedTuple):
    """A part of a batch whose logits exist at one time."""

    rows: slice  # of the student's states
    teacher_rows: slice
    level: Pairs  # both begin a token; for uld, where the teacher's begins nearest
    teacher_inside: Pairs
    student_inside: Pairs
    alone: Tensor  # the student's rows that nothing is compared with
    targets: Tensor


LEVEL, TEACHER_INSIDE, STUDENT_INSIDE = range(3)


def nearest(turn: Turn) -> Iterator[tuple[int, int, int, int]]:
    """Each of the student's tokens with the teacher's that begins nearest, the later of two."""
    (first, its_first), (begins, its_begins) = turn.first, turn.begins
    j = 0
    for i, place in enumerate(begins[:-1]):
        while j + 2 < len(its_begins) and abs(its_begins[j + 1] - place) <= abs(
            its_begins[j] - place
        ):
            j += 1
        yield first + i, its_first + j, LEVEL, 0


class Alignments:
    """Which states of the two models are compared, found once for every example."""

    def __init__(
        self,
        examples: Sequence[Example],
        student: LanguageModel,
        teacher: LanguageModel,
        objective: Objective,
    ) -> None:
        """Align the examples; raises `UsageError` where no two tokens can be compared."""
        self.objective, self.device = objective, student.device
        self.sizes = student.vocabulary, teacher.vocabulary
        self.spelled = token_bytes(student), token_bytes(teacher)
        numbers = common_names(*self.spelled, self._starts(examples))
        classes = [[numbers[longest_prefix(b, numbers)] for b in side] for side in self.spelled]
        self.inside = (
            Continuations(self.spelled[1], self.spelled[0]),
            Continuations(self.spelled[0], self.spelled[1]),
        )
        self.spans = self.tokens = self.teacher_tokens = self.compared = 0
        # Rows of (student's target, teacher's target, case, w), by the example's id().
        self.pairs = {id(e): self._align(e, classes) for e in examples}
        if not self.compared:
            raise UsageError(
                f"no token of {student.name} can be compared with one of {teacher.name}: their "
                "tokenizers do not give the same text back"
            )
        self.classes = [torch.tensor(side, device=self.device) for side in classes]
        self.count = len(numbers)
        self.possible = torch.zeros(self.count, device=self.device)
        self.possible[self.classes[0]] = 1
        self.tables = [c.tables(self.device) for c in self.inside]
        self.counts = [(t.tokens.counts.cpu(), t.other.counts.cpu()) for t in self.tables]
        own = [b for b in self.spelled[0] if b and not b.startswith(END)]
        theirs = set(self.spelled[1])
        self.overlap = sum(b in theirs for b in own) / max(1, len(own))

    def _starts(self, examples: Sequence[Example]) -> set[tuple[bytes, bytes]]:
        """The student's and the teacher's token wherever both begin one."""
        found = (turn for e in examples for turn in turns(e, *self.spelled))
        return {(t.pieces[0][i], t.pieces[1][j]) for t in found for i, j in t.spans()}

    def _align(self, example: Example, classes: list[list[int]]) -> Tensor:
        rows = []
        for turn in turns(example, *self.spelled):
            self.spans += len(turn.spans())
            if self.objective.loss == "uld":
                rows += nearest(turn)
            else:
                rows += self._comparable(example, turn, classes)
        self.tokens += len(example.student.targets)
        self.teacher_tokens += len(example.teacher.targets)
        self.compared += len({i for i, _, case, _ in rows if case != STUDENT_INSIDE})
        return torch.tensor(rows, dtype=torch.int32).view(-1, 4)

    def _comparable(
        self, example: Example, turn: Turn, classes: list[list[int]]
    ) -> Iterator[tuple[int, int, int, int]]:
        """The pairs of a turn, without those where the text shows what could not be foretold."""
        student, teacher, _ = example
        for i, j in turn.pairs():
            row = turn.first[0] + i, turn.first[1] + j
            own, other = student.ids[student.targets[row[0]]], teacher.ids[teacher.targets[row[1]]]
            ahead = turn.begins[0][i] - turn.begins[1][j]
            if ahead == 0:
                if classes[0][own] == classes[1][other] > 0:
                    yield (*row, LEVEL, 0)
            elif ahead > 0:
                w = self.inside[0].number(turn.pieces[1][j][:ahead])
                if self.inside[0].foretold[w].get(other) == own:
                    yield (*row, TEACHER_INSIDE, w)
            else:
                w = self.inside[1].number(turn.pieces[0][i][:-ahead])
                if self.inside[1].foretold[w].get(own) == other:
                    yield (*row, STUDENT_INSIDE, w)

    def __call__(self, examples: Sequence[Example]) -> list[Piece]:
        """The batch of these examples, cut so that no piece's logits are many at a time."""
        rows, targets, n, m = [torch.zeros(0, 4, dtype=torch.long)], [], 0, 0
        for example in examples:
            rows.append(self.pairs[id(example)] + torch.tensor([n, m, 0, 0]))
            targets += [example.student.ids[p] for p in example.student.targets]
            n, m = n + len(example.student.targets), m + len(example.teacher.targets)
        pairs, of_targets = torch.cat(rows), torch.tensor(targets, dtype=torch.long)
        widest = max(self.sizes[0], self.sizes[1] * m // max(1, n))
        size = common.chunk_rows(4 * widest, self.device)  # autograd keeps more arrays here
        return [self._piece(pairs, of_targets, i, min(i + size, n)) for i in range(0, n, size)]

    def _piece(self, pairs: Tensor, targets: Tensor, start: int, stop: int) -> Piece:
        mine = pairs[(pairs[:, 0] >= start) & (pairs[:, 0] < stop)]
        low, high = (int(mine[:, 1].min()), int(mine[:, 1].max()) + 1) if len(mine) else (0, 0)
        mine = mine - torch.tensor([start, low, 0, 0])
        alone = torch.ones(stop - start, dtype=torch.bool)
        alone[mine[mine[:, 2] != STUDENT_INSIDE, 0]] = False
        cases = []
        for case in (LEVEL, TEACHER_INSIDE, STUDENT_INSIDE):
            student, teacher, _, w = mine[mine[:, 2] == case].t()
            counts = self.counts[case - 1] if case else ()
            sizes = tuple(int(count[w].sum()) for count in counts)
            cases.append(Pairs(*(self._on_device(t) for t in (student, teacher, w)), sizes))
        more = (self._on_device(t) for t in (alone.nonzero()[:, 0], targets[start:stop]))
        return Piece(slice(start, stop), slice(low, high), *cases, *more)

    def _on_device(self, t: Tensor) -> Tensor:
        t = t.contiguous()
        return (
            t.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else t
        )

    def report(self) -> dict[str, float]:
        """How well the two vocabularies and the texts fit together."""
        return {
            "vocabulary_overlap": self.overlap,
            "aligned_tokens": self.spans / max(1, self.tokens),
            "compared_tokens": self.compared / max(1, self.tokens),
            "student_tokens_per_span": self.tokens / max(1, self.spans),
            "teacher_tokens_per_span": self.teacher_tokens / max(1, self.spans),
        }

    def picture(self, example: Example, width: int = 100) -> str:
        """The last turn of an example, the student's tokens above the teacher's."""
        found = turns(example, *self.spelled)
        if not found:
            return "  (an empty response)"
        turn = found[-1]
        spans, lines = turn.spans(), ["  student ", "  teacher "]
        ends = [*spans[1:], tuple(len(pieces) for pieces in turn.pieces)]
        for cut in zip(spans, ends, strict=True):
            parts = zip(turn.pieces, *cut, strict=True)
            cells = ["|".join(map(_shown, pieces[a:b])) for pieces, a, b in parts]
            widest = max(map(len, cells))
            if len(lines[0]) + widest + 3 > width:
                break
            lines = [f"{line}{cell:{widest}} ¦ " for line, cell in zip(lines, cells, strict=True)]
        return "\n".join(line.rstrip(" ¦") for line in lines)


def _shown(piece: bytes) -> str:
    if piece.startswith(END):
        return piece[len(END) :].decode() or "<end>"
    return repr(piece.decode(errors="replace").replace(" ", "␣"))[1:-1]


# ----------------------------------------------------------------------------------------- loss


def floor(p: Tensor) -> float:
    """What a probability counts for at least, so that no gradient overflows: 1e-19 in float32."""
    return torch.finfo(p.dtype).tiny ** 0.5


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ teacher · log(teacher / student) over all elements, in nats."""
    return torch.sum(
        teacher * ((teacher + floor(teacher)).log() - (student + floor(student)).log())
    )


def class_probabilities(probabilities: Tensor, classes: Tensor, count: int) -> Tensor:
    """(n, V) summed over the tokens of each class: (n, count)."""
    sums = probabilities.new_zeros(len(probabilities), count)
    return sums.scatter_add(1, classes.expand_as(probabilities), probabilities)


def continuations(
    inside: Tensor,
    other: Tensor,
    rows: tuple[Tensor, Tensor],
    pairs: Pairs,
    tables: Tables,
    held: bool = False,
) -> tuple[Tensor, Tensor]:
    """How both models go on, over the outcomes of each pair's w, one after the other.

    Args:
        inside, other: probabilities (n, V) of the model that has read w, and of the other one.
        rows: of either, for each pair.
        held: the other model has to go on where the model inside has no token that is w.

    Returns:
        The restricted, renormalised distribution of the model inside, and the other model's:
        its probability for every outcome's token, and all that is left for a stop.
    """
    w, (tokens, outcomes) = pairs.w, pairs.sizes
    counts = tables.other.counts[w] + 1
    ends = counts.cumsum(0)
    pair_of = torch.repeat_interleave(counts, output_size=outcomes + len(w))

    pair, place = tables.tokens.take(w, tokens)
    found = inside[rows[0][pair], tables.tokens.values[place]]
    restricted = inside.new_zeros(len(pair_of))
    restricted = restricted.index_add(0, (ends - counts)[pair] + tables.outcome[place], found)
    total = inside.new_zeros(len(w)).index_add(0, pair_of, restricted).clamp_min(floor(inside))

    pair, place = tables.other.take(w, outcomes)
    names, spots = tables.other.values[place], torch.arange(outcomes, device=w.device) + pair
    chosen = other[rows[1]]
    left = chosen.index_put((pair, names), other.new_zeros(())).sum(-1)
    if held:
        left = left * tables.stops[w]
    going_on = left.new_zeros(len(pair_of)).index_copy(0, spots, chosen[pair, names])
    going_on = going_on.index_copy(0, ends - 1, left)
    whole = left.new_zeros(len(w)).index_add(0, pair_of, going_on).clamp_min(floor(other))
    return restricted / total[pair_of], going_on / whole[pair_of]


def piece_loss(
    logits: Tensor, teacher_logits: Tensor, piece: Piece, alignments: Alignments
) -> tuple[Tensor, Tensor]:
    """The objective summed over a piece, and of it the divergence without T²."""
    loss, top_k, t, ce_weight = alignments.objective
    ours = common.softmax_with_temperature(logits, t)
    theirs = common.softmax_with_temperature(teacher_logits, t)
    likelihoods = logits.new_zeros(len(logits))
    if ce_weight or len(piece.alone):
        logprobs = common.log_softmax_with_temperature(logits)
        likelihoods = logprobs.gather(1, piece.targets[:, None])[:, 0]
    if loss == "uld":
        pair = (theirs[piece.level.teacher], ours[piece.level.student])
        tops = [p.topk(top_k, -1).values for p in pair]
        divergence = kl(*(p / p.sum(-1, keepdim=True) for p in tops))
        rest = 0
    else:
        divergence = hybrid_divergence(ours, theirs, piece, alignments)
        rest = -likelihoods[piece.alone].sum()
    return t**2 * divergence + rest - ce_weight * likelihoods.sum(), divergence


def hybrid_divergence(ours: Tensor, theirs: Tensor, piece: Piece, alignments: Alignments) -> Tensor:
    """The sum of the KLs that the module's docstring lists, from both models' probabilities."""
    pairs = piece.level
    classes = [
        class_probabilities(p[rows], of_token, alignments.count)
        for p, rows, of_token in zip(
            (ours, theirs), (pairs.student, pairs.teacher), alignments.classes, strict=True
        )
    ]
    # What the student has no token for is left out of what the teacher says.
    possible = classes[1] * alignments.possible
    whole = possible.sum(-1, keepdim=True).clamp_min(floor(possible))
    total = kl(possible / whole, classes[0])
    if len((pairs := piece.teacher_inside).w):
        rows = pairs.teacher, pairs.student
        total = total + kl(*continuations(theirs, ours, rows, pairs, alignments.tables[0]))
    if len((pairs := piece.student_inside).w):
        rows = pairs.student, pairs.teacher
        student, teacher = continuations(ours, theirs, rows, pairs, alignments.tables[1], held=True)
        total = total + kl(teacher, student)
    return total


class _PiecewiseLoss(torch.autograd.Function):
    """The sum of `piece_loss`, with each piece's gradient taken before its logits are dropped.

    The gradients are returned from backward, never written to `.grad`, as common's chunked loss
    does it; here autograd finds the one with respect to a piece's logits.
    """

    @staticmethod
    def forward(ctx, states, weight, bias, head, teacher_states, teacher, pieces, alignments):
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(states.dtype, torch.float32)
        sums = torch.zeros(2, dtype=wide, device=states.device)  # loss, divergence
        head = head._replace(weight=weight, bias=bias).ready(states.dtype, states.device)
        teacher = teacher.ready(teacher_states.dtype, states.device)
        grad_states = torch.zeros_like(states) if wants_states else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if wants_bias else None
        for piece in pieces:
            teacher_logits = teacher.logits(teacher_states[piece.teacher_rows])
            raw = common.project(states[piece.rows], head.weight, bias)
            with torch.enable_grad():
                raw.requires_grad_()
                parts = piece_loss(head.transform(raw), teacher_logits, piece, alignments)
            (gradient,) = torch.autograd.grad(parts[0], raw)
            sums += torch.stack(parts).detach()
            if wants_bias:
                grad_bias += gradient.sum(0)
            gradient = gradient.to(states.dtype)
            if wants_states:
                grad_states[piece.rows] = common.project(gradient, head.weight.t())
            if wants_weight:
                common.add_product(grad_weight, gradient, states[piece.rows])
        ctx.gradients = [grad_states, grad_weight, grad_bias]
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss, _):
        gradients, ctx.gradients = ctx.gradients, None
        return (*[None if g is None else g.mul_(grad_loss) for g in gradients], *[None] * 5)


class CrossTokenizerLoss(nn.Module):
    """The student and its loss in one `forward`, which is what DDP and FSDP wrap."""

    def __init__(self, student: LanguageModel, teacher_head: Head, alignments: Alignments) -> None:
        super().__init__()
        self.trained = student.model
        self.student, self.teacher_head, self.alignments = student, teacher_head, alignments

    def forward(
        self, batch: Batch, teacher_states: Tensor, pieces: list[Piece]
    ) -> tuple[Tensor, Tensor]:
        """Loss summed over the batch's N target tokens, and the sums of (loss, divergence).

        `teacher_states` (M, d) are the teacher's at its own M targets of the same text.
        """
        states, head = self.student.states(batch), self.student.head()
        with torch.autocast(states.device.type, enabled=False):
            return _PiecewiseLoss.apply(
                states, head.weight, head.bias, head,
                teacher_states, self.teacher_head, pieces, self.alignments,
            )  # fmt: skip


def main(args: Arguments) -> None:
    accelerator = common.start("cross_tokenizer", args)
    device = accelerator.device
    train, held_out = common.load_data(args)
    student, teacher = common.load_pair(args, device)
    objective = args.objective(student, teacher)
    prompts = common.encode_for_both(train, student, teacher, args.max_length)
    evaluation = common.encode_for_both(held_out, student, teacher, args.max_length)

    examples = common.make_examples(train, prompts, student, teacher, args, accelerator)
    alignments = Alignments(examples, student, teacher, objective)
    accelerator.print(alignments.picture(examples[0]))
    numbers = [f"{name} {value:.3f}" for name, value in alignments.report().items()]
    accelerator.print("alignment: " + ", ".join(numbers))
    evaluator = common.Evaluator(evaluation, student, teacher, args, accelerator)
    states = common.TeacherStates(teacher, examples, args, accelerator, "training text")
    run = common.Run("cross_tokenizer", args, accelerator)
    before = run.before(evaluator, student)

    module = CrossTokenizerLoss(student, teacher.head(), alignments)
    module, optimizer = accelerator.prepare(module, common.make_optimizer(module, args))
    steps = common.total_steps(args, len(examples))
    first = run.resume(steps)
    bar = common.progress(accelerator, "training", steps, first)
    student.model.train()
    for step in range(first, steps):
        common.reseed(args, step, accelerator)
        for group in optimizer.param_groups:
            group["lr"] = common.learning_rate(step, steps, args)
        micro_batches, tokens = common.micro_batches(examples, args, step, accelerator)
        sums = 0.0
        for micro_batch in micro_batches:
            batch = common.collate([e.student for e in micro_batch], device)
            with common.reduce_gradients(accelerator, module, micro_batch is micro_batches[-1]):
                loss, parts = module(batch, states(micro_batch), alignments(micro_batch))
                # DDP averages over processes; the sum over them, per token, is what is wanted.
                accelerator.backward(loss * (accelerator.num_processes / tokens))
            sums += parts
            del loss  # its graph would lie between the arrays of the next one
        norm = accelerator.clip_grad_norm_(module.parameters(), args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

        total, divergence = accelerator.reduce(sums / tokens)
        run.log(
            step + 1,
            tokens,
            {
                "train/loss": total,
                "train/kl": divergence,
                "optim/lr": optimizer.param_groups[0]["lr"],
                "optim/grad_norm": norm,
            },
            [e.where for micro_batch in micro_batches for e in micro_batch],
        )
        bar.update()
        last = step + 1 == steps
        if last or (step + 1) % args.logging_steps == 0:
            common.show(bar, run.flush())
        if not last and args.eval_steps and (step + 1) % args.eval_steps == 0:
            run.flush()
            run.write_scores(step + 1, common.scores(evaluator(student)))
        run.save(step + 1)
    bar.close()

    after = evaluator(student, show=3)
    run.write_scores(steps, common.scores(after))
    run.finish(student, before, after, evaluator, alignment=alignments.report())


if __name__ == "__main__":
    common.launch(main, Arguments, __doc__)
