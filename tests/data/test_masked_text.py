"""Documents of sentences, and the pieces, pairs and masks that BERT is pretrained on."""

import itertools
import math
import pickle
import random
import string
import tracemalloc
from collections import Counter

import numpy as np
import pytest
import torch

from nlpfast.data.biographies import biographies
from nlpfast.data.lines import DataError
from nlpfast.data.masked_text import (
    MASKINGS,
    MaskedTextDataset,
    collate_masked,
    count_masked,
    embedded_documents,
    read_documents_of_sentences,
    unigram_entropy,
)
from nlpfast.data.text_documents import Document, encode_documents

PAD, UNK, CLS, SEP, MASK = 0, 1, 28, 55, 56


FIRST = dict(zip(string.ascii_lowercase, range(2, 28), strict=True))
WITHIN = dict(zip(string.ascii_lowercase, range(29, 55), strict=True))


class Letters:
    """Every letter is a piece: one number where a word begins, another within; digits are unknown."""

    cls_id, sep_id, mask_id = CLS, SEP, MASK
    special_ids = frozenset((PAD, UNK, CLS, SEP, MASK))
    continues = tuple(29 <= number < 55 for number in range(57))

    def __len__(self):
        return 57

    def encode(self, text):
        found = []
        for word in text.lower().split():
            table = FIRST
            for char in word:
                found.append(table.get(char, UNK))
                table = WITHIN
        return found

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]


LETTERS = Letters()
ORDINARY = sorted(set(range(57)) - LETTERS.special_ids)


def dataset(documents, **options):
    return MaskedTextDataset(documents, LETTERS, **{"nsp": False, **options})


def epochs(data, index, number):
    """An item in many epochs."""
    for data.epoch in range(number):
        yield data[index]


def joined(rows):
    return list(itertools.chain.from_iterable(rows))


def restored(item):
    """The tokens as they were."""
    tokens = list(item.tokens)
    for place, target in zip(item.positions, item.targets, strict=True):
        tokens[place] = target
    return tokens


def close(count, number, probability):
    """Whether a count is within four standard deviations of what is expected."""
    return abs(count - number * probability) <= 4 * math.sqrt(number * probability * (1 - probability))


# --- documents


def test_blank_lines_are_between_documents(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\n  \nfirst\r\n second one\n\t\n\n\xe2\x80\x83\nthird\n\nlast")
    documents, report = read_documents_of_sentences(path)
    assert documents == [["first", " second one"], ["third"], ["last"]]
    assert [document.line for document in documents] == [3, 8, 10]
    assert (report.read, report.used) == (10, 4)
    assert report.skipped["blank"].count == 6 and report.skipped["blank"].first[0] == f"{path}:1"
    assert dataset(documents, source=str(path)).source(2) == f"{path}:8"


@pytest.mark.parametrize(
    ("text", "message"),
    [(" \n\n", "has no sentence; give one a line"), ("", "is empty")],
    ids=["blank", "empty"],
)
def test_a_file_without_a_sentence_is_refused(tmp_path, text, message):
    (tmp_path / "text.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_documents_of_sentences(tmp_path / "text.txt")
    with pytest.raises(DataError, match="no such file"):
        read_documents_of_sentences(tmp_path / "other.txt")


def test_biographies_are_documents(tmp_path):
    documents = embedded_documents(50, seed=3)
    assert [" ".join(document) for document in documents] == biographies(50, 3)
    assert {len(document) for document in documents} == {2, 3}
    assert all(sentence.endswith(".") for document in documents for sentence in document)
    path = tmp_path / "text.txt"
    path.write_text("\n\n".join("\n".join(document) for document in documents))
    read, _ = read_documents_of_sentences(path)
    assert read == documents and [d.line for d in read] == [d.line for d in documents]
    assert embedded_documents(0) == []


def test_sentences_are_stored_one_after_the_other():
    documents = [["", "ab c"], [], ["1 2", ""], Document(["a", "12", "abcdef"], 40), ["b"]]
    found = encode_documents(documents, LETTERS, 4)
    expected = [
        *[[FIRST["a"], WITHIN["b"], FIRST["c"]], [FIRST["a"]]],
        *[[FIRST["a"], WITHIN["b"], WITHIN["c"], WITHIN["d"]], [FIRST["b"]]],
    ]
    assert found.pieces.dtype == np.int32 and found.pieces.tolist() == joined(expected)
    assert found.offsets.tolist() == [0, 3, 4, 8, 9]
    assert found.documents.tolist() == [0, 1, 3, 4]
    # the lines of a file with one blank line between documents
    assert found.lines.tolist() == [2, 40, 42, 44]
    assert (found.truncated, found.left_out) == (1, 4)
    assert encode_documents([["abcd"]], LETTERS, 4).truncated == 0


def test_a_corpus_takes_few_bytes_a_piece():
    documents = [["abcd efgh ijkl mnop qrst"] * 10 for _ in range(800)]
    tracemalloc.start()
    try:
        data = dataset(documents, nsp=True)
        size, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    pieces = 20 * 8000
    assert len(data) == 7200
    assert size < 6 * pieces
    # lists of numbers are of a part of the corpus
    assert peak < 12 * pieces


# --- sentences


def test_a_sentence_with_its_targets_is_whole_again():
    documents = [["abc de", "", "fg"], ["1 2"], ["hijk lm nop"]]
    data = dataset(documents, max_length=9)
    assert len(data) == 3 and (data.left_out, data.truncated) == (2, 1)
    assert [data.source(i) for i in range(3)] == ["documents:1", "documents:3", "documents:7"]
    for index, text in enumerate(("abc de", "fg", "hijk lm n")):
        for item in epochs(data, index, 20):
            assert restored(item) == [CLS, *LETTERS.encode(text), SEP]
            assert item.types == [0] * len(item.tokens) and item.is_next is None
            assert len(item.positions) == 1
            assert 0 < item.positions[0] < len(item.tokens) - 1
    assert len(dataset([["a"]], max_length=3)[0].tokens) == 3
    for index in (-1, 3):
        with pytest.raises(IndexError, match="outside the 3 items"):
            data[index]
        with pytest.raises(IndexError, match="outside the 3 items"):
            data.source(index)


@pytest.mark.parametrize("pieces", [1, 2, 3, 4, 10, 16, 17, 30, 90])
def test_a_share_of_the_pieces_are_targets(pieces):
    data = dataset([[" ".join("a1" * pieces)]], max_length=1000)
    for item in epochs(data, 0, 5):
        assert len(item.positions) == len(item.targets) == max(1, round(0.15 * pieces))
        assert item.positions == sorted(set(item.positions))
        # unknown pieces are special
        assert item.targets == [FIRST["a"]] * len(item.targets)
    half = dataset([["a" * pieces]], probability=0.5, max_length=1000)[0]
    assert len(half.positions) == max(1, round(0.5 * pieces))
    assert len(dataset([["a" * pieces]], probability=1, max_length=1000)[0].positions) == pieces


def test_every_place_is_a_target_as_often_as_any_other():
    places = Counter(p for item in epochs(dataset([["a" * 40]]), 0, 2000) for p in item.positions)
    assert sorted(places) == list(range(1, 41))
    assert all(close(count, 2000, 0.15) for count in places.values())


@pytest.mark.parametrize("masking", MASKINGS)
def test_what_becomes_of_targets(masking):
    data = dataset([["abcde fg h ijk " * 7]], masking=masking)
    fates, strangers, number = Counter(), Counter(), 0
    for item in epochs(data, 0, 1000):
        for place, target in zip(item.positions, item.targets, strict=True):
            seen = item.tokens[place]
            number += 1
            fates["masked" if seen == MASK else "same" if seen == target else "other"] += 1
            if seen not in (MASK, target):
                strangers[seen] += 1
    # one of the random pieces in so many is what was there
    same = 0.1 / len(ORDINARY)
    assert close(fates["masked"], number, 0.8)
    assert close(fates["other"], number, 0.1 - same) and close(fates["same"], number, 0.1 + same)
    assert set(strangers) <= set(ORDINARY)
    rare = [strangers[piece] for piece in ORDINARY if piece not in LETTERS.encode("abcde fg h ijk")]
    assert all(close(count, number, same) for count in rare)


# --- whole words


def spans_of(item):
    """Where each run of targets begins, and its length."""
    found = []
    for place in item.positions:
        if found and place == sum(found[-1]):
            found[-1] = (found[-1][0], found[-1][1] + 1)
        else:
            found.append((place, 1))
    return found


TEXT = "a bc def ghij klmno p qr stu vwxy zabcd " * 4


@pytest.mark.parametrize("masking", ["words", "ngrams"])
def test_words_are_whole(masking):
    data = dataset([[TEXT]], masking=masking, max_length=200)
    tokens = [CLS, *LETTERS.encode(TEXT), SEP]
    words = Counter()
    for item in epochs(data, 0, 2000):
        chosen = set(item.positions)
        for place in chosen:
            if Letters.continues[tokens[place]]:
                assert place - 1 in chosen
            if Letters.continues[tokens[place + 1]]:
                assert place + 1 in chosen
        words.update(place for place in chosen if not Letters.continues[tokens[place]])
        assert item.positions == sorted(chosen) and item.targets == [tokens[p] for p in item.positions]
    begins = [place for place, token in enumerate(tokens) if token in FIRST.values()]
    assert sorted(words) == begins
    if masking == "words":
        # long words are hidden as often as short ones
        rates = {n: [] for n in range(1, 6)}
        for place, stop in itertools.pairwise([*begins, len(tokens) - 1]):
            rates[stop - place].append(words[place] / 2000)
        for rate in rates.values():
            assert np.mean(rate) == pytest.approx(0.15, abs=0.012)


@pytest.mark.parametrize("masking", ["words", "ngrams"])
@pytest.mark.parametrize("text", [TEXT, "ab " * 20, "abcd efgh " * 5, "abc " * 9], ids=len)
def test_the_budget_is_met_on_average(masking, text):
    pieces = len(LETTERS.encode(text))
    counts = [len(i.positions) for i in epochs(dataset([[text]], masking=masking, max_length=200), 0, 2000)]
    deviation = np.std(counts) / math.sqrt(len(counts))
    assert abs(np.mean(counts) - round(0.15 * pieces)) <= 4 * deviation + 1e-9
    assert max(counts) < round(0.15 * pieces) + 5


@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("nsp", [False, True])
def test_fifteen_percent_of_a_corpus_are_targets(masking, nsp):
    draws = random.Random(1)
    sentences = [
        " ".join("abcd"[: draws.randint(1, 4)] for _ in range(draws.randint(5, 40))) for _ in range(800)
    ]
    data = dataset([sentences[i : i + 8] for i in range(0, 800, 8)], masking=masking, nsp=nsp)
    items = [data[i] for i in range(len(data))]
    share = sum(len(item.positions) for item in items) / sum(
        token not in LETTERS.special_ids for item in items for token in restored(item)
    )
    assert share == pytest.approx(0.15, abs=0.003)


@pytest.mark.parametrize("masking", ["words", "ngrams"])
def test_a_word_is_hidden_though_none_fits(masking):
    found = Counter()
    for item in epochs(dataset([["abcd efg"]], masking=masking), 0, 1000):
        found["".join(map(str, item.positions))] += 1
    assert set(found) == {"1234", "567"}
    assert close(found["567"], 1000, 0.5)


@pytest.mark.parametrize("masking", ["words", "ngrams"])
def test_a_special_piece_ends_a_word(masking):
    """What continues after one is a word of its own, as nobody knows what the special piece hides."""
    places = {tuple(i.positions) for i in epochs(dataset([["a1b"]], masking=masking, probability=0.5), 0, 50)}
    assert places == {(1,), (3,)}


def test_lengths_of_spans():
    """Three targets are a span of 3 words, or of 2 and of 1, or three of 1."""
    data = dataset([["a " * 800]], masking="ngrams", max_length=802, probability=3 / 800)
    kinds = Counter(len(spans_of(item)) for item in epochs(data, 0, 3000))
    one, two, three = 6 / 11, 3 / 11, 2 / 11
    for spans, probability in ((1, three), (2, two + one * (two + three)), (3, one * one)):
        # spans drawn beside each other look like one
        assert abs(kinds[spans] - 3000 * probability) <= 4 * math.sqrt(3000 * probability) + 3000 * 0.01


def test_spans_do_not_go_over_special_pieces():
    data = dataset([["a 1 " * 40]], masking="ngrams", probability=2 / 40)
    apart = Counter(b - a for a, b in (item.positions for item in epochs(data, 0, 1500)))
    assert set(apart) <= {2 * n for n in range(1, 40)}
    # as often as of two words that are drawn apart from each other
    assert close(apart[2], 1500, 2 / 40)


# --- pairs

PAIRED = [
    ["ab", "cde f", "g", "h i j k", "lm"],
    ["n"],
    ["op qr", "stu", "1 2", "vwx yz"],
    ["abcdefghijklmnopq", "b", "c", "d", "e"],
    ["zz", "yy"],
]


def parts(item):
    """A and B, restored."""
    tokens = restored(item)
    middle = tokens.index(SEP)
    assert tokens[0] == CLS and tokens[-1] == SEP and tokens.count(SEP) == 2
    assert item.types == [0] * (middle + 1) + [1] * (len(tokens) - middle - 1)
    assert all(token not in (CLS, SEP) for token in item.targets)
    return tuple(tokens[1:middle]), tuple(tokens[middle + 1 : -1])


def expected_pairs(max_length):
    """Of each item: document, A, and the sentences that B is of if it follows."""
    room = max_length - 3
    for number, document in enumerate(PAIRED):
        rows = [LETTERS.encode(text)[: room // 2] for text in document]
        rows = [row for row in rows if set(row) != {UNK}]
        for begin in range(len(rows) - 1):
            end = begin + 1
            while end + 1 < len(rows) and len(joined(rows[begin : end + 1])) <= room // 2:
                end += 1
            yield number, tuple(joined(rows[begin:end])), rows[end:]


def as_far_as_fits(rows, room):
    end = 1
    while end < len(rows) and len(joined(rows[: end + 1])) <= room:
        end += 1
    return tuple(joined(rows[:end]))


@pytest.mark.parametrize("max_length", [5, 6, 9, 14, 15, 30, 128])
def test_pairs(max_length):
    data = dataset(PAIRED, nsp=True, max_length=max_length)
    expected = list(expected_pairs(max_length))
    assert len(data) == len(expected) == 4 + 2 + 4 + 1 and data.left_out == 1
    longer = (len(LETTERS.encode(text)) > (max_length - 3) // 2 for text in itertools.chain(*PAIRED))
    # the sentence that is left out is not counted as cut
    assert data.truncated == sum(longer) - (max_length < 7)
    for index, (document, first, rows) in enumerate(expected):
        room = max_length - 3 - len(first)
        elsewhere = {as_far_as_fits(others, room) for number, _, others in expected if number != document}
        seen, follows = set(), 0
        for item in epochs(data, index, 100):
            a, b = parts(item)
            assert len(item.tokens) <= max_length and a == first
            if item.is_next:
                assert item.is_next == 1 and b == as_far_as_fits(rows, room)
                follows += 1
            else:
                assert item.is_next == 0
                seen.add(b)
        assert seen <= elsewhere
        assert close(follows, 100, 0.5)


def test_places_of_other_documents_are_drawn_evenly():
    documents = [["a", "b", "c"], ["d", "e"], ["f", "g", "h", "i"]]
    data = dataset(documents, nsp=True, max_length=5)
    for index, others in ((0, "eghi"), (1, "eghi"), (2, "bcghi"), (3, "bce"), (5, "bce")):
        items = list(epochs(data, index, 1500))
        assert close(sum(item.is_next for item in items), 1500, 0.5)
        found = Counter(parts(item)[1] for item in items if not item.is_next)
        assert set(found) == {(FIRST[letter],) for letter in others}
        assert all(close(count, sum(found.values()), 1 / len(others)) for count in found.values())


def test_nothing_can_be_told_from_the_second_part_alone():
    """First sentences follow nothing, so B does not begin with one when it does not follow either."""
    documents = [["a", "b", "c"], ["d", "e", "f"], ["g", "h"]] * 5
    data = dataset(documents, nsp=True, max_length=7)
    seen = {0: set(), 1: set()}
    for index in range(len(data)):
        for item in epochs(data, index, 60):
            seen[item.is_next].add(parts(item)[1])
    assert seen[0] == seen[1]


def test_lines_of_pairs():
    data = dataset([Document(["a", "b", "c"], 3), ["d"], ["e", "1", "f"]], nsp=True, source="text.txt")
    assert [data.source(i) for i in range(len(data))] == ["text.txt:3", "text.txt:4", "text.txt:9"]


# --- draws, errors


@pytest.mark.parametrize("nsp", [False, True])
def test_draws_depend_on_seed_epoch_and_index_alone(nsp):
    documents = embedded_documents(20)
    one, other = (dataset(documents, nsp=nsp, masking="ngrams", seed=5) for _ in range(2))
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = [one[i] for i in (0, 3, 0)]
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    again = pickle.loads(pickle.dumps(other))
    assert [again[i] for i in (0, 3, 0)] == first and first[0] == first[2]
    again.epoch = 1
    assert again[3] != first[1]
    assert dataset(documents, nsp=nsp, masking="ngrams", seed=6)[3] != first[1]
    same = dataset([["abcdefghij " * 5]] * 2, seed=5)
    assert same[0].positions != same[1].positions
    assert dataset(documents, seed=2**64 - 1)[0].targets


@pytest.mark.parametrize(
    ("documents", "options", "error", "message"),
    [
        ([], {}, DataError, "documents: no sentence has a piece that can be masked"),
        ([["1", ""], []], {"source": "t.txt"}, DataError, "t.txt: no sentence has a piece"),
        (
            [["a", "b"]],
            {"nsp": True},
            DataError,
            "two sentences or more: 1, next sentence prediction needs 2",
        ),
        ([["a"], ["b"]], {"nsp": True}, DataError, "two sentences or more: 0, next"),
        ([["a"]], {"max_length": 2}, ValueError, "max_length=2 must be at least 3 with nsp=False"),
        (
            [["a"]],
            {"max_length": 4, "nsp": True},
            ValueError,
            "max_length=4 must be at least 5 with nsp=True",
        ),
        ([["a"]], {"masking": "word"}, ValueError, "masking='word' must be one of pieces, words, ngrams"),
        ([["a"]], {"probability": 0.0}, ValueError, "probability=0.0 must be above 0 and at most 1"),
        ([["a"]], {"probability": 1.1}, ValueError, "probability=1.1 must be above 0"),
        ([["a"]], {"seed": -1}, ValueError, "seed=-1 must be in 0"),
        ([["a"]], {"seed": 2**64}, ValueError, r"must be in 0..2\^64-1"),
    ],
)
def test_what_cannot_be_is_refused(documents, options, error, message):
    with pytest.raises(error, match=message):
        dataset(documents, **options)


# --- batches


@pytest.mark.parametrize("nsp", [False, True])
def test_a_batch_has_the_places_of_its_targets(nsp):
    data = dataset(embedded_documents(5), nsp=nsp)
    items = [data[i] for i in range(4)]
    batch = collate_masked(items)
    ends = batch.packed.cu_seqlens
    assert batch.packed.sentences == 4
    assert ends[1:5].diff(prepend=ends[:1]).tolist() == [len(item.tokens) for item in items]
    assert batch.rows.dtype == batch.targets.dtype == torch.int64
    assert len(batch.rows) == len(batch.targets) == count_masked(batch) == sum(len(i.targets) for i in items)
    tokens = batch.packed.input_ids.clone()
    assert tokens[: ends[4]].tolist() == joined(item.tokens for item in items)
    tokens[batch.rows] = batch.targets
    assert tokens[: ends[4]].tolist() == joined(map(restored, items))
    assert batch.packed.token_type_ids[: ends[4]].tolist() == joined(item.types for item in items)
    if nsp:
        assert batch.is_next.dtype == torch.int64
        assert batch.is_next.tolist() == [item.is_next for item in items]
    else:
        assert batch.is_next is None


def test_entropy_of_frequencies():
    assert unigram_entropy(dataset([["a a a", "b 1 2"]])) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )
    alphabet = dataset([[" ".join(string.ascii_lowercase)], ["12"]])
    assert unigram_entropy(alphabet) == pytest.approx(math.log(26))
    assert unigram_entropy(dataset([["a a"]])) == 0.0
