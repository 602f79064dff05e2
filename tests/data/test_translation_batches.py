"""Batches of sentence pairs: what is where, which pairs are together, and how links move with the tokens."""

import itertools
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nlpfast.data.alignments import Alignments
from nlpfast.data.packed_sentences import ROUNDED
from nlpfast.data.parallel_text import ParallelText
from nlpfast.data.subword_alignments import subword_alignments
from nlpfast.data.translation_batches import (
    IGNORED,
    TokenPairs,
    TranslationDataset,
    count_targets_of,
    first,
    make_batch,
)
from nlpfast.ops.varlen_attention import varlen_attention

PAD, BOS, EOS = 0, 1, 2
SPECIAL = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS}


def token_pairs(source, target, **limits):
    number = len(source)
    text = ParallelText.of_sentences(["s"] * number, ["t"] * number, "t")
    return TokenPairs(text, source, target, **limits)


def of_lengths(lengths):
    """Pairs with these numbers of tokens, without EOS; each token says which pair it is of."""
    return token_pairs(*([[4 + i] * pair[side] for i, pair in enumerate(lengths)] for side in (0, 1)))


def sentences(tokens, cu, number):
    ends = cu.tolist()[: number + 1]
    return [tokens[a:b].tolist() for a, b in itertools.pairwise(ends)]


def unpacked(batch):
    """The sentences of a batch, after a look at all that is around them."""
    number = batch.sentences
    source = sentences(batch.source, batch.source_cu, number)
    inputs = sentences(batch.target_in, batch.target_cu, number)
    outputs = sentences(batch.target_out, batch.target_cu, number)
    assert len(batch.source) % ROUNDED == len(batch.target_in) % ROUNDED == 0
    assert len(batch.source_cu) == len(batch.target_cu) and batch.target_in.shape == batch.target_out.shape
    for tokens, cu, longest, filler in (
        (batch.source, batch.source_cu, batch.source_longest, PAD),
        (batch.target_in, batch.target_cu, batch.target_longest, PAD),
        (batch.target_out, batch.target_cu, batch.target_longest, IGNORED),
    ):
        assert tokens.dtype == cu.dtype == torch.int64
        assert cu[0] == 0 and cu[-1] == len(tokens) and (cu.diff() >= 0).all()
        assert longest == cu.diff()[:number].max() == cu.diff().max()
        rest = tokens[cu[number] :]
        assert len(rest) < ROUNDED and (rest == filler).all()
    assert all(row[-1] == EOS for row in source + outputs) and all(row[0] == BOS for row in inputs)
    assert [row[:-1] for row in outputs] == [row[1:] for row in inputs]
    return [row[:-1] for row in source], [row[1:] for row in inputs]


def test_a_batch_by_hand():
    batch = make_batch([[5, 6], [7]], [[8], [9, 10, 11]], **SPECIAL)
    assert batch.source.tolist() == [5, 6, EOS, 7, EOS] + [PAD] * 59
    assert batch.target_in.tolist() == [BOS, 8, BOS, 9, 10, 11] + [PAD] * 58
    assert batch.target_out.tolist() == [8, EOS, 9, 10, 11, EOS] + [IGNORED] * 58
    # 59 in threes and 58 in fours: the target has the fewer sequences, and gets empty ones
    assert batch.source_cu.tolist() == [0, 3, 5, *range(8, 65, 3), 64]
    assert batch.target_cu.tolist() == [0, 2, 6, *range(10, 63, 4), *[64] * 6]
    assert (batch.source_longest, batch.target_longest, batch.sentences) == (3, 4, 2)
    assert batch.pairs is None and count_targets_of(batch) == 6
    assert unpacked(batch) == ([[5, 6], [7]], [[8], [9, 10, 11]])
    other = make_batch([[5]], [[0, 6]], pad_id=9, bos_id=0, eos_id=4)
    assert other.source.tolist() == [5, 4] + [9] * 62 and other.target_in.tolist() == [0, 0, 6] + [9] * 61
    assert count_targets_of(other) == 3


@pytest.mark.parametrize(
    ("sources", "targets", "sequences"),
    [
        # the source lacks 3 tokens, one sequence, the target 62, 31 of them; and the other way round
        ([[5] * 60], [[6]], 32),
        ([[5]], [[6] * 60], 32),
        # the source lacks nothing, the target 56, 7 sequences; nor does the other
        ([[5] * 63], [[6] * 7], 8),
        ([[5] * 63], [[6] * 63], 1),
        # only EOS
        ([[]], [[]], 64),
        # 132 and 99 tokens lack 60, 15 sequences, and 29, 10
        ([[5] * 3] * 33, [[6] * 2] * 33, 33 + 15),
    ],
    ids=["source", "target", "one", "none", "empty", "many"],
)
def test_both_sides_have_as_many_sequences(sources, targets, sequences):
    batch = make_batch(sources, targets, **SPECIAL)
    assert unpacked(batch) == (sources, targets)
    assert len(batch.source_cu) == sequences + 1


@pytest.mark.parametrize("named", ["reference", None])
def test_attention_from_target_to_source_is_that_of_each_sentence(named):
    batch = make_batch([[5] * 9, [6], [7] * 4], [[5], [6] * 5, []], **SPECIAL)
    key, query = torch.randn(len(batch.source), 2, 4), torch.randn(len(batch.target_in), 2, 4)
    layout = (batch.target_cu, batch.source_cu, batch.target_longest, batch.source_longest)
    out = varlen_attention(query, key, key, *layout, backend=named)
    for b in range(batch.sentences):
        k = key[batch.source_cu[b] : batch.source_cu[b + 1]].transpose(0, 1)
        rows = slice(int(batch.target_cu[b]), int(batch.target_cu[b + 1]))
        expected = torch.nn.functional.scaled_dot_product_attention(query[rows].transpose(0, 1), k, k)
        torch.testing.assert_close(out[rows].transpose(0, 1), expected)
    without = batch.source_cu.diff() == 0
    assert without.any() and torch.isfinite(out).all()
    for b in without.nonzero().flatten().tolist():
        assert not out[batch.target_cu[b] : batch.target_cu[b + 1]].any()


def test_pairs_move_with_their_tokens():
    # target token 1 of the first sentence to source token 0; of the second 0 to 2 and 1 to 1
    pairs = torch.tensor([[0, 1, 0], [1, 0, 2], [1, 1, 1]])
    before = pairs.clone()
    batch = make_batch([[5, 6], [7, 8, 9]], [[10, 11, 12], [13, 14]], **SPECIAL, pairs=pairs)
    assert batch.pairs.tolist() == [[0, 1, 0], [0, 4, 5], [0, 5, 4]] and batch.pairs.dtype == torch.int64
    linked = [(int(batch.target_out[t]), int(batch.source[s])) for _, t, s in batch.pairs.tolist()]
    assert linked == [(11, 5), (13, 9), (14, 8)]
    assert torch.equal(pairs, before)
    none = make_batch([[5]], [[6]], **SPECIAL, pairs=torch.zeros(0, 3, dtype=torch.int64))
    assert none.pairs.shape == (0, 3)


@pytest.mark.parametrize(
    "bad", [[2, 0, 0], [-1, 0, 0], [0, 3, 0], [0, 0, 2], [1, 2, 0], [1, 0, 3], [1, -1, 0], [1, 0, -1]]
)
def test_pairs_outside_of_their_sentence(bad):
    pairs = torch.tensor([[0, 2, 1], [1, 1, 2], bad])
    with pytest.raises(ValueError, match=r"pairs has \[" + ", ".join(map(str, bad))):
        make_batch([[5, 6], [7, 8, 9]], [[10, 11, 12], [13, 14]], **SPECIAL, pairs=pairs)


@pytest.mark.parametrize(("sources", "targets"), [([], []), ([[5]], []), ([[5]], [[6], [7]])])
def test_what_cannot_be_a_batch(sources, targets):
    with pytest.raises(ValueError, match="give at least one of each"):
        make_batch(sources, targets, **SPECIAL)


token_lists = st.lists(st.integers(3, 9), min_size=1, max_size=12)


@given(
    st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=40),
    st.integers(13, 60),
    st.none() | st.integers(1, 5),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_pair_is_in_one_batch_which_gives_it_back(corpus, max_tokens, max_sentences, padded, seed):
    source, target = ([list(pair[side]) for pair in corpus] for side in (0, 1))
    pairs = token_pairs(source, target)
    options = {"max_tokens": max_tokens, "max_sentences": max_sentences, "padded": padded, "seed": seed}
    dataset = TranslationDataset(pairs, **SPECIAL, **options)
    seen, count = [], 0
    for index in range(len(dataset)):
        rows, batch = dataset.rows(index).tolist(), dataset[index]
        assert unpacked(batch) == ([source[i] for i in rows], [target[i] for i in rows])
        lengths = [(len(source[i]) + 1, len(target[i]) + 1) for i in rows]
        assert lengths == sorted(lengths)
        sums = [sum(side) for side in zip(*lengths, strict=True)]
        size = len(rows) * max(map(max, lengths)) if padded else max(sums)
        assert 0 < size <= max_tokens and len(rows) <= (max_sentences or len(rows))
        assert seen == [] or (len(source[seen[-1]]), len(target[seen[-1]])) <= (
            len(source[rows[0]]),
            len(target[rows[0]]),
        )
        seen += rows
        count += count_targets_of(batch)
    assert sorted(seen) == list(range(len(corpus)))
    assert count == dataset.count == sum(map(len, target)) + len(target)


def batches(lengths, **options):
    dataset = TranslationDataset(of_lengths(lengths), **SPECIAL, **options)
    return [dataset.rows(index).tolist() for index in range(len(dataset))]


def test_batches_are_as_full_as_they_may_be():
    # with EOS: sources 3, 4, 5, 9, targets 2, 9, 5, 3; the order is by source, then target
    lengths = [(4, 4), (2, 1), (8, 2), (3, 8)]
    assert batches(lengths, max_tokens=12) == [[1, 3], [0], [2]]
    assert batches(lengths, max_tokens=11) == [[1, 3], [0], [2]]
    assert batches(lengths, max_tokens=10) == [[1], [3], [0], [2]]
    assert batches(lengths, max_tokens=16) == [[1, 3, 0], [2]]
    assert batches(lengths, max_tokens=21) == [[1, 3, 0, 2]]
    assert batches(lengths, max_tokens=21, max_sentences=2) == [[1, 3], [0, 2]]
    assert batches(lengths, max_tokens=17, padded=True) == [[1], [3], [0], [2]]
    assert batches(lengths, max_tokens=18, padded=True) == [[1, 3], [0, 2]]
    assert batches(lengths, max_tokens=27, padded=True) == [[1, 3, 0], [2]]
    assert batches([(1, 3), (1, 2), (1, 4)], max_tokens=100) == [[1, 0, 2]]
    # each cut begins anew: of padded batches the longest sentence too
    assert batches([(1, 8), (2, 1), (3, 1), (4, 1)], max_tokens=10, padded=True) == [[0], [1, 2], [3]]


def test_the_seed_orders_pairs_of_the_same_lengths():
    lengths = [(3, 3)] * 50
    once, again, other = (batches(lengths, max_tokens=40, seed=seed) for seed in (0, 0, 1))
    assert once == again != other and once[0] != sorted(once[0])
    assert list(map(len, once)) == [10] * 5 == list(map(len, other))
    assert batches(lengths, max_tokens=40) == once


def test_batches_say_where_they_are_from():
    dataset = TranslationDataset(of_lengths([(1, 1), (2, 1), (3, 1), (4, 1)]), **SPECIAL, max_tokens=9)
    assert [dataset.source(0), dataset.source(1)] == ["t:1, t:2, t:3", "t:4"]
    dataset = TranslationDataset(of_lengths([(1, 1), (2, 1), (3, 1), (4, 1)]), **SPECIAL, max_tokens=14)
    assert dataset.source(0) == "t:1, t:2, t:3, ..."
    with pytest.raises(IndexError):
        dataset[1]


def test_arguments_that_cannot_be():
    pairs = of_lengths([(1, 1), (1, 9), (4, 1)])
    with pytest.raises(ValueError, match="max_tokens=9, but t:2 has 10 with EOS"):
        TranslationDataset(pairs, **SPECIAL, max_tokens=9)
    with pytest.raises(ValueError, match="max_sentences=0 must be >= 1"):
        TranslationDataset(pairs, **SPECIAL, max_tokens=10, max_sentences=0)
    links = subword_alignments(Alignments.from_links([[], [], []]), pairs)
    with pytest.raises(ValueError, match="alignments and encode are both given"):
        TranslationDataset(pairs, **SPECIAL, max_tokens=10, alignments=links, encode=lambda *_: [])


def test_alignments_of_batches():
    source, target = [[10, 11], [20], [30, 31, 32]], [[13], [23, 24], [33, 34]]
    pairs = token_pairs(source, target)
    # the link of the third sentence to EOS takes all of its links
    links = Alignments.from_links([[(1, 0)], [(0, 1), (0, 0)], [(0, 0), (3, 0)]])
    aligned = subword_alignments(links, pairs)
    dataset = TranslationDataset(pairs, **SPECIAL, max_tokens=12, alignments=aligned)
    (batch,) = [dataset[index] for index in range(len(dataset))]
    linked = [(e, int(batch.source[s]), int(batch.target_out[t])) for e, t, s in batch.pairs.tolist()]
    assert linked == [(0, 20, 24), (0, 20, 23), (0, 11, 13)]
    # row t predicts the token: it reads the one before
    assert [int(batch.target_in[t]) for _, t, _ in batch.pairs.tolist()] == [23, BOS, BOS]
    assert TranslationDataset(pairs, **SPECIAL, max_tokens=12)[0].pairs is None


def test_sentences_are_encoded_anew_each_epoch():
    text = ParallelText.of_sentences(["a", "", "b", "c", "d"], ["t"] * 5, "t")
    pairs = TokenPairs(text, [[4], [5], [6] * 9, [7]], [[8], [9], [9], [9, 9]], max_length=4)
    asked = []

    def encode(side, rows, epoch):
        asked.append((side, rows, epoch))
        lengths = {0: 3, 1: 4, 3: 0}
        return [[100 * epoch + row] * (lengths[row] if side == 0 else 1) for row in rows]

    dataset = TranslationDataset(pairs, **SPECIAL, max_tokens=20, encode=encode)
    assert dataset.epoch == 0
    dataset.epoch = 5
    rows = dataset.rows(0).tolist()
    source, target = unpacked(dataset[0])
    names = [pairs.rows[row] for row in rows]
    assert sorted(names) == [0, 1, 3] and asked == [(0, names, 5), (1, names, 5)]
    # too long with EOS for row 1, empty for row 3: the tokens of the pairs stay
    assert dict(zip(names, source, strict=True)) == {0: [500] * 3, 1: [5], 3: [7]}
    assert dict(zip(names, target, strict=True)) == {0: [500], 1: [501], 3: [503]}
    assert dataset.count == 7


def test_the_loader_gives_whole_batches():
    dataset = TranslationDataset(of_lengths([(n, n) for n in range(1, 9)]), **SPECIAL, max_tokens=12)
    loader = DataLoader(dataset, batch_size=1, collate_fn=first, num_workers=1)
    found = [unpacked(batch) for batch in loader]
    assert found == [unpacked(dataset[index]) for index in range(len(dataset))] and len(found) > 3
    assert pickle.loads(pickle.dumps(first)) is first
    with pytest.raises(ValueError, match="items has 2 batches, must have one"):
        first([dataset[0], dataset[1]])
