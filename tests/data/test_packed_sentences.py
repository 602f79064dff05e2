"""Packed batches of sentences: what is where, what fills them up, and what cannot be packed."""

import pytest
import torch

from nlpfast.data.packed_sentences import ROUNDED, filled, pack_sentences


@pytest.mark.parametrize("lengths", [[1], [3, 5, 2], [63, 1], [64], [64, 1], [7] * 100, [600, 3]], ids=str)
def test_batches_are_filled_up_by_sequences_no_longer_than_the_longest(lengths):
    ends, missing = filled(lengths)
    found = ends.diff().tolist()
    assert ends[0] == 0 and found[: len(lengths)] == lengths
    assert int(ends[-1]) == sum(lengths) + missing and int(ends[-1]) % ROUNDED == 0 and 0 <= missing < ROUNDED
    rest = found[len(lengths) :]
    assert sum(rest) == missing and all(0 < length <= max(lengths) for length in rest)
    assert len(rest) == -(-missing // max(lengths))


def test_tokens_and_segments_are_where_they_belong():
    sentences, types = [[5, 6, 7], [8], [9, 10]], [[0, 0, 1], [1], [0, 1]]
    batch = pack_sentences(sentences, types, pad_id=3)
    assert batch.sentences == 3 and batch.longest == 3
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 10] + [3] * 58
    assert batch.token_type_ids.tolist() == [0, 0, 1, 1, 0, 1] + [0] * 58
    assert batch.input_ids.dtype == batch.cu_seqlens.dtype == torch.int64
    assert not pack_sentences(sentences).token_type_ids.any()


@pytest.mark.parametrize(
    ("sentences", "types", "message"),
    [
        ([], None, "at least one"),
        ([[1], []], None, "each with a token"),
        ([[1, 2]], [[0]], "types has another form"),
        ([[1, 2]], [[0, 0], [0]], "types has another form"),
    ],
)
def test_what_cannot_be_packed(sentences, types, message):
    with pytest.raises(ValueError, match=message):
        pack_sentences(sentences, types)
