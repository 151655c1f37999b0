"""Two tokenizers on one text: bytes of tokens, aligned pairs, and the outcomes that they share."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import common
import cross_tokenizer
from common import LanguageModel
from cross_tokenizer import (
    BOUNDARY,
    END,
    REMAINDER,
    UNMATCHED,
    Turn,
    Vocabulary,
    token_bytes,
)

MODELS = Path(os.environ.get("DISTIL_REAL_MODELS", "nowhere"))
TEXTS = [
    "N AA1 L AH0 JH",
    "the theory of there, therefore thereof",
    "In 2024, 1234567890 and 3.14159 are numbers; 007 is not.",
    "trailing spaces   ",
    "  leading,\ttabs\t\tand\n\nlines\r\n",
    "Straße, naïve café, e\u0301 and \u00e9, Å A\u030a",
    "שלום עולם, مرحبا بالعالم \u200fmixed\u200e text",
    "हिन्दी क्षत्रिय ไทยไม่มีช่องว่าง",
    "日本語のテキスト、한국어와 中文混排",
    "👋🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 e⃣",
    "Z̸͑a̷͝l̶̈́g̵̐o̴̊ \U0001d573\U0001d59a\U0001d591\U0001d591\U0001d594",
    "def f(x):\n    return x ** 2  # squares",
    "\u00a0no-break\u2003em\u3000wide\ufeff",
    "a",
    "",
]
SPECIAL = ["<pad>", "<s>", "<unk>", "<user>", "<done>"]


def byte_level(size: int, special: list[str], texts: Sequence[str] = TEXTS) -> Tokenizer:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([*texts] * 3, trainer)
    return raw


def sentencepiece(size: int, special: list[str]) -> Tokenizer:
    """As Llama 2's: ▁ for spaces and before the text, bytes for what is not in the vocabulary."""
    raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    strip = decoders.Strip(content=" ", left=1, right=0)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    raw.decoder = decoders.Sequence(steps)
    special = special + [f"<0x{b:02X}>" for b in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=size + 256, special_tokens=special, limit_alphabet=60, show_progress=False
    )
    raw.train_from_iterator(TEXTS * 3, trainer)
    # Only the names of the bytes are special to the trainer.
    state = common.json.loads(raw.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
    return Tokenizer.from_str(common.json.dumps(state))


def characters(size: int, special: list[str]) -> Tokenizer:
    raw = Tokenizer(models.WordLevel(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    trainer = trainers.WordLevelTrainer(special_tokens=special, show_progress=False)
    raw.train_from_iterator(TEXTS, trainer)
    return raw


KINDS: dict[str, Callable[[int, list[str]], Tokenizer]] = {
    "byte-level": byte_level, "sentencepiece": sentencepiece, "characters": characters,
}  # fmt: skip
TEMPLATE = (
    "{{ '<s>' if BOS }}{% for m in messages %}{{ '<user>' if m.role == 'user' else 'BOT' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<done>' }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{{ 'BOT' if add_generation_prompt }}"
)


def wrapped(raw: Tokenizer, bos: bool, end: str) -> LanguageModel:
    """A model without weights, which the alignment does not need."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=end, bos_token="<s>")
    template = TEMPLATE.replace("BOS", str(bos).lower()).replace("<done>", end)
    tokenizer.chat_template = template.replace("BOT", "A: " if bos else "\nassistant\n")
    return without_weights(f"a {end} model", tokenizer, tokenizer.convert_tokens_to_ids(end))


def without_weights(name: str, tokenizer: PreTrainedTokenizerFast, end: int) -> LanguageModel:
    size = max(tokenizer.get_vocab().values()) + 1
    cpu, config = torch.device("cpu"), LlamaConfig(vocab_size=size)
    return LanguageModel(name, tokenizer, config, [end], torch.float32, cpu, name, None)


@pytest.fixture(scope="module")
def sides() -> dict[str, LanguageModel]:
    """The three kinds; each of two sizes, with its own end token, the second with a BOS."""
    return {
        f"{kind} {size}": wrapped(make(size, [*SPECIAL, end]), size > 400, end)
        for kind, make in KINDS.items()
        for size, end in ((300, "<done>"), (500, "<|im_end|>"))
    }


PAIRS = [
    ("byte-level 300", "byte-level 500"),
    ("byte-level 500", "byte-level 300"),
    ("byte-level 300", "sentencepiece 500"),
    ("sentencepiece 300", "byte-level 500"),
    ("byte-level 500", "characters 300"),
    ("characters 500", "byte-level 300"),
    ("sentencepiece 500", "characters 300"),
]


def encoded(model: LanguageModel, text: str, end: bool = True) -> common.Tokens:
    messages = conversation("ask 1").messages
    rendered = common.render(model.tokenizer, messages, prompt=True)
    prompt, answer = (common.tokenize(model.tokenizer, part)[0] for part in (rendered, text))
    ids = prompt + answer + model.end_ids * end
    return common.Tokens(ids, list(range(len(prompt), len(ids))))


def conversation(*turns: str) -> common.Conversation:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": t} for i, t in enumerate(turns)]
    response = messages.pop() if len(turns) % 2 == 0 else None
    return common.Conversation(messages, response, [], "here")


def example(
    student: LanguageModel, teacher: LanguageModel, text: str, index: int = 0
) -> common.Example:
    return as_example(encoded(student, text), encoded(teacher, text), index)


def as_example(student: common.Tokens, teacher: common.Tokens, index: int = 0) -> common.Example:
    prompt = common.Prompt(conversation("ask 1"), [], [])
    return common.Example(index, prompt, "", student, teacher)


def vocabularies(*models: LanguageModel) -> list[Vocabulary]:
    return [Vocabulary(token_bytes(model)) for model in models]


def aligned(
    examples: list[common.Example], *models: LanguageModel, loss: str = "hybrid"
) -> cross_tokenizer.Alignments:
    objective = cross_tokenizer.Objective(loss, 2, 1.0, 0.0)
    return cross_tokenizer.Alignments(examples, common.Pair(*models), objective)


def test_the_nearest_token_of_the_teacher():
    """The later one of two, and none where the teacher's text has been cut."""
    turn = Turn((0, 0), ([], []), ([0, 2, 4, 7, 9], [0, 3, 5, 6]), 6)
    assert [*turn.nearest()] == [(0, 0), (1, 1), (2, 2)]  # 4 lies between 3 and 5
    turn = turn._replace(tokens=([], [b"abc", b"de", END]))  # whole, and another text
    assert [*turn.nearest()] == [(0, 0), (1, 1), (2, 2), (3, 2)]


def test_every_end_token_ends_a_text(sides):
    """Also the second one, which many chat models have."""
    model = dataclasses.replace(sides["byte-level 300"])
    model.end_ids = [model.tokenizer.convert_tokens_to_ids(t) for t in ("<done>", "<s>")]
    tokens = token_bytes(model)
    assert len({tokens[i] for i in model.end_ids}) == 1 and tokens[model.end_ids[1]].startswith(END)
    model.vocabulary = len(tokens) - 5  # rows of a head that is smaller than its tokenizer
    assert len(token_bytes(model)) == model.vocabulary


def test_tokens_that_share_nothing_do_not_agree():
    outcomes = {b"a": REMAINDER, b"b": REMAINDER + 1}
    context = cross_tokenizer.Context((outcomes, outcomes), (REMAINDER, REMAINDER), 3)
    assert context.agrees(b"b", b"b") and not context.agrees(b"a", b"a")
    assert not context.agrees(b"x", b"y")


def brute_force(ours: list[int], theirs: list[int]) -> list[tuple[int, int]]:
    """For every byte where a token of either begins, the tokens that hold that byte."""
    places = sorted({0, *ours[:-1], *theirs[:-1]})

    def holding(ends: Iterable[int], place: int) -> int:
        return next(i for i, end in enumerate(ends) if end > place)

    return [(holding(ours, p), holding(theirs, p)) for p in places]


def turns(*given: Any) -> list[Turn]:
    return list(cross_tokenizer.turns(*given))


def align(ours: list[int], theirs: list[int]) -> list[tuple[int, int]]:
    """The pairs of a turn whose tokens end at these bytes, in the same text on both sides."""
    return Turn((0, 0), ([], []), ([0, *ours], [0, *theirs]), max(ours + theirs)).pairs()


def test_pairs_are_what_their_definition_says():
    chance = random.Random(0)
    for _ in range(300):
        length = chance.randrange(1, 40)
        cuts = [sorted({*chance.choices(range(1, length + 1), k=8), length}) for _ in range(2)]
        pairs = align(*cuts)
        assert pairs == brute_force(*cuts)
        assert len(pairs) < len(cuts[0]) + len(cuts[1])
        for side, ends in enumerate(cuts):
            assert [*dict.fromkeys(p[side] for p in pairs)] == list(range(len(ends)))
    assert align([3, 5, 9], [3, 5, 9]) == [(0, 0), (1, 1), (2, 2)]
    assert align([2, 9], [1, 2, 5, 9]) == [(0, 0), (0, 1), (1, 2), (1, 3)]
    assert align([], [1]) == []


@pytest.mark.parametrize("name", ["byte-level 500", "sentencepiece 500", "characters 500"])
def test_tokens_stand_for_the_bytes_of_their_text(sides, name):
    model = sides[name]
    spelled = token_bytes(model)
    for text in TEXTS:
        joined = b"".join(
            spelled[i] for i in encoded(model, text).ids if not spelled[i].startswith(END)
        )
        before = b"".join(
            spelled[i] for i in encoded(model, "").ids if not spelled[i].startswith(END)
        )
        found = joined.removeprefix(before)
        assert found.removeprefix(b" ") == text.encode().removeprefix(b" ")
    special = [model.tokenizer.convert_tokens_to_ids(t) for t in SPECIAL[:2]]
    assert [spelled[i] for i in special] == [END + b"<pad>", END + b"<s>"]
    assert spelled[model.end_ids[0]] == END


def test_added_tokens_that_are_spaces():
    """As Gemma's: runs of ▁ that are no special tokens, and stand for spaces."""
    raw = sentencepiece(300, [*SPECIAL, "<done>"])
    state = common.json.loads(raw.to_str())
    state["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    state["pre_tokenizer"] = None
    raw = Tokenizer.from_str(common.json.dumps(state))
    raw.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("▁▁▁", normalized=False)])
    model = wrapped(raw, False, "<done>")
    spelled = token_bytes(model)
    ids = [model.tokenizer.convert_tokens_to_ids(t) for t in ("▁▁", "▁▁▁")]
    assert [spelled[i] for i in ids] == [b"  ", b"   "]


def test_an_answer_whose_first_token_begins_in_the_prompt(sides):
    """The rest of the answer is compared at its own places."""
    model = sides["byte-level 500"]
    whole, part = (encoded(model, text) for text in ("the theory of there", "theory of there"))
    (turn,) = turns(as_example(whole, part), vocabularies(model, model))
    assert turn.same == len("theory of there") + len(END)
    tokens = [(turn.tokens[0][i], turn.tokens[1][j]) for i, j in turn.boundaries()]
    assert tokens[-1] == (END, END) and (b" there", b" there") in tokens
    looping = ([b" na"] * 3, [b" na", b" n", b"a"])  # both were cut
    both = [Vocabulary([*dict.fromkeys(tokens), END]) for tokens in looping]
    sides = [[v.ids[t][0] for t in tokens] for v, tokens in zip(both, looping, strict=True)]
    cut = as_example(*(common.Tokens([0, *ids], [*range(1, 4)]) for ids in sides))
    (turn,) = turns(cut, both)
    assert turn.begins == ([0, 3, 6, 9], [0, 3, 5, 6])


def test_an_end_id_without_a_token(sides):
    model = dataclasses.replace(sides["byte-level 300"], end_ids=[300, 10**6])
    assert len(token_bytes(model)) == model.vocabulary


def test_hybrid_needs_no_large_vocabulary(sides):
    small = dataclasses.replace(sides["characters 300"])
    small.vocabulary = 20
    pair = common.Pair(small, sides["byte-level 300"])
    assert cross_tokenizer.Arguments().objective(pair).loss == "hybrid"
    with pytest.raises(common.UsageError, match="--top-k 32 must be from 2 to 20"):
        cross_tokenizer.Arguments(loss="uld").objective(pair)


def assert_covers(example: common.Example, both: list[Vocabulary]) -> None:
    """One turn, every token of both sides in a pair, and equal bytes between the boundaries."""
    (turn,) = turns(example, both)
    for side, tokens in enumerate(turn.tokens):
        covered = [*dict.fromkeys(pair[side] for pair in turn.pairs())]
        assert covered == list(range(len(tokens)))
    starts = turn.boundaries()
    assert starts[0] == (0, 0)
    ends = [*starts[1:], (len(turn.tokens[0]), len(turn.tokens[1]))]
    for (a, b), (c, d) in zip(starts, ends, strict=True):
        ours, theirs = b"".join(turn.tokens[0][a:c]), b"".join(turn.tokens[1][b:d])
        assert (ours == theirs) if a else (ours.lstrip(b" ") == theirs.lstrip(b" "))
    finished = turn.tokens[0][-1] == END
    assert finished == (turn.tokens[1][-1] == END)
    assert not finished or starts[-1] == (len(turn.tokens[0]) - 1, len(turn.tokens[1]) - 1)


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_spans_cover_both_sides_with_equal_text(sides, student, teacher):
    """Other templates, a BOS on one side, other end tokens: none of it shifts the answer."""
    ours, theirs = sides[student], sides[teacher]
    both = vocabularies(ours, theirs)
    for text in TEXTS:
        assert_covers(example(ours, theirs, text), both)


def test_random_unicode(sides):
    """Any characters at all, through bytes and through byte fallback."""
    chance = random.Random(1)
    ranges = [(32, 127), (0x300, 0x370), (0x590, 0x6FF), (0x4E00, 0x4F00), (0x1F300, 0x1FAFF)]
    ours, theirs = sides["byte-level 300"], sides["sentencepiece 500"]
    both = vocabularies(ours, theirs)
    for _ in range(100):
        letters = [chr(chance.randrange(*chance.choice(ranges))) for _ in range(30)]
        assert_covers(example(ours, theirs, "x" + "".join(letters)), both)


def test_cut_responses_have_no_end_on_either_side(sides):
    """Cut inside a character on one side: only the text that both have read is compared."""
    ours, theirs = sides["byte-level 300"], sides["sentencepiece 500"]
    both = vocabularies(ours, theirs)
    pair = [encoded(m, "the theory 𝄞", end=False) for m in (ours, theirs)]
    assert_covers(as_example(*pair), both)
    whole = encoded(theirs, "the theory 𝄞")
    cut = common.Tokens(whole.ids[:-2], whole.targets[:-2])  # without end and last of four bytes
    text = theirs.tokenizer.decode([cut.ids[p] for p in cut.targets])
    assert text.startswith("the theory \ufffd")
    (turn,) = turns(as_example(encoded(ours, text, end=False), cut), both)
    read = [max(turn.begins[0][i], turn.begins[1][j]) for i, j in turn.pairs()]
    assert turn.same == len("the theory ") == read[-1]


def test_different_texts_are_compared_as_far_as_they_agree(sides):
    ours = sides["byte-level 300"]
    differing = as_example(encoded(ours, "AA1 QQ"), encoded(ours, "AA1 XX"))
    (turn,) = turns(differing, vocabularies(ours, ours))
    assert turn.same == 4
    assert turn.pairs()[-1][0] == turn.pairs()[-1][1] < len(turn.tokens[0]) - 1


def test_several_turns(sides):
    """--completions dataset: every assistant turn, each aligned by itself; one cut short."""
    ours, theirs = pair = common.Pair(sides["byte-level 300"], sides["sentencepiece 500"])
    both = vocabularies(ours, theirs)
    talk = [conversation("What is 12?", "It is 3 * 4.", "And 🇩🇪?", "Germany, wirklich!")]
    (whole,), _ = common.dataset_examples(common.tokenize_prompts(talk, pair, 500), pair, 500)
    found = turns(whole, both)
    texts = [b"".join(tokens).strip() for turn in found for tokens in turn.tokens]
    first, second = b"It is 3 * 4." + END, b"Germany, wirklich!" + END
    assert texts == [first, first, second, second]
    assert [t.same for t in found] == [len(first), len(second)]
    student, teacher = whole.student, whole.teacher
    (id_,) = both[0].ids[found[1].tokens[0][0]]
    assert student.ids[student.targets[found[1].first[0]]] == id_
    short = teacher._replace(targets=teacher.targets[: found[1].first[1] + 2])
    again = turns(dataclasses.replace(whole, teacher=short), both)
    assert again[0] == found[0] and len(again[1].tokens[1]) == 2
    assert again[1].pairs() == [p for p in found[1].pairs() if p[1] < 2]


def test_bytes_read():
    """A space that only one text begins with is part of what that model has read."""
    turn = Turn((0, 0), ([b"a", b"ab", b"c"], [b" aab", b"c"]), ([0, 1, 3, 4], [0, 3, 4]), 4)
    assert turn.pairs() == [(0, 0), (1, 0), (2, 1)]
    assert [turn.bytes_read(*p) for p in turn.pairs()] == [(b"", b""), (b"", b" a"), (b"", b"")]
    turn = Turn((0, 0), ([b"abc", b"d"], [b"ab", b"cd"]), ([0, 3, 4], [0, 2, 4]), 4)
    assert [turn.bytes_read(*p) for p in turn.pairs()] == [(b"", b""), (b"ab", b""), (b"", b"c")]
    assert turn.boundaries() == [(0, 0)]


@pytest.mark.parametrize("name", ["byte-level 500", "sentencepiece 500", "characters 300"])
def test_one_tokenizer_is_token_level(sides, name):
    """Target i against target i, all of them, and nothing inside a token."""
    model = sides[name]
    examples = [example(model, model, text, i) for i, text in enumerate(filter(None, TEXTS))]
    alignments = aligned(examples, model, model)
    for e in examples:
        targets = torch.arange(len(e.student.targets), dtype=torch.int32)
        assert torch.equal(alignments.pairs[e.index][:, :2], targets[:, None].expand(-1, 2))
        assert (alignments.pairs[e.index][:, 2] == BOUNDARY).all()
    numbers = alignments.report()
    assert set(numbers.values()) == {1.0}


def test_bytes_that_cannot_be_known(sides):
    raw = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece()
    with pytest.raises(common.UsageError, match=r"a \[UNK\] model.*decodes by WordPiece"):
        token_bytes(wrapped(raw, False, "[UNK]"))
    raw.decoder = None
    with pytest.raises(common.UsageError, match="decodes by nothing"):
        token_bytes(wrapped(raw, False, "[UNK]"))
    upper = byte_level(300, [*SPECIAL, "<done>"])
    upper.normalizer = normalizers.Replace(Regex("[\\s\\S]"), "#")  # gives no text back
    pair = (wrapped(upper, False, "<done>"), sides["byte-level 300"])
    with pytest.raises(common.UsageError, match="do not give the same text back"):
        aligned([example(*pair, "abc")], *pair)


@pytest.mark.parametrize(("student", "teacher"), PAIRS[:1] + PAIRS[5:6])
def test_what_is_compared_is_what_the_text_shows(sides, student, teacher):
    """A pair's case follows from its places, and both of its tokens have the same outcome."""
    ours, theirs = sides[student], sides[teacher]
    e = example(ours, theirs, "".join(TEXTS))
    alignments = aligned([e], ours, theirs)
    (turn,) = turns(e, alignments.vocabularies)
    pairs = [pair for pair in alignments.pairs[e.index].tolist() if pair[2] != UNMATCHED]
    assert len(pairs) > 0.8 * len(turn.pairs())
    bytes_read = {number: read for read, number in alignments.numbers.items()}
    for i, j, number in pairs:
        place, its = turn.begins[0][i], turn.begins[1][j]
        token, counterpart = turn.tokens[0][i], turn.tokens[1][j]
        context, read = alignments.contexts[number], bytes_read[number]
        assert context.agrees(token, counterpart)
        outcomes = context.outcomes[0][token], context.outcomes[1][counterpart]
        assert outcomes[0] == outcomes[1] > REMAINDER
        assert [len(part) for part in read] == [max(0, its - place), max(0, place - its)]
        if number == BOUNDARY:
            assert place == its
            continue
        inside, outside = (token, counterpart) if read[0] else (counterpart, token)
        assert inside.startswith(max(read))
        assert inside[len(max(read)) :].startswith(outside)


def test_ids_with_the_same_bytes(sides):
    """A character and its byte token (SentencePiece) have the same outcome in every context."""
    models_ = sides["byte-level 300"], sides["sentencepiece 500"]
    examples = [example(*models_, text, i) for i, text in enumerate(TEXTS)]
    alignments = aligned(examples, *models_)
    outcomes = alignments.outcomes(list(range(len(alignments.contexts))), 1)
    equal = [ids for ids in alignments.vocabularies[1].ids.values() if len(ids) > 1]
    assert len(outcomes) > 20 and len(equal) > 20
    for ids in equal:
        assert (outcomes[:, ids] == outcomes[:, ids[:1]]).all()


def test_summary(sides):
    """The example that is printed, the student's tokens above the teacher's, and the numbers."""
    models_ = sides["byte-level 300"], sides["characters 300"]
    e = example(*models_, "the e\u0301")
    student, teacher, numbers = aligned([e], *models_, loss="uld").summary(e).split("\n")
    assert student.startswith("  student ") and teacher.startswith("  teacher t|h|e")
    places = [[i for i, c in enumerate(line) if c == "¦"] for line in (student, teacher)]
    assert places[0] == places[1] and student.endswith("<end>") and teacher.endswith("<end>")
    assert numbers.startswith("alignment: vocabulary_overlap ")


@pytest.mark.real
@pytest.mark.skipif(
    not (MODELS / "smollm2" / "tokenizer.json").exists(),
    reason="DISTIL_REAL_MODELS names no directory with smollm2/",
)
@pytest.mark.parametrize("name", ["byte-level 500", "sentencepiece 500", "characters 300"])
@pytest.mark.parametrize("teaches", [True, False])
def test_real_tokenizer(sides, name, teaches):
    """SmolLM2's tokenizer, which splits digits, as student and as teacher with each kind."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "smollm2")
    real = without_weights("smollm2", tokenizer, tokenizer.eos_token_id)
    pair = (sides[name], real) if teaches else (real, sides[name])
    examples = [example(*pair, text, i) for i, text in enumerate(TEXTS)]
    for e in examples:
        assert_covers(e, vocabularies(*pair))
    assert aligned(examples, *pair).report()["compared_tokens"] > 0.7
