"""Questions with answers, and documents with a hole: their strings, their distribution, their errors."""

import pickle

import numpy as np
import pytest
import torch

from nlpfast.data.birthplaces import (
    MASK,
    PAD,
    CharCorruptionDataset,
    NameDataset,
    corpus_vocabulary,
    packed,
    padded,
)
from nlpfast.data.text import DataError

WORDS = "Ada Abbott was born in Rome. Émil Bell\tx"
VOCABULARY = corpus_vocabulary([WORDS, "Where was?"])


def text_of(item):
    """The string of an item, from x and the last target."""
    x, y = item
    return VOCABULARY.decode(torch.cat((x, y[-1:])))


def test_the_vocabulary_is_that_of_the_assignment():
    vocabulary = corpus_vocabulary(["ba", "", "éb"])
    assert vocabulary.chars == [PAD, MASK, "\n", "a", "b", "é"]
    for char in (PAD, MASK):
        with pytest.raises(DataError, match=f"wiki:2: has {char!r}, which marks what is no text"):
            corpus_vocabulary(["a", f"b{char}"], "wiki")


def test_the_answer_alone_counts():
    data = NameDataset(["Where was Ada?\tRome", "W\tR"], VOCABULARY, 24, source="train.tsv")
    x, y = data[0]
    assert len(data) == 2 and x.shape == y.shape == (23,) and x.dtype == torch.int64
    assert VOCABULARY.decode(x) == "Where was Ada?⁇Rome⁇" + PAD * 3
    # as in the assignment: the first target is the mark before the answer
    assert VOCABULARY.decode(y) == PAD * 13 + "⁇Rome⁇" + PAD * 4
    assert torch.equal(y[13:], torch.cat((x, torch.tensor([0])))[14:])
    assert VOCABULARY.decode(data[1][1]) == "⁇R⁇" + PAD * 20
    assert data.source(1) == "train.tsv:2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("Where was Ada?", "names:2: has 0 answers after the question"),
        ("Where was Ada?\tRome\tBern", "names:2: has 2 answers"),
        ("Where was Ada\tAAAAAAAAAA", "names:2: has 23 characters, block_size=24 takes 22"),
        ("Where is Ada?\tZ", "names:2: text has 'Z'"),
    ],
)
def test_lines_that_do_not_fit_are_named(row, message):
    with pytest.raises(DataError, match=message):
        NameDataset(["W\tR", row], VOCABULARY, 24)


DOCUMENTS = ["Ada Abbott was born in Rome. " * 6, "Émil", "", "Ada was"]


@pytest.mark.parametrize("compat", [None, "seed"])
def test_a_document_can_be_put_together_again(compat):
    data = CharCorruptionDataset(DOCUMENTS, VOCABULARY, 64, compat=compat)
    for epoch in range(40):
        data.epoch = epoch
        for index, document in enumerate(DOCUMENTS):
            x, y = data[index]
            assert x.shape == y.shape == (63,) and torch.equal(x[1:], y[:-1])
            text, _, padding = text_of((x, y)).partition(PAD)
            assert not padding.strip(PAD)
            before, after, span = text.split(MASK)
            assert document.startswith(before + span + after)
            assert min(4, len(document)) <= len(before + span + after) <= 56


def spans(length, compat, block_size=128):
    """Lengths of spans and of cuts of one document in many epochs."""
    data = CharCorruptionDataset(["a" * length], VOCABULARY, block_size, compat=compat)
    found = []
    for epoch in range(6000):
        data.epoch = epoch
        before, after, span = text_of(data[0]).rstrip(PAD).split(MASK)
        found.append((len(span), len(before) + len(after) + len(span), len(before)))
    return np.array(found).T


@pytest.mark.parametrize("length", [1000, 60, 30, 10, 4])
def test_a_quarter_is_missing_whatever_the_document_has(length):
    sizes, cuts, starts = spans(length, None)
    assert (sizes / cuts).mean() == pytest.approx(0.25, abs=0.01)
    assert sizes.min() >= 1
    # any place: as often in the first half as in the second
    middles = (starts + sizes / 2) / cuts
    assert middles.mean() == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize(("length", "empty"), [(1000, 0.0), (60, 0.0535), (30, 0.297), (10, 0.66)])
def test_the_distribution_of_the_seed(length, empty):
    """As it was measured on the seed's code: how often nothing is missing, and how much of long documents."""
    sizes, cuts, _ = spans(length, "seed")
    assert (sizes == 0).mean() == pytest.approx(empty, abs=0.02)
    if length == 1000:
        assert (sizes / cuts).mean() == pytest.approx(0.2327, abs=0.006)
        assert set(sizes[cuts < 8]) == {1}


NAMED = "Ada Bell. Ada Bell was born in New York (Rome), to Émil O'Hara-Smith and a mother from Rome in May"
KNOWN = corpus_vocabulary([NAMED, "ada was", "Aachen Berlin"])


def test_names_are_asked_for_once_the_text_has_them():
    data = CharCorruptionDataset([NAMED], KNOWN, 128, spans="names")
    found = set()
    for epoch in range(400):
        data.epoch = epoch
        x, y = data[0]
        before, after, span = KNOWN.decode(torch.cat((x, y[-1:]))).rstrip(PAD).split(MASK)
        cut = before + span + after
        assert NAMED.startswith(cut)
        # nothing that has a beginning before, and nothing whose end is not in sight
        named = [word for word in ("New York", "Rome", "Émil O'Hara-Smith") if word in cut[:-2]]
        if named:
            assert span in named and span not in before
            found.add(span)
    assert found == {"New York", "Rome", "Émil O'Hara-Smith"}


def test_a_document_without_names_loses_any_span():
    for document in ("ada was", "Aachen Berlin", "a", ""):
        plain, named = (
            CharCorruptionDataset([document], KNOWN, 64, spans=spans) for spans in ("random", "names")
        )
        for epoch in range(30):
            plain.epoch = named.epoch = epoch
            assert torch.equal(plain[0][0], named[0][0])


def test_draws_depend_on_seed_epoch_and_index_alone():
    one, other = (CharCorruptionDataset(DOCUMENTS, VOCABULARY, 64, seed=5) for _ in range(2))
    torch.manual_seed(1), np.random.seed(1)
    first = [text_of(one[i]) for i in (0, 3, 0)]
    torch.manual_seed(2), np.random.seed(2)
    again = pickle.loads(pickle.dumps(other))
    assert [text_of(again[i]) for i in (0, 3, 0)] == first
    again.epoch = 1
    assert text_of(again[0]) != first[0]
    assert text_of(CharCorruptionDataset(DOCUMENTS, VOCABULARY, 64, seed=6)[0]) != first[0]
    assert one.source(3) == "corpus:4"


@pytest.mark.parametrize(
    ("documents", "options", "error", "message"),
    [
        ([], {}, DataError, "corpus: has no documents"),
        (["a"], {"block_size": 5}, ValueError, "block_size=5 must be at least 6"),
        (["a"], {"compat": "sead"}, ValueError, "compat='sead' must be None or 'seed'"),
        (["a"], {"spans": "words"}, ValueError, "spans='words' must be 'random' or 'names'"),
    ],
)
def test_what_cannot_be_is_refused(documents, options, error, message):
    with pytest.raises(error, match=message):
        CharCorruptionDataset(documents, VOCABULARY, **{"block_size": 64, **options})
    with pytest.raises(IndexError):
        CharCorruptionDataset(["a"], VOCABULARY, 64)[1]


@pytest.mark.parametrize("compat", [None, "seed"])
def test_a_prefix_is_all_but_the_span(compat):
    plain = CharCorruptionDataset(DOCUMENTS, VOCABULARY, 64, compat=compat)
    data = CharCorruptionDataset(DOCUMENTS, VOCABULARY, 64, compat=compat, prefix=True)
    for epoch in range(20):
        plain.epoch = data.epoch = epoch
        for index in range(len(DOCUMENTS)):
            x, y, prefix = data[index]
            assert torch.equal(x, plain[index][0])
            before, after, span = text_of(plain[index]).rstrip(PAD).split(MASK)
            assert prefix == len(before + after) + 2
            # the mark at the end of the prefix is the first that has something to predict
            assert VOCABULARY.decode(y) == PAD * (prefix - 1) + span + PAD * (64 - prefix - len(span))


def test_the_prefix_of_a_question_has_its_mark():
    data = NameDataset(["Where was Ada?\tRome", "W\tR"], VOCABULARY, 24, prefix=True)
    x, y, prefix = data[0]
    assert prefix == len("Where was Ada?⁇")
    assert torch.equal(x, NameDataset(["Where was Ada?\tRome"], VOCABULARY, 24)[0][0])
    assert VOCABULARY.decode(y) == PAD * 14 + "Rome⁇" + PAD * 4
    assert data[1][2] == 2 and VOCABULARY.decode(data[1][1]) == PAD + "R⁇" + PAD * 20


ITEMS = [
    NameDataset([row], VOCABULARY, 64)[0] for row in ("Where was Ada?\tRome", "W\tR", "Where was?\tRome")
]


def test_a_packed_batch_has_what_is_before_the_last_target():
    tokens, targets, ends, longest = packed(ITEMS)
    assert len(tokens) == len(targets) == ends[-1] == 64 and longest == 19
    assert ends[:4].tolist() == [0, 19, 22, 37]
    for (x, y), start, stop in zip(ITEMS, ends[:-1].tolist(), ends[1:].tolist(), strict=False):
        assert torch.equal(tokens[start:stop], x[: stop - start])
        assert torch.equal(targets[start:stop], y[: stop - start])
        # nothing that counts is left out, and the last one counts
        assert not y[stop - start :].any() and y[stop - start - 1]
    # sequences that fill up to a round number: none longer than the others, and nothing counts
    assert not tokens[37:].any() and not targets[37:].any()
    assert ends.diff().max() == longest and ends.diff().min() > 0


@pytest.mark.parametrize("length", [1, 8, 16, 63, 64, 65, 257])
def test_packed_batches_have_few_sizes(length):
    x = torch.ones(length, dtype=torch.int64)
    for number in (1, 2, 16):
        tokens, targets, ends, longest = packed([(x, x)] * number)
        assert len(tokens) == -(-number * length // 64) * 64 == ends[-1]
        assert longest == length == ends.diff().max()
        assert int(targets.sum()) == number * length


def test_an_item_without_targets_has_one_token():
    nothing = torch.zeros(63, dtype=torch.int64)
    assert packed([(nothing, nothing)])[2][1] == 1
    assert packed([(nothing, nothing), ITEMS[0][:2]])[2][:3].tolist() == [0, 1, 20]


def test_a_padded_batch_is_as_wide_as_its_longest_item():
    x, y = padded(ITEMS)
    assert x.shape == y.shape == (3, 19)
    assert torch.equal(x[1], ITEMS[1][0][:19]) and torch.equal(y[0], ITEMS[0][1][:19])
    data = NameDataset(["Where was Ada?\tRome", "W\tR"], VOCABULARY, 64, prefix=True)
    x, y, prefixes = padded([data[0], data[1]])
    assert x.shape == (2, 19) and prefixes.tolist() == [15, 2]
